"""Fusion metrics from edges: Qabf and Nabf.

`images` is (3, B, H, W): thermal, rgb and fused, grey in 0..255, float32: gradients of whole levels
are exact in it, and so is what is equally strong. Sums are taken in float64; results are (B,).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def edge_preservation(images: Tensor, *, equal_is_one: bool) -> Tensor:
    """Qabf (Xydeas and Petrović, 2000): edges of both sources found again in the fused image.

    0 where neither source has an edge. Outside the image all is black.

    Args:
        equal_is_one: the ratio of two edges of the same strength is 1; False: it is that strength,
            as published programs have it by a slip.
    """
    gradient_x, gradient_y = _sobel(F.pad(images, (1, 1, 1, 1)))
    strength = _strength(gradient_x, gradient_y)
    is_vertical = gradient_x == 0
    angle = gradient_y.neg_().div_(gradient_x).atan_().masked_fill_(is_vertical, math.pi / 2)
    ratio = _ratio(strength[:2], strength[2])
    if not equal_is_one:
        ratio = torch.where(strength[:2] == strength[2], strength[2], ratio)
    turn = (angle[:2] - angle[2]).abs_().mul_(-2 / math.pi).add_(1)
    quality = _sigmoid(ratio, 15, 0.5).mul_(_sigmoid(turn, 22, 0.8)).mul_(0.9994 * 0.9879)
    available = _sum(strength[:2]).sum(0)
    kept = _sum(quality.mul_(strength[:2])).sum(0)
    return kept / available.masked_fill(available == 0, 1)


def fusion_artifacts(images: Tensor) -> Tensor:
    """Nabf (Shreyamsha Kumar, 2013): edges of the fused image that neither source has; 0 = none.

    Outside the image is its mirror image. Strengths are of an eighth of the gradient.
    """
    gradient_x, gradient_y = _sobel(F.pad(images, (1, 1, 1, 1), mode="reflect"))
    strength = _strength(gradient_x, gradient_y).div_(8)
    angle = gradient_x.div_(gradient_y).atan_().masked_fill_(strength == 0, 0)
    turn = (angle[:2] - angle[2]).abs_().sub_(math.pi / 2).abs_().mul_(2 / math.pi)
    ratio = _ratio(strength[:2], strength[2])
    # In float64, because little is lost of an edge that is kept.
    quality = _sigmoid(ratio.double(), 19, 0.5).mul_(_sigmoid(turn.double(), 22, 0.5))
    lost = 1 - quality.mul_(0.9999 * 0.9995).sqrt_()
    weight = (strength[:2] * strength[:2].sqrt()).masked_fill_(strength[:2] < 2, 0.001)
    is_new = strength[2] > strength[:2].amax(0)
    return _sum(lost.mul_(weight).mul_(is_new)).sum(0) / _sum(weight).sum(0)


def _sobel(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients across the columns and along them: (..., H + 2, W + 2) -> (..., H, W) each."""
    across = padded[..., 2:] - padded[..., :-2]
    along = padded[..., 2:, :] - padded[..., :-2, :]
    gradient_x = across[..., :-2, :] + across[..., 2:, :]
    gradient_y = along[..., :-2] + along[..., 2:]
    return (
        gradient_x.add_(across[..., 1:-1, :], alpha=2),
        gradient_y.add_(along[..., 1:-1], alpha=2),
    )


def _strength(gradient_x: Tensor, gradient_y: Tensor) -> Tensor:
    return gradient_x.square().add_(gradient_y.square()).sqrt_()


def _ratio(first: Tensor, second: Tensor) -> Tensor:
    """The weaker over the stronger; 0 where both are 0."""
    stronger = torch.maximum(first, second)
    return torch.minimum(first, second).div_(stronger.masked_fill_(stronger == 0, 1))


def _sigmoid(x: Tensor, slope: float, centre: float) -> Tensor:
    return (x - centre).mul_(slope).sigmoid_()


def _sum(x: Tensor) -> Tensor:
    return x.sum((-2, -1), dtype=torch.float64)
