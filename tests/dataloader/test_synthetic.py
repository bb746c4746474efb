"""Drawn scenes: the same by seed, labels exact, each modality blind to something."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import load_config
from dataloader import synthetic
from dataloader.scenery.canvas import BACKGROUND, CAR, CONE, KERB, PERSON, Canvas
from dataloader.scenery.items import Item, draw_items
from dataloader.scenery.street import Weather
from dataloader.synthetic import Scene, draw_scene, is_night, write_dataset
from tools import draw_scenes
from utils.errors import InputError

CLEAR_DAY = Weather(is_night=False, ground=0.3, body=0.7, ambient=1.0, fog=0.0, glare=0.0, sun=0.5)
SMALL = {"height": 48, "width": 64}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(index, height=96, width=128, seed=11) for index in range(80)]


def _is_same(first: Scene, second: Scene) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _contrasts(
    scenes: list[Scene], label: int, *, nights: bool, ring: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Per connected piece of a class: thermal and rgb difference to the background around it."""
    thermal, rgb = [], []
    for scene in scenes[int(nights) :: 2]:
        mask = (scene.label == label).astype(np.uint8)
        count, pieces, stats, _ = cv2.connectedComponentsWithStats(mask)
        for piece in range(1, count):
            inside = pieces == piece
            wide = cv2.dilate(inside.astype(np.uint8), np.ones((2 * ring + 1,) * 2)) > 0
            around = wide & (scene.label == BACKGROUND)
            if stats[piece, cv2.CC_STAT_AREA] < 30 or around.sum() < 20:
                continue
            thermal.append(np.mean(scene.thermal[inside]) - np.median(scene.thermal[around]))
            medians = [np.median(scene.rgb[where], axis=0) for where in (inside, around)]
            rgb.append(np.abs(medians[0] - medians[1]).max())
    assert len(thermal) >= 40
    return np.array(thermal), np.array(rgb)


def _canvas_with(*items: Item, weather: Weather = CLEAR_DAY) -> Canvas:
    """Items on flat ground; the ground is part 1."""
    canvas = Canvas(120, 160)
    ground = canvas.add_part((0.3, 0.3, 0.3), weather.ground)
    canvas.parts[:] = ground
    draw_items(canvas, items, weather, np.random.default_rng(0))
    return canvas


def test_classes_are_those_of_the_demo_config() -> None:
    names = load_config("demo").data.class_names
    assert [names[label] for label in (BACKGROUND, PERSON, CAR, CONE, KERB)] == list(names)


def test_scene_depends_on_seed_and_index_only() -> None:
    forward = [draw_scene(index, seed=5, **SMALL) for index in range(6)]
    backward = [draw_scene(index, seed=5, **SMALL) for index in reversed(range(6))][::-1]
    assert all(_is_same(a, b) for a, b in zip(forward, backward, strict=True))
    others = [draw_scene(index, seed=6, **SMALL) for index in range(6)]
    everything = {scene.rgb.tobytes() + scene.label.tobytes() for scene in forward + others}
    assert len(everything) == 12


@pytest.mark.parametrize("hw", [(32, 32), (64, 96), (97, 131), (120, 60), (480, 640)], ids=str)
def test_any_size_has_people_and_cones(hw: tuple[int, int]) -> None:
    counts = np.zeros(256, int)
    for index in range(4):
        scene = draw_scene(index, height=hw[0], width=hw[1], seed=3)
        assert scene.rgb.shape == (*hw, 3)
        assert scene.thermal.shape == scene.label.shape == hw
        assert {image.dtype for image in scene} == {np.dtype(np.uint8)}
        counts += np.bincount(scene.label.ravel(), minlength=256)
    assert counts[5:].sum() == 0
    assert (counts[[PERSON, CONE, KERB]] / counts.sum() > 0.005).all()
    assert counts[BACKGROUND] / counts.sum() > 0.6


def test_layout_scales_with_the_image() -> None:
    for index in range(4):
        small = draw_scene(index, height=96, width=128, seed=2).label
        large = draw_scene(index, height=480, width=640, seed=2).label
        assert np.mean(small == large[2::5, 2::5]) > 0.96


@pytest.mark.parametrize("hw", [(31, 64), (64, 31), (0, 64)], ids=str)
def test_too_small_a_scene_is_refused(hw: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="32x32"):
        draw_scene(0, height=hw[0], width=hw[1], seed=0)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed -1"):
        draw_scene(0, seed=-1, **SMALL)


def test_every_scene_has_something_to_find(scenes: list[Scene]) -> None:
    shares = np.array([np.bincount(scene.label.ravel(), minlength=5) for scene in scenes])
    shares = shares / shares.sum(axis=1, keepdims=True)
    assert (shares[:, [PERSON, CONE, KERB]] > 0.002).mean(axis=0).min() > 0.9
    assert 0.3 < (shares[:, CAR] > 0.002).mean() < 0.9
    assert (shares.mean(axis=0)[1:] > 0.015).all()


@pytest.mark.parametrize(
    ("kind", "label"),
    [("person", PERSON), ("cone", CONE), ("car_end", CAR), ("car_side", CAR)],
)
def test_label_is_exactly_what_was_painted(kind: str, label: int) -> None:
    canvas = _canvas_with(Item(kind, 80.3, 100.7, 38.0))
    is_painted = np.any(canvas.looks()[..., :4] != canvas.looks()[0, 0, :4], axis=-1)
    assert 300 < is_painted.sum() < 120 * 160 / 2
    np.testing.assert_array_equal(canvas.label(), np.where(is_painted, label, BACKGROUND))


@pytest.mark.parametrize("kind", ["poster", "machine", "bush", "sign", "lamp", "tree"])
def test_what_only_resembles_or_covers_has_no_label(kind: str) -> None:
    canvas = _canvas_with(Item(kind, 80.0, 110.0, 20.0))
    assert (canvas.parts != 1).sum() > 100
    assert not canvas.label().any()


@pytest.mark.parametrize("near_kind", ["cone", "sign"])
def test_nearer_item_hides_the_farther_one(near_kind: str) -> None:
    far, near = Item("car_end", 80.0, 80.0, 30.0), Item(near_kind, 85.0, 95.0, 38.0)
    car, front = _canvas_with(far), _canvas_with(near)
    in_front = front.parts != 1
    assert (car.label()[in_front] == CAR).sum() > 60
    expected = np.where(in_front, front.label(), car.label())
    for order in ((far, near), (near, far)):
        both = _canvas_with(*order)
        np.testing.assert_array_equal(both.label(), expected)
        heat = np.where(in_front, front.looks()[..., 3], car.looks()[..., 3])
        np.testing.assert_array_equal(both.looks()[..., 3], heat)


def test_people_at_night_are_warm_and_hidden_in_rgb(scenes: list[Scene]) -> None:
    thermal, night_rgb = _contrasts(scenes, PERSON, nights=True)
    _, day_rgb = _contrasts(scenes, PERSON, nights=False)
    assert np.percentile(thermal, 10) > 40
    assert np.median(night_rgb) < 22
    assert np.median(day_rgb) > 2 * np.median(night_rgb)


def test_people_on_hot_days_have_no_thermal_contrast(scenes: list[Scene]) -> None:
    thermal, _ = _contrasts(scenes, PERSON, nights=False)
    assert 0.15 < np.mean(np.abs(thermal) < 15) < 0.7


@pytest.mark.parametrize("nights", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("label", [CONE, KERB], ids=["cone", "kerb"])
def test_cones_and_kerbs_show_in_rgb_only(scenes: list[Scene], label: int, nights: bool) -> None:
    thermal, rgb = _contrasts(scenes, label, nights=nights)
    assert np.median(np.abs(thermal)) < 2
    assert np.mean(np.abs(thermal) < 6) > 0.9
    assert np.median(rgb) > 25


def test_label_meets_the_pictures_to_the_pixel(scenes: list[Scene]) -> None:
    """Moved by a pixel or two, the label of cones parts orange from road less well."""
    separation = {}
    for shift in (-2, -1, 0, 1, 2):
        moved = [scene._replace(label=np.roll(scene.label, shift, axis=1)) for scene in scenes]
        separation[shift] = np.median(_contrasts(moved, CONE, nights=False, ring=1)[1])
    assert max(separation, key=separation.get) == 0


def test_warm_is_no_proof_of_a_person(scenes: list[Scene]) -> None:
    decoys = []
    for scene in scenes[1::2]:
        person_heat = np.median(scene.thermal[scene.label == PERSON])
        decoys.append(((scene.thermal >= person_heat) & (scene.label == BACKGROUND)).sum())
    assert np.mean(np.array(decoys) > 40) > 0.7


@pytest.mark.parametrize("kind", ["machine", "lamp"])
def test_machines_and_lamps_are_as_warm_as_people(kind: str) -> None:
    heat = _canvas_with(Item(kind, 80.0, 110.0, 20.0)).looks()[..., 3]
    assert (heat > CLEAR_DAY.ground + 0.25).sum() > 20


def test_colors_are_red_green_blue(scenes: list[Scene]) -> None:
    red, green, blue = np.median([scene.rgb[scene.label == CONE].mean(0) for scene in scenes], 0)
    assert red > green + 20 > blue + 40


def test_night_is_dark(scenes: list[Scene]) -> None:
    day, night = (np.median([np.median(scene.rgb) for scene in scenes[n::2]]) for n in (0, 1))
    assert night < 80
    assert day > 1.5 * night


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_fog_and_glare_blind_only_the_rgb_camera(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = synthetic.choose_weather
    drawn = {}
    for name, fog, glare in (("clear", 0.0, 0.0), ("fog", 0.12, 0.0), ("glare", 0.0, 1.5)):
        monkeypatch.setattr(
            synthetic,
            "choose_weather",
            lambda *given, fog=fog, glare=glare: choose(*given)._replace(fog=fog, glare=glare),
        )
        drawn[name] = draw_scene(index, height=96, width=128, seed=4)
    clear, fog, glare = drawn.values()
    assert all(np.array_equal(clear.thermal, other.thermal) for other in (fog, glare))
    assert all(np.array_equal(clear.label, other.label) for other in (fog, glare))
    assert fog.rgb[:50].std() < (0.95 if is_night(index) else 0.75) * clear.rgb[:50].std()
    is_white = (glare.rgb >= 250).all(axis=-1)
    assert is_white.mean() > (clear.rgb >= 250).all(axis=-1).mean() + 0.005


def test_sensors_are_noisy(scenes: list[Scene]) -> None:
    for scene in scenes[:10]:
        for image in (scene.rgb, scene.thermal):
            for axis in (0, 1):
                assert np.median(np.abs(np.diff(image.astype(int), axis=axis))) >= 1


def _contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


def test_dataset_on_disk_is_the_drawn_scenes(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "Demo"
    counts = {"train": 3, "val": 1, "test": 3}
    assert write_dataset(folder, counts=counts, seed=9, **SMALL)
    lists = {path.stem: path.read_text().split() for path in folder.glob("*.txt")}
    assert lists == {
        "train": ["00000D", "00001N", "00002D"],
        "val": ["00003N"],
        "test": ["00004D", "00005N", "00006D"],
        "test_day": ["00004D", "00006D"],
        "test_night": ["00005N"],
    }
    for stem in lists["train"] + lists["val"] + lists["test"]:
        scene = draw_scene(int(stem[:5]), seed=9, **SMALL)
        assert stem.endswith("N") == is_night(int(stem[:5]))
        rgb = cv2.imread(str(folder / "RGB" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
        thermal = cv2.imread(str(folder / "Modal" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        label = cv2.imread(str(folder / "Label" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert _is_same(Scene(rgb, thermal, label), scene)
    assert len(list(folder.rglob("*.png"))) == 21
    assert [path.name for path in folder.parent.iterdir()] == ["Demo"]


def test_empty_splits_have_no_list(tmp_path: Path) -> None:
    write_dataset(tmp_path / "Demo", counts={"train": 1, "test": 0}, seed=9, **SMALL)
    assert [path.name for path in (tmp_path / "Demo").glob("*.txt")] == ["train.txt"]


def test_second_write_does_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "Demo"
    folder.mkdir()  # an empty folder is as good as none
    assert write_dataset(folder, counts={"train": 2, "val": 1}, seed=9, **SMALL)
    before, calls = _contents(folder), []
    same = {"val": 1, "train": 2, "test": 0}
    written = write_dataset(folder, counts=same, seed=9, on_scene=lambda: calls.append(1), **SMALL)
    assert not written
    assert not calls
    assert _contents(folder) == before


@pytest.mark.parametrize("change", [{"seed": 8}, {"height": 50}, {"counts": {"train": 3}}], ids=str)
def test_other_scenes_are_not_overwritten(tmp_path: Path, change: dict) -> None:
    values = {"counts": {"train": 2}, "seed": 9, **SMALL}
    write_dataset(tmp_path / "Demo", **values)
    before = _contents(tmp_path / "Demo")
    with pytest.raises(InputError, match="holds other scenes"):
        write_dataset(tmp_path / "Demo", **{**values, **change})
    assert _contents(tmp_path / "Demo") == before


def test_foreign_folder_or_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine" / "train.txt", tmp_path / "file"):
        path.write_text("00001D\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "scenes.json").write_text("{")
    before = _contents(tmp_path)
    for name in ("mine", "file", "broken"):
        with pytest.raises(InputError, match="no drawn scenes"):
            write_dataset(tmp_path / name, counts={"train": 1}, seed=9, **SMALL)
    assert _contents(tmp_path) == before


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot write into"):
        write_dataset(tmp_path / "file" / "Demo", counts={"train": 1}, seed=9, **SMALL)


@pytest.mark.parametrize("name", ["Label/00001N.png", "train.txt"])
def test_dataset_with_a_hole_is_refused(tmp_path: Path, name: str) -> None:
    values = {"counts": {"train": 2}, "seed": 9, **SMALL}
    write_dataset(tmp_path / "Demo", **values)
    (tmp_path / "Demo" / name).unlink()
    with pytest.raises(InputError, match=f"1 files are missing.*{Path(name).name}"):
        write_dataset(tmp_path / "Demo", **values)


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    folder, drawn = tmp_path / "Demo", []

    def stop_at_second() -> None:
        drawn.append(folder.exists())
        if len(drawn) == 2:
            raise KeyboardInterrupt

    values = {"counts": {"train": 3}, "seed": 9, **SMALL}
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, **values, on_scene=stop_at_second)
    assert drawn == [False, False]  # nobody sees a half-written folder
    assert list(tmp_path.iterdir()) == []
    assert write_dataset(folder, **values)


def test_second_process_may_be_faster(tmp_path: Path) -> None:
    folder, values = tmp_path / "Demo", {"counts": {"train": 1}, "seed": 9, **SMALL}
    assert not write_dataset(folder, **values, on_scene=lambda: write_dataset(folder, **values))
    assert [path.name for path in tmp_path.iterdir()] == ["Demo"]


@pytest.mark.parametrize(
    "counts", [{}, {"train": 0}, {"train": -1, "val": 2}, {"trian": 2}], ids=str
)
def test_bad_counts_are_refused(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match="train, val, test"):
        write_dataset(tmp_path / "Demo", counts=counts, seed=9, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_tool_draws_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "Demo"), "--train", "2", "--val", "1", "--test", "0"]
    arguments += ["--height", "48", "--width", "64", "--seed", "3"]
    draw_scenes.main(arguments)
    assert f"{tmp_path / 'Demo'}: drawn (train 2, val 1, test 0; 48x64" in capsys.readouterr().out
    description = json.loads((tmp_path / "Demo" / "scenes.json").read_text())
    assert description["counts"] == {"train": 2, "val": 1, "test": 0}
    draw_scenes.main(arguments)
    assert "was there already" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--out", "."], ["--seed", "many"]], ids=str)
def test_tool_ends_bad_input_with_one_line(arguments: list[str]) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "tools/draw_scenes.py", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
