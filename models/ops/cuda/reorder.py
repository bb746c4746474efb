"""The two orders in which a map is scanned: to them and back, with the launches of reorder.cu.

Source 0 is rows first, source 1 columns first, each over the whole map or inside windows.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from models.ops.cuda import library

_SIDE = 32  # of a tile of pixels
_THREADS = 256
_DEEPEST = 4  # rows of a block
_ENOUGH_BLOCKS = 528  # four for each multiprocessor of a large GPU


class _Arguments(ctypes.Structure):
    """The struct Reorder of reorder.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("in_", "out", "table")),
        *((name, ctypes.c_longlong) for name in (
            "in_source_stride", "in_batch_stride", "in_walk_stride", "in_part_stride",
            "out_source_stride", "out_batch_stride", "out_walk_stride",
        )),
        *((name, ctypes.c_int) for name in (
            "height", "width", "rows", "walks", "batch", "sources", "first_source",
            "tiles", "parts", "depth", "blocks",
        )),
    ]  # fmt: skip


class _Pair(ctypes.Structure):
    """The struct Reorders of reorder.cu."""

    _fields_ = [("one", _Arguments), ("other", _Arguments)]


class Move(NamedTuple):
    """A tensor to be permuted: its rows are maps, or sequences of steps."""

    x: Tensor
    out: Tensor


def to_orders(
    moves: Sequence[Move], hw: tuple[int, int], table: Tensor | None, *, first_source: int = 0
) -> None:
    """Fill each out (sources from `first_source` on, batch, walks, C, L) from maps x of its shape.

    One move or two, in one launch. The strides of x may be 0. table: the pixel of each step of both
    orders (2, L) in windows; None: the whole map.
    """
    tasks = [_task(x[None], out, hw[::-1], table, first_source) for x, out in moves]
    _permute("permute", tasks, [out for _, out in moves])


def from_orders(moves: Sequence[Move], hw: tuple[int, int], table: Tensor | None) -> None:
    """Fill maps out (2, batch, walks, C, L) with sums over the parts of x, in both orders.

    One move or two, in one launch. x: (parts, 2, batch, walks, C, L). table: the step of each pixel
    of both orders, or None.
    """
    tasks = [_task(x, out, hw, table, 0) for x, out in moves]
    _permute("permute_sums", tasks, [out for _, out in moves])


def merge_orders(
    x: Tensor, out: Tensor, hw: tuple[int, int], table: Tensor | None, *, adds: bool = False
) -> None:
    """Fill maps out (batch, C, L) with sums over x (2, batch, 2 walks, C, L), in both orders.

    adds: to what is in `out`.
    """
    _, batch, _, rows, _ = x.shape
    task = _Arguments(
        in_=x.data_ptr(),
        out=out.data_ptr(),
        in_source_stride=x.stride(0),
        in_batch_stride=x.stride(1),
        in_walk_stride=x.stride(2),
        out_batch_stride=out.stride(0),
    )
    # a whole map's tiles are merged one by one
    _cut(task, (1, batch, 1, rows), hw, table, deepest=1 if table is None else _DEEPEST)
    if task.blocks:
        name = "merge_onto" if adds else "merge"
        library.launch("reorder.cu", _types(out), name, task.blocks, _THREADS, 0, task, out)


def _task(
    x: Tensor, out: Tensor, hw: tuple[int, int], table: Tensor | None, first_source: int
) -> _Arguments:
    part_stride, *in_strides = x.stride()
    out_strides = out.stride()
    # the kernel counts sources from 0, out and x begin with the first that is asked for
    task = _Arguments(
        in_=x.data_ptr() - first_source * in_strides[0] * x.element_size(),
        out=out.data_ptr() - first_source * out_strides[0] * out.element_size(),
        in_part_stride=part_stride,
        in_source_stride=in_strides[0],
        in_batch_stride=in_strides[1],
        in_walk_stride=in_strides[2],
        out_source_stride=out_strides[0],
        out_batch_stride=out_strides[1],
        out_walk_stride=out_strides[2],
        first_source=first_source,
        parts=x.shape[0],
    )
    _cut(task, out.shape[:4], hw, table, deepest=_DEEPEST)
    return task


def _cut(
    task: _Arguments,
    counts: tuple[int, int, int, int],
    hw: tuple[int, int],
    table: Tensor | None,
    *,
    deepest: int,
) -> None:
    """Into blocks, each of a tile of `deepest` rows at most."""
    task.sources, task.batch, task.walks, task.rows = counts
    task.height, task.width = hw
    task.table = None if table is None else table.data_ptr()
    task.tiles = math.prod(math.ceil(side / _SIDE) for side in hw)
    tiles = task.tiles * math.prod(counts)
    if tiles:
        task.depth = min(max(tiles // _ENOUGH_BLOCKS, 1), deepest)
        task.blocks = tiles // task.rows * math.ceil(task.rows / task.depth)


def _permute(name: str, tasks: Sequence[_Arguments], outs: Sequence[Tensor]) -> None:
    blocks = sum(task.blocks for task in tasks)
    if blocks:
        library.launch(
            "reorder.cu", _types(*outs), name, blocks, _THREADS, 0, _Pair(*tasks), outs[0]
        )


def _types(out: Tensor, other: Tensor | None = None) -> tuple[str, ...]:
    types = (f"TOKENS={library.TYPES[out.dtype]}",)
    if other is None or other.dtype == out.dtype:
        return types
    return *types, f"OTHERS={library.TYPES[other.dtype]}"
