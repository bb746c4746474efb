"""Depthwise convolution: the reference, and the Triton kernels against it."""

import pytest
import torch
import torch.nn.functional as F

from models.ops import triton_support
from models.ops.depthwise import depthwise_conv
from models.ops.layout import with_dense_images
from tests.ops.comparison import assert_near, poisoned_empty
from tests.ops.interpreter import (
    INTERPRETED,
    OLD_TRITON,
    interpreted,
    on_gpu,
    run_interpreted,
    with_triton,
)

# ||out - truth|| / ||truth||: float32 arithmetic; outputs rounded to 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (B, C, H, W): one pixel, one row, odd sizes, even width, several blocks of the interpreter's
SMALL = [(1, 2, 1, 1), (2, 1, 1, 6), (3, 2, 7, 5), (1, 3, 4, 6), (2, 2, 9, 16)]
LARGE = [(1, 96, 120, 160), (4, 768, 15, 20), (3, 192, 17, 23), (2, 384, 30, 40), (1, 1024, 61, 80)]
KERNELS = [(3, 3), (1, 11), (11, 1), (5, 3)]
KINDS = [(True, "silu"), (False, "silu"), (True, None), (False, None)]  # bias, activation


def make_inputs(shape, kernel, *, has_bias=True, dtype=torch.float32, device="cpu"):
    """x as the last channels of a wider tensor of NaN, weight, bias, and y's gradient likewise."""
    batch, channels, *hw = shape
    generator = torch.Generator().manual_seed(sum(shape) + sum(kernel))

    def half():
        wide = torch.full((batch, 2 * channels, *hw), torch.nan, dtype=dtype, device=device)
        wide[:, channels:] = torch.randn(shape, generator=generator)
        return wide[:, channels:]

    weight = torch.randn(channels, 1, *kernel, generator=generator).to(device)
    bias = torch.randn(channels, generator=generator).to(device) if has_bias else None
    return half(), weight, bias, half()


def run(inputs, activation, backend):
    """The output and all gradients."""
    *tensors, grad_y = inputs
    tensors = [x if x is None else x.detach().requires_grad_() for x in tensors]
    y = depthwise_conv(*tensors, activation=activation, backend=backend)
    leaves = [x for x in tensors if x is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def assert_same(inputs, activation, tolerance):
    expected = run([x if x is None else x.double() for x in inputs], activation, "reference")
    with poisoned_empty():
        ours = run(inputs, activation, "triton")
    names = ("y", "x", "weight", "bias")[: len(expected)]
    for name, result, goal in zip(names, ours, expected, strict=True):
        assert_near(name, result, goal, tolerance)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_reference_is_the_definition(kernel):
    x, weight, bias, _ = (t.double() for t in make_inputs((2, 3, 4, 7), kernel))
    height, width = kernel
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2))
    sums = bias.view(-1, 1, 1) + sum(
        weight[:, :, i, j, None] * padded[:, :, i : i + 4, j : j + 7]
        for i in range(height)
        for j in range(width)
    )
    torch.testing.assert_close(depthwise_conv(x, weight, bias), sums)
    active = depthwise_conv(x, weight, bias, activation="silu")
    torch.testing.assert_close(active, sums * torch.sigmoid(sums))


def test_reference_takes_weights_of_another_type():
    x, weight, bias, _ = make_inputs((1, 2, 3, 4), (3, 3), dtype=torch.bfloat16)
    y = depthwise_conv(x, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, depthwise_conv(x, weight.bfloat16(), bias.bfloat16()))


def test_wrong_arguments_are_named():
    x, weight, bias, _ = make_inputs((2, 5, 3, 4), (3, 3))
    for wrong in (weight[:4], weight[:, 0], weight.expand(5, 2, 3, 3), weight[..., :2]):
        with pytest.raises(ValueError, match=r"got \(2, 5, 3, 4\), \(\d, .*\), \(5,\)"):
            depthwise_conv(x, wrong, bias)
    with pytest.raises(ValueError, match=r"got \(5, 3, 4\), \(5, 1, 3, 3\), None"):
        depthwise_conv(x[0], weight)
    with pytest.raises(ValueError, match=r"got \(2, 5, 3, 4\), \(5, 1, 3, 3\), \(4,\)"):
        depthwise_conv(x, weight, bias[:4])
    with pytest.raises(ValueError, match="unknown activation 'gelu'; known: None, silu"):
        depthwise_conv(x, weight, bias, activation="gelu")
    with pytest.raises(ValueError, match="unknown depthwise_conv backend 'cudnn'"):
        depthwise_conv(x, weight, bias, backend="cudnn")


@with_triton
@pytest.mark.parametrize(
    ("version", "expected"), [("3.2.0", False), ("3.3.1", True), ("3.10.0+git1", True)]
)
def test_tuples_are_those_of_later_tritons(version, expected, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(
        triton_support, "_triton_version", triton_support._triton_version.__wrapped__
    )
    assert triton_support.has_triton_tuples() is expected


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors_and_earlier_tritons(monkeypatch):
    from models.ops.depthwise import triton as module

    x, weight, *_ = make_inputs((1, 2, 3, 4), (3, 3))
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        depthwise_conv(x, weight, backend="triton")
    monkeypatch.setattr(module, "check_tensor", lambda *_, **__: None)
    monkeypatch.setattr(module, "has_triton_tuples", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs triton 3\.3 or later, got \d"):
        depthwise_conv(x, weight, backend="triton")


@with_triton
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("kernel", [*KERNELS, (13, 13)], ids=str)
def test_tiles_fit(shape, kernel):
    """No more values than a lane can keep, and no warp without a lane that is needed."""
    from models.ops.depthwise import triton as module

    x, weight = torch.empty(shape, device="meta"), torch.empty(shape[1], 1, *kernel)
    tile = module._fit(module._Tile(8, 128, 4), x, weight)
    assert tile.rows == 1 or (tile.rows + kernel[0] - 1) * (kernel[1] + 1) <= module._VALUES
    assert tile.rows < 2 * shape[2]
    assert tile.lanes == 32 * tile.warps
    strips, blocks = module._count(x, tile)
    needed = strips * -(-shape[3] // 2)
    assert (blocks - 1) * tile.lanes < needed <= blocks * tile.lanes
    assert tile.warps == 1 or tile.lanes // 2 < needed


@with_triton
@pytest.mark.skipif(OLD_TRITON, reason="the interpreter of Triton < 3.3 joins wrongly")
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_interpreted_equals_reference(shape, kernel):
    assert_same(make_inputs(shape, kernel), "silu", TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize(("has_bias", "activation"), KINDS[1:], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 11)], ids=str)
def test_interpreted_without_bias_or_activation(kernel, has_bias, activation):
    inputs = make_inputs((2, 2, 5, 6), kernel, has_bias=has_bias)
    assert_same(inputs, activation, TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_interpreted_half_precision(dtype, width):
    inputs = make_inputs((2, 2, 7, width), (3, 3), dtype=dtype)
    assert_same(inputs, "silu", TOLERANCE[dtype])
    x, weight, bias, grad_y = inputs
    assert_same((x, weight.to(dtype), bias.to(dtype), grad_y), None, TOLERANCE[dtype])


@interpreted
def test_interpreted_weights_are_not_rounded():
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    weight = torch.full((1, 1, 1, 1), 1 + 2**-10)
    assert depthwise_conv(x, weight, -torch.ones(1), backend="triton").item() == 2**-10


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_interpreted_large_values():
    """SiLU and its slope where the exponential overflows."""
    x, weight, bias, grad_y = make_inputs((1, 2, 5, 6), (3, 3))
    assert_same((300 * x, weight, bias, grad_y), "silu", TOLERANCE[torch.float32])


@interpreted
@pytest.mark.parametrize("turn", ["channels_last", "transposed", "expanded"])
def test_interpreted_other_layouts(turn):
    x, weight, bias, grad_y = make_inputs((2, 3, 4, 4), (3, 3))
    x, grad_y = (
        {
            "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
            "transposed": lambda t: t.mT,
            "expanded": lambda t: t[:1].expand_as(t),
        }[turn](t)
        for t in (x, grad_y)
    )
    assert_same((x, weight, bias, grad_y), "silu", TOLERANCE[torch.float32])


@interpreted
def test_interpreted_channels_of_a_wider_tensor_are_not_copied():
    x, *_ = make_inputs((2, 3, 4, 5), (3, 3))
    used, stride = with_dense_images(x)
    assert (used.data_ptr(), stride) == (x.data_ptr(), 6 * 4 * 5)


@interpreted
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (1, 0, 3, 3)], ids=str)
def test_interpreted_empty(shape):
    x, weight, bias, grad_y = make_inputs(shape, (3, 3))
    y, *gradients = run((x, weight, bias, grad_y), "silu", "triton")
    assert y.shape == shape
    for gradient, leaf in zip(gradients, (x, weight, bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_autocast_gives_its_type(dtype):
    inputs = make_inputs((1, 2, 3, 5), (3, 3), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, *gradients = run((*inputs[:3], inputs[3].bfloat16()), "silu", "triton")
    x, weight, bias, _ = inputs
    expected = depthwise_conv(x.bfloat16(), weight, bias, activation="silu", backend="triton")
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise_conv(x, weight, bias).dtype == torch.bfloat16


@interpreted
@pytest.mark.parametrize(("has_bias", "activation"), [KINDS[0], KINDS[-1]], ids=str)
def test_interpreted_operators_are_well_registered(has_bias, activation):
    from models.ops.depthwise import triton as module

    x, weight, bias, grad_y = make_inputs((2, 2, 3, 4), (3, 3), has_bias=has_bias)
    narrow = [t if t is None else t.bfloat16() for t in (weight, bias)]
    for tensors in ((grad_y, x, weight, bias), (grad_y.mT, x.mT, *narrow)):
        torch.library.opcheck(module._backward, (*tensors, activation == "silu"))
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors[1:]]
        torch.library.opcheck(module._forward, (*leaves, activation == "silu"))


@interpreted
def test_interpreted_torch_compile_sees_no_break():
    inputs = make_inputs((1, 2, 3, 4), (3, 3))
    compiled = torch.compile(depthwise_conv, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    y = compiled(*leaves, activation="silu", backend="triton")
    ours = [y.detach(), *torch.autograd.grad(y, leaves, inputs[3])]
    assert all(map(torch.equal, ours, run(inputs, "silu", "triton")))


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("has_bias", "activation"), [KINDS[0], KINDS[-1]], ids=str)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("kernel", KERNELS[:3], ids=str)
    @pytest.mark.parametrize("shape", [(3, 2, 7, 5), *LARGE], ids=str)
    def test_equals_reference(self, shape, kernel, dtype, has_bias, activation):
        inputs = make_inputs(shape, kernel, has_bias=has_bias, dtype=dtype, device="cuda")
        assert_same(inputs, activation, TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_takes_odd_addresses(self, dtype):
        x, weight, bias, grad_y = make_inputs((1, 3, 6, 8), (3, 3), dtype=dtype, device="cuda")
        odd = [F.pad(t.reshape(-1), (1, 0))[1:].view(t.shape) for t in (x, grad_y)]
        assert_same((odd[0], weight, bias, odd[1]), "silu", TOLERANCE[dtype])

    def test_the_same_twice(self):
        inputs = make_inputs((2, 96, 60, 80), (3, 3), device="cuda")
        first, second = (run(inputs, "silu", "triton") for _ in range(2))
        assert all(map(torch.equal, first, second))

    def test_auto_is_triton_and_keeps_its_type(self):
        x, weight, bias, _ = make_inputs((2, 8, 6, 8), (3, 3), device="cuda")
        y = depthwise_conv(x, weight, bias, activation="silu")
        assert torch.equal(y, depthwise_conv(x, weight, bias, activation="silu", backend="triton"))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert depthwise_conv(x, weight, bias).dtype == torch.bfloat16
        assert depthwise_conv(x.double(), weight, bias).dtype == torch.float64

    def test_in_a_cuda_graph(self):
        inputs = make_inputs((2, 8, 6, 8), (3, 3), device="cuda")
        expected = run(inputs, "silu", "triton")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(inputs, "silu", "triton")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours = run(inputs, "silu", "triton")
        graph.replay()
        assert all(map(torch.equal, ours, expected))
