"""The release file: small, whole, without a trace of this machine, and read everywhere."""

import json

import pytest
import safetensors
import torch

import predict
from configs import load_config
from engine.checkpoint import load_checkpoint, load_model, save_checkpoint, select_checkpoints
from models import build_model
from tools.strip_checkpoint import main
from utils.download import file_sha256
from utils.errors import InputError


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with training state of a run in folders of its own."""
    config = load_config(
        "demo",
        [
            "train.crop=[32,32]",
            f"experiment_path={tmp_path / 'runs'}",
            f"data.dataset_path={tmp_path / 'secret'}",
            f"model.pretrained={tmp_path / 'secret' / 'vmamba.pth'}",
        ],
    )
    torch.manual_seed(1)
    model = build_model(config, from_checkpoint=True).eval()
    model.text_prior.source = "orthogonal"
    path = tmp_path / "epoch-5.pth"
    state = {"optimizer": {"moments": torch.zeros(100_000)}}
    save_checkpoint(
        path, model=model, config=config, epoch=5, step=40, training_state=state,
        metrics={"miou": 0.5},
    )  # fmt: skip
    return path, model


def test_release_file_is_the_network_and_nothing_else(saved, tmp_path, capsys):
    path, model = saved
    main([str(path)])
    out = tmp_path / "epoch-5.safetensors"
    found = load_checkpoint(out)
    assert found.model.keys() == model.state_dict().keys()
    assert all(torch.equal(found.model[k], v) for k, v in model.state_dict().items())
    assert (found.epoch, found.step, found.metrics) == (5, 40, {"miou": 0.5})
    assert found.training_state is None
    assert out.stat().st_size < path.stat().st_size - 300_000
    assert str(tmp_path).encode() not in out.read_bytes()
    with safetensors.safe_open(str(out), framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["model"]["pretrained"] == "pretrained/vmamba.pth"
    assert config["data"]["class_names"][1] == "person"
    assert file_sha256(out) in capsys.readouterr().out
    assert file_sha256(out) in (tmp_path / "epoch-5.safetensors.sha256").read_text()


def test_every_loader_reads_it(saved, tmp_path):
    path, model = saved
    out = tmp_path / "cmfs.safetensors"
    main([str(path), "--out", str(out)])
    assert select_checkpoints(tmp_path, str(out)) == [out]
    loaded, _ = load_model(out, device="cpu", config=load_config("demo"))
    rgb, thermal = torch.rand(2, 1, 3, 32, 32).unbind(0)
    with torch.no_grad():
        assert torch.equal(loaded(rgb, thermal).logits, model(rgb, thermal).logits)
    assert torch.equal(
        predict.load(out, torch.device("cpu"), [])[0].state_dict()["fusion_head.project.weight"],
        model.state_dict()["fusion_head.project.weight"],
    )


def test_nothing_is_overwritten(saved, tmp_path):
    path, _ = saved
    (tmp_path / "epoch-5.safetensors").write_text("mine")
    with pytest.raises(InputError, match="exists; remove it, or choose another name"):
        main([str(path)])
    assert (tmp_path / "epoch-5.safetensors").read_text() == "mine"


def test_another_format_is_refused(saved):
    with pytest.raises(InputError, match="must end in .safetensors"):
        main([str(saved[0]), "--out", "x.pth"])
