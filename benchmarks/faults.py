"""Train under kill -9 at random moments, and compare with a run that nobody disturbed.

    python benchmarks/faults.py                       # 20 kills, into results/faults.md
    python benchmarks/faults.py --kills 5 --seed 3 --out faults.md

Both runs train the demo network on drawn scenes of 64x96 on the CPU, saving at every epoch's end.
One is killed again and again with SIGKILL: in turn at a random time after its start, at a random
time after its first save, and while it is writing a checkpoint. After each kill it is started with
the same command (train.py --resume). At the end every value of both final checkpoints must be the
same bit for bit: weights, moments, generators.
"""

import argparse
import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloader.synthetic import write_dataset
from engine.checkpoint import load_checkpoint
from utils.cli import run_main
from utils.environment import git_commit

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = ("after its start", "after its first save", "during a save")
_POLL_S = 0.0005


class Kill(NamedTuple):
    """One SIGKILL."""

    step: int  # of epoch-last.pth afterwards; 0 where there is none
    was_saving: bool  # a file was left half-written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = compare(Path(scratch), arguments)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def compare(scratch: Path, arguments: argparse.Namespace) -> str:
    """Both runs and the report about them."""
    counts = {"train": 8, "val": 2, "test": 2}
    write_dataset(scratch / "Demo", counts=counts, height=64, width=96, seed=1)

    def start(exp: str) -> int:
        command = [sys.executable, "train.py", "-n", "demo", "-d", "cpu", "--exp", exp, "--resume"]
        settings = [
            f"data.dataset_path={scratch / 'Demo'}",
            f"experiment_path={scratch}",
            f"train.epochs={arguments.epochs}",
            "train.crop=[32,32]",
            "train.batch_size=2",
            "train.val_every=1000",
            "train.checkpoint_start=1",
            "train.checkpoint_every=10",
            "train.save_every_s=0",
            "train.log_every=1",
            "train.ema_decay=0.99",
            "model.drop_path=0.2",
        ]
        with open(scratch / f"{exp}.log", "ab") as log:
            process = subprocess.Popen(
                [*command, "--set", *settings], cwd=ROOT, stdout=log, stderr=log
            )
        process.returncode = 0  # this program waits for it by its number
        return process.pid

    begin = time.perf_counter()
    if finish(start("calm")) != 0:
        raise RuntimeError((scratch / "calm.log").read_text())
    calm_s = time.perf_counter() - begin
    folders = {exp: scratch / "Demo" / exp / "checkpoint" for exp in ("calm", "faults")}
    begin = time.perf_counter()
    kills = train_under_kills(
        lambda: start("faults"),
        folders["faults"],
        count=arguments.kills,
        longest_s=8.0,
        seed=arguments.seed,
    )
    faults_s = time.perf_counter() - begin
    calm, faults = (load_checkpoint(folders[exp] / "epoch-last.pth") for exp in folders)
    different = differences(faults._asdict(), calm._asdict())
    tensors = sum(1 for _ in leaves(calm._asdict()))
    rows = "\n".join(
        f"| {number} | {kill.step} | {'yes' if kill.was_saving else 'no'} |"
        for number, kill in enumerate(kills, 1)
    )
    return (
        f"# Training under kill -9\n\n"
        f"`python benchmarks/faults.py --kills {arguments.kills} --epochs {arguments.epochs} "
        f"--seed {arguments.seed}`, commit {git_commit()}, torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads.\n\n"
        f"The demo network on the CPU, {calm.step} steps with a save every 4, drop path 0.2, "
        f"EMA 0.99. Undisturbed {calm_s:.0f} s; with {len(kills)} kills, "
        f"{sum(kill.was_saving for kill in kills)} of them during a save, {faults_s:.0f} s.\n\n"
        f"**{len(different)} of {tensors} values of the final checkpoints differ** "
        f"(weights, their average, moments, generators, counters; compared bit for bit).\n"
        f"{''.join(f'{chr(10)}- {name}' for name in different)}\n"
        f"| kill | step of epoch-last.pth | half-written file left |\n|---|---|---|\n{rows}\n"
    )


def train_under_kills(
    start: Callable[[], int], checkpoints: Path, *, count: int, longest_s: float, seed: int
) -> list[Kill]:
    """Start a run again and again, kill it `count` times, and let it end.

    Args:
        start: begins or goes on with the run in a child process; returns its number.
        checkpoints: the run's checkpoint folder.
        longest_s: of the random time before a kill.
    Raises:
        RuntimeError: the run ended with an error, or before the last kill.
    """
    draws, kills = random.Random(seed), []
    while len(kills) < count:
        unfinished = _unfinished(checkpoints)
        pid = start()
        wait_for_moment(pid, checkpoints, MOMENTS[len(kills) % 3], draws.uniform(0, longest_s))
        if has_ended(pid):
            raise RuntimeError(f"the run ended before kill {len(kills) + 1}: give it more epochs")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills.append(Kill(_step(checkpoints), bool(_unfinished(checkpoints) - unfinished)))
    if finish(start()) != 0:
        raise RuntimeError("the run did not end well")
    if _unfinished(checkpoints):
        raise RuntimeError(f"left behind: {_unfinished(checkpoints)}")
    return kills


def wait_for_moment(pid: int, checkpoints: Path, moment: str, pause_s: float) -> None:
    """Return at one of MOMENTS in the child's life, or at its end."""
    saved, unfinished = _newest(checkpoints), _unfinished(checkpoints)

    def wait_until(happened: Callable[[], object]) -> None:
        while not happened() and not has_ended(pid):
            time.sleep(_POLL_S)

    if moment != "after its start":
        wait_until(lambda: _newest(checkpoints) != saved)
    end = time.monotonic() + pause_s
    wait_until(lambda: time.monotonic() >= end)
    if moment == "during a save":
        wait_until(lambda: _unfinished(checkpoints) - unfinished)


def has_ended(pid: int) -> bool:
    """Whether the child is done; finish() can still tell how."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(pid: int) -> int:
    """Wait for the child's end; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def differences(found: Any, expected: Any, name: str = "checkpoint") -> list[str]:
    """Names of the values that are not the same bit for bit."""
    pairs = dict(leaves(found, name)), dict(leaves(expected, name))
    return sorted(pairs[0].keys() ^ pairs[1].keys()) + [
        key for key in pairs[0].keys() & pairs[1].keys() if not _is_same(*(p[key] for p in pairs))
    ]


def leaves(tree: Any, name: str = "checkpoint") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts, lists and tuples with its place."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}")
    else:
        yield name, tree


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    return a == b


def _newest(checkpoints: Path) -> int:
    """When epoch-last.pth was written; 0 where there is none."""
    path = checkpoints / "epoch-last.pth"
    return path.stat().st_mtime_ns if path.exists() else 0


def _unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    """Files that are being written, or were when their writer ended: name and time."""
    found = set()
    for path in checkpoints.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def _step(checkpoints: Path) -> int:
    path = checkpoints / "epoch-last.pth"
    return load_checkpoint(path).step if path.exists() else 0


if __name__ == "__main__":
    run_main(main)
