"""Weights rounded together give what autocast gives."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from configs import load_config
from engine import rounding
from engine.rounding import with_rounded_weights
from models import build_model, layers, mamba
from tests.recompute import LIGHT


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = load_config("demo", ["model.text_prior=orthogonal", "model.drop_path=0.0"])
    return build_model(config)


def outputs_and_gradients(model, dtype, *, is_rounded=True, device="cpu"):
    """Of a forward and backward under autocast, its weights rounded before or each on its own."""
    torch.manual_seed(1)
    model.zero_grad()
    images = [torch.rand(2, 3, 40, 48).to(device) for _ in range(2)]

    def run(model):
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            output = model(*images)
        loss = output.logits.float().square().mean() + output.fused.mean() + output.balance_loss
        loss.backward()
        return output

    output = with_rounded_weights(model, dtype, run) if is_rounded else run(model)
    return [*output, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("recompute", [False, LIGHT, True])
def test_as_autocast(model, recompute):
    model.set_recompute(recompute)
    expected = outputs_and_gradients(model, torch.bfloat16, is_rounded=False)
    ours = outputs_and_gradients(model, torch.bfloat16)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    for given, goal in zip(ours, expected, strict=True):
        assert given.dtype == goal.dtype
        # a product in bfloat16 may be summed up in another order: 8 bits of each
        assert (given - goal).norm() <= 2**-8 * goal.norm()


def test_rounded_weights_stay_until_all_gradients_are_there(model, monkeypatch):
    """Parts that read them on streams of their own are joined only then."""
    rounded, alive = [], []
    apply, backward = rounding._Rounded.apply, rounding._Rounded.backward

    def note(*inputs):
        copies = apply(*inputs)
        rounded.extend(StorageWeakRef(x.untyped_storage()) for x in copies)
        return copies

    def look(ctx, *gradients):
        alive.extend(not x.expired() for x in rounded)
        return backward(ctx, *gradients)

    monkeypatch.setattr(rounding._Rounded, "apply", note)
    monkeypatch.setattr(rounding._Rounded, "backward", staticmethod(look))
    outputs_and_gradients(model, torch.bfloat16)
    assert len(alive) > 100
    assert all(alive)
    assert all(x.expired() for x in rounded)


@pytest.mark.parametrize("recompute", [LIGHT, True])
def test_what_is_computed_anew_finds_the_same_weights(model, recompute):
    seen = []
    model.set_recompute(recompute)
    for block in model.rgb_encoder.layers[0].blocks:
        block.mlp.fc1.register_forward_pre_hook(lambda linear, _: seen.append(linear.weight))
    outputs_and_gradients(model, torch.bfloat16)
    assert len(seen) == 2 * len(model.rgb_encoder.layers[0].blocks)
    assert {weight.dtype for weight in seen} == {torch.bfloat16}
    assert len({weight.data_ptr() for weight in seen}) == len(seen) / 2


def test_without_a_type_nothing_is_rounded(model):
    expected = outputs_and_gradients(model, None, is_rounded=False)
    ours = outputs_and_gradients(model, None)
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
    outputs_and_gradients(model, torch.bfloat16)
    assert len(seen) > 10
    assert set(seen) == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_as_autocast_on_a_gpu(model):
    model.cuda().eval()
    expected = outputs_and_gradients(model, torch.bfloat16, is_rounded=False, device="cuda")
    ours = outputs_and_gradients(model, torch.bfloat16, device="cuda")
    total = torch.cat([x.flatten().float() for x in expected])
    error = torch.cat([x.flatten().float() for x in ours]) - total
    assert error.norm() < 1e-3 * total.norm()
