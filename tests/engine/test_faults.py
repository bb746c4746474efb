"""Kill -9 at random moments: the run ends with the weights of one that nobody disturbed.

benchmarks/faults.py does the same to train.py and the whole network, with more kills.
"""

import os
import sys
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.faults import differences, finish, train_under_kills
from configs import load_config
from dataloader.build import build_eval_loader, build_train_loader
from engine import trainer
from engine.checkpoint import load_checkpoint
from engine.state import starting_point
from engine.trainer import fit
from models import CMFSOutput
from models.text_prior import TextPrior
from utils.distributed import Devices
from utils.run_folder import RunFolder
from utils.seed import seed_everything

KILLS = 6


class Network(nn.Module):
    """One convolution with batch statistics and dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.text_prior = TextPrior(torch.eye(2), source="none")
        self.mix = nn.Sequential(
            nn.Conv2d(6, num_classes + 3, 3, padding=1), nn.BatchNorm2d(num_classes + 3)
        )
        self.dropout = nn.Dropout2d(0.3)

    def forward(self, rgb, thermal):
        x = self.dropout(self.mix(torch.cat([rgb, thermal], dim=1)))
        return CMFSOutput(x[:, 3:], x[:, :3].sigmoid(), balance_loss=x.new_ones(()))

    def expert_shares(self):
        return torch.tensor([[0.5, 0.5]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_ends_with_the_same_weights(demo_dataset, tmp_path):
    """In a process of its own: its forks may do backward passes, as it does none."""
    process = get_context("spawn").Process(target=run_under_kills, args=(demo_dataset, tmp_path))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0, "see stderr"


def run_under_kills(demo_dataset: Path, tmp_path: Path) -> None:
    config = load_config(
        "demo",
        [
            f"data.dataset_path={demo_dataset}",
            f"experiment_path={tmp_path}",
            "train.epochs=50",
            "train.crop=[32,32]",
            "train.batch_size=2",
            "train.val_every=1000",
            "train.checkpoint_every=7",
            "train.save_every_s=0",
            "train.ema_decay=0.9",
        ],
    )
    scores = {"miou": None, "class_iou": {}}
    trainer.evaluate_segmentation = lambda *_, **__: scores
    sync = os.fsync

    def slow_sync(descriptor):
        time.sleep(0.01)
        sync(descriptor)

    os.fsync = slow_sync  # a disk that is easier to hit

    def start(exp: str) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            folder = RunFolder(config, exp)
            seed_everything(config.seed)
            loaders = build_train_loader(config), build_eval_loader(config, "val")
            fit(
                config,
                Network(config.data.num_classes),
                *loaders,
                folder=folder,
                devices=Devices(torch.device("cpu"), 0, 0, 1),
                resume_from=starting_point(folder, resume=True),
            )
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)

    assert finish(start("calm")) == 0
    calm, killed = (RunFolder(config, exp) for exp in ("calm", "killed"))
    kills = train_under_kills(
        lambda: start("killed"), killed.checkpoints, count=KILLS, longest_s=0.05, seed=4
    )
    assert len(kills) == KILLS
    assert sum(kill.was_saving for kill in kills) >= 1, "no kill hit a save"
    assert 0 < max(kill.step for kill in kills) < 200
    found, expected = (
        load_checkpoint(folder.last_checkpoint)._asdict() for folder in (killed, calm)
    )
    assert expected["step"] == 200
    assert differences(found, expected) == []
    logged = [folder.metrics_file.read_text().count("\n") for folder in (killed, calm)]
    assert logged == [20, 20]


def test_differences_are_found_to_the_bit():
    weights = torch.tensor([1.0, -0.0])
    tree = {"model": {"a": weights}, "rng": [torch.tensor([1])], "step": 3}
    assert differences(tree, tree) == []
    other = {"model": {"a": torch.tensor([1.0, 0.0])}, "rng": [torch.tensor([1])], "step": 4}
    assert sorted(differences(tree, other)) == ["checkpoint.model.a", "checkpoint.step"]
    assert differences(tree, tree | {"more": 1}) == ["checkpoint.more"]
