"""The selective scan on this machine's CPU against the loops that are usual in its place.

    python benchmarks/ops_cpu.py                # one thread, the cases of the results file
    python benchmarks/ops_cpu.py --threads 2 --repeats 9

Forward, and forward + backward of all gradients, float32, best of the repeats (other work on the
machine only ever adds time); one process, the backends taking turns. The loop over unbound slices
is the fastest way to write the recurrence down without a backward of one's own.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.ops.selective_scan import selective_scan
from utils.environment import environment_info

CASES = [(1, 192, 1, 4800), (1, 192, 1, 19200), (1, 192, 16, 4800), (1, 192, 16, 19200)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"machine: {environment_info()}, {arguments.threads} threads\n")
    print("| B | D | N | L | scan | forward ms | ratio | forward + backward ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    scans = {"loop": loop} | {name: backend_of(name) for name in ("chunked", "native")}
    for sizes in CASES:
        inputs = make_inputs(*sizes)
        times = {name: [] for name in scans}
        for _ in range(arguments.repeats):
            for name, scan in scans.items():
                times[name].append(measure(scan, inputs))
        best = {name: [min(column) for column in zip(*rows, strict=True)]
                for name, rows in times.items()}  # fmt: skip
        for name, (forward, both) in best.items():
            ratios = [best["loop"][0] / forward, best["loop"][1] / both]
            print(
                f"| {' | '.join(map(str, sizes))} | {name} | {1e3 * forward:.1f} "
                f"| {ratios[0]:.1f} | {1e3 * both:.1f} | {ratios[1]:.1f} |",
                flush=True,
            )


def make_inputs(batch: int, channels: int, states: int, length: int) -> list[Tensor]:
    """u, delta, A, B, C, D and delta_bias of one group."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = [normal(batch, channels, length) for _ in range(2)]
    matrices = [normal(batch, 1, states, length) for _ in range(2)]
    A = -torch.exp(0.5 * normal(channels, states))
    inputs = [*tokens, A, *matrices, normal(channels), 0.1 * normal(channels)]
    return [x.requires_grad_() for x in inputs]


def loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """The recurrence over unbound slices, one group."""
    dt = F.softplus(delta + bias[:, None])
    decays = torch.exp(dt[:, :, None] * A[:, :, None]).unbind(-1)  # (B, D, N) each
    inputs = ((dt * u)[:, :, None] * B).unbind(-1)
    state, outputs = torch.zeros_like(decays[0]), []
    for decay, x, c in zip(decays, inputs, C.unbind(-1), strict=True):
        state = decay * state + x
        outputs.append((state * c).sum(-1))
    return torch.stack(outputs, dim=-1) + D[:, None] * u


def backend_of(name: str) -> Callable[..., Tensor]:
    def scan(u, delta, A, B, C, D, bias):
        return selective_scan(u, delta, A, B, C, D, delta_bias=bias, backend=name)

    return scan


def measure(scan: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Seconds of a forward alone, and of a forward with all gradients."""
    with torch.no_grad():
        start = time.perf_counter()
        y = scan(*inputs)
        forward = time.perf_counter() - start
    weight = torch.ones_like(y)
    start = time.perf_counter()
    torch.autograd.grad(scan(*inputs), inputs, weight)
    return forward, time.perf_counter() - start


if __name__ == "__main__":
    main()
