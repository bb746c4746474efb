"""Export fused images and score them: fusion metrics of one checkpoint or several.

Results go to experiment/<Name>/<exp>/vision/<checkpoint>/: fused/*.png at each input's own size and
under its name, vision.json, table.md, report.html (one page with histograms, the best and the worst
images), and sheet.png (rgb | thermal | fused | segmentation). A split other than test goes to
<checkpoint>-<split>/. Several checkpoints also give one table, vision/summary.md, and the curves
over their epochs, vision/summary.html; one that has been scored with the same config is not scored
again. Labels are not needed. Metrics of one protocol cannot be compared with those of
another: eval.protocol is cddfuse, tang or strict.

Examples:
    python eval_vision.py -n mfnet -e 500
    python eval_vision.py -n fmb -e best --set eval.protocol=tang
    python eval_vision.py -n msrs -e experiment/MFNet/exp/checkpoint/best.pth
    torchrun --nproc_per_node=2 eval_vision.py -n mfnet -e best

Exit codes: 0 done; 2 bad input (one line on stderr).
"""

import argparse
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from configs import Config, load_config
from dataloader.build import build_eval_loader
from engine.checkpoint import load_model, select_checkpoints
from engine.evaluate import Batch, evaluate_fusion
from engine.extremes import draw_extremes
from engine.graphs import GraphedModel
from engine.inference import Prediction, describe_inference, use_tf32
from engine.report import curves_report, fusion_report
from engine.results import (
    PictureWriter,
    describe_model,
    describe_task,
    finished_result,
    remove_other_pictures,
    write_json,
)
from engine.tables import fusion_summary, fusion_table
from utils.cli import add_checkpoint_flags, common_parser, run_main
from utils.distributed import (
    Devices,
    gather_objects,
    is_main_process,
    setup_devices,
    shutdown,
    start_processes,
)
from utils.files import write_whole
from utils.image import colorize, contact_sheet, to_uint8, to_uint16, write_png
from utils.log import setup_logging
from utils.run_folder import RunFolder

SHEET_TITLES = ("rgb", "thermal", "fused", "segmentation")
SHEET_ROWS = 12
RANKED_BY = "Qabf"  # of the report's best and worst images; every protocol has it

log = logging.getLogger(__name__)

SheetRow = list[np.ndarray]  # pictures in the order of SHEET_TITLES


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 16),
        default=8,
        help="of each channel in fused/*.png; metrics are always of the 8-bit image",
    )
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
        config, arguments.split, rank=devices.rank, world_size=devices.world_size
    )
    suffix = "" if arguments.split == "test" else f"-{arguments.split}"
    results = {}
    for path in checkpoints:
        name = folder.result_name(path)
        target = folder.vision_folder(f"{name}{suffix}")
        result = export(path, config, loader, devices, arguments, target)
        if is_main_process():
            print(fusion_summary({name: result}))
            print(f"Written to {target}")
        results[name] = result
    if len(results) > 1 and is_main_process():
        summary = fusion_summary(results)
        write_whole(folder.vision_folder(f"summary{suffix}.md"), summary)
        write_whole(folder.vision_folder(f"summary{suffix}.html"), fusion_curves(results))
        print(summary)
    shutdown()


def export(
    path: Path,
    config: Config,
    loader: DataLoader,
    devices: Devices,
    arguments: argparse.Namespace,
    target: Path,
) -> dict[str, Any]:
    """The content of vision.json for one checkpoint, which is written with all that goes with it.

    Where the file is there already, of the same task, it is only read.
    """
    file, names = target / "vision.json", loader.dataset.names
    files, folders = loader.dataset.fingerprint, ["fused"]
    task = describe_task(path, config, arguments.split, files=files, bits=arguments.bits)
    finished = None if arguments.again else finished_result(file, task, "images", names, folders)
    finished = gather_objects(finished)[0]  # every rank does what the first one does
    if finished is not None:
        log.info("%s has been scored already; --again scores it anew", path)
        return finished
    model, stored = load_model(path, device=devices.device, config=config)
    rows = dict.fromkeys(evenly_picked(names, SHEET_ROWS))
    with PictureWriter() as writer:
        scores = evaluate_fusion(
            GraphedModel(model),
            loader,
            config,
            devices.device,
            on_prediction=functools.partial(
                write_fused, writer, target, config, arguments.bits, rows
            ),
        )
    for part in gather_objects({name: row for name, row in rows.items() if row is not None}):
        rows.update(part)
    result = {
        **task,
        **describe_model(model, stored),
        "protocol": config.eval.protocol,
        "inference": describe_inference(config.eval),
        **scores,
    }
    if is_main_process():
        remove_other_pictures(target, folders, names)
        values = {name: row[RANKED_BY] for name, row in scores["images"].items()}
        extremes = draw_extremes(
            model, loader.dataset, config, devices.device, scores=values, metric=RANKED_BY
        )
        write_whole(target / "report.html", fusion_report(result, RANKED_BY, *extremes))
        write_png(target / "sheet.png", contact_sheet(list(rows.values()), SHEET_TITLES))
        write_whole(target / "table.md", fusion_table(result))
        write_json(file, result)
    return result


def fusion_curves(results: dict[str, dict[str, Any]]) -> str:
    """A page of mean metrics over epochs; results by the names of epoch-N.pth."""
    scores = list(results.values())
    charts = {
        metric: {metric: [result["mean"][metric] for result in scores]}
        for metric in scores[0]["mean"]
    }
    first = scores[0]
    title = f"Fusion by epoch: {first['dataset']}, {first['split']}, protocol {first['protocol']}"
    return curves_report(title, results, charts)


def write_fused(
    writer: PictureWriter,
    target: Path,
    config: Config,
    bits: int,
    rows: dict[str, SheetRow | None],
    batch: Batch,
    prediction: Prediction,
) -> None:
    """Hand a batch's fused images to the writer; keep the rows that the sheet shows."""
    for index, name in enumerate(batch.name):
        fused = to_uint8(prediction.fused[index])
        export = fused if bits == 8 else to_uint16(prediction.fused[index])
        writer.submit(write_png, target / "fused" / f"{name}.png", export)
        if name in rows:
            segmentation = prediction.segmentation[index].byte().cpu().numpy()
            rows[name] = [
                to_uint8(batch.rgb[index]),
                to_uint8(batch.thermal[index]),
                fused,
                colorize(segmentation, config.data.palette),
            ]


def evenly_picked(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, spread over the list from the first to the last."""
    places = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
    return [names[place] for place in places]


if __name__ == "__main__":
    run_main(main)
