"""GraphedModel gives what the network gives, recorded or not."""

import pytest
import torch

from configs import load_config
from engine.graphs import GraphedModel
from models import build_model

SETTINGS = ["model.text_prior=orthogonal", "model.pretrained=none"]


def make_model(device="cpu"):
    torch.manual_seed(0)
    return build_model(load_config("demo", SETTINGS)).to(device).eval()


def pair(height, width, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 3, height, width, generator=generator).to(device) for _ in range(2)]


@torch.inference_mode()
def test_passes_through_on_a_cpu():
    model = make_model()
    graphed = GraphedModel(model)
    for seed in range(3):
        inputs = pair(40, 48, seed)
        for ours, expected in zip(graphed(*inputs), model(*inputs), strict=True):
            assert torch.equal(ours, expected)
    one_channel = graphed(inputs[0], inputs[1][:, :1])
    repeated = model(inputs[0], inputs[1][:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(one_channel.logits, repeated.logits)


def test_refuses_a_network_in_training():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        GraphedModel(make_model().train())(*pair(40, 48, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    def test_equals_the_network(self):
        """Sizes in turn, more of them than are kept; a result outlives the next call."""
        model = make_model("cuda")
        graphed = GraphedModel(model, most_graphs=2)
        earlier = []
        for round_ in range(5):
            for index, size in enumerate([(40, 48), (64, 96), (33, 47)]):
                inputs = pair(*size, seed=3 * round_ + index, device="cuda")
                with torch.inference_mode():
                    expected = model(*inputs)
                earlier.append((graphed(*inputs), expected))
        for ours, expected in earlier:
            torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.fused, expected.fused, rtol=1e-4, atol=1e-4)

    def test_sees_weights_that_change_in_place(self):
        model = make_model("cuda")
        graphed = GraphedModel(model)
        inputs = pair(64, 96, seed=0, device="cuda")
        before = [graphed(*inputs).fused for _ in range(4)][-1]
        with torch.no_grad():
            model.fusion_head.project.bias.add_(1.0)
            expected = model(*inputs).fused
        after = graphed(*inputs).fused
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
