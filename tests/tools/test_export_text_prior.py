"""The CLIP text export: features as open_clip gives them, and a message for every wrong file."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from configs import load_config
from models.text_prior import CLIP_MODEL, load_text_prior
from tools import export_text_prior
from tools.export_text_prior import encode_prompts, read_clip
from utils.download import file_sha256
from utils.errors import InputError

PROMPTS = ("the photo of car", "the photo of person", "the photo of color cone")
GET_CONFIG = open_clip.get_model_config
SCRIPT = Path(export_text_prior.__file__)


def small_config(name: str) -> dict:
    """ViT-B-32 with one narrow layer a tower and the full vocabulary and feature width."""
    config = GET_CONFIG(name)
    config["vision_cfg"] |= {"layers": 1, "width": 64, "image_size": 64}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    return config


@pytest.fixture
def small(monkeypatch) -> nn.Module:
    """A random small CLIP in quick GELU; the tool expects the same size."""
    monkeypatch.setattr(open_clip, "get_model_config", small_config)
    return build(small_config(CLIP_MODEL))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The network of `small` as a TorchScript archive; tests copy it."""
    path = tmp_path_factory.mktemp("clip") / "ViT-B-32.pt"
    return save_archive(build(small_config(CLIP_MODEL)), path)


def build(config: dict) -> nn.Module:
    torch.manual_seed(0)
    return open_clip.CLIP(**config).eval()


def encode(network: nn.Module, prompts=PROMPTS) -> torch.Tensor:
    tokens = open_clip.get_tokenizer(CLIP_MODEL)(list(prompts))
    with torch.no_grad():
        return F.normalize(network.encode_text(tokens), dim=-1)


def save_archive(network: nn.Module, path: Path) -> Path:
    """A TorchScript archive like OpenAI's, its three extra numbers included."""
    for name, number in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        network.__dict__.pop(name, None)
        network.register_buffer(name, torch.tensor(number))
    tokens, image = torch.zeros(1, 77, dtype=torch.long), torch.zeros(1, 3, 64, 64)
    inputs = {"forward": (image, tokens), "encode_text": (tokens,), "encode_image": (image,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace_module(network, inputs).save(str(path))
    return path


def save_state(network: nn.Module, path: Path) -> Path:
    torch.save(network.state_dict(), path)
    return path


class TestFeatures:
    def test_archive(self, small, archive):
        expected = encode(small)
        got = encode_prompts(PROMPTS, read_clip(archive))
        assert got.shape == (3, 512) and got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.norm(dim=1), torch.ones(3))

    def test_state_dict_at_the_users_word(self, small, tmp_path):
        path = save_state(small, tmp_path / "clip.pt")
        got = encode_prompts(PROMPTS, read_clip(path, is_quick_gelu=True))
        assert torch.equal(got, encode(small))

    def test_training_checkpoint(self, small, tmp_path):
        state = {f"module.{name}": tensor for name, tensor in small.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
        weights = read_clip(tmp_path / "epoch_3.pt", is_quick_gelu=True)
        assert torch.equal(encode_prompts(PROMPTS, weights), encode(small))

    def test_half_precision_file_is_encoded_in_float32(self, small, tmp_path):
        small.half().float()  # values that half precision holds exactly
        expected = encode(small)
        path = tmp_path / "clip.safetensors"
        safetensors.torch.save_file(
            {n: t.half().contiguous() for n, t in small.state_dict().items()}, path
        )
        got = encode_prompts(PROMPTS, read_clip(path, is_quick_gelu=True))
        assert got.dtype == torch.float32 and torch.equal(got, expected)

    def test_config_beside_a_state_dict_tells_the_activation(self, small, tmp_path):
        path = save_state(small, tmp_path / "open_clip_pytorch_model.bin")
        config = tmp_path / "open_clip_config.json"
        config.write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
        assert torch.equal(encode_prompts(PROMPTS, read_clip(path)), encode(small))
        config.write_text(json.dumps({"model_cfg": {"embed_dim": 512}}))
        with pytest.raises(InputError, match="trained with plain GELU"):
            read_clip(path, is_quick_gelu=True)
        config.write_text("{}")
        with pytest.raises(InputError, match="is no config of open_clip"):
            read_clip(path)


class TestWrongFile:
    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match="not found; run `python tools/download_pretrained"):
            read_clip(tmp_path / "ViT-B-32.pt")

    def test_page(self, tmp_path):
        path = tmp_path / "ViT-B-32.pt"
        path.write_text("<!doctype html><title>404</title>")
        with pytest.raises(InputError, match="is a web page"):
            read_clip(path)

    @pytest.mark.parametrize("kind", ["archive", "state", "safetensors"])
    @pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
    def test_cut_short(self, small, archive, tmp_path, kind, part):
        path = tmp_path / ("clip.safetensors" if kind == "safetensors" else "clip.pt")
        if kind == "safetensors":
            safetensors.torch.save_file(small.state_dict(), path)
        elif kind == "state":
            save_state(small, path)
        content = (archive if kind == "archive" else path).read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(InputError, match="cannot be read: it is cut short"):
            read_clip(path, is_quick_gelu=True)

    def test_pickled_program(self, tmp_path):
        path = tmp_path / "clip.pt"
        torch.save({"state_dict": nn.Linear(1, 1)}, path)
        with pytest.raises(InputError, match="holds more than tensors"):
            read_clip(path, is_quick_gelu=True)

    def test_archive_in_plain_gelu(self, small, tmp_path):
        path = save_archive(build(small_config("ViT-B-32")), tmp_path / "clip.pt")
        with pytest.raises(InputError, match="trained with plain GELU"):
            read_clip(path, is_quick_gelu=True)

    def test_state_dict_that_does_not_tell(self, small, tmp_path):
        with pytest.raises(InputError, match="does not tell its activation.*--quick-gelu"):
            read_clip(save_state(small, tmp_path / "clip.pt"))

    def test_other_patch_size(self, small, tmp_path):
        """ViT-B/16 has the same text tower: only the image tower tells them apart."""
        state = small.state_dict()
        state["visual.conv1.weight"] = torch.zeros(64, 3, 16, 16)
        torch.save(state, tmp_path / "ViT-B-16.pt")
        message = r"visual.conv1.weight \(64, 3, 16, 16\) instead of \(64, 3, 32, 32\)"
        with pytest.raises(InputError, match=message):
            read_clip(tmp_path / "ViT-B-16.pt", is_quick_gelu=True)

    @pytest.mark.parametrize(
        "content", [{"fc.weight": torch.zeros(2, 2)}, [1, 2], {"state_dict": 3}], ids=str
    )
    def test_other_network(self, small, tmp_path, content):
        torch.save(content, tmp_path / "resnet.pth")
        with pytest.raises(InputError, match="another network than CLIP ViT-B/32.*it lacks"):
            read_clip(tmp_path / "resnet.pth", is_quick_gelu=True)

    def test_other_archive(self, small, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "linear.pt"))
        with pytest.raises(InputError, match="another network.*it adds weight and 1 more"):
            read_clip(tmp_path / "linear.pt")


class TestCommand:
    def test_writes_what_training_reads(self, small, archive, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        expected = encode(small, load_config("mfnet").data.prompts)
        Path("pretrained").mkdir()
        shutil.copy(archive, "pretrained/ViT-B-32.pt")
        export_text_prior.main(["-n", "MFNet"])
        config = load_config("mfnet")
        features, source = load_text_prior(config.text_prior, config.data.prompts)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
        sha256 = file_sha256("pretrained/ViT-B-32.pt")
        assert sha256[:16] in source and "ViT-B-32.pt" in source and CLIP_MODEL in source
        printed = capsys.readouterr().out
        assert sha256 in printed and "8 prompts" in printed and "to use it" not in printed

    def test_own_prompt_and_place(self, small, archive, tmp_path, capsys):
        out = tmp_path / "new" / "prior.safetensors"
        prompt = "a thermal photo of a {}"
        arguments = ["-n", "demo", "--clip", str(archive), "--out", str(out)]
        export_text_prior.main([*arguments, "--set", f"data.prompt={prompt}"])
        config = load_config("demo", [f"data.prompt={prompt}"])
        features, _ = load_text_prior(out, config.data.prompts)
        assert features.shape == (4, 512)
        assert f"--set model.text_prior={out}" in capsys.readouterr().out
        with pytest.raises(InputError, match="'a thermal photo of a person' in the file"):
            load_text_prior(out, load_config("demo").data.prompts)

    def test_openai_by_open_clip(self, small, tmp_path, monkeypatch):
        asked = []
        clip = save_state(small, tmp_path / "model.bin")
        monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: asked.append(tag) or clip)
        out = tmp_path / "prior.safetensors"
        export_text_prior.main(["-n", "demo", "--clip", "openai", "--out", str(out)])
        assert asked == [open_clip.get_pretrained_cfg(CLIP_MODEL, "openai")]
        assert asked[0]["quick_gelu"] is True
        assert "openai" in load_text_prior(out, load_config("demo").data.prompts)[1]

        def refuse(tag):
            raise ConnectionError("no way out")

        monkeypatch.setattr(open_clip, "download_pretrained", refuse)
        with pytest.raises(InputError, match="could not fetch OpenAI's weights"):
            export_text_prior.main(["-n", "demo", "--clip", "openai", "--out", str(out)])

    def test_started_as_a_program(self, tmp_path):
        """Bad input is one line and exit code 2."""
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "-n", "mfnet"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 2
        assert result.stderr.startswith("error: CLIP weights pretrained/ViT-B-32.pt not found")
        assert "`python tools/download_pretrained.py clip`" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_real_size(tmp_path):
    """The network as it is, and the trap: in plain ViT-B-32 the same weights load and are wrong."""
    network = build(open_clip.get_model_config(CLIP_MODEL))
    path = save_state(network.half(), tmp_path / "clip.pt")
    out = tmp_path / "prior.safetensors"
    export_text_prior.main(["-n", "mfnet", "--clip", str(path), "--quick-gelu", "--out", str(out)])
    prompts = load_config("mfnet").data.prompts
    features, _ = load_text_prior(out, prompts)
    torch.testing.assert_close(features, encode(network.float(), prompts), rtol=0, atol=1e-6)
    plain = build(open_clip.get_model_config("ViT-B-32"))
    plain.load_state_dict(network.state_dict())
    assert (features - encode(plain, prompts)).norm(dim=1).min() > 0.005
