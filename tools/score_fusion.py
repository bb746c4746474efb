"""Score fused images of any method, with simple baselines beside them, in one table.

    python tools/score_fusion.py RGB THERMAL FUSED [FUSED ...]
    python tools/score_fusion.py data/RGB data/Modal experiment/MSRS/exp/vision/best/fused \\
        CDDFuse=others/cddfuse U2Fusion=others/u2fusion --protocol strict --out scores
    python tools/score_fusion.py data/RGB data/Modal --list data/test.txt    # baselines alone

Each FUSED is a folder, or NAME=FOLDER for the name that the table shows. Files belong together by
stem, whatever their suffix. What is scored is what the fused folders hold, or --list; a stem that
any folder lacks is an error, unless --common leaves such stems out for all. The baselines are
computed on the fly, in grey: mean and max of luma and thermal, and a Laplacian pyramid (OpenCV).
Numbers of one protocol cannot be compared with those of another.

Prints the table of means; with --out also writes scores.md and scores.json (every image) there.
Exit codes: 0 done; 2 bad input (one line on stderr).
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloader.dataset import check_size, files_by_stem, read_list, shorten
from engine.evaluate import Row, mean_row, score_fused
from engine.inference import SMALLEST_SIDE
from engine.results import write_json
from engine.tables import fusion_comparison
from utils.cli import Parser, run_main
from utils.distributed import setup_devices
from utils.environment import git_commit
from utils.errors import InputError
from utils.files import write_whole
from utils.fusion_baselines import BASELINES
from utils.fusion_metrics import PROTOCOLS
from utils.image import read_rgb, read_thermal


class Triple(NamedTuple):
    """One pair and what every method made of it."""

    name: str
    rgb: np.ndarray  # (H, W, 3) uint8
    thermal: np.ndarray  # (H, W) uint8
    fused: dict[str, np.ndarray]  # by method; (H, W, 3) or (H, W) uint8


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rgb", type=Path, metavar="RGB", help="folder of the visible images")
    parser.add_argument("thermal", type=Path, metavar="THERMAL", help="folder of the thermal ones")
    parser.add_argument("fused", nargs="*", metavar="FUSED", help="FOLDER or NAME=FOLDER")
    parser.add_argument("--protocol", default="cddfuse", choices=list(PROTOCOLS))
    parser.add_argument("--list", type=Path, metavar="FILE", help="stems to score, one a line")
    parser.add_argument("--common", action="store_true", help="score what every folder holds")
    parser.add_argument("--no-baselines", action="store_true", help="score the folders alone")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for scores.md and scores.json")
    parser.add_argument("-d", "--devices", metavar="DEVICE", help='"0" or "cpu"')
    parser.add_argument("--batch-size", type=int, default=4, help="images at once (default: 4)")
    return parser.parse_intermixed_args(arguments)  # folders may follow options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be 1 or more, got {options.batch_size}")
    methods = name_methods(options.fused)
    baselines = () if options.no_baselines else tuple(BASELINES)
    if not methods and not baselines:
        raise InputError("nothing to score: give a folder of fused images or leave the baselines")
    if taken := methods.keys() & set(baselines):
        raise InputError(f"{min(taken)} names a baseline; give the folder another: NAME=FOLDER")
    folders = {"RGB": options.rgb, "THERMAL": options.thermal, **methods}
    files = {name: find_images(folder) for name, folder in folders.items()}
    stems = choose_stems(files, options.list, is_common=options.common)
    device = setup_devices(options.devices, None).device
    scores: dict[str, dict[str, Row]] = {name: {} for name in (*methods, *baselines)}
    triples = read_triples(files, stems, baselines)
    for batch in batches(tqdm(triples, total=len(stems), leave=False, disable=None),
                         options.batch_size):  # fmt: skip
        rgb, thermal = (to_batch([getattr(x, key) for x in batch], device)
                        for key in ("rgb", "thermal"))  # fmt: skip
        for method, rows in scores.items():
            fused = to_batch([triple.fused[method] for triple in batch], device)
            names = [triple.name for triple in batch]
            rows |= score_fused(names, rgb, thermal, fused, protocol=options.protocol)
    result = describe(options, methods, scores)
    table = fusion_comparison(result)
    print(table)
    if options.out:
        write_json(options.out / "scores.json", result)
        write_whole(options.out / "scores.md", table)
        print(f"Written to {options.out}")


def name_methods(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by the names that the table shows: what stands before "=", or the folder's own name.

    A folder whose path holds a "=" is one all the same.

    Raises:
        InputError: two folders of one name.
    """
    methods: dict[str, Path] = {}
    for text in texts:
        name, is_named, folder = text.partition("=")
        is_named = is_named and not Path(text).is_dir()
        path = Path(folder if is_named else text)
        name = name if is_named else path.resolve().name
        if name in ("", "RGB", "THERMAL") or name in methods:
            raise InputError(f"'{name}' does not tell {path} from the others; write NAME={path}")
        methods[name] = path
    return methods


def find_images(folder: Path) -> dict[str, Path]:
    """The images of a folder by stem.

    Raises:
        InputError: no such folder, no image in it, or two of one stem.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; RGB, THERMAL and FUSED are folders of images")
    found = files_by_stem(folder)
    if not found:
        raise InputError(f"{folder} holds no image")
    for paths in found.values():
        if len(paths) > 1:
            names = " and ".join(sorted(path.name for path in paths))
            raise InputError(f"{folder} holds {names}: two files of one stem; remove one")
    return {stem: paths[0] for stem, paths in found.items()}


def choose_stems(
    files: dict[str, dict[str, Path]], listed: Path | None, *, is_common: bool
) -> list[str]:
    """The stems to score, sorted; files: images of RGB, THERMAL and each method by stem.

    Raises:
        InputError: a folder lacks one and is_common is not set, or none is left.
    """
    held = [set(images) for images in files.values()]
    wanted = set().union(*(held[2:] or held)) if listed is None else set(read_list(listed))
    if is_common:
        wanted = wanted.intersection(*held)
        if not wanted:
            raise InputError(f"no stem is common to {', '.join(files)}; files belong by stem")
    for name, stems in zip(files, held, strict=True):
        missing = sorted(wanted - stems)
        if missing:
            raise InputError(
                f"{name} lacks {len(missing)} of {len(wanted)} images: {shorten(missing)}; add "
                f"them, or score what every folder holds with --common"
            )
    return sorted(wanted)


def read_triples(
    files: dict[str, dict[str, Path]], stems: Sequence[str], baselines: Sequence[str]
) -> Iterator[Triple]:
    """Read image after image; InputError where one is unreadable or of another size."""
    rgb_files, thermal_files, *_ = files.values()
    for stem in stems:
        rgb, thermal = read_rgb(rgb_files[stem]), read_thermal(thermal_files[stem])
        check_size(thermal_files[stem], thermal, rgb_files[stem], rgb)
        if min(thermal.shape) < SMALLEST_SIDE:
            height, width = thermal.shape
            raise InputError(
                f"{rgb_files[stem]} is {height}x{width}; the metrics need {SMALLEST_SIDE}x"
                f"{SMALLEST_SIDE} and more"
            )
        fused = {}
        for method, images in list(files.items())[2:]:
            fused[method] = read_rgb(images[stem])
            check_size(images[stem], fused[method][..., 0], rgb_files[stem], rgb)
        fused |= {name: BASELINES[name](rgb, thermal) for name in baselines}
        yield Triple(stem, rgb, thermal, fused)


def batches(triples: Iterator[Triple], size: int) -> Iterator[list[Triple]]:
    """Neighbours of one size, at most `size` of them."""
    for _, group in itertools.groupby(triples, key=lambda triple: triple.thermal.shape):
        while batch := list(itertools.islice(group, size)):
            yield batch


def to_batch(images: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """(H, W) or (H, W, 3) uint8 -> (B, 1 or 3, H, W) uint8."""
    return (
        torch.stack([torch.from_numpy(np.atleast_3d(x)) for x in images])
        .permute(0, 3, 1, 2)
        .to(device)
    )


def describe(
    options: argparse.Namespace, methods: dict[str, Path], scores: dict[str, dict[str, Row]]
) -> dict[str, Any]:
    """The content of scores.json."""
    return {
        "protocol": options.protocol,
        "rgb": options.rgb.as_posix(),
        "thermal": options.thermal.as_posix(),
        "git_commit": git_commit(),
        "methods": {
            name: {
                "folder": methods[name].as_posix() if name in methods else None,
                "mean": mean_row(rows.values()),
                "images": rows,
            }
            for name, rows in scores.items()
        },
    }


if __name__ == "__main__":
    run_main(main)
