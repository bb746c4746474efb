"""The whole network: any size, any batch, train and eval, and the published defects."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from configs import load_config
from engine.inference import use_tf32
from models import CMFSOutput, build_model, check_scan_backend
from models.fsc import FourierBranch, SpatialBranch, WaveletBranch
from models.heads import GradientResidualBlock
from models.layers import Recomputed
from models.mia import RegionModalInteraction, ShuffleMambaBlock
from models.moe import LowRankMoEBlock, SpatialModulatingExpert
from models.ops.cuda import library
from models.ops.haar import haar_dwt2
from models.ops.selective_scan import dispatch
from models.ss2d import SS2D
from models.text_prior import TextPrior
from models.vmamba import VSSBlock
from tests.ops.emulator import needs_compiler
from tests.recompute import LIGHT
from utils.errors import InputError

SIZES = [(64, 96), (33, 47), (32, 32)]


@pytest.fixture
def config():
    return load_config("demo", ["train.crop=[64,96]"])


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return build_model(config)


def images(hw, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, 3, *hw, generator=generator) for _ in range(2))


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_any_size_batch_and_mode(model, hw, batch, training):
    output = model.train(training)(*images(hw, batch))
    assert isinstance(output, CMFSOutput)
    assert output.logits.shape == (batch, 5, *hw)
    assert output.fused.shape == (batch, 3, *hw)
    assert output.balance_loss.shape == ()
    assert 0 <= output.fused.min() <= output.fused.max() <= 1
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("hw", SIZES, ids=str)
def test_batch_equals_singles(model, hw):
    model.eval()
    rgb, thermal = images(hw, batch=3)
    with torch.no_grad():
        together = model(rgb, thermal)
        for i in range(3):
            single = model(rgb[i : i + 1], thermal[i : i + 1])
            assert (single.logits[0] - together.logits[i]).abs().max() < 1e-4
            assert (single.fused[0] - together.fused[i]).abs().max() < 1e-4


def test_float64_is_float64_throughout(model):
    pair = list(images((33, 47)))
    with torch.no_grad():
        output = model.eval()(*pair)
        exact = model.double()(*(x.double() for x in pair))
    for ours, truth in zip(output, exact, strict=True):
        assert truth.dtype == torch.float64
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cuda", "triton", "mamba_ssm"])
def test_a_scan_backend_that_cannot_run_here_is_named(backend):
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=f"model.scan_backend={backend}: .* needs"):
        check_scan_backend(backend, cpu)
    for other in ("auto", "chunked", "reference"):
        check_scan_backend(other, cpu)


def test_every_parameter_gets_a_gradient(model):
    output = model(*images((64, 96)))
    (output.logits.square().mean() + output.fused.mean() + output.balance_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_paper_s_size_takes_odd_images_in_any_batch():
    torch.manual_seed(0)
    options = ["model.text_prior=orthogonal", "model.pretrained=none"]
    model = build_model(load_config("mfnet", options))
    rgb, thermal = images((33, 47))
    output = model(rgb, thermal)
    (output.logits.square().mean() + output.fused.mean() + output.balance_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        together, single = model(rgb, thermal), model(rgb[:1], thermal[:1])
    assert together.logits.shape == (2, 9, 33, 47)
    assert (single.logits[0] - together.logits[0]).abs().max() < 1e-4
    assert (single.fused[0] - together.fused[0]).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_gradients"),
    [(torch.float32, 1e-3, 1e-2), (torch.bfloat16, 0.1, 0.5)],  # bfloat16 has 8 bits
    ids=["float32", "bfloat16"],
)
def test_a_gpu_gives_the_outputs_and_gradients_of_the_cpu(
    model, hw, dtype, tolerance, of_gradients
):
    use_tf32(False)
    model.eval()  # batch statistics of a 1x1 map would enlarge any rounding
    found = []
    for device in ("cpu", "cuda"):
        network = model.to(device)
        network.zero_grad()
        with torch.autocast(device, dtype, enabled=device == "cuda" and dtype != torch.float32):
            output = network(*(image.to(device) for image in images(hw)))
        (output.logits.float().square().mean() + output.fused.float().mean()).backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        found.append([x.detach().float().cpu() for x in (output.logits, output.fused, gradient)])
    for expected, given, limit in zip(*found, (tolerance, tolerance, of_gradients), strict=True):
        assert given.isfinite().all()
        assert (given - expected).norm() <= limit * expected.norm()


def test_bfloat16_autocast(model):
    model.eval()
    rgb, thermal = images((64, 96))
    with torch.no_grad():
        exact = model(rgb, thermal)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(rgb, thermal)
    assert (rounded.fused.float() - exact.fused).abs().max() < 0.05
    assert (rounded.logits.float() - exact.logits).norm() / exact.logits.norm() < 0.1


@pytest.mark.slow
def test_compiles_without_a_graph_break(model):
    pair = list(images((32, 40)))
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ours, expected in zip(compiled(*pair), model(*pair), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Dynamo detected")  # what it warns of, others break at
@pytest.mark.skipif(torch.__version__.startswith("2.4"), reason="it takes no such tensors")
def test_compiles_for_a_gpu_without_a_graph_break(model, monkeypatch):
    """What a compiler sees there, also where there is none: tensors that have all but values."""
    monkeypatch.setattr(library, "_find_reason", lambda: None)
    monkeypatch.setattr(dispatch, "_find_fastest", lambda *_: "cuda")
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: _on_gpu(x) for name, x in tensors.items()})
        output = compiled(*(torch.empty(2, 3, 32, 40, device="cuda") for _ in range(2)))
    assert output.logits.shape == (2, 5, 32, 40)
    assert output.fused.is_cuda


def _on_gpu(x):
    if x is None:
        return None
    there = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return nn.Parameter(there, x.requires_grad) if isinstance(x, nn.Parameter) else there


def test_one_channel_thermal_is_repeated(model):
    model.eval()
    rgb, thermal = images((32, 40))
    with torch.no_grad():
        one = model(rgb, thermal[:, :1])
        three = model(rgb, thermal[:, :1].repeat(1, 3, 1, 1))
    assert torch.equal(one.fused, three.fused)


def test_state_dict_round_trip(config, model):
    model.eval()
    other = build_model(config, from_checkpoint=True).eval()
    other.load_state_dict(model.state_dict())
    rgb, thermal = images((32, 40))
    with torch.no_grad():
        assert torch.equal(other(rgb, thermal).logits, model(rgb, thermal).logits)


@pytest.mark.parametrize(
    ("rgb", "thermal", "message"),
    [
        ((1, 3, 31, 64), (1, 3, 31, 64), "at least 32x32, got 31x64"),
        ((1, 3, 64, 64), (1, 3, 64, 60), "same size"),
        ((1, 1, 64, 64), (1, 1, 64, 64), r"rgb must be \(B, 3, H, W\)"),
    ],
)
def test_wrong_images_are_named(model, rgb, thermal, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(rgb), torch.zeros(thermal))


def test_fusion_maps_come_after_fsc_and_the_next_stage_before_it(model):
    """F'' = F' + FSC(F') feeds the heads; F' goes on to the next stage."""
    seen = {}
    model.rgb_encoder.layers[0].downsample.register_forward_pre_hook(
        lambda module, args: seen.update(next_stage=args[0])
    )
    model.rgb_fsc[0].register_forward_hook(
        lambda module, args, output: seen.update(before=args[0], fsc=output)
    )
    model.fusion_head.register_forward_pre_hook(lambda module, args: seen.update(head=args[0][0]))
    model.eval()(*images((32, 40)))
    assert torch.equal(seen["next_stage"], seen["before"])
    assert torch.equal(seen["head"], seen["before"] + seen["fsc"])


def test_both_encoders_have_their_own_weights(model):
    rgb = {id(p) for p in model.rgb_encoder.parameters()}
    assert not rgb & {id(p) for p in model.thermal_encoder.parameters()}


def test_expert_shares(model):
    model(*images((32, 40), batch=4))
    shares = model.expert_shares()
    assert shares.shape == (8, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(8))


class TestDefects:
    """Section 8 of the method: what the published code got wrong stays right here."""

    def test_4_no_clip_network_inside(self, model):
        priors = [m for m in model.modules() if isinstance(m, TextPrior)]
        assert len(priors) == 1
        assert list(priors[0].parameters()) == []
        assert not any("clip" in type(m).__module__ for m in model.modules())
        tiny = build_model(
            load_config("mfnet", ["model.text_prior=orthogonal", "model.pretrained=none"])
        )
        assert sum(p.numel() for p in tiny.parameters()) < 140e6

    def test_5_each_downsampling_runs_once(self, model):
        calls = []
        for encoder in (model.rgb_encoder, model.thermal_encoder):
            for layer in encoder.layers[:-1]:
                layer.downsample.register_forward_hook(lambda *args: calls.append(args[0]))
        model(*images((32, 40)))
        assert len(calls) == 6

    def test_5_no_module_is_built_in_forward(self, model, monkeypatch):
        model(*images((32, 40)))

        def refuse(self, *args, **kwargs):
            raise AssertionError("a module was built in forward")

        monkeypatch.setattr(nn.Module, "__init__", refuse)
        model(*images((32, 40)))
        haar_dwt2(torch.zeros(1, 1, 4, 4))


class TestBuild:
    """What the builder refuses, and in which words."""

    def test_missing_text_prior_gives_the_command(self, tmp_path):
        config = load_config("demo", [f"model.text_prior={tmp_path}/clip_text_demo.safetensors"])
        with pytest.raises(InputError, match=r"tools/export_text_prior.py"):
            build_model(config)

    def test_missing_vmamba_weights_give_the_command(self, tmp_path):
        config = load_config("demo", [f"model.pretrained={tmp_path}/vmamba.pth"])
        with pytest.raises(InputError, match=r"tools/download_pretrained.py"):
            build_model(config)

    def test_pretrained_fills_both_encoders(self, tmp_path, config, model):
        path = tmp_path / "vmamba.pth"
        tensors = {n: torch.randn_like(v) for n, v in model.rgb_encoder.state_dict().items()}
        torch.save({"model": tensors}, path)
        built = build_model(load_config("demo", [f"model.pretrained={path}"]))
        for encoder in (built.rgb_encoder, built.thermal_encoder):
            for name, value in encoder.state_dict().items():
                assert torch.equal(value, tensors[name]), name

    def test_scan_backend_reaches_every_scan(self):
        built = build_model(load_config("demo", ["model.scan_backend=reference"]))
        backends = [m.scan_backend for m in built.modules() if hasattr(m, "scan_backend")]
        assert len(backends) > 20
        assert set(backends) == {"reference"}

    def test_source_of_the_text_prior_is_known(self, model):
        assert "orthogonal" in model.text_prior.source


class Made(TorchDispatchMode):
    """Notes the operators that run, and the memory that they make."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self.made = {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        self.operators.append(operator.name())
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def kept_bytes(self):
        return sum(size for storage, size in self.made.values() if not storage.expired())


def gradients_and_kept_bytes(model):
    """Of one training step with dropout and drop path: gradients, buffers, bytes kept for them."""
    torch.manual_seed(1)
    with Made() as forward:
        output = model.train()(*images((64, 96)))
        kept = forward.kept_bytes()
    loss = output.logits.square().mean() + output.fused.mean() + output.balance_loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return gradients, buffers, kept


@pytest.mark.parametrize("which", [LIGHT, "true"])
def test_recompute_changes_memory_alone(which):
    settings = ["train.crop=[64,96]", "model.drop_path=0.5"]
    results = []
    for recompute in ("false", which):
        torch.manual_seed(0)
        config = load_config("demo", [*settings, f"model.recompute={recompute}"])
        results.append(gradients_and_kept_bytes(build_model(config)))
    (plain, plain_buffers, plain_bytes), (ours, our_buffers, our_bytes) = results
    for expected, gradient in zip(plain, ours, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    for name, buffer in plain_buffers.items():  # BatchNorm counts each batch once
        assert torch.equal(our_buffers[name], buffer), name
    assert our_bytes < 0.5 * plain_bytes


@needs_compiler
@pytest.mark.parametrize(
    ("which", "again"), [pytest.param("light", False, marks=LIGHT.marks), ("true", True)]
)
def test_light_recompute_runs_no_scan_of_the_network_again(which, again):
    settings = ["model.scan_backend=native", f"model.recompute={which}"]
    output = build_model(load_config("demo", settings)).train()(*images((32, 32)))
    with Made() as backward:
        output.logits.sum().backward()
    forward = {"cmfs::selective_scan_native", "cmfs::ss2d_scan_native"}
    assert {f"{name}_backward" for name in forward} <= set(backward.operators)
    assert forward & set(backward.operators) == (forward if again else set())


def test_which_parts_are_computed_anew(model):
    """All that may be, but an SS2D inside another: that of the segmentation head stands alone."""
    for which in ("light", True, False):
        model.set_recompute(which)
        for name, part in model.named_modules():
            if isinstance(part, Recomputed):
                is_inside = isinstance(part, SS2D) and name != "segmentation_head.ss2d"
                assert part.recompute == (False if is_inside else which), name
    kinds = {type(m) for m in model.modules() if isinstance(m, Recomputed)}
    assert kinds == {
        VSSBlock, SS2D, ShuffleMambaBlock, RegionModalInteraction, WaveletBranch, SpatialBranch,
        FourierBranch, LowRankMoEBlock, SpatialModulatingExpert, GradientResidualBlock,
    }  # fmt: skip


def test_recomputed_parts_hold_no_batch_norm(model):
    model.set_recompute(True)
    parts = [part for part in model.modules() if getattr(part, "recompute", False)]
    assert parts
    assert not any(isinstance(m, nn.BatchNorm2d) for part in parts for m in part.modules())
