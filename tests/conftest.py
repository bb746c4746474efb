"""Shared fixtures: the data and parity folders beside the checkout, a small config and data set."""

import logging
from pathlib import Path

import pytest
import torch

from configs import Config, load_config

torch.set_num_threads(1)  # the tests run in parallel processes, one a core

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared_folder(name: str) -> Path:
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/{name} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    return _shared_folder("parity")


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn scenes of 64x96 in the standard layout: 8 train, 2 val, 2 test."""
    from dataloader.synthetic import write_dataset

    folder = tmp_path_factory.mktemp("datasets") / "Demo"
    write_dataset(folder, counts={"train": 8, "val": 2, "test": 2}, height=64, width=96, seed=1)
    return folder


@pytest.fixture(autouse=True)
def restored_logging():
    """Scripts set up the root logger; later tests get it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def demo_config(demo_dataset: Path, tmp_path: Path) -> Config:
    return load_config(
        "demo",
        [
            f"data.dataset_path={demo_dataset}",
            f"experiment_path={tmp_path / 'experiment'}",
            "train.crop=[64,96]",
            "train.batch_size=2",
            "eval.batch_size=2",
            "train.save_every_s=0",
        ],
    )
