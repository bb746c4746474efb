"""The shared layers of the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import layers
from models.layers import DepthwiseConv2d, resize, shuffle_channels
from tests.recompute import LIGHT
from utils.errors import InputError

SIZES = [((5, 7), (20, 28)), ((3, 4), (7, 9)), ((1, 1), (4, 3)), ((9, 8), (3, 5)), ((6, 6), (6, 6))]


@pytest.mark.parametrize(("small", "large"), SIZES, ids=str)
def test_resize_and_its_gradient_are_those_of_interpolate(small, large):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *small, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(2, 3, *large, dtype=torch.float64, generator=generator)
    expected = F.interpolate(x, size=large, mode="bilinear", align_corners=False)
    result = resize(x, large)
    assert torch.equal(result, expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    (result_grad,) = torch.autograd.grad(result, x, grad)
    torch.testing.assert_close(result_grad, expected_grad)


def test_resize_keeps_half_precision():
    x = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    resize(x, (16, 16)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 16.0))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shuffled_channels_are_those_of_torch_and_have_a_gradient(groups):
    x = torch.randn(2, 8, 3, 5, requires_grad=True)
    shuffled = shuffle_channels(x, groups)
    assert torch.equal(shuffled, torch.nn.ChannelShuffle(groups)(x.detach()))
    weight = torch.randn(shuffled.shape)
    (gradient,) = torch.autograd.grad(shuffled, x, weight)
    assert torch.equal(shuffle_channels(gradient, groups), weight)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [3, (1, 11), (11, 1)], ids=str)
def test_depthwise_convolution_is_that_of_torch(kernel, bias, activation):
    torch.manual_seed(0)
    ours = DepthwiseConv2d(4, kernel, bias=bias, activation=activation)
    torch.manual_seed(0)
    padding = 1 if kernel == 3 else tuple(size // 2 for size in kernel)
    theirs = nn.Conv2d(4, 4, kernel, padding=padding, groups=4, bias=bias)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    x = torch.randn(2, 4, 7, 5)
    expected = theirs(x) if activation is None else F.silu(theirs(x))
    torch.testing.assert_close(ours(x), expected)


def test_depthwise_convolution_refuses_an_even_kernel():
    with pytest.raises(ValueError, match=r"odd, .* got \(1, 2, 3, 3\), \(2, 1, 2, 2\)"):
        DepthwiseConv2d(2, 2)(torch.randn(1, 2, 3, 3))


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@pytest.mark.parametrize("is_on_gpu", [False, True], ids=["cpu", "gpu"])
def test_what_follows_a_convolution(activation, is_on_gpu, monkeypatch):
    """The same whether the product or the pass after it adds the bias."""
    torch.manual_seed(0)
    if is_on_gpu:
        monkeypatch.setattr(layers, "_biases", lambda bias, x: (None, bias))
    plain = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu}[activation]
    x, residual = torch.randn(2, 3, 5, 4), torch.randn(2, 6, 5, 4)
    factor = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    conv = layers.FusedConv2d(3, 6, 3, padding=1, activation=activation)
    expected = plain(F.conv2d(x, conv.weight, conv.bias, padding=1))
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv(x, residual, factor), residual + factor * expected)
    linear = layers.Linear2d(3, 6, activation=activation)
    expected = plain(F.linear(x.movedim(1, 3), linear.weight, linear.bias).movedim(3, 1))
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x, residual, factor), residual + factor * expected)


def test_channels_beyond_its_own_do_not_count_for_a_replicate_conv():
    layer, x = layers.ReplicateConv2d(3, 2), torch.randn(1, 5, 4, 6)
    torch.testing.assert_close(layer(x), layer(x[:, :3]))
    with pytest.raises(ValueError, match="expected 3 channels, got 2"):
        layer(x[:, :2])


def test_resize_s_gradient_is_not_rounded_by_autocast():
    x = torch.randn(1, 2, 3, 5, requires_grad=True)
    expected = torch.autograd.grad(resize(x, (9, 11)).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(resize(x, (9, 11)).square().sum(), x)
    torch.testing.assert_close(found, expected)


_calls: list[str] = []


@torch.library.custom_op("cmfs::selective_scan_counted", mutates_args=())
def _scan(x: Tensor) -> Tensor:
    _calls.append("scan")
    return x.exp()


@torch.library.custom_op("cmfs::norm_counted", mutates_args=())
def _norm(x: Tensor) -> Tensor:
    _calls.append("norm")
    return x.exp()


for _operator in (_scan, _norm):
    _operator.register_autograd(
        lambda ctx, grad: grad * ctx.saved_tensors[0],
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )


class Part(layers.Recomputed):
    def draw(self, x):
        return (torch.rand_like(x),)

    def forward(self, x, factor):
        return _norm(_scan(_norm(x) * factor)).sum()


def test_an_old_pytorch_cannot_keep_scans_alone(monkeypatch):
    monkeypatch.delattr(layers.checkpointing, "CheckpointPolicy", raising=False)
    part = Part()
    part.recompute = "light"
    part.eval()(torch.ones(4))
    with pytest.raises(InputError, match=r"light needs PyTorch 2\.5 or later, this is 2\."):
        part.train()(torch.ones(4))


@pytest.mark.parametrize(
    ("recompute", "training", "again"),
    [
        (False, True, []),
        pytest.param("light", True, ["norm", "norm"], marks=LIGHT.marks),
        (True, True, ["norm", "scan", "norm"]),
        (True, False, []),
        ("light", False, []),
    ],
)
def test_what_is_computed_a_second_time(recompute, training, again):
    part, x = Part().train(training), torch.linspace(0, 0.1, 4).requires_grad_()
    torch.manual_seed(0)
    _calls.clear()
    (expected,) = torch.autograd.grad(part(x), x)
    assert _calls == ["norm", "scan", "norm"]
    part.recompute = recompute
    torch.manual_seed(0)
    result = part(x)
    _calls.clear()
    (gradient,) = torch.autograd.grad(result, x)
    assert _calls == again
    assert torch.equal(gradient, expected)
