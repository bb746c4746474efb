"""Layer normalisation over channels by PyTorch's own, which wants them last."""

import torch.nn.functional as F
from torch import Tensor


def channel_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The map turned channels-last and back; what comes out lies channels-last in memory."""
    x = x.permute(0, 2, 3, 1)
    if bias is None:
        x = F.rms_norm(x, weight.shape, weight, eps)
    else:
        x = F.layer_norm(x, weight.shape, weight, bias, eps)
    return x.permute(0, 3, 1, 2)
