"""An exponential moving average (EMA) of a network's weights, which often scores better."""

import copy

import torch
from torch import nn

from models import CMFS


class WeightAverage:
    """A copy of the network whose weights follow the trained ones slowly.

    After step n (from 0): average += (1 - d) * (weights - average), d = min(decay, (1+n) / (10+n)),
    so that the first steps do not count for long. Everything stays on the network's device.

    Attributes:
        model: the copy, in evaluation mode; what is scored and kept.
    """

    def __init__(self, model: CMFS, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights of `model` after step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take over running statistics, which are averages already."""
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
