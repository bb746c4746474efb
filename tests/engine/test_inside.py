"""Gates and dt as hooks see them, against what the ops are given; the pictures made of them."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs import load_config
from engine.examples import Examples, heat_map
from engine.inside import look_inside
from models import build_model, mamba
from models.ops.ss2d_scan import reference

CPU = torch.device("cpu")


class Pairs(NamedTuple):
    rgb: torch.Tensor
    thermal: torch.Tensor
    label: torch.Tensor
    name: list[str]


class Prediction(NamedTuple):
    fused: torch.Tensor
    segmentation: torch.Tensor


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model(load_config("demo", ["train.crop=[32,32]"])).eval()


def pairs_of(size: int, height: int = 32, width: int = 40) -> Pairs:
    images = torch.rand(2, size, 3, height, width, generator=torch.Generator().manual_seed(1))
    return Pairs(*images, torch.zeros(size, height, width, dtype=torch.long), ["a"] * size)


def test_gates_and_dt_are_those_of_the_forward(model, monkeypatch):
    """dt in the ops is softplus of the delta that the module hands over, plus its bias."""
    given = {"ss2d": [], "causal": []}

    def recording(real, kind, bias_at):
        def scan(*arguments, **keywords):
            bias = arguments[bias_at] if bias_at else keywords["delta_bias"]
            given[kind].append(F.softplus(arguments[1] + bias[:, None]).flatten())
            return real(*arguments, **keywords)

        return scan

    monkeypatch.setattr(
        reference,
        "selective_scan_reference",
        recording(reference.selective_scan_reference, "ss2d", 6),
    )
    monkeypatch.setattr(mamba, "selective_scan", recording(mamba.selective_scan, "causal", None))
    monkeypatch.setattr("engine.inside._POSITIONS", 10**6)
    for module in model.modules():
        if hasattr(module, "scan_backend") and not isinstance(module, mamba.CausalScan):
            monkeypatch.setattr(module, "scan_backend", "reference")
    batch = pairs_of(1)
    inside = look_inside(model, batch.rgb, batch.thermal)
    expected = torch.cat([*given["ss2d"], *given["causal"]]).sort().values
    found = torch.cat(list(inside.dt.values())).sort().values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert {"rgb_encoder", "thermal_encoder", "mia", "rgb_fsc"} <= inside.dt.keys()
    assert [gate.shape for gate in inside.gates] == [(5, 5), (5, 5), (1, 1), (1, 1)]
    assert all(0 < value < 1 for gate in inside.gates for value in gate.flatten())


def test_no_hook_stays(model):
    batch = pairs_of(1)
    with pytest.raises(ValueError, match="at least 32x32"):
        look_inside(model, batch.rgb[..., :8], batch.thermal[..., :8])
    look_inside(model, batch.rgb, batch.thermal)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("crop", ["none", "[32,32]"])
def test_pictures_of_the_first_images(model, crop):
    config = load_config("demo", ["train.crop=[32,32]", f"eval.crop={crop}"])
    examples = Examples(config)
    for _ in range(3):
        batch = pairs_of(2)
        examples(batch, Prediction(batch.rgb, batch.label))
    sheets, histograms = examples.draw(model, CPU)
    width, gap, title = 320, 4, 28
    rows, height = 4, {"none": 256, "[32,32]": 320}[crop]
    assert sheets["examples"].shape[1] == 5 * (width + gap) - gap
    assert sheets["text_gates"].shape == (title + rows * (height + gap), 5 * (width + gap) - gap, 3)
    assert all(np.isfinite(values).all() and len(values) for values in histograms.values())
    assert "dt_log10/mia" in histograms


def test_nothing_seen_makes_no_picture(model):
    assert Examples(load_config("demo")).draw(model, CPU) == ({}, {})


def test_heat_map_is_dark_at_0_and_bright_at_1():
    picture = heat_map(np.array([[0.0, 1.0]]), (4, 6)).astype(int)
    assert picture.shape == (4, 6, 3)
    assert (picture[:, :3] == picture[0, 0]).all() and (picture[:, 3:] == picture[0, 5]).all()
    assert picture[0, 0].sum() < 20 and picture[0, 5].sum() > 600
