"""Bring a data set from its authors' archive into the layout that training reads.

    python tools/prepare_dataset.py mfnet  ir_seg_dataset.zip     # or the unpacked folder
    python tools/prepare_dataset.py fmb    FMB.zip --val-fraction 0.1
    python tools/prepare_dataset.py pst900 PST900_RGBT_Dataset.zip --val-fraction 0.1
    python tools/prepare_dataset.py msrs   MSRS-main.zip --val-fraction 0.1
    python tools/prepare_dataset.py custom my_pairs --rgb visible --thermal ir --label masks
    python tools/prepare_dataset.py --val-fraction 0.1 custom datasets/Mine   # only divide a list

Writes OUT/{RGB,Modal,Label}/ (FMB: Visible, Infrared, Label), train.txt, val.txt, test.txt, for
MFNet and MSRS test_day.txt and test_night.txt, dataset.json (what it was made from, and counts) and
contact_sheet.png: look at it. OUT appears when it is complete. Until then it grows in .OUT.part
beside it, where a run that was stopped goes on; a second run on a complete OUT does nothing.

Labels become class indices: from indices, PNGs with a colour table, or drawings in the palette's
colours. --thermal-raw takes PST900's 16-bit images: the 1st to 99th percentile of each becomes 0 to
255; any other 16-bit thermal image is treated in the same way. Pairs that differ in number from the
published ones are a warning (--strict: an error); a pair that cannot be used is an error
(--skip-bad: it is left out). --val-fraction takes validation pairs out of train.txt, the same ones
for the same --seed; with a set that is in place already (SRC has train.txt and its folders), it is
done there, and train_and_val.txt keeps the list as it was.
A custom set gets a config.yaml with its classes, for -n, unless --config names one.
"""

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import available_names, load_config
from configs.schema import DataConfig
from dataloader.prepare import layouts, summary
from dataloader.prepare.classes import CONFIG_FILE, custom_config, find_classes
from dataloader.prepare.plan import SPLITS, Plan
from dataloader.prepare.source import Source, fingerprint, open_source
from dataloader.prepare.validation import choose, divide_train_list
from dataloader.prepare.writer import Style, finish, is_prepared, part_folder, write_pairs
from utils.cli import Parser, run_main
from utils.errors import InputError
from utils.image import write_png

KINDS = ("mfnet", "fmb", "pst900", "msrs", "custom")
_VERSION = 1  # of the prepared files; a set prepared by another version is not the same
_ONLY_FOR = {  # flags that one kind alone takes
    "custom": ("rgb", "thermal", "label", "binary", "config", "test_fraction"),
    "pst900": ("thermal_raw",),
}
_SHOWN_PROBLEMS = 20


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", type=Path, metavar="SRC", help=".zip archive or folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: datasets/<Name>")
    parser.add_argument(
        "--link", action="store_true", help="link to SRC's files that need no change; SRC must stay"
    )
    parser.add_argument(
        "--val-fraction", type=float, metavar="F", help="of train.txt, for val.txt; e.g. 0.1"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the fractions' choice (default: %(default)s)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with an error at unexpected numbers of pairs"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out pairs that cannot be used"
    )
    parser.add_argument("--thermal-raw", action="store_true", help="pst900: the 16-bit images")
    custom = parser.add_argument_group("custom")
    for role in ("rgb", "thermal", "label"):
        custom.add_argument(
            f"--{role}", metavar="FOLDER", help="in SRC (default: one of the usual names)"
        )
    custom.add_argument(
        "--binary", action="store_true", help="every label value but 0 is class 1, 255 too"
    )
    custom.add_argument(
        "--config", metavar="NAME|YAML", help="classes, palette and folder names from this config"
    )
    custom.add_argument(
        "--test-fraction", type=float, metavar="F", help="of all pairs, for test.txt"
    )
    options = parser.parse_args(arguments)
    for kind, flags in _ONLY_FOR.items():
        for flag in flags:
            if getattr(options, flag) and options.kind != kind:
                raise InputError(f"--{flag.replace('_', '-')} is for {kind}, not {options.kind}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if is_in_place(options):
        divide_in_place(options)
        return
    source = open_source(options.source)
    if options.link and not options.source.is_dir():
        raise InputError(f"--link needs an unpacked folder, {options.source} is an archive")
    plan = make_plan(source, options)
    data, config_text = make_config(source, plan, options)
    prepare(source, plan, data, config_text, options)


def is_in_place(options: argparse.Namespace) -> bool:
    """Whether SRC is a set in its place, of which only the training list is to be divided."""
    if not (options.source / "train.txt").is_file():
        return False
    if options.out is not None:
        return options.out.resolve() == options.source.resolve()
    if options.kind != "custom":
        configs = [options.kind]
    elif options.config:
        configs = [options.config]
    else:
        configs = available_names()
    found = [load_config(config).data for config in configs]
    return any(
        (options.source / data.rgb_folder).is_dir()
        and (options.source / data.thermal_folder).is_dir()
        for data in found
    )


def divide_in_place(options: argparse.Namespace) -> None:
    folder = options.source
    if options.val_fraction is None:
        raise InputError(
            f"{folder} is in the standard layout already; --val-fraction divides its train.txt, "
            "`custom` with another --out copies it"
        )
    for name in ("test_fraction", "binary", "link", "thermal_raw", "skip_bad", "strict"):
        if getattr(options, name):
            raise InputError(
                f"--{name.replace('_', '-')} is of no use to {folder}, which is in its place "
                f"already: only its train.txt is divided; give --out to make another set of it"
            )
    train, val, is_new = divide_train_list(folder, options.val_fraction, options.seed)
    state = "divided" if is_new else "was divided already"
    print(f"{folder / 'train.txt'}: {state}: train {train}, val {val} (seed {options.seed})")


def make_plan(source: Source, options: argparse.Namespace) -> Plan:
    """Which pairs and lists there will be, with the fractions taken out.

    Raises:
        InputError: another layout, missing files, with --strict other numbers than published.
    """
    if options.kind == "mfnet":
        plan = layouts.plan_mfnet(source)
    elif options.kind == "custom":
        plan = layouts.plan_custom(
            source, rgb=options.rgb, thermal=options.thermal, label=options.label
        )
    else:
        plan = layouts.plan_train_test(source, options.kind, use_raw=options.thermal_raw)
    for note in plan.notes:
        print(f"note: {note}")
    problems = layouts.count_problems(plan, options.kind)
    if problems and options.strict:
        raise InputError(f"{source.path}: {'; '.join(problems)}")
    for problem in problems:
        print(f"warning: {problem}; is the download whole?", file=sys.stderr)
    for split, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        if fraction is not None:
            take_out(plan, split, fraction, options.seed)
    return plan


def take_out(plan: Plan, split: str, fraction: float, seed: int) -> None:
    """Move a fraction of the training pairs to a list that the set does not have."""
    if split in plan.lists:
        raise InputError(f"the set has its own {split}.txt; leave out --{split}-fraction")
    if "train" not in plan.lists:
        raise InputError(f"the set has no training pairs to take {split}.txt from")
    chosen = choose(plan.lists["train"], fraction, seed)
    drawn = set(chosen)
    plan.lists["train"] = [stem for stem in plan.lists["train"] if stem not in drawn]
    plan.lists[split] = chosen
    plan.lists = {name: plan.lists[name] for name in SPLITS if name in plan.lists}


def make_config(
    source: Source, plan: Plan, options: argparse.Namespace
) -> tuple[DataConfig, str | None]:
    """Folders and classes of the set, and the text of its own config file, if it needs one."""
    if options.kind != "custom" or options.config:
        return load_config(options.config or options.kind).data, None
    with _bar(len(plan.pairs), "label") as bar:
        names, palette = find_classes(source, plan, is_binary=options.binary, on_label=bar.update)
    name = options.source.resolve().name.removesuffix(".zip")
    data, text = custom_config(options.out or Path("datasets", name), names, palette)
    return data, text if plan.has_labels else None


def prepare(
    source: Source,
    plan: Plan,
    data: DataConfig,
    config_text: str | None,
    options: argparse.Namespace,
) -> None:
    """Write the set, unless it is there, and say what it holds.

    Raises:
        InputError: OUT holds something else, or pairs that cannot be used.
    """
    out = options.out or Path(data.path)
    description = describe(source, plan, data, options)
    if is_prepared(out, description, plan, data):
        print(f"{out}: was there already ({_count_pairs(plan)})")
        return
    style = Style(use_links=options.link, is_binary=options.binary)
    with part_folder(out, description) as part:
        with _bar(len(plan.pairs), "pair") as bar:
            problems = write_pairs(source, plan, part, data, style, on_pair=bar.update)
        leave_out(plan, problems, out, is_allowed=options.skip_bad)
        files = summary.files_of(part, plan.pairs, data)
        counts = summary.summarize(files)
        write_png(part / "contact_sheet.png", summary.draw_sheet(files, counts.pixels, data))
        if config_text is not None:
            (part / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        contents = {
            "skipped": sorted(problems),
            "pairs": {split: len(stems) for split, stems in plan.lists.items()},
            "pixels": _class_pixels(plan, counts, data),
        }
        finish(part, out, plan, description | contents)
    report(out, plan, data, counts, has_config=config_text is not None, config=options.config)


def describe(
    source: Source, plan: Plan, data: DataConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """What makes two preparations the same: the files, the lists, the options and the palette."""
    lists = json.dumps(plan.all_lists(), sort_keys=True).encode()
    names = ("link", "thermal_raw", "binary", "config")
    return {
        "version": _VERSION,
        "dataset": options.kind,
        "source": options.source.name,
        "files_sha256": fingerprint(source, plan.files()),
        "lists_sha256": hashlib.sha256(lists).hexdigest(),
        "options": {name: getattr(options, name) for name in names},
        **({"palette": [list(color) for color in data.palette]} if options.config else {}),
    }


def leave_out(plan: Plan, problems: dict[str, str], out: Path, *, is_allowed: bool) -> None:
    """Take bad pairs off the lists, or end with the first of them."""
    if not problems:
        return
    for stem, problem in list(problems.items())[:_SHOWN_PROBLEMS]:
        print(f"bad pair {stem}: {problem}", file=sys.stderr)
    if not is_allowed:
        more = f" (and {len(problems) - 1} more pairs, see above)" if len(problems) > 1 else ""
        raise InputError(
            f"{next(iter(problems.values()))}{more}; {out} was not made: mend the source and run "
            "again, or leave such pairs out with --skip-bad"
        )
    print(f"warning: {len(problems)} of {len(plan.pairs)} pairs left out", file=sys.stderr)
    plan.keep(lambda stem: stem not in problems)
    if not plan.pairs:
        raise InputError(f"no pair of the source can be used; {out} was not made")


def report(
    out: Path,
    plan: Plan,
    data: DataConfig,
    counts: summary.Summary,
    *,
    has_config: bool,
    config: str | None,
) -> None:
    sizes = ", ".join(f"{h}x{w} ({n})" for (h, w), n in counts.sizes.most_common(5))
    more = " and others" if len(counts.sizes) > 5 else ""
    print(f"{out}: prepared ({_count_pairs(plan)}); height x width {sizes}{more}")
    if plan.has_labels:
        print(*summary.class_table(plan.lists, counts.pixels, data.class_names), sep="\n")
    print(f"look at {out / 'contact_sheet.png'}")
    if has_config:
        print(f"name the classes in {out / CONFIG_FILE}, then: python train.py -n that file")
    if plan.has_labels and "train" in plan.lists and "val" not in plan.lists:
        command = shlex.join(["custom", str(out), *(["--config", config] if config else [])])
        print(
            "training needs a val.txt: "
            f"python tools/prepare_dataset.py --val-fraction 0.1 {command}"
        )


def _class_pixels(
    plan: Plan, counts: summary.Summary, data: DataConfig
) -> dict[str, dict[str, int]]:
    if not plan.has_labels:
        return {}
    tables = {s: summary.count_classes(counts.pixels, stems) for s, stems in plan.lists.items()}
    names = [*enumerate(data.class_names), (255, "unknown")]
    return {s: {name: int(t[value, 0]) for value, name in names} for s, t in tables.items()}


def _count_pairs(plan: Plan) -> str:
    return ", ".join(f"{split} {len(stems)}" for split, stems in plan.all_lists().items())


def _bar(total: int, unit: str) -> tqdm:
    return tqdm(total=total, unit=unit, leave=False, disable=None)


if __name__ == "__main__":
    run_main(main)
