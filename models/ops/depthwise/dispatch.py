"""Checks the arguments of a depthwise convolution and hands them to a backend."""

from torch import Tensor

from models.ops.depthwise.reference import depthwise_conv_reference
from models.ops.triton_support import has_triton_tuples, pick_backend


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(bias + Σ weight · neighbours) of each channel by itself, zeros around the map.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, kh, kw), both odd; bias: (C,).
        activation: None or "silu".
        backend: "reference", "triton", or "auto": triton (3.3 or later) on a GPU, unless x is
            float64.
    Returns:
        (B, C, H, W) in x's dtype, or in autocast's where that is on, as F.conv2d.
    Raises:
        ValueError: shapes that do not fit, an unknown activation or an unknown backend.
    """
    _check_shapes(x, weight, bias)
    if activation not in (None, "silu"):
        raise ValueError(f"unknown activation '{activation}'; known: None, silu")
    backend = pick_backend("depthwise_conv", backend, x, is_there=has_triton_tuples)
    if backend == "reference":
        return depthwise_conv_reference(x, weight, bias, activation)
    from models.ops.depthwise.triton import depthwise_conv_triton

    return depthwise_conv_triton(x, weight, bias, activation)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fit = x.dim() == 4 and weight.dim() == 4 and weight.shape[:2] == (x.shape[1], 1)
    fit = fit and all(size % 2 for size in weight.shape[2:])
    if not fit or (bias is not None and bias.shape != x.shape[1:2]):
        raise ValueError(
            "depthwise_conv takes (B, C, H, W), (C, 1, kh, kw) with kh and kw odd, and (C,) or "
            f"None, got {tuple(x.shape)}, {tuple(weight.shape)}, "
            f"{None if bias is None else tuple(bias.shape)}"
        )
