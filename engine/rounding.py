"""Mixed precision with all weights rounded together."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.layers import Float32Conv2d

Result = TypeVar("Result")

_PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Linear)  # whose operands autocast rounds


def with_rounded_weights(
    model: nn.Module, dtype: torch.dtype | None, run: Callable[[nn.Module], Result]
) -> Result:
    """run(model), which under autocast to `dtype` finds the weights rounded (None: as they are).

    Autocast alone rounds each weight in a kernel of its own, and its gradient in another: more than
    a thousand small kernels a step. Values and gradients are the same. `run` includes the backward
    pass: parts that are computed anew in it find the same weights, and the rounded ones stay until
    all gradients are there, also of branches that read them on streams of their own.
    """
    if dtype is None:
        return run(model)
    weights = {
        f"model.{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _PRODUCTS) and not _stays_wide(module)
    }
    rounded = dict(zip(weights, _Rounded.apply(dtype, *weights.values()), strict=True))
    return torch.func.functional_call(_Run(model), rounded, (run,))


class _Run(nn.Module):
    """What is done with a network, as a module that holds it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], Result]) -> Result:
        return run(self.model)


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
