"""Score the segmentation of one checkpoint or several: class IoU and mIoU of a split.

Results go to experiment/<Name>/<exp>/eval/<checkpoint>/: eval.json, table.md, and a picture of
every image in segmentation/ (class indices), color/ and overlay/. A split other than test goes to
<checkpoint>-<split>/. Several checkpoints also give one table, eval/summary.md. Day and night are
scored apart where <split>_day.txt and <split>_night.txt list them, or where every name ends in D or
N, as MFNet's do.

Examples:
    python eval.py -n mfnet -e 500
    python eval.py -n mfnet -e best -d 0
    python eval.py -n fmb -e 400-500 --tables-only
    python eval.py -n fmb -e best --set eval.scales=[0.75,1,1.25] eval.flip=true
    python eval.py -n pst900 -e best --set eval.crop=[480,640]
    python eval.py -n msrs -e experiment/MFNet/exp/checkpoint/best.pth
    torchrun --nproc_per_node=2 eval.py -n mfnet -e best

Exit codes: 0 done; 2 bad input (one line on stderr).
"""

import argparse
import functools
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from configs import Config, load_config
from configs.schema import DataConfig
from dataloader.build import build_eval_loader
from dataloader.dataset import read_split
from engine.checkpoint import load_model, select_checkpoints
from engine.evaluate import Batch, evaluate_segmentation
from engine.inference import Prediction, use_tf32
from engine.results import (
    PictureWriter,
    describe_run,
    describe_scoring,
    segmentation_summary,
    segmentation_table,
    write_json,
    write_segmentation,
    write_text,
)
from utils.cli import common_parser, run_main
from utils.distributed import Devices, is_main_process, setup_devices, shutdown
from utils.image import to_uint8
from utils.log import setup_logging
from utils.run_folder import RunFolder


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        "-e",
        "--epochs",
        default="best",
        metavar="WHICH",
        help="N, a-b, a- (all from a), best, last, or a path to a .pth or .safetensors file",
    )
    parser.add_argument("--split", default="test", metavar="LIST", help="list to score: test, val")
    parser.add_argument("--tables-only", action="store_true", help="write no pictures")
    parser.add_argument("--note", metavar="TEXT", help="a remark that stays with the table")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.dataset_name, arguments.set)
    folder = RunFolder(config, arguments.exp)
    setup_logging(None, main=is_main_process())
    checkpoints = select_checkpoints(folder.checkpoints, arguments.epochs)
    devices = setup_devices(arguments.devices, arguments.port)
    use_tf32(config.train.tf32)
    loader = build_eval_loader(
        config,
        arguments.split,
        rank=devices.rank,
        world_size=devices.world_size,
        need_labels=True,
    )
    suffix = "" if arguments.split == "test" else f"-{arguments.split}"
    results = {}
    for path in checkpoints:
        target = folder.eval_folder(f"{path.stem}{suffix}")
        result = score(path, config, loader, devices, arguments, target)
        if is_main_process():
            write_json(target / "eval.json", result)
            write_text(target / "table.md", segmentation_table(result))
            print(segmentation_table(result))
            print(f"Written to {target}")
        results[path.stem] = result
    if len(results) > 1 and is_main_process():
        summary = segmentation_summary(results)
        write_text(folder.eval_folder(f"summary{suffix}.md"), summary)
        print(summary)
    shutdown()


def score(
    path: Path,
    config: Config,
    loader: DataLoader,
    devices: Devices,
    arguments: argparse.Namespace,
    target: Path,
) -> dict[str, Any]:
    """The content of eval.json for one checkpoint; its pictures are written on the way."""
    model, stored = load_model(path, device=devices.device, config=config)
    with PictureWriter() as writer:
        write = functools.partial(write_pictures, writer, target, config.data)
        scores = evaluate_segmentation(
            model,
            loader,
            config,
            devices.device,
            groups=day_and_night(config.data, arguments.split, loader.dataset.names),
            on_prediction=None if arguments.tables_only else write,
        )
    run = describe_run(path, model, stored, config, arguments.split)
    return {**run, "protocol": describe_scoring(run, config), "note": arguments.note, **scores}


def write_pictures(
    writer: PictureWriter, target: Path, data: DataConfig, batch: Batch, prediction: Prediction
) -> None:
    """Hand a batch's pictures to the writer."""
    segmentations = prediction.segmentation.byte().cpu().numpy()
    for name, rgb, segmentation in zip(batch.name, batch.rgb, segmentations, strict=True):
        writer.submit(write_segmentation, target, name, to_uint8(rgb), segmentation, data.palette)


def day_and_night(data: DataConfig, split: str, names: list[str]) -> dict[str, frozenset[str]]:
    """The stems of the split by day and by night, as far as lists or MFNet's suffixes tell."""
    folder = Path(data.path).expanduser()
    parts = {
        part: frozenset(read_split(folder, f"{split}_{part}"))
        for part in ("day", "night")
        if (folder / f"{split}_{part}.txt").is_file()
    }
    if not parts and all(name.endswith(("D", "N")) for name in names):
        parts = {
            part: frozenset(name for name in names if name.endswith(letter))
            for part, letter in (("day", "D"), ("night", "N"))
        }
    return {part: stems for part, stems in parts.items() if stems.intersection(names)}


if __name__ == "__main__":
    run_main(main)
