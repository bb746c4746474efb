"""MIA: region-aware Modal Interaction Alignment, guided by CLIP text features (method, Sec. 3)."""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from models.branches import Branch, side_by_side
from models.layers import (
    FusedConv2d,
    LayerNorm2d,
    Recomputed,
    RMSNorm2d,
    pad_to_multiple,
    shuffle_channels,
)
from models.mamba import BidirectionalMamba
from models.ops.padding import crop
from models.text_prior import TextPrior


class ModalInteractionAlignment(nn.Module):
    """Shuffle and scan each modality, then let them exchange what each region needs.

    rgb, thermal: (B, C, H, W) -> two maps of the same shape; any H and W.

    Args:
        regions_per_side: P; the map is cut into P x P regions.
        region_grid: height and width to which a region's context is pooled before it meets the
            text: the region's own size at the training crop.
        text_prior: frozen CLIP features, shared by all stages (held by the network).
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int,
        regions_per_side: int,
        region_grid: tuple[int, int],
        num_texts: int,
        text_dimension: int,
    ) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.context = nn.Sequential(
            nn.Conv2d(2 * channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )
        self.rgb_shuffle = ShuffleMambaBlock(channels, d_state=d_state)
        self.thermal_shuffle = ShuffleMambaBlock(channels, d_state=d_state)
        self.text_gate = RegionTextGate(
            regions_per_side=regions_per_side,
            region_grid=region_grid,
            num_texts=num_texts,
            text_dimension=text_dimension,
        )
        self.interaction = RegionModalInteraction(channels, regions_per_side=regions_per_side)

    def forward(self, rgb: Tensor, thermal: Tensor, text_prior: TextPrior) -> tuple[Tensor, Tensor]:
        gate = Branch(partial(self._text_gate, rgb, thermal, text_prior))
        rgb, thermal = side_by_side(
            partial(self.rgb_shuffle, rgb), partial(self.thermal_shuffle, thermal)
        )
        return self.interaction(rgb, thermal, gate.result())

    def _text_gate(self, rgb: Tensor, thermal: Tensor, text_prior: TextPrior) -> Tensor:
        """(B, 1, P, P): one gate per region."""
        return self.text_gate(self.context(torch.cat([rgb, thermal], dim=1)), text_prior)


class ShuffleMambaBlock(Recomputed):
    """Channel shuffle in 2 groups, LayerNorm, bidirectional Mamba over raster order, residual.

    (B, C, H, W) -> (B, C, H, W); the residual starts after the shuffle.
    """

    def __init__(self, channels: int, *, d_state: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.mixer_norm = RMSNorm2d(channels)
        self.mixer = BidirectionalMamba(channels, d_state=d_state)

    def forward(self, x: Tensor) -> Tensor:
        x = shuffle_channels(x, 2)
        tokens = self.mixer_norm(self.norm(x)).flatten(2)  # (B, C, L)
        return x + self.mixer(tokens).view_as(x)


class RegionTextGate(nn.Module):
    """One gate in (0, 1) per region, from its likeness to each class text.

    context (B, C, H, W) -> (B, 1, P, P). A region's descriptor is a linear map of its context,
    averaged over channels and pooled to `region_grid`; its cosine similarities to the Q texts make
    a Q-channel P x P map that two 3x3 convolutions turn into the gate.
    """

    def __init__(
        self,
        *,
        regions_per_side: int,
        region_grid: tuple[int, int],
        num_texts: int,
        text_dimension: int,
    ) -> None:
        super().__init__()
        self.regions_per_side = regions_per_side
        self.pool = nn.AdaptiveAvgPool2d(region_grid)
        self.describe = nn.Linear(region_grid[0] * region_grid[1], text_dimension)
        self.gate = nn.Sequential(
            nn.Conv2d(num_texts, num_texts, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_texts, 1, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, context: Tensor, text_prior: TextPrior) -> Tensor:
        per_side = self.regions_per_side
        mean = pad_to_multiple(context.mean(1, keepdim=True), per_side, per_side)
        regions = self.pool(split_regions(mean, per_side))  # (B·P², 1, h, w)
        similarity = text_prior.similarity(self.describe(regions.flatten(1)))  # (B·P², Q)
        similarity = similarity.unflatten(0, (-1, per_side, per_side)).permute(0, 3, 1, 2)
        return self.gate(similarity)


class RegionModalInteraction(Recomputed):
    """Exchange between the modalities, weighted per position, per region and by the text gate.

    F_rgb' = (a_c + a_s)_rgb · F_th · w · g + F_rgb and F_th' likewise with 1 − w, where a_c and
    a_s are each modality's own attention inside a region.
    """

    def __init__(self, channels: int, *, regions_per_side: int) -> None:
        super().__init__()
        self.regions_per_side = regions_per_side
        self.rgb_attention = HybridAttention(channels)
        self.thermal_attention = HybridAttention(channels)
        self.exchange_weight = nn.Sequential(
            OrderedDict(  # as checkpoints have them: the activation was number 1
                [
                    ("0", FusedConv2d(2 * channels, channels, 1, activation="relu")),
                    ("2", FusedConv2d(channels, channels, 1)),
                    ("3", nn.Sigmoid()),
                ]
            )
        )

    def forward(self, rgb: Tensor, thermal: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.exchange_weight(torch.cat([rgb, thermal], dim=1))
        gate = self._spread(gate, rgb)
        to_rgb = self._attend(self.rgb_attention, rgb) * thermal * weight * gate
        to_thermal = self._attend(self.thermal_attention, thermal) * rgb * (1 - weight) * gate
        return rgb + to_rgb, thermal + to_thermal

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        """A modality's attention inside each region, put back to the map's own size."""
        per_side = self.regions_per_side
        regions = split_regions(pad_to_multiple(x, per_side, per_side), per_side)
        return crop(merge_regions(attention(regions), per_side), x.shape[-2:])

    def _spread(self, gate: Tensor, like: Tensor) -> Tensor:
        """(B, 1, P, P) -> (B, 1, H, W): every pixel gets its region's gate."""
        height, width = like.shape[-2:]
        per_side = self.regions_per_side
        region_h, region_w = -(-height // per_side), -(-width // per_side)
        spread = gate.repeat_interleave(region_h, dim=2).repeat_interleave(region_w, dim=3)
        return crop(spread, like.shape[-2:])


class HybridAttention(nn.Module):
    """Channel attention plus spatial attention of one region: a_c + a_s, in (0, 2).

    (N, C, h, w) -> (N, C, h, w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.Linear(2 * channels, channels // 2),
            nn.ReLU(),
            nn.Linear(channels // 2, channels),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        profile = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return self.channel(pooled)[:, :, None, None] + self.spatial(profile)


def split_regions(x: Tensor, per_side: int) -> Tensor:
    """Cut a map into per_side² equal regions, folded into the batch (MIA, Sec. 3).

    Args:
        x: (B, C, H, W), any dtype.
        per_side: regions along H and along W.
    Returns:
        (B·per_side², C, H/per_side, W/per_side), regions of one image in raster order.
    Raises:
        ValueError: H or W is not a multiple of per_side.
    """
    height, width = x.shape[-2:]
    if height % per_side or width % per_side:
        raise ValueError(f"{height}x{width} does not divide into {per_side}x{per_side} regions")
    x = x.unflatten(3, (per_side, -1)).unflatten(2, (per_side, -1))  # (B, C, P, h, P, w)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def merge_regions(x: Tensor, per_side: int) -> Tensor:
    """The inverse of split_regions: (B·P², C, h, w) -> (B, C, P·h, P·w)."""
    x = x.unflatten(0, (-1, per_side, per_side))  # (B, P, P, C, h, w)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
