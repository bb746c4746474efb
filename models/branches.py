"""Independent parts of the network, side by side on a GPU where that costs nothing else.

Most maps of one image are too small to fill a GPU. While an inference forward is recorded as a CUDA
graph, a part may be recorded on a stream of its own and then runs beside others in every replay.
Launched kernel by kernel nothing would be gained, because Python is what takes the time, and in
training the memory of a branch could not be used again by the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

_POOL = 32  # PyTorch gives out so many streams, in turn


class _Streams:
    """Of one recording: those in use, no two the same, and those not waited for yet."""

    def __init__(self) -> None:
        self.used = [torch.cuda.current_stream()]
        self.open: list[torch.cuda.Stream] = []

    def new(self) -> torch.cuda.Stream | None:
        """One that is not in use; None where there is none left."""
        for _ in range(_POOL):
            stream = torch.cuda.Stream()
            if stream not in self.used:
                self.used.append(stream)
                self.open.append(stream)
                return stream
        return None


_streams: ContextVar[_Streams | None] = ContextVar("_streams", default=None)


def _recording() -> _Streams | None:
    """Of the recording that goes on; a compiler sees none."""
    return None if torch.compiler.is_compiling() else _streams.get()


@contextmanager
def side_streams() -> Iterator[None]:
    """Let branches run beside one another: for the recording of an inference forward.

    To be entered on the stream that records. What an exception leaves unfinished is joined, so that
    the recording can end and the exception is seen.
    """
    streams = _Streams()
    token = _streams.set(streams)
    try:
        yield
    except BaseException:
        for stream in streams.open:
            torch.cuda.current_stream().wait_stream(stream)
        raise
    finally:
        _streams.reset(token)


class Branch(Generic[Result]):
    """A part that may run beside whatever follows, until its result is asked for.

    `part` must hold all that it reads, which thus stays in memory meanwhile. In a recording each
    branch has a stream that no other has: memory given back there is taken again by none but its
    own kernels.
    """

    def __init__(self, part: Callable[[], Result]) -> None:
        self._part = part
        self._streams = _recording()
        self._stream = None if self._streams is None else self._streams.new()
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
            self._streams.open.remove(self._stream)
            self._stream = None
        return self._result


def side_by_side(
    first: Callable[[], Result], second: Callable[[], Result]
) -> tuple[Result, Result]:
    """The results of two parts; where they cannot run side by side, in this order."""
    if _recording() is None:
        return first(), second()
    branch = Branch(second)
    return first(), branch.result()
