"""Sums over what blocks leave to be added up, with the launches of sum.cu."""

import ctypes
import math

import torch
from torch import Tensor

from models.ops.cuda import library

_THREADS = 256
_MOST = 3  # arrays of a launch
_TERMS = 8  # of a thread, as many as it asks for at a time; threads share what is more
_MOST_BLOCKS = 1056  # that share so: eight for each multiprocessor of a large GPU
_MANY = 132 * 4 * _THREADS  # outputs: a thread adds four side by side


class _Sum(ctypes.Structure):
    """The struct Sum of sum.cu."""

    _fields_ = [
        ("in_", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("terms", "slices", "blocks", "width")),
    ]  # fmt: skip


class _Sums(ctypes.Structure):
    """The struct Sums of sum.cu."""

    _fields_ = [("sums", _Sum * _MOST)]


def sum_first(*tensors: Tensor) -> list[Tensor]:
    """x.sum(0) of up to three contiguous float32 tensors on a GPU, in one launch."""
    sums = [torch.empty(x.shape[1:], dtype=x.dtype, device=x.device) for x in tensors]
    tasks = [_task(x, out) for x, out in zip(tensors, sums, strict=True)]
    blocks = sum(task.blocks for task in tasks)
    if blocks:
        library.launch(
            "sum.cu", (), "sum", blocks, _THREADS, 0, _Sums((_Sum * _MOST)(*tasks)), tensors[0]
        )
    return sums


def _task(x: Tensor, out: Tensor) -> _Sum:
    terms, count = x.shape[0], out.numel()
    is_aligned = count % 4 == x.data_ptr() % 16 == out.data_ptr() % 16 == 0
    width = 4 if is_aligned and count >= _MANY else 1

    def blocks(slices: int) -> int:
        return math.ceil(count // width * slices / _THREADS)

    slices = 1
    while slices < 32 and slices * _TERMS < terms and blocks(2 * slices) <= _MOST_BLOCKS:
        slices *= 2
    return _Sum(x.data_ptr(), out.data_ptr(), count, terms, slices, blocks(slices), width)
