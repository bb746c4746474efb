"""The 3x3 convolution with repeated borders: the reference, and the Triton kernels against it."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.replicate_conv import replicate_conv
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

# ||out - truth|| / ||truth||: float32 arithmetic; outputs rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (B, C, H, W), channels out: one pixel, one row or column, odd sizes, more than a tile of channels
SMALL = [
    ((1, 3, 1, 1), 2),
    ((2, 2, 1, 7), 1),
    ((1, 2, 6, 1), 3),
    ((3, 5, 5, 7), 4),
    ((2, 19, 4, 9), 5),
    ((1, 4, 2, 3), 17),
]
LARGE = [
    ((2, 134, 60, 80), 16),
    ((3, 32, 37, 53), 16),
    ((1, 16, 480, 640), 16),
    ((2, 40, 9, 5), 32),
]


def make_inputs(shape, out_channels, dtype=torch.float32, device="cpu", has_bias=True):
    generator = torch.Generator().manual_seed(sum(shape) + out_channels)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(out_channels, shape[1], 3, 3, generator=generator)
    bias = torch.randn(out_channels, generator=generator).to(device) if has_bias else None
    return [x.to(device, dtype), weight.to(device), bias]


def run(inputs, backend):
    """Output and gradients of a fixed random weighting of it, which bfloat16 holds exactly."""
    arguments = [None if x is None else x.detach().requires_grad_() for x in inputs]
    leaves = [x for x in arguments if x is not None]
    y = replicate_conv(*arguments, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def assert_same(inputs, tolerance):
    expected = run([None if x is None else x.double() for x in inputs], "reference")
    torch.use_deterministic_algorithms(True)  # so that torch.empty is filled with NaN
    try:
        ours = run(inputs, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    names = ("y", "x", "weight", "bias")[: len(ours)]
    for name, result, goal in zip(names, ours, expected, strict=True):
        assert result.isfinite().all(), name
        error = (result.double() - goal).norm() / goal.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_reference_is_the_definition():
    x, weight, bias = make_inputs((2, 3, 4, 5), 2)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, C, H, W, 3, 3)
    expected = torch.einsum("bchwij,ocij->bohw", patches, weight) + bias[:, None, None]
    torch.testing.assert_close(replicate_conv(x, weight, bias), expected)


def test_wrong_arguments_are_named():
    x, weight, bias = make_inputs((2, 3, 4, 5), 2)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5\), \(2, 2, 3, 3\) and \(2,\)"):
        replicate_conv(x, weight[:, :2], bias)
    with pytest.raises(ValueError, match=r"and \(1,\)"):
        replicate_conv(x, weight, bias[:1])
    with pytest.raises(ValueError, match="unknown replicate_conv backend 'cudnn'"):
        replicate_conv(x, weight, bias, backend="cudnn")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        replicate_conv(*make_inputs((1, 2, 3, 4), 2), backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture
def exact():
    """No TF32, as in the tests' truth."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@interpreted
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("shape", "out_channels"), SMALL, ids=str)
def test_interpreted_equals_reference(shape, out_channels, has_bias):
    assert_same(make_inputs(shape, out_channels, has_bias=has_bias), TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_inputs((2, 5, 3, 7), 3, dtype), TOLERANCE[dtype])


@interpreted
def test_interpreted_autocast_gives_its_dtype():
    x, weight, bias = make_inputs((1, 4, 3, 3), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = replicate_conv(x, weight, bias, backend="triton")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), replicate_conv(x, weight, bias), rtol=0.05, atol=0.05)


@interpreted
def test_interpreted_channels_last_input_and_empty_batch():
    x, weight, bias = make_inputs((2, 6, 3, 4), 3)
    assert_same([x.contiguous(memory_format=torch.channels_last), weight, bias], 1e-5)
    assert run([x[:0], weight, bias], "triton")[2].eq(0).all()


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.replicate_conv import triton as module

    x, weight, bias = (t.requires_grad_() for t in make_inputs((2, 4, 3, 2), 3))
    torch.library.opcheck(module._forward, (x, weight, bias))
    grad_y = torch.randn(2, 3, 3, 2)
    torch.library.opcheck(module._backward, (grad_y, x.detach(), weight.detach()))


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.usefixtures("exact")
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(("shape", "out_channels"), LARGE, ids=str)
    def test_equals_reference(self, shape, out_channels, dtype):
        assert_same(make_inputs(shape, out_channels, dtype, "cuda"), TOLERANCE[dtype])

    def test_tf32(self):
        torch.backends.cudnn.allow_tf32 = True
        assert_same(make_inputs((2, 134, 60, 80), 16, device="cuda"), 2e-3)

    def test_the_same_twice(self):
        inputs = make_inputs((2, 134, 60, 80), 16, device="cuda")
        assert all(map(torch.equal, run(inputs, "triton"), run(inputs, "triton")))
