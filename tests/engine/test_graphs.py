"""Recorded forwards and gradients are those of the network itself."""

import contextlib
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from configs import load_config
from engine import graphs
from engine.graphs import GraphedGradient, GraphedModel
from engine.rounding import with_rounded_weights
from models import branches, build_model
from models.branches import side_by_side
from models.ops.ss2d_scan.orders import scan_orders
from utils.errors import InputError

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


class OnGPU(NamedTuple):
    """Stands in for images on a GPU."""

    shape: int
    is_cuda: bool = True

    def expand_as(self, _):
        return self


@pytest.mark.parametrize(
    ("sizes", "recorded"),
    [
        ([1, 2, 3] * 4, [1, 2]),  # in turn, one more than are kept
        ([1, 2] * 3 + [3] * 4, [1, 2, 3]),  # others come no more
        ([1] * 3 + [2] * 3 + [3] * 4 + [1] * 2, [1, 2, 3, 1]),
    ],
    ids=str,
)
def test_sizes_in_turn_are_not_recorded_again_and_again(monkeypatch, sizes, recorded):
    found = []

    def record(model, image, _):
        found.append(image.shape)
        return lambda *_: None

    monkeypatch.setattr(graphs, "_Graph", record)
    graphed = GraphedModel(nn.Identity().eval(), most_graphs=2)
    graphed.model.forward = lambda *_: None
    for size in sizes:
        graphed(OnGPU(size), OnGPU(size))
    assert found == recorded


class GraphOnCPU:
    """Stands in for a CUDA graph: what was recorded runs again, into the same memory."""

    def replay(self):
        graphed, parameters = self.graphed, self.graphed._parameters
        kept = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        result = graphed._compute(*graphed._arguments)
        for name, value in result.items():
            graphed._result[name].copy_(value)
        new = [p.grad for p in parameters if p.grad is not None]
        for own, gradient in zip(graphed._gradients, new, strict=True):
            own.copy_(gradient)
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", GraphOnCPU)
    for name in ("graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_replayed_gradients_add_up_as_launched_ones(graphs_on_cpu, parts):
    """Another size within a step included; a parameter that is not used has no gradient."""
    torch.manual_seed(0)
    layer, unused = nn.Linear(3, 2), nn.Parameter(torch.ones(4))

    def compute(x):
        loss = layer(x).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    parameters = [*layer.parameters(), unused]
    graphed = GraphedGradient(compute, parameters)
    graphed._graph.graphed = graphed
    results = []
    for step in range(5):
        sizes = [7 if (step, part) in ((3, 0), (4, parts - 1)) else 5 for part in range(parts)]
        batches = [torch.randn(size, 3) for size in sizes]
        gradients = []
        for function in (compute, graphed):
            for parameter in parameters:
                parameter.grad = None
            results.append([function(x)["loss"] for x in batches])
            gradients.append([p.grad.clone() for p in layer.parameters()])
            assert unused.grad is None
        torch.testing.assert_close(gradients[1], gradients[0])
    assert graphed.is_recorded
    torch.testing.assert_close(results[1::2], results[0::2])  # a replay leaves earlier ones alone


@pytest.mark.parametrize(("height", "is_side_by_side"), [(512, True), (513, False)])
def test_parts_of_small_images_alone_run_side_by_side(
    graphs_on_cpu, monkeypatch, height, is_side_by_side
):
    """Those of large ones fill a GPU by themselves, and would take several times the memory."""
    found = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def network(rgb, thermal):
        found.append(branches._streams.get() is not None)
        return rgb

    image = torch.zeros(1, 1, 1, 1).expand(1, 3, height, 1024)
    graphs._Graph(network, image, image)
    assert found == [is_side_by_side]


@pytest.mark.parametrize("is_side_by_side", [True, False])
def test_parts_of_a_step_run_side_by_side_where_it_is_asked_for(
    graphs_on_cpu, monkeypatch, is_side_by_side
):
    found = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    def compute(x):
        found.append(branches._streams.get() is not None)
        return x

    graphed = GraphedGradient(compute, [nn.Parameter(torch.ones(1))], side_by_side=is_side_by_side)
    graphed._record((torch.ones(1),))
    assert found == [is_side_by_side]


def test_a_recording_holds_the_scan_orders_that_it_reads(graphs_on_cpu):
    def compute(x):
        orders = scan_orders(3, 5, "cross", 4, x.device)
        return {"orders": orders[0].clone(), "address": orders[0].data_ptr()}

    graphed = GraphedGradient(compute, [nn.Parameter(torch.ones(1))])
    graphed._record((torch.ones(1),))
    addresses = [order.data_ptr() for order, _ in graphed._orders]
    assert addresses == [graphed._result["address"]]


def test_what_cannot_be_recorded_names_the_setting(graphs_on_cpu):
    calls = []

    def compute(x):
        calls.append(x)
        if len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedGradient(compute, [nn.Parameter(torch.ones(1))])
    for _ in range(2):
        graphed(torch.ones(1))
    with pytest.raises(InputError, match="not permitted.*train.cuda_graph=false launches it"):
        graphed(torch.ones(1))


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

    def test_branches_leave_one_another_alone(self):
        """The paper's network, whose parts run side by side: the same numbers, many times over.

        Again in further recordings: streams are given out in turn, and come again.
        """
        torch.manual_seed(0)
        model = build_model(load_config("mfnet", SETTINGS)).to("cuda").eval()
        for _ in range(8):
            graphed = GraphedModel(model)
            for seed in range(6):
                inputs = pair(96, 160, seed, device="cuda")
                with torch.inference_mode():
                    expected = model(*inputs)
                ours = graphed(*inputs)
                torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(ours.fused, expected.fused, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("precision", "recompute"), [("float32", "false"), ("bf16", "light"), ("bf16", "true")]
    )
    def test_gradients_of_branches_leave_one_another_alone(self, monkeypatch, precision, recompute):
        """The paper's network in training, side by side and in turn, in several recordings.

        The same random numbers are drawn. In turn twice, because sums of other orders differ, in
        bfloat16 by more.
        """
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        settings = [*SETTINGS, f"model.recompute={recompute}", "model.drop_path=0.2"]
        torch.manual_seed(0)
        model = build_model(load_config("mfnet", settings)).to("cuda").train()
        parameters = list(model.parameters())
        dtype = torch.bfloat16 if precision == "bf16" else None

        def compute(rgb, thermal):
            def differentiate(model):
                with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                    output = model(rgb, thermal)
                loss = output.logits.float().square().mean() + output.fused.float().mean()
                (loss + output.balance_loss).backward()
                return loss.detach()

            return with_rounded_weights(model, dtype, differentiate)

        gradients = []
        for is_side_by_side in (False, False, True, True):
            graphed = GraphedGradient(compute, parameters, side_by_side=is_side_by_side)
            torch.manual_seed(4)
            for seed in (0, 0, 0, 1, 2, 3):
                for parameter in parameters:
                    parameter.grad = None
                graphed(*pair(96, 160, seed, device="cuda"))
                if seed:
                    gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
            del graphed
        expected, again, *ours = (gradients[i : i + 3] for i in range(0, len(gradients), 3))
        for found in ours:
            for a, b, c in zip(expected, again, found, strict=True):
                noise = (a - b).norm() + 1e-5 * a.norm()
                assert (c - a).norm() < 5 * noise

    def test_a_full_gpu_is_seen_as_such(self):
        """Where the gradient of a part on another stream finds no memory."""

        class Fill(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                if torch.cuda.is_current_stream_capturing():
                    grad = grad.repeat(2**50)
                return grad

        weight = nn.Parameter(torch.ones(3, device="cuda"))

        def compute(x):
            ours, other = side_by_side(
                partial(torch.mul, weight, x), partial(Fill.apply, x * weight)
            )
            (ours + other).sum().backward()
            return x

        graphed = GraphedGradient(compute, [weight], side_by_side=True)
        x = torch.ones(3, device="cuda")
        for _ in range(2):
            graphed(x)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            graphed(x)

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
