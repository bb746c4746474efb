"""Checkpoints: written whole or not at all, read without running code, checked against the config.

A file holds the network's tensors, the resolved config, counters, metrics and, in epoch-last.pth,
the training state. Everything inside is a tensor, dict, list, str, number or None. Beside it lies
its SHA-256, which every read compares.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from configs import Config
from engine.atomic import digest_file, is_intact, remove, replacing
from models import CMFS, build_model, check_scan_backend
from utils.errors import InputError

_SUFFIXES = (".pth", ".safetensors")


class Checkpoint(NamedTuple):
    """The content of one file, on the CPU."""

    model: dict[str, Tensor]
    config: dict[str, Any]  # the resolved config of the run
    epoch: int  # whole epochs done
    step: int  # steps done
    training_state: dict[str, Any] | None
    metrics: dict[str, Any]
    text_prior: str  # where the text features in `model` came from


def save_checkpoint(
    path: str | Path,
    *,
    model: CMFS,
    config: Config,
    epoch: int,
    step: int,
    training_state: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint: aside first, then renamed, so that `path` is the old or the new file.

    Args:
        path: .pth, or .safetensors (for use elsewhere; without training state).
        epoch, step: whole epochs and steps done.
        metrics: plain JSON values.
        previous: where the file that was there stays; None lets it go.
    Raises:
        InputError: the disk is full or the folder cannot be written; the file that was there stays.
    """
    content = Checkpoint(
        model={name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        config=config.model_dump(mode="json"),
        epoch=epoch,
        step=step,
        training_state=training_state,
        metrics=json.loads(json.dumps(metrics or {})),
        text_prior=model.text_prior.source,
    )
    write_checkpoint(path, content, previous=previous)


def write_checkpoint(
    path: str | Path, checkpoint: Checkpoint, *, previous: Path | None = None
) -> None:
    """Write what load_checkpoint reads; see save_checkpoint."""
    path, content = Path(path), checkpoint._asdict()
    if path.suffix == ".pth":
        with replacing(path, previous=previous) as file:
            torch.save(content, file)
    elif path.suffix == ".safetensors" and content.pop("training_state") is None:
        tensors = {name: tensor.contiguous() for name, tensor in content.pop("model").items()}
        metadata = {key: json.dumps(value) for key, value in content.items()}
        with replacing(path, previous=previous) as file:
            file.write(safetensors.torch.save(tensors, metadata))
    else:
        raise ValueError(
            f"{path} must end in .pth, or in .safetensors for a checkpoint without training state"
        )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a .pth or .safetensors checkpoint of this project onto the CPU; no code in it can run.

    Raises:
        InputError: missing, cut short, changed since it was written, or not a checkpoint of this
            project; the message names the one before it, where there is one.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InputError(f"checkpoint {path} must end in .pth or .safetensors")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    if not is_intact(path):
        raise InputError(
            f"checkpoint {path} is not the file that {digest_file(path).name} was made for: it is "
            f"cut short, damaged or another one{_offer(path)}"
        )
    try:
        content = _read(path)
    except Exception as error:  # inside a foreign file a reader can fail in any way
        raise InputError(
            f"checkpoint {path} cannot be read: it is cut short, or holds more than plain tensors "
            f"and values ({type(error).__name__}){_offer(path)}"
        ) from error
    return _check_content(path, content)


def load_model(
    path: str | Path, *, device: torch.device | str, config: Config | None = None
) -> tuple[CMFS, Config]:
    """Build the network that a checkpoint describes, fill it, and set it to evaluation.

    Args:
        config: the present config; its classes must be the checkpoint's, and its scan backend is
            used. None: the checkpoint alone says what to build, with the automatic backend.
    Returns:
        The network on `device`, and the config of the checkpoint's run.
    Raises:
        InputError: see load_checkpoint; or another dataset's classes, tensors that do not fit, or a
            scan backend that cannot run on `device`.
    """
    checkpoint = load_checkpoint(path)
    stored = _stored_config(path, checkpoint)
    if config is not None:
        check_classes(path, stored, config)
    backend = "auto" if config is None else config.model.scan_backend
    check_scan_backend(backend, torch.device(device))
    stored = stored.model_copy(
        update={"model": stored.model.model_copy(update={"scan_backend": backend})}
    )
    model = build_model(stored, from_checkpoint=True)
    load_weights(model, checkpoint, path)
    return model.to(device).eval(), stored


def load_weights(model: CMFS, checkpoint: Checkpoint, path: str | Path) -> None:
    """Fill every tensor of a network from a checkpoint.

    Raises:
        InputError: names differ, or shapes; every one of them is named.
    """
    expected = model.state_dict()
    problems = {
        "it lacks": sorted(expected.keys() - checkpoint.model.keys()),
        "it adds": sorted(checkpoint.model.keys() - expected.keys()),
        "of another shape": sorted(
            f"{name} {tuple(checkpoint.model[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in checkpoint.model and checkpoint.model[name].shape != tensor.shape
        ),
    }
    found = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
    if found:
        raise InputError(f"checkpoint {path} does not fit this network; {'; '.join(found)}")
    model.load_state_dict(checkpoint.model)
    model.text_prior.source = checkpoint.text_prior


def check_classes(path: str | Path, stored: Config, config: Config) -> None:
    """Refuse a checkpoint whose classes are not the present dataset's.

    Raises:
        InputError: names both datasets and both counts, or the first class that differs.
    """
    theirs, ours = stored.data.class_names, config.data.class_names
    if theirs == ours:
        return
    what = f"checkpoint {path} was trained on {stored.data.name} with {len(theirs)} classes"
    if len(theirs) != len(ours):
        raise InputError(f"{what}, but {config.data.name} has {len(ours)}; give its own with -n")
    index = next(i for i in range(len(ours)) if theirs[i] != ours[i])
    raise InputError(
        f"{what}, but class {index} is '{theirs[index]}' there and '{ours[index]}' in "
        f"{config.data.name}; give its own with -n"
    )


def select_checkpoints(folder: str | Path, text: str) -> list[Path]:
    """The files that -e/--epochs means.

    Args:
        folder: a run's checkpoint folder.
        text: N, "a-b", "a-" (all from a), "best", "last", or a path to a .pth/.safetensors file.
    Returns:
        Existing files, by epoch.
    Raises:
        InputError: nothing fits; the message lists what there is.
    """
    if Path(text).suffix in _SUFFIXES:
        if not Path(text).is_file():
            raise InputError(f"checkpoint {text} does not exist")
        return [Path(text)]
    folder = Path(folder)
    epochs = list_epochs(folder)
    span = re.fullmatch(r"(\d+)(-?)(\d*)", text)
    if text in ("best", "last"):
        path = folder / ("best.pth" if text == "best" else "epoch-last.pth")
        found = [path] if path.is_file() else []
    elif span and (span[2] or not span[3]):
        first = int(span[1])
        last = int(span[3]) if span[3] else max(epochs, default=0) if span[2] else first
        found = [path for epoch, path in epochs.items() if first <= epoch <= last]
    else:
        raise InputError(f"-e takes N, a-b, a-, best, last or a path to a file, got '{text}'")
    if not found:
        there = sorted(path.stem for path in folder.glob("*.pth") if path not in epochs.values())
        names = ", ".join([*(path.stem for path in epochs.values()), *there])
        raise InputError(f"no checkpoint '{text}' in {folder}; there is: {names or 'nothing'}")
    return found


def list_epochs(folder: str | Path) -> dict[int, Path]:
    """The epoch-N.pth files of a folder by N, rising."""
    matches = {path: re.fullmatch(r"epoch-(\d+)", path.stem) for path in Path(folder).glob("*.pth")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def remove_old_epochs(folder: str | Path, keep_last: int) -> None:
    """Delete epoch-N.pth files but for the newest `keep_last`."""
    for path in list(list_epochs(folder).values())[:-keep_last]:
        remove(path)


def _offer(path: Path) -> str:
    """How to go on where a file is broken: with the newest whole one that is no newer than it."""
    age = path.stat().st_mtime_ns
    others = [p for p in path.parent.iterdir() if p.suffix in _SUFFIXES and p != path]
    older = [p for p in others if p.stat().st_mtime_ns <= age]

    def rank(other: Path) -> tuple[bool, int]:
        can_replace = (path.stem, other.stem) == ("epoch-last", "epoch-previous")
        return can_replace, other.stat().st_mtime_ns

    for other in sorted(older, key=rank, reverse=True):
        if is_intact(other) and _is_readable(other):
            return f"; the one before it is {other}"
    return "; take another checkpoint"


def _is_readable(path: Path) -> bool:
    try:
        _check_content(path, _read(path))
    except Exception:  # inside a foreign file a reader can fail in any way
        return False
    return True


def _read(path: Path) -> Any:
    """What a file holds; code in it is refused."""
    if path.suffix == ".pth":
        return torch.load(path, map_location="cpu", weights_only=True)
    with safetensors.safe_open(str(path), framework="pt") as file:
        content = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {**content, "model": tensors, "training_state": None}


def _check_content(path: Path, content: Any) -> Checkpoint:
    fields = Checkpoint._fields
    if not isinstance(content, dict) or not content.keys() >= set(fields):
        raise InputError(
            f"{path} is not a checkpoint of train.py or save_checkpoint: it must hold "
            f"{', '.join(fields)}"
        )
    checkpoint = Checkpoint(**{field: content[field] for field in fields})
    tensors = checkpoint.model
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f'{path} is not a CMFS checkpoint: "model" must hold tensors by name')
    if not isinstance(checkpoint.config, dict):
        raise InputError(f'{path} is not a CMFS checkpoint: "config" must hold its run\'s settings')
    return checkpoint


def _stored_config(path: str | Path, checkpoint: Checkpoint) -> Config:
    try:
        return Config.model_validate(checkpoint.config)
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise InputError(
            f"checkpoint {path} was written with another version of the config; differing: {keys}"
        ) from error
