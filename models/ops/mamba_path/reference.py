"""The parts around a Mamba scan by PyTorch's own operators."""

import torch.nn.functional as F
from torch import Tensor


def conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, flip: bool) -> Tensor:
    """A causal depthwise convolution of the sequence, or of its reverse, and SiLU."""
    if flip:
        x = x.flip(-1)
    width = weight.shape[1]
    y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[-1]])


def gate_reference(y: Tensor, flipped: Tensor | None, z: Tensor) -> Tensor:
    """y · SiLU(z), or the mean of y and the other pass in y's order."""
    if flipped is not None:
        y = 0.5 * (y + flipped.flip(-1))
    return y * F.silu(z)
