"""Score the segmentation of one checkpoint or several: class IoU and mIoU of a split.

Results go to experiment/<Name>/<exp>/eval/<checkpoint>/: eval.json, table.md, report.html (one page
with the confusion matrix, the best and the worst images), and a picture of every image in
segmentation/ (class indices), color/ and overlay/. A split other than test goes to
<checkpoint>-<split>/. Several checkpoints also give one table, eval/summary.md, and the curves over
their epochs, eval/summary.html; one that has been scored with the same config is not scored again.
Day and night are scored apart where <split>_day.txt and <split>_night.txt list them, or where every
name ends in D or N, as MFNet's do.

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
import logging
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from configs import Config, load_config
from configs.schema import DataConfig
from dataloader.build import build_eval_loader
from dataloader.dataset import read_split
from engine.checkpoint import load_model, select_checkpoints
from engine.evaluate import Batch, evaluate_segmentation
from engine.extremes import draw_extremes
from engine.graphs import GraphedModel
from engine.inference import Prediction, use_tf32
from engine.report import curves_report, segmentation_report
from engine.results import (
    SEGMENTATION_FOLDERS,
    PictureWriter,
    describe_model,
    describe_scoring,
    describe_task,
    finished_result,
    remove_other_pictures,
    write_json,
    write_segmentation,
)
from engine.tables import segmentation_summary, segmentation_table
from utils.cli import add_checkpoint_flags, common_parser, run_main
from utils.distributed import (
    Devices,
    barrier,
    gather_objects,
    is_main_process,
    setup_devices,
    shutdown,
    start_processes,
)
from utils.files import write_whole
from utils.image import to_uint8
from utils.log import setup_logging
from utils.run_folder import RunFolder

log = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--tables-only", action="store_true", help="write no pictures")
    parser.add_argument("--note", metavar="TEXT", help="a remark that stays with the table")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.dataset_name, arguments.set)
    start_processes(arguments.devices, arguments.port)
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
        name = folder.result_name(path)
        target = folder.eval_folder(f"{name}{suffix}")
        result = score(path, config, loader, devices, arguments, target)
        if is_main_process():
            print(segmentation_table(result))
            print(f"Written to {target}")
        results[name] = result
    if len(results) > 1 and is_main_process():
        summary = segmentation_summary(results)
        write_whole(folder.eval_folder(f"summary{suffix}.md"), summary)
        write_whole(folder.eval_folder(f"summary{suffix}.html"), segmentation_curves(results))
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
    """The content of eval.json for one checkpoint, which is written with all that goes with it.

    Where the file is there already, of the same task, it is only read.
    """
    file, names = target / "eval.json", loader.dataset.names
    has_pictures = not arguments.tables_only
    task = describe_task(
        path,
        config,
        arguments.split,
        files=loader.dataset.fingerprint,
        note=arguments.note,
        has_pictures=has_pictures,
    )
    folders = SEGMENTATION_FOLDERS if has_pictures else ()
    finished = None if arguments.again else finished_result(file, task, "by_image", names, folders)
    finished = gather_objects(finished)[0]  # every rank does what the first one does
    if finished is not None:
        log.info("%s has been scored already; --again scores it anew", path)
        return finished
    model, stored = load_model(path, device=devices.device, config=config)
    with PictureWriter() as writer:
        write = functools.partial(write_pictures, writer, target, config.data)
        scores = evaluate_segmentation(
            GraphedModel(model),
            loader,
            config,
            devices.device,
            groups=day_and_night(config.data, arguments.split, names),
            by_image=True,
            on_prediction=write if has_pictures else None,
        )
    barrier()  # eval.json says that all ranks' pictures are there
    run = {**task, **describe_model(model, stored)}
    result = {**run, "protocol": describe_scoring(run, config), **scores}
    if is_main_process():
        remove_other_pictures(target, folders, names)
        ious = {name: row["miou"] for name, row in scores["by_image"].items()}
        extremes = draw_extremes(
            model, loader.dataset, config, devices.device, scores=ious, metric="mIoU"
        )
        page = segmentation_report(result, *extremes)
        write_whole(target / "report.html", page)
        write_whole(target / "table.md", segmentation_table(result))
        write_json(file, result)
    return result


def segmentation_curves(results: dict[str, dict[str, Any]]) -> str:
    """A page of scores over epochs; results by the names of epoch-N.pth."""
    scores = list(results.values())
    means = {"mIoU": "miou", "mIoU without background": "miou_without_background"}
    charts = {
        "mean": {name: [result[key] for result in scores] for name, key in means.items()},
        "IoU": {
            name: [result["class_iou"][name] for result in scores]
            for name in scores[0]["class_iou"]
        },
    }
    title = f"Segmentation by epoch: {scores[0]['dataset']}, {scores[0]['split']}"
    return curves_report(title, results, charts)


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
