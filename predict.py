"""Fuse and segment pairs of your own, of any size from 32x32 on, without labels.

Takes two files, or two folders whose files are paired by name (whatever their suffix). For every
pair it writes fused/, segmentation/ (class indices), color/ and overlay/ <name>.png under --out.
Scales, mirroring and windows are those of the checkpoint's config; --tile and --set change them.

Examples:
    python predict.py --rgb street.png --thermal street_ir.png --checkpoint best.pth --out fused
    python predict.py --rgb pairs/rgb --thermal pairs/thermal --checkpoint best.pth --out fused -d 0
    python predict.py --rgb rgb --thermal ir --checkpoint best.pth --out fused --tile 480 640
    python predict.py --rgb rgb --thermal ir --checkpoint best.pth --out fused --set eval.flip=true

In Python:
    model, config = load_model("best.pth", device="cpu")                  # engine.checkpoint
    rgb, thermal = pair_to_tensors(read_rgb("a.png"), read_thermal("b.png"))  # engine.inference
    prediction = predict(model, rgb, thermal)                             # .fused, .segmentation

Exit codes: 0 done; 2 bad input (one line on stderr), what was written before stays.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from configs import Config, dump_config, load_config
from dataloader.dataset import IMAGE_SUFFIXES
from engine.checkpoint import load_model
from engine.inference import inference_options, pair_to_tensors, predict, use_tf32
from engine.results import PictureWriter, write_segmentation
from models import CMFS
from utils.cli import common_parser, run_main
from utils.distributed import barrier, is_main_process, setup_devices, shutdown
from utils.errors import InputError
from utils.image import read_rgb, read_thermal, to_uint8, write_png
from utils.log import setup_logging

log = logging.getLogger(__name__)


class PairFiles(NamedTuple):
    """One pair on disk, and the name of its results."""

    name: str
    rgb: Path
    thermal: Path


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__, has_dataset=False)
    parser.add_argument("--rgb", type=Path, required=True, help="visible image, or a folder")
    parser.add_argument("--thermal", type=Path, required=True, help="thermal image, or a folder")
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
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    setup_logging(None, main=is_main_process())
    pairs = find_pairs(arguments.rgb, arguments.thermal)
    devices = setup_devices(arguments.devices, arguments.port)
    overrides = list(arguments.set)
    if arguments.tile:
        overrides.append("eval.crop=[{},{}]".format(*arguments.tile))
    model, config = load(arguments.checkpoint, devices.device, overrides)
    use_tf32(config.train.tf32)
    start = time.perf_counter()
    own_pairs = pairs[devices.rank :: devices.world_size]
    with PictureWriter() as writer:
        for pair in tqdm(own_pairs, unit="pair", disable=None if is_main_process() else True):
            process(pair, model, config, devices.device, writer, arguments.out)
    barrier()
    if is_main_process():
        speed = len(pairs) / (time.perf_counter() - start)
        print(f"{len(pairs)} pairs written to {arguments.out}, {speed:.2f} images/s with files")
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
    if not names:
        raise InputError(
            f"{rgb} holds {len(rgb_files)} images and {thermal} {len(thermal_files)}, but no name "
            f"is in both; files are paired by name, whatever their suffix"
        )
    unmatched = sorted(rgb_files.keys() ^ thermal_files.keys())
    if unmatched:
        log.warning("left out, %d without a partner: %s", len(unmatched), ", ".join(unmatched))
    return [PairFiles(name, rgb_files[name], thermal_files[name]) for name in names]


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder; InputError where two share a stem."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in found:
                raise InputError(
                    f"{folder} holds {found[path.stem].name} and {path.name}: two files of one "
                    f"name; remove one"
                )
            found[path.stem] = path
    return found


def process(
    pair: PairFiles,
    model: CMFS,
    config: Config,
    device: torch.device,
    writer: PictureWriter,
    out: Path,
) -> None:
    """Read one pair, predict, hand the four pictures to the writer."""
    rgb = read_rgb(pair.rgb)
    thermal = read_thermal(pair.thermal)
    try:
        images = withhold(*pair_to_tensors(rgb, thermal, device), config)
        prediction = predict(model, *images, **inference_options(config.eval))
    except InputError as error:
        raise InputError(f"{pair.rgb} and {pair.thermal}: {error}") from error
    segmentation = prediction.segmentation[0].byte().cpu().numpy()
    writer.submit(write_png, out / "fused" / f"{pair.name}.png", to_uint8(prediction.fused[0]))
    writer.submit(write_segmentation, out, pair.name, rgb, segmentation, config.data.palette)


def withhold(rgb: Tensor, thermal: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The pair as a network of one modality was trained with: the other one is mid-grey."""
    if config.data.modalities == "rgb":
        thermal = torch.full_like(thermal, 0.5)
    elif config.data.modalities == "thermal":
        rgb = torch.full_like(rgb, 0.5)
    return rgb, thermal


if __name__ == "__main__":
    run_main(main)
