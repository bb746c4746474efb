"""Loads the official VMamba-Tiny ImageNet checkpoint into an encoder, strictly."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import InputError

_DROPPED_PREFIX = "classifier."


@dataclass(frozen=True)
class LoadReport:
    """What load_vmamba did: names of tensors loaded, missing in the file, and unused in it."""

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        unused = ", ".join(self.unexpected) or "none"
        return f"{len(self.loaded)} tensors from {self.path}; unused in the file: {unused}"


def load_vmamba(encoder: nn.Module, path: str | Path) -> LoadReport:
    """Fill every tensor of a VMambaEncoder from vssm1_tiny_0230s_ckpt_epoch_264.pth.

    The file holds its tensors under "model" (https://github.com/MzeroMiko/VMamba). The classifier's
    tensors are dropped and listed as unexpected in the report; any other tensor that the encoder
    does not have, or that the file lacks, or whose shape differs, is an error.

    Raises:
        InputError: the file is missing, unreadable or not this network's; names say what differs.
    """
    tensors = _read(Path(path))
    expected = dict(encoder.state_dict())
    missing = sorted(expected.keys() - tensors.keys())
    foreign = sorted(
        name for name in tensors.keys() - expected.keys() if not name.startswith(_DROPPED_PREFIX)
    )
    reshaped = sorted(
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in tensors.keys() & expected.keys()
        if tensors[name].shape != expected[name].shape
    )
    for problem, names in (("lacks", missing), ("adds", foreign), ("has another", reshaped)):
        if names:
            raise InputError(
                f"{path} is not a checkpoint of this VMamba encoder: it {problem} {_some(names)}"
            )
    encoder.load_state_dict({name: tensors[name] for name in expected})
    dropped = tuple(sorted(tensors.keys() - expected.keys()))
    return LoadReport(str(path), tuple(sorted(expected)), tuple(missing), dropped)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(
            f"pretrained weights {path} not found; run `python tools/download_pretrained.py "
            f"vmamba`, or start from random weights with `--set model.pretrained=none`"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # inside a foreign file a reader can fail in any way
        raise InputError(
            f"pretrained weights {path} cannot be read: cut short, or not a PyTorch file of plain "
            f"tensors ({type(error).__name__})"
        ) from error
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise InputError(f'pretrained weights {path} hold no tensors under the key "model"')
    return tensors


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
