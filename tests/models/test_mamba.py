"""The 1-D mixers: causality, direction, own parameters per pass."""

import torch

from models.mamba import BidirectionalMamba, CausalScan, Mamba


def test_mamba_is_causal():
    torch.manual_seed(0)
    mixer = Mamba(8, d_state=3)
    x = torch.randn(2, 8, 20)
    before = mixer(x)
    x[..., 12] += 1
    after = mixer(x)
    assert torch.equal(before[..., :12], after[..., :12])
    assert not torch.allclose(before[..., 12:], after[..., 12:])


def test_bidirectional_sees_both_sides():
    torch.manual_seed(0)
    mixer = BidirectionalMamba(8, d_state=3)
    x = torch.randn(1, 8, 20)
    before = mixer(x)
    x[..., 10] += 1
    changed = (mixer(x) != before).any(1)[0]
    assert changed.all()


def test_bidirectional_of_the_reversed_sequence_swaps_the_passes():
    torch.manual_seed(0)
    mixer = BidirectionalMamba(8, d_state=2)
    swapped = BidirectionalMamba(8, d_state=2)
    swapped.load_state_dict(mixer.state_dict())
    swapped.forward_scan, swapped.backward_scan = swapped.backward_scan, swapped.forward_scan
    x = torch.randn(2, 8, 13)
    torch.testing.assert_close(mixer(x.flip(-1)).flip(-1), swapped(x))
    assert not torch.allclose(mixer(x), swapped(x))


def test_scan_starts_with_small_steps_and_decays():
    """Mamba's start: softplus(dt bias) in [0.001, 0.1] and A = -1 … -N."""
    scan = CausalScan(64, rank=2, d_state=4)
    dt = torch.nn.functional.softplus(scan.dt_proj.bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    torch.testing.assert_close(-scan.A_log.exp()[5], torch.tensor([-1.0, -2.0, -3.0, -4.0]))


def test_all_parameters_get_a_gradient():
    mixer = BidirectionalMamba(4, d_state=2)
    mixer(torch.randn(1, 4, 9)).square().mean().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None] == []
