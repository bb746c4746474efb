"""Checks the arguments of what follows a convolution and hands them to a backend."""

from torch import Tensor

from models.ops.epilogue.reference import ACTIVATIONS, epilogue_reference, result_dtype
from models.ops.triton_support import pick_backend


def epilogue(
    x: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + factor · activation(x + bias); what is None is left out.

    Args:
        x: (B, C, H, W) or (B, C, L), a convolution's product without its bias.
        bias: (C,).
        activation: "gelu" (exact, by erf), "relu" or "silu".
        factor: one number per image, (B,) or with ones for x's other dimensions; it takes no
            gradient (stochastic depth).
        residual: of x's shape.
        backend: "reference", "triton", or "auto": triton on a GPU, unless in float64.
    Returns:
        Of x's shape and dtype; with a residual, of the dtype that both promote to. Computed in
        float32 where that is narrower. x itself where nothing follows.
    Raises:
        ValueError: an unknown activation or backend, shapes that do not fit x, or a factor that
            requires a gradient.
    """
    _check(x, bias, activation, factor, residual)
    if bias is activation is factor is residual is None:
        return x
    if pick_backend("epilogue", backend, x, dtype=result_dtype(x, residual)) == "reference":
        return epilogue_reference(x, bias, activation, factor, residual)
    from models.ops.epilogue.triton import epilogue_triton

    return epilogue_triton(x, bias, activation, factor, residual)


def _check(
    x: Tensor,
    bias: Tensor | None,
    activation: str | None,
    factor: Tensor | None,
    residual: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(map(str, ACTIVATIONS))
        raise ValueError(f"unknown activation '{activation}'; known: {known}")
    if x.dim() not in (3, 4):
        raise ValueError(f"epilogue takes (B, C, H, W) or (B, C, L), got {tuple(x.shape)}")
    batch, channels, *ones = x.shape[:2] + (1,) * (x.dim() - 2)
    fitting = {
        "bias": (bias, [(channels,)]),
        "factor": (factor, [(batch,), (batch, 1, *ones)]),
        "residual": (residual, [tuple(x.shape)]),
    }
    for name, (tensor, shapes) in fitting.items():
        if tensor is not None and tuple(tensor.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} must be {expected} for x {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
    if factor is not None and factor.requires_grad:
        raise ValueError("factor takes no gradient; detach it")
