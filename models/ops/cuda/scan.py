"""Both scans on CUDA: which block does what, and the launches of scan_single.cu and scan_many.cu.

Tensors come as views by what varies: "source", the sequences that are scanned (groups of a
selective scan, the two orders of a map), "walk", the ways in which each is (a map: two), image,
channel and token. Group = walk · sources + source.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.cuda import library

# Blocks take new channels in further passes while there are as many: for each multiprocessor of a
# large GPU some eleven in a forward and four, which leave fewer sums to add, in a backward. Of few
# states blocks are small, of half the warps: to read B and C for fewer channels costs little then.
_ENOUGH_BLOCKS = {"forward": 1500, "backward": 528}
_ENOUGH_SMALL_BLOCKS = {"forward": 3000, "backward": 1500}
_FEW_STATES = 8
_BESIDE = 1280  # bytes of shared memory that a block takes beside what it asks for, at most
_SMALL_RANK = 12  # of dt_low: it takes little shared memory, and little time


class Scan(NamedTuple):
    """What is scanned.

    u: of each source (batch, D, L); equally far apart in memory, and of equal strides.
    delta: (sources, batch, walks, D, L), or None where dt = weight · low.
    low: (sources, batch, walks, R, L), or None.
    B, C: (sources, batch, walks, N, L), of one dtype with low.
    A: (groups, D, N), log(-A) if has_logs.
    D, bias: (groups, D) or None; weight: (groups, D, R) or None; they and A in float32.
    """

    u: tuple[Tensor, ...]
    delta: Tensor | None
    low: Tensor | None
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    softplus: bool
    has_logs: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, batch, channels, length."""
        return self.A.shape[0], *self.u[0].shape

    @property
    def states(self) -> int:
        return self.A.shape[2]

    @property
    def rank(self) -> int:
        return 0 if self.low is None else self.low.shape[3]


class _Arguments(ctypes.Structure):
    """The struct Scan of scan.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "u", "delta", "low", "B", "C", "A", "D", "bias", "weight", "y", "borders", "ticket",
            "grad_y", "grad_borders", "grad_u", "grad_delta", "grad_matrices", "grad_rows",
        )),
        *((name, ctypes.c_longlong) for name in (
            "source_stride", "grad_source_stride", "batch_stride",
            "own_source_stride", "own_batch_stride", "own_walk_stride",
            "matrix_source_stride", "matrix_batch_stride", "matrix_walk_stride",
            "part_stride", "part_kind_stride",
            "part_source_stride", "part_batch_stride", "part_walk_stride",
        )),
        *((name, ctypes.c_int) for name in (
            "batch", "groups", "sources", "length", "chunks", "softplus", "has_logs", "zero",
        )),
    ]  # fmt: skip


class _Layout(NamedTuple):
    """How a kernel cuts its work; the names are scan.cuh's."""

    single: int
    segment: int
    steps: int
    rows: int
    token_warps: int
    row_warps: int
    blocks: int
    passes: int

    @property
    def chunk(self) -> int:
        """Tokens of a block: from one kept state to the next."""
        return self.token_warps * self.segment * self.steps

    @property
    def warp_rows(self) -> int:
        """Channels of a warp."""
        return self.rows * 32 // self.segment

    @property
    def block_rows(self) -> int:
        """Channels of a block at a time."""
        return self.warp_rows * self.row_warps

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.token_warps * self.row_warps


_WARP_TOKENS = 256  # in every layout


def _token_warps(length: int, states: int) -> int:
    # long sequences of one state are limited by memory alone: few borders, many tokens a block
    return 4 if states == 1 and length > 2048 else 1


def _layout(name: str, scan: Scan) -> _Layout:
    """What was fastest; a forward and its backward have the same chunks."""
    enough = _ENOUGH_BLOCKS[name]
    if scan.states == 1:
        token_warps = _token_warps(scan.sizes[-1], 1)
        blocks, passes = (6, 8) if name == "forward" else (4, 16)
        layout = _Layout(1, 32, 8, 1, token_warps, 4 // token_warps, blocks, passes)
        return _with_enough_blocks(name, scan, layout, enough)
    is_one_stage = scan.states <= _plan(scan).stage
    passes = 4 if is_one_stage else 1  # a backward's sums over channels hold one stage
    if name == "forward":
        layout = _Layout(0, 16, 16, 1, 1, 8, 2, passes)
    else:
        layout = _Layout(0, 32, 8, 2, 1, _plan(scan).row_warps, 1, passes)
    if is_one_stage and scan.states <= _FEW_STATES:
        # while one begins or ends, the others of its multiprocessor are at work
        small = layout._replace(
            row_warps=layout.row_warps // 2, blocks=2 * layout.blocks, passes=2 * passes
        )
        small = _with_enough_blocks(name, scan, small, _ENOUGH_SMALL_BLOCKS[name])
        can_copy = library.copies_to_shared(scan.A.device)
        room, size = _share_out(name, scan, small, can_copy=can_copy)
        if room.prefetch == can_copy and _has_room(scan, size, small.blocks):
            return small
    return _with_enough_blocks(name, scan, layout, enough)


def _with_enough_blocks(name: str, scan: Scan, layout: _Layout, enough: int) -> _Layout:
    while layout.passes > 1 and _has_too_many_passes(name, scan, layout, enough):
        layout = layout._replace(passes=layout.passes // 2)
    return layout


def _has_too_many_passes(name: str, scan: Scan, layout: _Layout, enough: int) -> bool:
    if _count_blocks(scan, layout) < enough:
        return True
    if not (layout.single and scan.rank):
        return False
    # dt of all passes is made at once
    can_copy = library.copies_to_shared(scan.A.device)
    _, size = _share_out(name, scan, layout, can_copy=can_copy)
    return not _has_room(scan, size, layout.blocks)


def _cut(scan: Scan, layout: _Layout) -> tuple[int, int]:
    """Chunks of a sequence, and blocks that share the channels of a chunk."""
    _, _, channels, length = scan.sizes
    blocks = math.ceil(channels / (layout.block_rows * layout.passes))
    return math.ceil(length / layout.chunk), blocks


def _count_blocks(scan: Scan, layout: _Layout) -> int:
    groups, batch, *_ = scan.sizes
    return groups * batch * math.prod(_cut(scan, layout))


class _Plan(NamedTuple):
    """What fits into shared memory."""

    stage: int  # states of B and C at a time
    row_warps: int  # of a backward of many states


def _plan(scan: Scan) -> _Plan:
    available = library.shared_bytes(scan.A.device)
    if available >= 200_000:
        return _Plan(16, 12)
    return _Plan(8, 8) if available >= 98_000 else _Plan(4, 4)


def count_borders(batch: int, groups: int, channels: int, length: int, states: int) -> int:
    """Numbers that a forward leaves for the backward: states between chunks, and a counter."""
    chunks = math.ceil(length / (_WARP_TOKENS * _token_warps(length, states)))
    return batch * groups * max(chunks - 1, 0) * states * channels + 1


def scan_forward(scan: Scan, y: Tensor) -> Tensor:
    """Fill y (sources, batch, walks, D, L); return the states between chunks, flat."""
    groups, batch, channels, length = scan.sizes
    count = count_borders(batch, groups, channels, length, scan.states)
    borders = _not_yet(count, scan.A)
    if y.numel():
        layout = _layout("forward", scan)
        arguments = _arguments(scan, layout, y, borders)
        arguments.y = y.data_ptr()
        arguments.ticket = borders[-1:].data_ptr()
        _launch("forward", scan, layout, arguments, (y,))
    return borders


def scan_backward(
    scan: Scan,
    borders: Tensor,
    grad_y: tuple[Tensor, ...],
    grad_u: Tensor,
    grad_delta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill the gradients of u and of delta (of weight · low, where dt is made of these).

    Args:
        borders: what scan_forward returned.
        grad_y: of each source (batch, D, L), laid out like u: all walks of a source share it.
        grad_u, grad_delta: (sources, batch, walks, D, L), of the same strides.
    Returns:
        Float32 gradients of B and C (parts, sources, batch, walks, 2, N, L), and of what A holds, D
        and the bias (parts, groups, D, N + 2), both to be summed over their parts.
    """
    groups, batch, channels, length = scan.sizes
    states = scan.states
    *by_walk, _, _ = scan.B.shape
    if not grad_u.numel():
        return (scan.A.new_zeros(1, *by_walk, 2, states, length),
                scan.A.new_zeros(1, groups, channels, states + 2))  # fmt: skip
    grad_borders = _not_yet(borders.numel(), scan.A)
    layout = _layout("backward", scan)
    arguments = _arguments(scan, layout, grad_u, borders)
    chunks, blocks = _cut(scan, layout)
    parts = scan.A.new_empty(blocks, *by_walk, 2, states, length)
    spans = batch * chunks * layout.token_warps
    rows = scan.A.new_empty(spans, groups, channels, states + 2)
    arguments.grad_y = grad_y[0].data_ptr()
    arguments.grad_source_stride = _distance(grad_y)
    arguments.grad_borders = grad_borders.data_ptr()
    arguments.ticket = grad_borders[-1:].data_ptr()
    arguments.grad_u, arguments.grad_delta = grad_u.data_ptr(), grad_delta.data_ptr()
    arguments.grad_matrices, arguments.grad_rows = parts.data_ptr(), rows.data_ptr()
    (arguments.part_stride, arguments.part_source_stride, arguments.part_batch_stride,
     arguments.part_walk_stride, arguments.part_kind_stride) = parts.stride()[:5]  # fmt: skip
    _launch("backward", scan, layout, arguments, (*grad_y, grad_u, grad_delta, parts))
    return parts, rows


class _Clear(ctypes.Structure):
    """The struct Clear of clear.cu."""

    _fields_ = [("words", ctypes.c_void_p), ("count", ctypes.c_longlong)]


_CLEARED = 1024  # words of a block of clear.cu


def _not_yet(count: int, like: Tensor) -> Tensor:
    """Words that cannot be read yet (NOT_YET in numbers.cuh), the last of them the counter."""
    words = torch.empty(count, dtype=torch.float32, device=like.device)
    task = _Clear(words=words.data_ptr(), count=count)
    blocks = math.ceil(count / _CLEARED)
    library.launch("clear.cu", (), "clear", blocks, 256, 0, task, words)
    return words


def _arguments(scan: Scan, layout: _Layout, own: Tensor, borders: Tensor) -> _Arguments:
    """All that the forward and the backward share; `own` has the strides of y, or of gradients."""
    groups, batch, _, length = scan.sizes
    chunks, _ = _cut(scan, layout)
    pointers = {
        name: 0 if x is None else x.data_ptr()
        for name, x in scan._asdict().items()
        if name not in ("u", "softplus", "has_logs")
    }
    own_source_stride, own_batch_stride, own_walk_stride = own.stride()[:3]
    matrix_source_stride, matrix_batch_stride, matrix_walk_stride = scan.B.stride()[:3]
    return _Arguments(
        **pointers,
        u=scan.u[0].data_ptr(),
        borders=borders.data_ptr(),
        source_stride=_distance(scan.u),
        batch_stride=scan.u[0].stride(0),
        own_source_stride=own_source_stride,
        own_batch_stride=own_batch_stride,
        own_walk_stride=own_walk_stride,
        matrix_source_stride=matrix_source_stride,
        matrix_batch_stride=matrix_batch_stride,
        matrix_walk_stride=matrix_walk_stride,
        batch=batch,
        groups=groups,
        sources=len(scan.u),
        length=length,
        chunks=chunks,
        softplus=scan.softplus,
        has_logs=scan.has_logs,
    )


def _has_room(scan: Scan, size: int, blocks: int) -> bool:
    """Whether so many blocks of a multiprocessor can have so much shared memory each."""
    available = library.shared_bytes(scan.A.device)
    return blocks * size + (blocks - 1) * _BESIDE <= available


class _Room(NamedTuple):
    """What is in a block's shared memory; the names are scan.cuh's."""

    together: int
    near: int
    scalars_ahead: int
    prefetch: int


def _share_out(name: str, scan: Scan, layout: _Layout, *, can_copy: bool) -> tuple[_Room, int]:
    """What has room in shared memory, what is most needed first; and the bytes of all that."""
    is_backward = name == "backward"
    is_forward_of_many = not layout.single and not is_backward
    stage, passes = _plan(scan).stage, layout.passes
    arrays = 1 + 2 * is_backward + (scan.delta is not None)
    copied = arrays * layout.rows * layout.steps * layout.threads * scan.u[0].itemsize
    lines = 0
    if layout.single:
        tile_rows = passes * layout.block_rows if scan.rank else 0
        tile_rows += 2 * (is_backward and layout.row_warps > 1)
    else:
        tile_rows = min(scan.rank, 2 * stage) + 2 * min(scan.states, stage) * (1 + is_backward)
        lines = is_backward * layout.row_warps * layout.rows * 2 * 8 * 36  # LINES of a block
    scalars = 4 * layout.block_rows * (3 if layout.single else 2 + stage)  # of a pass
    weights = 4 * passes * layout.block_rows * (scan.rank | 1)

    size = 4 * (layout.chunk * tile_rows + lines)
    prefetch = can_copy and _has_room(scan, size + copied + min(passes, 2) * scalars, 1)
    size += prefetch * copied
    if layout.single:
        together = passes if scan.rank else 1
        room = _Room(together, near=0, scalars_ahead=1, prefetch=int(prefetch))
        return room, size + passes * scalars

    def has_room(size: int) -> bool:
        return _has_room(scan, size, layout.blocks)

    scalars_ahead = passes <= 2 or has_room(size + passes * scalars)
    size += (passes if scalars_ahead else 2) * scalars
    together = min(passes, 2) if is_forward_of_many and scan.rank else 1
    waiting = 4 * layout.chunk * layout.block_rows  # dt of a pass
    if together == 2 and not has_room(size + waiting):
        together = 1
    size += (together - 1) * waiting
    # of few weights a lane's own reads are as fast
    near = is_forward_of_many and scan.rank > _SMALL_RANK and has_room(size + weights)
    size += near * weights
    return _Room(together, int(near), int(scalars_ahead), int(prefetch)), size


def _launch(
    name: str,
    scan: Scan,
    layout: _Layout,
    arguments: _Arguments,
    others: tuple[Tensor, ...],
) -> None:
    tensors = [*scan.u, scan.delta, scan.low, scan.B, scan.C, *others]
    is_aligned = arguments.length % 4 == 0 and all(
        x.data_ptr() % (4 * x.element_size()) == 0 for x in tensors if x is not None
    )
    can_copy = is_aligned and library.copies_to_shared(scan.A.device)
    room, size = _share_out(name, scan, layout, can_copy=can_copy)
    chosen = {**layout._asdict(), **room._asdict()}
    is_single = chosen.pop("single")
    definitions = {
        "BACKWARD": int(name == "backward"),
        "TOKENS": library.TYPES[scan.u[0].dtype],
        "MATRIX": library.TYPES[scan.B.dtype],
        "CHANNELS": scan.sizes[2],
        "STATES": scan.states,
        "RANK": scan.rank,
        **{name.upper(): value for name, value in chosen.items()},
        "STAGE": _plan(scan).stage,
        "REVERSIBLE": int(arguments.groups > arguments.sources),
        "ALIGNED": int(is_aligned),
    }
    library.launch(
        "scan_single.cu" if is_single else "scan_many.cu",
        tuple(f"{macro}={value}" for macro, value in definitions.items()),
        name,
        _count_blocks(scan, layout),
        layout.threads,
        size,
        arguments,
        scan.A,
    )


def _distance(sources: tuple[Tensor, ...]) -> int:
    """Elements from the first token of a source to that of the next."""
    first, second = sources[0], sources[min(1, len(sources) - 1)]
    return (second.data_ptr() - first.data_ptr()) // first.element_size()
