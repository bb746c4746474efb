"""Runs the CUDA kernels on a CPU: compiled as C++ against a stand-in for the GPU (emulated_gpu.h).

Threads of a block are fibers, blocks come one after the other in the order of their tickets.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from models.ops.cuda import library
from models.ops.selective_scan import cuda as rows
from models.ops.ss2d_scan import cuda as maps

FOLDER = Path(library.__file__).parent
SHARED_BYTES = 231_000  # of a block on a Hopper GPU
schedule = {"seed": 0}  # of the order in which warps come; 0: as they are numbered
gpu = {"architecture": 900}  # __CUDA_ARCH__ of kernels that are compiled

_compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(not _compiler, reason="there is no C++ compiler here")
_folder = tempfile.TemporaryDirectory(prefix="cmfs_emulated_")  # until the tests end


@functools.cache
def _load(source: str, definitions: tuple[str, ...], architecture: int) -> ctypes.CDLL:
    target = Path(_folder.name) / f"{len(list(Path(_folder.name).iterdir()))}.so"
    header = Path(__file__).with_name("emulated_gpu.h")
    names = (Path(source).stem.upper(), f'SOURCE="{FOLDER / source}"')
    macros = [f"-D{macro}" for macro in (*definitions, *names)]
    macros += [f"-D__CUDA_ARCH__={architecture}"]
    command = [_compiler, "-std=c++14", "-O1", "-w", "-x", "c++", "-shared", "-fPIC", *macros]
    command += ["-U_FORTIFY_SOURCE"]  # with it glibc refuses jumps to other stacks
    subprocess.run([*command, str(header), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def _launch(source, definitions, name, blocks, threads, shared_bytes, arguments, like) -> None:
    assert not like.is_cuda
    status = getattr(_load(source, definitions, gpu["architecture"]), f"launch_{name}")(
        blocks, threads, shared_bytes, schedule["seed"], ctypes.byref(arguments)
    )
    assert status != 1, f"{name} read from a chunk what it had not handed on"
    assert status != 2, f"{name} wrote past its {shared_bytes} bytes of shared memory"


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    """CUDA backends take CPU tensors, as on a Hopper GPU, and hand what they launch to `launch`."""
    monkeypatch.setattr(library, "launch", launch)
    monkeypatch.setattr(library, "shared_bytes", lambda device: SHARED_BYTES)
    monkeypatch.setattr(library, "copies_to_shared", lambda device: True)
    for module in (rows, maps):
        monkeypatch.setattr(module, "check_tensor", lambda x: None)


@pytest.fixture
def emulated(monkeypatch):
    """CUDA backends that run on a CPU."""
    pretend_gpu(monkeypatch, _launch)
