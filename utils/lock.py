"""One process at a time in a folder."""

import errno
import logging
import os
from pathlib import Path
from typing import TextIO

from utils.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks outside POSIX
    fcntl = None

log = logging.getLogger(__name__)


def claim(folder: Path) -> TextIO:
    """Take a folder, which is made where there is none, until the result is closed.

    The system gives it free when the process ends, however it ends. Processes forked meanwhile
    have no part in it.

    Raises:
        InputError: another process holds it, or no such folder can be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot use {folder} as a run's folder: {error.strerror} ({error.filename})"
        ) from error
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning(
                "%s has no locks (%s): nothing keeps two runs out of one folder", folder, error
            )
            return file
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise InputError(
            f"{folder} is in use by another run (process {holder}): wait for its end or stop it, "
            f"or begin another run with --exp NAME"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
