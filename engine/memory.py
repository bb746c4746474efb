"""A full GPU, explained: what filled it, and what helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs import Config
from utils.distributed import world_size
from utils.errors import InputError


@contextmanager
def explained_out_of_memory(config: Config, device: torch.device) -> Iterator[None]:
    """Turn a GPU that training has filled into an InputError."""
    train, ranks = config.train, world_size()
    at_once = train.batch_size // (ranks * train.accumulation)
    with _explained(
        f"{at_once} images of {train.crop[0]}x{train.crop[1]} at once (train.batch_size "
        f"{train.batch_size}, {ranks} processes, train.accumulation {train.accumulation}), "
        f"{train.precision}",
        f"set {', or '.join(_training_advice(config, ranks))}",
        device,
    ):
        yield


def _training_advice(config: Config, ranks: int) -> Iterator[str]:
    """What takes less memory than the config does, in the order of what it costs."""
    train = config.train
    if train.cuda_graph and train.side_by_side and ranks == 1:
        yield "train.side_by_side=false"
    if train.precision == "float32":
        yield "train.precision=bf16"
    if config.model.recompute is False and train.cuda_graph:
        yield "model.recompute=light"
    if config.model.recompute is not True:
        yield "model.recompute=true"
    yield f"train.accumulation={2 * train.accumulation}, which keeps the batch"
    yield "a smaller train.crop"


@contextmanager
def explained_full_evaluation(
    count: int, size_hw: tuple[int, int], device: torch.device
) -> Iterator[None]:
    """The same for `count` images of one size that are scored or predicted at once."""
    crop = ",".join(str(max(32, side // 2)) for side in size_hw)
    with _explained(
        f"{count} images of {size_hw[0]}x{size_hw[1]} at once, without gradients",
        f"set eval.batch_size=1, or eval.crop=[{crop}], a sliding window",
        device,
    ):
        yield


@contextmanager
def _explained(what: str, advice: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        peak, present = torch.cuda.max_memory_reserved(device), _total_memory(device)
        raise InputError(
            f"GPU out of memory with {what}: peak {peak / 2**30:.1f} of {present / 2**30:.1f} GiB; "
            f"{advice}"
        ) from error


def _total_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
