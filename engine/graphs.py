"""Prediction and training on a GPU without launching thousands of kernels one by one."""

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from models import CMFS, CMFSOutput
from models.branches import side_streams
from models.ops.ss2d_scan import orders_read
from utils.errors import InputError

_SIDE_BY_SIDE_PIXELS = 2**19  # of a batch: parts side by side share no memory
_EAGER_CALLS = 2  # kernels are compiled and chosen, and constants made, before a graph is recorded


class GraphedModel(nn.Module):
    """A network in evaluation mode whose forward is recorded once a size and then replayed.

    A drop-in for the network in predict(). Sizes that come more than twice are recorded as CUDA
    graphs; others, and everything on a CPU, run as ever, and so do sizes beyond `most_graphs` that
    come in turn with recorded ones. Weights may change in place between calls,
    but the network must stay on its device, and TF32 as it was set at first.

    Args:
        model: CMFS; its device decides.
        most_graphs: sizes to keep.
    """

    def __init__(self, model: CMFS, *, most_graphs: int = 4) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self._most_graphs = most_graphs
        self._graphs: OrderedDict[torch.Size, _Graph] = OrderedDict()
        self._calls: Counter[torch.Size] = Counter()
        self._last_call: dict[torch.Size, int] = {}

    @torch.inference_mode()
    def forward(self, rgb: Tensor, thermal: Tensor) -> CMFSOutput:
        """As CMFS.forward.

        Raises:
            ValueError: the network is in training mode.
        """
        if self.model.training:
            raise ValueError("a graph holds evaluation alone; call model.eval() first")
        thermal = thermal.expand_as(rgb)
        size = rgb.shape
        last_call = self._last_call.get(size, 0)
        self._calls[size] += 1
        self._last_call[size] = self._calls.total()
        if not rgb.is_cuda or self._calls[size] <= _EAGER_CALLS:
            return self.model(rgb, thermal)
        if size not in self._graphs:
            if len(self._graphs) == self._most_graphs:
                oldest = next(iter(self._graphs))
                if self._last_call[oldest] > last_call:  # it is still in use
                    return self.model(rgb, thermal)
                del self._graphs[oldest]
            self._graphs[size] = _Graph(self.model, rgb, thermal)
        self._graphs.move_to_end(size)
        return self._graphs[size](rgb, thermal)


class _Graph:
    """One recorded forward, with inputs and outputs in memory of its own."""

    def __init__(self, model: CMFS, rgb: Tensor, thermal: Tensor) -> None:
        self._inputs = (rgb.float().clone(), thermal.float().clone())
        self._graph = torch.cuda.CUDAGraph()
        is_small = rgb[:, 0].numel() <= _SIDE_BY_SIDE_PIXELS
        with (
            torch.cuda.device(rgb.device),
            orders_read() as self._orders,
            torch.cuda.graph(self._graph, stream=torch.cuda.Stream()),  # on this device
            side_streams() if is_small else contextlib.nullcontext(),
        ):
            self._output = model(*self._inputs)

    def __call__(self, rgb: Tensor, thermal: Tensor) -> CMFSOutput:
        for own, given in zip(self._inputs, (rgb, thermal), strict=True):
            own.copy_(given)
        self._graph.replay()
        return CMFSOutput(*(x.clone() for x in self._output))  # the next replay writes there


class GraphedGradient:
    """A function that adds to gradients, recorded once as a CUDA graph and then replayed.

    The first two calls run as ever, the third is recorded. Arguments of other shapes than the
    recorded ones run as ever. Random numbers are drawn as without a graph.

    Args:
        compute: takes and returns nested tuples and dicts of tensors on a GPU (and, for arguments,
            of what it does not look at), and must not wait for the GPU. Its backward pass adds to
            the gradients of `parameters`.
        side_by_side: whether independent parts run beside one another in the recording.
    Attributes:
        is_recorded: whether there is a recording yet.
    Raises:
        InputError: on recording, when it cannot be.
    """

    def __init__(
        self,
        compute: Callable[..., Any],
        parameters: list[nn.Parameter],
        *,
        side_by_side: bool = False,
    ) -> None:
        self.is_recorded = False
        self._side_by_side = side_by_side
        self._compute = compute
        self._parameters = parameters
        self._calls = 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, *arguments: Any) -> Any:
        """As `compute`; results are the caller's to keep, a gradient's memory until the next call.

        That is so where there was no gradient before: the graph writes it anew each time.
        """
        self._calls += 1
        if self._calls <= _EAGER_CALLS:
            return self._compute(*arguments)
        if not self.is_recorded:
            self._record(arguments)
        if _shapes(arguments) != self._shapes:
            return self._compute(*arguments)
        for own, given in zip(_tensors(self._arguments), _tensors(arguments), strict=True):
            own.copy_(given)
        before = [p.grad for p in self._used]
        if before[0] is self._gradients[0]:
            before = [gradient.clone() for gradient in before]
        self._graph.replay()
        if before[0] is not None:
            torch._foreach_add_(before, self._gradients)
        for parameter, old, new in zip(self._used, before, self._gradients, strict=True):
            parameter.grad = new if old is None else old
        return pytree.tree_map_only(Tensor, torch.clone, self._result)

    def _record(self, arguments: Any) -> None:
        self._shapes = _shapes(arguments)
        self._arguments = pytree.tree_map_only(Tensor, torch.clone, arguments)
        device = _tensors(arguments)[0].device
        before = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            with (
                torch.cuda.device(device),
                orders_read() as self._orders,
                # thread_local: a loader's thread may pin memory meanwhile
                torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
                side_streams() if self._side_by_side else contextlib.nullcontext(),
            ):
                self._result = self._compute(*self._arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"the step cannot be recorded as a CUDA graph here ({error}); "
                f"train.cuda_graph=false launches it kernel by kernel"
            ) from error
        self._used = [p for p in self._parameters if p.grad is not None]
        self._gradients = [p.grad for p in self._used]
        for parameter, gradient in zip(self._parameters, before, strict=True):
            parameter.grad = gradient
        self.is_recorded = True


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _shapes(tree: Any) -> list[torch.Size]:
    return [x.shape for x in _tensors(tree)]
