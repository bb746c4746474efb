"""What the network reaches in a fixed time of training: mIoU and fusion metrics on a test split.

    python benchmarks/quality.py -n msrs --seconds 430 --exp quality \\
        --set data.dataset_path=/data/MSRS train.precision=bf16

A short run measures the step rate of this machine; the schedule of the real run is then as long as
fits into the given seconds of training (from the first step's log line to the last; start-up,
validation and scoring are not counted). Scores epoch-last.pth, never a checkpoint chosen on test.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RATE_STEPS = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--dataset_name", default="msrs")
    parser.add_argument("--seconds", type=float, default=430)
    parser.add_argument("--exp", default="quality")
    parser.add_argument("--margin", type=float, default=0.97, help="share of the time to plan for")
    parser.add_argument("--set", nargs="+", action="extend", default=[])
    arguments = parser.parse_args()
    common = ["-n", arguments.dataset_name]
    settings = ["--set", "experiment_path=experiment", *arguments.set]
    quiet = ["train.epochs=100000", "train.val_every=100000", "train.checkpoint_start=100000"]

    rate_exp = f"{arguments.exp}-rate"
    run("train.py", *common, "--exp", rate_exp, *settings, *quiet, f"train.max_steps={RATE_STEPS}",
        "train.log_every=20")  # fmt: skip
    name = dataset_name(arguments.dataset_name, settings[1:])
    rows = metrics(name, rate_exp)
    batch_size = rows[-1]["images_per_s"] and read_batch_size(name, rate_exp)
    steps_per_s = rows[-1]["images_per_s"] / batch_size
    steps = int(arguments.seconds * arguments.margin * steps_per_s)
    print(f"{steps_per_s:.2f} steps/s: {steps} steps in {arguments.seconds:.0f} s", flush=True)

    run("train.py", *common, "--exp", arguments.exp, *settings, *quiet, f"train.max_steps={steps}",
        "train.log_every=50")  # fmt: skip
    rows = metrics(name, arguments.exp)
    seconds = sum(
        (row["step"] - before["step"]) * batch_size / row["images_per_s"]
        for before, row in zip([{"step": 0}, *rows[:-1]], rows, strict=True)
    )
    print(f"trained {rows[-1]['step']} steps in {seconds:.0f} s", flush=True)
    for script in ("eval.py", "eval_vision.py"):
        run(script, *common, "--exp", arguments.exp, "-e", "last", *settings)


def run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True)


def dataset_name(name_or_path: str, overrides: list[str]) -> str:
    sys.path.insert(0, str(ROOT))
    from configs import load_config

    return load_config(name_or_path, overrides).data.name


def metrics(name: str, exp: str) -> list[dict]:
    path = ROOT / "experiment" / name / exp / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if "images_per_s" in row]


def read_batch_size(name: str, exp: str) -> int:
    import yaml

    path = ROOT / "experiment" / name / exp / "config.yaml"
    return yaml.safe_load(path.read_text())["train"]["batch_size"]


if __name__ == "__main__":
    main()
