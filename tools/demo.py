"""Train, score and export a small CMFS in a few minutes on a CPU: what `make demo` runs.

    python tools/demo.py                      # drawn RGB-thermal scenes
    python tools/demo.py --data datasets/MSRS # real pairs in the layout of datasets/README.md

It runs the project's own scripts one after the other and shows each command, so that the same can
be done by hand. A run that was stopped goes on where it was; a finished one is scored again.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import available_names, load_config
from dataloader.prepare.classes import distinct_colors
from utils.cli import Parser, run_main
from utils.errors import InputError
from utils.image import read_label

ROOT = Path(__file__).resolve().parents[1]
REAL_PAIRS = {  # what differs from config_demo.yaml for photographs, which are larger than drawings
    "train": {"crop": [160, 224], "scales": [0.5, 0.75], "epochs": 1000, "max_steps": 240,
              "val_every": 1000},
    "eval": {"batch_size": 1},
}  # fmt: skip


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of real pairs; default: drawn scenes")
    arguments = parser.parse_args()
    if arguments.data is None:
        run("tools/draw_scenes.py", "--out", load_config("demo").data.path)
        name = "demo"
    else:
        name = str(write_config(arguments.data))
    run("train.py", "-n", name, "--resume")
    run("eval.py", "-n", name, "-e", "best")
    run("eval_vision.py", "-n", name, "-e", "best")


def run(script: str, *arguments: str) -> None:
    """Run one of the project's scripts from its root; its failure ends the demo with its code."""
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    # On maps this small a second thread wins a fifth on an idle CPU, and loses all on a busy one.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, script, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # it got the signal, too, and saves first
            process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def write_config(folder: Path) -> Path:
    """A config for a folder of real pairs; classes from the known set it is named after, if any."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; DATA takes a dataset folder (datasets/README.md)"
        )
    demo = load_config("demo")
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name)
    known = [n for n in available_names() if n != "demo" and name.lower().startswith(n)]
    data = {"name": f"Demo-{name}", "dataset_path": str(folder)}
    if known:
        source = load_config(known[0]).data
        data |= source.model_dump(
            mode="json",
            include={"rgb_folder", "thermal_folder", "label_folder", "class_names", "palette",
                     "ignore_background"},
        )  # fmt: skip
    else:
        data |= classes_of(folder, demo.data.label_folder)
    tree = {
        "data": {"num_workers": 0, "cache": "ram", **data},
        "model": demo.model.model_dump(mode="json"),
        "train": demo.train.model_dump(mode="json") | REAL_PAIRS["train"],
        "eval": REAL_PAIRS["eval"],
    }
    path = ROOT / "experiment" / f"demo-{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def classes_of(folder: Path, label_folder: str) -> dict:
    """Class names and colours for label values 0 … the largest one in the folder."""
    labels = sorted((folder / label_folder).glob("*.png"))
    if not labels:
        raise InputError(f"{folder / label_folder} holds no label PNGs; the demo trains on labels")
    largest = 1
    for path in labels:
        values = read_label(path)
        largest = max(largest, int(values[values != 255].max(initial=0)))
    return {
        "class_names": ["background", *(f"class {value}" for value in range(1, largest + 1))],
        "palette": [list(color) for color in distinct_colors(largest + 1)],
    }


if __name__ == "__main__":
    run_main(main)
