"""predict.py: files, folders and videos, odd sizes, windows, batches, and what it refuses."""

import logging
import os
import re
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import predict as script
from configs import load_config
from engine.checkpoint import load_model, save_checkpoint
from engine.inference import pair_to_tensors, predict
from engine.sinks import VideoSink
from models import build_model
from utils.cli import run_main
from utils.errors import InputError
from utils.image import read_label, read_rgb, read_thermal, to_uint8, write_png
from utils.video import VideoReader, VideoWriter

KINDS = ("fused", "segmentation", "color", "overlay")


@pytest.fixture(autouse=True)
def _logging_stays_as_it_was():
    """The scripts give the root logger a handler; later tests shall not see it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    config = load_config("demo", ["train.crop=[64,96]"])
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    save_checkpoint(path, model=build_model(config), config=config, epoch=1, step=1)
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Three pairs of different sizes and suffixes, and one image without a partner on each side."""
    rgb, thermal = tmp_path / "rgb", tmp_path / "thermal"
    for name, hw in (("a", (45, 61)), ("b", (32, 32)), ("c", (64, 96)), ("lonely", (32, 32))):
        write_png(rgb / f"{name}.png", texture(*hw, 3))
    for name, hw in (("a", (45, 61)), ("b", (32, 32)), ("c", (64, 96)), ("spare", (32, 32))):
        thermal.mkdir(exist_ok=True)
        cv2.imwrite(str(thermal / f"{name}.bmp"), texture(*hw))
    (rgb / "notes.txt").write_text("no image")
    return rgb, thermal


def texture(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, *channels), np.uint8)


def call(monkeypatch, rgb: Path, thermal: Path, checkpoint: Path, out: Path, *more: str) -> None:
    arguments = ["--rgb", rgb, "--thermal", thermal, "--checkpoint", checkpoint, "--out", out]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments), "-d", "cpu", *more])
    script.main()


def refused(monkeypatch, capsys, *arguments) -> str:
    """The one line of an ending with code 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: call(monkeypatch, *arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True]
    return lines[0]


def test_one_pair_gives_what_predict_gives(monkeypatch, capsys, folders, checkpoint, tmp_path):
    rgb_file, thermal_file = folders[0] / "a.png", folders[1] / "a.bmp"
    call(monkeypatch, rgb_file, thermal_file, checkpoint, tmp_path / "out")
    model, config = load_model(checkpoint, device="cpu")
    rgb, thermal = read_rgb(rgb_file), read_thermal(thermal_file)
    expected = predict(model, *pair_to_tensors(rgb, thermal))
    fused, segmentation, color, overlay = (
        read(tmp_path / "out" / kind / "a.png")
        for read, kind in zip((read_rgb, read_label, read_rgb, read_rgb), KINDS, strict=True)
    )
    assert (fused == to_uint8(expected.fused[0])).all()
    assert (segmentation == expected.segmentation[0].numpy()).all()
    assert (color == np.array(config.data.palette)[segmentation]).all()
    assert (overlay[segmentation == 0] == rgb[segmentation == 0]).all()
    assert "1 pairs" in capsys.readouterr().out


def test_folders_are_paired_by_stem(monkeypatch, capsys, folders, checkpoint, tmp_path):
    call(monkeypatch, *folders, checkpoint, tmp_path / "out")
    for kind in KINDS:
        sizes = {
            path.name: cv2.imread(str(path)).shape[:2]
            for path in (tmp_path / "out" / kind).iterdir()
        }
        assert sizes == {"a.png": (45, 61), "b.png": (32, 32), "c.png": (64, 96)}
    printed = capsys.readouterr().out
    assert "lonely, spare" in printed
    assert "images/s" in printed


def test_tile_is_the_window_of_the_config(monkeypatch, folders, checkpoint, tmp_path):
    pair = folders[0] / "c.png", folders[1] / "c.bmp"
    options = {
        "whole": [],
        "covering": ["--tile", "64", "200"],
        "tiled": ["--tile", "32", "64"],
        "set": ["--set", "eval.crop=[32,64]"],
    }
    fused = {}
    for name, more in options.items():
        call(monkeypatch, *pair, checkpoint, tmp_path / name, *more)
        fused[name] = read_rgb(tmp_path / name / "fused" / "c.png").astype(int)
    assert (fused["covering"] == fused["whole"]).all()
    assert (fused["tiled"] != fused["whole"]).any()
    assert (fused["tiled"] == fused["set"]).all()


def test_pairs_of_one_size_go_through_together(monkeypatch, folders, checkpoint, tmp_path):
    """Batches change nothing in the pictures, and each is as large as it may be."""
    for name in ("a2", "a3", "a4"):
        write_png(folders[0] / f"{name}.png", texture(45, 61, 3)[::-1])
        write_png(folders[1] / f"{name}.png", texture(45, 61)[:, ::-1])
    sizes, real = [], script.predict
    monkeypatch.setattr(
        script, "predict", lambda m, rgb, *x, **y: sizes.append(len(rgb)) or real(m, rgb, *x, **y)
    )
    pictures = []
    for count, expected in ((1, [1] * 6), (3, [3, 1, 1, 1])):
        sizes.clear()
        out = tmp_path / f"by{count}"
        call(monkeypatch, *folders, checkpoint, out, "--set", f"eval.batch_size={count}")
        assert sizes == expected
        pictures.append([read_rgb(path) for path in sorted((out / "fused").iterdir())])
    for single, together in zip(*pictures, strict=True):
        assert np.abs(single.astype(int) - together).max() <= 1


def test_16_bits_hold_more_than_the_8(monkeypatch, folders, checkpoint, tmp_path):
    pair = folders[0] / "a.png", folders[1] / "a.bmp"
    for bits in ("8", "16"):
        call(monkeypatch, *pair, checkpoint, tmp_path / bits, "--bits", bits)
    shallow, deep = (
        cv2.imread(str(tmp_path / bits / "fused" / "a.png"), cv2.IMREAD_UNCHANGED)
        for bits in ("8", "16")
    )
    assert (shallow.dtype, deep.dtype) == (np.uint8, np.uint16)
    assert (np.rint(deep / 257) == shallow).all()
    assert (deep % 257 != 0).any()


def test_luma_only_keeps_the_colours(monkeypatch, folders, checkpoint, tmp_path):
    """Cr and Cb are those of the visible image, but for rounding and clipping."""
    rgb = texture(40, 48, 3) // 8 + 112  # far from what is clipped
    write_png(tmp_path / "a.png", rgb)
    write_png(tmp_path / "a_ir.png", texture(40, 48) // 4 + 96)
    pair = tmp_path / "a.png", tmp_path / "a_ir.png"
    chroma = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., 1:].astype(int)
    off = []
    for name, more in (("network", []), ("luma", ["--set", "eval.luma_only=true"])):
        call(monkeypatch, *pair, checkpoint, tmp_path / name, *more)
        fused = read_rgb(tmp_path / name / "fused" / "a.png")
        off.append(np.abs(cv2.cvtColor(fused, cv2.COLOR_RGB2YCrCb)[..., 1:] - chroma).max())
    assert off[1] <= 1 < off[0]


@pytest.fixture
def videos(tmp_path) -> tuple[Path, Path]:
    """Five frames of rgb and four of thermal, of 45x61, at 10 frames a second."""
    paths = tmp_path / "drive.mp4", tmp_path / "drive_ir.mp4"
    ramp = np.linspace(0, 120, 61)[None, :, None].repeat(45, 0)
    pictures = [(ramp + np.array([20, 10 * index, 100])).astype(np.uint8) for index in range(5)]
    thermal_pictures = [255 - picture[::-1] // 2 for picture in pictures[:4]]
    for path, frames in zip(paths, (pictures, thermal_pictures), strict=True):
        with VideoWriter(path, 10) as video:
            for frame in frames:
                video.write(frame)
    return paths


def test_two_videos_give_two_videos(monkeypatch, capsys, videos, checkpoint, tmp_path):
    """Frame by frame what predict() gives, as long as both have frames, at their speed."""
    out, seen, real = tmp_path / "out", [], script.predict
    monkeypatch.setattr(
        script, "predict", lambda m, *pair, **more: seen.extend(pair) or real(m, *pair, **more)
    )
    call(monkeypatch, *videos, checkpoint, out, "--set", "eval.batch_size=1")
    assert {path.name for path in out.iterdir()} == {"fused.mp4", "overlay.mp4"}
    fused, overlay = (VideoReader(out / f"{name}.mp4") for name in ("fused", "overlay"))
    assert fused.frames_per_s == overlay.frames_per_s == 10
    model, _ = load_model(checkpoint, device="cpu")
    found = list(fused)
    assert len(found) == len(list(overlay)) == 4
    sources = zip(found, VideoReader(videos[0]), VideoReader(videos[1]), strict=False)
    for index, (picture, rgb, thermal) in enumerate(sources):
        pair = pair_to_tensors(rgb, cv2.cvtColor(thermal, cv2.COLOR_RGB2GRAY))
        assert all(map(torch.equal, seen[2 * index :], pair))
        expected = to_uint8(predict(model, *pair).fused[0])
        assert np.abs(picture.astype(int) - expected).mean() < 6
    printed = capsys.readouterr().out
    assert "4 pairs" in printed
    assert "drive_ir.mp4 ends after 4 frames" in printed


def test_folders_with_fps_give_two_videos(monkeypatch, folders, checkpoint, tmp_path):
    for side in folders:
        for path in [*side.glob("b.*"), *side.glob("c.*")]:
            path.unlink()
    for name in ("a0", "a1"):
        write_png(folders[0] / f"{name}.png", texture(45, 61, 3))
        write_png(folders[1] / f"{name}.png", texture(45, 61))
    call(monkeypatch, *folders, checkpoint, tmp_path / "out", "--fps", "7")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fused.mp4", "overlay.mp4"}
    video = VideoReader(tmp_path / "out" / "fused.mp4")
    assert (video.frames_per_s, len(list(video))) == (7, 3)


def test_videos_that_cannot_be_are_refused(
    monkeypatch, capsys, folders, videos, checkpoint, tmp_path
):
    out = tmp_path / "out"
    mixed = videos[0], folders[1]
    assert "two videos" in refused(monkeypatch, capsys, *mixed, checkpoint, out)
    line = refused(monkeypatch, capsys, *videos, checkpoint, out, "--bits", "16")
    assert "8 bits" in line
    assert "--fps" in refused(monkeypatch, capsys, *videos, checkpoint, out, "--fps", "0")
    line = refused(monkeypatch, capsys, *folders, checkpoint, out, "--fps", "5")
    assert "fused.mp4: a frame is" in line, "images of different sizes"
    assert len(list(VideoReader(out / "fused.mp4"))) == 1, "the frame before it is kept"


def test_a_video_that_is_stopped_keeps_its_frames(monkeypatch, videos, checkpoint, tmp_path):
    real, out = script.process, tmp_path / "out"

    def process(*arguments):
        if (out / f".{os.getpid()}.fused.mp4").exists():  # the first frame is in
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(script, "process", process)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *videos, checkpoint, out, "--set", "eval.batch_size=1")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert sorted(path.name for path in out.iterdir()) == ["fused.mp4", "overlay.mp4"]
    assert len(list(VideoReader(out / "fused.mp4"))) == 1


def test_of_two_videos_the_second_ends_where_the_first_fails(tmp_path):
    frame = np.zeros((32, 32, 3), np.uint8)
    palette = load_config("demo").data.palette
    lost = pytest.raises(InputError, match="fused.mp4: 0 of 1 frames arrived")
    with lost, VideoSink(tmp_path, palette, 10) as sink:
        sink.write("1", frame, frame, frame[..., 0])
        next(tmp_path.glob(".*.fused.mp4")).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.mp4"]


def test_results_never_replace_what_they_are_made_of(
    monkeypatch, capsys, folders, videos, checkpoint, tmp_path
):
    rgb, thermal = folders
    before = (rgb / "a.png").read_bytes()
    rgb.rename(tmp_path / "color")
    thermal.rename(tmp_path / "segmentation")
    rgb, thermal = tmp_path / "color", tmp_path / "segmentation"
    files = rgb / "a.png", thermal / "a.bmp"
    made = tmp_path / "fused.mp4", tmp_path / "overlay.mp4"
    for video, path in zip(videos, made, strict=True):
        video.rename(path)
    for pair in ((rgb, thermal), files, made, (rgb / ".." / "color", thermal)):
        message = refused(monkeypatch, capsys, *pair, checkpoint, tmp_path)
        assert "lies where the results would be written" in message
    assert files[0].read_bytes() == before
    assert not (tmp_path / "overlay").exists()


def test_16_bit_thermal_is_converted(monkeypatch, folders, checkpoint, tmp_path):
    path = tmp_path / "deep.png"
    deep = texture(45, 61).astype(np.uint16) * 100 + 7000
    cv2.imwrite(str(path), deep)
    call(monkeypatch, folders[0] / "a.png", path, checkpoint, tmp_path / "out")
    assert read_rgb(tmp_path / "out" / "fused" / "a.png").shape == (45, 61, 3)


@pytest.mark.parametrize("modality", ["rgb", "thermal"])
def test_a_network_of_one_modality_does_not_see_the_other(
    monkeypatch, folders, checkpoint, tmp_path, modality
):
    rgb, thermal = folders[0] / "a.png", folders[1] / "a.bmp"
    other = tmp_path / "a.png"
    write_png(other, 255 - texture(45, 61))
    results = []
    for index, pair in enumerate([(rgb, thermal), (rgb, other), (other, thermal)]):
        out = tmp_path / f"out{index}"
        call(monkeypatch, *pair, checkpoint, out, "--set", f"data.modalities={modality}")
        results.append(read_rgb(out / "fused" / "a.png"))
    has_changed = [(result != results[0]).any() for result in results]
    assert has_changed == [False, modality == "thermal", modality == "rgb"]


def test_different_sizes_are_refused(monkeypatch, capsys, folders, checkpoint, tmp_path):
    pair = folders[0] / "a.png", folders[1] / "c.bmp"
    line = refused(monkeypatch, capsys, *pair, checkpoint, tmp_path / "out")
    assert all(part in line for part in ("a.png", "c.bmp", "61x45", "96x64"))


def test_an_unreadable_image_leaves_what_was_written(
    monkeypatch, capsys, folders, checkpoint, tmp_path
):
    (folders[1] / "c.bmp").write_bytes(b"")
    line = refused(monkeypatch, capsys, *folders, checkpoint, tmp_path / "out")
    assert "c.bmp" in line
    assert sorted(path.name for path in (tmp_path / "out" / "overlay").iterdir()) == [
        "a.png",
        "b.png",
    ]


def test_too_small_an_image_is_refused(monkeypatch, capsys, checkpoint, tmp_path):
    write_png(tmp_path / "small.png", texture(31, 64))
    pair = tmp_path / "small.png", tmp_path / "small.png"
    line = refused(monkeypatch, capsys, *pair, checkpoint, tmp_path / "out")
    assert "small.png" in line
    assert "32x32" in line


def test_a_truncated_checkpoint_is_refused(monkeypatch, capsys, folders, checkpoint, tmp_path):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(checkpoint.read_bytes()[:5000])
    assert "bad.pth" in refused(monkeypatch, capsys, *folders, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs_that_cannot_be_are_refused(folders, tmp_path):
    rgb, thermal = folders
    with pytest.raises(InputError, match="nowhere does not exist"):
        script.find_pairs(tmp_path / "nowhere", thermal)
    with pytest.raises(InputError, match="two files or two folders"):
        script.find_pairs(rgb / "a.png", thermal)
    for path in thermal.iterdir():
        path.rename(path.with_stem(f"{path.stem}_ir"))
    with pytest.raises(InputError, match="4 images .* 4, but no name is in both"):
        script.find_pairs(rgb, thermal)
    (rgb / "a.jpg").touch()
    with pytest.raises(InputError, match=r"a\.jpg and a\.png"):
        script.find_pairs(rgb, thermal)


def test_images_left_out_are_named_with_the_suffixes_that_count(folders, caplog):
    rgb, thermal = folders
    (thermal / "lonely.webp").write_bytes(b"")
    with caplog.at_level("WARNING"):
        pairs = script.find_pairs(rgb, thermal)
    assert [pair.name for pair in pairs] == ["a", "b", "c"]
    expected = "left out, 2 without a partner (.bmp .jpeg .jpg .png .tif .tiff): lonely, spare"
    assert caplog.messages == [expected]


@pytest.mark.parametrize("tile", [["16", "64"], ["64"]])
def test_a_wrong_tile_is_refused(monkeypatch, capsys, folders, checkpoint, tmp_path, tile):
    refused(monkeypatch, capsys, *folders, checkpoint, tmp_path / "out", "--tile", *tile)


def test_the_lines_of_the_readme(folders, checkpoint, capsys):
    """They run, and print what the README shows, but for the numbers of another network."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    code, shown = re.search(
        r"```python\n(from engine.*?)```\n+```text\n(.*?)```", readme, re.S
    ).groups()
    for text, path in (
        ("experiment/Demo/exp/checkpoint/best.pth", checkpoint),
        ("datasets/Demo/RGB/00280D.png", folders[0] / "c.png"),
        ("datasets/Demo/Modal/00280D.png", folders[1] / "c.bmp"),
    ):
        assert text in code
        code = code.replace(text, str(path))
    exec(code, {})
    printed = capsys.readouterr().out
    assert "torch.Size([1, 3, 64, 96])" in printed
    assert [line.split(":")[0] for line in printed.splitlines()[1:]] == [
        line.split(":")[0] for line in shown.splitlines()[1:]
    ]
