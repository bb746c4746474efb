"""The scans on this machine's GPU against mamba-ssm's CUDA kernel and the memory bandwidth.

    python benchmarks/ops_cuda.py               # needs mamba-ssm for the ratios
    python benchmarks/ops_cuda.py --repeats 30

Forward, and forward + backward of all gradients. Each number is the median time of a CUDA graph of
calls, replayed, over as many sets of random inputs as exceed the L2 cache: time on the GPU alone,
without the launches. The floor is the time to move each input and output once, at the bandwidth
of a large copy (read + written) in the same run. The four-direction scan is set against the same
function composed of cross-scan, projections, mamba-ssm's scan and merge.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.ops.selective_scan import selective_scan
from models.ops.ss2d_scan import ss2d_scan
from utils.environment import environment_info

CACHE = 150e6  # bytes of inputs that no L2 cache holds

# name, batch, D, N, L, K, dtype
SCANS = [
    ("encoder stage 0", 1, 384, 1, 19200, 4, torch.float32),
    ("encoder stage 0", 4, 384, 1, 19200, 4, torch.float32),
    ("encoder stage 0", 4, 384, 1, 19200, 4, torch.bfloat16),
    ("FSC stage 0", 1, 1536, 8, 19200, 4, torch.float32),
    ("FSC stage 1", 1, 3072, 16, 4800, 4, torch.float32),
    ("segmentation head", 1, 4096, 16, 19200, 4, torch.float32),
    ("MoE Mamba stage 0", 1, 192, 64, 19200, 1, torch.float32),
    ("MIA Mamba stage 0", 1, 192, 16, 19200, 1, torch.float32),
]
# name, batch, D, N, R, (H, W), order
MAPS = [
    ("encoder stage 0", 1, 96, 1, 6, (120, 160), "cross"),
    ("encoder stage 0", 4, 96, 1, 6, (120, 160), "cross"),
    ("encoder stage 2", 4, 384, 1, 24, (30, 40), "cross"),
    ("FSC stage 0", 1, 384, 8, 6, (120, 160), "cross"),
    ("FSC stage 0", 4, 384, 8, 6, (120, 160), "window"),
    ("FSC stage 1", 1, 768, 16, 12, (60, 80), "cross"),
    ("segmentation head", 1, 1024, 16, 32, (120, 160), "cross"),
    ("segmentation head", 4, 1024, 16, 32, (120, 160), "cross"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--backend", default="auto", help="of our scans (default: auto)")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    bandwidth = copy_bandwidth(arguments.repeats)
    has_mamba = importlib.util.find_spec("mamba_ssm") is not None
    print(f"machine: {environment_info()}\n\ncopy: {bandwidth / 1e12:.2f} TB/s\n")
    print("| selective scan | B | D | N | L | K | type | forward ms | mamba-ssm | ratio | of floor "
          "| forward + backward ms | mamba-ssm | ratio | of floor |")  # fmt: skip
    print("|" + "---|" * 15)
    for name, *sizes, dtype in SCANS:
        sets = rotated(functools.partial(scan_inputs, *sizes, dtype))
        ours = times(scan_with(arguments.backend), sets, arguments.repeats)
        theirs = times(scan_with("mamba_ssm"), sets, arguments.repeats) if has_mamba else None
        names = ("u", "delta", "A", "B", "C", "D", "bias")
        size = {n: x.nbytes for n, x in zip(names, sets[0], strict=True)}
        forward = 2 * size["u"] + size["delta"] + size["B"] + size["C"]
        backward = 3 * size["u"] + 2 * (size["delta"] + size["B"] + size["C"])
        floors = [forward / bandwidth, (forward + backward) / bandwidth]
        print(f"| {name} | {' | '.join(map(str, sizes))} | {str(dtype)[6:]} "
              f"| {cells(ours, theirs, floors)} |", flush=True)  # fmt: skip
        del sets
    print("\n| four directions | B | D | N | R | H x W | order | forward ms | composed | ratio "
          "| forward + backward ms | composed | ratio | peak MB | composed |")  # fmt: skip
    print("|" + "---|" * 15)
    for name, *sizes, hw, order in MAPS:
        sets = rotated(functools.partial(map_inputs, *sizes, hw))
        runs = [map_with(arguments.backend, order)] + [map_with("mamba_ssm", order)] * has_mamba
        found = [(times(run, sets, arguments.repeats), peak(run, sets[0])) for run in runs]
        ours, theirs = found[0][0], found[1][0] if has_mamba else None
        memory = [f"{bytes_ / 1e6:.0f}" for _, bytes_ in found] + ["–"] * (not has_mamba)
        print(f"| {name} | {' | '.join(map(str, sizes))} | {hw[0]} x {hw[1]} | {order} "
              f"| {cells(ours, theirs)} | {' | '.join(memory)} |", flush=True)  # fmt: skip
        del sets


def cells(
    ours: Sequence[float], theirs: Sequence[float] | None, floors: Sequence[float] | None = None
) -> str:
    """Time, other's time, ratio and share of the floor, for the forward and for both passes."""
    columns = []
    for index, time in enumerate(ours):
        columns += [f"{1e3 * time:.3f}"]
        columns += [f"{1e3 * theirs[index]:.3f}", f"{theirs[index] / time:.2f}"] if theirs else "––"
        columns += [f"{100 * floors[index] / time:.1f} %"] if floors else []
    return " | ".join(columns)


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy of 1 GB, by a kernel or by the copy engine."""
    source = torch.randn(250_000_000, device="cuda")
    target = torch.empty_like(source)
    copies = (lambda: torch.neg(source, out=target), lambda: target.copy_(source))
    return 2 * source.nbytes / min(graph_time([copy], repeats) for copy in copies)


def scan_inputs(
    batch: int, channels: int, states: int, length: int, groups: int, dtype: torch.dtype
) -> list[Tensor]:
    tokens = [normal(batch, channels, length).to(dtype) for _ in range(2)]
    matrices = [normal(batch, groups, states, length).to(dtype) for _ in range(2)]
    A = -torch.exp(0.5 * normal(channels, states))
    return leaves([*tokens, A, *matrices, normal(channels), 0.1 * normal(channels) - 2])


def map_inputs(
    batch: int, channels: int, states: int, rank: int, hw: tuple[int, int]
) -> list[Tensor]:
    return leaves(
        [
            normal(batch, channels, *hw),
            normal(4, rank + 2 * states, channels) / math.sqrt(channels),
            normal(4, channels, rank) / math.sqrt(rank),
            normal(4, channels) - 2,
            0.5 * normal(4 * channels, states),
            normal(4 * channels),
        ]
    )


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors]


def rotated(make: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """As many sets of inputs as exceed the cache together."""
    first = make()
    count = math.ceil(CACHE / sum(x.nbytes for x in first))
    return [first, *(make() for _ in range(count - 1))]


def scan_with(backend: str) -> Callable[[list[Tensor]], Tensor]:
    def run(inputs: list[Tensor]) -> Tensor:
        *arguments, bias = inputs
        return selective_scan(*arguments, delta_bias=bias, backend=backend)

    return run


def map_with(backend: str, order: str) -> Callable[[list[Tensor]], Tensor]:
    return lambda inputs: ss2d_scan(*inputs, scan=order, backend=backend)


def times(
    run: Callable[[list[Tensor]], Tensor], sets: list[list[Tensor]], repeats: int
) -> tuple[float, float]:
    """Seconds of a forward alone, and of a forward with all gradients."""

    def forward(inputs: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return run(inputs)

    weight = torch.randn_like(forward(sets[0]))

    def both(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(inputs), inputs, weight)

    return tuple(
        graph_time([functools.partial(call, inputs) for inputs in sets], repeats)
        for call in (forward, both)
    )


def graph_time(calls: list[Callable[[], object]], repeats: int) -> float:
    """Seconds of one call: the median replay of a graph of all of them, by their number."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    gaps = [begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)]
    return statistics.median(gaps) / 1e3 / len(calls)


def peak(run: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> int:
    """Bytes that a forward and backward take beside their inputs, at most."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = run(inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
