"""FSC: Frequency-Spatial Collaboration of one modality's map (method, Sec. 4)."""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.branches import side_by_side
from models.layers import (
    ChannelScale,
    Float32Conv2d,
    FusedConv2d,
    LayerNorm2d,
    Recomputed,
    SqueezeGate,
    at_least_float32,
    pad_to_multiple,
)
from models.ops.haar import haar_dwt2, haar_idwt2
from models.ops.padding import crop
from models.ops.phase import with_magnitude
from models.ss2d import SS2D


class FrequencySpatialCollaboration(nn.Module):
    """Wavelet and spatial branches, joined in the Fourier domain. (B, C, H, W) -> (B, C, H, W).

    The caller adds the residual.
    """

    def __init__(self, channels: int, *, d_state: int, expand: int = 4) -> None:
        super().__init__()
        self.wavelet = WaveletBranch(channels, d_state=d_state, expand=expand)
        self.spatial = SpatialBranch(channels, d_state=d_state, expand=expand)
        self.fourier = FourierBranch(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fourier(*side_by_side(partial(self.spatial, x), partial(self.wavelet, x)))


class WaveletBranch(Recomputed):
    """A windowed SS2D over the two-level Haar bands laid out as one map of the input's size."""

    def __init__(self, channels: int, *, d_state: int, expand: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(FusedConv2d(channels, channels, 1, activation="gelu"))
        self.scale = ChannelScale(channels)
        self.norm = LayerNorm2d(channels)
        self.ss2d = SS2D(channels, d_state=d_state, expand=expand, scan="window")

    def forward(self, x: Tensor) -> Tensor:
        bands = tile_bands(*haar_dwt2(pad_to_multiple(self.embed(x), 4, 4)))
        bands = self.scale(bands) + self.ss2d(self.norm(bands))
        return crop(haar_idwt2(*untile_bands(bands)), x.shape[-2:])


class SpatialBranch(Recomputed):
    """Two scaled residuals: a whole-map SS2D, then convolutions with channel attention."""

    def __init__(self, channels: int, *, d_state: int, expand: int) -> None:
        super().__init__()
        self.scan_scale = ChannelScale(channels)
        self.scan_norm = LayerNorm2d(channels)
        self.ss2d = SS2D(channels, d_state=d_state, expand=expand)
        self.conv_scale = ChannelScale(channels)
        self.conv_norm = LayerNorm2d(channels)
        self.conv = ChannelAttentionBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scan_scale(x) + self.ss2d(self.scan_norm(x))
        return self.conv_scale(x) + self.conv(self.conv_norm(x))


class ChannelAttentionBlock(nn.Sequential):
    """CAB: conv3x3 C -> C/3, GELU, conv3x3 -> C, channel attention with squeeze 12."""

    def __init__(self, channels: int) -> None:
        hidden = max(1, channels // 3)
        super().__init__(
            OrderedDict(  # as checkpoints have them: the activation was number 1
                [
                    ("0", FusedConv2d(channels, hidden, 3, padding=1, activation="gelu")),
                    ("2", FusedConv2d(hidden, channels, 3, padding=1)),
                    ("3", SqueezeGate(channels, squeeze=12)),
                ]
            )
        )


class FourierBranch(Recomputed):
    """Mix both branches by the magnitude of their spectra; phases stay as they are.

    spatial, wavelet: (B, C, H, W) -> (B, C, H, W), H, W >= 2. The transform is orthonormal, so that
    magnitudes do not grow with the image, and in float32 even under autocast. The inverse keeps its
    sign.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.magnitude = nn.Sequential(
            Float32Conv2d(2 * channels, 2 * channels, 1),
            nn.LeakyReLU(0.1),
            Float32Conv2d(2 * channels, 2 * channels, 1),
            nn.LeakyReLU(0.1),
        )
        self.reduce = FusedConv2d(2 * channels, channels, 1)
        self.depthwise = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels, padding_mode="reflect"
        )
        self.gate = SqueezeGate(channels, squeeze=4, activation=nn.GELU)

    def forward(self, spatial: Tensor, wavelet: Tensor) -> Tensor:
        x = torch.cat([spatial, wavelet], dim=1)
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft2(at_least_float32(x), norm="ortho")
            x = with_magnitude(spectrum, self.magnitude(spectrum.abs()))
            x = torch.fft.irfft2(x, s=spatial.shape[-2:], norm="ortho")
        return self.gate(F.gelu(self.depthwise(self.reduce(x))))


def tile_bands(low: Tensor, highs: list[Tensor]) -> Tensor:
    """Lay the bands out in one map: the low band top left, LH right of it, HL below, HH across.

    low (B, C, h, w) and highs (finest first) of haar_dwt2 for sides that divide by 2^levels
    -> (B, C, H, W).
    """
    for high in reversed(highs):
        lh, hl, hh = high.unbind(2)
        low = torch.cat([torch.cat([low, lh], dim=3), torch.cat([hl, hh], dim=3)], dim=2)
    return low


def untile_bands(x: Tensor, levels: int = 2) -> tuple[Tensor, list[Tensor]]:
    """The inverse of tile_bands: (B, C, H, W) -> low, highs (finest first)."""
    highs = []
    for _ in range(levels):
        top, bottom = x.chunk(2, dim=2)
        x, lh = top.chunk(2, dim=3)
        hl, hh = bottom.chunk(2, dim=3)
        highs.append(torch.stack([lh, hl, hh], dim=2))
    return x, highs
