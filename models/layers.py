"""Small layers that several parts of the network share; maps are channel-first (B, C, H, W)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

from models.ops.channel_norm import channel_norm
from models.ops.depthwise import depthwise_conv
from models.ops.epilogue import epilogue
from models.ops.padding import replicate_pad
from models.ops.resize import bilinear_resize
from utils.errors import InputError

_FEW_CHANNELS = 64


class Recomputed(nn.Module):
    """A part that may forget what lies inside it in training and compute it anew for the gradient.

    With recompute "light" the results of its scans are kept, which take longest to compute. Those
    are the operators of models/ops; PyTorch's own loops and mamba-ssm's run a second time. It needs
    PyTorch 2.5; in training before that an InputError says so.

    Gradients are those of the plain part. It must not hold a BatchNorm, whose statistics would
    count each batch twice, nor a Branch: it is computed anew on a single stream, where its memory
    would be taken again while gradients on others read it. And its forward must not draw random
    numbers: they would be others the second time. draw() is the place for them.
    """

    recompute: bool | Literal["light"] = False

    def draw(self, *inputs: Any) -> tuple[Any, ...]:
        """Random numbers for one call; forward gets them after its inputs."""
        return ()

    def __call__(self, *inputs: Any) -> Any:
        inputs = (*inputs, *self.draw(*inputs))
        if self.recompute and self.training:
            # The generator's state cannot be kept in a CUDA graph, and need not be.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if self.recompute == "light":
                options["context_fn"] = _keeping_scans()
            return checkpointing.checkpoint(super().__call__, *inputs, **options)
        return super().__call__(*inputs)


def _keeping_scans() -> Callable[[], Any]:
    """For a checkpoint: the context of its forward and that of its computation anew."""
    if not hasattr(checkpointing, "CheckpointPolicy"):
        raise InputError(
            f"model.recompute=light needs PyTorch 2.5 or later, this is {torch.__version__}; "
            f"model.recompute=true does not"
        )
    policies = checkpointing.CheckpointPolicy

    def choose(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> Any:
        is_scan = operator.name().startswith(("cmfs::selective_scan", "cmfs::ss2d_scan"))
        return policies.MUST_SAVE if is_scan else policies.PREFER_RECOMPUTE

    return partial(checkpointing.create_selective_checkpoint_contexts, choose)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map, eps 1e-5 (VMamba's channel-first norm).

    Under autocast the result is rounded for the convolution that comes next; not so with `is_wide`,
    where a residual stream begins, in which roundings would add up.
    """

    def __init__(self, channels: int, *, is_wide: bool = False) -> None:
        super().__init__(channels)
        self.is_wide = is_wide

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight, self.bias, self.eps, is_wide=self.is_wide)


class RMSNorm2d(nn.RMSNorm):
    """RMSNorm over the channels of a (B, C, H, W) map, eps 1e-5; rounded like LayerNorm2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight, None, self.eps)


class FusedConv2d(nn.Conv2d):
    """A convolution with what follows it: bias, activation ("gelu", "relu", "silu") and residual.

    x (B, C, H, W) -> (B, C', H', W'): residual + factor · activation(convolution), where factor is
    one number per image. On a GPU all but the product takes a single pass.
    """

    def __init__(self, *arguments: Any, activation: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.activation = activation

    def forward(
        self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        bias, later = _biases(self.bias, x)
        x = self._conv_forward(x, self.weight, bias)
        return epilogue(x, later, activation=self.activation, factor=factor, residual=residual)


class Float32Conv2d(FusedConv2d):
    """A convolution that autocast leaves as it is."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, residual, factor)


class Linear2d(nn.Linear):
    """A linear layer over the channels of a map, with what follows it as in FusedConv2d.

    Its weight stays two-dimensional, as in VMamba.
    """

    def __init__(
        self, in_channels: int, channels: int, *, bias: bool = True, activation: str | None = None
    ) -> None:
        super().__init__(in_channels, channels, bias=bias)
        self.activation = activation

    def forward(
        self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        bias, later = _biases(self.bias, x)
        x = F.conv2d(x, self.weight[:, :, None, None], bias)
        return epilogue(x, later, activation=self.activation, factor=factor, residual=residual)


def _biases(bias: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the convolution adds, which on a CPU costs nothing, and what comes after it."""
    return (None, bias) if x.is_cuda else (bias, None)


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel by itself, zeros around the map, and an activation or none.

    (B, C, H, W) -> (B, C, H, W); kernel_size is odd, activation "silu" or None.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            channels, channels, kernel_size, padding="same", groups=channels, bias=bias
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, activation=self.activation)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that, given a single value per channel in training, uses its running statistics.

    A 1x1 map of one image has no variance; the plain layer raises there. On a GPU maps of few
    channels are turned channels-last for it: cuDNN gives a channel of others to a single block.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if x.is_cuda and x.shape[1] <= _FEW_CHANNELS:
            x = super().forward(x.contiguous(memory_format=torch.channels_last))
            return x.contiguous()
        return super().forward(x)


class ReplicateConv2d(nn.Conv2d):
    """A 3x3 convolution of the map with its border repeated: no dark frame, as zeros would draw.

    Channels of x beyond the layer's own do not count; with fewer it raises a ValueError.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        unused = x.shape[1] - self.in_channels
        if unused < 0:
            raise ValueError(f"expected {self.in_channels} channels, got {x.shape[1]}")
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, unused)) if unused else self.weight
        return F.conv2d(replicate_pad(x, 1, 1, 1, 1), weight, self.bias)


class ChannelScale(nn.Module):
    """One learned factor per channel, 1 at the start: the `x·s` of a scaled residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class SqueezeGate(nn.Module):
    """Channel attention by global average: pool, C -> C/squeeze, activation, -> C, sigmoid."""

    def __init__(
        self, channels: int, *, squeeze: int, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        hidden = max(1, channels // squeeze)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            activation(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class GatedFFN(nn.Module):
    """conv1x1 C -> 2C, GELU, halves a and b; a · depthwise3x3(b); conv1x1, GELU; plus residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = FusedConv2d(channels, 2 * channels, 1, activation="gelu")
        self.depthwise = DepthwiseConv2d(channels)
        self.project = FusedConv2d(channels, channels, 1, activation="gelu")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        a, b = self.expand(x).chunk(2, dim=1)
        return self.project(a * self.depthwise(b), residual)


def at_least_float32(x: Tensor) -> Tensor:
    """x, widened where it is narrower than float32, as under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle (ShuffleNet, Zhang et al., 2018): one channel of each group in turn.

    nn.ChannelShuffle has no gradient on a CPU before PyTorch 2.5.
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def pad_to_multiple(x: Tensor, multiple_h: int, multiple_w: int) -> Tensor:
    """Replicate the last row and column until H and W are multiples; the caller crops later."""
    height, width = x.shape[-2:]
    return replicate_pad(x, 0, -width % multiple_w, 0, -height % multiple_h)


def resize(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """Bilinear resize of a map to (H, W), pixel centres aligned."""
    return bilinear_resize(x, hw)
