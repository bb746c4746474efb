"""Batches on their way to the device, and a word when they do not come fast enough."""

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch.utils.data import DataLoader

from engine.step import NamedBatch
from utils.cli import StopRequest

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0  # without a batch, until the log says so
_LONGEST_SHARE = 0.5  # of the time spent on waiting, until the log says so
_LEAST_S = 5.0  # time over which a share means something


class PackedBatch(Protocol):
    """What a loader gives; see dataloader.packing.PackedBatch."""

    def to(self, device: torch.device) -> NamedBatch: ...


class Feed:
    """The training loader's batches, epoch by epoch.

    Args:
        loader: its batch_sampler has set_epoch() and start_batch (dataloader.build.EpochSampler).
        patience_s: a warning comes after this time without a batch.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, *, patience_s: float = _PATIENCE_S
    ) -> None:
        self._loader = loader
        self._device = device
        self._patience_s = patience_s
        self._has_warned = False
        self._start_clock()

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._loader)

    def batches(self, epoch: int, *, start: int) -> Iterator[NamedBatch]:
        """The batches of an epoch from number `start` on, on the device."""
        self._loader.batch_sampler.set_epoch(epoch)
        self._loader.batch_sampler.start_batch = start
        batches = iter(self._loader)
        self._start_clock()
        while True:
            with self._watched():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.to(self._device)

    def waited_share(self, synchronized_s: float = 0.0) -> float:
        """Share of the time since the last call, or since the epoch began, without work to do.

        Args:
            synchronized_s: seconds for which the device was still at work when all batches had
                come; while it catches up, waiting has cost nothing.
        """
        elapsed_s = time.perf_counter() - self._since
        waited_s = max(0.0, self._waited_s - synchronized_s)
        share = min(1.0, waited_s / elapsed_s) if elapsed_s > 0 else 0.0
        if share > _LONGEST_SHARE and elapsed_s >= _LEAST_S and not self._has_warned:
            self._has_warned = True
            log.warning(
                "waiting for images takes %.0f %% of the time (%.1f of %.1f s): raise "
                "data.num_workers (now %d), or set data.cache=ram where memory allows",
                *(100 * share, waited_s, elapsed_s, self._loader.num_workers),
            )
        self._start_clock()
        return share

    def _start_clock(self) -> None:
        self._since, self._waited_s = time.perf_counter(), 0.0

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Measure a wait, and speak up while it lasts too long."""
        alarm = threading.Timer(self._patience_s, self._warn)
        alarm.daemon = True
        alarm.start()
        begin = time.perf_counter()
        try:
            yield
        finally:
            alarm.cancel()
            self._waited_s += time.perf_counter() - begin

    def _warn(self) -> None:
        log.warning(
            "no batch for %.0f s (data.num_workers %d): a loader process or the disk under "
            "data.dataset_path hangs, or other work takes the processors; still waiting",
            *(self._patience_s, self._loader.num_workers),
        )


class UntilStop:
    """A loader's batches until a signal has come.

    Attributes:
        stop: where that is seen.
    """

    def __init__(self, loader: DataLoader, stop: StopRequest) -> None:
        self._loader = loader
        self.stop = stop

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[PackedBatch]:
        return itertools.takewhile(lambda _: not self.stop.asked(), self._loader)
