"""Ranks and devices: one process per GPU under torchrun, one plain process otherwise."""

import logging
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import InputError

log = logging.getLogger(__name__)


class Devices(NamedTuple):
    """Where this process computes, and its place among the others."""

    device: torch.device
    rank: int
    local_rank: int
    world_size: int


def start_processes(devices: str | None, port: int | None) -> None:
    """Become torchrun with one process per GPU, where -d lists several and nothing started them.

    It starts this very command anew in each process. Returns where there is nothing to do.

    Args:
        devices: -d.
        port: -p, of the rendezvous; None takes a free one.
    Raises:
        InputError: no such GPU.
    """
    indices = _parse_devices(devices)
    if "WORLD_SIZE" in os.environ or indices is None or len(indices) < 2:
        return
    for index in indices:
        _check_visible(index)
    rendezvous = "--standalone" if port is None else f"--master_port={port}"
    launcher = ["-m", "torch.distributed.run", rendezvous, f"--nproc_per_node={len(indices)}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def setup_devices(devices: str | None, port: int | None) -> Devices:
    """Choose this process's device and, where there are several processes, connect them.

    Args:
        devices: -d: "0", "0,1", "cpu", or None for the GPU of the local rank (else the CPU).
        port: -p. Under torchrun its own rendezvous is used, and a disagreement is logged.
    Raises:
        InputError: no such GPU, or several GPUs for a single process.
    """
    rank, local_rank, processes = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    indices = _parse_devices(devices)
    if processes == 1:
        _check_single_process(indices, port)
    _compare_with_torchrun(indices, port)
    device = _choose_device(indices, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method="env://")
    return Devices(device, rank, local_rank, processes)


def is_main_process() -> bool:
    """Whether this process writes files and logs; known before the ranks are connected, too."""
    return (dist.get_rank() if _is_connected() else int(os.environ.get("RANK", 0))) == 0


def world_size() -> int:
    """How many ranks are connected."""
    return dist.get_world_size() if _is_connected() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if _is_connected():
        dist.all_reduce(torch.zeros(()))


def shutdown() -> None:
    """Disconnect the ranks, where they are connected."""
    if _is_connected():
        time.sleep(0.05)  # PyTorch 2.4 waits for a thread of gloo's that may wait for this one
        dist.destroy_process_group()


def reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; returns it."""
    if _is_connected():
        dist.all_reduce(tensor)
    return tensor


def average(tensors: list[Tensor]) -> None:
    """Give tensors of one type their means over all ranks, in place and in one exchange."""
    if not _is_connected():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).div_(world_size())
    parts = reduce_sum(flat).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(
        tensors, [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]
    )


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank the first rank's values, in place."""
    if _is_connected():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def largest(value: int) -> int:
    """The largest of all ranks' values, on every rank."""
    tensor = torch.tensor(value)
    if _is_connected():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if not _is_connected():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _is_connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def _parse_devices(devices: str | None) -> list[int] | None:
    """GPU indices of -d; [] is the CPU, None is the default."""
    if devices is None:
        return None
    if devices.strip().lower() == "cpu":
        return []
    parts = [part.strip() for part in devices.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise InputError(f'-d takes "cpu" or GPU numbers like "0" or "0,1", got "{devices}"')
    return [int(part) for part in parts]


def _check_single_process(indices: list[int] | None, port: int | None) -> None:
    if indices is not None and len(indices) > 1:
        chosen = ",".join(map(str, indices))
        rendezvous = "--standalone" if port is None else f"--master_port={port}"
        raise InputError(
            f"-d {chosen} names {len(indices)} GPUs, but this is one process; start one for each: "
            f"torchrun --nproc_per_node={len(indices)} {rendezvous} train.py -d {chosen} ..."
        )
    if indices is None and torch.cuda.device_count() > 1:
        log.info(
            "this is one process, so one of %d visible GPUs is used; torchrun starts more",
            torch.cuda.device_count(),
        )


def _compare_with_torchrun(indices: list[int] | None, port: int | None) -> None:
    """Say where -d and -p differ from what torchrun has set."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if indices and len(indices) != local_world_size:
        log.warning(
            "-d lists %d GPUs but torchrun started %d processes here: torchrun's number is used, "
            "and each process takes the GPU of its local rank",
            len(indices),
            local_world_size,
        )
    master_port = os.environ.get("MASTER_PORT")
    if port is not None and master_port is not None and master_port != str(port):
        log.warning("-p %d differs from torchrun's port %s, which is used", port, master_port)


def _choose_device(indices: list[int] | None, local_rank: int) -> torch.device:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if indices == [] or (indices is None and visible == 0):
        return torch.device("cpu")
    listed = indices is not None and len(indices) == local_world_size
    index = indices[local_rank] if indices and listed else local_rank
    _check_visible(index)
    return torch.device("cuda", index)


def _check_visible(index: int) -> None:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible == 0:
        raise InputError("-d asks for a GPU, but no CUDA device is visible; use -d cpu")
    if index >= visible:
        raise InputError(
            f"GPU {index} is not visible: this machine shows {visible}, numbered from 0 "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); "
            f"choose others with -d, or fewer processes"
        )
