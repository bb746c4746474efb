"""Files that are written whole or not at all, with their SHA-256 beside them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utils.download import file_sha256
from utils.errors import InputError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path, *, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write beside `path`; it takes the place of `path` once it is on the disk.

    Killed at any moment, `path` is the old file or the new one, and a checksum beside it is its
    own or missing. Then <path>.sha256 holds the new file's, as `sha256sum -c` reads it.

    Args:
        previous: where the file that is replaced stays; None lets it go.
    Raises:
        InputError: the disk is full or the folder cannot be written; the file that was there stays.
    """
    partial, kept = (path.with_name(f".{path.name}.{end}") for end in ("partial", "kept"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        digest = file_sha256(partial)
        old_digest = read_digest(path)
        kept.unlink(missing_ok=True)  # of a process that was killed
        if previous is not None and path.exists():
            _link(path, kept)
        digest_file(path).unlink(missing_ok=True)
        os.replace(partial, path)
        _write_digest(path, digest)
        if kept.exists():
            digest_file(previous).unlink(missing_ok=True)
            os.replace(kept, previous)
            if old_digest is not None:
                _write_digest(previous, old_digest)
        _sync_folder(path.parent)
    except BaseException as error:
        for leftover in (partial, kept):
            if leftover.exists():
                leftover.unlink()
        _explain_write_error(path, error)
        raise


def digest_file(path: Path) -> Path:
    """Where the checksum of a file lies."""
    return path.with_name(f"{path.name}.sha256")


def read_digest(path: Path) -> str | None:
    """The SHA-256 that lies beside a file, or None."""
    try:
        return digest_file(path).read_text(encoding="utf-8").split()[0]
    except (FileNotFoundError, UnicodeDecodeError, IndexError):
        return None


def is_intact(path: Path) -> bool:
    """Whether a file agrees with the SHA-256 beside it; True where there is none."""
    digest = read_digest(path)
    return digest is None or digest == file_sha256(path)


def remove(path: Path) -> None:
    """Delete a file and the checksum beside it."""
    path.unlink()
    digest_file(path).unlink(missing_ok=True)


def _write_digest(path: Path, digest: str) -> None:
    partial = path.with_name(f".{path.name}.sha256.partial")
    partial.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    os.replace(partial, digest_file(path))


def _link(path: Path, other: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


def _sync_folder(folder: Path) -> None:
    """Put the renames themselves on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain_write_error(path: Path, error: BaseException) -> None:
    """Raise an InputError where the disk, not the program, is at fault."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save hides the file's own error behind a RuntimeError
    if cause is None:
        return
    reason = "disk full" if cause.errno in _DISK_FULL else f"cannot write ({cause.strerror})"
    kept = "the previous checkpoint is intact" if path.exists() else "there was none before"
    raise InputError(f"{reason} while saving {path}; {kept}: make room, then --resume") from error
