"""Parts side by side: what waits for what, and where they run one after the other."""

import contextlib

import pytest
import torch

from models import branches
from models.branches import Branch, side_by_side


class Recording:
    """As if an inference forward were being recorded on a stream "main"; notes what happens."""

    def __init__(self):
        self.events = []
        self.current = [self.stream("main")]
        self.count = 0

    def stream(self, name):
        recording = self

        class Stream:
            def wait_stream(self, other):
                recording.events.append(f"{name} waits for {other}")

            def __str__(self):
                return name

        return Stream()

    def new_stream(self):
        self.count += 1
        return self.stream(f"side {self.count}")

    @contextlib.contextmanager
    def on(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    def part(self, name):
        """A part that notes where it runs, and returns its name."""

        def run():
            self.events.append(f"{name} on {self.current[-1]}")
            return name

        return run


@pytest.fixture
def recording(monkeypatch):
    recording = Recording()
    monkeypatch.setattr(branches, "_is_recorded_inference", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", recording.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", recording.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: recording.current[-1])
    return recording


def test_a_branch_begins_after_what_came_before_and_ends_before_its_result(recording):
    branch = Branch(recording.part("a"))
    recording.part("b")()
    assert branch.result() == "a"
    assert recording.events == [
        "side 1 waits for main", "a on side 1", "b on main", "main waits for side 1",
    ]  # fmt: skip


def test_two_parts_begin_together(recording):
    assert side_by_side(recording.part("a"), recording.part("b")) == ("a", "b")
    assert recording.events == [
        "side 1 waits for main", "b on side 1", "a on main", "main waits for side 1",
    ]  # fmt: skip


def test_a_branch_within_a_branch_has_a_stream_of_its_own(recording):
    outer = Branch(lambda: side_by_side(recording.part("a"), recording.part("b")))
    assert outer.result() == ("a", "b")
    assert recording.events == [
        "side 1 waits for main", "side 2 waits for side 1", "b on side 2", "a on side 1",
        "side 1 waits for side 2", "main waits for side 1",
    ]  # fmt: skip


def test_a_branch_holds_what_its_part_reads(recording):
    """Else its memory would be another's while the branch still reads it."""
    x = torch.ones(3)
    branch = Branch(lambda: x.sum())
    assert x is branch._part.__closure__[0].cell_contents


def test_one_after_the_other_elsewhere():
    """On a CPU, launched, and wherever gradients are wanted."""
    order = []

    def part(name):
        return lambda: order.append(name) or name

    branch = Branch(part("a"))
    assert order == ["a"]
    assert side_by_side(part("b"), part("c")) == ("b", "c")
    assert branch.result() == "a"
    assert order == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("has_gradient", "is_capturing", "expected"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_recorded_inference_is_known(monkeypatch, has_gradient, is_capturing, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    with torch.set_grad_enabled(has_gradient):
        assert branches._is_recorded_inference() is expected
