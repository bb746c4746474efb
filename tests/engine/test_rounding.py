"""Weights rounded together give what autocast gives."""

import pytest
import torch
from torch import nn

from configs import load_config
from engine.rounding import call_rounded
from models import build_model, layers, mamba


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = load_config("demo", ["model.text_prior=orthogonal", "model.drop_path=0.0"])
    return build_model(config)


def outputs_and_gradients(model, run, device="cpu"):
    torch.manual_seed(1)
    model.zero_grad()
    output = run(*(torch.rand(2, 3, 40, 48).to(device) for _ in range(2)))
    loss = output.logits.float().square().mean() + output.fused.mean() + output.balance_loss
    loss.backward()
    return [*output, *(p.grad for p in model.parameters() if p.requires_grad)]


def autocast(model, device="cpu"):
    def run(rgb, thermal):
        with torch.autocast(device, torch.bfloat16):
            return model(rgb, thermal)

    return run


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_as_autocast(model, recompute):
    model.set_recompute(recompute)
    expected = outputs_and_gradients(model, autocast(model))
    ours = outputs_and_gradients(model, lambda *pair: call_rounded(model, torch.bfloat16, *pair))
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    for given, goal in zip(ours, expected, strict=True):
        assert given.dtype == goal.dtype
        # a product in bfloat16 may be summed up in another order: 8 bits of each
        assert (given - goal).norm() <= 2**-8 * goal.norm()


def test_without_a_type_nothing_is_rounded(model):
    expected = outputs_and_gradients(model, model)
    ours = outputs_and_gradients(model, lambda *pair: call_rounded(model, None, *pair))
    assert all(map(torch.equal, ours, expected))


def test_kernels_of_ours_get_float32_weights(model, monkeypatch):
    """Those that autocast does not know: on a GPU rounding would change what they compute."""
    seen = []

    def watch(name, function):
        def watched(x, weight, *arguments, **options):
            seen.append(weight.dtype)
            return function(x, weight, *arguments, **options)

        monkeypatch.setattr(name, watched)

    watch("models.layers.depthwise_conv", layers.depthwise_conv)
    watch("models.mamba.conv_silu", mamba.conv_silu)
    outputs_and_gradients(model, lambda *pair: call_rounded(model, torch.bfloat16, *pair))
    assert len(seen) > 10
    assert set(seen) == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_as_autocast_on_a_gpu(model):
    model.cuda().eval()
    expected = outputs_and_gradients(model, autocast(model, "cuda"), "cuda")
    ours = outputs_and_gradients(
        model, lambda *pair: call_rounded(model, torch.bfloat16, *pair), "cuda"
    )
    total = torch.cat([x.flatten().float() for x in expected])
    error = torch.cat([x.flatten().float() for x in ours]) - total
    assert error.norm() < 1e-3 * total.norm()
