"""Devices of one process; several connected ranks are in tests/engine/test_trainer.py."""

import logging
import sys

import pytest
import torch

from utils import distributed
from utils.distributed import (
    Devices,
    barrier,
    gather_objects,
    is_main_process,
    largest,
    reduce_sum,
    setup_devices,
    start_processes,
    world_size,
)
from utils.errors import InputError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture
def machine(monkeypatch):
    """Pretend some visible GPUs and, with `local_world_size`, torchrun; nothing is connected."""

    def pretend(gpus, *, local_world_size=None, local_rank=0):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        if local_world_size is not None:
            values = (local_rank, local_rank, local_world_size, local_world_size, 29501)
            for name, value in zip(VARIABLES, values, strict=True):
                monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed.dist, "init_process_group", lambda *a, **k: None)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "devices", "expected"),
    [
        (0, None, "cpu"),
        (0, "cpu", "cpu"),
        (0, "CPU", "cpu"),
        (1, None, "cuda:0"),
        (4, None, "cuda:0"),
        (4, "3", "cuda:3"),
        (4, "cpu", "cpu"),
    ],
)
def test_single_process(machine, gpus, devices, expected):
    machine(gpus)
    assert setup_devices(devices, None) == Devices(torch.device(expected), 0, 0, 1)


@pytest.mark.parametrize("local_rank", [0, 1])
@pytest.mark.parametrize(
    ("devices", "expected"), [(None, (0, 1)), ("0,1", (0, 1)), ("3,2", (3, 2))]
)
def test_under_torchrun_each_rank_has_its_own_gpu(machine, local_rank, devices, expected):
    machine(4, local_world_size=2, local_rank=local_rank)
    device = torch.device("cuda", expected[local_rank])
    assert setup_devices(devices, None) == Devices(device, local_rank, local_rank, 2)


@pytest.mark.parametrize("devices", ["0,0", "gpu", "1,", "-1", "", "0 1"])
def test_unreadable_lists_are_refused(machine, devices):
    machine(2)
    with pytest.raises(InputError, match='-d takes "cpu" or'):
        setup_devices(devices, None)


def test_two_gpus_in_one_process_are_told_the_command(machine):
    machine(2)
    with pytest.raises(InputError, match=r"torchrun --nproc_per_node=2 --master_port=29588 .* 0,1"):
        setup_devices("0,1", 29588)


@pytest.mark.parametrize(
    ("port", "rendezvous"), [(None, "--standalone"), (29588, "--master_port=29588")]
)
def test_several_gpus_start_torchrun_on_a_free_port_or_the_given_one(
    machine, monkeypatch, port, rendezvous
):
    machine(2)
    started = []
    monkeypatch.setattr(distributed.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["train.py", "-n", "demo; rm -rf x", "-d", "0,1"])
    start_processes("0,1", port)
    launcher = ["-m", "torch.distributed.run", rendezvous, "--nproc_per_node=2"]
    assert started == [(sys.executable, [sys.executable, *launcher, *sys.argv])]


@pytest.mark.parametrize("devices", [None, "cpu", "1"])
def test_one_process_is_not_started_again(machine, monkeypatch, devices):
    machine(2)
    monkeypatch.setattr(distributed.os, "execv", lambda *_: pytest.fail("started"))
    start_processes(devices, None)


def test_torchruns_processes_start_no_others(machine, monkeypatch):
    machine(2, local_world_size=2)
    monkeypatch.setattr(distributed.os, "execv", lambda *_: pytest.fail("started"))
    start_processes("0,1", None)


def test_processes_for_a_gpu_that_is_not_there_are_not_started(machine, monkeypatch):
    machine(2)
    monkeypatch.setattr(distributed.os, "execv", lambda *_: pytest.fail("started"))
    with pytest.raises(InputError, match="GPU 2 is not visible"):
        start_processes("1,2", None)


def test_gpu_without_cuda_is_refused(machine):
    machine(0)
    with pytest.raises(InputError, match="use -d cpu"):
        setup_devices("0", None)


def test_invisible_gpu_is_refused(machine):
    machine(2)
    with pytest.raises(InputError, match="GPU 2 is not visible"):
        setup_devices("2", None)


def test_more_processes_than_gpus_are_refused(machine):
    machine(1, local_world_size=2, local_rank=1)
    with pytest.raises(InputError, match="GPU 1 is not visible"):
        setup_devices(None, None)


def test_torchruns_port_and_number_win_and_that_is_said(machine, caplog):
    machine(2, local_world_size=2, local_rank=1)
    with caplog.at_level(logging.WARNING):
        assert setup_devices("0", 29588).device == torch.device("cuda:1")
    assert "-p 29588 differs from torchrun's port 29501" in caplog.text
    assert "-d lists 1 GPUs but torchrun started 2" in caplog.text


def test_agreement_with_torchrun_is_silent(machine, caplog):
    machine(2, local_world_size=2)
    with caplog.at_level(logging.WARNING):
        setup_devices("0,1", 29501)
    assert caplog.text == ""


def test_helpers_of_a_single_process():
    assert is_main_process()
    assert world_size() == 1
    assert largest(3) == 3
    assert gather_objects("a") == ["a"]
    barrier()
    tensor = torch.ones(2)
    assert reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1, 1]


def test_main_process_is_known_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()
