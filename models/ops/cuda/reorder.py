"""The two orders in which a map is scanned: to them and back, with the launches of reorder.cu.

Source 0 is rows first, source 1 columns first, each over the whole map or inside windows.
"""

import ctypes
import math

from torch import Tensor

from models.ops.cuda import library

_SIDE = 32  # of a tile of pixels
_ENOUGH_BLOCKS = 2112  # sixteen for each multiprocessor of a large GPU


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
            "tiles", "parts", "depth",
        )),
    ]  # fmt: skip


def to_orders(
    x: Tensor, out: Tensor, hw: tuple[int, int], table: Tensor | None, *, first_source: int = 0
) -> None:
    """Fill out (sources from `first_source` on, batch, walks, C, L) from maps x of the same shape.

    The strides of x may be 0. table: the pixel of each step of both orders (2, L) in windows; None:
    the whole map.
    """
    _permute(x[None], out, hw[::-1], table, first_source)


def from_orders(x: Tensor, out: Tensor, hw: tuple[int, int], table: Tensor | None) -> None:
    """Fill maps out (2, batch, walks, C, L) with sums over the parts of x, in both orders.

    x: (parts, 2, batch, walks, C, L). table: the step of each pixel of both orders, or None.
    """
    _permute(x, out, hw, table, 0)


def merge_orders(x: Tensor, out: Tensor, hw: tuple[int, int], table: Tensor | None) -> None:
    """Fill maps out (batch, C, L) with sums over x (2, batch, 2 walks, C, L), in both orders."""
    _, batch, _, rows, _ = x.shape
    arguments = _Arguments(
        in_=x.data_ptr(),
        out=out.data_ptr(),
        in_source_stride=x.stride(0),
        in_batch_stride=x.stride(1),
        in_walk_stride=x.stride(2),
        out_batch_stride=out.stride(0),
    )
    _launch("merge", arguments, out, (1, batch, 1, rows), hw, table)


def _permute(
    x: Tensor, out: Tensor, hw: tuple[int, int], table: Tensor | None, first_source: int
) -> None:
    part_stride, *in_strides = x.stride()
    out_strides = out.stride()
    # the kernel counts sources from 0, out and x begin with the first that is asked for
    arguments = _Arguments(
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
    _launch("permute", arguments, out, out.shape[:4], hw, table)


def _launch(
    name: str,
    arguments: _Arguments,
    out: Tensor,
    counts: tuple[int, int, int, int],
    hw: tuple[int, int],
    table: Tensor | None,
) -> None:
    arguments.sources, arguments.batch, arguments.walks, arguments.rows = counts
    arguments.height, arguments.width = hw
    arguments.table = None if table is None else table.data_ptr()
    arguments.tiles = math.prod(math.ceil(side / _SIDE) for side in hw)
    tiles = arguments.tiles * math.prod(counts)
    if tiles:
        # a whole map's tiles are merged one by one
        is_single = name == "merge" and table is None
        arguments.depth = 1 if is_single else min(max(tiles // _ENOUGH_BLOCKS, 1), 8)
        blocks = tiles // arguments.rows * math.ceil(arguments.rows / arguments.depth)
        definitions = (f"TOKENS={library.TYPES[out.dtype]}",)
        library.launch("reorder.cu", definitions, name, blocks, 256, 0, arguments, out)
