"""TextPrior: frozen CLIP text features of the classes (MIA, Sec. 3), and the file they lie in."""

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs import available_names
from models.layers import at_least_float32
from utils.errors import InputError
from utils.files import write_whole

CLIP_MODEL = "ViT-B-32-quickgelu"  # open_clip's name; plain ViT-B-32 has another activation
TEXT_DIMENSION = 512  # of CLIP ViT-B/32
_UNIT_TOLERANCE = 1e-3  # |row| - 1; float32 rounding is far below, an unnormalised row far above


class TextPrior(nn.Module):
    """Constant text features T, and how alike a descriptor is to each of them.

    Args:
        features: (Q, D) with rows of length 1, in the order of the config's prompts; zeros where a
            checkpoint will fill them.
        source: where they came from, for logs and tables. It is not part of the state dict.
    """

    features: Tensor

    def __init__(self, features: Tensor, *, source: str) -> None:
        super().__init__()
        if features.ndim != 2:
            raise ValueError(f"features must be (Q, D), got {tuple(features.shape)}")
        self.register_buffer("features", features.detach().float())
        self.source = source

    def similarity(self, descriptor: Tensor) -> Tensor:
        """Cosine similarity to each text: (..., D) -> (..., Q), float32 even under autocast."""
        with torch.autocast(descriptor.device.type, enabled=False):
            descriptor, features = map(at_least_float32, (descriptor, self.features))
            return F.normalize(descriptor, dim=-1) @ features.T

    def extra_repr(self) -> str:
        return f"{self.features.shape[0]} texts of {self.features.shape[1]}, {self.source}"


def orthogonal_text_prior(count: int, dimension: int = TEXT_DIMENSION) -> tuple[Tensor, str]:
    """A stand-in without CLIP: every class has a direction of its own, none has a meaning.

    Returns:
        (count, dimension) orthogonal unit rows, the same at each call; and their source.
    """
    if count > dimension:
        raise ValueError(f"{count} orthogonal rows do not fit into {dimension} dimensions")
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    rows = torch.linalg.qr(columns).Q.T
    return rows.float().contiguous(), "orthogonal (stand-in, no CLIP)"


def load_text_prior(path: str | Path, prompts: Sequence[str]) -> tuple[Tensor, str]:
    """Read the features that tools/export_text_prior.py wrote for these prompts.

    Returns:
        (Q, 512) float32 unit rows; and their source: file, model, weights and their checksum.
    Raises:
        InputError: the file is missing, unreadable, of another CLIP model or of other prompts.
    """
    path = Path(path)
    again = f"run `{_export_command(path)}`"
    if not path.is_file():
        raise InputError(
            f"text prior {path} not found; {again}, or train without CLIP's knowledge with "
            f"`--set model.text_prior=orthogonal`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            features = file.get_tensor("features")
        stored_prompts = list(json.loads(metadata["prompts"]))
        model, pretrained, sha256 = (metadata[key] for key in ("model", "pretrained", "sha256"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"text prior {path} cannot be read (cut short, or not written by "
            f"tools/export_text_prior.py): {error}; {again}"
        ) from error
    if model != CLIP_MODEL:
        raise InputError(f"text prior {path} is of CLIP {model} instead of {CLIP_MODEL}; {again}")
    if difference := _difference(stored_prompts, list(prompts)):
        raise InputError(f"text prior {path} is of other prompts: {difference}; {again}")
    _check_rows(path, features, count=len(prompts), again=again)
    return features, f"{path.name} ({model}, {pretrained}, weights sha256 {sha256[:16]})"


def save_text_prior(
    path: str | Path, features: Tensor, prompts: Sequence[str], metadata: dict[str, str]
) -> None:
    """Write features so that load_text_prior reads them: aside first, then renamed.

    Args:
        features: (Q, 512) float32 unit rows, one per prompt.
        metadata: at least model, pretrained and sha256 (of CLIP's weights).
    Raises:
        InputError: the folder cannot be written or the disk is full; an old file stays as it was.
    """
    path = Path(path)
    content = safetensors.torch.save(
        {"features": features.contiguous()}, {**metadata, "prompts": json.dumps(list(prompts))}
    )
    write_whole(path, content, outlasts_power_cut=True)


def _export_command(path: Path) -> str:
    name = path.stem.removeprefix("clip_text_")
    out = "" if path == Path("pretrained", f"clip_text_{name}.safetensors") else f" --out {path}"
    config = name if name in available_names() else "YOUR.yaml"  # that the training is given
    return f"python tools/export_text_prior.py -n {config}{out}"


def _difference(stored: list[str], wanted: list[str]) -> str:
    """What first tells two lists of prompts apart; empty if nothing does."""
    for index, (theirs, ours) in enumerate(zip(stored, wanted, strict=False), start=1):
        if theirs != ours:
            return f"class {index} is '{theirs}' in the file and '{ours}' in the config"
    if len(stored) != len(wanted):
        return f"{len(stored)} in the file, {len(wanted)} in the config"
    return ""


def _check_rows(path: Path, features: Tensor, *, count: int, again: str) -> None:
    shape = (count, TEXT_DIMENSION)
    if features.shape != shape or features.dtype != torch.float32:
        raise InputError(
            f"text prior {path} holds {features.dtype} {tuple(features.shape)} instead of "
            f"torch.float32 {shape}; {again}"
        )
    lengths = features.norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), rtol=0, atol=_UNIT_TOLERANCE):
        raise InputError(f"text prior {path} has rows that are not of length 1; {again}")
