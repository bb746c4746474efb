"""CMFS: the whole network as its figure shows it (Su et al., IJCAI 2025)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.branches import Branch, side_by_side
from models.fsc import FrequencySpatialCollaboration
from models.heads import FusionHead, SegmentationHead
from models.layers import Recomputed
from models.mia import ModalInteractionAlignment
from models.moe import SemanticBranch, TopKRouter
from models.ss2d import SS2D
from models.text_prior import TextPrior
from models.vmamba import VMambaEncoder


class CMFSOutput(NamedTuple):
    """What one forward gives."""

    logits: Tensor  # (B, classes, H, W)
    fused: Tensor  # (B, 3, H, W) in [0, 1]
    balance_loss: Tensor  # (), 1 when every router spreads its samples evenly


class CMFS(nn.Module):
    """Twin VMamba encoders with MIA at every stage, FSC at the first two, MoE and two heads.

    rgb: (B, 3, H, W); thermal: (B, 3, H, W) or (B, 1, H, W); both in [0, 1], H, W >= 32.

    Args:
        depths, widths: VSS blocks and channels of the four stages.
        num_classes: of the segmentation, class 0 included.
        text_prior: frozen CLIP features of every class but class 0.
        crop_hw: training crop; it fixes the grid to which MIA pools a region's context.
        regions_per_side: P of each stage's MIA.
        encoder_d_state, mia_d_state, fsc_d_states, moe_d_state, head_d_state: N of the scans; one
            FSC per entry of fsc_d_states, from stage 0.
        head_channels, fusion_channels: inner widths of the two heads.
        drop_path: rate at the last encoder block, rising linearly from 0.
        image_mean, image_std: standardisation inside the encoders.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        text_prior: TextPrior,
        crop_hw: tuple[int, int],
        regions_per_side: Sequence[int] = (5, 5, 1, 1),
        encoder_d_state: int = 1,
        mia_d_state: int = 16,
        fsc_d_states: Sequence[int] = (8, 16),
        moe_d_state: int = 64,
        head_d_state: int = 16,
        head_channels: int = 512,
        fusion_channels: int = 16,
        drop_path: float = 0.2,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()

        def encoder() -> VMambaEncoder:
            return VMambaEncoder(
                depths=depths,
                widths=widths,
                d_state=encoder_d_state,
                drop_path=drop_path,
                image_mean=image_mean,
                image_std=image_std,
            )

        def collaboration() -> nn.ModuleList:
            stages = zip(widths, fsc_d_states, strict=False)
            return nn.ModuleList(
                FrequencySpatialCollaboration(width, d_state=d_state) for width, d_state in stages
            )

        self.text_prior = text_prior
        self.rgb_encoder = encoder()
        self.thermal_encoder = encoder()
        self.mia = nn.ModuleList(
            ModalInteractionAlignment(
                width,
                d_state=mia_d_state,
                regions_per_side=regions_per_side[stage],
                region_grid=_region_grid(crop_hw, stage, regions_per_side[stage]),
                num_texts=text_prior.features.shape[0],
                text_dimension=text_prior.features.shape[1],
            )
            for stage, width in enumerate(widths)
        )
        self.rgb_fsc = collaboration()
        self.thermal_fsc = collaboration()
        self.semantic = nn.ModuleList(SemanticBranch(w, d_state=moe_d_state) for w in widths)
        self.segmentation_head = SegmentationHead(
            widths, num_classes=num_classes, hidden=head_channels, d_state=head_d_state
        )
        self.fusion_head = FusionHead(widths, hidden=fusion_channels)

    def forward(self, rgb: Tensor, thermal: Tensor) -> CMFSOutput:
        _check_images(rgb, thermal)
        thermal = thermal.expand_as(rgb)
        x_rgb, x_thermal = rgb, thermal
        branches = []
        for stage, mia in enumerate(self.mia):
            x_rgb, x_thermal = side_by_side(
                partial(self.rgb_encoder.advance, stage, x_rgb),
                partial(self.thermal_encoder.advance, stage, x_thermal),
            )
            x_rgb, x_thermal = mia(x_rgb, x_thermal, self.text_prior)  # F', for the next stage
            branches.append(Branch(partial(self._use_stage, stage, x_rgb, x_thermal)))
        stages = [branch.result() for branch in branches]
        rgb_maps, thermal_maps, semantic_maps, losses = zip(*stages, strict=True)
        logits, fused = side_by_side(
            partial(self.segmentation_head, semantic_maps, rgb.shape[-2:]),
            partial(self.fusion_head, rgb_maps, thermal_maps, rgb, thermal),
        )
        return CMFSOutput(logits, fused, balance_loss=torch.stack(losses).mean())

    def _use_stage(
        self, stage: int, x_rgb: Tensor, x_thermal: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From F' of a stage: F'' of both modalities, the semantic map, the balance loss."""
        if stage < len(self.rgb_fsc):
            of_rgb, of_thermal = side_by_side(
                partial(self.rgb_fsc[stage], x_rgb), partial(self.thermal_fsc[stage], x_thermal)
            )
            x_rgb, x_thermal = x_rgb + of_rgb, x_thermal + of_thermal
        return x_rgb, x_thermal, *self.semantic[stage](x_rgb, x_thermal)

    def set_recompute(self, which: bool | Literal["light"]) -> None:
        """Keep only the maps between parts in training, and compute what lies inside them twice.

        Less than half of the activations is kept, for the time of a second forward; with "light"
        the scans' results are kept, too, and not computed again. An SS2D inside another part is
        computed anew with it; only the segmentation head's stands alone.
        """
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recompute = False if isinstance(module, SS2D) else which
        self.segmentation_head.ss2d.recompute = which

    def expert_shares(self) -> Tensor:
        """(blocks, E): the share of samples that each expert of each MoE block got last."""
        return torch.stack([m.shares for m in self.modules() if isinstance(m, TopKRouter)])


def _region_grid(crop_hw: tuple[int, int], stage: int, per_side: int) -> tuple[int, int]:
    """Height and width of one region of a stage's map at the training crop."""
    grid_h, grid_w = (-(-side // (4 * 2**stage * per_side)) for side in crop_hw)
    return grid_h, grid_w


def _check_images(rgb: Tensor, thermal: Tensor) -> None:
    if rgb.dim() != 4 or rgb.shape[1] != 3 or thermal.shape not in (rgb.shape, rgb[:, :1].shape):
        raise ValueError(
            f"rgb must be (B, 3, H, W) and thermal (B, 3 or 1, H, W) of the same size, "
            f"got {tuple(rgb.shape)} and {tuple(thermal.shape)}"
        )
    if min(rgb.shape[-2:]) < 32:
        raise ValueError(f"images must be at least 32x32, got {rgb.shape[2]}x{rgb.shape[3]}")
