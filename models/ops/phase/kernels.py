"""Triton kernels that exchange a spectrum's magnitude, and their gradient: one pass each.

Complex numbers lie as real and imaginary part side by side. A program has BLOCK of them.
"""

import triton
import triton.language as tl

from models.ops.plane_kernels import take


@triton.jit
def _polar(real, imaginary):
    """Magnitude, and both parts of the phase, which is 0 where the number is 0.

    Parts are divided by the larger one first: their squares could be too large or too small.
    """
    scale = tl.maximum(tl.abs(real), tl.abs(imaginary))
    is_zero = scale == 0
    divisor = tl.where(is_zero, 1.0, scale)
    real /= divisor
    imaginary /= divisor
    length = tl.sqrt(real * real + imaginary * imaginary)
    divisor = tl.where(is_zero, 1.0, length)
    return scale * length, real / divisor, imaginary / divisor


@triton.jit(do_not_specialize=["length"])
def _with_magnitude_kernel(spectrum, magnitude, y, length, BLOCK: tl.constexpr):
    """y: magnitude times the phase of spectrum, `length` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    real, imaginary = take(spectrum, 2 * at, inside), take(spectrum, 2 * at + 1, inside)
    _, cosine, sine = _polar(real, imaginary)
    value = take(magnitude, at, inside)
    tl.store(y + 2 * at, value * cosine, mask=inside)
    tl.store(y + 2 * at + 1, value * sine, mask=inside)


@triton.jit(do_not_specialize=["length", "frequencies"])
def _with_magnitude_gradient_kernel(
    grad_y,
    spectrum,
    magnitude,
    least,
    grad_spectrum,
    grad_magnitude,
    length,
    frequencies,
    BLOCK: tl.constexpr,
):
    """Gradients of spectrum and magnitude; least: one number for `frequencies` of them each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    real, imaginary = take(spectrum, 2 * at, inside), take(spectrum, 2 * at + 1, inside)
    own, cosine, sine = _polar(real, imaginary)
    grad_real, grad_imaginary = take(grad_y, 2 * at, inside), take(grad_y, 2 * at + 1, inside)
    along = grad_real * cosine + grad_imaginary * sine  # the rest turns the phase
    tl.store(grad_magnitude + at, along, mask=inside)
    value = take(magnitude, at, inside) / tl.maximum(own, take(least, at // frequencies, inside))
    value = tl.where(own == 0, 0.0, value)
    tl.store(grad_spectrum + 2 * at, value * (grad_real - along * cosine), mask=inside)
    tl.store(grad_spectrum + 2 * at + 1, value * (grad_imaginary - along * sine), mask=inside)
