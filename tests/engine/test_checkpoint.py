"""Checkpoint files: round trips, atomic writing, and every bad file that a user may give."""

import errno
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from configs import load_config
from engine.checkpoint import (
    load_checkpoint,
    load_model,
    load_weights,
    remove_old_epochs,
    save_checkpoint,
    select_checkpoints,
)
from models import build_model
from utils.errors import InputError

CONFIG = load_config("demo", ["train.crop=[64,96]"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return build_model(CONFIG).eval()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    path = tmp_path / "epoch-last.pth"
    save_checkpoint(path, model=model, config=CONFIG, epoch=3, step=12)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(model, tmp_path, suffix):
    path = tmp_path / f"best{suffix}"
    metrics = {"miou": 0.5, "class_iou": {"car": None}}
    save_checkpoint(path, model=model, config=CONFIG, epoch=3, step=12, metrics=metrics)
    found = load_checkpoint(path)
    assert_same_tensors(found.model, model.state_dict())
    assert found.config == CONFIG.model_dump(mode="json")
    assert (found.epoch, found.step, found.metrics) == (3, 12, metrics)
    assert (found.training_state, found.text_prior) == (None, model.text_prior.source)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]


def test_training_state_comes_back(model, tmp_path):
    state = {"optimizer": {0: {"exp_avg": torch.ones(2)}}, "rng": [torch.get_rng_state()]}
    path = tmp_path / "epoch-last.pth"
    save_checkpoint(path, model=model, config=CONFIG, epoch=0, step=1, training_state=state)
    found = load_checkpoint(path).training_state
    assert torch.equal(found["optimizer"][0]["exp_avg"], torch.ones(2))
    assert torch.equal(found["rng"][0], state["rng"][0])


def test_safetensors_refuse_training_state(model, tmp_path):
    with pytest.raises(ValueError, match="training state"):
        save_checkpoint(
            *[tmp_path / "x.safetensors"],
            model=model, config=CONFIG, epoch=0, step=0, training_state={},
        )  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_load_model_gives_the_same_outputs(model, tmp_path, suffix):
    path = tmp_path / f"best{suffix}"
    save_checkpoint(path, model=model, config=CONFIG, epoch=1, step=1)
    config = load_config("demo", ["train.crop=[96,128]", "model.scan_backend=reference"])
    loaded, stored = load_model(path, device="cpu", config=config)
    assert not loaded.training
    assert stored.train.crop == (64, 96), "shapes come from the checkpoint's crop"
    assert stored.model.scan_backend == "reference", "the present backend is used"
    rgb, thermal = torch.rand(2, 1, 3, 64, 96).unbind(0)
    with torch.no_grad():
        expected = model(rgb, thermal)
        output = load_model(path, device="cpu")[0](rgb, thermal)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.fused, expected.fused)


def test_missing_unexpected_and_reshaped_tensors_are_all_named(model, saved):
    found = load_checkpoint(saved)
    tensors = dict(found.model)
    lost = [name for name in tensors if name.endswith("A_logs")]
    for name in lost:
        del tensors[name]
    tensors["foreign.weight"] = torch.zeros(1)
    reshaped = next(name for name in tensors if name.endswith("in_proj.weight"))
    tensors[reshaped] = torch.zeros(3, 5)
    with pytest.raises(InputError) as error:
        load_weights(model, found._replace(model=tensors), saved)
    assert all(name in str(error.value) for name in [*lost, "foreign.weight", reshaped, "(3, 5)"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.class_names=[a,b]", "data.palette=[[0,0,0],[1,1,1]]"], "Demo with 5 .* has 2"),
        (["data.class_names=[background,person,bus,cone,kerb]"], "class 2 is 'car'.* 'bus'"),
    ],
    ids=["count", "name"],
)
def test_another_datasets_classes_are_refused(saved, overrides, message):
    config = load_config("demo", ["data.name=Other", *overrides])
    with pytest.raises(InputError, match=message) as error:
        load_model(saved, device="cpu", config=config)
    assert "Other" in str(error.value)


def test_same_classes_under_another_name_are_accepted(saved):
    """MSRS has MFNet's classes: scoring one's network on the other is no mistake."""
    load_model(saved, device="cpu", config=load_config("demo", ["data.name=Other"]))


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def bad_file(kind: str, saved: Path, folder: Path) -> Path:
    path = folder / f"bad{'.safetensors' if kind == 'foreign safetensors' else '.pth'}"
    content = saved.read_bytes()
    if kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "without its end":
        path.write_bytes(content[:-100])
    elif kind == "empty":
        path.touch()
    elif kind in ("html", "foreign safetensors"):
        path.write_text("<html>not found</html>")
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "another project's":
        torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    elif kind == "without a config":
        torch.save({**torch.load(saved, weights_only=True), "config": None}, path)
    elif kind == "code":
        torch.save({"model": Evil(folder / "hacked")}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Evil(folder / "hacked"), protocol=2))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "half", "without its end", "empty", "html", "foreign safetensors", "a list",
        "another project's", "without a config", "code", "plain pickle", "missing",
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(kind, saved, tmp_path):
    path = bad_file(kind, saved, tmp_path)
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists(), "code inside the file has run"


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_full_disk_leaves_the_old_checkpoint(model, saved, monkeypatch, at):
    before = files_in(saved.parent)
    monkeypatch.setattr(os, at, full_disk)
    with pytest.raises(InputError, match="disk full .* previous checkpoint is intact"):
        save_checkpoint(saved, model=model, config=CONFIG, epoch=4, step=16)
    after = files_in(saved.parent)
    assert after[saved.name] == before[saved.name]
    assert after.keys() <= before.keys(), "the temporary file stayed"
    assert load_checkpoint(saved).step == 12


def test_disk_that_fills_up_under_the_old_checkpoint(model, saved):
    """A real limit on the size of files, half of what the checkpoint needs."""
    before = files_in(saved.parent)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (saved.stat().st_size // 2, most))
    try:
        with pytest.raises(InputError, match="cannot write .* previous checkpoint is intact"):
            save_checkpoint(saved, model=model, config=CONFIG, epoch=4, step=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert files_in(saved.parent) == before
    assert load_checkpoint(saved).step == 12


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_disk_that_fills_up_while_writing(model, tmp_path, suffix):
    """torch.save wraps the file's own error; the message must still be the disk's."""
    path = tmp_path / f"best{suffix}"
    (tmp_path / f".{path.name}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="disk full"):
        save_checkpoint(path, model=model, config=CONFIG, epoch=4, step=16)
    assert list(tmp_path.iterdir()) == []


def test_disk_error_behind_an_error_of_torch(model, tmp_path, monkeypatch):
    """What torch.save raises where the last write that fails is its own, not the file's."""

    def save(*_):
        try:
            full_disk()
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match="disk full"):
        save_checkpoint(tmp_path / "best.pth", model=model, config=CONFIG, epoch=0, step=0)


def test_unwritable_folder_is_an_input_error(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "x.pth", model=model, config=CONFIG, epoch=0, step=0)


def flip_a_weight(path: Path, model) -> None:
    """Change one bit of the file inside a tensor, where no reader sees a mistake."""
    content = bytearray(path.read_bytes())
    where = content.index(next(model.parameters()).detach().numpy().tobytes())
    content[where + 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_changed_bit_is_found_by_the_checksum(model, tmp_path, suffix):
    path = tmp_path / f"best{suffix}"
    save_checkpoint(path, model=model, config=CONFIG, epoch=3, step=12)
    flip_a_weight(path, model)
    with pytest.raises(InputError, match=rf"best{suffix} is not the file that .*\.sha256"):
        load_checkpoint(path)
    (tmp_path / f"best{suffix}.sha256").unlink()
    load_checkpoint(path)  # the reader alone does not notice


def test_the_one_before_a_broken_file_is_offered(model, tmp_path):
    paths = [tmp_path / f"epoch-{epoch}.pth" for epoch in (5, 10, 15)]
    for age, path in enumerate(paths):
        save_checkpoint(path, model=model, config=CONFIG, epoch=age, step=age)
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-100])
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    with pytest.raises(InputError, match=r"cut short.*; the one before it is .*/epoch-5\.pth$"):
        load_checkpoint(paths[2])
    (tmp_path / "epoch-15.pth.sha256").unlink()
    with pytest.raises(InputError, match=r"cannot be read.*one before it is .*/epoch-5\.pth$"):
        load_checkpoint(paths[2])
    (tmp_path / "epoch-10.pth.sha256").unlink()
    with pytest.raises(InputError, match=r"one before it is .*/epoch-5\.pth$"):
        load_checkpoint(paths[2])  # the newer one has no checksum, and is cut short
    paths[0].write_bytes(b"")
    os.utime(paths[0], (0, 0))
    with pytest.raises(InputError, match="take another checkpoint$"):
        load_checkpoint(paths[0])


def test_of_several_before_a_broken_file_the_newest_is_offered(model, tmp_path):
    paths = [tmp_path / f"epoch-{epoch}.pth" for epoch in (5, 10, 15)]
    for age, path in enumerate(paths):
        save_checkpoint(path, model=model, config=CONFIG, epoch=age, step=age)
        os.utime(path, (age, age))
    paths[2].write_bytes(b"")
    with pytest.raises(InputError, match=r"one before it is .*/epoch-10\.pth$"):
        load_checkpoint(paths[2])


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("epoch-5", "epoch-10", "epoch-100", "best", "epoch-last"):
        (tmp_path / f"{name}.pth").touch()
    (tmp_path / ".epoch-15.pth.partial").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("10", ["epoch-10"]),
        ("5-10", ["epoch-5", "epoch-10"]),
        ("6-", ["epoch-10", "epoch-100"]),
        ("0-", ["epoch-5", "epoch-10", "epoch-100"]),
        ("best", ["best"]),
        ("last", ["epoch-last"]),
    ],
)
def test_selection(folder, text, names):
    assert [path.stem for path in select_checkpoints(folder, text)] == names


def test_selection_by_path(folder):
    path = folder / "epoch-5.pth"
    assert select_checkpoints("elsewhere", str(path)) == [path]


@pytest.mark.parametrize("text", ["7", "11-99", "101-", "10-5"])
def test_selection_of_nothing_lists_what_there_is(folder, text):
    with pytest.raises(InputError, match="epoch-5, epoch-10, epoch-100, best, epoch-last"):
        select_checkpoints(folder, text)


@pytest.mark.parametrize("text", ["", "-5", "a", "5-x", "Best "])
def test_selection_of_another_form_names_the_forms(folder, text):
    with pytest.raises(InputError, match="takes N, a-b, a-, best, last"):
        select_checkpoints(folder, text)


def test_selection_of_a_missing_file(folder):
    with pytest.raises(InputError, match="does not exist"):
        select_checkpoints(folder, "nowhere/best.pth")


def test_selection_in_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match="there is: nothing"):
        select_checkpoints(tmp_path / "nowhere", "best")


def test_old_epochs_are_removed_by_number(folder):
    (folder / "epoch-5.pth.sha256").touch()
    remove_old_epochs(folder, keep_last=2)
    assert {path.stem for path in folder.glob("*.pth")} == {
        "epoch-10", "epoch-100", "best", "epoch-last",
    }  # fmt: skip
    assert not (folder / "epoch-5.pth.sha256").exists()
