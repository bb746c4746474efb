"""The moving average of weights, against its formula."""

import copy

import pytest
import torch
from torch import nn

from configs import load_config
from engine.average import WeightAverage
from engine.inference import predict
from models import build_model


@pytest.mark.parametrize("decay", [0.5, 0.05])
def test_update_follows_the_formula(decay):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    average = WeightAverage(model, decay)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        kept = min(decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] += (1 - kept) * (parameter.detach().double() - expected[name])
        average.update(model, step)
    for name, parameter in average.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-5)
        assert not parameter.requires_grad


def test_the_network_itself_is_never_changed():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, 0.9)
    average.update(model, 0)
    model[1].running_mean.add_(1)
    average.copy_buffers(model)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    average.model[1].running_mean.zero_()
    assert model[1].running_mean.sum() == 3
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert model.training and not average.model.training


def test_follows_a_network_that_was_scored_in_inference_mode():
    """What a forward leaves inside the network must not bar the next copy."""
    model = build_model(load_config("demo", ["model.text_prior=orthogonal"]))
    average = WeightAverage(model, 0.9)
    pair = torch.rand(2, 1, 3, 32, 32)
    predict(average.model, *pair)
    model.train()(*pair)
    average.copy_buffers(model)
    for ours, theirs in zip(average.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
