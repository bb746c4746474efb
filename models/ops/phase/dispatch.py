"""Hands the exchange of a spectrum's magnitude to a backend."""

import torch
from torch import Tensor

from models.ops.phase.reference import with_magnitude_reference
from models.ops.triton_support import pick_backend


def with_magnitude(spectrum: Tensor, magnitude: Tensor, *, backend: str = "auto") -> Tensor:
    """magnitude · spectrum / |spectrum|, and 0 where the spectrum is 0.

    The phase's gradient is one over the spectrum's magnitude, and a single frequency that nearly
    cancels would drown all others. Below a hundredth of the mean magnitude of its map it grows no
    further.

    Args:
        spectrum: (B, C, H, W) complex, each (H, W) a map of frequencies.
        magnitude: (B, C, H, W) real, of the same precision.
        backend: "reference", "triton", or "auto": triton on a GPU, unless spectrum is complex128.
    Returns:
        (B, C, H, W) complex.
    Raises:
        ValueError: an unknown backend, or shapes or types that do not fit.
    """
    precision = {torch.complex64: torch.float32, torch.complex128: torch.float64}
    if spectrum.shape != magnitude.shape or precision.get(spectrum.dtype) != magnitude.dtype:
        raise ValueError(
            f"with_magnitude takes a complex spectrum and a real magnitude of its shape and "
            f"precision, got {tuple(spectrum.shape)} {spectrum.dtype} and "
            f"{tuple(magnitude.shape)} {magnitude.dtype}"
        )
    backend = pick_backend("with_magnitude", backend, spectrum, dtype=magnitude.dtype)
    if backend == "reference":
        return with_magnitude_reference(spectrum, magnitude)
    from models.ops.phase.triton import with_magnitude_triton

    return with_magnitude_triton(spectrum, magnitude)
