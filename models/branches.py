"""Independent parts of the network, side by side on a GPU where that costs nothing else.

Most maps of one image are too small to fill a GPU. While an inference forward is recorded as a CUDA
graph, a part may be recorded on a stream of its own and then runs beside others in every replay.
Launched kernel by kernel nothing would be gained, because Python is what takes the time, and in
training the memory of a branch could not be used again by the others.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class Branch(Generic[Result]):
    """A part that may run beside whatever follows, until its result is asked for.

    `part` must hold all that it reads, which thus stays in memory meanwhile. Each branch has a
    stream of its own: memory given back there is taken again by none but its own kernels.
    """

    def __init__(self, part: Callable[[], Result]) -> None:
        self._part = part
        self._stream = _new_stream()
        if self._stream is None:
            self._result = part()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._result = part()

    def result(self) -> Result:
        """What the part returned; what follows comes after it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return self._result


def side_by_side(
    first: Callable[[], Result], second: Callable[[], Result]
) -> tuple[Result, Result]:
    """The results of two parts; where they cannot run side by side, in this order."""
    if not _is_recorded_inference():
        return first(), second()
    branch = Branch(second)
    return first(), branch.result()


def _is_recorded_inference() -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def _new_stream() -> torch.cuda.Stream | None:
    return torch.cuda.Stream() if _is_recorded_inference() else None
