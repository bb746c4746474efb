"""Videos: what is written is read back; odd sizes, wrong files, errors on the way."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from utils.errors import InputError
from utils.video import VideoReader, VideoWriter

LOSSY = 12  # grey levels; smooth frames in MPEG-4


def frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth pictures, each of another colour."""
    ramp = np.linspace(0, 80, width)[None].repeat(height, 0)
    tints = [np.array([40 + 30 * i, 100, 170 - 30 * i]) for i in range(count)]
    return [(ramp[..., None] + tint).clip(0, 255).astype(np.uint8) for tint in tints]


def write(path, pictures, frames_per_s=12.5):
    with VideoWriter(path, frames_per_s) as video:
        for picture in pictures:
            video.write(picture)
    return path


@pytest.mark.parametrize("hw", [(48, 64), (45, 61)], ids=str)
def test_frames_come_back_in_order_and_colour(tmp_path, hw):
    pictures = frames(5, *hw)
    video = VideoReader(write(tmp_path / "new" / "a.mp4", pictures))
    assert (video.frames_per_s, video.count) == (12.5, 5)
    for _ in range(2):  # it can be read again
        found = list(video)
        assert len(found) == 5
        for picture, expected in zip(found, pictures, strict=True):
            assert picture.shape == (hw[0] + hw[0] % 2, hw[1] + hw[1] % 2, 3)
            difference = picture[: hw[0], : hw[1]].astype(int) - expected
            assert np.abs(difference).mean() < LOSSY
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_a_frame_of_another_size_keeps_those_before_it(tmp_path):
    with pytest.raises(InputError, match=r"a\.mp4: a frame is 48x32 after frames of 48x64"):
        write(tmp_path / "a.mp4", [*frames(2, 48, 64), *frames(1, 48, 32)])
    assert len(list(VideoReader(tmp_path / "a.mp4"))) == 2


def test_without_a_frame_there_is_no_file(tmp_path):
    write(tmp_path / "a.mp4", [])
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_video_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.mp4 does not exist"):
        VideoReader(tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"text\.mp4 cannot be decoded"):
        VideoReader(tmp_path / "text.mp4")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*a\.mp4"):
        write(tmp_path / "file" / "a.mp4", frames(1, 48, 64))


def test_why_a_place_cannot_be_written_is_said(tmp_path, monkeypatch):
    def touch(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(InputError, match=r"cannot write .*a\.mp4: Permission denied"):
        write(tmp_path / "a.mp4", frames(1, 48, 64))


def test_lost_frames_are_an_error_and_an_earlier_file_stays(tmp_path):
    """OpenCV's writer says nothing on a full disk."""
    earlier = write(tmp_path / "a.mp4", frames(3, 48, 64)).read_bytes()

    class FullDisk(VideoWriter):
        def _start(self):
            writer = super()._start()
            taken = []
            return SimpleNamespace(
                write=lambda frame: taken.append(len(taken) < 2 and writer.write(frame)),
                release=writer.release,
            )

    with (
        pytest.raises(InputError, match=r"cannot write .*a\.mp4: 2 of 5 frames arrived"),
        FullDisk(tmp_path / "a.mp4", 12.5) as video,
    ):
        for picture in frames(5, 48, 64):
            video.write(picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == earlier
