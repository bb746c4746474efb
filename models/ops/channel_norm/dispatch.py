"""Hands a normalisation over channels to a backend."""

import torch
from torch import Tensor

from models.ops.channel_norm.reference import channel_norm_reference
from models.ops.triton_support import pick_backend


def channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    is_wide: bool = False,
    backend: str = "auto",
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias, over the channels of each pixel.

    Without a bias nothing is subtracted either: x / sqrt(mean of x² + eps) · weight (RMSNorm).

    Args:
        x: (B, C, H, W).
        weight: (C,); bias: (C,) or None.
        is_wide: under autocast, give float32 as F.layer_norm does.
        backend: "reference", "triton", or "auto": triton on a GPU, unless x is float64.
    Returns:
        (B, C, H, W) in x's dtype, or that of autocast where it is on: a convolution comes next,
        which would round in a pass of its own. Inside it is float32.
    Raises:
        ValueError: an unknown backend, or shapes that do not fit.
    """
    vectors = [v for v in (weight, bias) if v is not None]
    if x.dim() != 4 or any(v.shape != x.shape[1:2] for v in vectors):
        raise ValueError(
            f"channel_norm takes (B, C, H, W) and vectors (C,), got {tuple(x.shape)} and "
            f"{', '.join(str(tuple(v.shape)) for v in vectors)}"
        )
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.float32 if is_wide else torch.get_autocast_dtype(x.device.type)
    if pick_backend("channel_norm", backend, x) == "reference":
        # rms_norm warns of a map that is narrower than its weight
        wide = torch.promote_types(dtype, torch.float32 if bias is None else dtype)
        x = x.to(torch.promote_types(x.dtype, wide))
        return channel_norm_reference(x, weight, bias, eps).to(dtype)
    from models.ops.channel_norm.triton import channel_norm_triton

    return channel_norm_triton(x, weight, bias, eps, dtype)
