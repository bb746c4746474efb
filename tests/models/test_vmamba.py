"""The encoder against the original VMamba-Tiny: outputs, names, and strict loading of its file."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from models.pretrained import load_vmamba
from models.vmamba import VMambaEncoder
from utils.errors import InputError

VECTORS = [(0, (2, 3, 64, 96), "0_2x3x64x96"), (1, (1, 3, 72, 104), "1_1x3x72x104")]


@pytest.fixture(scope="module")
def formula(shared_parity):
    spec = importlib.util.spec_from_file_location(
        "formula_weights", shared_parity / "formula_weights.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def official_shapes(shared_parity):
    return json.loads((shared_parity / "vmamba_tiny_checkpoint_keys.json").read_text())


@pytest.fixture(scope="module")
def official_file(official_shapes, tmp_path_factory):
    """A checkpoint with the official file's 276 names and shapes."""
    path = tmp_path_factory.mktemp("pretrained") / "vmamba.pth"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*shape, generator=generator) for name, shape in official_shapes.items()
    }
    torch.save({"model": tensors}, path)
    return path


@pytest.mark.parametrize(("seed", "shape", "file"), VECTORS, ids=["even", "batch1"])
def test_outputs_are_the_originals(seed, shape, file, formula, shared_parity):
    """The vectors take the input as it is, so the encoder must not standardise it here."""
    encoder = VMambaEncoder(image_mean=(0, 0, 0), image_std=(1, 1, 1)).eval()
    encoder.load_state_dict(
        {
            name: torch.from_numpy(formula.fill(name, tuple(value.shape), seed))
            for name, value in encoder.state_dict().items()
        }
    )
    expected = np.load(shared_parity / f"vmamba_tiny_seed{file}.npz")
    x = torch.from_numpy(formula.image(shape, seed))
    with torch.no_grad():
        outputs = {"patch_embed": encoder.patch_embed(x)}
        outputs |= {f"stage{i}": feature for i, feature in enumerate(encoder(x))}
    for name, ours in outputs.items():
        error = np.abs(ours.numpy() - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1e-4, f"{name}: {error:.1e} of the largest value"


def test_names_and_shapes_are_the_official_ones(official_shapes):
    ours = {name: list(value.shape) for name, value in VMambaEncoder().state_dict().items()}
    official = {k: v for k, v in official_shapes.items() if not k.startswith("classifier.")}
    assert len(official_shapes) == 276
    assert ours == official


def test_official_file_fills_every_tensor(official_file, official_shapes):
    encoder = VMambaEncoder()
    report = load_vmamba(encoder, official_file)
    tensors = torch.load(official_file, weights_only=True)["model"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    assert len(report.loaded) == 272
    assert report.missing == ()
    assert report.unexpected == tuple(sorted(n for n in official_shapes if "classifier" in n))


def _drop(tensors):
    del tensors["layers.2.blocks.5.op.Ds"]


def _add(tensors):
    tensors["layers.9.norm.weight"] = torch.zeros(3)


def _reshape(tensors):
    tensors["patch_embed.0.bias"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "lacks layers.2.blocks.5.op.Ds"),
        (_add, "adds layers.9.norm.weight"),
        (_reshape, r"patch_embed.0.bias \(7,\) instead of \(48,\)"),
    ],
)
def test_a_file_of_another_network_is_refused_by_name(official_file, tmp_path, change, message):
    content = torch.load(official_file, weights_only=True)
    change(content["model"])
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=message):
        load_vmamba(VMambaEncoder(), path)


def test_missing_truncated_and_foreign_files(official_file, tmp_path):
    encoder = VMambaEncoder(depths=(1, 1, 1, 1), widths=(16, 16, 16, 16))
    with pytest.raises(InputError, match=r"download_pretrained.py vmamba"):
        load_vmamba(encoder, tmp_path / "nowhere.pth")
    truncated = tmp_path / "short.pth"
    truncated.write_bytes(official_file.read_bytes()[:10_000])
    with pytest.raises(InputError, match="cannot be read"):
        load_vmamba(encoder, truncated)
    for page in ("<!DOCTYPE html><html></html>", "error code: 1020", ""):
        path = tmp_path / "page.pth"
        path.write_text(page)
        with pytest.raises(InputError, match="cannot be read"):
            load_vmamba(encoder, path)
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {}}, other)
    with pytest.raises(InputError, match='under the key "model"'):
        load_vmamba(encoder, other)


@pytest.mark.parametrize("hw", [(32, 32), (33, 47), (70, 100)], ids=str)
def test_any_size(hw):
    encoder = VMambaEncoder(depths=(1, 1, 1, 1), widths=(16, 32, 48, 64))
    maps = encoder(torch.rand(2, 3, *hw))
    for stage, feature in enumerate(maps):
        sides = tuple(-(-side // (4 * 2**stage)) for side in hw)
        assert feature.shape == (2, (16, 32, 48, 64)[stage], *sides)


def test_input_is_standardised_by_buffers_that_no_checkpoint_holds():
    torch.manual_seed(0)
    encoder = VMambaEncoder(depths=(1, 1, 1, 1), widths=(16, 32, 48, 64)).eval()
    plain = VMambaEncoder(
        depths=(1, 1, 1, 1), widths=(16, 32, 48, 64), image_mean=(0, 0, 0), image_std=(1, 1, 1)
    ).eval()
    plain.load_state_dict(encoder.state_dict())
    x = torch.rand(1, 3, 40, 40)
    standardised = (x - encoder.mean) / encoder.std
    for ours, expected in zip(encoder(x), plain(standardised), strict=True):
        torch.testing.assert_close(ours, expected)


def test_drop_path_rises_linearly():
    encoder = VMambaEncoder(drop_path=0.2)
    rates = [block.drop_path.p for layer in encoder.layers for block in layer.blocks]
    torch.testing.assert_close(rates, torch.linspace(0, 0.2, 14).tolist())


def test_drop_path_draws_for_each_image_and_branch():
    torch.manual_seed(0)
    block = VMambaEncoder(drop_path=0.5).layers[-1].blocks[-1].train()
    of_op, of_mlp = block.draw(torch.zeros(400, 1, 1, 1))
    for kept in (of_op, of_mlp):
        assert set(kept.unique().tolist()) == {0, 2}
        assert 140 < (kept == 0).sum() < 260
    assert 140 < (of_op != of_mlp).sum() < 260
    assert block.eval().draw(torch.zeros(1, 1, 1, 1)) == ()
