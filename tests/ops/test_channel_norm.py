"""Layer normalisation over channels: the reference, and the Triton kernels against it."""

import pytest
import torch

from models.ops.channel_norm import channel_norm
from tests.ops.comparison import assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

EPS = 1e-5
# ||out - truth|| / ||truth||: float32 arithmetic; outputs rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (B, C, H, W): one pixel, odd sizes, several tiles of the interpreter's 64 values
SMALL = [(1, 7, 1, 1), (1, 5, 3, 7), (3, 8, 5, 5), (2, 33, 2, 9)]
LARGE = [(1, 96, 120, 160), (3, 192, 17, 23), (2, 384, 30, 40), (4, 768, 15, 20), (1, 2048, 9, 7)]


def make_inputs(shape, dtype=torch.float32, device="cpu", has_bias=True):
    """x with a mean far from 0, weight and bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 + torch.randn(shape, generator=generator)
    weight, bias = 1 + torch.randn(2, shape[1], generator=generator)
    return [x.to(device, dtype), weight.to(device), bias.to(device) if has_bias else None]


def run(inputs, backend):
    """Output and gradients of a fixed weighting of it, which bfloat16 holds exactly.

    It is random: were its sum over the pixels near zero, the bias's gradient would be all rounding.
    """
    arguments = [None if x is None else x.detach().requires_grad_() for x in inputs]
    leaves = [x for x in arguments if x is not None]
    y = channel_norm(*arguments, EPS, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def assert_same(inputs, tolerance):
    expected = run([None if x is None else x.double() for x in inputs], "reference")
    with poisoned_empty():
        ours = run(inputs, "triton")
    names = ("y", "x", "weight", "bias")[: len(ours)]
    for name, result, goal in zip(names, ours, expected, strict=True):
        assert_near(name, result, goal, tolerance)


def test_reference_is_the_definition():
    x, weight, bias = (t.double() for t in make_inputs((2, 5, 3, 4)))
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    expected = (x - mean) / torch.sqrt(variance + EPS) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(channel_norm(x, weight, bias, EPS), expected)
    size = x.square().mean(1, keepdim=True)
    expected = x / torch.sqrt(size + EPS) * weight.view(-1, 1, 1)
    torch.testing.assert_close(channel_norm(x, weight, None, EPS), expected)


def assert_autocast(backend):
    """In its dtype, rounded from float32 once; float32 where a residual stream begins."""
    x, weight, bias = make_inputs((1, 4, 2, 3))
    exact = channel_norm(x, weight, bias, EPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = channel_norm(x, weight, bias, EPS, backend=backend)
        wide = channel_norm(x.bfloat16(), weight, bias, EPS, is_wide=True, backend=backend)
        double = channel_norm(x.double(), weight.double(), bias.double(), EPS)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=0)
    torch.testing.assert_close(wide, channel_norm(x.bfloat16().float(), weight, bias, EPS))
    assert double.dtype == torch.float64


def test_autocast():
    assert_autocast("reference")


def test_wrong_arguments_are_named():
    x, weight, bias = make_inputs((2, 5, 3, 4))
    with pytest.raises(ValueError, match=r"got \(2, 5, 3, 4\) and \(4,\), \(5,\)"):
        channel_norm(x, weight[:4], bias, EPS)
    with pytest.raises(ValueError, match=r"got \(2, 5, 3, 4\) and \(4,\)"):
        channel_norm(x, weight[:4], None, EPS)
    with pytest.raises(ValueError, match="unknown channel_norm backend 'cudnn'"):
        channel_norm(x, weight, bias, EPS, backend="cudnn")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        channel_norm(*make_inputs((1, 2, 3, 4)), EPS, backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("has_bias", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_interpreted_equals_reference(shape, has_bias):
    assert_same(make_inputs(shape, has_bias=has_bias), TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("has_bias", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype, has_bias):
    assert_same(make_inputs((2, 5, 3, 7), dtype, has_bias=has_bias), TOLERANCE[dtype])


@interpreted
def test_interpreted_channels_last_input():
    x, weight, bias = make_inputs((2, 6, 3, 4))
    assert_same([x.contiguous(memory_format=torch.channels_last), weight, bias], 1e-5)


@interpreted
def test_interpreted_empty_batch():
    assert channel_norm(*make_inputs((0, 3, 2, 2)), EPS, backend="triton").shape == (0, 3, 2, 2)


@interpreted
def test_interpreted_autocast():
    assert_autocast("triton")


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.channel_norm import triton as module

    x, weight, bias = (t.requires_grad_() for t in make_inputs((2, 4, 3, 2)))
    torch.library.opcheck(module._forward, (x, weight, bias, EPS, torch.float32))
    _, *kept = (t.detach() for t in module._forward(x, weight, bias, EPS, torch.float32))
    grad_y = torch.randn(x.shape)
    for is_centered in (True, False):
        inputs = (grad_y, x.detach(), weight.detach(), *kept, is_centered)
        torch.library.opcheck(module._backward, inputs)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("has_bias", [True, False], ids=["layer", "rms"])
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_equals_reference(self, shape, dtype, has_bias):
        assert_same(make_inputs(shape, dtype, "cuda", has_bias), TOLERANCE[dtype])

    def test_auto_keeps_channels_first(self):
        y = channel_norm(*make_inputs((2, 96, 30, 40), device="cuda"), EPS)
        assert y.is_contiguous()

    def test_the_same_twice(self):
        inputs = make_inputs((2, 96, 60, 80), device="cuda")
        assert all(map(torch.equal, run(inputs, "triton"), run(inputs, "triton")))
