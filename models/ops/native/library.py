"""The C++ library of scan.cpp: compiled at first use, cached, and called with tensors.

It needs a C++17 compiler and nothing else; it is kept in the user's cache folder, under a name that
holds what it was made from and for, and loaded from there by every later process.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from models.ops.compile_cache import cache_path, fill_cache

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("scan.cpp")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
          "-fPIC", "-shared"]  # fmt: skip
_TILE_ELEMENTS = 2048  # states of a tile
_TIMEOUT_S = 120  # of the compiler


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled functions, made now where they are not in the cache; None without a compiler."""
    try:
        library = _open_library()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.info("no native scan, taking the one in PyTorch: %s", said.strip()[-500:])
        return None
    for name in ("scan_forward", "scan_backward", "map_forward", "map_backward"):
        getattr(library, f"cmfs_{name}").restype = None
    return library


def require_library() -> ctypes.CDLL:
    """load_library, or a RuntimeError for who asked for it by name."""
    library = load_library()
    if library is None:
        raise RuntimeError("scan backend 'native' needs a C++ compiler; the log says what it said")
    return library


def tile_of(states: int) -> int:
    """Tokens from one kept state to the next."""
    return max(16, _TILE_ELEMENTS // max(states, 1))


def parts_of(channels: int, tasks: int, threads: int) -> int:
    """Parts of the channels, so that each thread has something to do besides `tasks` others."""
    return max(1, min(-(-threads // max(tasks, 1)), channels))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """Address of a tensor's first element, or null."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Their addresses as a C array."""
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def integers(*values: int) -> ctypes.Array:
    """Values as a C array of 64 bits each."""
    return (ctypes.c_int64 * len(values))(*values)


def _open_library() -> ctypes.CDLL:
    """The library as it is in the cache, or compiled anew where it cannot be loaded.

    Raises:
        OSError: no compiler, or a cache folder that cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    path = _cached_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.info("compiling the native scan again: %s", error)
        fill_cache(path, _compile)
        return ctypes.CDLL(str(path))


def _cached_library() -> Path:
    """The library's path; compiles it where it is not there.

    Raises:
        OSError: no compiler, or a cache folder that cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    source = _SOURCE.read_bytes()
    made_for = f"{platform.machine()} {_processor()} {_FLAGS}".encode()
    name = f"scan-{hashlib.sha256(source + made_for).hexdigest()[:16]}.so"
    path = cache_path(name)
    if not path.is_file():
        fill_cache(path, _compile)
        log.info("compiled the native scan into %s", path)
    return path


def _compile(target: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++")
    ]
    if not compiler[0]:
        raise FileNotFoundError("no C++ compiler found")
    command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
    options = {"check": True, "capture_output": True, "text": True, "timeout": _TIMEOUT_S}
    try:
        subprocess.run([*command, "-fopenmp"], **options)
    except subprocess.CalledProcessError:
        subprocess.run(command, **options)  # on one core, where the compiler has no OpenMP


def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return " ".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
