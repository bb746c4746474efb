"""One file over HTTP: resumed, retried, checked, and under its name only when it is whole."""

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path

from utils.errors import InputError

log = logging.getLogger(__name__)

_CHUNK = 1 << 17  # bytes
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that may be better next time

OnProgress = Callable[[int, int | None], None]


class _Interrupted(Exception):
    """The transfer stopped half-way, in a way that another try may mend."""


def download(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    tries: int = 5,
    wait_s: float = 1.0,
    timeout_s: float = 30.0,
    on_progress: OnProgress | None = None,
) -> str:
    """Fetch a file to `path` by way of `path`.part.

    A part is continued only where the server confirms that its file is still the one that the part
    came from (If-Range with its ETag or date, kept in `path`.part.tag); else the transfer starts
    over.

    Args:
        sha256: checksum that the file must have; None takes what comes, if its length is right.
        tries: in a row without a byte of progress; the pause doubles from wait_s each time.
        on_progress: called with bytes present and bytes in all (None: not known).
    Returns:
        The file's SHA-256.
    Raises:
        InputError: the address, the answer, the checksum or the disk is at fault; `path` is as it
            was. What was received stays in the part, unless its checksum is wrong.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    tag = path.with_name(path.name + ".part.tag")
    on_progress = on_progress or _ignore
    failures = most = 0
    with _disk_errors(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                _fetch(url, part, tag, timeout_s, on_progress, has_checksum=sha256 is not None)
                break
            except _Interrupted as error:
                size = _size(part)
                failures = 1 if size > most else failures + 1
                most = max(most, size)
                if failures >= tries:
                    kept = f"; the same command goes on at byte {size:,}" if tag.exists() else ""
                    raise InputError(f"{url}: {error}{kept}") from error
                pause_s = wait_s * 2 ** (failures - 1)
                log.warning("%s: %s; trying again in %g s", path.name, error, pause_s)
                time.sleep(pause_s)
        digest = file_sha256(part)
        tag.unlink(missing_ok=True)
        if sha256 is not None and digest != sha256:
            part.unlink()
            raise InputError(
                f"{url} has the SHA-256 {digest} instead of {sha256}; it is not the expected file "
                f"and was deleted"
            )
        os.replace(part, path)
    return digest


def file_sha256(path: str | Path) -> str:
    """The file's SHA-256 as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_html(head: bytes) -> bool:
    """Whether a file that should be binary begins like a web page (a login, an error)."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"


def _fetch(
    url: str,
    part: Path,
    tag: Path,
    timeout_s: float,
    on_progress: OnProgress,
    *,
    has_checksum: bool,
) -> None:
    """One transfer into part, from its end where possible; returns when the file is whole."""
    offset = _size(part) if tag.is_file() else 0
    headers = {"User-Agent": "CMFS"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": tag.read_text(encoding="latin-1")}
    with _open(url, headers, timeout_s, part, tag) as response:
        if response.status != 206:
            offset = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            tag.unlink()
            raise _Interrupted("the server continued at another place than asked")
        total = None if response.length is None else offset + response.length
        chunks = _chunks(response)
        first = next(chunks, b"")
        _check_answer(url, response, first, is_start=not offset, has_checksum=has_checksum)
        _check_space(part.parent, None if total is None else total - offset)
        size = offset
        with open(part, "ab" if offset else "wb") as file:
            if not offset:  # after the old part is gone: it must not meet the new tag
                _write_tag(tag, response)
            for chunk in itertools.chain([first], chunks):
                file.write(chunk)
                size += len(chunk)
                on_progress(size, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size != total:
        raise _Interrupted(f"the connection closed after {size:,} of {total:,} bytes")


def _open(
    url: str, headers: dict[str, str], timeout_s: float, part: Path, tag: Path
) -> HTTPResponse:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"'{url}' is no address of a file; it must begin with https:// or http://")
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout_s
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part is as long as the file or longer
            part.unlink(missing_ok=True)
            tag.unlink(missing_ok=True)
            raise _Interrupted("the part on disk does not fit the file") from error
        if error.code in _TRANSIENT:
            raise _Interrupted(f"the server answered {error.code} {error.reason}") from error
        raise InputError(f"{url}: the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Interrupted(f"no connection ({error.reason})") from error
    except (InvalidURL, ValueError) as error:
        raise InputError(f"'{url}' is no address of a file: {error}") from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"no answer ({error!r})") from error


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The body; the network's errors become _Interrupted, so that an OSError means the disk."""
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, HTTPException) as error:
            raise _Interrupted(f"the transfer broke off ({error!r})") from error
        if not chunk:
            return
        yield chunk


def _check_answer(
    url: str, response: HTTPResponse, first: bytes, *, is_start: bool, has_checksum: bool
) -> None:
    """Refuse what cannot be the file, before anything on the disk is touched."""
    if not first:
        raise _Interrupted("the answer has no content")
    if response.headers.get_content_type() == "text/html" or (is_start and is_html(first)):
        raise InputError(f"{url} answered with a web page instead of the file; open it to see why")
    is_delimited = "Content-Length" in response.headers or response.chunked
    if not is_delimited and not has_checksum:
        raise InputError(
            f"{url}: the server does not tell the file's length, so that a cut file could not be "
            f"told from a whole one; use another address"
        )


def _check_space(folder: Path, needed: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if needed is not None and needed > free:
        raise InputError(
            f"{folder} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed; make "
            f"room or choose another folder"
        )


def _write_tag(tag: Path, response: HTTPResponse) -> None:
    """Keep what If-Range needs: a strong ETag, else the date; without either, no later resume."""
    etag = response.headers.get("ETag", "")
    mark = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    if mark:
        tag.write_text(mark, encoding="latin-1")
    else:
        tag.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{part} cannot be written: {error.strerror}; no other file was changed"
        ) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _ignore(size: int, total: int | None) -> None:
    """Nobody watches."""
