"""Where a run reports to: console and train_output.log, metrics.jsonl, TensorBoard."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
ONLY_FILE = {"only_file": True}  # as `extra=`: a line for the log file that the console skips


class _Console(logging.Handler):
    """Lines on stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "only_file", False):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def setup_logging(path: Path | None, main: bool = True) -> None:
    """Send log lines to the console and, where a path is given, to the end of that file.

    Args:
        path: log file; its folder is created. None: the console alone.
        main: whether this is the main process; others keep silent below errors and write no file.
    """
    handlers: list[logging.Handler] = [_Console()]
    if path is not None and main:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    level = logging.INFO if main else logging.ERROR
    logging.basicConfig(level=level, format=_FORMAT, handlers=handlers, force=True)


class MetricsFile:
    """One JSON line per entry, each written out at once.

    Args:
        from_step: lines after this step are dropped first; a resumed run writes them again.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= from_step]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files in one folder.

    Args:
        from_step: entries after this step of an earlier part of the run are hidden.
    """

    def __init__(self, folder: Path, *, from_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """One point per name; None (an undefined class IoU, say) leaves a gap."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray | Tensor, step: int) -> None:
        """image: (H, W, 3) uint8."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def _whole_lines(path: Path) -> list[str]:
    """The file's lines, without a last one that a crash cut short."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]
