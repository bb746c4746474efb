"""Independent parts of the network, side by side on a GPU.

Most maps of one image are too small to fill a GPU, and so are many of a few. While a forward is
recorded as a CUDA graph, a part may be recorded on a stream of its own and then runs beside others
in every replay, and so does its gradient: autograd runs each on the stream of its forward. Launched
kernel by kernel nothing would be gained, because Python is what takes the time.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Result = TypeVar("Result")

_POOL = 32  # PyTorch gives out so many streams, in turn


class _Streams:
    """Of one recording: all that were taken, and who may take which of them again."""

    def __init__(self) -> None:
        self.taken: list[torch.cuda.Stream] = []
        self._recording = torch.cuda.current_stream()
        self._free: defaultdict[torch.cuda.Stream, list[torch.cuda.Stream]] = defaultdict(list)

    def take(self) -> torch.cuda.Stream | None:
        """A stream that begins where the current one stands; None where there is none left.

        One that the current stream has waited for comes first. Those that others waited for would
        let what begins now wait for what it does not need.
        """
        parent = torch.cuda.current_stream()
        stream = self._free[parent].pop() if self._free[parent] else self._new()
        if stream is not None:
            stream.wait_stream(parent)
        return stream

    def join(self, stream: torch.cuda.Stream) -> None:
        """Let the current stream wait for one that was taken."""
        parent = torch.cuda.current_stream()
        parent.wait_stream(stream)
        self._free[parent].append(stream)

    def _new(self) -> torch.cuda.Stream | None:
        for _ in range(_POOL):
            stream = torch.cuda.Stream()
            if stream not in (self._recording, *self.taken):
                self.taken.append(stream)
                return stream
        return None


_streams: ContextVar[_Streams | None] = ContextVar("_streams", default=None)


def _recording() -> _Streams | None:
    """Of the recording that goes on; a compiler sees none."""
    return None if torch.compiler.is_compiling() else _streams.get()


@contextmanager
def side_streams() -> Iterator[None]:
    """Let branches run beside one another, while a CUDA graph is recorded.

    To be entered on the stream that records. After an exception all streams are joined, also those
    that were before and have gone on in a backward pass, so that the recording can end and the
    exception is seen.
    """
    streams = _Streams()
    token = _streams.set(streams)
    try:
        yield
    except BaseException:
        for stream in streams.taken:
            torch.cuda.current_stream().wait_stream(stream)
        raise
    finally:
        _streams.reset(token)


class Branch(Generic[Result]):
    """A part that may run beside whatever follows, until its result is asked for.

    All tensors that `part` reads, but the network's own, are among its arguments, and all that it
    makes for others is in its result, or held by a module as long as anyone reads it. What one
    stream makes and another reads, here or for the gradient, is not taken again in the recording.
    """

    def __init__(self, part: partial[Result]) -> None:
        self._streams = _recording()
        self._stream = None if self._streams is None else self._streams.take()
        if self._stream is None:
            self._result = part()
            return
        _share((part.args, part.keywords), self._stream)
        with torch.cuda.stream(self._stream):
            self._result = part()

    def result(self) -> Result:
        """What the part returned; what follows comes after it."""
        if self._stream is not None:
            self._streams.join(self._stream)
            _share(self._result, torch.cuda.current_stream())
            self._stream = None
        return self._result


def side_by_side(first: partial[Result], second: partial[Result]) -> tuple[Result, Result]:
    """The results of two parts, which draw random numbers in this order wherever they run."""
    branch = Branch(first)
    other = second()
    return branch.result(), other


def _share(tree: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that the stream reads the tensors in `tree`, which is another's memory."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            leaf.record_stream(stream)
