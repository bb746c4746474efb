"""The state of a training run: built, saved, and put back exactly."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from configs import Config
from engine.atomic import read_digest
from engine.average import WeightAverage
from engine.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    remove_old_epochs,
    save_checkpoint,
)
from engine.graphs import GraphedGradient
from engine.optim import build_optimizer, load_optimizer_state, optimizer_state
from models import CMFS, check_scan_backend
from utils.distributed import Devices, broadcast, gather_objects, is_main_process, largest
from utils.errors import InputError
from utils.run_folder import RunFolder
from utils.seed import rng_state, set_rng_state

log = logging.getLogger(__name__)

# What a resumed run may change in the sections that otherwise say what is trained on what.
_FREE_ON_RESUME = {
    "data.dataset_path",
    "data.num_workers",
    "data.cache",
    "data.palette",
    "model.pretrained",
    "model.scan_backend",
    "model.recompute",
}
_SAVED = {  # in a training state
    "optimizer",
    "scaler",
    "weights",
    "rng",
    "epoch",
    "batch",
    "steps_per_epoch",
    "best_miou",
    "bad_steps",
}
_FIXED_ON_RESUME = ("data.", "model.", "seed", "train.crop", "train.batch_size")


@dataclass
class TrainingState:
    """Everything that a step changes, and the frame that it changes in."""

    model: CMFS
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    steps_per_epoch: int
    total_steps: int
    epoch: int = 0  # the running one, from 0
    batch: int = 0  # batches done in it
    step: int = 0  # steps done in all
    best_miou: float | None = None
    bad_steps: int = 0  # left out so far
    graph: GraphedGradient | None = None  # forward and backward, where they are replayed

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the network's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def statistics(self) -> list[Tensor]:
        """The running statistics, which a forward changes."""
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        return [buffer for norm in norms for buffer in norm.buffers()]

    @property
    def scored_model(self) -> CMFS:
        """What is validated and kept: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def epochs_done(self) -> int:
        return self.epoch + (self.batch == self.steps_per_epoch)

    @property
    def is_finished(self) -> bool:
        return self.step >= self.total_steps


def starting_point(folder: RunFolder, *, resume: bool | str) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Args:
        resume: True goes on from epoch-last.pth; the path of a file goes on from that one.
    Raises:
        InputError: the run would write into the folder of another one.
    """
    found = sorted(path.name for path in folder.checkpoints.glob("*.pth"))
    if isinstance(resume, str):
        if not Path(resume).is_file():
            raise InputError(f"--resume {resume}: there is no such file")
        if found and Path(resume).resolve().parent != folder.checkpoints.resolve():
            raise InputError(
                f"{folder.path} already holds a run, and {resume} is not of it; go on from it in "
                f"another folder with --exp NAME"
            )
        return Path(resume)
    if not found:
        if not resume and folder.metrics_file.exists() and folder.metrics_file.stat().st_size:
            raise InputError(
                f"{folder.path} holds the log of a run that saved no checkpoint: begin another one "
                f"with --exp NAME, or this one anew with --resume, which replaces the log"
            )
        return None
    if not resume:
        raise InputError(
            f"{folder.path} already holds a run ({len(found)} checkpoints): go on with --resume, "
            f"or begin another one with --exp NAME"
        )
    if not folder.last_checkpoint.is_file():
        previous = folder.previous_checkpoint
        offer = f"go on from {previous.name} with --resume {previous}, or " * previous.is_file()
        raise InputError(
            f"--resume needs {folder.last_checkpoint}, but there is only {', '.join(found)}; "
            f"{offer}begin another run with --exp NAME"
        )
    return folder.last_checkpoint


def check_same_start(resume_from: Path | None) -> None:
    """Refuse to go on where ranks see different checkpoints; every rank takes part.

    Raises:
        InputError: on every rank.
    """
    mine = None
    if resume_from is not None:
        mine = resume_from.name, resume_from.stat().st_size, read_digest(resume_from)
    found = gather_objects(mine)
    if any(other != found[0] for other in found):
        names = ["nothing" if one is None else one[0] for one in found]
        raise InputError(
            f"the processes would not go on from the same checkpoint, but from "
            f"{', '.join(names)} of different content; all of them need the same run folder "
            f"(experiment_path), on a disk that they share"
        )


def build_state(
    config: Config, model: CMFS, devices: Devices, *, steps_per_epoch: int
) -> TrainingState:
    """Put the network on its device and give it an optimiser; several GPUs get SyncBatchNorm.

    All ranks begin with the weights of the first.

    Raises:
        InputError: the batch does not divide into equal parts, or model.scan_backend cannot run on
            the device.
    """
    check_batch(config, devices.world_size)
    device = devices.device
    check_scan_backend(config.model.scan_backend, device)
    if devices.world_size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device)
    broadcast(model.state_dict().values())
    decay = config.train.ema_decay
    average = None if decay is None else WeightAverage(model, decay)
    total_steps = config.train.epochs * steps_per_epoch
    return TrainingState(
        model=model,
        optimizer=build_optimizer(model, config.train),
        scaler=_build_scaler(config, device),
        average=average,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total_steps, config.train.max_steps or total_steps),
    )


def check_batch(config: Config, world_size: int) -> None:
    """Raise an InputError that names the numbers where the batch does not divide evenly."""
    parts, size = world_size * config.train.accumulation, config.train.batch_size
    if size % parts:
        raise InputError(
            f"train.batch_size {size} (over all processes) does not divide into {world_size} "
            f"processes x train.accumulation {config.train.accumulation} = {parts} equal parts; "
            f"set it to {-(-size // parts) * parts}"
        )


def _build_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """fp16 needs its scale; others keep it at 1, for the check of gradients that comes with it."""
    if config.train.precision == "fp16":
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def settle(state: TrainingState) -> None:
    """Make all ranks' networks one, fit to be saved and scored; every rank takes part.

    Running statistics become those of the first rank, as a resumed run reads them.

    Raises:
        FloatingPointError: on every rank, if a weight or a running statistic is not finite.
    """
    broadcast(state.model.buffers())
    floats = [t for t in state.model.state_dict().values() if t.is_floating_point()]
    is_finite = bool(torch.stack([t.isfinite().all() for t in floats]).all())
    if largest(int(not is_finite)):
        raise FloatingPointError(
            f"weights are not finite after step {state.step}, although its loss was; the "
            f"checkpoints of earlier steps are intact: lower train.lr or set train.clip_grad_norm"
        )
    if state.average is not None:
        state.average.copy_buffers(state.model)


def save_last(state: TrainingState, config: Config, folder: RunFolder) -> None:
    """Write epoch-last.pth with all that an exact resume needs; every rank takes part."""
    is_fp16 = config.train.precision == "fp16"
    training_state = {
        "optimizer": optimizer_state(state.optimizer, state.model),
        "scaler": state.scaler.state_dict() if is_fp16 else None,
        "weights": None if state.average is None else _on_cpu(state.model),
        "rng": gather_objects(rng_state()),
        "epoch": state.epoch,
        "batch": state.batch,
        "steps_per_epoch": state.steps_per_epoch,
        "best_miou": state.best_miou,
        "bad_steps": state.bad_steps,
    }
    if is_main_process():
        save_checkpoint(
            folder.last_checkpoint,
            model=state.scored_model,
            config=config,
            epoch=state.epochs_done,
            step=state.step,
            training_state=training_state,
            previous=folder.previous_checkpoint,
        )


def save_epoch(state: TrainingState, config: Config, folder: RunFolder) -> None:
    """Write epoch-N.pth where the config wants one, and remove the oldest."""
    epoch, train = state.epochs_done, config.train
    is_whole = state.batch == state.steps_per_epoch
    is_due = epoch >= train.checkpoint_start and epoch % train.checkpoint_every == 0
    if is_main_process() and is_whole and is_due:
        save_checkpoint(
            folder.epoch_checkpoint(epoch),
            model=state.scored_model,
            config=config,
            epoch=epoch,
            step=state.step,
        )
        remove_old_epochs(folder.checkpoints, train.keep_last)


def save_best(
    state: TrainingState, config: Config, folder: RunFolder, metrics: dict[str, Any]
) -> None:
    """Write best.pth, with the scores that made it the best."""
    if is_main_process():
        save_checkpoint(
            folder.best_checkpoint,
            model=state.scored_model,
            config=config,
            epoch=state.epochs_done,
            step=state.step,
            metrics=metrics,
        )


def restore(state: TrainingState, path: Path, config: Config, devices: Devices) -> None:
    """Go on from a checkpoint: network, optimiser, scaler, position, random generators.

    Raises:
        InputError: the checkpoint is of another network, other data, or holds no training state.
    """
    checkpoint = load_checkpoint(path)
    check_resume(path, checkpoint, config)
    saved = checkpoint.training_state
    if saved is None:
        raise InputError(
            f"{path} holds no training state; only epoch-last.pth and epoch-previous.pth do"
        )
    missing = _SAVED - saved.keys() if isinstance(saved, dict) else _SAVED
    if missing:
        raise InputError(
            f"{path} holds no training state of train.py: {', '.join(sorted(missing))} missing"
        )
    if saved["steps_per_epoch"] != state.steps_per_epoch:
        raise InputError(
            f"{path} was made with {saved['steps_per_epoch']} steps in an epoch, the data gives "
            f"{state.steps_per_epoch} now; restore the list, or begin another run with --exp NAME"
        )
    if state.average is not None:
        load_weights(state.average.model, checkpoint, path)
    if saved["weights"] is not None:  # the average lies in the network's place
        checkpoint = checkpoint._replace(model=saved["weights"])
    load_weights(state.model, checkpoint, path)
    load_optimizer_state(state.optimizer, state.model, saved["optimizer"])
    if saved["scaler"] is not None and config.train.precision == "fp16":
        state.scaler.load_state_dict(saved["scaler"])
    state.epoch, state.batch, state.step = saved["epoch"], saved["batch"], checkpoint.step
    state.best_miou, state.bad_steps = saved["best_miou"], saved["bad_steps"]
    if len(saved["rng"]) == devices.world_size:
        set_rng_state(saved["rng"][devices.rank])
    else:
        log.warning(
            "saved with %d ranks, resumed with %d: dropout draws other numbers than it would have",
            len(saved["rng"]),
            devices.world_size,
        )
    log.info("resumed from %s: epoch %d, step %d", path, checkpoint.epoch, checkpoint.step)


def check_resume(path: str | Path, checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to resume with another network or other data; log what else has changed.

    Raises:
        InputError: names every value that must stay, as it was and as it is now.
    """
    before, now = (
        dict(_flatten(tree)) for tree in (checkpoint.config, config.model_dump(mode="json"))
    )
    changed = {
        key: f"{key} from {before.get(key)} to {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    refused = [
        text
        for key, text in changed.items()
        if key.startswith(_FIXED_ON_RESUME) and key not in _FREE_ON_RESUME
    ]
    if refused:
        raise InputError(
            f"{path} cannot be resumed with another config: {'; '.join(refused)}; give the old "
            f"values, or begin another run with --exp NAME"
        )
    for text in changed.values():
        log.info("resumed with a change of %s", text)


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
