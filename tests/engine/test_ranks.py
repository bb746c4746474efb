"""Processes that die: the others end, or go on without them, started by torchrun as users do."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from configs import load_config
from engine.checkpoint import load_checkpoint
from tests.engine.ports import free_port
from utils.run_folder import RunFolder

pytestmark = pytest.mark.slow

WORKER = """
import atexit, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from configs import load_config
from dataloader.build import build_eval_loader, build_train_loader
from engine import trainer
from engine.state import starting_point
from engine.trainer import fit
from models import CMFSOutput
from models.text_prior import TextPrior
from utils.cli import run_main
from utils.distributed import setup_devices, shutdown
from utils.errors import InputError
from utils.run_folder import RunFolder


class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.text_prior = TextPrior(torch.eye(2), source="none")
        self.conv = nn.Conv2d(6, num_classes + 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(num_classes + 3)

    def forward(self, rgb, thermal):
        time.sleep(0.05)
        x = self.norm(self.conv(torch.cat([rgb, thermal], dim=1)))
        return CMFSOutput(x[:, 3:], x[:, :3].sigmoid(), balance_loss=x.new_ones(()))

    def expert_shares(self):
        return torch.tensor([[0.5, 0.5]])


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--local-rank")]
    scratch, then, device = Path(words[0]), words[1], words[2]
    config = load_config("demo", words[3:])
    folder = RunFolder(config)
    resume_from = starting_point(folder, resume=True)
    devices = setup_devices(device if device == "cpu" else None, None)
    (scratch / f"pid{devices.rank}of{devices.world_size}").write_text(str(os.getpid()))
    while then == "goes on" and devices.world_size == 1 and not (scratch / "pid1of2").exists():
        time.sleep(0.05)  # for the other host, which may be slow to come
    real, seen = trainer.train_step, []

    def train_step(*arguments):
        seen.append(1)
        if devices.rank == 1 and len(seen) == 5:  # GPUs replay a recorded step by now
            if then == "fails":
                atexit.register(time.sleep, 60)  # an orderly end would wait, as NCCL's may
                raise InputError("image 7 of rank 1 is no image")
            if then == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    trainer.train_step = train_step
    trainer.evaluate_segmentation = lambda *_, **__: {"miou": None, "class_iou": {}}
    ranks = {"rank": devices.rank, "world_size": devices.world_size}
    fit(
        config,
        Network(config.data.num_classes),
        build_train_loader(config, **ranks),
        build_eval_loader(config, "val", **ranks),
        folder=folder,
        devices=devices,
        resume_from=resume_from,
    )
    shutdown()


run_main(main)
"""


@pytest.fixture
def launch(demo_dataset, tmp_path):
    """Start torchrun with the options; gives the process, which leads a group of its own."""
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(
        *options: str, then: str, epochs: int, module: str = "run", device: str = "cpu"
    ) -> subprocess.Popen:
        settings = [
            f"data.dataset_path={demo_dataset}",
            f"experiment_path={tmp_path}",
            f"train.epochs={epochs}",
            "train.crop=[32,32]",
            "train.batch_size=4",
            "train.save_every_s=0",
            "train.log_every=1",
        ]
        paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
        launcher = [sys.executable, "-m", f"torch.distributed.{module}", *options]
        process = subprocess.Popen(
            [*launcher, str(tmp_path / "worker.py"), str(tmp_path), then, device, *settings],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(path: Path, text: str, *processes: subprocess.Popen) -> None:
    end = time.monotonic() + 150  # two torchruns and their processes start on a busy machine
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"no {text} in {path.name}"
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(0.05)


def wait_for_port(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end, "nobody listens"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("then", "module", "error"),
    [
        ("fails", "launch", "error: image 7 of rank 1 is no image"),
        ("dies", "run", "Signal 9 (SIGKILL) received"),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_its_error_on_screen(
    launch, tmp_path, then, module, error
):
    options = ("--nproc_per_node=2", f"--master_port={free_port()}")
    process = launch(*options, then=then, epochs=1000, module=module)
    assert_ends_in_time(process, tmp_path, error)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    ("then", "error"), [("fails", "error: image 7"), ("dies", "Signal 9 (SIGKILL) received")]
)
def test_a_rank_that_dies_frees_the_other_ranks_gpu(launch, tmp_path, then, error):
    """NCCL itself would wait for it for ten minutes."""
    options = ("--nproc_per_node=2", f"--master_port={free_port()}")
    process = launch(*options, then=then, epochs=1000, device="cuda")
    assert_ends_in_time(process, tmp_path, error)


def assert_ends_in_time(process: subprocess.Popen, scratch: Path, error: str) -> None:
    wait_for(scratch / "pid1of2", "", process)
    begin = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert time.monotonic() - begin < 30
    assert process.returncode != 0
    assert error in err
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((scratch / f"pid{rank}of2").read_text()), 0)


def test_a_host_that_is_lost_leaves_the_run_to_the_other(launch, tmp_path):
    """Two torchrun agents stand for two hosts; one is killed with all that it runs."""
    port = free_port()
    options = [
        "--nnodes=1:2",
        "--nproc_per_node=1",
        "--max_restarts=3",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_conf=last_call_timeout=30,keep_alive_interval=2,keep_alive_max_attempt=6",
    ]
    first = launch(*options, then="goes on", epochs=20)
    wait_for_port(port)  # the first holds the rendezvous
    second = launch(*options, then="goes on", epochs=20)
    config = load_config("demo", [f"experiment_path={tmp_path}"])
    folder = RunFolder(config)
    wait_for(tmp_path / "pid1of2", "", first, second)
    wait_for(folder.metrics_file, '"step": 6,', first, second)
    workers = [int((tmp_path / f"pid{rank}of2").read_text()) for rank in range(2)]
    parents = {
        worker: int(Path(f"/proc/{worker}/stat").read_text().split()[3]) for worker in workers
    }
    second.kill()
    for worker in workers:
        if parents[worker] == second.pid:
            os.kill(worker, signal.SIGKILL)
    _, err = first.communicate(timeout=150)
    assert first.returncode == 0, err[-3000:]
    assert (tmp_path / "pid0of1").exists(), "the run did not go on with one process"
    saved = load_checkpoint(folder.last_checkpoint)
    assert saved.step == 40
    assert len(saved.training_state["rng"]) == 1
    steps = [line.split(",")[0] for line in folder.metrics_file.read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 41)]
