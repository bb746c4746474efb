"""Checks the arguments of the parts around a Mamba scan and hands them to a backend."""

from torch import Tensor

from models.ops.mamba_path.reference import conv_silu_reference, gate_reference
from models.ops.triton_support import pick_backend


def conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, flip: bool = False, backend: str = "auto"
) -> Tensor:
    """SiLU(causal depthwise convolution): y_l = SiLU(bias + Σ_k weight_k · x_{l - K + 1 + k}).

    Args:
        x: (B, D, L).
        weight: (D, K); bias: (D,).
        flip: take x from its last token to its first; the result stays in that order.
        backend: "reference", "triton", or "auto": triton on a GPU, unless x is float64.
    Returns:
        (B, D, L) in x's dtype.
    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
    """
    if x.dim() != 3 or weight.dim() != 2 or not len(weight) == len(bias) == x.shape[1]:
        raise ValueError(
            f"conv_silu takes (B, D, L), (D, K) and (D,), got {tuple(x.shape)}, "
            f"{tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    if pick_backend("conv_silu", backend, x) == "reference":
        return conv_silu_reference(x, weight, bias, flip)
    from models.ops.mamba_path.triton import conv_silu_triton

    return conv_silu_triton(x, weight, bias, flip)


def gate(y: Tensor, flipped: Tensor | None, z: Tensor, *, backend: str = "auto") -> Tensor:
    """y · SiLU(z) (B, D, L); with `flipped`, which runs backwards, the mean of both instead of y.

    Raises:
        ValueError: shapes that differ, or an unknown backend.
    """
    if any(x is not None and x.shape != z.shape for x in (y, flipped)):
        shapes = [None if x is None else tuple(x.shape) for x in (y, flipped, z)]
        raise ValueError(f"gate takes tensors of one shape, got {shapes}")
    if pick_backend("gate", backend, z) == "reference":
        return gate_reference(y, flipped, z)
    from models.ops.mamba_path.triton import gate_triton

    return gate_triton(y, flipped, z)
