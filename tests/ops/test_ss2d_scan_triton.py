"""The Triton four-direction scan against the pixel-by-pixel one: outputs and all gradients."""

import pytest
import torch

from models.ops.ss2d_scan import ss2d_scan
from tests.ops.interpreter import (
    INTERPRETED,
    OLD_TRITON,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

pytestmark = with_triton

# ||out - truth|| / ||truth||: float32 arithmetic; outputs, dt_low, B, C rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# (batch, D, N, R, (H, W)); the interpreter's chunk has 16 tokens, and 6 blocks of channels and
# images or more are walked along the rows. Only the kernels that bring a map into its orders know
# which it is.
SMALL = [
    ((1, 1, 1, 1, (1, 1)), "window"),
    ((1, 3, 2, 1, (5, 7)), "window"),
    ((2, 3, 1, 2, (4, 8)), "cross"),
    ((1, 7, 2, 3, (3, 6)), "cross"),
]
LARGE = [
    (1, 1, 1, 1, (1, 1)),
    (3, 5, 2, 3, (2, 3)),
    (1, 96, 1, 6, (31, 33)),
    (2, 96, 8, 6, (16, 32)),
    (1, 5, 64, 1, (23, 9)),
    (1, 400, 2, 24, (15, 20)),
    (4, 384, 1, 24, (30, 40)),
    (1, 96, 1, 6, (120, 160)),
]


def make_inputs(batch, channels, states, rank, hw, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(batch + channels + states + rank)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(batch, channels, *hw).to(dtype),
        "x_proj_weight": (normal(4, rank + 2 * states, channels) / channels**0.5).to(dtype),
        "dt_projs_weight": normal(4, channels, rank).float(),
        "dt_projs_bias": normal(4, channels).float() - 1,
        "A_logs": 0.5 * normal(4 * channels, states).float(),
        "Ds": normal(4 * channels).float(),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def run(inputs, **options):
    """Output and gradients of a fixed weighting of it."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = ss2d_scan(**leaves, **options)
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), weight)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_same(inputs, tolerance, scan, truth="reference"):
    expected = run({k: v.double() for k, v in inputs.items()}, scan=scan, backend=truth)
    torch.use_deterministic_algorithms(True)  # so that torch.empty is filled with NaN
    try:
        ours = run(inputs, scan=scan, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, goal in expected.items():
        assert ours[name].isfinite().all(), name
        error = (ours[name].double() - goal).norm() / goal.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def extreme_inputs(sizes, device="cpu"):
    """dt from 5e-5 to 100 and A from -0.01 to -100."""
    inputs = make_inputs(*sizes, device=device)
    generator = torch.Generator().manual_seed(0)
    bias = torch.rand(inputs["dt_projs_bias"].shape, generator=generator)
    inputs["dt_projs_bias"] = (110 * bias - 10).to(device)
    rate = torch.rand(inputs["A_logs"].shape, generator=generator)
    inputs["A_logs"] = (9.2 * rate - 4.6).to(device)
    return inputs


@pytest.mark.skipif(OLD_TRITON, reason="the interpreter of Triton < 3.3 joins wrongly")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("sizes", "scan"), SMALL, ids=str)
def test_interpreted_equals_reference(sizes, scan):
    assert_same(make_inputs(*sizes), TOLERANCE[torch.float32], scan)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_inputs(1, 2, 1, 1, (4, 5), dtype), TOLERANCE[dtype], "cross")


@interpreted
def test_interpreted_extreme_decays():
    assert_same(extreme_inputs((1, 3, 2, 1, (4, 5))), TOLERANCE[torch.float32], "cross")


@interpreted
def test_interpreted_non_contiguous():
    inputs = make_inputs(2, 2, 1, 2, (3, 5))
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in inputs.items()}
    assert not strided["x"].is_contiguous()
    assert_same(strided, TOLERANCE[torch.float32], "window")


@interpreted
def test_interpreted_empty_batch():
    inputs = make_inputs(0, 2, 1, 2, (3, 5))
    results = run(inputs, backend="triton")
    assert results["y"].shape == inputs["x"].shape
    assert all((results[name] == 0).all() for name in inputs)


SEQUENCES = pytest.mark.parametrize("sequences", [(), (2,), (2, 3), (2, 3, 2)], ids=str)


def apart(*shape):
    """Sequences of which every other one is left out in memory."""
    *sequences, rows, length = shape
    whole = torch.randn(*(2 * n for n in sequences), rows, length)
    return whole[(slice(None, None, 2),) * len(sequences)]


@interpreted
@SEQUENCES
def test_interpreted_long_product(sequences):
    """Sequences of x may lie anywhere."""
    from models.ops.ss2d_scan.products import long_product

    gradient = torch.randn(*sequences, 3, 40)
    x = apart(*sequences, 5, 40)[..., :2, :]
    product = long_product(gradient, x).sum(0)
    assert torch.allclose(product, gradient @ x.mT, atol=1e-4)


@interpreted
@SEQUENCES
@pytest.mark.parametrize(("rows", "columns"), [(3, 2), (20, 18)], ids=["one tile", "tiles"])
def test_interpreted_linear_gradients(sequences, rows, columns):
    """Sequences of x and of the weight may lie anywhere; some share a weight."""
    from models.ops.ss2d_scan.products import linear_gradients

    gradient = torch.randn(*sequences, rows, 40)
    x = apart(*sequences, columns + 1, 40)[..., :columns, :]
    weight = apart(*sequences, rows, columns)
    weight = weight[:1].expand_as(weight) if sequences else weight
    of_x, of_weight = linear_gradients(gradient, x, weight)
    assert torch.allclose(of_x.sum(0), weight.mT @ gradient, atol=1e-4)
    assert torch.allclose(of_weight.sum(0), gradient @ x.mT, atol=1e-4)


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.ss2d_scan import triton as module

    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    torch.library.opcheck(module._to_orders, (x, "window", 2))
    ordered = torch.randn(2, 1, 2, 12, requires_grad=True)
    torch.library.opcheck(module._from_orders, (ordered, 3, 4, "window", 2))
    weight = torch.randn(2, 3, 2, requires_grad=True)
    torch.library.opcheck(module._project, (ordered, weight))
    gradient = torch.randn(2, 1, 3, 12)
    torch.library.opcheck(module._project_weight_gradient, (gradient, ordered.detach()))
    shapes = ((2, 1, 2, 6), (2, 1, 2, 3, 6), (4, 2, 1), (4, 2), (4, 2, 1), (4, 2))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    torch.library.opcheck(module._forward, tuple(inputs))
    y, states = module._forward(*inputs)
    torch.library.opcheck(module._backward, tuple(t.detach() for t in (y, *inputs, states)))


@interpreted
def test_interpreted_compiles_without_graph_break():
    inputs = make_inputs(1, 2, 1, 1, (3, 4))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    compiled = torch.compile(ss2d_scan, fullgraph=True, backend="aot_eager")
    ours, eager = (scan(**leaves, backend="triton") for scan in (compiled, ss2d_scan))
    assert torch.equal(ours, eager)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(leaves.values())) for y in (ours, eager)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        ss2d_scan(**make_inputs(1, 2, 1, 1, (3, 4)), backend="triton")


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("scan", ["cross", "window"])
    @pytest.mark.parametrize("sizes", LARGE, ids=str)
    def test_equals_reference(self, sizes, scan, dtype):
        inputs = make_inputs(*sizes, dtype, device="cuda")
        assert_same(inputs, TOLERANCE[dtype], scan, truth="chunked")

    @pytest.mark.parametrize("sizes", [(1, 5, 8, 3, (25, 40)), (2, 400, 1, 6, (30, 40))], ids=str)
    def test_extreme_decays(self, sizes):
        inputs = extreme_inputs(sizes, "cuda")
        assert_same(inputs, TOLERANCE[torch.float32], "cross", truth="chunked")

    def test_the_same_twice(self):
        inputs = make_inputs(2, 96, 4, 6, (60, 80), device="cuda")
        first, second = run(inputs, backend="triton"), run(inputs, backend="triton")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_in_a_cuda_graph(self):
        inputs = make_inputs(1, 96, 1, 6, (40, 60), device="cuda")
        expected = ss2d_scan(**inputs, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = ss2d_scan(**inputs, backend="triton")
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)

    def test_autocast_keeps_the_state_in_float32(self):
        inputs = make_inputs(1, 96, 4, 6, (40, 60), device="cuda")
        truth = ss2d_scan(**{k: v.double() for k, v in inputs.items()}, backend="chunked")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = ss2d_scan(**inputs, backend="triton")
        assert (y.double() - truth).norm() / truth.norm() < TOLERANCE[torch.bfloat16]
