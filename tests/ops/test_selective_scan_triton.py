"""The Triton selective scan against the float64 loop: outputs and all gradients."""

import pytest
import torch

from models.ops.selective_scan.chunked import selective_scan_chunked
from models.ops.selective_scan.reference import selective_scan_reference
from tests.ops.interpreter import (
    INTERPRETED,
    OLD_TRITON,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

pytestmark = with_triton

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
# ||out - truth|| / ||truth||: float32 arithmetic; outputs rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (batch, D, N, L, K); the interpreter's chunk has 32 tokens, its longer tile 64.
SMALL = [
    (1, 1, 1, 1, 1),
    (1, 4, 2, 2, 2),
    (1, 5, 1, 63, 1),
    (2, 2, 2, 64, 1),
    (1, 3, 4, 65, 1),
    (1, 4, 1, 65, 4),
    (1, 2, 16, 33, 1),
    (1, 10, 1, 3, 2),
]
LARGE = [
    (3, 5, 1, 1, 1),
    (2, 96, 8, 2, 1),
    (2, 96, 1, 63, 4),
    (1, 5, 64, 64, 1),
    (2, 96, 2, 65, 2),
    (1, 96, 16, 1000, 1),
    (2, 96, 1, 1000, 4),
    (1, 1, 2, 19201, 1),
    (1, 5, 16, 19201, 1),
    (1, 96, 8, 19201, 4),
    (2, 384, 1, 19200, 4),
    (1, 96, 64, 4800, 1),
]


def make_inputs(batch, channels, states, length, groups, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(batch + channels + states + length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(batch, channels, length),
        normal(batch, channels, length) - 1,
        -torch.exp(0.5 * normal(channels, states)),
        normal(batch, groups, states, length),
        normal(batch, groups, states, length),
        normal(channels),
        0.1 * normal(channels),
    )
    dtypes = (dtype, dtype, torch.float32, dtype, dtype, torch.float32, torch.float32)
    return [x.to(device, d) for x, d in zip(inputs, dtypes, strict=True)]


def run(scan, inputs, softplus=True):
    """Output and gradients of a fixed weighting of it."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = scan(*leaves, softplus)
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y)
    given = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, given, weight)]


def assert_same(inputs, tolerance, softplus=True, truth=selective_scan_reference):
    from models.ops.selective_scan.triton import selective_scan_triton

    expected = run(truth, [None if x is None else x.double() for x in inputs], softplus)
    torch.use_deterministic_algorithms(True)  # so that torch.empty is filled with NaN
    try:
        ours = run(selective_scan_triton, inputs, softplus)
    finally:
        torch.use_deterministic_algorithms(False)
    names = ["y"] + [name for name, x in zip(NAMES, inputs, strict=True) if x is not None]
    for name, result, goal in zip(names, ours, expected, strict=True):
        assert result.isfinite().all(), name
        error = (result.double() - goal).norm() / goal.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def extreme_inputs(batch, channels, states, length, groups, device="cpu"):
    """dt·A from -1e-6 to -100 without softplus."""
    inputs = make_inputs(batch, channels, states, length, groups, device=device)
    generator = torch.Generator().manual_seed(0)
    exponent = 4 * torch.rand(batch, channels, length, generator=generator)
    inputs[1] = (1e-4 * 10**exponent).to(device)
    rate = -(10 ** (4 * torch.rand(channels, states, generator=generator) - 2))
    inputs[2] = rate.to(device)
    inputs[6] = None
    return inputs


@pytest.mark.skipif(OLD_TRITON, reason="the interpreter of Triton < 3.3 joins wrongly")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_interpreted_equals_reference(sizes):
    assert_same(make_inputs(*sizes), TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_inputs(1, 2, 2, 40, 1, dtype), TOLERANCE[dtype])


@interpreted
def test_interpreted_extreme_decays():
    assert_same(extreme_inputs(1, 3, 2, 65, 1), TOLERANCE[torch.float32], softplus=False)


@interpreted
def test_interpreted_without_skip_and_bias():
    inputs = make_inputs(1, 2, 2, 40, 1)
    assert_same([*inputs[:5], None, None], TOLERANCE[torch.float32])


@interpreted
def test_interpreted_non_contiguous():
    inputs = make_inputs(2, 2, 2, 10, 1)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    assert not strided[0].is_contiguous()
    assert_same(strided, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 1), (1, 2, 2, 0, 1)], ids=str)
def test_interpreted_empty(sizes):
    from models.ops.selective_scan.triton import selective_scan_triton

    inputs = make_inputs(*sizes)
    results = run(selective_scan_triton, inputs)
    assert [x.shape for x in results] == [inputs[0].shape, *(x.shape for x in inputs)]
    assert all((x == 0).all() for x in results)


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.selective_scan import triton as module

    inputs = [x.requires_grad_() for x in make_inputs(1, 2, 1, 5, 1)]
    torch.library.opcheck(module._forward, (*inputs, True))
    y, states = module._forward(*inputs, True)
    tensors = [x.detach() for x in (y, *inputs, states)]
    torch.library.opcheck(module._backward, (*tensors, True))


@interpreted
def test_interpreted_compiles_without_graph_break():
    from models.ops.selective_scan.triton import selective_scan_triton

    inputs = make_inputs(1, 2, 1, 5, 1)
    compiled = torch.compile(selective_scan_triton, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, inputs), run(selective_scan_triton, inputs), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused():
    from models.ops.selective_scan.triton import selective_scan_triton

    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        selective_scan_triton(*make_inputs(1, 2, 1, 5, 1), True)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("sizes", LARGE, ids=str)
    def test_equals_reference(self, sizes, dtype):
        truth = selective_scan_reference if sizes[3] < 100 else selective_scan_chunked
        assert_same(make_inputs(*sizes, dtype, "cuda"), TOLERANCE[dtype], truth=truth)

    @pytest.mark.parametrize("sizes", [(1, 5, 8, 1000, 1), (4, 384, 1, 1000, 4)], ids=str)
    def test_extreme_decays(self, sizes):
        inputs = extreme_inputs(*sizes, device="cuda")
        assert_same(inputs, TOLERANCE[torch.float32], softplus=False, truth=selective_scan_chunked)

    def test_no_drift_over_a_million_tokens(self):
        inputs = make_inputs(1, 2, 2, 1_000_000, 1, device="cuda")
        inputs[2] *= 1e-4  # states that remember some ten thousand tokens
        assert_same(inputs, TOLERANCE[torch.float32], truth=selective_scan_chunked)

    def test_is_deterministic(self):
        from models.ops.selective_scan.triton import selective_scan_triton

        inputs = make_inputs(2, 96, 8, 1000, 1, device="cuda")
        first, second = (run(selective_scan_triton, inputs) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_compiles_under_autocast(self):
        from models.ops.selective_scan.triton import selective_scan_triton

        inputs = make_inputs(1, 32, 8, 300, 2, torch.bfloat16, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            compiled = torch.compile(selective_scan_triton, fullgraph=True)
            ours, eager = run(compiled, inputs), run(selective_scan_triton, inputs)
        for result, expected in zip(ours, eager, strict=True):
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)

    def test_replays_in_a_graph(self):
        from models.ops.selective_scan.triton import selective_scan_triton

        inputs = make_inputs(1, 32, 8, 300, 2, device="cuda")
        expected = run(selective_scan_triton, inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        weight = torch.sin(torch.arange(inputs[0].numel(), dtype=torch.float64, device="cuda"))
        weight = weight.view_as(inputs[0]).float()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = selective_scan_triton(*leaves, True)
            results = [y, *torch.autograd.grad(y, leaves, weight)]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
