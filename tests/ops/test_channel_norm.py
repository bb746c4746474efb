"""Layer normalisation over channels: the reference, and the Triton kernels against it."""

import pytest
import torch

from models.ops.channel_norm import channel_norm
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


def make_inputs(shape, dtype=torch.float32, device="cpu"):
    """x with a mean far from 0, weight and bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 + torch.randn(shape, generator=generator)
    weight, bias = 1 + torch.randn(2, shape[1], generator=generator)
    return [x.to(device, dtype), weight.to(device), bias.to(device)]


def run(inputs, backend):
    """Output and gradients of a fixed weighting of it, which bfloat16 holds exactly.

    It is random: were its sum over the pixels near zero, the bias's gradient would be all rounding.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = channel_norm(*leaves, EPS, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def assert_same(inputs, tolerance):
    expected = run([x.double() for x in inputs], "reference")
    torch.use_deterministic_algorithms(True)  # so that torch.empty is filled with NaN
    try:
        ours = run(inputs, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, result, goal in zip(("y", "x", "weight", "bias"), ours, expected, strict=True):
        assert result.isfinite().all(), name
        error = (result.double() - goal).norm() / goal.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_reference_is_the_definition():
    x, weight, bias = (t.double() for t in make_inputs((2, 5, 3, 4)))
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    expected = (x - mean) / torch.sqrt(variance + EPS) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    torch.testing.assert_close(channel_norm(x, weight, bias, EPS), expected)


def test_wrong_arguments_are_named():
    x, weight, bias = make_inputs((2, 5, 3, 4))
    with pytest.raises(ValueError, match=r"got \(2, 5, 3, 4\), \(4,\), \(5,\)"):
        channel_norm(x, weight[:4], bias, EPS)
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
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_interpreted_equals_reference(shape):
    assert_same(make_inputs(shape), TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_inputs((2, 5, 3, 7), dtype), TOLERANCE[dtype])


@interpreted
def test_interpreted_channels_last_input():
    x, weight, bias = make_inputs((2, 6, 3, 4))
    assert_same([x.contiguous(memory_format=torch.channels_last), weight, bias], 1e-5)


@interpreted
def test_interpreted_empty_batch():
    assert channel_norm(*make_inputs((0, 3, 2, 2)), EPS, backend="triton").shape == (0, 3, 2, 2)


@interpreted
def test_interpreted_autocast_gives_float32():
    x, weight, bias = make_inputs((1, 4, 2, 3), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = channel_norm(x, weight, bias, EPS, backend="triton")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, channel_norm(x.float(), weight, bias, EPS))


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.channel_norm import triton as module

    x, weight, bias = (t.requires_grad_() for t in make_inputs((2, 4, 3, 2)))
    torch.library.opcheck(module._forward, (x, weight, bias, EPS, torch.float32))
    _, *kept = (t.detach() for t in module._forward(x, weight, bias, EPS, torch.float32))
    grad_y = torch.randn(x.shape)
    torch.library.opcheck(module._backward, (grad_y, x.detach(), weight.detach(), *kept))


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", LARGE, ids=str)
    def test_equals_reference(self, shape, dtype):
        assert_same(make_inputs(shape, dtype, "cuda"), TOLERANCE[dtype])

    def test_auto_keeps_channels_first(self):
        y = channel_norm(*make_inputs((2, 96, 30, 40), device="cuda"), EPS)
        assert y.is_contiguous()

    def test_the_same_twice(self):
        inputs = make_inputs((2, 96, 60, 80), device="cuda")
        assert all(map(torch.equal, run(inputs, "triton"), run(inputs, "triton")))
