"""The two outputs: segmentation logits and the fused image (method, Sec. 6)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import (
    BatchNorm2d,
    FusedConv2d,
    LayerNorm2d,
    Linear2d,
    Recomputed,
    ReplicateConv2d,
    at_least_float32,
    resize,
)
from models.ops.epilogue import epilogue
from models.ops.sobel import sobel
from models.ss2d import SS2D


class SegmentationHead(nn.Module):
    """Four semantic maps -> logits (B, classes, H, W) at the image's size."""

    def __init__(
        self, widths: Sequence[int], *, num_classes: int, hidden: int, d_state: int
    ) -> None:
        super().__init__()
        self.embed = nn.ModuleList(Linear2d(width, hidden) for width in widths)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(widths) * hidden, hidden, 1, bias=False), BatchNorm2d(hidden)
        )
        self.ss2d = SS2D(hidden, d_state=d_state, expand=2)
        self.norm = LayerNorm2d(hidden)
        self.classify = nn.Sequential(
            nn.ReLU(), nn.Dropout2d(0.1), FusedConv2d(hidden, num_classes, 1)
        )

    def forward(self, maps: Sequence[Tensor], image_hw: tuple[int, int]) -> Tensor:
        x = self.norm(self.ss2d(self._fused(maps)))
        return resize(self.classify(x), image_hw)

    def _fused(self, maps: Sequence[Tensor]) -> Tensor:
        """The embedded maps, resized, concatenated and fused, in an order that costs less.

        The fusing convolution is 1x1: it adds up over the concatenated maps, may come before the
        resizing, at each map's own size, and there makes one linear layer with the embedding.
        """
        conv, norm = self.fuse
        fused = None
        for x, embed, weight in zip(maps, self.embed, conv.weight.chunk(len(maps), 1), strict=True):
            weight = weight.flatten(1)
            x = resize(F.conv2d(x, (weight @ embed.weight)[..., None, None]), maps[0].shape[-2:])
            fused = epilogue(x, weight @ embed.bias, residual=fused)
        return norm(fused)


class FusionHead(nn.Module):
    """Both modalities' maps of all stages and the raw pair -> fused image in [0, 1].

    rgb_maps, thermal_maps: four (B, C_i, h_i, w_i) each; rgb, thermal: (B, 3, H, W) in [0, 1]
    -> (B, 3, H, W).
    """

    def __init__(self, widths: Sequence[int], *, hidden: int) -> None:
        super().__init__()
        self.rgb_embed = nn.ModuleList(_stage_embedding(width, hidden) for width in widths)
        self.thermal_embed = nn.ModuleList(_stage_embedding(width, hidden) for width in widths)
        self.fuse = nn.Sequential(
            ReplicateConv2d(2 * len(widths) * hidden + 6, hidden, bias=False),
            BatchNorm2d(hidden),
            nn.ReLU(),
        )
        self.detail = GradientResidualBlock(hidden)
        self.project = FusedConv2d(hidden, 3, 1)

    def forward(
        self,
        rgb_maps: Sequence[Tensor],
        thermal_maps: Sequence[Tensor],
        rgb: Tensor,
        thermal: Tensor,
    ) -> Tensor:
        image_hw = rgb.shape[-2:]
        embeddings = [*self.rgb_embed, *self.thermal_embed]
        maps = [*rgb_maps, *thermal_maps]
        layers = [resize(e(x), image_hw) for e, x in zip(embeddings, maps, strict=True)]
        images = (x.to(layers[0].dtype) for x in (rgb, thermal, *self._filling(rgb)))
        x = self.fuse(torch.cat([*layers, *images], dim=1))
        return torch.sigmoid(at_least_float32(self.project(self.detail(x))))

    def _filling(self, rgb: Tensor) -> list[Tensor]:
        """On a GPU, zeros up to a multiple of four channels, which is what TF32 kernels load."""
        missing = -self.fuse[0].in_channels % 4
        if missing == 0 or not rgb.is_cuda:
            return []
        return [rgb.new_zeros(len(rgb), missing, *rgb.shape[2:])]


class GradientResidualBlock(Recomputed):
    """Gradient residual dense block: two densely connected 3x3 convs, plus the Sobel magnitude.

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.ModuleList(ReplicateConv2d(count * channels, channels) for count in (1, 2))
        self.project = FusedConv2d(3 * channels, channels, 1)
        self.gradient = FusedConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for conv in self.dense:
            features = torch.cat([features, F.leaky_relu(conv(features), 0.2)], dim=1)
        gradient_x, gradient_y = sobel(at_least_float32(x))
        magnitude = torch.sqrt(gradient_x**2 + gradient_y**2 + 1e-12)
        return F.leaky_relu(self.project(features, self.gradient(magnitude)), 0.1)


def _stage_embedding(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        LayerNorm2d(width),
        nn.Conv2d(width, hidden, 1, bias=False),
        BatchNorm2d(hidden),
        nn.ReLU(),
    )
