"""Parameter groups, the optimiser, and the learning-rate schedule."""

import logging
from typing import Any

import torch
from torch import nn

from configs.schema import TrainConfig
from utils.errors import InputError

log = logging.getLogger(__name__)

# Last parts of names that are not decayed, although some of these tensors have several dimensions:
# the scan's A, D and dt bias, every bias, and learned scales per channel.
_NOT_DECAYED = {"A_log", "A_logs", "D", "Ds", "bias", "dt_bias", "dt_projs_bias", "scale"}


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to norms, biases, A, D, scales.

    Everything of at most one dimension is left out (norms, biases), and every name that ends in
    one of the scan's or a scale's own names.
    """
    return parameter.ndim > 1 and name.rpartition(".")[2] not in _NOT_DECAYED


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not, that hold every trainable parameter exactly once.

    Raises:
        RuntimeError: see check_complete.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [p for n, p in trainable.items() if is_decayed(n, p) == decayed],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    check_complete(model, groups)
    for group in groups:
        log.info(
            "weight decay %g: %d tensors, %d values",
            group["weight_decay"],
            len(group["params"]),
            sum(p.numel() for p in group["params"]),
        )
    return groups


def check_complete(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise a RuntimeError that names every trainable parameter not in exactly one group."""
    count = {p: 0 for p in model.parameters() if p.requires_grad}
    for group in groups:
        for parameter in group["params"]:
            count[parameter] = count.get(parameter, 0) + 1
    wrong = [name for name, p in model.named_parameters() if count.get(p, 1) != 1]
    if wrong:
        raise RuntimeError(f"not in exactly one parameter group: {', '.join(wrong)}")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over parameter_groups(); the loop sets the learning rate of each step.

    Fused on a GPU: there it leaves a bad step out without being told by the host (engine.step).
    """
    groups = parameter_groups(model, config.weight_decay)
    is_fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, fused=is_fused)


def lr_at(step: int, *, total_steps: int, warmup_steps: int, power: float) -> float:
    """Factor of the peak learning rate at a step: linear warm-up times polynomial decay.

    Args:
        step: steps already done, 0 … total_steps - 1.
    Returns:
        A factor in (0, 1]: it rises through the first `warmup_steps` steps and reaches 0 one step
        after the last.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    return warmup * (1 - step / total_steps) ** power


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of the optimiser: its moments, and the parameters' order."""
    return {"state": optimizer.state_dict()["state"], "names": _names(optimizer, model)}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any]
) -> None:
    """Put the moments back; rates and weight decay stay those of the present config.

    Raises:
        InputError: the checkpoint's parameters come in another order.
    """
    if saved["names"] != _names(optimizer, model):
        raise InputError(
            "the checkpoint's optimiser belongs to another version of the network; start anew "
            "with --exp NAME"
        )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters in the order in which the optimiser numbers them."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [name_of[p] for group in optimizer.param_groups for p in group["params"]]
