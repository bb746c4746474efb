"""What goes on inside the network, read by hooks: text gates and the scans' step sizes dt."""

from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mamba import CausalScan
from models.mia import RegionTextGate
from models.ss2d import SS2D

_POSITIONS = 64  # of a map, about, whose dt is read


class Inside(NamedTuple):
    """One forward of one image."""

    gates: list[Tensor]  # (P, P) in (0, 1) for each stage
    dt: dict[str, Tensor]  # (N,) > 0 for each part of the network that scans


@torch.no_grad()
def look_inside(model: nn.Module, rgb: Tensor, thermal: Tensor) -> Inside:
    """Run a network in evaluation mode on one image and keep what its gates and scans do.

    rgb, thermal: (1, 3, H, W) in [0, 1]. dt is softplus(W · low + bias), as the scans use it.
    """
    gates: list[Tensor] = []
    dt: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        part = name.partition(".")[0]
        if isinstance(module, RegionTextGate):
            handles.append(module.register_forward_hook(lambda *args: gates.append(args[2][0, 0])))
        elif isinstance(module, SS2D):

            def keep_ss2d(_: nn.Module, __: object, x: Tensor, scan=module, part=part) -> None:
                dt[part].append(_ss2d_dt(scan, x))

            handles.append(module.conv2d.register_forward_hook(keep_ss2d))
        elif isinstance(module, CausalScan):

            def keep_causal(_: nn.Module, __: object, x: Tensor, scan=module, part=part) -> None:
                dt[part].append(_causal_dt(scan, x))

            handles.append(module.x_proj.register_forward_hook(keep_causal))
    try:
        model(rgb, thermal)
    finally:
        for handle in handles:
            handle.remove()
    return Inside(
        [gate.float().cpu() for gate in gates],
        {part: torch.cat(values).float().cpu() for part, values in sorted(dt.items())},
    )


def _ss2d_dt(scan: SS2D, convolved: Tensor) -> Tensor:
    """dt of all four directions and channels at some pixels, from what its convolution gave."""
    x = _some_positions(convolved[0].flatten(1))  # (D, L)
    rank = scan.dt_projs_weight.shape[-1]
    low = scan.x_proj_weight[:, :rank] @ x  # (4, R, L)
    return F.softplus(scan.dt_projs_weight @ low + scan.dt_projs_bias[..., None]).flatten()


def _causal_dt(scan: CausalScan, projected: Tensor) -> Tensor:
    """dt of all channels at some positions, from what its projection gave."""
    low = _some_positions(projected[0, : scan.splits[0]])  # (R, L)
    return F.softplus(scan.dt_proj.weight @ low + scan.dt_proj.bias[:, None]).flatten()


def _some_positions(x: Tensor) -> Tensor:
    """(C, L) -> evenly spaced positions of it."""
    return x[:, :: max(1, x.shape[1] // _POSITIONS)]
