"""VMamba-Tiny [s1l8] encoder (Liu et al., 2024), with the official checkpoint's parameter names."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from models.layers import FusedConv2d, LayerNorm2d, Linear2d, Recomputed
from models.ops.epilogue import epilogue
from models.ss2d import SS2D


class VMambaEncoder(nn.Module):
    """Patch embedding and four stages of VSS blocks at strides 4, 8, 16, 32.

    x: (B, 3, H, W) in [0, 1], H, W >= 32 -> list of 4 maps (B, C_i, ~H/2^(i+2), ~W/2^(i+2)), each
    stage's blocks' output before its downsampling (sides round up). The input is standardised here
    by `image_mean` and `image_std`. The CMFS network calls advance() itself, because
    the modalities interact between the stages.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        widths: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(3, 1, 1), persistent=False)
        self.patch_embed = _patch_embed(widths[0])
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()
        self.layers = nn.ModuleList()
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            first = sum(depths[:stage])
            blocks = [
                VSSBlock(width, d_state=d_state, mlp_ratio=mlp_ratio, drop_path=rate)
                for rate in rates[first : first + depth]
            ]
            is_last = stage + 1 == len(depths)
            down = nn.Identity() if is_last else _downsample(width, widths[stage + 1])
            self.layers.append(
                nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks), downsample=down))
            )

    def advance(self, stage: int, x: Tensor) -> Tensor:
        """From the image (stage 0) or the stage before to the output of a stage's blocks.

        x: (B, 3, H, W) in [0, 1], or the map of the stage before -> (B, C_i, ~H/2^(i+2), ...).
        """
        if stage == 0:
            x = self.patch_embed((x - self.mean) / self.std)
        else:
            x = self.layers[stage - 1].downsample(x)
        return self.layers[stage].blocks(x)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in range(len(self.layers)):
            x = self.advance(stage, x)
            maps.append(x)
        return maps


class VSSBlock(Recomputed):
    """x + drop(SS2D(norm(x))), then x + drop(MLP(norm(x)))."""

    def __init__(self, channels: int, *, d_state: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.op = SS2D(channels, d_state=d_state, expand=1, use_z_gate=False, conv_bias=False)
        self.norm2 = LayerNorm2d(channels)
        self.mlp = MLP(channels, int(mlp_ratio * channels))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        """Of each image and branch, 0 where it is dropped, else one over the rate that stays."""
        if not self.training or self.drop_path.p == 0:
            return ()
        ones = x.new_ones(x.shape[0], 1, 1, 1)
        return self.drop_path(ones), self.drop_path(ones)

    def forward(self, x: Tensor, *keep: Tensor) -> Tensor:
        keep_op, keep_mlp = keep or (None, None)
        x = epilogue(self.op(self.norm(x)), None, factor=keep_op, residual=x)
        return self.mlp(self.norm2(x), x, keep_mlp)


class MLP(nn.Module):
    """residual + factor · (linear, GELU, linear) of a map; factor: one number per image, or 1."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear2d(channels, hidden, activation="gelu")
        self.fc2 = Linear2d(hidden, channels)

    def forward(self, x: Tensor, residual: Tensor, factor: Tensor | None = None) -> Tensor:
        return self.fc2(self.fc1(x), residual, factor)


def _patch_embed(width: int) -> nn.Sequential:
    """Two stride-2 3x3 convs; the keys are the official positions in the Sequential."""
    return nn.Sequential(
        OrderedDict(
            [
                ("0", FusedConv2d(3, width // 2, 3, stride=2, padding=1)),
                ("2", LayerNorm2d(width // 2)),
                ("4", nn.GELU()),
                ("5", FusedConv2d(width // 2, width, 3, stride=2, padding=1)),
                ("7", LayerNorm2d(width, is_wide=True)),
            ]
        )
    )


def _downsample(width: int, next_width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            [
                ("1", FusedConv2d(width, next_width, 3, stride=2, padding=1)),
                ("3", LayerNorm2d(next_width, is_wide=True)),
            ]
        )
    )
