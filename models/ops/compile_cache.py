"""Where what is compiled at first use is kept for every later process: the user's cache folder."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_path(name: str) -> Path:
    """Path of a compiled file, there or not; its name holds what it was made from and for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmfs" / name


def fill_cache(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file elsewhere and rename it whole: other processes see no part of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder) / path.name)
        os.replace(Path(folder) / path.name, path)
