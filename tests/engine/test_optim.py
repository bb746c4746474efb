"""Parameter groups, schedule, and the optimiser's state in a checkpoint."""

import pytest
import torch
from torch import nn

from configs import load_config
from engine.optim import (
    build_optimizer,
    check_complete,
    is_decayed,
    load_optimizer_state,
    lr_at,
    optimizer_state,
    parameter_groups,
)
from models import build_model
from utils.errors import InputError


@pytest.fixture(scope="module")
def demo_model():
    return build_model(load_config("demo", ["train.crop=[64,96]"]))


def test_every_trainable_parameter_is_in_exactly_one_group(demo_model):
    """Method, Sec. 8, defect 1: raw parameters of the scans were in no group."""
    groups = parameter_groups(demo_model, weight_decay=0.01)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in demo_model.parameters() if p.requires_grad}


@pytest.mark.parametrize("ending", ["A_log", "A_logs", "D", "Ds", "dt_projs_bias", "bias", "scale"])
def test_scan_parameters_biases_and_scales_are_not_decayed(demo_model, ending):
    found = {n: p for n, p in demo_model.named_parameters() if n.rpartition(".")[2] == ending}
    assert found, f"the network has no parameter that ends in {ending}"
    assert not any(is_decayed(name, parameter) for name, parameter in found.items())


@pytest.mark.parametrize("ending", ["x_proj_weight", "dt_projs_weight", "x_proj.weight"])
def test_projections_of_the_scans_are_decayed(demo_model, ending):
    found = {n: p for n, p in demo_model.named_parameters() if n.endswith(ending)}
    assert found
    assert all(is_decayed(name, parameter) for name, parameter in found.items())


def test_norms_are_not_decayed(demo_model):
    norms = (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
    names = {id(p): n for n, p in demo_model.named_parameters()}
    found = [p for m in demo_model.modules() if isinstance(m, norms) for p in m.parameters()]
    assert found
    assert not any(is_decayed(names[id(p)], p) for p in found)


def test_one_step_moves_every_trainable_parameter(demo_model):
    """Groups that hold a parameter are not enough: the step must change it."""
    config = load_config("demo").train
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.A_log = nn.Parameter(torch.ones(4, 2))
    optimizer = build_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    grouped = {id(p) for g in parameter_groups(model, 0.1) for p in g["params"]}
    assert grouped == {id(p) for p in model[1].parameters()}


@pytest.mark.parametrize("change", ["left out", "twice"])
def test_incomplete_groups_are_refused_by_name(change):
    model = nn.Sequential(nn.Linear(3, 3))
    weight, bias = model[0].weight, model[0].bias
    groups = [{"params": [weight]}, {"params": [] if change == "left out" else [bias, bias]}]
    with pytest.raises(RuntimeError, match=r"0\.bias"):
        check_complete(model, groups)


def test_schedule_warms_up_linearly_and_decays_to_zero():
    factors = [lr_at(s, total_steps=100, warmup_steps=10, power=0.9) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(factors[:9], factors[1:10], strict=True))
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[50] == pytest.approx(0.5**0.9)
    assert 0 < factors[-1] == pytest.approx(0.01**0.9)


def test_schedule_without_warm_up_starts_at_the_peak():
    assert lr_at(0, total_steps=5, warmup_steps=0, power=0.9) == 1.0
    assert lr_at(4, total_steps=5, warmup_steps=0, power=0.0) == 1.0


def test_moments_come_back_and_rates_stay_the_present_ones():
    config = load_config("demo").train
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, config)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = optimizer_state(optimizer, model)

    fresh = build_optimizer(model, config.model_copy(update={"weight_decay": 0.3}))
    load_optimizer_state(fresh, model, saved)
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][key], value)
    assert sorted(g["weight_decay"] for g in fresh.param_groups) == [0.0, 0.3]


def test_moments_of_another_network_are_refused():
    config = load_config("demo").train
    model, other = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    saved = optimizer_state(build_optimizer(other, config), other)
    with pytest.raises(InputError, match="another version of the network"):
        load_optimizer_state(build_optimizer(model, config), model, saved)
