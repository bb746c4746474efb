"""The training loop: exact resume, orderly stop, bad losses, what is kept and logged, two ranks."""

import inspect
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch import nn

from configs import Config, load_config
from dataloader.build import build_eval_loader, build_train_loader
from engine import memory, step, trainer
from engine.checkpoint import load_checkpoint
from engine.state import starting_point
from engine.trainer import fit
from models import CMFSOutput, build_model
from models.text_prior import TextPrior
from utils.distributed import Devices, shutdown
from utils.errors import InputError
from utils.run_folder import RunFolder
from utils.seed import seed_everything

CPU = Devices(torch.device("cpu"), 0, 0, 1)


class SmallNetwork(nn.Module):
    """What the loop needs of CMFS, in one convolution with batch statistics and dropout."""

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


def build_small(config: Config, *, from_checkpoint: bool = False) -> SmallNetwork:
    return SmallNetwork(config.data.num_classes)


@pytest.fixture
def configure(demo_dataset, tmp_path):
    """A config of four steps an epoch on 32x32 crops, with drop path and dropout at work."""

    def with_overrides(*overrides: str) -> Config:
        return load_config(
            "demo",
            [
                f"data.dataset_path={demo_dataset}",
                f"experiment_path={tmp_path}",
                "model.drop_path=0.2",
                "train.crop=[32,32]",
                "train.batch_size=2",
                "train.log_every=1",
                "train.save_every_s=0",
                *overrides,
            ],
        )

    return with_overrides


@pytest.fixture
def no_validation(monkeypatch):
    """Validation that costs nothing and finds nothing."""
    scores = {"miou": None, "class_iou": {}}
    monkeypatch.setattr(trainer, "evaluate_segmentation", lambda *_, **__: scores)


def let_validation_find(monkeypatch, mious: list[float | None]) -> None:
    """One mIoU after the other, without a network's work."""
    scores = iter(mious)
    monkeypatch.setattr(
        trainer,
        "evaluate_segmentation",
        lambda *_, **__: {"miou": next(scores), "class_iou": {"car": None}},
    )


def run(
    config: Config,
    exp: str = "exp",
    *,
    resume: bool | str = False,
    build=build_small,
    devices: Devices = CPU,
) -> int:
    """What train.py does between its arguments and its exit code."""
    folder = RunFolder(config, exp)
    resume_from = starting_point(folder, resume=resume)
    seed_everything(config.seed + devices.rank)
    ranks = {"rank": devices.rank, "world_size": devices.world_size}
    return fit(
        config,
        build(config, from_checkpoint=resume_from is not None),
        build_train_loader(config, **ranks),
        build_eval_loader(config, "val", **ranks),
        folder=folder,
        devices=devices,
        resume_from=resume_from,
    )


def change_loss(monkeypatch, change) -> None:
    """Call change(step, parts) on the parts of every step's loss."""
    real, steps = step.joint_loss, iter(range(1, 10**6))

    def joint_loss(*arguments):
        parts = real(*arguments)
        change(next(steps), parts)
        return parts

    monkeypatch.setattr(step, "joint_loss", joint_loss)


def kill_at(step: int, number: int):
    def change(now, parts):
        if now == step:
            os.kill(os.getpid(), number)

    return change


def poison_at(step: int):
    def change(now, parts):
        if now == step:
            for name in ("total", "fusion"):
                parts[name] = parts[name] * float("nan")

    return change


def metrics_of(config: Config, exp: str = "exp") -> list[dict]:
    lines = RunFolder(config, exp).metrics_file.read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(found, expected, where="checkpoint"):
    """Equal values, tensors bit for bit, through dicts, lists and tuples."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("stop_after", "build", "precision"),
    [
        (3, build_model, "float32"),
        (3, build_small, "float32"),
        (4, build_small, "float32"),
        (3, build_small, "fp16"),
    ],
    ids=["CMFS, inside an epoch", "inside an epoch", "at its end", "scaled"],
)
def test_stop_and_resume_equal_one_run_bit_for_bit(
    configure, monkeypatch, stop_after, build, precision
):
    """Method, Sec. 8, defect 2: network, optimiser, position, generators and best come back."""
    config = configure("train.max_steps=6", "train.val_every=1", f"train.precision={precision}")
    assert run(config, "whole", build=build) == 0

    with monkeypatch.context() as patch:
        change_loss(patch, kill_at(stop_after, signal.SIGTERM))
        assert run(config, "parts", build=build) == signal.SIGTERM
    stopped = load_checkpoint(RunFolder(config, "parts").last_checkpoint)
    assert stopped.step == stop_after
    assert run(config, "parts", resume=True, build=build) == 0

    whole, parts = (RunFolder(config, exp) for exp in ("whole", "parts"))
    expected, found = (load_checkpoint(folder.last_checkpoint) for folder in (whole, parts))
    assert any(len(state) for state in expected.training_state["optimizer"]["state"].values())
    assert expected.training_state["best_miou"] is not None
    assert (expected.training_state["scaler"] is not None) == (precision == "fp16")
    assert_same(found._asdict(), expected._asdict())
    best, best_found = (load_checkpoint(folder.best_checkpoint) for folder in (whole, parts))
    assert_same(best_found._asdict(), best._asdict())

    speeds = ("images_per_s", "elapsed_s", "data_wait")
    logged = [
        [{k: v for k, v in line.items() if k not in speeds} for line in metrics_of(config, exp)]
        for exp in ("whole", "parts")
    ]
    assert [line["step"] for line in logged[0]] == [1, 2, 3, 4, 5, 6]
    assert logged[1] == logged[0]


def test_a_resumed_run_remembers_its_best(configure, monkeypatch):
    let_validation_find(monkeypatch, [0.5, 0.3])
    config = configure("train.max_steps=8", "train.val_every=1")
    with monkeypatch.context() as patch:
        change_loss(patch, kill_at(5, signal.SIGTERM))
        run(config)
    run(config, resume=True)
    assert load_checkpoint(RunFolder(config).best_checkpoint).step == 4


def test_after_a_validation_the_network_trains_again(configure, monkeypatch):
    modes, real = [], trainer.train_step

    def train_step(state, *arguments):
        modes.append(state.model.training)
        return real(state, *arguments)

    monkeypatch.setattr(trainer, "train_step", train_step)
    assert run(configure("train.max_steps=9", "train.val_every=1")) == 0
    assert modes == [True] * 9


def test_the_weights_average_is_scored_kept_and_resumed(configure, monkeypatch):
    scored = []

    def evaluate(model, *_, **__):
        scored.append((model.training, {k: v.clone() for k, v in model.state_dict().items()}))
        return {"miou": len(scored) / 10, "class_iou": {}}

    monkeypatch.setattr(trainer, "evaluate_segmentation", evaluate)
    config = configure(
        "train.max_steps=8",
        "train.val_every=1",
        "train.ema_decay=0.5",
        "train.checkpoint_every=1",
        "train.warmup_epochs=0",
    )
    run(config, "whole")
    scored.clear()
    with monkeypatch.context() as patch:
        change_loss(patch, kill_at(3, signal.SIGTERM))
        assert run(config) == signal.SIGTERM
    run(config, resume=True)
    whole, parts = RunFolder(config, "whole"), RunFolder(config)
    for name in ("last_checkpoint", "best_checkpoint"):
        expected, found = (load_checkpoint(getattr(folder, name)) for folder in (whole, parts))
        assert_same(found._asdict(), expected._asdict())
    last = load_checkpoint(parts.last_checkpoint)
    trained = last.training_state["weights"]
    assert not torch.equal(trained["mix.0.weight"], last.model["mix.0.weight"])
    assert torch.equal(trained["mix.1.running_mean"], last.model["mix.1.running_mean"])
    is_training, weights = scored[-1]
    assert not is_training
    for path in (parts.best_checkpoint, parts.epoch_checkpoint(2), parts.last_checkpoint):
        assert_same(load_checkpoint(path).model, weights)
    run(configure("train.max_steps=9"), resume=True)  # without an average: from the weights
    last = load_checkpoint(parts.last_checkpoint)
    assert last.training_state["weights"] is None
    moved = (last.model["mix.0.weight"] - trained["mix.0.weight"]).abs().max()
    assert moved <= 1.1 * config.train.lr, "more than one step away from the trained weights"


def test_a_signal_ends_a_validation_which_a_resumed_run_does_anew(configure, monkeypatch):
    config = configure(
        "train.max_steps=6", "train.val_every=1", "eval.batch_size=1", "train.save_every_s=1000"
    )
    run(config, "whole")
    seen = []

    def evaluate(model, loader, *_, **__):
        for batch in loader:
            seen.append(batch.name)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"miou": 1.0, "class_iou": {}}

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_segmentation", evaluate)
        assert run(config, "parts") == signal.SIGTERM
    assert len(seen) == 1, "the rest of the split was scored after the signal"
    folders = [RunFolder(config, exp) for exp in ("whole", "parts")]
    assert load_checkpoint(folders[1].last_checkpoint).step == 4
    assert not folders[1].best_checkpoint.exists(), "half a validation counts for nothing"
    assert run(config, "parts", resume=True) == 0
    for name in ("last_checkpoint", "best_checkpoint"):
        expected, found = (load_checkpoint(getattr(folder, name)) for folder in folders)
        assert_same(found._asdict(), expected._asdict())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(configure, monkeypatch, no_validation, number):
    config = configure("train.log_every=100")
    change_loss(monkeypatch, kill_at(2, number))
    assert run(config) == number
    saved = load_checkpoint(RunFolder(config).last_checkpoint)
    assert (saved.step, saved.epoch, saved.training_state["batch"]) == (2, 0, 2)


def test_a_loss_that_is_not_finite_says_where_and_saves_nothing(
    configure, monkeypatch, no_validation
):
    config = configure("train.log_every=2", "train.max_steps=12")
    seen = []

    class Loader:
        """The train loader, remembering the names of every batch."""

        def __init__(self, loader):
            self.loader, self.batch_sampler = loader, loader.batch_sampler

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for batch in self.loader:
                seen.append(batch.name)
                yield batch

    real = build_train_loader
    monkeypatch.setitem(globals(), "build_train_loader", lambda *a, **k: Loader(real(*a, **k)))
    change_loss(monkeypatch, poison_at(7))
    with pytest.raises(FloatingPointError) as error:
        run(config)
    text = str(error.value)
    assert "step 7" in text
    assert "total nan" in text and "fusion nan" in text and "segmentation nan" not in text
    assert all(name in text for name in seen[6])
    saved = load_checkpoint(RunFolder(config).last_checkpoint)
    assert saved.step == 4, "the last good checkpoint stays"
    assert all(t.isfinite().all() for t in saved.model.values() if t.is_floating_point())


def test_a_bad_loss_between_two_log_lines_is_found_before_saving(
    configure, monkeypatch, no_validation
):
    config = configure("train.log_every=100")
    change_loss(monkeypatch, poison_at(3))
    with pytest.raises(FloatingPointError, match="step 3"):
        run(config)
    assert not RunFolder(config).checkpoints.exists()


def poison_gradient_at(step: int):
    """The loss is finite, its gradient is not."""

    def change(now, parts):
        if now == step:
            parts["total"].register_hook(lambda gradient: gradient * float("nan"))

    return change


def test_a_gradient_that_is_not_finite_ends_the_run(configure, monkeypatch, no_validation):
    change_loss(monkeypatch, poison_gradient_at(4))
    config = configure("train.max_steps=4")
    with pytest.raises(
        FloatingPointError, match="the gradient is not finite at step 4: .* total 2"
    ):
        run(config)
    assert not RunFolder(config).checkpoints.exists()


def test_bad_steps_up_to_the_limit_are_left_out(configure, monkeypatch, no_validation, caplog):
    """The count goes on after a stop."""
    config = configure("train.max_steps=12", "train.max_bad_steps=2", "train.log_every=2")

    def change(now, parts):
        for bad in (3, 7, 11):
            poison_at(bad)(now, parts)
        kill_at(5, signal.SIGTERM)(now, parts)

    with monkeypatch.context() as patch:
        change_loss(patch, change)
        assert run(config) == signal.SIGTERM
    assert caplog.text.count("left out: the loss is not finite at step 3: ") == 1
    saved = load_checkpoint(RunFolder(config).last_checkpoint)
    assert (saved.step, saved.training_state["bad_steps"]) == (5, 1)
    assert all(math.isfinite(line["loss"]) for line in metrics_of(config))

    change_loss(monkeypatch, lambda now, parts: change(now + 5, parts))
    with pytest.raises(FloatingPointError, match=r"at step 11: .* train.max_bad_steps \(now 2"):
        run(config, resume=True)
    assert load_checkpoint(RunFolder(config).last_checkpoint).step == 8


def test_labels_without_a_class_are_said(configure, monkeypatch, no_validation, caplog):
    """Of steps 3 and 4, and of half of step 5, which says nothing yet."""
    real, steps = step.joint_loss, iter(range(1, 10**6))

    def joint_loss(output, batch, *arguments):
        now = next(steps)
        unknown = torch.full_like(batch.label, 255)
        unknown[1:] = batch.label[1:] if now == 5 else 255
        label = unknown if now in (3, 4, 5) else batch.label
        return real(output, batch._replace(label=label), *arguments)

    monkeypatch.setattr(step, "joint_loss", joint_loss)
    run(configure("train.max_steps=6", "train.log_every=2"))
    found = [r.getMessage() for r in caplog.records if "has a class" in r.getMessage()]
    assert len(found) == 1
    assert found[0].startswith("not one pixel of steps 3 to 4 has a class: all are 255 (unknown)")


def test_a_full_gpu_ends_the_run_with_its_numbers(configure, monkeypatch, no_validation):
    def fill(now, parts):
        if now == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    change_loss(monkeypatch, fill)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(memory, "_total_memory", lambda device: 2**31)
    with pytest.raises(InputError, match="2 images of 32x32 .* peak 1.0 of 2.0 GiB"):
        run(configure())


def test_accumulation_by_config_takes_as_many_steps(configure, monkeypatch, no_validation):
    losses = []
    change_loss(monkeypatch, lambda now, parts: losses.append(now))
    run(configure("train.max_steps=3", "train.accumulation=2"))
    assert losses == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics_of(configure())] == [1, 2, 3]


def test_weights_that_are_not_finite_are_never_saved(configure, monkeypatch, no_validation):
    """Whatever made them so."""
    real = trainer.train_step

    def train_step(state, *arguments):
        result = real(state, *arguments)
        if state.step == 4:
            next(state.model.parameters()).data.fill_(float("inf"))
        return result

    monkeypatch.setattr(trainer, "train_step", train_step)
    config = configure("train.max_steps=4")
    with pytest.raises(FloatingPointError, match="weights are not finite after step 4"):
        run(config)
    assert not RunFolder(config).checkpoints.exists()


def test_best_checkpoint_follows_the_validation(configure, monkeypatch):
    let_validation_find(monkeypatch, [0.2, 0.5, None, 0.3])
    config = configure("train.epochs=4", "train.val_every=1", "train.batch_size=8")
    assert run(config) == 0
    best = load_checkpoint(RunFolder(config).best_checkpoint)
    assert (best.epoch, best.metrics["miou"], best.training_state) == (2, 0.5, None)


@pytest.mark.parametrize(
    ("start", "every", "keep", "epochs"),
    [(2, 1, 2, [4, 5]), (2, 2, 5, [2, 4]), (9, 1, 5, [])],
)
def test_kept_epochs(configure, no_validation, start, every, keep, epochs):
    config = configure(
        "train.epochs=5",
        "train.batch_size=8",
        f"train.checkpoint_start={start}",
        f"train.checkpoint_every={every}",
        f"train.keep_last={keep}",
    )
    run(config)
    folder = RunFolder(config).checkpoints
    names = {"epoch-last", "epoch-previous", *(f"epoch-{epoch}" for epoch in epochs)}
    files = {f"{name}.pth{end}" for name in names for end in ("", ".sha256")}
    assert {path.name for path in folder.iterdir()} == files


def test_last_checkpoint_waits_until_it_is_old_enough(configure, no_validation, monkeypatch):
    saved = []
    keep = trainer.save_last
    monkeypatch.setattr(
        trainer, "save_last", lambda state, *rest: saved.append(state.step) or keep(state, *rest)
    )
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 10.0 * len(metrics_of(config)))
    config = configure("train.epochs=5", "train.batch_size=8", "train.save_every_s=20")
    run(config)
    assert saved == [1, 3, 5]


def test_validation_epochs(configure, monkeypatch):
    """Every val_every epochs, and at the end."""
    seen = []
    monkeypatch.setattr(
        trainer,
        "evaluate_segmentation",
        lambda *_, **__: seen.append(len(metrics_of(config))) or {"miou": None, "class_iou": {}},
    )
    config = configure("train.epochs=5", "train.batch_size=8", "train.val_every=2")
    run(config)
    assert seen == [2, 4, 5]


def test_metrics_every_few_steps_are_means_of_them(configure, no_validation):
    config = configure("train.max_steps=4")
    run(config, "each")
    run(configure("train.max_steps=4", "train.log_every=2"), "pairs")
    each, pairs = metrics_of(config, "each"), metrics_of(config, "pairs")
    assert [line["step"] for line in pairs] == [2, 4]
    assert pairs[1]["loss"] == pytest.approx((each[2]["loss"] + each[3]["loss"]) / 2)
    assert list(each[0])[:3] == ["step", "epoch", "loss"]
    parts = ("segmentation", "fusion", "intensity", "gradient", "color", "balance")
    assert each[0].keys() >= {f"loss_{part}" for part in parts} | {
        "lr",
        "images_per_s",
        "elapsed_s",
    }


def test_a_log_line_is_of_all_steps_since_the_last_one(configure, no_validation):
    """Steps at the end of an epoch, too, whose losses are checked there."""
    changes = ("train.epochs=3", "train.batch_size=4")
    run(configure(*changes), "each")
    run(configure(*changes, "train.log_every=5"), "fives")
    each, fives = (metrics_of(configure(*changes), exp) for exp in ("each", "fives"))
    assert len(each) == 6 and [line["step"] for line in fives] == [5, 6]
    for name in ("loss", "loss_fusion"):
        mean = sum(line[name] for line in each[:5]) / 5
        assert fives[0][name] == pytest.approx(mean, rel=1e-5)
    assert fives[0]["gradient_norm"] == max(line["gradient_norm"] for line in each[:5])


def test_learning_rate_of_each_step_follows_the_schedule(configure, no_validation):
    config = configure("train.max_steps=4", "train.warmup_epochs=0.5", "train.poly_power=1")
    run(config)
    factors = [line["lr"] / config.train.lr for line in metrics_of(config)]
    assert factors == pytest.approx([0.5, 0.75, 0.5, 0.25])


def test_files_that_describe_the_run(configure, no_validation):
    config = configure("train.max_steps=1")
    run(config)
    folder = RunFolder(config)
    assert load_config(str(folder.config_file)) == config
    assert "packages" in json.loads(folder.environment_file.read_text())


def test_clipping_bounds_the_gradient(configure, monkeypatch, no_validation):
    norms = []
    real = torch.optim.AdamW.step

    def step(self, *arguments, **keywords):
        gradients = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(configure("train.max_steps=1", "train.clip_grad_norm=1.0e-3"))
    run(configure("train.max_steps=1"), "free")
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1] > 1e-2


def test_a_norm_beyond_float32_does_no_harm(configure, monkeypatch, no_validation):
    """Its square is infinite, every single gradient finite."""

    def enlarge(now, parts):
        if now == 2:
            parts["total"].register_hook(lambda gradient: gradient * 1e25)

    change_loss(monkeypatch, enlarge)
    assert run(configure("train.max_steps=2")) == 0
    assert run(configure("train.max_steps=2", "train.clip_grad_norm=1"), "clipped") == 0


@pytest.mark.parametrize(
    ("lr", "clip", "size", "is_warned"),
    [
        ("6.0e-5", "none", "tiny", False),
        ("4.0e-4", "none", "tiny", True),
        ("4.0e-4", "1.0", "tiny", False),
        ("4.0e-3", "none", "demo", False),
    ],
)
def test_a_large_rate_without_clipping_is_warned_of(caplog, lr, clip, size, is_warned):
    overrides = [f"train.lr={lr}", f"train.clip_grad_norm={clip}", f"model.size={size}"]
    trainer.warn_of_collapse(load_config("demo", overrides))
    assert ("train.clip_grad_norm=1.0 guards" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("precision", "build"), [("bf16", build_model), ("fp16", build_small)], ids=["bf16", "fp16"]
)
def test_autocast_trains(configure, no_validation, precision, build):
    config = configure("train.max_steps=2", f"train.precision={precision}")
    run(config, build=build)
    saved = load_checkpoint(RunFolder(config).last_checkpoint)
    assert all(t.dtype == torch.float32 for t in saved.model.values() if t.is_floating_point())
    assert bool(saved.training_state["scaler"]) == (precision == "fp16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_on_a_gpu_a_run_stops_and_goes_on(configure, monkeypatch, precision):
    config = configure("train.max_steps=6", f"train.precision={precision}", "train.ema_decay=0.9")
    on_gpu = {"build": build_model, "devices": Devices(torch.device("cuda", 0), 0, 0, 1)}
    with monkeypatch.context() as patch:
        change_loss(patch, kill_at(3, signal.SIGTERM))
        assert run(config, **on_gpu) == signal.SIGTERM
    assert run(config, resume=True, **on_gpu) == 0
    saved = load_checkpoint(RunFolder(config).last_checkpoint)
    moments = saved.training_state["optimizer"]["state"].values()
    scale = saved.training_state["scaler"]["scale"] if precision == "fp16" else 65536
    halved = round(math.log2(65536 / scale))
    assert {float(m["step"]) for m in moments} == {6.0 - halved}, "each overflow skips one"
    assert all(t.isfinite().all() for m in moments for t in m.values())
    assert "cuda" in saved.training_state["rng"][0]
    assert [line["step"] for line in metrics_of(config)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_full_is_named_with_its_numbers(configure, no_validation):
    config = configure("train.batch_size=8", "train.crop=[480,640]")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.004)  # a third of a GiB of 80
    try:
        with pytest.raises(InputError, match="8 images of 480x640 .*accumulation=2.* smaller"):
            run(config, build=build_model, devices=Devices(torch.device("cuda", 0), 0, 0, 1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def touch_checkpoints(config: Config, *names: str) -> RunFolder:
    folder = RunFolder(config)
    folder.checkpoints.mkdir(parents=True)
    for name in names:
        (folder.checkpoints / name).touch()
    return folder


@pytest.mark.parametrize("name", ["epoch-last.pth", "epoch-5.pth", "best.pth"])
def test_another_runs_folder_is_not_overwritten(configure, name):
    folder = touch_checkpoints(configure(), name)
    with pytest.raises(InputError, match="--resume, or begin another one with --exp NAME"):
        starting_point(folder, resume=False)


def test_a_log_without_a_checkpoint_is_not_overwritten_unasked(configure):
    folder = RunFolder(configure())
    folder.path.mkdir(parents=True)
    folder.metrics_file.write_text("")
    assert starting_point(folder, resume=False) is None
    folder.metrics_file.write_text('{"step": 10}\n')
    with pytest.raises(InputError, match="log of a run that saved no checkpoint: .* --exp NAME"):
        starting_point(folder, resume=False)
    assert starting_point(folder, resume=True) is None


def test_resume_needs_the_last_checkpoint(configure):
    folder = touch_checkpoints(configure(), "epoch-5.pth", "best.pth")
    with pytest.raises(InputError, match=r"epoch-last\.pth, but there is only best\.pth, epoch-5"):
        starting_point(folder, resume=True)


def test_a_broken_last_checkpoint_offers_the_one_before_which_can_be_resumed(
    configure, no_validation
):
    config = configure("train.epochs=3", "train.batch_size=8", "train.checkpoint_every=1")
    run(config, "whole")
    folder = RunFolder(config)
    run(config)
    content = folder.last_checkpoint.read_bytes()
    folder.last_checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"the one before it is .*/epoch-previous\.pth$"):
        run(config, resume=True)
    assert load_checkpoint(folder.previous_checkpoint).step == 2
    run(config, resume=str(folder.previous_checkpoint))
    expected = load_checkpoint(RunFolder(config, "whole").last_checkpoint)
    assert_same(load_checkpoint(folder.last_checkpoint)._asdict(), expected._asdict())


def test_another_runs_checkpoint_is_resumed_in_an_empty_folder_alone(configure):
    folder = touch_checkpoints(configure(), "epoch-last.pth")
    other = str(folder.last_checkpoint)
    assert starting_point(RunFolder(configure(), "new"), resume=other) == folder.last_checkpoint
    with pytest.raises(InputError, match="already holds a run, and .* is not of it"):
        starting_point(folder, resume=str(shutil.copy(other, folder.path / "epoch-last.pth")))
    with pytest.raises(InputError, match="nowhere.pth: there is no such file"):
        starting_point(folder, resume=str(folder.path / "nowhere.pth"))


def test_a_run_in_a_new_folder_finds_a_best_of_its_own(configure, monkeypatch):
    let_validation_find(monkeypatch, [0.9, 0.5, 0.1])
    run(configure("train.epochs=2", "train.batch_size=4", "train.val_every=1"))
    first = RunFolder(configure())
    assert load_checkpoint(first.last_checkpoint).training_state["best_miou"] == 0.9
    config = configure("train.epochs=3", "train.batch_size=4", "train.val_every=3")
    run(config, "new", resume=str(first.last_checkpoint))
    assert load_checkpoint(RunFolder(config, "new").best_checkpoint).metrics["miou"] == 0.1


def test_resume_of_nothing_begins(configure):
    assert starting_point(RunFolder(configure()), resume=True) is None


@pytest.fixture
def begun(configure, no_validation):
    """A run that stopped after one step; gives its config with changes."""
    run(configure("train.max_steps=1"))
    return configure


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.crop=[64,64]"], r"train.crop from \[32, 32\] to \[64, 64\]"),
        (["model.drop_path=0.1"], "model.drop_path from 0.2 to 0.1"),
        (["data.modalities=rgb"], "data.modalities from both to rgb"),
        (["train.batch_size=4"], "train.batch_size from 2 to 4"),
        (["seed=1"], "seed from 3407 to 1"),
        (["data.class_names=[background,person,bus,cone,kerb]"], "data.class_names from"),
    ],
)
def test_resume_with_another_network_or_data_is_refused(begun, overrides, message):
    before = RunFolder(begun()).last_checkpoint.read_bytes()
    with pytest.raises(InputError, match=message) as error:
        run(begun(*overrides), resume=True)
    assert "--exp NAME" in str(error.value)
    assert RunFolder(begun()).last_checkpoint.read_bytes() == before


def test_resume_with_another_recipe_says_so(begun, caplog):
    with caplog.at_level("INFO"):
        run(begun("train.max_steps=2", "train.weight_decay=0.5"), resume=True)
    assert "train.weight_decay from 0.01 to 0.5" in caplog.text
    assert load_checkpoint(RunFolder(begun()).last_checkpoint).step == 2


@pytest.mark.parametrize("saved", [{"x": 1}, [1]])
def test_resume_of_a_foreign_training_state_is_refused(begun, saved):
    config = begun()
    path = RunFolder(config).last_checkpoint
    content = torch.load(path, weights_only=True)
    torch.save({**content, "training_state": saved}, path)
    path.with_name(f"{path.name}.sha256").unlink()
    with pytest.raises(InputError, match="no training state of train.py: bad_steps, .*missing"):
        run(config, resume=True)


def test_ranks_that_would_go_on_from_different_checkpoints_are_refused(
    configure, monkeypatch, no_validation
):
    monkeypatch.setattr("engine.state.gather_objects", lambda mine: [mine, ("other.pth", 1, "a")])
    with pytest.raises(InputError, match="but from nothing, other.pth of different content"):
        run(configure("train.max_steps=1"))


def test_resume_with_another_list_is_refused(begun, monkeypatch):
    real = build_train_loader

    def shorter(*arguments, **ranks):
        loader = real(*arguments, **ranks)
        loader.batch_sampler.length = 6
        return loader

    monkeypatch.setitem(globals(), "build_train_loader", shorter)
    with pytest.raises(InputError, match="4 steps in an epoch, the data gives 3"):
        run(begun("train.max_steps=2"), resume=True)


def without_batch_statistics(module: nn.Module) -> None:
    """Exchange what makes an image's output depend on its batch or on chance."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        elif isinstance(child, nn.Dropout2d):
            child.p = 0.0
        else:
            without_batch_statistics(child)


def run_of_rank(rank: int, folder: str, config: Config, exp: str, resume: bool, stop: int) -> None:
    """One of two ranks, whose second sends itself SIGTERM in step `stop` (0: never)."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store-{exp}-{resume}", rank=rank, world_size=2
    )
    scores = {"miou": 0.5, "class_iou": {}}
    trainer.evaluate_segmentation = lambda *_, **__: scores
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            change_loss(patch, kill_at(stop, signal.SIGTERM))
        code = run(config, exp, resume=resume, devices=Devices(CPU.device, rank, rank, 2))
    shutdown()
    os._exit(code)


def test_two_ranks_stop_and_resume_bit_for_bit(configure, tmp_path):
    """Each rank's generator comes back; a signal to any one of them stops both."""
    config = configure(
        "train.max_steps=6", "train.batch_size=4", "train.ema_decay=0.5", "train.epochs=9"
    )
    context = get_context("spawn")  # a fork after a backward pass may not do one

    def run_both(exp: str, *, resume: bool = False, stop: int = 0) -> list[int]:
        arguments = (str(tmp_path), config, exp, resume, stop)
        ranks = [context.Process(target=run_of_rank, args=(r, *arguments)) for r in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=60)
        return [rank.exitcode for rank in ranks]

    assert run_both("whole") == [0, 0]
    assert run_both("parts", stop=3) == [signal.SIGTERM] * 2
    whole, parts = (RunFolder(config, exp) for exp in ("whole", "parts"))
    stopped = load_checkpoint(parts.last_checkpoint)
    assert stopped.step == 3
    assert stopped.training_state["batch"] == 1, "in the middle of an epoch"
    generators = [state["cpu"] for state in stopped.training_state["rng"]]
    assert not torch.equal(*generators), "both ranks draw the same numbers"
    assert run_both("parts", resume=True) == [0, 0]
    expected, found = (load_checkpoint(folder.last_checkpoint) for folder in (whole, parts))
    assert expected.step == 6
    assert_same(found._asdict(), expected._asdict())


TWO_RANKS = f"""
import sys
import torch
from torch import nn
from configs import load_config
from dataloader.build import build_eval_loader, build_train_loader
from engine.trainer import fit
from models import build_model
from utils.distributed import gather_objects, setup_devices, shutdown
from utils.run_folder import RunFolder
from utils.seed import seed_everything

{inspect.getsource(without_batch_statistics)}

devices = setup_devices("cpu", None)
config = load_config(sys.argv[1])
seed_everything(config.seed + devices.rank)
model = build_model(config)
without_batch_statistics(model)
model.register_buffer("statistic", torch.tensor(float(devices.rank)))
ranks = {{"rank": devices.rank, "world_size": devices.world_size}}
loaders = build_train_loader(config, **ranks), build_eval_loader(config, "val", **ranks)
fit(config, model, *loaders, folder=RunFolder(config, "two"), devices=devices)
sums = gather_objects([float(t.double().sum()) for t in model.state_dict().values()])
assert sums[0] == sums[1], "ranks differ"
shutdown()
"""


def test_two_ranks_agree_and_give_the_loss_of_one(configure, tmp_path):
    """Weights and running statistics are equal on both ranks; losses and scores are those of one
    process with the same whole batches.

    Both sides have GroupNorm for BatchNorm, no dropout and no balance loss, whose values depend on
    how a batch is divided; all the rest of the network and of the loop is compared.
    """
    config = configure(
        "train.max_steps=3",
        "train.batch_size=4",
        "train.val_every=1",
        "model.drop_path=0",
        "loss.balance_weight=0",
    )

    def build(config, *, from_checkpoint):
        model = build_model(config)
        without_batch_statistics(model)
        return model

    run(config, "one", build=build)
    script, config_file = tmp_path / "two_ranks.py", RunFolder(config, "one").config_file
    script.write_text(TWO_RANKS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launcher, f"--master_port={port}", str(script), str(config_file)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = metrics_of(config, "one"), metrics_of(config, "two")
    assert len(one) == len(two) == 3
    for name in ("loss", "loss_segmentation", "loss_fusion", "lr"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-5)
    best = [load_checkpoint(RunFolder(config, exp).best_checkpoint) for exp in ("one", "two")]
    assert best[1].metrics["images"] == best[0].metrics["images"] == 2
    assert best[1].metrics["miou"] == pytest.approx(best[0].metrics["miou"], abs=1e-3)
    saved = load_checkpoint(RunFolder(config, "two").last_checkpoint)
    assert len(saved.training_state["rng"]) == 2
