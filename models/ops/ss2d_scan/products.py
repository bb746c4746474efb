"""Products in the backward of linear maps along the channels, as Triton kernels.

The gradient of a map's weight sums over all tokens: cut into parts of these, or few programs would
run, and each leaves its part to be added up. Everywhere `sequences` are up to three dimensions
(outer, middle, inner) which may lie in memory as they like.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.ops.triton_support import INTERPRETED, on_device

_SIZES = ["rows", "columns", "middle", "inner", "tiles", "rounds"]


@triton.jit
def _sequence(x, sequence, outer_stride, middle_stride, inner_stride, middle, inner):
    """Where a sequence of x begins; sequences are (outer, middle, inner)."""
    x += (sequence // inner // middle).to(tl.int64) * outer_stride
    x += (sequence // inner % middle).to(tl.int64) * middle_stride
    return x + (sequence % inner).to(tl.int64) * inner_stride


@triton.jit(do_not_specialize=_SIZES)
def _long_product_kernel(
    gradient,
    x,
    parts,
    length,
    rows,
    columns,
    outer_stride,
    middle_stride,
    inner_stride,
    middle,
    inner,
    tiles,
    rounds,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """parts[s, q] = gradient[q] · x[q]ᵀ over the s-th `rounds` · TOKENS tokens of sequence q.

    gradient (sequences, rows, L); x (sequences, columns, L), where sequences lie as the strides
    say; parts (splits, sequences, rows, columns). The sum over tokens is long and its result small:
    without the cut few programs would run.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    row = (tile // tiles) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    gradient += (sequence * rows + row[:, None]).to(tl.int64) * length
    x = _sequence(x, sequence, outer_stride, middle_stride, inner_stride, middle, inner)
    x += column[:, None].to(tl.int64) * length
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(rounds):
        token = ((split * rounds + step) * TOKENS + tl.arange(0, TOKENS))[None, :]
        g = tl.load(gradient + token, mask=(row < rows)[:, None] & (token < length), other=0.0)
        v = tl.load(x + token, mask=(column < columns)[:, None] & (token < length), other=0.0)
        v = tl.trans(v.to(tl.float32))
        total = tl.dot(g.to(tl.float32), v, total, input_precision=PRECISION)
    out = (split * tl.num_programs(2) + sequence) * rows + row
    is_inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(parts + out[:, None].to(tl.int64) * columns + column[None, :], total, mask=is_inside)


@triton.jit(do_not_specialize=_SIZES)
def _linear_gradients_kernel(
    gradient,
    x,
    weight,
    of_x,
    of_weight,
    length,
    rows,
    columns,
    outer_stride,
    middle_stride,
    inner_stride,
    weight_outer_stride,
    weight_middle_stride,
    weight_inner_stride,
    middle,
    inner,
    tiles,
    rounds,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of x and weight, from that of weight[q] · x[q], which is read once.

    of_x[t, q] = weight[q]ᵀ · gradient[q] over the t-th tile of ROWS rows; of_weight[s, q] as in
    _long_product_kernel. weight (sequences, rows, columns).
    """
    tile = tl.program_id(0) // tiles
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    gradient += (sequence * rows + row[:, None]).to(tl.int64) * length
    x = _sequence(x, sequence, outer_stride, middle_stride, inner_stride, middle, inner)
    x += column[:, None].to(tl.int64) * length
    weight = _sequence(
        weight,
        sequence,
        weight_outer_stride,
        weight_middle_stride,
        weight_inner_stride,
        middle,
        inner,
    )
    is_inside = (row < rows)[None, :] & (column < columns)[:, None]
    w = tl.load(weight + row[None, :] * columns + column[:, None], mask=is_inside, other=0.0)
    w = w.to(tl.float32)
    out = (tile * tl.num_programs(2) + sequence) * columns + column
    of_x += out[:, None].to(tl.int64) * length
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(rounds):
        token = ((split * rounds + step) * TOKENS + tl.arange(0, TOKENS))[None, :]
        is_column = (column < columns)[:, None] & (token < length)
        g = tl.load(gradient + token, mask=(row < rows)[:, None] & (token < length), other=0.0)
        g = g.to(tl.float32)
        v = tl.load(x + token, mask=is_column, other=0.0).to(tl.float32)
        total = tl.dot(g, tl.trans(v), total, input_precision=PRECISION)
        tl.store(of_x + token, tl.dot(w, g, input_precision=PRECISION), mask=is_column)
    out = (split * tl.num_programs(2) + sequence) * rows + row
    of_weight += out[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(of_weight, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


class _Shape(NamedTuple):
    """How a product is cut."""

    rows: int
    columns: int
    tokens: int
    programs: int  # cut the tokens into parts until there are so many


class _Cut(NamedTuple):
    """Into how many pieces: of rows, of columns, of tokens; and rounds of each of the last."""

    tiles: int
    column_tiles: int
    splits: int
    rounds: int


def _cut(shape: _Shape, gradient: Tensor, columns: int) -> _Cut:
    *sequences, rows, length = gradient.shape
    tiles, column_tiles = triton.cdiv(rows, shape.rows), triton.cdiv(columns, shape.columns)
    programs = tiles * column_tiles * math.prod(sequences)
    rounds_of_all = triton.cdiv(length, shape.tokens)
    wanted = triton.cdiv(shape.programs, max(1, programs))
    rounds = max(1, triton.cdiv(rounds_of_all, wanted))
    return _Cut(tiles, column_tiles, triton.cdiv(rounds_of_all, rounds), rounds)


# The interpreter runs the same code on a CPU for tests: small tiles, all paths.
_PRODUCT = _Shape(16, 16, 16, 8) if INTERPRETED else _Shape(64, 128, 32, 264)


def _shape_of_gradients(rows: int, columns: int, precision: str) -> _Shape:
    if INTERPRETED:
        return _Shape(16, 16, 16, 8)
    # the gradient is read again for each tile of columns; each tile of rows leaves a part of x's
    columns = min(max(16, triton.next_power_of_2(columns)), 128)
    is_large = rows >= 256 and columns <= 32 and precision == "tf32"  # and fits into 99 KB
    return _Shape(128 if is_large else 64, columns, 64 if columns <= 64 else 32, 1056)


def long_product(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient · xᵀ in float32, (parts, ..., rows, columns), to be summed over parts of the tokens.

    gradient: (..., rows, L), contiguous. x: (..., columns, L), whose rows lie one after the other.
    """
    columns = x.shape[-2]
    cut = _cut(_PRODUCT, gradient, columns)
    parts = gradient.new_empty((cut.splits, *gradient.shape[:-1], columns), dtype=torch.float32)
    if parts.numel():
        _launch(_long_product_kernel, _PRODUCT, cut, gradient, (x,), (parts,))
    return parts


def linear_gradients(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of weight in float32, from that of weight · x, read once.

    gradient: (..., rows, L), contiguous. x: (..., columns, L), whose rows lie one after the other,
    as do those of weight (..., rows, columns).

    Returns (parts, ..., columns, L) and (parts, ..., rows, columns), each to be summed over its
    parts: of the rows, and of the tokens.
    """
    *sequences, rows, length = gradient.shape
    columns = x.shape[-2]
    shape = _shape_of_gradients(rows, columns, _precision(gradient.dtype))
    cut = _cut(shape, gradient, columns)
    of_x = gradient.new_empty((cut.tiles, *sequences, columns, length), dtype=torch.float32)
    of_weight = gradient.new_empty((cut.splits, *sequences, rows, columns), dtype=torch.float32)
    if of_weight.numel():
        factors = (x, weight)
        _launch(_linear_gradients_kernel, shape, cut, gradient, factors, (of_x, of_weight))
    return of_x, of_weight


def _launch(
    kernel: triton.JITFunction,
    shape: _Shape,
    cut: _Cut,
    gradient: Tensor,
    factors: tuple[Tensor, ...],
    outs: tuple[Tensor, ...],
) -> None:
    """With arguments in the order that both kernels have; sequences of factors lie anywhere."""
    *sequences, rows, length = gradient.shape
    strides = [stride for x in factors for stride in (0, 0, 0, *x.stride()[:-2])[-3:]]
    middle, inner = (1, 1, *sequences)[-2:]
    with on_device(gradient):
        kernel[(cut.tiles * cut.column_tiles, cut.splits, math.prod(sequences))](
            gradient,
            *factors,
            *outs,
            length,
            rows,
            outs[-1].shape[-1],
            *strides,
            middle,
            inner,
            cut.column_tiles,
            cut.rounds,
            shape.rows,
            shape.columns,
            shape.tokens,
            PRECISION=_precision(gradient.dtype),
        )


def _precision(dtype: torch.dtype) -> str:
    """Of a product's factors; those of half precision have no more bits than TF32."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
