"""From a config to a network: the only file of this room that reads the config."""

import logging
from typing import Any

import torch

from configs import Config
from models.cmfs import CMFS
from models.ops.selective_scan import selective_scan
from models.pretrained import load_vmamba
from models.text_prior import TEXT_DIMENSION, TextPrior, load_text_prior, orthogonal_text_prior
from utils.errors import InputError

log = logging.getLogger(__name__)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (2, 2, 8, 2), "widths": (96, 192, 384, 768)},
    "demo": {
        "depths": (1, 1, 1, 1),
        "widths": (12, 24, 48, 64),
        "mia_d_state": 1,
        "fsc_d_states": (1, 1),
        "moe_d_state": 2,
        "head_d_state": 1,
        "head_channels": 32,
        "fusion_channels": 4,
    },
}


def build_model(config: Config, *, from_checkpoint: bool = False) -> CMFS:
    """The network of a config, on the CPU in training mode.

    Args:
        from_checkpoint: all tensors follow from a checkpoint, the text prior included; neither the
            VMamba nor the CLIP file is read.
    Raises:
        InputError: a file that the config names is missing or does not fit.
    """
    model = CMFS(
        **SIZES[config.model.size],
        num_classes=config.data.num_classes,
        text_prior=_text_prior(config, from_checkpoint=from_checkpoint),
        crop_hw=config.train.crop,
        drop_path=config.model.drop_path,
        image_mean=config.model.image_mean,
        image_std=config.model.image_std,
    )
    if config.model.pretrained is not None and not from_checkpoint:
        for encoder in (model.rgb_encoder, model.thermal_encoder):
            report = load_vmamba(encoder, config.model.pretrained)
        log.info("both encoders: %s", report)
    model.set_recompute(config.model.recompute)
    for module in model.modules():
        if hasattr(module, "scan_backend"):
            module.scan_backend = config.model.scan_backend
    return model


def check_scan_backend(name: str, device: torch.device) -> None:
    """Raise an InputError where a scan backend that a config names cannot run on a device."""
    if name == "auto":
        return
    one = torch.ones(1, 1, 1, device=device)
    try:
        selective_scan(one, one, -one[0], one[None], one[None], backend=name)
    except RuntimeError as error:
        raise InputError(f"model.scan_backend={name}: {error}") from error


def _text_prior(config: Config, *, from_checkpoint: bool) -> TextPrior:
    prompts = config.data.prompts
    if from_checkpoint:
        return TextPrior(torch.zeros(len(prompts), TEXT_DIMENSION), source="checkpoint")
    if config.text_prior == "orthogonal":
        features, source = orthogonal_text_prior(len(prompts), TEXT_DIMENSION)
    else:
        features, source = load_text_prior(config.text_prior, prompts)
    return TextPrior(features, source=source)
