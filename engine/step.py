"""One training step: forward, backward, and an update that bad numbers turn into none."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from configs import Config
from engine.graphs import GraphedGradient
from engine.losses import Batch, PixelCounts, count_pixels, joint_loss
from engine.rounding import with_rounded_weights
from engine.state import TrainingState
from utils.distributed import average, gather_objects, largest, reduce_sum, world_size

_AUTOCAST_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NamedBatch(Batch, Protocol):
    """A batch whose images are known by name; see dataloader.packing.Sample."""

    name: list[str]


class StepResult(NamedTuple):
    """What one step leaves on the device until it is read."""

    step: int
    images: list[str]
    parts: dict[str, Tensor]  # each ()
    expert_shares: Tensor  # (blocks, E)
    gradient_norm: Tensor  # (), before clipping
    is_bad: Tensor  # (), the loss or the gradient was not finite


class Summary(NamedTuple):
    """Some steps, over all ranks; the same on every rank."""

    losses: dict[str, float]  # mean of each part over the good steps; empty where there are none
    expert_shares: Tensor  # (blocks, E), on the CPU
    gradient_norm: float  # the largest of the good steps; 0 where there are none
    bad_steps: list[str]  # a description of each


def train_step(state: TrainingState, batch: NamedBatch, config: Config) -> StepResult:
    """One step of the optimiser from train.accumulation equal parts of this rank's batch.

    Where the gradient is not finite (a bad loss makes it so, on all ranks) weights and moments stay
    as they were. Whether that was so is known on the device alone, so nothing waits for it.
    """
    accumulation = config.train.accumulation
    statistics = [b.clone() for b in state.statistics] if config.train.max_bad_steps else []
    add_gradient = state.graph or functools.partial(_add_gradient, state, config)
    state.optimizer.zero_grad()
    counts = mean_counts(batch, accumulation)
    results = [add_gradient(part, counts) for part in split_batch(batch, accumulation)]
    average([p.grad for p in state.parameters if p.grad is not None])
    is_skipped, gradient_norm = _update(state, config)
    if state.average is not None:
        state.average.update(state.model, state.step)
    state.step += 1
    state.batch += 1
    losses = {
        name: torch.stack([parts[name] for parts, _ in results]).mean() for name in results[0][0]
    }
    is_bad = is_skipped | ~losses["total"].isfinite()
    for buffer, before in zip(state.statistics, statistics, strict=False):
        buffer.copy_(torch.where(is_bad, before, buffer))  # they saw the bad numbers
    shares = torch.stack([share for _, share in results]).mean(0)
    return StepResult(state.step, batch.name, losses, shares, gradient_norm, is_bad)


def mean_counts(batch: NamedBatch, accumulation: int) -> PixelCounts:
    """Pixels of the whole step, over its parts on all ranks; every rank takes part."""
    total = reduce_sum(torch.stack(count_pixels(batch)))
    return PixelCounts(*(total / (world_size() * accumulation)))


def split_batch(batch: NamedBatch, count: int) -> list[NamedBatch]:
    """The batch in `count` equal parts, in order."""
    size = len(batch.name) // count
    return [
        type(batch)(*(field[index * size :][:size] for field in batch)) for index in range(count)
    ]


def summarize(steps: list[StepResult]) -> Summary:
    """Read what some steps left on the device; every rank takes part."""
    values = torch.stack([torch.stack(list(step.parts.values())) for step in steps]).cpu()
    shares = torch.stack([step.expert_shares for step in steps]).cpu()
    norms = torch.stack([step.gradient_norm for step in steps]).cpu()
    is_bad = torch.stack([step.is_bad for step in steps]).cpu()
    found: dict[int, str] = {}
    if largest(int(is_bad.any())):
        ours = [_describe(step) for step, bad in zip(steps, is_bad, strict=True) if bad]
        for theirs in gather_objects(ours):
            for number, is_loss, text in theirs:
                found[number] = text if is_loss else found.get(number, text)
    good = torch.tensor([step.step not in found for step in steps])
    means = reduce_sum(values[good].mean(0)) / world_size()
    losses = dict(zip(steps[0].parts, means.tolist(), strict=True)) if good.any() else {}
    shares = reduce_sum(shares.mean(0)) / world_size()
    norms = norms[good & norms.isfinite()]  # of ranks the same; fp16 leaves steps out as it scales
    norm = norms.max().item() if len(norms) else 0.0
    return Summary(losses, shares, norm, [found[number] for number in sorted(found)])


@contextmanager
def recorded_steps(state: TrainingState, config: Config) -> Iterator[None]:
    """On a GPU, let train_step replay its forward and backward as a CUDA graph (train.cuda_graph).

    Ranks record what they exchange for batch statistics, too; the gradients' exchange follows.
    The recording is gone at the end: NCCL does not let ranks disconnect before. Parts run side by
    side (train.side_by_side) where there is one rank: several would exchange on several streams,
    which was not tried.
    """
    if config.train.cuda_graph and state.parameters[0].is_cuda:
        compute = functools.partial(_add_gradient, state, config)
        side_by_side = config.train.side_by_side and world_size() == 1
        state.graph = GraphedGradient(compute, state.parameters, side_by_side=side_by_side)
    try:
        yield
    finally:
        state.graph = None


def _add_gradient(
    state: TrainingState, config: Config, batch: NamedBatch, counts: PixelCounts
) -> tuple[dict[str, Tensor], Tensor]:
    """Add this part's share of the step's gradient; its losses, and its experts' shares."""
    dtype = _AUTOCAST_DTYPES[config.train.precision]

    def differentiate(model: nn.Module) -> dict[str, Tensor]:
        """The backward pass included, for which with_rounded_weights keeps what it rounded."""
        with torch.autocast(batch.rgb.device.type, dtype=dtype, enabled=dtype is not None):
            output = model(batch.rgb, batch.thermal)
        parts = joint_loss(output, batch, config.loss, counts)
        total = parts["total"] / config.train.accumulation
        total = total * torch.where(total.isfinite(), 1.0, torch.nan)
        state.scaler.scale(total).backward()
        return {name: part.detach() for name, part in parts.items()}

    parts = with_rounded_weights(state.model, dtype, differentiate)
    return parts, state.model.expert_shares()


def _update(state: TrainingState, config: Config) -> tuple[Tensor, Tensor]:
    """Apply the gradient if it is finite; () bool on the device: it was not; () its norm.

    The scaler leaves a bad step out and then lowers its scale. In fp16 a scale above 1 may be the
    very cause, so that only what is left out at a lower one counts as bad.
    """
    scaler, one = state.scaler, torch.ones((), device=state.parameters[0].device)
    scaler.unscale_(state.optimizer)
    norm = _gradient_norm(state.parameters, config.train.clip_grad_norm)
    scaler.step(state.optimizer)
    before = scaler.scale(one)
    scaler.update()
    is_skipped = (scaler.scale(one) < before) & (before <= 1)
    if config.train.precision != "fp16":
        scaler.update(1.0)
    return is_skipped, norm


def _gradient_norm(parameters: list[nn.Parameter], largest_norm: float | None) -> Tensor:
    """() norm of the whole gradient, which is then clipped where there is a largest one."""
    if largest_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, largest_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _describe(step: StepResult) -> tuple[int, bool, str]:
    """A bad step: its number, whether this rank's loss is at fault, and a line about it."""
    parts = {name: float(part) for name, part in step.parts.items()}
    is_loss = not bool(step.parts["total"].isfinite())
    return (
        step.step,
        is_loss,
        f"the {'loss' if is_loss else 'gradient'} is not finite at step {step.step}: "
        f"{', '.join(f'{name} {value:g}' for name, value in parts.items())}; "
        f"images {', '.join(step.images)}",
    )
