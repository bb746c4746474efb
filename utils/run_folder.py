"""Where the files of one run lie; the only place that knows the layout of experiment/."""

import re
from pathlib import Path
from typing import Protocol

from utils.errors import InputError


class _Dataset(Protocol):
    name: str


class _Config(Protocol):
    """What this file needs of configs.Config, which it may not import."""

    experiment_path: str
    data: _Dataset


class RunFolder:
    """experiment/<data.name>/<exp>/: checkpoints, logs and results of one run.

    Nothing is created here; whoever writes a file creates its folder.

    Raises:
        InputError: `exp` is not a plain folder name.
    """

    def __init__(self, config: _Config, exp: str = "exp") -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", exp):
            raise InputError(f"--exp takes a folder name of letters, digits, _ . -, got '{exp}'")
        self.path = Path(config.experiment_path).expanduser() / config.data.name / exp

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "epoch-last.pth"

    @property
    def previous_checkpoint(self) -> Path:
        """What epoch-last.pth was before it was last written."""
        return self.checkpoints / "epoch-previous.pth"

    @property
    def best_checkpoint(self) -> Path:
        return self.checkpoints / "best.pth"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint after `epoch` whole epochs."""
        return self.checkpoints / f"epoch-{epoch}.pth"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def log_file(self) -> Path:
        return self.path / "train_output.log"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def result_name(self, checkpoint: Path) -> str:
        """Under which name a checkpoint's results are kept: its file name without suffix.

        That of another run, or from elsewhere, has its run's or folder's name in front.
        """
        folder = checkpoint.resolve().parent
        if folder == self.checkpoints.resolve():
            return checkpoint.stem
        run = folder.parent if folder.name == self.checkpoints.name else folder
        return f"{run.name}-{checkpoint.stem}"

    def eval_folder(self, checkpoint_name: str) -> Path:
        """Where eval.py leaves the results of one checkpoint (result_name)."""
        return self.path / "eval" / checkpoint_name

    def vision_folder(self, checkpoint_name: str) -> Path:
        """Where eval_vision.py leaves the results of one checkpoint."""
        return self.path / "vision" / checkpoint_name
