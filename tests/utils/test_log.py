"""The log file, metrics.jsonl, TensorBoard, and the files that describe a run."""

import io
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import load_config
from utils.environment import environment_info
from utils.errors import InputError
from utils.log import MetricsFile, RunReport, setup_logging
from utils.run_folder import RunFolder
from utils.seed import rng_state, seed_everything, set_rng_state


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(load_config("mfnet", [f"experiment_path={tmp_path}"]), "exp")


@pytest.fixture
def root_logger():
    """The root logger, put back as it was afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_layout_of_a_run_folder(folder, tmp_path):
    run = tmp_path / "MFNet" / "exp"
    assert folder.path == run
    assert folder.last_checkpoint == run / "checkpoint" / "epoch-last.pth"
    assert folder.best_checkpoint == run / "checkpoint" / "best.pth"
    assert folder.epoch_checkpoint(500) == run / "checkpoint" / "epoch-500.pth"
    assert folder.tensorboard == run / "tb"
    assert folder.log_file == run / "train_output.log"
    assert folder.config_file == run / "config.yaml"
    assert folder.environment_file == run / "environment.json"
    assert folder.metrics_file == run / "metrics.jsonl"
    assert folder.eval_folder("best") == run / "eval" / "best"
    assert folder.vision_folder("best") == run / "vision" / "best"
    assert folder.result_name(folder.best_checkpoint) == "best"
    assert (
        folder.result_name(tmp_path / "MFNet" / "other" / "checkpoint" / "best.pth") == "other-best"
    )
    assert folder.result_name(tmp_path / "theirs" / "cmfs.safetensors") == "theirs-cmfs"
    assert not run.exists(), "naming a folder must not create it"


@pytest.mark.parametrize("exp", ["", "..", "a/b", "/a", ".hidden"])
def test_run_folder_names_stay_inside(exp):
    with pytest.raises(InputError, match="--exp"):
        RunFolder(load_config("mfnet"), exp)


def test_lines_go_to_console_and_file(root_logger, tmp_path, capsys):
    path = tmp_path / "run" / "train_output.log"
    setup_logging(path)
    logging.getLogger("engine").info("both")
    logging.getLogger("engine").info("file", extra={"only_file": True})
    setup_logging(path)
    logging.getLogger("engine").info("again")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split()[-1] for line in captured.out.splitlines()] == ["both", "again"]
    lines = path.read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["both", "file", "again"]


def test_a_console_that_nobody_reads_ends_nothing(root_logger, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    setup_logging(tmp_path / "log")
    monkeypatch.setattr(sys, "stdout", Closed())
    logging.getLogger("x").info("still here")
    assert "still here" in (tmp_path / "log").read_text()


def test_other_ranks_write_no_file_and_say_only_errors(root_logger, tmp_path, capsys):
    path = tmp_path / "train_output.log"
    setup_logging(path, main=False)
    logging.getLogger("engine").warning("quiet")
    logging.getLogger("engine").error("loud")
    assert "quiet" not in (out := capsys.readouterr().out)
    assert "loud" in out
    assert not path.exists()


def test_a_resumed_metrics_file_drops_what_will_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (10, 20, 30):
        file.write({"step": step})
    file.close()
    spoilt = "\0" * 20 + "\n3\n"  # a crash of the machine leaves such lines
    path.write_text(spoilt + path.read_text() + '{"step": 4')  # and cuts the last one short
    file = MetricsFile(path, from_step=20)
    file.write({"step": 30, "again": True})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10},
        {"step": 20},
        {"step": 30, "again": True},
    ]


def report_steps(report: RunReport) -> None:
    report.start_clock(0)
    report.steps(
        {"segmentation": 0.5, "total": 1.5},
        torch.tensor([[0.25, 0.75]]),
        epoch=1,
        step=4,
        gradient_norm=2.5,
        learning_rate=1e-3,
        batch_size=8,
        data_wait=0.25,
    )
    report.validation(
        {"val/miou": 0.5, "val_iou/bicycle": None},
        {"examples": np.full((4, 6, 3), 90, np.uint8)},
        {"dt_log10/mia": np.array([-2.0, -1.0])},
        step=4,
    )


def test_a_report_reaches_metrics_log_and_tensorboard(folder, caplog):
    report = RunReport(folder, from_step=0, total_steps=10, is_enabled=True)
    with caplog.at_level(logging.INFO), report:
        report_steps(report)
    entry = json.loads(folder.metrics_file.read_text())
    assert entry["images_per_s"] > 0 and entry["data_wait"] == 0.25
    assert {key: entry[key] for key in list(entry)[:6]} == {
        "step": 4, "epoch": 1, "loss": 1.5, "loss_segmentation": 0.5,
        "gradient_norm": 2.5, "lr": 1e-3,
    }  # fmt: skip
    assert "epoch 1 step 4/10 left" in caplog.text
    assert "segmentation 0.5000" in caplog.text
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert values.pop("train/images_per_s") > 0
    assert values.keys() == {
        "loss/total", "loss/segmentation", "train/lr", "train/data_wait", "val/miou",
        "train/gradient_norm", "experts/block0_expert0", "experts/block0_expert1",
    }  # fmt: skip
    assert values["experts/block0_expert1"] == 0.75
    assert math.isclose(values["train/lr"], 1e-3, rel_tol=1e-6)
    (picture,) = events.Images("examples")
    assert (picture.width, picture.height, picture.step) == (6, 4, 4)
    (histogram,) = events.Histograms("dt_log10/mia")
    assert (histogram.step, histogram.histogram_value.num) == (4, 2)


def test_metrics_survive_a_stop_while_a_resumed_run_rewrites_them(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    path.write_text(lines)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            MetricsFile(path, from_step=2)
    assert path.read_text() == lines
    metrics = MetricsFile(path, from_step=2)
    metrics.write({"step": 3, "again": True})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "again": True},
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_steps_show_in_the_bar_and_in_the_file(
    folder, root_logger, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")  # room for any number of images a second
    setup_logging(folder.log_file)
    with RunReport(folder, from_step=0, total_steps=10, is_enabled=True) as report:
        report_steps(report)
    bar = sys.stderr.getvalue()
    assert "4/10" in bar and "images/s" in bar and "segmentation 0.5" in bar
    assert "step 4/10" not in capsys.readouterr().out
    assert "step 4/10" in folder.log_file.read_text()


def test_a_report_of_another_rank_writes_nothing(folder):
    with RunReport(folder, from_step=0, total_steps=10, is_enabled=False) as report:
        report_steps(report)
    assert not folder.path.exists()


def test_environment_is_json_with_the_torch_version():
    info = json.loads(json.dumps(environment_info()))
    assert info["packages"]["torch"] == torch.__version__.split("+")[0]
    assert info.keys() >= {"git_commit", "python", "cuda", "gpus", "world_size", "command"}


def test_random_state_goes_back():
    seed_everything(7)
    first = torch.rand(3)
    state = rng_state()
    second = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), second)
    seed_everything(7)
    assert torch.equal(torch.rand(3), first)
