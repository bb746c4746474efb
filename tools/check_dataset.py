"""Check a data set before it costs a training run: lists, files, labels, leakage, registration.

    python tools/check_dataset.py mfnet             # where its config says it lies
    python tools/check_dataset.py datasets/MSRS     # a folder: its name tells the config
    python tools/check_dataset.py /data/pairs --config my.yaml
    python tools/check_dataset.py mfnet --quick     # opens no image

Errors: a listed file that is missing or does not open, sizes that differ inside a pair, a label
value that is no class, a pair or an identical image (also mirrored) in two of train, val and test.
Warnings: no val.txt, classes that a list never shows, constant images, labels without a known
pixel, duplicates inside a list, and thermal that lies beside rgb. That last one is a hint: the
phase correlation between edge maps, its median over the set or a clear peak of one pair, beyond
--max-shift pixels.
For a folder that no config is named after, config.yaml inside it is used, else classes are taken as
the labels hold them.
Ends with a table; exit code 0 without errors (there may be warnings), else 2.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import available_names, load_config
from configs.schema import DataConfig
from dataloader.check import SPLITS, Report, check_dataset, check_lists, sizes_of
from dataloader.dataset import files_by_stem
from dataloader.prepare.classes import CONFIG_FILE, custom_config, distinct_colors
from dataloader.prepare.labels import LabelValues, merge_values, values_of
from dataloader.prepare.summary import align, class_table
from dataloader.registration import MOST_SHIFT, common_shift
from utils.cli import Parser, run_main
from utils.errors import InputError

_SHOWN_FINDINGS = 40


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", metavar="NAME|PATH", help="a dataset's name, .yaml file or folder")
    parser.add_argument("--config", metavar="NAME|YAML", help="of a folder: its classes")
    parser.add_argument(
        "--max-shift",
        type=float,
        default=MOST_SHIFT,
        metavar="PIXELS",
        help="between rgb and thermal, before it is warned of (default: %(default)g)",
    )
    parser.add_argument("--quick", action="store_true", help="lists and names only")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="change config values, e.g. --set data.label_folder=Masks",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    data, source = find_config(options)
    print(f"{data.path}: checked as {source}")
    if options.quick:
        report = check_lists(data)
    else:
        with tqdm(unit="pair", leave=False, disable=None) as bar:
            report = check_dataset(
                data, most_shift=options.max_shift, on_start=bar.reset, on_pair=bar.update
            )
    show(report, data)
    errors, warnings = report.count(errors=True), report.count(errors=False)
    if errors:
        raise InputError(f"{data.path}: {errors} errors and {warnings} warnings, see above")
    print(f"fine: no errors, {warnings} warnings")


def find_config(options: argparse.Namespace) -> tuple[DataConfig, str]:
    """The data section to check with, and where it comes from.

    Raises:
        InputError: an unknown name, or --config without a folder.
    """
    name, folder = options.set, Path(options.set)
    if not folder.is_dir():
        if options.config:
            raise InputError(f"--config goes with a folder, and '{name}' is none")
        return load_config(name, options.overrides).data, name
    known = options.config or _config_of(folder)
    if known is None:
        return _classes_as_found(folder, options.overrides)
    place = f"data.dataset_path={folder}"
    return load_config(known, [place, *options.overrides]).data, known


def show(report: Report, data: DataConfig) -> None:
    """Print the findings, errors first, then the tables of classes and of lists."""
    for is_error, title in ((True, "ERROR  "), (False, "warning")):
        texts = [finding.text for finding in report.findings if finding.is_error == is_error]
        for text in texts[:_SHOWN_FINDINGS]:
            print(f"{title}  {text}")
        if len(texts) > _SHOWN_FINDINGS:
            print(f"{title}  ... and {len(texts) - _SHOWN_FINDINGS} more")
    if report.pixels:
        lists = {name: stems for name, stems in report.lists.items() if name in SPLITS}
        print(*class_table(lists, report.pixels, data.class_names), sep="\n")
    rows = [["list", "pairs", "good", "height x width"]]
    for name in report.lists:
        sizes = sizes_of(report, name)
        shown = ", ".join(f"{h}x{w}" for (h, w), _ in sizes.most_common(3)) or "-"
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        good = str(sizes.total()) if report.sizes else "-"
        rows.append([name, str(len(report.lists[name])), good, shown + more])
    print(*align(rows), sep="\n")
    common = common_shift(report.shifts)
    if common is not None:
        print(f"thermal lies {common[0]} of rgb (median of {common[1]} pairs that show it)")


def _config_of(folder: Path) -> str | None:
    """The config inside a folder, or the one it is named after, such as MSRS or MFNet_mini."""
    if (folder / CONFIG_FILE).is_file():
        return str(folder / CONFIG_FILE)
    name = folder.resolve().name.lower()
    return next((known for known in available_names() if name.startswith(known)), None)


def _classes_as_found(folder: Path, overrides: list[str]) -> tuple[DataConfig, str]:
    """A data section with as many classes as the labels' largest value asks for."""
    base = load_config("mfnet", [f"data.dataset_path={folder}", *overrides]).data
    labels = folder / base.label_folder
    count, origin = 2, "a set of its own without labels"
    if labels.is_dir():
        values = merge_values(_read_values(labels))
        count = max([1, *values.indices]) + 1
        origin = f"a set of its own with the {count} classes that its labels hold"
    names = ["background", *(f"class {index}" for index in range(1, count))]
    data, _ = custom_config(folder, names, distinct_colors(count))
    folders = ("rgb_folder", "thermal_folder", "label_folder")
    data = data.model_copy(update={name: getattr(base, name) for name in folders})
    return data, origin


def _read_values(labels: Path) -> Iterator[LabelValues]:
    """What each label holds; those that do not open are left to the check."""
    for paths in files_by_stem(labels).values():
        with contextlib.suppress(InputError):
            yield values_of(paths[0])


if __name__ == "__main__":
    run_main(main)
