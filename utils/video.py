"""Videos: frames in, frames out, through OpenCV's own FFmpeg."""

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.errors import InputError

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm"})


class VideoReader:
    """The frames of a file, in order; iterate over it.

    Attributes:
        frames_per_s: as the file says.
        count: how many frames the file says that it has; some files are wrong.
    Raises:
        InputError: missing, or no video that OpenCV can decode.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"video {path} does not exist")
        capture = self._open()
        self.frames_per_s = capture.get(cv2.CAP_PROP_FPS)
        self.count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        has_frame, _ = capture.read()
        capture.release()
        if not has_frame:
            raise InputError(f"video {path} cannot be decoded: cut short or no video")

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB each."""
        capture = self._open()
        try:
            while True:
                has_frame, image = capture.read()
                if not has_frame:
                    return
                yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        return cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)


class VideoWriter:
    """Writes an MP4 (MPEG-4 part 2) aside and renames it at the end; use it as a context.

    Frames of odd width or height gain a column or row, a copy of the last, as the codec takes even
    sizes alone. After an error the file holds the frames that were written before it; a file that
    lost some, as on a full disk, does not take the place of an earlier one.

    Args:
        path: ends in .mp4; its folder is made.
    """

    def __init__(self, path: str | Path, frames_per_s: float) -> None:
        self.path = Path(path)
        self.frames_per_s = frames_per_s
        self._aside = self.path.with_name(f".{os.getpid()}.{self.path.name}")
        self._writer: cv2.VideoWriter | None = None
        self._shape: tuple[int, ...] = ()
        self._frames = 0

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Raises an InputError where frames are lost, unless another error is on its way."""
        if self._writer is None:
            return
        self._writer.release()
        try:
            kept = VideoReader(self._aside).count  # OpenCV does not say which it could not write
        except InputError:
            kept = 0
        if kept == self._frames:
            self._aside.replace(self.path)
            return
        self._aside.unlink(missing_ok=True)
        if error is None:
            raise InputError(
                f"cannot write {self.path}: {kept} of {self._frames} frames arrived; is the disk "
                f"full?"
            )

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, (H, W, 3) uint8 RGB.

        Raises:
            InputError: another size than the first frame's, or the file cannot be written.
        """
        if self._writer is None:
            self._shape = frame.shape
            self._writer = self._start()
        if frame.shape != self._shape:
            got, expected = (f"{shape[0]}x{shape[1]}" for shape in (frame.shape, self._shape))
            raise InputError(
                f"{self.path}: a frame is {got} after frames of {expected} (height x width); a "
                f"video has one size"
            )
        height, width = frame.shape[:2]
        padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._writer.write(cv2.cvtColor(padded, cv2.COLOR_RGB2BGR))
        self._frames += 1

    def _start(self) -> cv2.VideoWriter:
        height, width = (side + side % 2 for side in self._shape[:2])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._aside.touch()  # the writer does not say why it cannot
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(self._aside), codec, self.frames_per_s, (width, height))
        if not writer.isOpened():
            self._aside.unlink(missing_ok=True)
            raise InputError(
                f"cannot write {self.path} with {width}x{height} pixels and {self.frames_per_s:g} "
                f"frames a second"
            )
        return writer
