"""The selective scan on GPU: Triton kernels as custom operators with a backward of their own.

Forward, parallel over chunks of the sequence: what each chunk hands on, a carry over the chunks,
then the outputs; with enough channels one kernel that walks along each row. Saved for the backward
are the arguments and one state per chunk; states inside are computed again. Deterministic.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops.layout import contiguous
from models.ops.selective_scan.gradients import register_gradients
from models.ops.selective_scan.kernels import (
    _carry_kernel,
    _chunk_ends_kernel,
    _gradient_kernel,
    _output_kernel,
)
from models.ops.triton_support import INTERPRETED, check_tensor, on_device


class _Shape(NamedTuple):
    """How a kernel cuts its work: channels, lanes and tokens per lane of one program."""

    rows: int
    lanes: int
    steps: int
    warps: int
    registers: int | None = None  # of a thread, at most: fewer let more programs run at a time

    def options(self) -> dict[str, int]:
        """Launch arguments."""
        limit = {"maxnreg": self.registers} if self.registers and torch.version.cuda else {}
        sizes = {"ROWS": self.rows, "LANES": self.lanes, "STEPS": self.steps}
        return {**sizes, "num_warps": self.warps, **limit}


class _Tuning(NamedTuple):
    """Shapes of the kernels; all but `stream_single` cover one chunk of lanes x steps tokens."""

    ends: _Shape
    output: _Shape
    gradient: _Shape
    stream: _Shape
    stream_programs: int  # walk along the rows if there are this many programs at least
    stream_single: _Shape  # for one state a channel, where all but memory is cheap
    stream_single_programs: int
    gradient_programs: int  # share a group's channels among programs until there are so many


_GPU = _Tuning(
    ends=_Shape(2, 32, 8, 1),
    output=_Shape(2, 32, 8, 1, registers=128),
    gradient=_Shape(8, 32, 8, 4),
    stream=_Shape(2, 32, 8, 1, registers=128),
    stream_programs=1536,
    stream_single=_Shape(1, 128, 8, 4),
    stream_single_programs=264,
    gradient_programs=2112,
)
# The interpreter runs the same code on a CPU for tests: small tiles, all paths.
_INTERPRETER = _Tuning(
    ends=_Shape(2, 8, 4, 1),
    output=_Shape(2, 8, 4, 1),
    gradient=_Shape(2, 8, 4, 2),
    stream=_Shape(2, 8, 4, 1),
    stream_programs=2,
    stream_single=_Shape(1, 16, 4, 1),
    stream_single_programs=4,
    gradient_programs=8,
)
_tuning = _INTERPRETER if INTERPRETED else _GPU


def selective_scan_triton(
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
        RuntimeError: tensors that are not on a GPU, or float64 u.
    """
    check_tensor("scan backend 'triton'", u, for_float64="chunked")
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)[0]


@torch.library.custom_op("cmfs::selective_scan", mutates_args=())
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
    """y (batch, D, L) and the states at the borders of chunks (batch, max(chunks - 1, 1), D, N)."""
    u, delta, A, B, C, D, delta_bias = contiguous(u, delta, A, B, C, D, delta_bias)
    sizes = _sizes(u, A, B)
    y = torch.empty_like(u)
    states = _empty_states(u, sizes)
    if y.numel() == 0:
        return y, states
    shape, enough = _tuning.stream, _tuning.stream_programs
    if sizes.states == 1:
        shape, enough = _tuning.stream_single, _tuning.stream_single_programs
    blocks = triton.cdiv(sizes.channels // sizes.groups, shape.rows)
    programs = blocks * sizes.groups * sizes.batch
    stream = programs >= enough
    with on_device(u):
        if not stream:
            _enter_chunks(sizes, delta, delta_bias, u, B, A, states, delta_softplus, reverse=False)
            shape = _tuning.output
            blocks = triton.cdiv(sizes.channels // sizes.groups, shape.rows)
            programs = blocks * sizes.groups * sizes.batch * sizes.chunks
        _output_kernel[(programs,)](
            u,
            delta,
            delta_bias,
            A,
            B,
            C,
            D,
            y,
            states,
            sizes.length,
            sizes.channels,
            sizes.groups,
            sizes.states,
            sizes.chunks,
            blocks,
            STREAM=stream,
            SOFTPLUS=delta_softplus,
            CHUNK=_chunk(),
            **shape.options(),
        )
    return y, states


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, _empty_states(u, _sizes(u, A, B))


@torch.library.custom_op("cmfs::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias; of absent ones an unused vector."""
    grad_y = grad_y.contiguous()
    u, delta, A, B, C, D, delta_bias = contiguous(u, delta, A, B, C, D, delta_bias)
    sizes = _sizes(u, A, B)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    shape = _tuning.gradient
    blocks = triton.cdiv(sizes.channels // sizes.groups, shape.rows)
    programs = max(1, sizes.batch * sizes.groups * sizes.chunks)
    splits = min(blocks, triton.cdiv(_tuning.gradient_programs, programs))
    grad_matrices = u.new_empty((splits, 2, *B.shape), dtype=torch.float32)
    grad_rows = u.new_empty(
        (sizes.batch, sizes.chunks, sizes.channels, sizes.states + 2), dtype=torch.float32
    )
    if u.numel() > 0:
        with on_device(u):
            gradients = torch.empty_like(states)
            _enter_chunks(
                sizes, delta, delta_bias, grad_y, C, A, gradients, delta_softplus, reverse=True
            )
            _gradient_kernel[(programs * splits,)](
                grad_y,
                u,
                delta,
                delta_bias,
                A,
                B,
                C,
                D,
                states,
                gradients,
                grad_u,
                grad_delta,
                grad_matrices,
                grad_rows,
                sizes.length,
                sizes.channels,
                sizes.groups,
                sizes.states,
                sizes.chunks,
                blocks,
                splits,
                sizes.batch,
                SOFTPLUS=delta_softplus,
                WARPS=shape.warps,
                **shape.options(),
            )
    grad_B, grad_C = (parts.sum(0).to(B.dtype) for parts in grad_matrices.unbind(1))
    rows = grad_rows.sum((0, 1))
    return (
        grad_u,
        grad_delta,
        rows[:, :-2].to(A.dtype, copy=True),
        grad_B,
        grad_C,
        rows[:, -2].to(A.dtype if D is None else D.dtype, copy=True),
        rows[:, -1].to(A.dtype if delta_bias is None else delta_bias.dtype, copy=True),
    )


@_backward.register_fake
def _(grad_y, u, delta, A, B, C, D, delta_bias, states, delta_softplus):
    whole = torch.contiguous_format
    vector = A.new_empty(A.shape[:1])
    return (
        torch.empty_like(u, memory_format=whole),
        torch.empty_like(delta, memory_format=whole),
        torch.empty_like(A, memory_format=whole),
        torch.empty_like(B, memory_format=whole),
        torch.empty_like(C, memory_format=whole),
        torch.empty_like(vector if D is None else D, memory_format=whole),
        torch.empty_like(vector if delta_bias is None else delta_bias, memory_format=whole),
    )


register_gradients(_forward, _backward)


class _Sizes(NamedTuple):
    batch: int
    channels: int
    length: int
    groups: int
    states: int
    chunks: int


def _sizes(u: Tensor, A: Tensor, B: Tensor) -> _Sizes:
    batch, channels, length = u.shape
    chunks = (length + _chunk() - 1) // _chunk()
    return _Sizes(batch, channels, length, B.shape[1], A.shape[1], chunks)


def _chunk() -> int:
    """Tokens from one kept state to the next."""
    return _tuning.output.lanes * _tuning.output.steps


def _empty_states(u: Tensor, sizes: _Sizes) -> Tensor:
    """States between chunks; of a single chunk one of zeros, which kernels read and drop."""
    shape = (sizes.batch, max(sizes.chunks - 1, 1), sizes.channels, sizes.states)
    make = u.new_empty if sizes.chunks > 1 else u.new_zeros
    return make(shape, dtype=torch.float32)


def _enter_chunks(
    sizes: _Sizes,
    delta: Tensor,
    delta_bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    states: Tensor,
    delta_softplus: bool,
    *,
    reverse: bool,
) -> None:
    """Fill `states` with what crosses the borders of chunks."""
    if sizes.chunks == 1:
        return
    shape = _tuning.ends
    blocks = triton.cdiv(sizes.channels // sizes.groups, shape.rows)
    spans = states.new_empty(sizes.batch, sizes.chunks, sizes.channels)
    ends = states.new_empty(*spans.shape, sizes.states)
    _chunk_ends_kernel[(blocks * sizes.chunks * sizes.groups * sizes.batch,)](
        delta,
        delta_bias,
        x,
        weight,
        A,
        ends,
        spans,
        sizes.length,
        sizes.channels,
        sizes.groups,
        sizes.states,
        sizes.chunks,
        blocks,
        SOFTPLUS=delta_softplus,
        REVERSE=reverse,
        **shape.options(),
    )
    _carry(ends, spans, A, states, sizes.chunks, reversed_sets=int(reverse))


def _carry(
    ends: Tensor, spans: Tensor, A: Tensor, states: Tensor, chunks: int, reversed_sets: int
) -> None:
    """Fill states (sets ·) batch, chunks - 1, D, N from what each chunk hands on if zero enters it.

    ends (sets ·) batch, chunks, D, N; spans without N; A (sets ·) D, N. A set is walked from the
    last chunk if its bit is set.
    """
    channels, state_count = A.shape[-2:]
    sequences = ends.numel() // (chunks * channels * state_count)
    sets = A.numel() // (channels * state_count)
    width, depth = (32, 4) if INTERPRETED else (64, 16)
    _carry_kernel[(triton.cdiv(channels * state_count, width), sequences)](
        ends,
        spans,
        A,
        states,
        channels,
        state_count,
        chunks,
        sequences // sets,
        reversed_sets,
        WIDTH=width,
        DEPTH=depth,
        num_warps=2,
    )
