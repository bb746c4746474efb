"""What the network reaches in a fixed time of training: mIoU and fusion metrics on a test split.

    python benchmarks/quality.py -n msrs --seconds 430 --exp quality \\
        --set data.dataset_path=/data/MSRS train.precision=bf16

A short run measures the step rate of this machine; the schedule of the real run is then as long as
fits into the given seconds, counted from the start of the loop to the last step, saves and loader
restarts included (`elapsed_s` of metrics.jsonl; validation comes after it). Scores epoch-last.pth,
never a checkpoint chosen on test.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--dataset_name", default="msrs")
    parser.add_argument("--seconds", type=float, default=430)
    parser.add_argument("--exp", default="quality")
    parser.add_argument("--rate_steps", type=int, default=90, help="steps of the short run")
    parser.add_argument("--margin", type=float, default=0.97, help="share of the time to plan for")
    parser.add_argument("--set", nargs="+", action="extend", default=[])
    arguments = parser.parse_args()
    common = ["-n", arguments.dataset_name]
    settings = ["--set", "experiment_path=experiment", *arguments.set]
    quiet = ["train.epochs=100000", "train.val_every=100000", "train.checkpoint_start=100000"]

    rate_exp = f"{arguments.exp}-rate"
    short = [f"train.max_steps={arguments.rate_steps}"]
    short += [f"train.log_every={arguments.rate_steps // 3}"]
    run("train.py", *common, "--exp", rate_exp, *settings, *quiet, *short)
    name = dataset_name(arguments.dataset_name, settings[1:])
    rows = metrics(name, rate_exp)
    started, (before, last) = rows[0]["elapsed_s"], rows[-2:]
    steps_per_s = (last["step"] - before["step"]) / (last["elapsed_s"] - before["elapsed_s"])
    steps = int((arguments.seconds - started) * arguments.margin * steps_per_s)
    print(f"{steps_per_s:.2f} steps/s: {steps} steps in {arguments.seconds:.0f} s", flush=True)

    run("train.py", *common, "--exp", arguments.exp, *settings, *quiet, f"train.max_steps={steps}",
        "train.log_every=50")  # fmt: skip
    last = metrics(name, arguments.exp)[-1]
    print(f"trained {last['step']} steps in {last['elapsed_s']:.0f} s", flush=True)
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
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
