"""The training loop: fit() takes a network and two loaders, and leaves checkpoints and logs."""

import json
import logging
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from configs import Config, dump_config
from engine.evaluate import evaluate_segmentation
from engine.examples import Examples
from engine.feed import Feed, UntilStop
from engine.memory import explained_out_of_memory
from engine.optim import lr_at
from engine.state import (
    TrainingState,
    build_state,
    check_same_start,
    restore,
    save_best,
    save_epoch,
    save_last,
    settle,
)
from engine.step import StepResult, Summary, recorded_steps, summarize, train_step
from models import CMFS
from utils.cli import StopRequest
from utils.distributed import Devices, is_main_process, largest
from utils.environment import environment_info
from utils.log import RunReport
from utils.run_folder import RunFolder

log = logging.getLogger(__name__)

_STEP_PATIENCE_S = 20.0  # torchrun's is 30
_LARGEST_FREE_LR = 1e-4  # above it, runs of the paper's network should clip their gradients


def fit(
    config: Config,
    model: CMFS,
    train_loader: DataLoader,
    val_loader: DataLoader,
    *,
    folder: RunFolder,
    devices: Devices,
    resume_from: Path | None = None,
    pictures: Mapping[str, np.ndarray] | None = None,
) -> int:
    """Train to the end of the schedule, or until SIGINT or SIGTERM.

    epoch-last.pth is written at the end of the first epoch and of others, before their validation,
    where the last one is train.save_every_s old; at a stop; and at the end. A stop ends a
    validation, too, which a resumed run then does anew.

    Args:
        pictures: (H, W, 3) uint8 by TensorBoard name, shown at the beginning.
    Returns:
        0, or the number of the signal that stopped the run, its exact state in epoch-last.pth.
    Raises:
        FloatingPointError: more losses or gradients than train.max_bad_steps were not finite; the
            checkpoints stay as they were.
        InputError: resume_from does not belong to this run, the batch does not divide among the
            ranks, or the disk or the GPU's memory is full.
    """
    check_same_start(resume_from)
    with explained_out_of_memory(config, devices.device):
        state = build_state(config, model, devices, steps_per_epoch=len(train_loader))
    if resume_from is not None:
        restore(state, resume_from, config, devices)
        if not folder.best_checkpoint.is_file():  # it is the best of another folder's run
            state.best_miou = None
    if is_main_process():
        write_run_files(config, folder)
    log.info("text prior: %s", state.model.text_prior.source)
    warn_of_collapse(config)
    log.info("begins after step %d of %d", state.step, state.total_steps)
    if devices.device.type == "cuda":
        log.info("on a new machine the first step compiles GPU kernels, for a minute or so")
    report = RunReport(
        folder, from_step=state.step, total_steps=state.total_steps, is_enabled=is_main_process()
    )
    feed = Feed(train_loader, devices.device)
    unreported: list[StepResult] = []
    saved_at = -math.inf  # before there is a best.pth there is something to go on from
    with report, StopRequest(_patience_s(devices)) as stop, recorded_steps(state, config):
        report.pictures(pictures or {}, step=state.step)
        while True:
            with explained_out_of_memory(config, devices.device):
                stopped = train_epoch(state, feed, config, stop, report, unreported)
            settle(state)
            is_due = time.monotonic() - saved_at >= config.train.save_every_s
            is_saved = bool(stopped or state.is_finished or largest(is_due))
            with stop.pause():
                if is_saved:
                    save_last(state, config, folder)
                    saved_at = time.monotonic()
                if not stopped:
                    save_epoch(state, config, folder)
            is_scored = state.is_finished or state.epochs_done % config.train.val_every == 0
            if is_scored and not stopped:
                stopped = validate(
                    state, UntilStop(val_loader, stop), config, devices.device, folder, report
                )
                report.start_clock(state.step)
            if stopped:
                if not is_saved:
                    save_last(state, config, folder)
                log.info("%s: saved after step %d", signal.Signals(stopped).name, state.step)
                return stopped
            if state.is_finished:
                return 0
            state.epoch, state.batch = state.epoch + 1, 0


def train_epoch(
    state: TrainingState,
    feed: Feed,
    config: Config,
    stop: StopRequest,
    report: RunReport,
    unreported: list[StepResult],
) -> int:
    """Run what is left of the epoch; returns the signal that came to any rank, or 0.

    Losses stay on the device; they are read, and checked, when a log line is due and at the end.

    Args:
        unreported: steps since the last log line, from one epoch to the next.
    """
    batches = feed.batches(state.epoch, start=state.batch)
    state.model.train()
    unread: list[StepResult] = []
    stopped = 0
    while not (stopped or state.is_finished or state.batch == state.steps_per_epoch):
        learning_rate = set_learning_rate(state, config)
        unread.append(train_step(state, next(batches), config))
        report.advance()
        if state.step % config.train.log_every == 0 or state.is_finished:
            begin = time.perf_counter()
            summary = check_steps(unread, state, config)
            if unreported:
                summary = summarize(unreported + unread)
            unreported.clear()
            unread.clear()
            report.steps(
                summary.losses,
                summary.expert_shares,
                gradient_norm=summary.gradient_norm,
                epoch=state.epoch + 1,
                step=state.step,
                learning_rate=learning_rate,
                batch_size=config.train.batch_size,
                data_wait=feed.waited_share(time.perf_counter() - begin),
            )
        stopped = largest(stop.asked())
    if unread:
        check_steps(unread, state, config)
        unreported += unread
    return stopped


def warn_of_collapse(config: Config) -> None:
    """Say what a large learning rate without clipping may lead to (benchmarks/results/msrs.md)."""
    is_large = config.train.lr > _LARGEST_FREE_LR and config.train.clip_grad_norm is None
    if config.model.size == "tiny" and is_large:
        log.warning(
            "train.lr %g is far above the paper's 6e-5 and gradients are not clipped: one of two "
            "runs at 4e-4 lost its segmentation for good; train.clip_grad_norm=1.0 guards against "
            "it",
            config.train.lr,
        )


def _patience_s(devices: Devices) -> float | None:
    """How long a step may take after a signal; a rank that died leaves the others' GPUs waiting."""
    is_shared_gpu = devices.device.type == "cuda" and devices.world_size > 1
    return _STEP_PATIENCE_S if is_shared_gpu else None


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


def check_steps(steps: list[StepResult], state: TrainingState, config: Config) -> Summary:
    """What some steps left on the devices of all ranks; bad ones are counted.

    Raises:
        FloatingPointError: on every rank, where more steps were bad than train.max_bad_steps.
    """
    summary = summarize(steps)
    bad_steps = summary.bad_steps
    state.bad_steps += len(bad_steps)
    if state.bad_steps > config.train.max_bad_steps:
        raise FloatingPointError(
            f"{bad_steps[0]}; the checkpoints of earlier steps are intact: look at these images, "
            f"lower train.lr, or let train.max_bad_steps (now {config.train.max_bad_steps}, "
            f"reached) leave such steps out"
        )
    for description in bad_steps:
        log.warning("left out: %s", description)
    # Of pixels with a class the cross-entropy is above 0.
    if config.loss.segmentation_weight > 0 and summary.losses.get("segmentation") == 0:
        log.warning(
            "not one pixel of steps %d to %d has a class: all are 255 (unknown), of images such as "
            "%s; tools/check_dataset.py counts a set's classes",
            *(steps[0].step, steps[-1].step, ", ".join(steps[-1].images[:3])),
        )
    return summary


def write_run_files(config: Config, folder: RunFolder) -> None:
    """Leave the resolved config and the environment beside the run's results."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config_file.write_text(dump_config(config), encoding="utf-8")
    environment = json.dumps(environment_info(), indent=2) + "\n"
    folder.environment_file.write_text(environment, encoding="utf-8")


def validate(
    state: TrainingState,
    loader: UntilStop,
    config: Config,
    device: torch.device,
    folder: RunFolder,
    report: RunReport,
) -> int:
    """Score the validation split; the best mIoU so far makes best.pth.

    Returns the signal that came to any rank meanwhile, or 0; then there is no score.
    """
    examples = Examples(config)
    model = state.scored_model.eval()
    metrics = evaluate_segmentation(model, loader, config, device, on_prediction=examples)
    stopped = largest(loader.stop.asked())
    if stopped:
        return stopped
    miou = metrics["miou"]
    log.info(
        "validation after epoch %d, step %d: mIoU %s (best before: %s)",
        *(state.epochs_done, state.step, _percent(miou), _percent(state.best_miou)),
    )
    scores = {f"val_iou/{name}": iou for name, iou in metrics["class_iou"].items()}
    if is_main_process():
        pictures = examples.draw(model, device)
        report.validation({"val/miou": miou, **scores}, *pictures, step=state.step)
    if miou is not None and (state.best_miou is None or miou > state.best_miou):
        state.best_miou = miou
        save_best(state, config, folder, metrics)
    return 0


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"
