"""Where a run reports to: console and train_output.log, metrics.jsonl, TensorBoard."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.cli import ONLY_FILE
from utils.run_folder import RunFolder

try:
    import resource
except ImportError:  # no such counters outside POSIX
    resource = None

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_BAR = "{percentage:3.0f}%|{bar:10}| {n}/{total} {elapsed}<{remaining}{postfix}"


class _Console(logging.Handler):
    """Lines on stdout, above a progress bar where there is one, as long as somebody reads them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "only_file", False):
            with contextlib.suppress(OSError):
                tqdm.write(self.format(record), file=sys.stdout)
                sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A file that lets a full disk end the program, as every other file does."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise error
        super().handleError(record)


def setup_logging(path: Path | None, main: bool = True) -> None:
    """Send log lines to the console and, where a path is given, to the end of that file.

    Args:
        path: log file; its folder is created. None: the console alone.
        main: whether this is the main process; others keep silent below errors and write no file.
    """
    handlers: list[logging.Handler] = [_Console()]
    if path is not None and main:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(path, encoding="utf-8"))
    level = logging.INFO if main else logging.ERROR
    logging.basicConfig(level=level, format=_FORMAT, handlers=handlers, force=True)


class MetricsFile:
    """One JSON line per entry, each written out at once.

    Args:
        from_step: lines after this step are dropped first; a resumed run writes them again.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if _step_of(line) <= from_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)  # killed here, the run's history is the old or the new one
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files in one folder.

    Args:
        from_step: entries after this step, of an earlier part of the run, are hidden.
    """

    def __init__(self, folder: Path, *, from_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """One point per name; None (an undefined class IoU, say) leaves a gap."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """image: (H, W, 3) uint8."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """values: (N,)."""
        self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        self._writer.close()


class RunReport:
    """One training run's progress, to all places at once; use it as a context.

    On a terminal a bar shows progress and the log lines of single steps go to the file alone.

    Args:
        from_step: where the run begins (a resumed one later than 0).
        is_enabled: False on every rank but the first, where nothing is written.
    """

    def __init__(
        self, folder: RunFolder, *, from_step: int, total_steps: int, is_enabled: bool
    ) -> None:
        self._is_enabled = is_enabled
        self._total_steps = total_steps
        self._has_bar = is_enabled and sys.stderr.isatty()
        self._start_time = time.perf_counter()
        self.start_clock(from_step)
        if is_enabled:
            self._metrics = MetricsFile(folder.metrics_file, from_step=from_step)
            self._tensorboard = TensorBoard(folder.tensorboard, from_step=from_step)
            self._bar = tqdm(
                total=total_steps,
                initial=from_step,
                bar_format=_BAR,
                dynamic_ncols=True,
                disable=not self._has_bar,
            )

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_enabled:
            self._bar.close()
            self._metrics.close()
            self._tensorboard.close()

    def start_clock(self, step: int) -> None:
        """Measure speed from here on, so that validation does not count."""
        self._clock_step, self._clock_time = step, time.perf_counter()

    def advance(self) -> None:
        """One more step was begun on the device: the bar moves, nothing is read."""
        if self._is_enabled:
            self._bar.update()

    def steps(
        self,
        losses: Mapping[str, float],
        expert_shares: Tensor,
        *,
        epoch: int,
        step: int,
        gradient_norm: float,
        learning_rate: float,
        batch_size: int,
        data_wait: float,
    ) -> None:
        """Report the steps since the last call.

        Args:
            losses: mean of each part; "total" becomes "loss", others "loss_<part>". Empty where no
                step was good; then there is nothing to report.
            expert_shares: (blocks, E), on the CPU.
            gradient_norm: the largest, before clipping.
            batch_size: images per step over all ranks.
            data_wait: share of the time spent on waiting for images.
        """
        if not self._is_enabled or not losses:
            return
        seconds_per_step = (time.perf_counter() - self._clock_time) / (step - self._clock_step)
        images_per_s = batch_size / seconds_per_step
        self.start_clock(step)
        parts = {f"loss_{part}": loss for part, loss in losses.items() if part != "total"}
        entry = {
            "loss": losses["total"],
            **parts,
            "gradient_norm": gradient_norm,
            "lr": learning_rate,
            "images_per_s": round(images_per_s, 3),
            "data_wait": round(data_wait, 3),
            "elapsed_s": round(time.perf_counter() - self._start_time, 3),
        }
        self._metrics.write({"step": step, "epoch": epoch, **entry})
        shares = {
            f"experts/block{block}_expert{expert}": share
            for block, row in enumerate(expert_shares.tolist())
            for expert, share in enumerate(row)
        }
        self._tensorboard.scalars(
            {
                **{f"loss/{part}": value for part, value in losses.items()},
                "train/gradient_norm": gradient_norm,
                "train/lr": learning_rate,
                "train/images_per_s": images_per_s,
                "train/data_wait": data_wait,
                **shares,
            },
            step,
        )
        left = tqdm.format_interval((self._total_steps - step) * seconds_per_step)
        shown = " ".join(
            [
                f"loss {losses['total']:.4f} lr {learning_rate:.2e} {images_per_s:.1f} images/s",
                *_peak_memory(),
                *(f"{part} {loss:.4f}" for part, loss in losses.items() if part != "total"),
            ]
        )
        log.info(
            "epoch %d step %d/%d left %s %s",
            *(epoch, step, self._total_steps, left, shown),
            extra=ONLY_FILE if self._has_bar else None,
        )
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(shown)

    def pictures(self, pictures: Mapping[str, np.ndarray], *, step: int) -> None:
        """Show pictures, (H, W, 3) uint8 by TensorBoard name."""
        if not self._is_enabled:
            return
        for name, picture in pictures.items():
            self._tensorboard.image(name, picture, step)

    def validation(
        self,
        scores: Mapping[str, float | None],
        pictures: Mapping[str, np.ndarray],
        histograms: Mapping[str, np.ndarray],
        *,
        step: int,
    ) -> None:
        """Report a validation, all by TensorBoard name.

        Args:
            pictures: (H, W, 3) uint8.
            histograms: the values, (N,).
        """
        if not self._is_enabled:
            return
        self._tensorboard.scalars(scores, step)
        self.pictures(pictures, step=step)
        for name, values in histograms.items():
            self._tensorboard.histogram(name, values, step)


def _peak_memory() -> list[str]:
    """The most memory that was in use at once, of the GPU or, where there is none, by us."""
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    elif resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        return []
    return [f"{peak / 2**30:.1f} GiB"]


def _step_of(line: str) -> float:
    """Of a line of a metrics file; inf for one that a crash of the machine spoilt."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def _whole_lines(path: Path) -> list[str]:
    """The file's lines, without a last one that a crash cut short."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line for line in file if line.endswith("\n")]
