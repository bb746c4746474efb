"""train.py from its arguments to its exit code."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from configs import load_config
from dataloader.build import build_train_loader
from dataloader.preview import augmentation_sheet
from engine.checkpoint import load_checkpoint, select_checkpoints
from utils.cli import run_main
from utils.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def arguments(demo_dataset, tmp_path) -> list[str]:
    return [
        *["-n", "Demo", "-d", "cpu", "--set"],
        f"data.dataset_path={demo_dataset}",
        f"experiment_path={tmp_path}",
        "train.crop=[32,32]",
        "train.batch_size=2",
        "train.log_every=1",
    ]


@pytest.fixture
def run_train(monkeypatch, capsys):
    """Run train.py in this process; gives its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_main(train.main)
        return stop.value.code or 0, *capsys.readouterr()

    return run


def assert_one_error_line(outcome, *words):
    code, _, err = outcome
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_unknown_dataset_names_the_nearest(run_train):
    """Method, Sec. 8, defect 7: an unknown name silently trained MFNet."""
    assert_one_error_line(run_train("-n", "mfnett"), "'mfnett'", "did you mean 'mfnet'", "pst900")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["-n/--dataset_name", "--help"]),
        (["-n", "demo", "--set", "train.batchsize=2"], ["batchsize", "batch_size"]),
        (["-n", "demo", "--exp", "../other"], ["--exp"]),
        (["-n", "demo", "-e", "5"], ["-e"]),
    ],
    ids=["no dataset", "unknown key", "folder elsewhere", "unknown flag"],
)
def test_bad_arguments(run_train, flags, words):
    assert_one_error_line(run_train(*flags), *words)


def test_gpus_that_are_not_there(run_train, arguments):
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    outcome = run_train(*arguments, "-d", "0,1", "-p", "29588")
    assert_one_error_line(outcome, "no CUDA device is visible")


def test_missing_validation_list_is_found_before_the_first_step(run_train, arguments, tmp_path):
    (tmp_path / "data").mkdir()
    for entry in Path(arguments[5].partition("=")[2]).iterdir():
        if entry.name != "val.txt":
            (tmp_path / "data" / entry.name).symlink_to(entry)
    outcome = run_train(*arguments, f"data.dataset_path={tmp_path / 'data'}")
    assert_one_error_line(outcome, "val.txt")
    assert not list(tmp_path.rglob("*.pth"))


def test_a_pair_that_trains_and_validates_is_refused(run_train, arguments, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    source = Path(arguments[5].partition("=")[2])
    for entry in source.iterdir():
        if entry.name != "train.txt":
            (data / entry.name).symlink_to(entry)
    lists = [(source / f"{split}.txt").read_text() for split in ("train", "val")]
    (data / "train.txt").write_text("".join(lists))
    outcome = run_train(*arguments, f"data.dataset_path={data}")
    assert_one_error_line(outcome, "leakage: 2 names are in train.txt and in val.txt")
    assert not list(tmp_path.rglob("*.pth"))


def test_a_file_that_is_cut_short_in_mid_training_names_itself(run_train, arguments, tmp_path):
    """In a worker, in an epoch after the first checkpoint, which stays whole."""
    source, data = Path(arguments[5].partition("=")[2]), tmp_path / "data"
    shutil.copytree(source, data)
    stem = (data / "train.txt").read_text().split()[-1]  # not drawn in the preview at the start
    path = data / "Modal" / f"{stem}.png"
    settings = (f"data.dataset_path={data}", "data.num_workers=2", "train.save_every_s=0")
    assert run_train(*arguments, *settings, "train.max_steps=4")[0] == 0
    path.write_bytes(path.read_bytes()[:-600])
    outcome = run_train(*arguments, *settings, "train.max_steps=8", "--resume")
    assert_one_error_line(outcome, str(path), "cut short")
    assert load_checkpoint(tmp_path / "Demo" / "exp" / "checkpoint" / "epoch-last.pth").step == 4


def test_help_is_the_manual(run_train):
    code, out, _ = run_train("--help")
    assert code == 0
    assert train.__doc__.strip() in out
    assert "--resume" in out and "(default: exp)" in out


def test_a_started_run_is_not_overwritten(run_train, arguments, tmp_path):
    folder = tmp_path / "Demo" / "exp"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "best.pth").touch()
    assert_one_error_line(run_train(*arguments), str(folder), "--resume", "--exp NAME")
    assert {path.name for path in folder.iterdir()} == {"checkpoint", ".lock"}


def stop_after_a_step(process: subprocess.Popen, metrics: Path) -> None:
    """SIGTERM as soon as a step has been logged."""
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None:
        assert time.monotonic() < end, "no step within two minutes"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)


def test_sigterm_saves_and_resume_goes_on(run_train, arguments, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    stop_after_a_step(process, tmp_path / "Demo" / "exp" / "metrics.jsonl")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = tmp_path / "Demo" / "exp" / "checkpoint" / "epoch-last.pth"
    step = load_checkpoint(last).step
    assert step >= 1

    code, out, err = run_train(*arguments, f"train.max_steps={step + 1}", "--resume")
    assert code == 0, err
    assert f"step {step + 1}/{step + 1}" in out
    assert load_checkpoint(last).step == step + 1
    log_lines = (last.parents[1] / "train_output.log").read_text()
    assert f"SIGTERM: saved after step {step}" in log_lines
    assert "resumed from" in log_lines


@pytest.mark.slow
def test_torchrun_stops_all_ranks_of_the_paper_s_command(arguments, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launcher, f"--master_port={port}", "train.py", "-p", port, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stop_after_a_step(process, tmp_path / "Demo" / "exp" / "metrics.jsonl")
    out, _ = process.communicate(timeout=60)
    assert out.count("SIGTERM: saved after step") == 1, out
    assert "UserWarning" not in out
    saved = load_checkpoint(tmp_path / "Demo" / "exp" / "checkpoint" / "epoch-last.pth")
    assert saved.step >= 1 and len(saved.training_state["rng"]) == 2


def in_small_disk(size: str, disk: Path, command: list[str], then: str) -> tuple[int, str, str]:
    """Run a command while `disk` is a file system of that size, then a line of shell in it.

    Gives the command's exit code and stderr, and what the line said.
    """
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" || exit 77; cd "$3"; shift 3; "$@" >/dev/null'
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{script}; echo $?; {then}", "sh", size, disk, ROOT]
        + command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip(f"no file system of our own may be mounted here: {found.stderr.strip()}")
    code, _, said = found.stdout.partition("\n")
    return int(code), found.stderr, said


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's unshare")
@pytest.mark.parametrize(
    ("size", "error", "step"),
    [("24m", "disk full while saving .*epoch-last.pth; the previous checkpoint is intact", 4),
     ("16k", "No space left on device", None)],
    ids=["a checkpoint", "a log"],
)  # fmt: skip
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(arguments, tmp_path, size, error, step):
    """A real file system: the second save of 14 MB does not fit, or not the first log lines."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    command = [sys.executable, "train.py", *arguments, f"experiment_path={disk}"]
    settings = ["train.save_every_s=0", "train.val_every=99", "train.epochs=50"]
    code, err, said = in_small_disk(
        size, disk, [*command, *settings], f"cp -r {disk}/Demo/exp/checkpoint {kept}; ls {disk}"
    )
    assert code == 2, err
    lines = [line for line in err.splitlines() if not line.startswith("cp: ")]
    assert len(lines) == 1 and re.match(f"error: {error}", lines[0]), err
    assert said.strip() == "Demo"
    if step is not None:
        assert load_checkpoint(kept / "checkpoint" / "epoch-last.pth").step == step
        assert {path.name for path in (kept / "checkpoint").iterdir()} == {
            "epoch-last.pth", "epoch-last.pth.sha256",
        }  # fmt: skip


def test_one_run_from_nothing_leaves_what_eval_looks_for(run_train, arguments, tmp_path):
    """Method, Sec. 8, defect 7: train and eval looked in different folders."""
    changes = ["train.max_steps=1", "train.batch_size=8"]
    code, out, err = run_train(*arguments, *changes, "--resume", "--exp", "other")
    assert code == 0, err
    assert "there is no checkpoint" in out and "training begins" in out
    config = train.load_config("demo", [f"experiment_path={tmp_path}"])
    folder = RunFolder(config, "other")
    assert select_checkpoints(folder.checkpoints, "best") == [folder.best_checkpoint]
    assert {path.name for path in folder.path.iterdir()} == {
        "checkpoint", "tb", "train_output.log", "config.yaml", "environment.json", "metrics.jsonl",
        ".lock",
    }  # fmt: skip


def test_the_augmentation_is_drawn_in_tensorboard(run_train, arguments, tmp_path):
    strong = ["augment.probability=1.0", "augment.cutmix=1.0", "train.max_steps=1"]
    assert run_train(*arguments, *strong)[0] == 0
    events = EventAccumulator(str(tmp_path / "Demo" / "exp" / "tb")).Reload()
    (sheet,) = events.Images("augmentation")
    assert sheet.step == 0
    pixels = cv2.imdecode(np.frombuffer(sheet.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    pairs = build_train_loader(load_config("demo", [*arguments[5:], *strong])).dataset
    np.testing.assert_array_equal(pixels[..., ::-1], augmentation_sheet(pairs))
