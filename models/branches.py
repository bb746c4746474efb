"""Branches of the network that do not need one another, side by side on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_streams: dict[tuple[torch.cuda.Stream, int], torch.cuda.Stream] = {}


def in_parallel(*tasks: tuple[Any, ...]) -> list[Any]:
    """The results of several tasks, each a callable and its arguments, in their order.

    While a CUDA graph of a forward without gradients is recorded the tasks become branches of it,
    so that kernels too small for the chip share it. Everywhere else they run one after the other:
    launched one by one, kernels wait for the host in any case, and in training branches gain little
    and keep each other's memory.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_recording():
        return [task(*arguments) for task, *arguments in tasks]
    main = torch.cuda.current_stream()
    sides = [_side_stream(main, index) for index in range(len(tasks) - 1)]
    for side in sides:
        side.wait_stream(main)
    results = []
    for stream, (task, *arguments) in zip([main, *sides], tasks, strict=True):
        _share(arguments, stream)
        with torch.cuda.stream(stream):
            results.append(task(*arguments))
    for side in sides:
        main.wait_stream(side)
    _share(results, main)
    return results


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _side_stream(main: torch.cuda.Stream, index: int) -> torch.cuda.Stream:
    """One for each branch of a stream, made once: each has a workspace for matrix products."""
    if (main, index) not in _streams:
        _streams[main, index] = torch.cuda.Stream(main.device)
    return _streams[main, index]


def _share(tree: Any, stream: torch.cuda.Stream) -> None:
    """Let the allocator know that tensors made on another stream are used on this one."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_cuda:
            leaf.record_stream(stream)
