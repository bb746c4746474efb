"""Parts side by side: what waits for what, and where they run one after the other."""

import contextlib

import pytest
import torch

from configs import load_config
from models import branches, build_model
from models.branches import Branch, side_by_side, side_streams


class Stream:
    """Of a GPU; notes what it waits for."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


class Recording:
    """As if on a GPU, whose streams are given out in turn; notes what happens."""

    def __init__(self, count, first):
        self.events = []
        self.pool = [Stream(f"side {index}", self.events) for index in range(count)]
        self.main = Stream("main", self.events)
        self.current = [self.main]
        self.turn = first

    def new_stream(self):
        self.turn += 1
        return self.pool[(self.turn - 1) % len(self.pool)]

    @contextlib.contextmanager
    def on(self, stream):
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def part(self, name):
        """A part that notes where it runs, and returns its name."""

        def run():
            self.events.append(f"{name} on {self.current[-1].name}")
            return name

        return run


@pytest.fixture
def record(monkeypatch):
    def make(count=32, first=1):
        recording = Recording(count, first)
        monkeypatch.setattr(torch.cuda, "Stream", recording.new_stream)
        monkeypatch.setattr(torch.cuda, "stream", recording.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: recording.current[-1])
        return recording

    return make


def test_a_branch_begins_after_what_came_before_and_ends_before_its_result(record):
    recording = record()
    with side_streams():
        branch = Branch(recording.part("a"))
        recording.part("b")()
        assert branch.result() == "a"
    assert recording.events == [
        "side 1 waits for main", "a on side 1", "b on main", "main waits for side 1",
    ]  # fmt: skip


def test_two_parts_begin_together(record):
    recording = record()
    with side_streams():
        assert side_by_side(recording.part("a"), recording.part("b")) == ("a", "b")
    assert recording.events == [
        "side 1 waits for main", "b on side 1", "a on main", "main waits for side 1",
    ]  # fmt: skip


def test_a_branch_within_a_branch_has_a_stream_of_its_own(record):
    recording = record()
    with side_streams():
        outer = Branch(lambda: side_by_side(recording.part("a"), recording.part("b")))
        assert outer.result() == ("a", "b")
    assert recording.events == [
        "side 1 waits for main", "side 2 waits for side 1", "b on side 2", "a on side 1",
        "side 1 waits for side 2", "main waits for side 1",
    ]  # fmt: skip


@pytest.mark.parametrize("first", range(32))
def test_no_two_branches_of_the_network_share_a_stream(record, first):
    """Nor has one the recording's own, wherever the turn of the streams begins.

    A stream's memory would else be taken again while another still reads it.
    """
    recording = record(first=first)
    recording.current = [recording.pool[0]]  # which records
    config = load_config("demo", ["model.text_prior=orthogonal", "model.pretrained=none"])
    model = build_model(config).eval()
    with side_streams(), torch.no_grad():
        model(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    waits = [event.split(" waits for ") for event in recording.events]
    assert len(waits) == 2 * 23  # each branch begins and ends
    assert len({stream for wait in waits for stream in wait}) == 24  # and the recording's own


def test_without_streams_left_parts_run_where_they_are(record):
    recording = record(count=1)
    with side_streams():
        branches_ = [Branch(recording.part(name)) for name in "ab"]
        assert [branch.result() for branch in branches_] == ["a", "b"]
    assert recording.events == [
        "side 0 waits for main", "a on side 0", "b on main", "main waits for side 0",
    ]  # fmt: skip


def test_an_exception_leaves_no_stream_unjoined(record):
    """Else the recording could not end, and would raise that instead."""
    recording = record()

    def fail():
        Branch(recording.part("a"))
        raise torch.cuda.OutOfMemoryError("no memory")

    with pytest.raises(torch.cuda.OutOfMemoryError, match="no memory"), side_streams():
        Branch(fail)
    assert recording.events[-2:] == ["main waits for side 1", "main waits for side 2"]
    assert branches._streams.get() is None


def test_a_branch_holds_what_its_part_reads():
    """Else its memory would be another's while the branch still reads it."""
    x = torch.ones(3)
    branch = Branch(lambda: x.sum())
    assert x is branch._part.__closure__[0].cell_contents


def test_one_after_the_other_elsewhere(record):
    """On a CPU, launched, and in training."""
    recording = record()
    branch = Branch(recording.part("a"))
    assert side_by_side(recording.part("b"), recording.part("c")) == ("b", "c")
    assert branch.result() == "a"
    assert recording.events == ["a on main", "b on main", "c on main"]
