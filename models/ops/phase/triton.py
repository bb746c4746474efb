"""A spectrum's magnitude exchanged on GPU, in one pass, and another for the gradient."""

import torch
import triton
from torch import Tensor

from models.ops.layout import contiguous
from models.ops.phase.kernels import _with_magnitude_gradient_kernel, _with_magnitude_kernel
from models.ops.phase.reference import least_magnitude
from models.ops.triton_support import INTERPRETED, check_tensor, on_device

_BLOCK = 16 if INTERPRETED else 512  # numbers of a program


def with_magnitude_triton(spectrum: Tensor, magnitude: Tensor) -> Tensor:
    """The same function as with_magnitude_reference.

    Raises:
        RuntimeError: tensors that are not on a GPU, or complex128.
    """
    check_tensor("with_magnitude backend 'triton'", magnitude, for_float64="reference")
    return _forward(spectrum, magnitude)


@torch.library.custom_op("cmfs::with_magnitude", mutates_args=())
def _forward(spectrum: Tensor, magnitude: Tensor) -> Tensor:
    spectrum, magnitude = contiguous(spectrum, magnitude)
    y = torch.empty_like(spectrum)
    length = magnitude.numel()
    if length:
        with on_device(y):
            _with_magnitude_kernel[(triton.cdiv(length, _BLOCK),)](
                torch.view_as_real(spectrum), magnitude, torch.view_as_real(y), length, BLOCK=_BLOCK
            )
    return y


@_forward.register_fake
def _(spectrum, magnitude):
    return spectrum.new_empty(spectrum.shape)


@torch.library.custom_op("cmfs::with_magnitude_gradient", mutates_args=())
def _backward(grad_y: Tensor, spectrum: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    grad_y, spectrum, magnitude = contiguous(grad_y, spectrum, magnitude)
    gradients = torch.empty_like(spectrum), torch.empty_like(magnitude)
    length = magnitude.numel()
    if length:
        least = least_magnitude(spectrum.abs())
        grad_spectrum, grad_magnitude = gradients
        with on_device(spectrum):
            _with_magnitude_gradient_kernel[(triton.cdiv(length, _BLOCK),)](
                torch.view_as_real(grad_y),
                torch.view_as_real(spectrum),
                magnitude,
                least,
                torch.view_as_real(grad_spectrum),
                grad_magnitude,
                length,
                length // least.numel(),
                BLOCK=_BLOCK,
            )
    return gradients


@_backward.register_fake
def _(grad_y, spectrum, magnitude):
    return spectrum.new_empty(spectrum.shape), magnitude.new_empty(magnitude.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad_y, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
