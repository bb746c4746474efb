"""Fuse and segment pairs of your own, of any size from 32x32 on, without labels.

Takes two files, or two folders whose files are paired by name (whatever their suffix). For every
pair it writes fused/, segmentation/ (class indices), color/ and overlay/ <name>.png under --out.
Of two videos, or of two folders with --fps, it makes fused.mp4 and overlay.mp4 instead.
Scales, mirroring and windows are those of the checkpoint's config; --tile and --set change them.
Neighbours of one size go through the network together, eval.batch_size of them.
The network fuses in colour; eval.luma_only=true takes its luma alone, and Cb and Cr (YCbCr) from
the visible image, whose colours then stay as they are, but for what is clipped.

Examples:
    python predict.py --rgb street.png --thermal street_ir.png --checkpoint best.pth --out fused
    python predict.py --rgb pairs/rgb --thermal pairs/thermal --checkpoint best.pth --out fused -d 0
    python predict.py --rgb rgb --thermal ir --checkpoint best.pth --out fused --tile 480 640
    python predict.py --rgb rgb --thermal ir --checkpoint best.pth --out fused --set eval.flip=true
    python predict.py --rgb rgb --thermal ir --checkpoint best.pth --out fused --bits 16 \\
        --set eval.luma_only=true eval.batch_size=4
    python predict.py --rgb drive.mp4 --thermal drive_ir.mp4 --checkpoint best.pth --out fused
    python predict.py --rgb rgb --thermal ir --checkpoint best.pth --out fused --fps 25

In Python:
    model, config = load_model("best.pth", device="cpu")                  # engine.checkpoint
    rgb, thermal = pair_to_tensors(read_rgb("a.png"), read_thermal("b.png"))  # engine.inference
    prediction = predict(model, rgb, thermal)                             # .fused, .segmentation

Exit codes: 0 done; 2 bad input (one line on stderr), what was written before stays.
"""

import argparse
import contextlib
import itertools
import logging
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from configs import Config, dump_config, load_config
from dataloader.dataset import IMAGE_SUFFIXES, files_by_stem
from engine.checkpoint import load_model
from engine.graphs import GraphedModel
from engine.inference import (
    Prediction,
    inference_options,
    pair_to_tensors,
    predict,
    use_tf32,
    withhold,
)
from engine.memory import explained_full_evaluation
from engine.sinks import PictureSink, VideoSink
from models import CMFS
from utils.cli import common_parser, run_main
from utils.distributed import (
    Devices,
    gather_objects,
    is_main_process,
    setup_devices,
    shutdown,
    start_processes,
)
from utils.errors import InputError
from utils.image import read_rgb, read_thermal, to_uint8, to_uint16
from utils.log import setup_logging
from utils.video import VIDEO_SUFFIXES, VideoReader

log = logging.getLogger(__name__)


class PairFiles(NamedTuple):
    """One pair on disk, and the name of its results."""

    name: str
    rgb: Path
    thermal: Path


class Pair(NamedTuple):
    """One pair of images."""

    name: str
    source: str  # for messages
    rgb: np.ndarray  # (H, W, 3) uint8
    thermal: np.ndarray  # (H, W) uint8


class Source(NamedTuple):
    """What --rgb and --thermal mean."""

    pairs: Iterable[Pair]  # read one after the other
    count: int  # of this rank, as far as known
    frames_per_s: float | None  # None: pictures, not a video


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__, has_dataset=False)
    kinds = "image, a folder of images, or a video"
    parser.add_argument("--rgb", type=Path, required=True, help=f"visible {kinds}")
    parser.add_argument("--thermal", type=Path, required=True, help=f"thermal {kinds}")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help=".pth or .safetensors file of train.py"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--tile",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="sliding window in pixels, for images too large for the memory; same as "
        "--set eval.crop=[H,W]",
    )
    parser.add_argument(
        "--bits", type=int, choices=(8, 16), default=8, help="of each channel in fused/*.png"
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="N",
        help="make a video of N frames a second: of folders instead of pictures; of videos instead "
        "of at their own speed",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    start_processes(arguments.devices, arguments.port)
    setup_logging(None, main=is_main_process())
    devices = setup_devices(arguments.devices, arguments.port)
    source = open_source(arguments, devices)
    overrides = list(arguments.set)
    if arguments.tile:
        overrides.append("eval.crop=[{},{}]".format(*arguments.tile))
    model, config = load(arguments.checkpoint, devices.device, overrides)
    model = GraphedModel(model)
    use_tf32(config.train.tf32)
    palette = config.data.palette
    if source.frames_per_s is None:
        sink = PictureSink(arguments.out, palette)
    else:
        sink = VideoSink(arguments.out, palette, source.frames_per_s)
    refuse_to_replace((arguments.rgb, arguments.thermal), sink.places)
    to_pixels = to_uint8 if arguments.bits == 8 else to_uint16
    start, done, network_s = time.perf_counter(), 0, 0.0
    progress = tqdm(total=source.count, unit="pair", disable=None if is_main_process() else True)
    with kept_when_stopped(sink), sink, progress:
        for batch in same_size(source.pairs, config.eval.batch_size):
            begin = time.perf_counter()
            prediction = process(batch, model, config, devices.device)
            fused = [to_pixels(image) for image in prediction.fused]
            segmentations = prediction.segmentation.byte().cpu().numpy()
            network_s += time.perf_counter() - begin
            for pair, picture, segmentation in zip(batch, fused, segmentations, strict=True):
                sink.write(pair.name, pair.rgb, picture, segmentation)
            done += len(batch)
            progress.update(len(batch))
    done, speeds = (gather_objects(x) for x in (done, done / max(network_s, 1e-9)))
    if is_main_process():
        speed = sum(done) / (time.perf_counter() - start)
        print(
            f"{sum(done)} pairs written to {arguments.out}, {speed:.2f} images/s with files, "
            f"{sum(speeds):.2f} images/s in the network"
        )
    shutdown()


def load(path: Path, device: torch.device, overrides: list[str]) -> tuple[CMFS, Config]:
    """The network, and the config of its run with the overrides applied."""
    model, config = load_model(path, device=device)
    if not overrides:
        return model, config
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.yaml"
        resolved.write_text(dump_config(config), encoding="utf-8")
        config = load_config(str(resolved), overrides)
    model, _ = load_model(path, device=device, config=config)  # its scan backend may be another
    return model, config


def open_source(arguments: argparse.Namespace, devices: Devices) -> Source:
    """What --rgb, --thermal and --fps mean; images are read later, one pair after the other.

    Raises:
        InputError: see find_pairs; or a video with something else, or made by several processes,
            or with settings that no video has.
    """
    rgb, thermal, frames_per_s = arguments.rgb, arguments.thermal, arguments.fps
    if frames_per_s is not None and not 0 < frames_per_s <= 1000:
        raise InputError(f"--fps takes frames a second, up to 1000, got {frames_per_s:g}")
    are_videos = [path.suffix.lower() in VIDEO_SUFFIXES for path in (rgb, thermal)]
    if all(are_videos):
        videos = VideoReader(rgb), VideoReader(thermal)
        count = min(video.count for video in videos)
        rates = [video.frames_per_s for video in videos]
        if max(rates) > 1.01 * min(rates):
            log.warning(
                "%s has %g frames a second, %s %g: they are paired frame by frame all the same; "
                "convert one to the other's rate if they show the same time",
                *(rgb, rates[0], thermal, rates[1]),
            )
        source = Source(read_videos(*videos), count, frames_per_s or videos[0].frames_per_s)
    elif any(are_videos):
        raise InputError(f"{rgb} and {thermal} must be two videos, two images or two folders")
    else:
        pairs = find_pairs(rgb, thermal)[devices.rank :: devices.world_size]
        source = Source(map(read_files, pairs), len(pairs), frames_per_s)
    if source.frames_per_s is not None and devices.world_size > 1:
        raise InputError("a video is made by one process; give one device with -d, no torchrun")
    if source.frames_per_s is not None and arguments.bits != 8:
        raise InputError("--bits 16 is for pictures; a video has 8 bits")
    return source


def refuse_to_replace(inputs: Iterable[Path], places: Iterable[Path]) -> None:
    """Raise an InputError where results would be written over, or among, what they are made of.

    Args:
        places: folders or files of the results.
    """
    written = {place.resolve() for place in places}
    for path in inputs:
        if written & {path.resolve(), path.resolve().parent}:
            raise InputError(
                f"{path} lies where the results would be written; give another folder with --out"
            )


@contextlib.contextmanager
def kept_when_stopped(sink: PictureSink | VideoSink) -> Iterator[None]:
    """SIGTERM ends a video as an error does: it keeps the frames that it has."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if isinstance(sink, PictureSink):  # whose files are whole at any moment
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def find_pairs(rgb: Path, thermal: Path) -> list[PairFiles]:
    """Two files are a pair; two folders give one for each stem that both hold.

    Raises:
        InputError: a path is missing, a file is given with a folder, or no stem is in both.
    """
    for path in (rgb, thermal):
        if not path.exists():
            raise InputError(f"{path} does not exist; --rgb and --thermal take files or folders")
    if rgb.is_dir() != thermal.is_dir():
        raise InputError(f"{rgb} and {thermal} must be two files or two folders")
    if not rgb.is_dir():
        return [PairFiles(rgb.stem, rgb, thermal)]
    rgb_files, thermal_files = (images_by_stem(folder) for folder in (rgb, thermal))
    names = sorted(rgb_files.keys() & thermal_files.keys())
    suffixes = " ".join(sorted(IMAGE_SUFFIXES))
    if not names:
        raise InputError(
            f"{rgb} holds {len(rgb_files)} images and {thermal} {len(thermal_files)}, but no name "
            f"is in both; files are paired by name, whatever their suffix ({suffixes})"
        )
    unmatched = sorted(rgb_files.keys() ^ thermal_files.keys())
    if unmatched:
        log.warning(
            "left out, %d without a partner (%s): %s",
            len(unmatched),
            suffixes,
            ", ".join(unmatched),
        )
    return [PairFiles(name, rgb_files[name], thermal_files[name]) for name in names]


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder; InputError where two share a stem."""
    found = files_by_stem(folder)
    for paths in found.values():
        if len(paths) > 1:
            names = " and ".join(sorted(path.name for path in paths))
            raise InputError(f"{folder} holds {names}: two files of one name; remove one")
    return {stem: paths[0] for stem, paths in found.items()}


def read_files(files: PairFiles) -> Pair:
    """Read one pair; InputError where an image is unreadable."""
    source = f"{files.rgb} and {files.thermal}"
    return Pair(files.name, source, read_rgb(files.rgb), read_thermal(files.thermal))


def read_videos(rgb: VideoReader, thermal: VideoReader) -> Iterator[Pair]:
    """Frame by frame, as long as both have one; thermal frames by their luma."""
    for index, frames in enumerate(itertools.zip_longest(rgb, thermal), 1):
        ended = [v.path for v, frame in zip((rgb, thermal), frames, strict=True) if frame is None]
        if ended:
            log.warning("%s ends after %d frames; the other's rest is left out", *ended, index - 1)
            return
        source = f"frame {index} of {rgb.path} and {thermal.path}"
        grey = cv2.cvtColor(frames[1], cv2.COLOR_RGB2GRAY)
        yield Pair(f"{index:06d}", source, frames[0], grey)


def same_size(pairs: Iterable[Pair], count: int) -> Iterator[list[Pair]]:
    """Neighbours of one size, at most `count` at once; those before an error come before it."""
    batch: list[Pair] = []
    try:
        for pair in pairs:
            if batch and (len(batch) == count or pair.rgb.shape != batch[0].rgb.shape):
                yield batch
                batch = []
            batch.append(pair)
    except InputError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def process(
    pairs: list[Pair], model: nn.Module, config: Config, device: torch.device
) -> Prediction:
    """Predict pairs of one size together; InputError names the one that does not fit."""
    tensors = []
    for pair in pairs:
        try:
            tensors.append(pair_to_tensors(pair.rgb, pair.thermal, device))
        except InputError as error:
            raise InputError(f"{pair.source}: {error}") from error
    rgb, thermal = (torch.cat(images) for images in zip(*tensors, strict=True))
    try:
        with explained_full_evaluation(len(rgb), tuple(rgb.shape[-2:]), device):
            pair = withhold(rgb, thermal, config.data.modalities)
            return predict(model, *pair, **inference_options(config.eval))
    except InputError as error:  # too small, so all of them are
        raise InputError(f"{pairs[0].source}: {error}") from error


if __name__ == "__main__":
    run_main(main)
