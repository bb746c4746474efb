"""Depthwise convolution by PyTorch's own."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """conv2d of one channel at a time in x's dtype, or autocast's, and the activation."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    padding = [size // 2 for size in weight.shape[2:]]
    y = F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
    return y if activation is None else F.silu(y)
