"""LoRA-MoE: per-sample routing at any batch, the balance loss, and small maps."""

import pytest
import torch

from models.layers import pad_to_multiple
from models.moe import (
    Calibration,
    LowRankMoE,
    PatchAggregation,
    SemanticBranch,
    SpatialModulatingExpert,
    TopKRouter,
)


def make_moe(channels=8, ranks=(2, 4, 8)):
    torch.manual_seed(0)
    return LowRankMoE(channels, d_state=2, ranks=ranks)


def test_each_sample_runs_through_its_own_expert():
    """The batched products equal the experts run one by one."""
    moe = make_moe()
    x, k = torch.randn(6, 8, 5, 4), torch.randn(6, 8, 5, 4)
    choice = torch.tensor([0, 1, 2, 2, 0, 1])
    batched = moe._run_experts(x, k, choice)
    for i, expert in enumerate(choice.tolist()):
        single = moe.experts[expert](x[i : i + 1], k[i : i + 1])
        torch.testing.assert_close(batched[i], single[0], rtol=1e-5, atol=1e-6)


def test_only_chosen_experts_learn_and_all_are_in_the_graph():
    moe = make_moe()
    x = torch.randn(2, 8, 4, 4)
    moe._run_experts(x, x, torch.tensor([1, 1])).square().sum().backward()
    gradients = [expert.up.weight.grad for expert in moe.experts]
    assert gradients[1].abs().sum() > 0
    assert gradients[0].abs().sum() == gradients[2].abs().sum() == 0


@pytest.mark.parametrize("hw", [(5, 7), (1, 1), (16, 20)], ids=str)
def test_batch_equals_singles(hw):
    """Defect 3: the published MoE evaluates batch 1 only."""
    moe = make_moe().eval()
    torch.nn.init.normal_(moe.router.score.weight, std=20)  # so that samples choose differently
    x = torch.randn(6, 8, *hw)
    together, _ = moe(x)
    assert together.shape == x.shape
    for i in range(6):
        torch.testing.assert_close(moe(x[i : i + 1])[0][0], together[i], rtol=1e-4, atol=1e-5)


def test_router_is_the_softmax_of_the_average():
    torch.manual_seed(0)
    router = TopKRouter(4, num_experts=3)
    x = torch.randn(5, 4, 3, 3)
    choice, weight, _ = router(x)
    probability = router.score(x.mean((2, 3))).softmax(1)
    assert torch.equal(choice, probability.argmax(1))
    torch.testing.assert_close(weight, probability.amax(1))
    shares = torch.bincount(choice, minlength=3) / 5
    torch.testing.assert_close(router.shares, shares)


def test_balance_loss_prefers_an_even_load():
    router = TopKRouter(3, num_experts=3)
    with torch.no_grad():
        router.score.weight.copy_(20 * torch.eye(3))
        router.score.bias.zero_()
    even = torch.eye(3).view(3, 3, 1, 1)
    collapsed = even[[0, 0, 0]]
    torch.testing.assert_close(router(even)[2], torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(router(collapsed)[2], torch.tensor(3.0), rtol=1e-4, atol=1e-4)


def test_balance_loss_evens_out_a_collapsed_router():
    torch.manual_seed(0)
    router = TopKRouter(4, num_experts=3)
    with torch.no_grad():
        router.score.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
    x = torch.randn(64, 4, 1, 1)
    router(x)
    assert router.shares[0] == 1
    optimiser = torch.optim.SGD(router.parameters(), lr=0.5)
    for _ in range(100):
        optimiser.zero_grad()
        router(x)[2].backward()
        optimiser.step()
    assert router.shares.max() < 0.6


@pytest.mark.parametrize("hw", [(1, 1), (15, 20), (16, 16)], ids=str)
def test_calibration_takes_maps_smaller_than_its_stride(hw):
    calibration = Calibration(4)
    k = torch.randn(2, 4, *hw)
    assert calibration(k).shape == k.shape
    torch.nn.init.zeros_(calibration.conv.weight)
    torch.nn.init.zeros_(calibration.conv.bias)
    assert torch.equal(calibration(k), k)


@pytest.mark.parametrize("hw", [(8, 12), (7, 5)], ids=str)
def test_aggregation_is_the_strided_convolution(hw):
    aggregation = PatchAggregation(3)
    x = torch.randn(2, 3, *hw)
    padded = pad_to_multiple(x, 4, 4)
    expected = torch.nn.Conv2d.forward(aggregation, padded)
    torch.testing.assert_close(aggregation(x), expected)


def test_spatial_expert_reaches_along_both_axes():
    """1x11 then 11x1: a change is seen 5 pixels away along rows and columns."""
    torch.manual_seed(0)
    expert = SpatialModulatingExpert(4).eval()
    x = torch.randn(1, 4, 21, 21)
    before = expert(x)
    x[..., 10, 10] += 1
    changed = (expert(x) != before).any(1)[0]
    assert changed[10, 5]
    assert changed[5, 10]
    assert not changed[10, 2]
    assert not changed[2, 10]


@pytest.mark.parametrize("training", [True, False])
def test_branch_takes_one_image_with_a_1x1_map(training):
    branch = SemanticBranch(8, d_state=2).train(training)
    out, balance = branch(torch.randn(1, 8, 1, 1), torch.randn(1, 8, 1, 1))
    assert out.shape == (1, 8, 1, 1)
    assert balance.shape == ()
    assert torch.isfinite(out).all()


def test_all_parameters_get_a_gradient():
    branch = SemanticBranch(8, d_state=2)
    out, balance = branch(torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6))
    (out.square().mean() + balance).backward()
    assert [name for name, p in branch.named_parameters() if p.grad is None] == []
