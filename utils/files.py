"""Files that appear whole."""

import contextlib
import os
from pathlib import Path

from utils.errors import InputError


def write_whole(path: Path, content: bytes | str, *, outlasts_power_cut: bool = False) -> None:
    """Write a file aside, then rename it: whoever reads it finds the old one or the new one.

    Folders are made; a text is written in UTF-8.

    Args:
        outlasts_power_cut: wait until the content is on the disk before the name is, for files
            that are made once and read for months.
    Raises:
        InputError: the folder or disk does not take it; a file that was there stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if outlasts_power_cut:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error
