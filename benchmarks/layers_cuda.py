"""The kernels around the scans on this machine's GPU against PyTorch's own operators.

    python benchmarks/layers_cuda.py
    python benchmarks/layers_cuda.py --batch 1 --dtype bfloat16

At sizes of the paper's network for 480x640 images. Forward, and forward + backward of all
gradients, timed as benchmarks/ops_cuda.py does; the floor is the time in which inputs and outputs
(and, backward, also what comes in and goes out as gradients) could be moved once each, at the
bandwidth of a large copy in the same run.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ops_cuda import cells, copy_bandwidth, leaves, normal, rotated, times
from models.ops.channel_norm import channel_norm
from models.ops.depthwise import depthwise_conv
from models.ops.epilogue import epilogue
from models.ops.mamba_path import conv_silu, gate
from models.ops.padding import replicate_pad
from models.ops.phase import with_magnitude
from models.ops.resize import bilinear_resize
from models.ops.sobel import sobel
from utils.environment import environment_info

Call = Callable[..., Tensor]  # of tensors and a backend's name


def norm(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Tensor:
    return channel_norm(x, weight, bias, 1e-5, backend=backend)


def residual(x: Tensor, other: Tensor, bias: Tensor, *, backend: str) -> Tensor:
    return epilogue(x, bias, residual=other, backend=backend)


silu = functools.partial(depthwise_conv, activation="silu")
gelu = functools.partial(epilogue, activation="gelu")
to_image = functools.partial(bilinear_resize, hw=(480, 640))
to_stride_4 = functools.partial(bilinear_resize, hw=(120, 160))
with_border = functools.partial(replicate_pad, left=1, right=1, top=1, bottom=1)


def ungated(y: Tensor, z: Tensor, *, backend: str) -> Tensor:
    return gate(y, None, z, backend=backend)


def edges(x: Tensor, *, backend: str) -> Tensor:
    """Both Sobel gradients, added in a pass that is PyTorch's for either backend."""
    return torch.add(*sobel(x, backend=backend))


def rephased(real: Tensor, imaginary: Tensor, magnitude: Tensor, *, backend: str) -> Tensor:
    """Always in float32; the passes that make a complex map are PyTorch's for either backend."""
    spectrum = torch.complex(real.float(), imaginary.float())
    return with_magnitude(spectrum, magnitude.float(), backend=backend)


# name, function, shape of a map without the batch, how many maps, shapes of the parameters
CASES: list[tuple[str, Call, tuple[int, ...], int, list[tuple[int, ...]]]] = [
    ("layer norm", norm, (96, 120, 160), 1, [(96,), (96,)]),
    ("layer norm", norm, (384, 120, 160), 1, [(384,), (384,)]),
    ("layer norm", norm, (768, 15, 20), 1, [(768,), (768,)]),
    ("depthwise 3x3, SiLU", silu, (96, 120, 160), 1, [(96, 1, 3, 3), (96,)]),
    ("depthwise 3x3, SiLU", silu, (384, 120, 160), 1, [(384, 1, 3, 3), (384,)]),
    ("depthwise 3x3, SiLU", silu, (384, 30, 40), 1, [(384, 1, 3, 3), (384,)]),
    ("depthwise 1x11", depthwise_conv, (96, 120, 160), 1, [(96, 1, 1, 11), (96,)]),
    ("depthwise 11x1", depthwise_conv, (96, 120, 160), 1, [(96, 1, 11, 1), (96,)]),
    ("bias, GELU", gelu, (384, 120, 160), 1, [(384,)]),
    ("bias, GELU", gelu, (1536, 30, 40), 1, [(1536,)]),
    ("bias, residual", residual, (96, 120, 160), 2, [(96,)]),
    ("Mamba convolution, SiLU", conv_silu, (192, 19200), 1, [(192, 4), (192,)]),
    ("z gate", ungated, (1024, 19200), 2, []),
    ("resize to 480x640", to_image, (16, 120, 160), 1, []),
    ("resize to 120x160", to_stride_4, (512, 30, 40), 1, []),
    ("border repeated", with_border, (136, 480, 640), 1, []),
    ("Sobel, both added", edges, (16, 480, 640), 1, []),
    ("spectrum's magnitude", rephased, (192, 120, 81), 3, []),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    bandwidth = copy_bandwidth(arguments.repeats)
    print(f"machine: {environment_info()}\n\ncopy: {bandwidth / 1e12:.2f} TB/s\n")
    print("| part | B | map | type | forward ms | PyTorch | ratio | of floor "
          "| forward + backward ms | PyTorch | ratio | of floor |")  # fmt: skip
    print("|" + "---|" * 12)
    for dtype in (getattr(torch, name) for name in arguments.dtype):
        for batch in arguments.batch:
            for name, call, shape, maps, parameters in CASES:
                make = functools.partial(inputs_of, batch, shape, maps, parameters, dtype)
                sets = rotated(make)
                ours, theirs = (
                    times(with_backend(call, backend), sets, arguments.repeats)
                    for backend in ("triton", "reference")
                )
                moved = sum(x.nbytes for x in sets[0])
                with torch.no_grad():
                    result = call(*sets[0], backend="triton").nbytes
                floors = ((moved + result) / bandwidth, (3 * moved + 2 * result) / bandwidth)
                print(f"| {name} | {batch} | {' x '.join(map(str, shape))} | {str(dtype)[6:]} "
                      f"| {cells(ours, theirs, floors)} |", flush=True)  # fmt: skip
                del sets


def inputs_of(
    batch: int,
    shape: tuple[int, ...],
    maps: int,
    parameters: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> list[Tensor]:
    tensors = [normal(batch, *shape).to(dtype) for _ in range(maps)]
    return leaves([*tensors, *(normal(*parameter) for parameter in parameters)])


def with_backend(call: Call, backend: str) -> Callable[[list[Tensor]], Tensor]:
    """The reference takes parameters in the map's type, as autocast would have it."""

    def run(inputs: list[Tensor]) -> Tensor:
        if backend == "reference":
            inputs = [x.to(inputs[0].dtype) for x in inputs]
        return call(*inputs, backend=backend)

    return run


if __name__ == "__main__":
    main()
