"""The parts around a Mamba scan: the reference, and the Triton kernels against it."""

import pytest
import torch

from models.ops.mamba_path import conv_silu, gate
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
# (batch, D, L); the interpreter's tile is 2 x 16
SMALL = [(1, 1, 1), (2, 3, 5), (1, 5, 33), (3, 4, 16)]
LARGE = [(1, 192, 19200), (3, 100, 4801), (2, 5, 63)]
WIDTH = 4


def make_inputs(sizes, dtype=torch.float32, device="cpu"):
    """x and z as the halves of one tensor, weight and bias of the convolution, another pass."""
    batch, channels, length = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    both = torch.randn(batch, 2 * channels, length, generator=generator)
    weight = torch.randn(channels, WIDTH, generator=generator)
    bias = torch.randn(channels, generator=generator)
    other = torch.randn(sizes, generator=generator)
    kinds = (dtype, torch.float32, torch.float32, dtype)
    return [x.to(device, d) for x, d in zip((both, weight, bias, other), kinds, strict=True)]


def run(inputs, flip, backend):
    """Outputs of both parts and gradients of a fixed weighting of the last."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    both, weight, bias, other = leaves
    x, z = both.chunk(2, dim=1)
    y = conv_silu(x, weight, bias, flip=flip, backend=backend)
    out = gate(y, other if flip else None, z, backend=backend)
    wave = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out)
    used = leaves if flip else leaves[:3]
    return [y.detach(), out.detach(), *torch.autograd.grad(out, used, wave)]


def assert_same(inputs, flip, tolerance):
    expected = run([x.double() for x in inputs], flip, "reference")
    with poisoned_empty():
        ours = run(inputs, flip, "triton")
    names = ("y", "out", "x and z", "weight", "bias", "other")[: len(expected)]
    for name, result, goal in zip(names, ours, expected, strict=True):
        assert_near(name, result, goal, tolerance)


@pytest.mark.parametrize("flip", [False, True])
def test_convolution_is_causal(flip):
    both, weight, bias, _ = make_inputs((1, 3, 9))
    x = both[:, :3]
    changed = x.clone()
    changed[..., 3 if flip else 5] += 1  # token 5 in the walk's order
    before, after = (conv_silu(v, weight, bias, flip=flip) for v in (x, changed))
    assert torch.equal(before[..., :5], after[..., :5])
    assert (before[..., 5:] != after[..., 5:]).any(-1).all()


def test_convolution_is_the_definition():
    both, weight, bias, _ = (t.double() for t in make_inputs((2, 3, 6)))
    x = both[:, :3]
    padded = torch.nn.functional.pad(x, (WIDTH - 1, 0))
    sums = sum(weight[:, k, None] * padded[..., k : k + 6] for k in range(WIDTH)) + bias[:, None]
    torch.testing.assert_close(conv_silu(x, weight, bias), sums * torch.sigmoid(sums))


def test_gate_is_the_definition():
    y, other, z = torch.randn(3, 2, 3, 5)
    silu = z * torch.sigmoid(z)
    torch.testing.assert_close(gate(y, None, z), y * silu)
    torch.testing.assert_close(gate(y, other, z), (y + other.flip(-1)) / 2 * silu)


def test_wrong_arguments_are_named():
    x = torch.randn(1, 3, 5)
    with pytest.raises(ValueError, match=r"got \(1, 3, 5\), \(4, 4\), \(3,\)"):
        conv_silu(x, torch.randn(4, 4), torch.randn(3))
    with pytest.raises(ValueError, match=r"one shape, got \[\(1, 3, 5\), None, \(1, 3, 4\)\]"):
        gate(x, None, x[..., :4])
    with pytest.raises(ValueError, match="unknown (conv_silu|gate) backend 'cudnn'"):
        gate(x, None, x, backend="cudnn")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        gate(*torch.randn(3, 1, 2, 3), backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_interpreted_equals_reference(sizes, flip):
    assert_same(make_inputs(sizes), flip, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_inputs((2, 3, 20), dtype), True, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("sizes", [(0, 2, 3), (1, 2, 0)], ids=str)
def test_interpreted_empty(sizes):
    x = torch.randn(sizes)
    y = conv_silu(x, torch.randn(2, WIDTH), torch.randn(2), backend="triton")
    assert gate(y, y, x, backend="triton").shape == sizes


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.mamba_path import triton as module

    both, weight, bias, other = make_inputs((2, 3, 7))
    x, z = (t.contiguous() for t in both.chunk(2, dim=1))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(module._conv, (*leaves, True))
    detached = [t.detach() for t in leaves]
    torch.library.opcheck(module._conv_backward, (other, *detached, True))
    for flipped in (None, other.clone().requires_grad_()):
        y, gates = other.clone().requires_grad_(), z.clone().requires_grad_()
        torch.library.opcheck(module._gate, (y, flipped, gates))
        parts = [None if t is None else t.detach() for t in (y, flipped, gates)]
        torch.library.opcheck(module._gate_backward, (torch.randn(z.shape), *parts))


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("sizes", LARGE, ids=str)
    def test_equals_reference(self, sizes, dtype, flip):
        assert_same(make_inputs(sizes, dtype, "cuda"), flip, TOLERANCE[dtype])

    def test_the_same_twice(self):
        inputs = make_inputs((2, 96, 4800), device="cuda")
        first, second = (run(inputs, True, "triton") for _ in range(2))
        assert all(map(torch.equal, first, second))
