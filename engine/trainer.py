"""The training loop: fit() takes a network and two loaders, and leaves checkpoints and logs."""

import json
import logging
import signal
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from configs import Config, dump_config
from engine.evaluate import evaluate_segmentation
from engine.inference import Prediction
from engine.losses import Batch, joint_loss
from engine.optim import lr_at
from engine.state import (
    TrainingState,
    build_state,
    restore,
    save_best,
    save_epoch,
    save_last,
    settle,
)
from models import CMFS
from utils.cli import StopRequest
from utils.distributed import (
    Devices,
    gather_objects,
    is_main_process,
    largest,
    reduce_sum,
    world_size,
)
from utils.environment import environment_info
from utils.image import colorize, contact_sheet, to_uint8
from utils.log import RunReport
from utils.run_folder import RunFolder

log = logging.getLogger(__name__)

_EXAMPLES = 4  # validation images shown in TensorBoard
_EXAMPLE_TITLES = ("rgb", "thermal", "fused", "prediction", "truth")
_AUTOCAST_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NamedBatch(Batch, Protocol):
    """A batch whose images are known by name; see dataloader.dataset.Sample."""

    name: list[str]


class StepLosses(NamedTuple):
    """What one step leaves on the device until it is read."""

    step: int
    images: list[str]
    parts: dict[str, Tensor]  # each ()
    expert_shares: Tensor  # (blocks, E)


def fit(
    config: Config,
    model: CMFS,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    folder: RunFolder,
    devices: Devices,
    resume_from: Path | None = None,
) -> int:
    """Train to the end of the schedule, or until SIGINT or SIGTERM.

    epoch-last.pth is written at the end of an epoch, before its validation, where the last one is
    train.save_every_s old; at a stop; and at the end.

    Returns:
        0, or the number of the signal that stopped the run, its exact state in epoch-last.pth.
    Raises:
        FloatingPointError: a loss or a weight is not finite; the checkpoints stay as they were.
        InputError: resume_from does not belong to this run, or the disk is full.
    """
    state = build_state(config, model, devices, steps_per_epoch=len(train_loader))
    if resume_from is not None:
        restore(state, resume_from, config, devices)
    if is_main_process():
        write_run_files(config, folder)
    log.info("text prior: %s", state.model.text_prior.source)
    log.info("begins after step %d of %d", state.step, state.total_steps)
    report = RunReport(
        folder, from_step=state.step, total_steps=state.total_steps, is_enabled=is_main_process()
    )
    saved_at = time.monotonic()
    with report, StopRequest() as stop:
        while True:
            stopped = train_epoch(state, train_loader, config, devices.device, stop, report)
            settle(state)
            is_due = time.monotonic() - saved_at >= config.train.save_every_s
            if stopped or state.is_finished or largest(is_due):
                save_last(state, config, folder)
                saved_at = time.monotonic()
            if stopped:
                log.info("%s: saved after step %d", signal.Signals(stopped).name, state.step)
                return stopped
            save_epoch(state, config, folder)
            if state.is_finished or state.epochs_done % config.train.val_every == 0:
                validate(state, val_loader, config, devices.device, folder, report)
                report.start_clock(state.step)
            if state.is_finished:
                return 0
            state.epoch, state.batch = state.epoch + 1, 0


def train_epoch(
    state: TrainingState,
    loader: DataLoader,
    config: Config,
    device: torch.device,
    stop: StopRequest,
    report: RunReport,
) -> int:
    """Run what is left of the epoch; returns the signal that came to any rank, or 0.

    Losses stay on the device; they are read, and checked, when a log line is due and at the end.
    """
    loader.batch_sampler.set_epoch(state.epoch)
    loader.batch_sampler.start_batch = state.batch
    batches = iter(loader)
    state.model.train()
    window: list[StepLosses] = []
    stopped = 0
    while not (stopped or state.is_finished or state.batch == state.steps_per_epoch):
        learning_rate = set_learning_rate(state, config)
        window.append(train_step(state, to_device(next(batches), device), config))
        if state.step % config.train.log_every == 0 or state.is_finished:
            losses, expert_shares = read_losses(window)
            report.steps(
                losses,
                expert_shares,
                epoch=state.epoch + 1,
                step=state.step,
                learning_rate=learning_rate,
                batch_size=config.train.batch_size,
            )
            window.clear()
        stopped = largest(stop.signal or 0)
    if window:
        read_losses(window)
    return stopped


def train_step(state: TrainingState, batch: NamedBatch, config: Config) -> StepLosses:
    """Forward, backward, one step of the optimiser."""
    dtype = _AUTOCAST_DTYPES[config.train.precision]
    with torch.autocast(batch.rgb.device.type, dtype=dtype, enabled=dtype is not None):
        output = state.network(batch.rgb, batch.thermal)
    parts = joint_loss(output, batch, config.loss)
    state.optimizer.zero_grad()
    state.scaler.scale(parts["total"]).backward()
    if config.train.clip_grad_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), config.train.clip_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    state.batch += 1
    parts = {name: part.detach() for name, part in parts.items()}
    return StepLosses(state.step, batch.name, parts, state.model.expert_shares())


def set_learning_rate(state: TrainingState, config: Config) -> float:
    """Give the optimiser the rate of the coming step; returns it."""
    learning_rate = config.train.lr * lr_at(
        state.step,
        total_steps=state.total_steps,
        warmup_steps=round(config.train.warmup_epochs * state.steps_per_epoch),
        power=config.train.poly_power,
    )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def read_losses(window: list[StepLosses]) -> tuple[dict[str, float], Tensor]:
    """Means of the losses and of the expert shares (blocks, E), over some steps and all ranks.

    Raises:
        FloatingPointError: on every rank, with the step, the parts and the images of one that is
            not finite.
    """
    values = torch.stack([torch.stack(list(step.parts.values())) for step in window]).cpu()
    shares = torch.stack([step.expert_shares for step in window]).cpu()
    bad = [step for step, row in zip(window, values, strict=True) if not row.isfinite().all()]
    if largest(len(bad)):
        found = [text for text in gather_objects(_describe(bad[0]) if bad else None) if text]
        raise FloatingPointError(found[0])
    names = list(window[0].parts)
    means = reduce_sum(values.mean(0)) / world_size()
    return dict(zip(names, means.tolist(), strict=True)), reduce_sum(shares.mean(0)) / world_size()


def _describe(step: StepLosses) -> str:
    parts = ", ".join(f"{name} {float(part):g}" for name, part in step.parts.items())
    return (
        f"the loss is not finite at step {step.step}: {parts}; images {', '.join(step.images)}; "
        f"the checkpoints of earlier steps are intact: look at these images, or lower train.lr"
    )


def to_device(batch: NamedBatch, device: torch.device) -> NamedBatch:
    """The same batch with its tensors on the device."""
    return type(batch)(
        *(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
    )


def write_run_files(config: Config, folder: RunFolder) -> None:
    """Leave the resolved config and the environment beside the run's results."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config_file.write_text(dump_config(config), encoding="utf-8")
    environment = json.dumps(environment_info(), indent=2) + "\n"
    folder.environment_file.write_text(environment, encoding="utf-8")


def validate(
    state: TrainingState,
    loader: DataLoader,
    config: Config,
    device: torch.device,
    folder: RunFolder,
    report: RunReport,
) -> None:
    """Score the validation split; the best mIoU so far makes best.pth."""
    examples: list[list[np.ndarray]] = []

    def keep_examples(batch: NamedBatch, prediction: Prediction) -> None:
        if is_main_process() and len(examples) < _EXAMPLES:
            examples.extend(example_rows(batch, prediction, config)[: _EXAMPLES - len(examples)])

    state.model.eval()
    metrics = evaluate_segmentation(
        state.model, loader, config, device, on_prediction=keep_examples
    )
    miou = metrics["miou"]
    log.info(
        "validation after epoch %d, step %d: mIoU %s (best before: %s)",
        *(state.epochs_done, state.step, _percent(miou), _percent(state.best_miou)),
    )
    scores = {f"val_iou/{name}": iou for name, iou in metrics["class_iou"].items()}
    picture = contact_sheet(examples, _EXAMPLE_TITLES) if examples else None
    report.validation({"val/miou": miou, **scores}, picture, step=state.step)
    if miou is not None and (state.best_miou is None or miou > state.best_miou):
        state.best_miou = miou
        save_best(state, config, folder, metrics)


def example_rows(
    batch: NamedBatch, prediction: Prediction, config: Config
) -> list[list[np.ndarray]]:
    """A row of pictures (H, W, 3) for each image of a batch, in the order of the titles."""
    palette = config.data.palette
    rows = []
    for index in range(len(batch.name)):
        images = (batch.rgb[index], batch.thermal[index], prediction.fused[index])
        labels = (prediction.segmentation[index], batch.label[index])
        maps = [colorize(x.to(torch.uint8).cpu().numpy(), palette) for x in labels]
        rows.append([*map(to_uint8, images), *maps])
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"
