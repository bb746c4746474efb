"""From a config to loaders: which images make which batch on which rank, and the workers."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import cv2
import torch
from torch.utils.data import DataLoader, Sampler

from configs import Config
from dataloader.augment import StrongAugmentation
from dataloader.dataset import SampleKey, SegmentationPairs, read_names, seeded_generator
from dataloader.packing import PackedBatch, Packer
from dataloader.transforms import InTurn, RandomScaleCropMirror
from utils.errors import InputError

_PREFETCHED = 2  # batches that each worker is ahead
_MOST_MAPPED = 32 * 2**20  # bytes; glibc keeps no larger blocks at hand


class EpochSampler(Sampler[list[SampleKey]]):
    """This rank's batches of an epoch, in an order that follows from seed and epoch alone.

    The images of a step over all ranks are the same for every number of ranks. What does not fill
    the last step is left out; each epoch leaves out others.

    Attributes:
        start_batch: batches of this epoch to skip, for a run that goes on in its middle.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """length: images of the split; batch_size: over all ranks, a multiple of world_size."""
        super().__init__()
        if batch_size % world_size:
            raise InputError(
                f"train.batch_size {batch_size} (over all processes) is no multiple of the "
                f"{world_size} processes; set it to {-(-batch_size // world_size) * world_size}"
            )
        if length < batch_size:
            raise InputError(
                f"the training split has {length} images, fewer than train.batch_size "
                f"{batch_size}; set a smaller one"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank_slice = slice(rank, None, world_size)
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from its first batch on."""
        self.epoch = epoch
        self.start_batch = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, whatever start_batch is."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = seeded_generator(self.seed, self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self.start_batch, len(self)):
            images = order[batch * self.batch_size :][: self.batch_size]
            yield [SampleKey(self.epoch, index) for index in images[self.rank_slice]]


class PairLoader(DataLoader):
    """A DataLoader of PackedBatch, each in memory of its own and of images of one size.

    An InputError in a worker is raised here as it was raised there. Where images differ in size a
    listed batch comes in parts, so len() is then a lower bound.
    """

    def __init__(
        self,
        pairs: SegmentationPairs,
        batches: Iterable[list[SampleKey]],
        *,
        modalities: str,
        keep_workers: bool,
    ) -> None:
        """modalities: as data.modalities; the others are withheld from the batches."""
        num_workers = pairs.config.num_workers
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        super().__init__(
            pairs,
            batch_sampler=batches,
            num_workers=num_workers,
            prefetch_factor=_PREFETCHED if num_workers else None,
            collate_fn=Packer(_PREFETCHED + 1, modalities),
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # else each epoch draws from the global one
            persistent_workers=keep_workers and num_workers > 0,
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        if self.num_workers == 0:
            return self._copied(super().__iter__())
        with _group_signals_blocked():
            return self._copied(super().__iter__())

    def _copied(self, lists: Iterable[list[PackedBatch | InputError]]) -> Iterator[PackedBatch]:
        """Each list is read before the next is asked for, when its worker may overwrite it."""
        mapped = deque(maxlen=self.num_workers * (_PREFETCHED + 1))  # else mapped in each time
        _keep_freed_memory()
        for batches in lists:
            if isinstance(batches[0], InputError):
                raise batches.pop()  # a name here would keep it, and the workers, in a cycle
            mapped.append(batches)
            yield from [batch.copy() for batch in batches]


def build_train_loader(config: Config, *, rank: int = 0, world_size: int = 1) -> PairLoader:
    """Batches of augmented crops of the training split; batch_sampler is an EpochSampler.

    Raises:
        InputError: what SegmentationPairs or EpochSampler finds, or a missing val.txt: the best
            checkpoint must not be chosen on other images.
    """
    read_names(config.data, "val")
    transforms = [
        RandomScaleCropMirror(
            config.train.crop, config.train.scales, use_mirror=config.train.mirror
        )
    ]
    if config.augment.probability > 0:
        transforms.append(StrongAugmentation(config.augment))
    pairs = SegmentationPairs(
        config.data,
        "train",
        InTurn(transforms),
        seed=config.seed,
        cutmix=config.augment.cutmix,
    )
    sampler = EpochSampler(
        len(pairs), config.train.batch_size, seed=config.seed, rank=rank, world_size=world_size
    )
    return PairLoader(pairs, sampler, modalities=config.data.modalities, keep_workers=True)


def build_eval_loader(
    config: Config,
    split: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int | None = None,
    need_labels: bool = False,
) -> PairLoader:
    """Whole images in the order of the list, each once over all ranks.

    Both modalities come, whatever data.modalities withholds: fused images are scored against both,
    and engine.inference.withhold keeps one from the network.

    Args:
        batch_size: of this rank; None is eval.batch_size.
        need_labels: False lets a set without a label folder pass, with labels of 255.
    """
    pairs = SegmentationPairs(config.data, split, need_labels=need_labels)
    keys = [SampleKey(0, index) for index in range(rank, len(pairs), world_size)]
    size = batch_size or config.eval.batch_size
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    keep_workers = config.data.cache == "ram"
    return PairLoader(pairs, batches, modalities="both", keep_workers=keep_workers)


def _keep_freed_memory() -> None:
    """Have the C library keep what freed images leave, which it judges by what it saw freed.

    Memory that is new to the process costs several times the copy that fills it.
    """
    torch.empty(_MOST_MAPPED - 2**16, dtype=torch.uint8)  # never touched: this costs nothing


@contextmanager
def _group_signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM; a process that is started meanwhile keeps them blocked for good.

    Both are sent to whole process groups. The main process then finishes its step and saves, for
    which it needs its workers.
    """
    if sys.platform != "linux":  # others cannot tell who sent a signal; see _obey_main_process
        yield
        return
    resource_tracker.ensure_running()  # of multiprocessing; it unblocks both when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(worker: int) -> None:
    """One thread, no warnings that the main process gave, and an end at its command alone."""
    cv2.setNumThreads(0)
    _keep_freed_memory()
    logging.getLogger("utils.image").setLevel(logging.ERROR)
    if sys.platform == "linux":
        threading.Thread(target=_obey_main_process, daemon=True).start()


def _obey_main_process() -> None:
    """End this worker on a SIGTERM from its main process, which so ends those left at its exit."""
    main_process = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
