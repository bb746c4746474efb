"""A spectrum's magnitude exchanged by PyTorch's own operators."""

import torch
from torch import Tensor

_LEAST_SHARE = 0.01  # of a map's mean magnitude


def with_magnitude_reference(spectrum: Tensor, magnitude: Tensor) -> Tensor:
    """(B, C, H, W) complex."""
    phase = torch.sgn(spectrum)
    if phase.requires_grad:
        own = spectrum.detach().abs()
        share = own / torch.maximum(own, least_magnitude(own))
        phase = phase.detach() + (phase - phase.detach()) * share
    return magnitude * phase


def least_magnitude(magnitude: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1), above 0: below it the phase's gradient grows no further."""
    least = _LEAST_SHARE * magnitude.mean((-2, -1), keepdim=True)
    return least.clamp_min(torch.finfo(magnitude.dtype).tiny)
