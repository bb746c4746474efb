"""Forward and train-step time and peak memory of the paper-size network.

    python benchmarks/model.py                                  # this machine's GPU, else its CPU
    python benchmarks/model.py --size 240 320 --batch 8 --precision bf16 --backend chunked triton

Random images and weights; medians of the timed repeats after a warm-up; one table per call.
"kept" is what a training forward leaves for the gradient; "replayed" the forward as eval.py and
predict.py run it on a GPU, and the training step as train.cuda_graph has it, as CUDA graphs; "in
turn" the same without parts side by side. "reserved" is what the allocator took from the GPU.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple
from unittest import mock

import torch
from torch import nn

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import Config, load_config
from dataloader.packing import Sample
from engine import graphs
from engine.graphs import GraphedModel
from engine.inference import use_tf32
from engine.state import build_state
from engine.step import recorded_steps, train_step
from models import CMFS, build_model
from utils.distributed import Devices
from utils.environment import environment_info


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", choices=("tiny", "demo"))
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=4, help="of the train step")
    parser.add_argument("--precision", nargs="+", default=["tf32"], choices=PRECISIONS)
    parser.add_argument("--backend", nargs="+", default=["auto"])
    parser.add_argument(
        "--recompute",
        nargs="+",
        default=list(RECOMPUTE),
        choices=RECOMPUTE,
        help="as model.recompute",
    )
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"machine: {environment_info()}")
    columns = ("scan", "precision", "forward b1 ms", "peak GB", "replayed ms", "in turn ms")
    columns += ("batch", "recompute", "train step ms", "peak GB", "reserved GB")
    columns += ("replayed ms", "peak GB", "reserved GB", "in turn ms", "peak GB", "reserved GB")
    columns += ("kept GB",)
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for backend in arguments.backend:
        config = load_config(
            "msrs",
            [
                f"model.size={arguments.model}",
                "model.text_prior=orthogonal",
                "model.pretrained=none",
                f"model.scan_backend={backend}",
                f"train.crop={list(arguments.size)}",
                f"train.batch_size={arguments.batch}",
            ],
        )
        model = build_model(config).to(device)
        for precision in arguments.precision:
            cells = [
                backend,
                precision,
                *forward_cells(model, config, device, precision, arguments),
            ]
            for recompute in arguments.recompute:
                model.set_recompute(RECOMPUTE[recompute])
                steps = step_cells(model, config, device, precision, arguments)
                row = [*cells, str(arguments.batch), recompute, *steps]
                print(f"| {' | '.join(row)} |", flush=True)


RECOMPUTE: dict[str, bool | Literal["light"]] = {"false": False, "light": "light", "true": True}
PRECISIONS = {  # autocast dtype, TF32
    "float32": (None, False),
    "tf32": (None, True),
    "bf16": (torch.bfloat16, True),
}


class Figures(NamedTuple):
    """Of repeated calls, their recording included; gigabytes are 0 on a CPU."""

    ms: float  # the median
    peak: float  # GB of tensors at once
    reserved: float  # GB that the allocator took from the GPU for them


def forward_cells(
    model: CMFS,
    config: Config,
    device: torch.device,
    precision: str,
    arguments: argparse.Namespace,
) -> list[str]:
    launched, replayed = (
        measure(forward_once(network, config, device, precision), device, arguments)
        for network in (model, GraphedModel(model))
    )
    with mock.patch.object(graphs, "side_streams", contextlib.nullcontext):
        run = forward_once(GraphedModel(model), config, device, precision)
        in_turn = measure(run, device, arguments)
    return [f"{launched.ms:.1f}", f"{launched.peak:.2f}", f"{replayed.ms:.1f}", f"{in_turn.ms:.1f}"]


def step_cells(
    model: CMFS,
    config: Config,
    device: torch.device,
    precision: str,
    arguments: argparse.Namespace,
) -> list[str]:
    """Launched; recorded with parts side by side, and in turn."""
    cells = []
    ways = (
        [(False, False), (True, True), (True, False)] if device.type == "cuda" else [(False, False)]
    )
    for is_recorded, side_by_side in ways:
        with step_once(model, config, device, precision, is_recorded, side_by_side) as run:
            found = measure(run, device, arguments)
        cells += [f"{found.ms:.1f}", f"{found.peak:.2f}", f"{found.reserved:.2f}"]
    cells += ["–"] * (9 - len(cells))
    if model.segmentation_head.ss2d.recompute == "light":  # PyTorch's hooks do not show all
        return [*cells, "–"]
    return [*cells, f"{kept(model, config, device, precision, arguments.batch):.2f}"]


def forward_once(
    model: nn.Module, config: Config, device: torch.device, precision: str
) -> Callable[[], None]:
    batch = random_batch(config, device, 1)
    model.eval()  # once, as predict() wants it: it visits all layers, for milliseconds

    def run() -> None:
        with torch.inference_mode(), autocast(device, precision):
            model(batch.rgb, batch.thermal)

    return run


@contextmanager
def step_once(
    model: CMFS,
    config: Config,
    device: torch.device,
    precision: str,
    is_recorded: bool,
    side_by_side: bool = True,
) -> Iterator[Callable[[], None]]:
    """A training step as engine/trainer.py takes it."""
    autocast_dtype, _ = PRECISIONS[precision]
    named = "bf16" if autocast_dtype else "float32"
    train = config.train.model_copy(
        update={"precision": named, "cuda_graph": is_recorded, "side_by_side": side_by_side}
    )
    config = config.model_copy(update={"train": train})
    state = build_state(config, model, Devices(device, 0, 0, 1), steps_per_epoch=1)
    batch = random_batch(config, device, train.batch_size)
    model.train()

    def run() -> None:
        autocast(device, precision)  # sets TF32
        train_step(state, batch, config)

    with recorded_steps(state, config):
        yield run
    state.optimizer.zero_grad()  # they would keep some of a recording's memory


def kept(
    model: CMFS, config: Config, device: torch.device, precision: str, batch_size: int
) -> float:
    """Gigabytes that a training forward leaves behind for the gradient, parameters aside."""
    batch = random_batch(config, device, batch_size)
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, an output would keep its own graph alive for ever

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, autocast(device, precision):
        output = model.train()(batch.rgb, batch.thermal)
    del output
    return sum(sizes.values()) / 1e9


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype, uses_tf32 = PRECISIONS[precision]
    use_tf32(uses_tf32)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def random_batch(config: Config, device: torch.device, batch_size: int) -> Sample:
    shape = (batch_size, *config.train.crop)
    return Sample(
        rgb=torch.rand(batch_size, 3, *config.train.crop, device=device),
        thermal=torch.rand(batch_size, 3, *config.train.crop, device=device),
        label=torch.randint(0, config.data.num_classes, shape, device=device),
        valid=torch.ones(shape, dtype=torch.bool, device=device),
        name=[f"random {index}" for index in range(batch_size)],
    )


def measure(
    run: Callable[[], None], device: torch.device, arguments: argparse.Namespace
) -> Figures:
    is_cuda = device.type == "cuda"
    if is_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(4):  # a graph is recorded at the third call
        run()
    if is_cuda:
        torch.cuda.synchronize()
    times = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    milliseconds = statistics.median(times)
    if not is_cuda:
        return Figures(milliseconds, 0.0, 0.0)
    peaks = (torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9)
    return Figures(milliseconds, *peaks)


if __name__ == "__main__":
    main()
