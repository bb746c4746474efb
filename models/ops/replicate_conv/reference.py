"""A convolution with repeated borders by PyTorch's own, of a map that is padded first."""

import torch.nn.functional as F
from torch import Tensor

from models.ops.padding import replicate_pad


def replicate_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The padded map, convolved."""
    return F.conv2d(replicate_pad(x, 1, 1, 1, 1), weight, bias)
