"""Mixed precision with all weights rounded together."""

from typing import Any

import torch
from torch import Tensor, nn

from models.layers import Float32Conv2d

_PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Linear)  # whose operands autocast rounds


def call_rounded(model: nn.Module, dtype: torch.dtype | None, *inputs: Tensor) -> Any:
    """model(*inputs) under autocast to `dtype` (None: without).

    Autocast alone rounds each weight in a kernel of its own, and its gradient in another: more than
    a thousand small kernels a step. Values and gradients are the same.
    """
    device = inputs[0].device.type
    if dtype is None:
        with torch.autocast(device, enabled=False):
            return model(*inputs)
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _PRODUCTS) and not _stays_wide(module)
    }
    rounded = _Rounded.apply(dtype, *weights.values())
    with torch.autocast(device, dtype=dtype):
        return torch.func.functional_call(model, dict(zip(weights, rounded, strict=True)), inputs)


def _stays_wide(module: nn.Module) -> bool:
    """Whether autocast leaves the weight alone: a depthwise one's kernel on a GPU takes float32.

    On a CPU autocast itself rounds depthwise weights.
    """
    return isinstance(module, Float32Conv2d) or getattr(module, "groups", 1) > 1


class _Rounded(torch.autograd.Function):
    """Copies of tensors in another type."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [x.dtype for x in tensors]
        copies = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
        torch._foreach_copy_(copies, tensors)
        return copies

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        copies = [
            torch.empty_like(x, dtype=dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        torch._foreach_copy_(copies, gradients)
        return None, *copies
