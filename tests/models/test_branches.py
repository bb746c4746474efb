"""Parts side by side: what waits for what, and where they run one after the other."""

import contextlib
from functools import partial

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from configs import load_config
from models import branches, build_model
from models.branches import Branch, side_by_side, side_streams
from models.layers import Recomputed
from tests.recompute import LIGHT


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
        self.shared = set()  # (memory, the stream that reads another's)
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

    def part(self, name, *inputs):
        """A part that notes where it runs, and returns its name."""

        def run(*_):
            self.events.append(f"{name} on {self.current[-1].name}")
            return name

        return partial(run, *inputs)

    def share(self, tensor, stream):
        self.shared.add((memory(tensor), stream))


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Reads(TorchDispatchMode):
    """Of the operators that run on a recording's streams: those that read another stream's memory.

    What its own stream made, what was shared with it, and what was there before, one may read.
    """

    def __init__(self, recording):
        super().__init__()
        self.recording = recording
        self.owner = {}
        self.alive = []  # so that no address comes again
        self.unshared = set()
        self.crossing = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        stream = self.recording.current[-1]
        for tensor in self.tensors_in((arguments, options)):
            owner = self.owner.setdefault(memory(tensor), None)
            if owner in (None, stream):
                continue
            self.crossing += 1
            if (memory(tensor), stream) not in self.recording.shared:
                self.unshared.add((str(operator), owner.name, stream.name, tuple(tensor.shape)))
        result = operator(*arguments, **options)
        for tensor in self.tensors_in(result):
            self.owner.setdefault(memory(tensor), stream)
        return result

    def tensors_in(self, tree):
        found = [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.numel()]
        self.alive += found
        return found


@pytest.fixture
def record(monkeypatch):
    def make(count=32, first=1):
        recording = Recording(count, first)
        monkeypatch.setattr(torch.cuda, "Stream", recording.new_stream)
        monkeypatch.setattr(torch.cuda, "stream", recording.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: recording.current[-1])
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda x, stream: recording.share(x, stream)
        )
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
        "side 1 waits for main", "a on side 1", "b on main", "main waits for side 1",
    ]  # fmt: skip


def test_a_branch_within_a_branch_has_a_stream_of_its_own(record):
    recording = record()
    with side_streams():
        outer = Branch(partial(side_by_side, recording.part("a"), recording.part("b")))
        assert outer.result() == ("a", "b")
    assert recording.events == [
        "side 1 waits for main", "side 2 waits for side 1", "a on side 2", "b on side 1",
        "side 1 waits for side 2", "main waits for side 1",
    ]  # fmt: skip


def test_a_stream_is_taken_again_by_who_waited_for_it_alone(record):
    """Another, who did not wait, would else begin later than it could."""
    recording = record()
    with side_streams():
        outer = Branch(partial(side_by_side, recording.part("a"), recording.part("b")))
        side_by_side(recording.part("c"), recording.part("d"))
        side_by_side(recording.part("e"), recording.part("f"))
        outer.result()
    where = dict(event.split(" on ") for event in recording.events if " on " in event)
    assert where == {
        "a": "side 2", "b": "side 1", "c": "side 3", "d": "main", "e": "side 3", "f": "main",
    }  # fmt: skip


def test_a_stream_is_no_other_s_while_its_branch_is_open(record):
    recording = record()
    with side_streams():
        first = Branch(recording.part("a"))
        assert [first.result(), first.result()] == ["a", "a"]
        open_ = [Branch(recording.part(name)) for name in "bc"]
        assert [branch.result() for branch in open_] == ["b", "c"]
    where = dict(event.split(" on ") for event in recording.events if " on " in event)
    assert where == {"a": "side 1", "b": "side 1", "c": "side 2"}
    assert recording.events.count("main waits for side 1") == 2


@pytest.mark.parametrize("keyword", [False, True])
def test_inputs_and_results_are_shared(record, keyword):
    recording = record()
    x, y, z = torch.ones(2), torch.ones(3), torch.ones(4)

    def run(maps):
        assert {(memory(x), recording.pool[1])} == recording.shared
        return {"result": [y, z]}

    with side_streams():
        branch = Branch(partial(run, maps=(x, "")) if keyword else partial(run, (x, "")))
        assert branch.result()["result"][0] is y
    assert recording.shared == {
        (memory(x), recording.pool[1]), (memory(y), recording.main), (memory(z), recording.main),
    }  # fmt: skip


def make_network(**settings):
    torch.manual_seed(0)
    settings |= {"model.text_prior": "orthogonal", "model.pretrained": "none"}
    return build_model(load_config("demo", [f"{k}={v}" for k, v in settings.items()]))


@pytest.mark.parametrize("first", [0, 1, 20, 31])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", ["false", LIGHT])
def test_the_network_reads_no_memory_that_is_not_shared(record, first, training, recompute):
    """It would be taken again while another stream still reads it, here or for the gradient.

    Nor has a branch the recording's own stream, wherever the turn of the streams begins.
    """
    recording = record(first=first)
    recording.current = [recording.pool[0]]  # which records
    model = make_network(**{"model.recompute": recompute}).train(training)
    images = torch.rand(2, 2, 3, 32, 32)
    model(*images)  # tables of the scans' orders are kept
    with side_streams(), torch.set_grad_enabled(training), Reads(recording) as reads:
        model(*images)
    assert not reads.unshared
    assert reads.crossing > 23
    begins = [event for event in recording.events if event.startswith("side")]
    waits = [tuple(event.split(" waits for ")) for event in begins]
    assert len(waits) == 2 * 23  # each branch begins and ends
    assert all(a != b for a, b in waits)
    open_ = set()
    for waiting, awaited in waits:
        if (awaited, waiting) in open_:  # the end of what began
            open_.remove((awaited, waiting))
        else:
            assert waiting not in {stream for stream, _ in open_}
            open_.add((waiting, awaited))
    assert not open_


@pytest.mark.parametrize("recompute", [LIGHT, "true"])
def test_no_branch_lies_in_a_part_that_is_computed_anew(record, monkeypatch, recompute):
    model = make_network(**{"model.recompute": recompute})
    entered, at_branches = [], []

    def leave(*_):
        entered.pop()

    for part in model.modules():
        if isinstance(part, Recomputed) and part.recompute:
            part.register_forward_pre_hook(lambda part, _: entered.append(part))
            part.register_forward_hook(leave)
    take = branches._Streams.take

    def watch(streams):
        at_branches.append(list(entered))
        return take(streams)

    monkeypatch.setattr(branches._Streams, "take", watch)
    record()
    with side_streams():
        model(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    assert at_branches == 23 * [[]]


def test_random_numbers_are_those_of_one_after_the_other(record):
    """Else a resumed run, whose first steps are not recorded, would drop other branches."""
    model = make_network(**{"model.drop_path": 0.5})
    images, found = torch.rand(2, 2, 3, 32, 32), []
    record()
    for streams in (contextlib.nullcontext, side_streams):
        torch.manual_seed(3)
        with streams():
            found.append(model(*images))
    for ours, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, expected)


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
        Branch(partial(fail))
    assert recording.events[-2:] == ["main waits for side 1", "main waits for side 2"]
    assert branches._streams.get() is None


def test_an_exception_of_a_backward_pass_leaves_no_stream_unjoined(record):
    """The gradient goes on where the forward was joined."""
    recording = record()
    with pytest.raises(torch.cuda.OutOfMemoryError), side_streams():
        Branch(recording.part("a")).result()
        recording.events.append("backward")
        raise torch.cuda.OutOfMemoryError("no memory")
    assert recording.events[-2:] == ["backward", "main waits for side 1"]


def test_one_after_the_other_elsewhere(record):
    """On a CPU, and launched."""
    recording = record()
    branch = Branch(recording.part("a"))
    assert side_by_side(recording.part("b"), recording.part("c")) == ("b", "c")
    assert branch.result() == "a"
    assert recording.events == ["a on main", "b on main", "c on main"]
