"""tools/score_fusion.py: one table for many methods, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.score_fusion import main, name_methods
from utils.errors import InputError
from utils.fusion_metrics import fusion_metrics
from utils.image import write_png

SIZES = {"a": (64, 72), "b": (64, 72), "c": (33, 64)}  # c is too small for VIF


def texture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folders(tmp_path) -> Path:
    """RGB, Modal and two methods: ours in colour, theirs in grey and with a file more."""
    for seed, (name, hw) in enumerate(SIZES.items()):
        write_png(tmp_path / "RGB" / f"{name}.png", texture(seed, *hw, 3))
        write_png(tmp_path / "Modal" / f"{name}.png", texture(10 + seed, *hw))
        write_png(tmp_path / "ours" / f"{name}.png", texture(20 + seed, *hw, 3))
        write_png(tmp_path / "theirs" / f"{name}.png", texture(30 + seed, *hw))
    write_png(tmp_path / "RGB" / "spare.png", texture(0, 32, 32, 3))
    return tmp_path


def call(folders: Path, *more: str) -> dict:
    """The content of scores.json; folders in `more` are relative to the fixture's."""
    main([str(folders / "RGB"), str(folders / "Modal"), *more, "--out", str(folders / "out")])
    return json.loads((folders / "out" / "scores.json").read_text(encoding="utf-8"))


def refused(folders: Path, *more: str) -> str:
    with pytest.raises(InputError) as error:
        call(folders, "--no-baselines", *more)
    return str(error.value)


def expected_row(seed: int, hw: tuple[int, int], fused: np.ndarray, protocol: str) -> dict:
    images = (texture(seed, *hw, 3), texture(10 + seed, *hw), fused)
    batches = (torch.from_numpy(np.atleast_3d(x)).permute(2, 0, 1)[None] for x in images)
    values = fusion_metrics(*batches, protocol)
    return {name: x.item() if x.isfinite() else None for name, x in values.items()}


@pytest.mark.parametrize("protocol", ["cddfuse", "strict"])
def test_every_method_is_scored_image_by_image(folders, capsys, protocol):
    methods = [str(folders / "ours"), f"Others' net={folders / 'theirs'}"]
    result = call(folders, *methods, "--protocol", protocol, "--batch-size", "2")
    assert result["protocol"] == protocol
    assert list(result["methods"]) == ["ours", "Others' net", "mean", "max", "laplacian"]
    for index, (name, hw) in enumerate(SIZES.items()):
        for method, fused in (
            ("ours", texture(20 + index, *hw, 3)),
            ("Others' net", texture(30 + index, *hw)),
        ):
            found = result["methods"][method]["images"][name]
            expected = expected_row(index, hw, fused, protocol)
            assert found.keys() == expected.keys()
            for metric, value in expected.items():
                assert found[metric] == (value and pytest.approx(value, rel=1e-4)), metric
    assert [row["VIF"] is None for row in result["methods"]["ours"]["images"].values()] == [
        False, False, True,
    ]  # fmt: skip
    means = result["methods"]["ours"]["mean"]
    rows = result["methods"]["ours"]["images"].values()
    assert means["SD"] == pytest.approx(sum(row["SD"] for row in rows) / 3)
    table = (folders / "out" / "scores.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.startswith("| ours "))
    assert f"{means['SD']:.4f}" in line
    assert f"- protocol: {protocol}" in table


def test_baselines_are_of_the_pair_and_can_be_left_out(folders):
    result = call(folders, str(folders / "ours"))
    pair = texture(0, *SIZES["a"], 3), texture(10, *SIZES["a"])
    weights = np.array([0.299, 0.587, 0.114])
    brightest = np.maximum((pair[0] @ weights).round(), pair[1])
    assert result["methods"]["max"]["images"]["a"]["SD"] == pytest.approx(brightest.std(), abs=0.05)
    assert list(call(folders, str(folders / "ours"), "--no-baselines")["methods"]) == ["ours"]


def test_without_fused_folders_the_list_says_what_is_scored(folders):
    (folders / "mine.txt").write_text("b\n")
    (folders / "mine.lst").write_text("c\na\n")
    result = call(folders, "--list", str(folders / "mine.lst"))
    assert {name: list(m["images"]) for name, m in result["methods"].items()} == {
        name: ["a", "c"] for name in ("mean", "max", "laplacian")
    }


def test_a_missing_image_is_an_error_unless_common(folders):
    (folders / "theirs" / "b.png").unlink()
    methods = [str(folders / "ours"), str(folders / "theirs")]
    line = refused(folders, *methods)
    assert "theirs lacks 1 of 3 images: b;" in line
    assert "--common" in line
    result = call(folders, *methods, "--common")
    assert [list(m["images"]) for m in result["methods"].values()] == [["a", "c"]] * 5


def test_bad_folders_are_named(folders):
    assert "nowhere is no folder" in refused(folders, str(folders / "nowhere"))
    (folders / "empty").mkdir()
    assert "empty holds no image" in refused(folders, str(folders / "empty"))
    twice = refused(folders, str(folders / "ours"), str(folders / "x" / ".." / "ours"))
    assert "write NAME=" in twice
    assert "nothing to score" in refused(folders)
    write_png(folders / "ours" / "a.bmp.png", texture(0, 4, 4))
    (folders / "ours" / "a.bmp.png").rename(folders / "ours" / "a.bmp")
    assert "a.bmp and a.png" in refused(folders, str(folders / "ours"))


def test_a_baseline_s_name_is_taken(folders):
    with pytest.raises(InputError, match="max names a baseline"):
        call(folders, f"max={folders / 'ours'}")


def test_a_path_with_an_equals_sign_is_a_folder(folders):
    shutil.copytree(folders / "ours", folders / "lr=1e-3" / "ours")
    assert name_methods([str(folders / "lr=1e-3" / "ours")]) == {
        "ours": folders / "lr=1e-3" / "ours"
    }
    assert name_methods([f"a={folders / 'ours'}"]) == {"a": folders / "ours"}


@pytest.mark.parametrize("folder", ["ours", "Modal"])
def test_another_size_is_refused(folders, folder):
    write_png(folders / folder / "b.png", texture(0, 64, 71))
    line = refused(folders, str(folders / "ours"))
    assert "b.png is 64x71 but" in line
    assert "64x72" in line


def test_an_image_too_small_for_the_metrics_is_refused(folders):
    for folder in ("RGB", "Modal", "ours"):
        write_png(folders / folder / "b.png", texture(0, 31, 48))
    assert "b.png is 31x48; the metrics need 32x32" in refused(folders, str(folders / "ours"))
