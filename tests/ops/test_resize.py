"""Bilinear resize: the reference, and the Triton kernel against it."""

import pytest
import torch
import torch.nn.functional as F

from models.ops.resize import bilinear_resize
from tests.ops.comparison import assert_compiles, assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

# ||out - truth|| / ||truth||: float32 arithmetic, also of where a pixel lies: a hundred pixels
# from the first its share of a neighbour has 17 bits. Outputs rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (H, W) before and after: whole and odd factors, up, down, both, one side alone, from and to one
# pixel; the interpreter's tile is 2 x 16
SMALL = [
    ((5, 7), (20, 28)),
    ((3, 4), (7, 9)),
    ((9, 8), (3, 5)),
    ((13, 3), (5, 17)),
    ((6, 5), (6, 11)),
    ((1, 1), (4, 3)),
    ((7, 5), (1, 1)),
]
# B, C, (H, W) before and after
LARGE = [
    (1, 16, (120, 160), (480, 640)),
    (2, 16, (15, 20), (480, 640)),
    (1, 512, (60, 80), (120, 160)),
    (3, 33, (17, 23), (65, 121)),
    (1, 9, (480, 640), (333, 501)),
    (4, 768, (15, 20), (7, 9)),
]


def make_map(batch, channels, hw, dtype=torch.float32, device="cpu"):
    """A map; beside it in memory lies NaN, which must not be read."""
    generator = torch.Generator().manual_seed(sum(hw))
    whole = torch.full((batch + 2, channels, *hw), float("nan"))
    whole[1:-1] = torch.randn(batch, channels, *hw, generator=generator)
    return whole.to(device, dtype)[1:-1]


def run(x, hw, backend):
    """Output and gradient of a fixed weighting of it, which bfloat16 holds exactly."""
    x = x.detach().requires_grad_()
    y = bilinear_resize(x, hw, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, x, weight)]


def assert_autocast(backend):
    """A map keeps its dtype, and is rounded to it once."""
    x = make_map(1, 2, (3, 4), torch.bfloat16)
    exact = bilinear_resize(x.float(), (5, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bilinear_resize(x, (5, 7), backend=backend)
        wide = bilinear_resize(x.float(), (5, 7), backend=backend)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(wide, exact)


def assert_same(x, hw, tolerance):
    expected = run(x.double(), hw, "reference")
    with poisoned_empty():
        ours = run(x, hw, "triton")
    for name, result, goal in zip(("y", "x"), ours, expected, strict=True):
        assert result.dtype == x.dtype, name
        assert_near(name, result, goal, tolerance)


@pytest.mark.parametrize(("small", "large"), SMALL, ids=str)
def test_reference_is_the_definition(small, large):
    x = make_map(2, 3, small).double()
    y = bilinear_resize(x, large)
    for row in range(large[0]):
        for column in range(large[1]):
            at = [
                min(max((index + 0.5) * size / new - 0.5, 0), size - 1)
                for index, size, new in zip((row, column), small, large, strict=True)
            ]
            expected = sum(
                (1 - abs(at[0] - i)) * (1 - abs(at[1] - j)) * x[:, :, i, j]
                for i in range(small[0])
                for j in range(small[1])
                if abs(at[0] - i) < 1 and abs(at[1] - j) < 1
            )
            torch.testing.assert_close(y[:, :, row, column], expected)


def test_same_size_costs_nothing():
    x = make_map(1, 2, (3, 4))
    assert bilinear_resize(x, x.shape[2:]) is x


def test_wrong_arguments_are_named():
    x = make_map(1, 2, (3, 4))
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(5, 5\)"):
        bilinear_resize(x[0], (5, 5))
    with pytest.raises(ValueError, match=r"got \(1, 2, 3, 4\) and \(0, 5\)"):
        bilinear_resize(x, (0, 5))
    with pytest.raises(ValueError, match=r"got \(1, 2, 0, 4\) and \(5, 5\)"):
        bilinear_resize(x[:, :, :0], (5, 5))
    with pytest.raises(ValueError, match="unknown bilinear_resize backend 'cudnn'"):
        bilinear_resize(x, (5, 5), backend="cudnn")


def test_autocast_changes_nothing():
    assert_autocast("reference")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        bilinear_resize(make_map(1, 2, (3, 4)), (5, 5), backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("small", "large"), SMALL, ids=str)
@pytest.mark.parametrize("channels", [1, 5])
def test_interpreted_equals_reference(channels, small, large):
    assert_same(make_map(3, channels, small), large, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("hw", [(90, 31), (11, 149)], ids=str)
def test_interpreted_places_pixels_as_pytorch(hw):
    x = make_map(1, 1, (23, 90))
    y = bilinear_resize(x, hw, backend="triton")
    expected = F.interpolate(x, hw, mode="bilinear")
    # Places near 90 are rounded to 8e-6, twice; neighbours differ by 3 or so.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=5e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_map(2, 3, (5, 6), dtype), (9, 11), TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_interpreted_other_layouts(layout):
    x = make_map(2, 6, (3, 4))
    x = x[:, 1:5] if layout == "slice" else x.contiguous(memory_format=torch.channels_last)
    assert_same(x, (7, 5), TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=str)
def test_interpreted_empty(sizes):
    x = torch.ones(*sizes, 2, 2)
    assert bilinear_resize(x, (5, 3), backend="triton").shape == (*sizes, 5, 3)


@interpreted
def test_interpreted_autocast_changes_nothing():
    assert_autocast("triton")


@interpreted
def test_interpreted_operator_is_well_registered():
    from models.ops.resize import triton as module

    x = make_map(2, 3, (3, 4)).requires_grad_()
    torch.library.opcheck(module._forward, (x, 5, 2))


@interpreted
def test_interpreted_compiles():
    x = make_map(2, 3, (3, 4)).requires_grad_()

    def call(x):
        return bilinear_resize(2 * x, (5, 7), backend="triton")

    assert_compiles(call, x)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(("batch", "channels", "small", "large"), LARGE, ids=str)
    def test_equals_pytorch(self, batch, channels, small, large, dtype):
        x = make_map(batch, channels, small, dtype, "cuda")
        y = bilinear_resize(x, large, backend="triton")
        expected = F.interpolate(x, large, mode="bilinear")
        assert y.is_contiguous()
        assert y.dtype == expected.dtype
        error = (y.double() - expected.double()).norm() / expected.double().norm()
        assert error < TOLERANCE[dtype], f"relative error {error:.2e}"

    def test_gradient(self):
        assert_same(make_map(2, 16, (30, 40), device="cuda"), (120, 160), 1e-5)

    def test_beyond_32_bit_offsets(self):
        x = torch.zeros(1, 2**14 + 1, 64, 64, device="cuda", dtype=torch.bfloat16)
        x[:, -1] = 1
        y = bilinear_resize(x, (512, 256), backend="triton")
        assert (y[0, -1] == 1).all() and not y[0, -2].any()
