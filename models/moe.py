"""Semantic branch: low-rank mixture of experts and spatial modulation (method, Sec. 5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import (
    BatchNorm2d,
    DepthwiseConv2d,
    FusedConv2d,
    GatedFFN,
    LayerNorm2d,
    Recomputed,
    at_least_float32,
    pad_to_multiple,
    resize,
    shuffle_channels,
)
from models.mamba import Mamba


class SemanticBranch(nn.Module):
    """From both modalities' maps of a stage to one semantic map.

    rgb, thermal: (B, C, H, W) -> (B, C, H, W) and the load-balance loss (), a mean over blocks.
    """

    def __init__(
        self, channels: int, *, d_state: int, ranks: tuple[int, ...] = (2, 4, 8), depth: int = 2
    ) -> None:
        super().__init__()
        self.embed = ChannelEmbed(2 * channels, channels)
        self.experts = nn.ModuleList(
            LowRankMoEBlock(channels, d_state=d_state, ranks=ranks) for _ in range(depth)
        )
        self.modulators = nn.ModuleList(SpatialModulatingExpert(channels) for _ in range(depth))

    def forward(self, rgb: Tensor, thermal: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(torch.cat([rgb, thermal], dim=1))
        losses = []
        for expert, modulate in zip(self.experts, self.modulators, strict=True):
            x, loss = expert(x)
            x = modulate(x)
            losses.append(loss)
        return x, torch.stack(losses).mean()


class ChannelEmbed(nn.Module):
    """2C -> C: 1x1 residual plus (1x1, depthwise 3x3, ReLU, 1x1, BatchNorm); BatchNorm of both."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.residual = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.embed = nn.Sequential(
            FusedConv2d(in_channels, channels, 1),
            DepthwiseConv2d(channels),
            nn.ReLU(),
            FusedConv2d(channels, channels, 1),
            BatchNorm2d(channels),
        )
        self.norm = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.residual(x) + self.embed(x))


class LowRankMoEBlock(Recomputed):
    """x + MoE(norm(x)), then x + GatedFFN(norm(x)). Returns the map and the balance loss ()."""

    def __init__(self, channels: int, *, d_state: int, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.moe_norm = LayerNorm2d(channels)
        self.moe = LowRankMoE(channels, d_state=d_state, ranks=ranks)
        self.ffn_norm = LayerNorm2d(channels)
        self.ffn = GatedFFN(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, balance_loss = self.moe(self.moe_norm(x), x)
        return self.ffn(self.ffn_norm(x), x), balance_loss


class LowRankMoE(nn.Module):
    """Low-rank experts on a scanned map x and a calibrated map k, routed per sample.

    x, residual (added at the end, if any): (B, C, H, W) -> (B, C, H, W) and the balance loss ().
    Expert e of rank r_e computes W3(W1 x · W2 k); each sample runs through its top-1 expert only.
    """

    def __init__(self, channels: int, *, d_state: int, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = FusedConv2d(channels, channels, 3, padding=1, activation="gelu")
        self.expand = FusedConv2d(channels, 2 * channels, 1)
        self.scan_norm = LayerNorm2d(channels)
        self.scan = Mamba(channels, d_state=d_state)
        self.calibrate = Calibration(channels)
        self.router = TopKRouter(channels, num_experts=len(ranks))
        self.experts = nn.ModuleList(LowRankExpert(channels, rank=rank) for rank in ranks)
        self.project = FusedConv2d(channels, channels, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.expand(self.conv(x))
        x, k = shuffle_channels(x, 2).chunk(2, dim=1)
        x = F.gelu(self.scan(self.scan_norm(x).flatten(2)).view_as(x))
        k = self.calibrate(k)
        choice, weight, balance_loss = self.router(x)
        x = x + weight[:, None, None, None] * self._run_experts(x, k, choice)
        return self.project(x, residual), balance_loss

    def _run_experts(self, x: Tensor, k: Tensor, choice: Tensor) -> Tensor:
        """Each sample through its chosen expert, all samples in three batched products.

        The experts' weights, padded with zeros to the largest rank, are picked per sample. That
        needs no host synchronisation, and every expert stays in the graph (with a zero gradient
        where unused), as data-parallel training wants it.
        """
        rank = max(expert.rank for expert in self.experts)
        down_x, down_k, up = (
            torch.stack(weights)[choice]
            for weights in zip(*(e.padded_weights(rank) for e in self.experts), strict=True)
        )
        hidden = torch.bmm(down_x, x.flatten(2)) * torch.bmm(down_k, k.flatten(2))  # (B, r, L)
        return torch.bmm(up, hidden).view_as(x)


class LowRankExpert(nn.Module):
    """W3(W1 x · W2 k) with 1x1 convolutions C -> r, C -> r, r -> C. x, k: (B, C, H, W)."""

    def __init__(self, channels: int, *, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down_x = nn.Conv2d(channels, rank, 1, bias=False)
        self.down_k = nn.Conv2d(channels, rank, 1, bias=False)
        self.up = nn.Conv2d(rank, channels, 1, bias=False)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return self.up(self.down_x(x) * self.down_k(k))

    def padded_weights(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """W1 (rank, C), W2 (rank, C), W3 (C, rank), zeros beyond the expert's own rank."""
        missing = rank - self.rank
        down_x, down_k, up = (
            conv.weight.flatten(1) for conv in (self.down_x, self.down_k, self.up)
        )
        return (
            F.pad(down_x, (0, 0, 0, missing)),
            F.pad(down_k, (0, 0, 0, missing)),
            F.pad(up, (0, missing)),
        )


class TopKRouter(nn.Module):
    """Top-1 choice of an expert per sample, from the global average of its map.

    x (B, C, H, W) -> choice (B,) int64, weight (B,) its softmax probability, balance loss ():
    E · Σ_e share_e · mean probability_e (Switch Transformer, Fedus et al., 2022, eq. 4), which is 1
    when the load is even. `shares` (E,) holds the last forward's share of samples per expert.
    """

    def __init__(self, channels: int, *, num_experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, num_experts)
        self.shares = torch.zeros(num_experts)  # no buffer: inference leaves it read-only

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probability = at_least_float32(self.score(x.mean((2, 3)))).softmax(dim=1)  # (B, E)
        weight, choice = probability.max(dim=1)
        num_experts = probability.shape[1]
        shares = F.one_hot(choice, num_experts).to(probability.dtype).mean(0)
        self.shares = shares.detach()
        balance_loss = num_experts * (shares * probability.mean(0)).sum()
        return choice, weight, balance_loss


class Calibration(nn.Module):
    """k + up(conv(agg(agg(k)))): context of 16x16 pixels added to every position.

    agg is a depthwise 4x4 convolution of stride 4 and GELU; sides that do not divide are padded.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.aggregate = nn.ModuleList(PatchAggregation(channels) for _ in range(2))
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, k: Tensor) -> Tensor:
        context = k
        for aggregate in self.aggregate:
            context = F.gelu(aggregate(context))
        return k + resize(self.conv(context), k.shape[-2:])


class PatchAggregation(nn.Conv2d):
    """Depthwise convolution whose kernel is its stride: a weighted sum of each patch.

    (B, C, H, W) -> (B, C, ceil(H/4), ceil(W/4)). As one product per channel: cuDNN runs this
    convolution channel by channel, a thousand small kernels in one training step.
    """

    def __init__(self, channels: int, *, side: int = 4) -> None:
        super().__init__(channels, channels, side, stride=side, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        side_h, side_w = self.kernel_size
        x = pad_to_multiple(x, side_h, side_w)
        x = x.unflatten(3, (-1, side_w)).unflatten(2, (-1, side_h))  # (B, C, h, side, w, side)
        x = torch.einsum("bchiwj,cij->bchw", x, self.weight[:, 0])
        return x + self.bias[:, None, None]


class SpatialModulatingExpert(Recomputed):
    """SME: x + proj(striped(q) · v), then x + GatedFFN(norm(x)). (B, C, H, W) -> (B, C, H, W).

    striped is a depthwise 1x11 and then an 11x1 convolution.
    """

    def __init__(self, channels: int, *, stripe: int = 11) -> None:
        super().__init__()
        self.query_value = FusedConv2d(channels, 2 * channels, 1, activation="gelu")
        self.striped = nn.Sequential(
            DepthwiseConv2d(channels, (1, stripe)),
            DepthwiseConv2d(channels, (stripe, 1)),
        )
        self.project = FusedConv2d(channels, channels, 1)
        self.norm = LayerNorm2d(channels)
        self.ffn = GatedFFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        query, value = self.query_value(x).chunk(2, dim=1)
        x = self.project(self.striped(query) * value, x)
        return self.ffn(self.norm(x), x)
