"""Batches on time, late, and not at all."""

import threading
import time
from typing import NamedTuple

import pytest
import torch

from engine import feed as feed_module
from engine.feed import Feed

CPU = torch.device("cpu")


class Numbers(NamedTuple):
    rgb: torch.Tensor
    name: list[str]

    def to(self, device):
        return self._replace(rgb=self.rgb.to(device))


class Sampler:
    def set_epoch(self, epoch):
        self.epoch, self.start_batch = epoch, 0


class Loader:
    """Three batches an epoch, each after a pause."""

    num_workers = 2

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.batch_sampler = Sampler()

    def __len__(self):
        return 3

    def __iter__(self):
        for number in range(self.batch_sampler.start_batch, 3):
            time.sleep(self.pause_s)
            yield Numbers(torch.tensor([10 * self.batch_sampler.epoch + number]), ["a"])


def test_batches_from_the_middle_of_an_epoch():
    feed = Feed(Loader(), CPU)
    assert len(feed) == 3
    assert [int(batch.rgb) for batch in feed.batches(2, start=1)] == [21, 22]
    assert [int(batch.rgb) for batch in feed.batches(3, start=0)] == [30, 31, 32]


def test_waiting_for_images_is_measured_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(feed_module, "_LEAST_S", 0.01)
    feed = Feed(Loader(pause_s=0.02), CPU)
    for epoch in range(2):
        list(feed.batches(epoch, start=0))
        assert feed.waited_share() > 0.5
    assert caplog.text.count("data.num_workers (now 2)") == 1
    assert "% of the time" in caplog.text


def test_work_on_the_batches_is_no_waiting(monkeypatch, caplog):
    monkeypatch.setattr(feed_module, "_LEAST_S", 0.01)
    feed = Feed(Loader(), CPU)
    for _ in feed.batches(0, start=0):
        time.sleep(0.02)
    assert feed.waited_share() < 0.5
    assert caplog.text == ""


def test_waiting_while_the_device_is_behind_costs_nothing(monkeypatch, caplog):
    monkeypatch.setattr(feed_module, "_LEAST_S", 0.01)
    feed = Feed(Loader(pause_s=0.02), CPU)
    list(feed.batches(0, start=0))
    assert feed.waited_share(synchronized_s=1.0) == 0
    assert caplog.text == ""


def test_a_short_time_is_no_reason_to_warn(caplog):
    feed = Feed(Loader(pause_s=0.01), CPU)
    list(feed.batches(0, start=0))
    assert feed.waited_share() > 0.5
    assert caplog.text == ""


@pytest.mark.parametrize(("pause_s", "warnings"), [(0.2, 3), (0.0, 0)])
def test_a_batch_that_does_not_come_is_said_while_it_is_awaited(pause_s, warnings, caplog):
    feed = Feed(Loader(pause_s), CPU, patience_s=0.1)
    list(feed.batches(0, start=0))
    assert caplog.text.count("no batch for") == warnings
    alarms = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(alarm.finished.is_set() for alarm in alarms), "an alarm is still set"
