"""Prediction on a GPU without the cost of launching some three thousand kernels one by one."""

from collections import Counter, OrderedDict

import torch
from torch import Tensor, nn

from models import CMFS, CMFSOutput

_EAGER_CALLS = 2  # kernels are compiled and chosen, and constants made, before a graph is recorded


class GraphedModel(nn.Module):
    """A network in evaluation mode whose forward is recorded once a size and then replayed.

    A drop-in for the network in predict(). Sizes that come more than twice are recorded as CUDA
    graphs; others, and everything on a CPU, run as ever. Weights may change in place between calls,
    but the network must stay on its device, and TF32 as it was set at first.

    Args:
        model: CMFS; its device decides.
        most_graphs: sizes to keep, the latest used.
    """

    def __init__(self, model: CMFS, *, most_graphs: int = 4) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self._most_graphs = most_graphs
        self._graphs: OrderedDict[torch.Size, _Graph] = OrderedDict()
        self._calls: Counter[torch.Size] = Counter()

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
        self._calls[size] += 1
        if not rgb.is_cuda or self._calls[size] <= _EAGER_CALLS:
            return self.model(rgb, thermal)
        if size not in self._graphs:
            if len(self._graphs) == self._most_graphs:
                self._graphs.popitem(last=False)
            self._graphs[size] = _Graph(self.model, rgb, thermal)
        self._graphs.move_to_end(size)
        return self._graphs[size](rgb, thermal)


class _Graph:
    """One recorded forward, with inputs and outputs in memory of its own."""

    def __init__(self, model: CMFS, rgb: Tensor, thermal: Tensor) -> None:
        self._inputs = (rgb.float().clone(), thermal.float().clone())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(rgb.device), torch.cuda.graph(self._graph):
            self._output = model(*self._inputs)

    def __call__(self, rgb: Tensor, thermal: Tensor) -> CMFSOutput:
        for own, given in zip(self._inputs, (rgb, thermal), strict=True):
            own.copy_(given)
        self._graph.replay()
        return CMFSOutput(*(x.clone() for x in self._output))  # the next replay writes there
