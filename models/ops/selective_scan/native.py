"""The selective scan on CPU in C++ (native.cpp), compiled at first use where there is a compiler.

The library needs a C++17 compiler and nothing else; it is kept in the user's cache folder, under a
name that holds what it was made from and for, and loaded from there by every later process.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from models.ops.selective_scan.gradients import register_gradients

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
          "-fPIC", "-shared"]  # fmt: skip
_TILE_ELEMENTS = 2048  # states of a tile
_TIMEOUT_S = 120  # of the compiler


def selective_scan_native(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The same function as selective_scan_reference; state in float32.

    Raises:
        RuntimeError: tensors that are not on the CPU, float64 u, or no library and no compiler.
    """
    if u.device.type != "cpu":
        raise RuntimeError(f"scan backend 'native' needs CPU tensors, got {u.device}")
    if u.dtype == torch.float64:
        raise RuntimeError("scan backend 'native' has a float32 state; use 'chunked' for float64")
    floats = [x if x is None else x.float() for x in (u, delta, A, B, C, D, delta_bias)]
    floats[3:5] = (matrix.transpose(2, 3) for matrix in floats[3:5])
    return _forward(*floats, delta_softplus)[0].to(u.dtype)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled functions, made now where they are not in the cache; None without a compiler."""
    try:
        path = _cached_library()
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.info("no native scan, taking the one in PyTorch: %s", said.strip()[-500:])
        return None
    for function in (library.cmfs_scan_forward, library.cmfs_scan_backward):
        function.restype = None
    return library


def _cached_library() -> Path:
    """The library's path; compiles it where it is not there.

    Raises:
        OSError: no compiler, or a cache folder that cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    source = _SOURCE.read_bytes()
    made_for = f"{platform.machine()} {_processor()} {_FLAGS}".encode()
    name = f"scan-{hashlib.sha256(source + made_for).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmfs"
    if not (cache / name).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed whole, for all processes
            _compile(Path(folder) / name)
            os.replace(Path(folder) / name, cache / name)
        log.info("compiled the native scan into %s", cache / name)
    return cache / name


def _compile(target: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise FileNotFoundError("no C++ compiler found")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
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


@torch.library.custom_op("cmfs::selective_scan_native", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y (batch, D, L) and the states at the borders of tiles; B, C (batch, K, L, N), float32."""
    library = load_library()
    if library is None:
        raise RuntimeError("scan backend 'native' needs a C++ compiler; the log says what it said")
    inputs = _contiguous(u, delta, A, B, C, D, delta_bias)
    y = torch.empty_like(inputs[0])
    borders = _empty_borders(u, A)
    if y.numel():
        library.cmfs_scan_forward(
            _sizes(u, A, B, delta_softplus), _pointers(inputs), _pointer(y), _pointer(borders)
        )
    return y, borders


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, _empty_borders(u, A)


@torch.library.custom_op(
    "cmfs::selective_scan_native_backward", mutates_args=(), device_types="cpu"
)
def _backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    borders: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias, the last two whether there is one or not.

    Those of A, D and the bias are summed over images, those of B and C over parts of the channels.
    """
    inputs = _contiguous(u, delta, A, B, C, D, delta_bias)
    grad_y = grad_y.contiguous()
    sizes = _sizes(u, A, B, delta_softplus)
    parts = sizes[6]
    grad_u, grad_delta = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    grad_A = u.new_zeros(u.shape[0], *A.shape)
    grad_D, grad_bias = u.new_zeros(2, *u.shape[:2])
    grad_B, grad_C = u.new_zeros(2, parts, *B.shape)
    if u.numel():
        gradients = [grad_u, grad_delta, grad_A, grad_D, grad_bias, grad_B, grad_C]
        load_library().cmfs_scan_backward(
            sizes, _pointers(inputs), _pointer(grad_y), _pointer(borders), _pointers(gradients)
        )
    sums = (x.sum(0) for x in (grad_A, grad_B, grad_C, grad_D, grad_bias))
    return grad_u, grad_delta, *sums


@_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, borders, delta_softplus):
    vector = A.new_empty(A.shape[:1])
    whole = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, A, B, C)
    )
    return *whole, vector, torch.empty_like(vector)


register_gradients(_forward, _backward)


def _tile(states: int) -> int:
    """Tokens from one kept state to the next."""
    return max(16, _TILE_ELEMENTS // max(states, 1))


def _empty_borders(u: Tensor, A: Tensor) -> Tensor:
    batch, channels, length = u.shape
    borders = max((length - 1) // _tile(A.shape[1]), 0)
    return u.new_empty(batch, channels, borders, A.shape[1])


def _sizes(u: Tensor, A: Tensor, B: Tensor, delta_softplus: bool) -> ctypes.Array:
    """What native.cpp calls sizes: channels in so many parts that every thread has a task."""
    batch, channels, length = u.shape
    groups, states, threads = B.shape[1], A.shape[1], torch.get_num_threads()
    parts = min(-(-threads // max(batch * groups, 1)), channels // groups)
    values = (batch, channels, length, groups, states, _tile(states), parts, delta_softplus)
    return (ctypes.c_int64 * 9)(*values, threads)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(_pointer(x) for x in tensors))
