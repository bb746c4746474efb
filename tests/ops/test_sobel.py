"""Sobel gradients: scale, sign, borders; the reference, and the Triton kernels against it."""

import cv2
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.sobel import sobel
from tests.ops.comparison import CalledOperators, assert_compiles, assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)
from tests.ops.test_padding import make_map

# ||out - truth|| / ||truth||: float32 arithmetic; outputs rounded to 8 and 11 bits
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def run(x, backend):
    """Both gradients, and that of a fixed weighting of them, which bfloat16 holds exactly."""
    x = x.detach().requires_grad_()
    maps = sobel(x, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for _ in maps]
    return [*(y.detach() for y in maps), *torch.autograd.grad(maps, x, weights)]


def assert_same(x):
    expected = run(x.double(), "reference")
    with poisoned_empty():
        ours = run(x, "triton")
    for name, result, goal in zip(("across", "along", "gradient"), ours, expected, strict=True):
        assert result.dtype == x.dtype, name
        assert_near(name, result, goal, TOLERANCE[x.dtype])


def assert_small_beside_large(backend):
    """A faint edge above a bright row: neighbours are subtracted before sums are made of them."""
    x = torch.tensor([[0, 0, 1e-3], [0, 0, 0], [1e5, 1e5, 1e5]]).view(1, 1, 3, 3)
    across, _ = sobel(x, backend=backend)
    _, along = sobel(x.mT, backend=backend)
    for faint in (across, along):
        torch.testing.assert_close(faint[0, 0, 1, 1].item(), 1e-3)


def test_small_beside_large():
    assert_small_beside_large("reference")


def test_the_reference_is_pytorch_s_alone():
    """On a GPU, too, where padding would take a kernel of ours."""
    with FakeTensorMode(), CalledOperators() as called:
        sobel(torch.empty(1, 2, 5, 6, device="cuda"), backend="reference")
    assert called.names and not any(name.startswith("cmfs") for name in called.names)


@pytest.mark.parametrize("hw", [(8, 8), (7, 5), (1, 4)], ids=str)
def test_equals_opencv(hw):
    x = torch.randn(2, 3, *hw)
    gradient_x, gradient_y = sobel(x)
    for batch in range(2):
        for channel in range(3):
            plane = x[batch, channel].numpy()
            for ours, (dx, dy) in ((gradient_x, (1, 0)), (gradient_y, (0, 1))):
                theirs = cv2.Sobel(plane, cv2.CV_32F, dx, dy, borderType=cv2.BORDER_REPLICATE)
                torch.testing.assert_close(ours[batch, channel], torch.from_numpy(theirs))


def test_sign_follows_the_edge():
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1
    rising, _ = sobel(step)
    falling, _ = sobel(1 - step)
    assert rising.max() == 4
    assert torch.equal(rising, -falling)


def test_gradcheck():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sobel, x)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\)"):
        sobel(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"got \(1, 2, 3, 0\)"):
        sobel(torch.ones(1, 2, 3, 0))
    with pytest.raises(ValueError, match="unknown sobel backend 'cudnn'"):
        sobel(torch.ones(1, 2, 3, 4), backend="cudnn")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        sobel(torch.ones(1, 2, 3, 4), backend="triton")


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("hw", [(5, 7), (2, 2), (1, 6), (6, 1), (3, 16)], ids=str)
def test_interpreted_equals_reference(hw):
    assert_same(make_map(3, 1, *hw))


@interpreted
def test_interpreted_small_beside_large():
    assert_small_beside_large("triton")


@interpreted
def test_interpreted_one_pixel_has_none():
    assert all((result == 0).all() for result in run(make_map(1, 3, 1, 1), "triton"))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype):
    assert_same(make_map(1, 3, 4, 5, dtype=dtype))


@interpreted
@pytest.mark.parametrize("layout", ["channels_last", "slice"])
def test_interpreted_other_layouts(layout):
    x = make_map(2, 6, 3, 4)
    x = x[:, 1:5] if layout == "slice" else x.contiguous(memory_format=torch.channels_last)
    assert_same(x)


@interpreted
@pytest.mark.parametrize("index", [0, 1])
def test_interpreted_one_gradient_alone(index):
    x = make_map(1, 2, 4, 5).requires_grad_()
    weight = torch.randn(x.shape)
    result, goal = (
        torch.autograd.grad(sobel(x, backend=backend)[index], x, weight)[0]
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(result, goal)


@interpreted
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=str)
def test_interpreted_empty(sizes):
    x = torch.ones(*sizes, 2, 2)
    assert [result.shape for result in run(x, "triton")] == [x.shape] * 3


@interpreted
def test_interpreted_operators_are_well_registered():
    from models.ops.sobel import triton as module

    x = make_map(2, 3, 3, 4)
    torch.library.opcheck(module._forward, (x.clone().requires_grad_(),))
    torch.library.opcheck(module._backward, (x, x.mT.contiguous().mT))


@interpreted
def test_interpreted_compiles():
    x = make_map(2, 3, 3, 4).requires_grad_()

    def call(x):
        return torch.stack(sobel(2 * x, backend="triton"))

    assert_compiles(call, x)


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", [(4, 16, 480, 640), (3, 33, 17, 23)], ids=str)
    def test_equals_reference(self, shape, dtype):
        assert_same(make_map(*shape, dtype=dtype, device="cuda"))

    def test_beyond_32_bit_offsets(self):
        x = torch.zeros(1, 2**13 + 1, 512, 512, device="cuda", dtype=torch.bfloat16)
        x[:, -1] = torch.arange(512, device="cuda")
        across, _ = sobel(x)
        assert across[0, -1].any() and not across[0, -2].any()
