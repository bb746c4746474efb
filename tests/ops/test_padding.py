"""Padding with the border's pixels, and its own gradient: the reference, and the Triton kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.padding import crop, dispatch, replicate_pad
from tests.ops.comparison import CalledOperators, assert_compiles, assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

SIDES = pytest.mark.parametrize(
    "sides", [(1, 1, 1, 1), (0, 3, 0, 2), (2, 0, 0, 0), (0, 0, 1, 4)], ids=str
)
# Several tiles of the interpreter, 2 maps x 16 pixels, and maps that are all border
SIZES = pytest.mark.parametrize("hw", [(5, 7), (1, 1), (1, 6)], ids=str)
# ||out - truth|| / ||truth|| of the gradient: sums in float32, rounded to 8 and 11 bits
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_map(*shape, dtype=torch.float32, device="cpu"):
    """A map; beside it in memory lies NaN, which must not be read."""
    batch, *rest = shape
    whole = torch.full((batch + 2, *rest), torch.nan, dtype=dtype)
    whole[1:-1] = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return whole.to(device)[1:-1]


def run(x, sides, backend):
    """Output and gradient of a fixed weighting of it, which bfloat16 holds exactly."""
    x = x.detach().requires_grad_()
    y = replicate_pad(x, *sides, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return y.detach(), torch.autograd.grad(y, x, weight)[0]


def assert_same(x, sides):
    expected, expected_gradient = run(x.double(), sides, "reference")
    with poisoned_empty():
        y, gradient = run(x, sides, "triton")
    assert (y.dtype, gradient.dtype) == (x.dtype, x.dtype)
    assert torch.equal(y.double(), expected)
    assert_near("gradient", gradient, expected_gradient, TOLERANCE[x.dtype])


@SIDES
@SIZES
def test_reference_equals_the_built_in_one(hw, sides):
    x = make_map(2, 3, *hw).double().requires_grad_()
    expected = F.pad(x, sides, mode="replicate")
    weight = torch.randn(expected.shape, dtype=torch.float64)
    padded = replicate_pad(x, *sides)
    assert torch.equal(padded, expected)
    (gradient,) = torch.autograd.grad(padded, x, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, weight)[0])


def test_nothing_to_add_costs_nothing():
    x = torch.randn(1, 2, 3, 4)
    assert replicate_pad(x, 0, 0, 0, 0) is x


def test_wrong_arguments_are_named():
    x = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(1, 1, 1, 1\)"):
        replicate_pad(x[0], 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"got \(1, 2, 0, 4\) and \(1, 1, 1, 1\)"):
        replicate_pad(x[:, :, :0], 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"got \(1, 2, 3, 4\) and \(0, 0, -1, 0\)"):
        replicate_pad(x, 0, 0, -1, 0)
    with pytest.raises(ValueError, match="unknown replicate_pad backend 'cudnn'"):
        replicate_pad(x, 1, 1, 1, 1, backend="cudnn")


def test_crop_is_the_top_left_and_a_whole_map_itself():
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(crop(x, (4, 6)), x[:, :, :4, :6])
    assert crop(x, (5, 7)) is x


@pytest.mark.parametrize(
    ("sides", "is_few"), [((0, 3, 0, 3), True), ((0, 7, 0, 7), False)], ids=str
)
def test_many_copies_are_the_reference_s(sides, is_few, monkeypatch):
    """Of a corner: the gradient's kernel, written out for each, would take seconds to compile."""
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    with FakeTensorMode(), CalledOperators() as called:
        replicate_pad(torch.empty(1, 2, 5, 6, device="cuda"), *sides)
    assert ("cmfs.replicate_pad.default" in called.names) == is_few


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        replicate_pad(torch.ones(1, 2, 3, 4), 1, 1, 1, 1, backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@SIDES
@SIZES
def test_interpreted_equals_reference(hw, sides):
    assert_same(make_map(3, 1, *hw), sides)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_map(1, 3, 4, 5, dtype=dtype), (1, 1, 1, 1))


@interpreted
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_interpreted_other_layouts(layout):
    x = make_map(2, 6, 3, 4)
    x = x[:, 1:5] if layout == "slice" else x.contiguous(memory_format=torch.channels_last)
    assert_same(x, (1, 1, 1, 1))


@interpreted
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=str)
def test_interpreted_empty(sizes):
    x = torch.ones(*sizes, 2, 2, requires_grad=True)
    y = replicate_pad(x, 0, 1, 2, 0, backend="triton")
    assert y.shape == (*sizes, 4, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.padding import triton as module

    torch.library.opcheck(module._forward, (make_map(2, 3, 3, 4).requires_grad_(), 1, 0, 2, 1))
    torch.library.opcheck(module._backward, (make_map(2, 3, 6, 5), 1, 0, 2, 1))


@interpreted
def test_interpreted_compiles():
    x = make_map(2, 3, 3, 4).requires_grad_()

    def call(x):
        return replicate_pad(2 * x, 1, 1, 1, 1, backend="triton")

    assert_compiles(call, x)


class TestOnGPU:
    pytestmark = on_gpu

    @SIDES
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", [(1, 38, 480, 640), (3, 33, 17, 23)], ids=str)
    def test_equals_reference(self, shape, dtype, sides):
        assert_same(make_map(*shape, dtype=dtype, device="cuda"), sides)

    def test_beyond_32_bit_offsets(self):
        x = torch.zeros(1, 2**13 + 1, 512, 512, device="cuda", dtype=torch.bfloat16)
        x[:, -1] = 1
        y = replicate_pad(x, 1, 1, 1, 1)
        assert (y[0, -1] == 1).all() and not y[0, -2].any()
