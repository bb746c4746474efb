"""Operators on Triton within a part that is computed anew for the gradient (model.recompute)."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.ops.channel_norm import channel_norm
from models.ops.depthwise import depthwise_conv
from models.ops.epilogue import epilogue
from models.ops.mamba_path import conv_silu, gate
from models.ops.resize import bilinear_resize
from models.ops.selective_scan import selective_scan
from models.ops.ss2d_scan import ss2d_scan
from tests.ops.interpreter import INTERPRETED, OLD_TRITON, interpreted, run_interpreted, with_triton


def ungated(y, z, *, backend):
    return gate(y, None, z, backend=backend)


def norm(x, weight, bias=None, *, backend):
    return channel_norm(x, weight, bias, 1e-5, backend=backend)


def residual(x, bias, other, *, backend):
    return epilogue(x, bias, activation="gelu", residual=other, backend=backend)


MAP, TOKENS = (2, 3, 4, 5), (2, 4, 9)
CASES = {
    "layer norm": (norm, [MAP, (3,), (3,)]),
    "rms norm": (norm, [MAP, (3,)]),
    "depthwise": (functools.partial(depthwise_conv, activation="silu"), [MAP, (3, 1, 3, 3), (3,)]),
    "epilogue": (residual, [MAP, (3,), MAP]),
    "resize": (functools.partial(bilinear_resize, hw=(6, 7)), [MAP]),
    "mamba convolution": (conv_silu, [TOKENS, (4, 4), (4,)]),
    "gate": (ungated, [TOKENS, TOKENS]),
    "selective scan": (selective_scan, [TOKENS, TOKENS, (4, 2), (2, 1, 2, 9), (2, 1, 2, 9)]),
    "four directions": (ss2d_scan, [(2, 2, 2, 3), (4, 3, 2), (4, 2, 1), (4, 2), (8, 1), (8,)]),
}


@with_triton
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.skipif(OLD_TRITON, reason="this triton has not all of the operators")
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_interpreted_gradients_are_the_same(name):
    function, shapes = CASES[name]
    function = functools.partial(function, backend="triton")
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    plain = function(*leaves)
    anew = checkpoint(function, *leaves, use_reentrant=False, preserve_rng_state=False)
    weight = torch.randn(plain.shape, generator=generator)
    expected = torch.autograd.grad(plain, leaves, weight)
    gradients = torch.autograd.grad(anew, leaves, weight)
    assert torch.equal(anew, plain)
    assert all(map(torch.equal, gradients, expected))
