"""What a data set is prepared from: a folder or a zip archive, seen in one way."""

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from utils.errors import InputError

_LARGEST_FILE = 1 << 29  # bytes of one unpacked image; more is no image but an attack or a slip
_ARCHIVE_SUFFIXES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz")


class BadFile(InputError):
    """A file of the source that cannot be used; the others may be fine."""


class Source(Protocol):
    """Files by their path below one root, with "/" between folders; hidden ones are left out."""

    path: Path
    sizes: dict[str, int]  # bytes of every file

    def fetch(self, files: Sequence[str]) -> contextlib.AbstractContextManager[list[Path]]:
        """The files on disk, while the context is open; an InputError names them as they are.

        Raises:
            BadFile: a member of an archive that cannot be unpacked.
        """


class FolderSource:
    """An unpacked archive or a folder of the user's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes = dict(sorted(_walk(path)))

    @contextlib.contextmanager
    def fetch(self, files: Sequence[str]) -> Iterator[list[Path]]:
        yield [self.path / file for file in files]


class ZipSource:
    """A zip archive, read in place: nothing is unpacked but the files at hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no whole zip archive ({error}); copy it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._archive.infolist():
            name = info.filename.replace("\\", "/")  # as some Windows programs write it
            _check_member(path, name, info)
            if not info.is_dir() and not _is_hidden(name):
                self._members[name] = info
        self.sizes = {name: self._members[name].file_size for name in sorted(self._members)}

    @contextlib.contextmanager
    def fetch(self, files: Sequence[str]) -> Iterator[list[Path]]:
        with tempfile.TemporaryDirectory() as folder:
            paths: dict[str, Path] = {}
            for file in files:
                if file not in paths:
                    paths[file] = Path(folder, str(len(paths)), PurePosixPath(file).name)
                    paths[file].parent.mkdir()
                    self._unpack(file, paths[file])
            try:
                yield [paths[file] for file in files]
            except InputError as error:
                message = str(error)
                for file, path in paths.items():
                    message = message.replace(str(path), f"{self.path}/{file}")
                raise type(error)(message) from error

    def _unpack(self, file: str, path: Path) -> None:
        try:
            with self._archive.open(self._members[file]) as packed, open(path, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise BadFile(f"{self.path}/{file} is damaged ({error}); copy it again") from error
        except (RuntimeError, NotImplementedError) as error:  # a password, an exotic method
            raise BadFile(
                f"{self.path}/{file} cannot be unpacked ({error}); unpack it and give the folder"
            ) from error


def open_source(path: Path) -> Source:
    """A folder or zip archive as a source.

    Raises:
        InputError: nothing there, another kind of archive, a damaged one, or one with a member
            that would leave its folder when unpacked.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; SRC is the archive (.zip) or the unpacked folder")
    if path.suffix.lower() in _ARCHIVE_SUFFIXES[1:]:
        raise InputError(f"{path}: only .zip is read as it is; unpack it and give the folder")
    return ZipSource(path)


def fingerprint(source: Source, files: Sequence[str]) -> str:
    """Names and sizes of the files in one SHA-256, to tell whether a source has changed."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0{source.sizes[file]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def archives_in(source: Source) -> list[str]:
    """Archives inside a source, for the message that one of them may be meant."""
    return [file for file in source.sizes if file.lower().endswith(_ARCHIVE_SUFFIXES)]


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Relative path and bytes of every file; links to folders are followed once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        below = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in files:
            path = Path(folder, name)
            if not _is_hidden(name) and path.is_file():
                yield (below / name).as_posix(), path.stat().st_size


def _is_hidden(name: str) -> bool:
    """Whether a path has a part that systems add on their own, such as .DS_Store."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _check_member(path: Path, name: str, info: zipfile.ZipInfo) -> None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or ":" in parts[0]:
        raise InputError(f"{path} holds '{name}', a path that leaves its folder; do not trust it")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise InputError(f"{path} holds '{name}', a link; unpack it yourself and give the folder")
    if info.file_size > _LARGEST_FILE:
        raise InputError(
            f"{path} holds '{name}' of {info.file_size / 1e6:,.0f} MB unpacked; that is no image "
            "of a data set"
        )
