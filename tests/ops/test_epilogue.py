"""What follows a convolution: the reference, and the Triton kernels against it."""

import itertools
import math

import pytest
import torch

from models.ops.epilogue import epilogue
from models.ops.epilogue.reference import result_dtype
from tests.ops.comparison import assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

# ||out - truth|| / ||truth||: float32 arithmetic; outputs rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# One pixel; odd sizes; sequences; the interpreter's small and large tiles, 2 x 8 and 1 x 16, more
# of them than its programs; vectors of four.
SMALL = [(1, 7, 1, 1), (3, 5, 3, 7), (2, 3, 17), (3, 7, 2, 4), (3, 2, 9, 5)]
LARGE = [(1, 96, 120, 160), (3, 192, 17, 23), (2, 384, 30, 40), (1, 3072, 15, 20), (2, 9, 480, 640)]
ACTIVATIONS = [None, "gelu", "relu", "silu"]
# Which of bias, factor and residual are given.
PARTS = list(itertools.product([False, True], repeat=3))
ALL = (True, True, True)


def make_inputs(shape, parts=ALL, dtype=torch.float32, device="cpu"):
    """x, and of bias, factor and residual what is given."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual = 2 * torch.randn(2, *shape, generator=generator)
    bias = torch.randn(shape[1], generator=generator)
    factor = torch.linspace(0, 1.5, shape[0]).view(-1, *(1 for _ in shape[1:]))  # one is dropped
    others = [
        tensor.to(device, kind) if is_given else None
        for tensor, kind, is_given in zip(
            (bias, factor, residual), (torch.float32, torch.float32, dtype), parts, strict=True
        )
    ]
    return [x.to(device, dtype), *others]


def run(inputs, activation, backend):
    """Output and gradients, by name, of a fixed weighting of it, which bfloat16 holds exactly.

    It is random: were its sum over the pixels near zero, the bias's gradient would be all rounding.
    """
    x, bias, factor, residual = inputs
    leaves = {"x": x, "bias": bias, "residual": residual}
    leaves = {k: t.detach().requires_grad_() for k, t in leaves.items() if t is not None}
    y = epilogue(
        leaves["x"],
        leaves.get("bias"),
        activation=activation,
        factor=factor,
        residual=leaves.get("residual"),
        backend=backend,
    )
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), weight)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_same(inputs, activation, tolerance):
    expected = run([None if t is None else t.double() for t in inputs], activation, "reference")
    with poisoned_empty():
        ours = run(inputs, activation, "triton")
    x, bias, _, residual = inputs
    dtypes = {"y": result_dtype(x, residual), "x": x.dtype}
    dtypes |= {k: t.dtype for k, t in (("bias", bias), ("residual", residual)) if t is not None}
    for name, dtype in dtypes.items():
        result, goal = ours[name], expected[name]
        assert result.dtype == dtype, name
        assert_near(name, result, goal, tolerance)


def definition(value, activation):
    """An activation of a float64 tensor, spelled out."""
    if activation == "gelu":
        return value * torch.special.erfc(-value / math.sqrt(2)) / 2
    if activation == "relu":
        return value.clamp_min(0)
    return value / (1 + torch.exp(-value)) if activation == "silu" else value


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 2, 7)], ids=str)
def test_reference_is_the_definition(shape, activation):
    x, bias, factor, residual = (t.double() for t in make_inputs(shape))
    ones = [1] * (len(shape) - 2)
    y = definition(x + bias.view(-1, *ones), activation)
    for scale in (factor, factor.flatten()):
        result = epilogue(x, bias, activation=activation, factor=scale, residual=residual)
        torch.testing.assert_close(result, residual + factor * y)
    torch.testing.assert_close(epilogue(x, None, activation=activation), definition(x, activation))
    torch.testing.assert_close(epilogue(x, bias, activation=activation), y)


def test_reference_rounds_once():
    """Half precision is computed in float32, and a wider residual makes the result as wide."""
    x, bias, _, residual = make_inputs((2, 5, 3, 4), dtype=torch.bfloat16)
    for shift, wide in itertools.product((bias, None), (residual, residual.float())):
        result = epilogue(x, shift, activation="gelu", residual=wide)
        exact = epilogue(x.float(), shift, activation="gelu", residual=residual.float())
        assert result.dtype == wide.dtype
        assert torch.equal(result, exact.to(wide.dtype))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 5)}, r"takes \(B, C, H, W\) or \(B, C, L\), got \(2, 5\)"),
        ({"bias": torch.ones(4)}, r"bias must be \(5,\) for x \(2, 5, 3, 4\), got \(4,\)"),
        (
            {"factor": torch.ones(2, 1)},
            r"factor must be \(2,\) or \(2, 1, 1, 1\) for x .*, got \(2, 1\)",
        ),
        ({"residual": torch.ones(1, 5, 3, 4)}, r"residual must be .*, got \(1, 5, 3, 4\)"),
        ({"factor": torch.ones(2, requires_grad=True)}, "factor takes no gradient"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; known: None, gelu, relu, silu"),
        ({"backend": "cudnn"}, "unknown epilogue backend 'cudnn'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(wrong, message):
    arguments = {"x": torch.ones(2, 5, 3, 4), "bias": torch.ones(5)} | wrong
    with pytest.raises(ValueError, match=message):
        epilogue(arguments.pop("x"), arguments.pop("bias"), **arguments)


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        epilogue(torch.ones(1, 2, 3, 4), torch.ones(2), backend="triton")


def test_nothing_that_follows_costs_nothing():
    x = torch.ones(1, 2, 3, 4)
    assert epilogue(x, None) is x


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interpreted_equals_reference(activation, parts):
    assert_same(make_inputs((3, 7, 2, 4), parts), activation, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_interpreted_shapes(shape, activation):
    assert_same(make_inputs(shape), activation, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("parts", [(True, False, False), ALL], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype, activation, parts):
    x, bias, *others = make_inputs((3, 5, 4, 8), parts, dtype)
    for shift in (bias, bias.to(dtype)):
        assert_same([x, shift, *others], activation, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_interpreted_wider_residual(activation, factor):
    inputs = make_inputs((3, 5, 3, 7), (True, factor, True), torch.bfloat16)
    inputs[3] = inputs[3].float()
    assert_same(inputs, activation, TOLERANCE[torch.bfloat16])
    y = run(inputs, activation, "triton")["y"]
    torch.testing.assert_close(y, run(inputs, activation, "reference")["y"])  # of float32's bits


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interpreted_large_values(activation):
    """Far from zero nothing overflows: slopes are 0 and 1."""
    x = torch.tensor([-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30]).view(1, 1, -1)
    ours, expected = (run([x, None, None, None], activation, b) for b in ("triton", "reference"))
    for name, goal in expected.items():
        torch.testing.assert_close(ours[name], goal)


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interpreted_nan_stays(activation):
    x = torch.tensor([1.0, float("nan"), -1.0]).view(1, 1, 3)
    y = epilogue(x, torch.zeros(1), activation=activation, backend="triton")
    assert y.isnan().flatten().tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize("hw", [(3, 5), (2, 8)], ids=str)
def test_interpreted_channel_slices_are_read_in_place(hw):
    from models.ops.epilogue import triton as module

    inputs = make_inputs((3, 5, *hw))
    for index in (0, 3):
        whole = torch.full((3, 9, *hw), float("nan"))
        whole[:, 2:7] = inputs[index]
        inputs[index] = whole[:, 2:7]
        rows, stride = module._with_rows(inputs[index])
        assert (rows.data_ptr(), stride) == (inputs[index].data_ptr(), whole.stride(0))
    for activation in (None, "gelu"):
        assert_same(inputs, activation, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("given", [0, 3])
def test_interpreted_images_at_odd_distances(given):
    """Rows of whole vectors, of which the next image's begin elsewhere."""
    inputs = make_inputs((3, 5, 8))
    whole = torch.cat([inputs[given].flatten(1), torch.full((3, 1), float("nan"))], dim=1)
    inputs[given] = whole[:, :-1].unflatten(1, (5, 8))
    assert_same(inputs, "gelu", TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_interpreted_gradient_of_a_slice(activation):
    """The gradient that comes out of a concatenation is a slice of a wider map."""
    x, bias, _, residual = make_inputs((3, 5, 2, 4))
    found = []
    for backend in ("reference", "triton"):
        leaves = [t.clone().requires_grad_() for t in (x, bias, residual)]
        y = epilogue(*leaves[:2], activation=activation, residual=leaves[2], backend=backend)
        torch.cat([x[:, :2], y, x], dim=1).square().sum().backward()
        flat = epilogue(*leaves[:2], activation=activation, backend=backend).flatten(1)
        torch.cat([flat, torch.ones(3, 1)], dim=1).square().sum().backward()
        found.append([t.grad for t in leaves])
    for result, goal in zip(*reversed(found), strict=True):
        torch.testing.assert_close(result, goal)


@interpreted
def test_interpreted_other_layouts_are_copied():
    """Channels last, a map with its sides exchanged, a vector of every second bias."""
    x, bias, factor, residual = make_inputs((3, 6, 4, 5))
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.mT.contiguous().mT
    spread = torch.stack([bias, torch.full_like(bias, float("nan"))], dim=1)
    for activation in (None, "gelu"):
        assert_same([x, spread[:, 0], factor, residual], activation, TOLERANCE[torch.float32])


@interpreted
def test_interpreted_expanded_gradient():
    x, bias, _, _ = make_inputs((2, 3, 4, 4))
    bias.requires_grad_()
    epilogue(x, bias, backend="triton").sum().backward()
    assert torch.equal(bias.grad, torch.full((3,), 32.0))


@interpreted
def test_interpreted_gradient_is_passed_on_and_nothing_kept():
    x, bias, _, residual = make_inputs((2, 3, 4, 5))
    leaves = [t.requires_grad_() for t in (x, bias, residual)]
    for activation, expected in ((None, []), ("gelu", [x, bias])):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            y = epilogue(x, bias, activation=activation, residual=residual, backend="triton")
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]
        grad_y = torch.randn(y.shape)
        grad_x, _, grad_residual = torch.autograd.grad(y, leaves, grad_y)
        assert (grad_x.data_ptr() == grad_y.data_ptr()) == (activation is None)
        assert grad_residual.data_ptr() == grad_y.data_ptr()


@interpreted
@pytest.mark.parametrize("wanted", ["x", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_interpreted_one_gradient_alone(activation, wanted):
    x, bias, factor, residual = make_inputs((2, 3, 4, 5))
    leaf = {"x": x, "bias": bias, "residual": residual}[wanted].requires_grad_()
    weight = torch.randn(x.shape)
    for scale in (None, factor):
        result, goal = (
            torch.autograd.grad(
                epilogue(x, bias, activation=activation, factor=scale, residual=residual,
                         backend=backend),
                leaf,
                weight,
            )[0]
            for backend in ("triton", "reference")
        )  # fmt: skip
        torch.testing.assert_close(result, goal)


@interpreted
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 3, 0, 4), (2, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_interpreted_empty(shape, activation):
    assert_same(make_inputs(shape), activation, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("parts", [(False, False, True), (True, False, False), ALL], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_interpreted_operators_are_well_registered(activation, parts):
    from models.ops.epilogue import triton as module

    inputs = make_inputs((2, 3, 4, 2), parts)
    x, bias, factor, residual = inputs
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, bias, residual)]
    torch.library.opcheck(module._forward, (*leaves[:2], activation, factor, leaves[2]))
    kept = (None, None) if activation is None else (x, bias)
    arguments = (*kept, activation, factor, torch.float32, bias is not None)
    torch.library.opcheck(module._backward, (torch.randn(x.shape), *arguments))


@interpreted
@pytest.mark.parametrize("parts", [(False, False, True), (True, False, False), ALL], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_interpreted_compiles(activation, parts):
    torch.compiler.reset()
    inputs = make_inputs((2, 3, 4, 5), parts)
    x, bias, factor, residual = inputs
    leaves = [t for t in (x, bias, residual) if t is not None]

    def call(x, bias, factor, residual):
        return epilogue(
            2 * x, bias, activation=activation, factor=factor, residual=residual, backend="triton"
        )

    for leaf in leaves:
        leaf.requires_grad_()
    weight = torch.randn(x.shape)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    result, goal = compiled(*inputs), call(*inputs)
    torch.testing.assert_close(result, goal)
    gradients = (torch.autograd.grad(y, leaves, weight) for y in (result, goal))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("parts", [(True, False, False), (True, False, True), ALL], ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_equals_reference(self, shape, dtype, activation, parts):
        assert_same(make_inputs(shape, parts, dtype, "cuda"), activation, TOLERANCE[dtype])

    def test_beyond_32_bit_offsets(self):
        x = torch.zeros(2, 2, 2**29 + 4, device="cuda", dtype=torch.bfloat16)
        x[1, 1, -1] = 1
        bias = torch.ones(2, device="cuda", requires_grad=True)
        y = epilogue(x, bias, activation="relu", backend="triton")
        assert y[1, 1, -1].item() == 2 and y[1, 1, -2].item() == 1
        weight = torch.zeros_like(y)
        weight[1, 1, -1] = 3
        assert torch.autograd.grad(y, bias, weight)[0].tolist() == [0, 3]

    def test_auto_replays_in_a_graph(self):
        inputs = make_inputs((2, 96, 30, 40), device="cuda")
        x, bias, factor, residual = inputs
        run(inputs, "gelu", "auto")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = epilogue(x, bias, activation="gelu", factor=factor, residual=residual)
        x.add_(1)
        graph.replay()
        expected = epilogue(
            x, bias, activation="gelu", factor=factor, residual=residual, backend="reference"
        )
        torch.testing.assert_close(y, expected)

    def test_the_same_twice(self):
        inputs = make_inputs((2, 96, 60, 80), device="cuda")
        first, second = (run(inputs, "gelu", "triton") for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
