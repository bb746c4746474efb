"""Where what is compiled at first use is kept for every later process: the user's cache folder."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_path(name: str) -> Path:
    """Path of a compiled file, there or not; its name holds what it was made from and for.

    Raises:
        OSError: the user has no home folder, as in some containers.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileNotFoundError(f"{error}; set XDG_CACHE_HOME to a folder of yours") from error
    return folder / "cmfs" / name


def fill_cache(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file elsewhere and rename it whole: other processes see no part of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        write(made)
        with made.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut may leave a part of it under its name
        os.replace(made, path)
