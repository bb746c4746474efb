"""Loaders: the same batches for any number of workers and ranks, resume, errors, eval batches."""

import multiprocessing
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from configs import load_config
from dataloader.build import EpochSampler, build_eval_loader, build_train_loader
from dataloader.packing import PackedBatch, Sample
from utils.errors import InputError
from utils.image import write_png

STRONG = (
    "augment.probability=0.7",
    "augment.rotation=10",
    "augment.hue=0.1",
    "augment.blur=1.0",
    "augment.cutmix=0.5",
)


@pytest.fixture
def small_set(tmp_path):
    """Seven train, two val and five test pairs of 40x48, the test pairs of two sizes."""
    folder, rng = tmp_path / "Set", np.random.default_rng(0)
    names = {
        "train": [f"train{index}" for index in range(7)],
        "val": ["val0", "val1"],
        "test": [f"test{index}" for index in range(5)],
    }
    for split, stems in names.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.txt").write_text("\n".join(stems))
        for index, stem in enumerate(stems):
            size = (40, 48) if split != "test" or index in (0, 1, 4) else (36, 44)
            write_png(folder / "RGB" / f"{stem}.png", rng.integers(0, 256, (*size, 3), np.uint8))
            write_png(folder / "Modal" / f"{stem}.png", rng.integers(0, 256, size, np.uint8))
            write_png(folder / "Label" / f"{stem}.png", rng.integers(0, 9, size, np.uint8))
    return folder


def config_of(folder, *overrides):
    return load_config(
        "mfnet",
        [
            f"data.dataset_path={folder}",
            "data.num_workers=0",
            "train.crop=[32,40]",
            "train.batch_size=2",
            "eval.batch_size=2",
            *overrides,
        ],
    )


def numbers(batches):
    """The samples of batches; all come first, so that each is kept while others are loaded."""
    return [batch.to(torch.device("cpu")) for batch in list(batches)]


def epoch_of(loader, epoch, start_batch=0):
    loader.batch_sampler.set_epoch(epoch)
    loader.batch_sampler.start_batch = start_batch
    return numbers(loader)


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        assert batch.name == other.name
        for part, other_part in zip(batch[:4], other[:4], strict=True):
            assert torch.equal(part, other_part)


def error_of(loader):
    """Not by pytest.raises, whose record in a cycle with this frame would stop workers slowly."""
    try:
        list(loader)
    except InputError as error:
        return type(error), str(error)


def batches_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_sampler_order_follows_seed_and_epoch():
    orders = {
        (seed, epoch): batches_of(EpochSampler(50, 4, seed=seed), epoch)
        for seed in (1, 2)
        for epoch in (0, 1, 5)
    }
    assert orders[1, 5] == batches_of(EpochSampler(50, 4, seed=1), 5)
    shuffles = {tuple(key.index for batch in order for key in batch) for order in orders.values()}
    assert len(shuffles) == 6
    for (_, epoch), order in orders.items():
        keys = [key for batch in order for key in batch]
        assert len(order) == len(EpochSampler(50, 4, seed=1)) == 12
        assert {key.epoch for key in keys} == {epoch}
        assert len({key.index for key in keys}) == 48
        assert {key.index for key in keys} <= set(range(50))


def test_left_over_images_change_with_the_epoch():
    sampler, seen = EpochSampler(7, 4, seed=0), set()
    for epoch in range(12):
        seen |= {key.index for batch in batches_of(sampler, epoch) for key in batch}
    assert seen == set(range(7))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_steps_of_one_rank(world_size):
    whole = batches_of(EpochSampler(30, 4, seed=3), 2)
    ranks = [
        batches_of(EpochSampler(30, 4, seed=3, rank=rank, world_size=world_size), 2)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert [len(share) for share in shares] == [4 // world_size] * world_size
        assert sorted(key for share in shares for key in share) == sorted(batch)


def test_sampler_start_batch():
    sampler = EpochSampler(30, 4, seed=3)
    whole = batches_of(sampler, 1)
    sampler.start_batch = 5
    assert list(sampler) == whole[5:]
    assert len(sampler) == 7
    assert batches_of(sampler, 1) == whole


def test_sampler_refuses_numbers_that_do_not_fit():
    with pytest.raises(InputError, match="batch_size 4 .* of the 3 processes; set it to 6"):
        EpochSampler(30, 4, seed=0, world_size=3)
    with pytest.raises(InputError, match="3 images, fewer than train.batch_size 4"):
        EpochSampler(3, 4, seed=0)
    assert len(EpochSampler(4, 4, seed=0, world_size=4)) == 1


def test_train_batch(small_set):
    loader = build_train_loader(config_of(small_set, "train.scales=[0.5]"))
    assert len(loader) == 3
    batches = epoch_of(loader, 0)
    assert len(batches) == 3
    names = [name for batch in batches for name in batch.name]
    assert len(set(names)) == 6
    assert all(name.startswith("train") for name in names)
    for batch in batches:
        assert isinstance(batch, Sample)
        assert isinstance(batch.name, list)
        assert batch.rgb.shape == batch.thermal.shape == (2, 3, 32, 40)
        assert batch.label.shape == batch.valid.shape == (2, 32, 40)
        assert batch.rgb.dtype == torch.float32
        assert batch.label.dtype == torch.int64
        assert batch.valid.sum() == 2 * 20 * 24  # 40x48 at half scale, padded
        assert (batch.label[~batch.valid] == 255).all()


def test_config_reaches_the_transform(small_set):
    batches = epoch_of(build_train_loader(config_of(small_set, "train.crop=[64,96]")), 0)
    shown = {int(valid.sum()) for batch in batches for valid in batch.valid}
    assert len(shown) > 1  # several scales
    straight = config_of(small_set, "train.crop=[40,48]", "train.scales=[1.0]")
    mirrored = straight.model_copy(
        update={"train": straight.train.model_copy(update={"mirror": True})}
    )
    plain = straight.model_copy(
        update={"train": straight.train.model_copy(update={"mirror": False})}
    )
    changed = 0
    for batch, other in zip(
        epoch_of(build_train_loader(mirrored), 0),
        epoch_of(build_train_loader(plain), 0),
        strict=True,
    ):
        for image, expected in zip(batch.rgb, other.rgb, strict=True):
            is_mirrored = not torch.equal(image, expected)
            changed += is_mirrored
            assert torch.equal(image.flip(-1) if is_mirrored else image, expected)
    assert 0 < changed < 6


def test_epochs_and_seeds_show_other_crops(small_set):
    loader = build_train_loader(config_of(small_set))
    first, second = (
        {
            name: rgb
            for batch in epoch_of(loader, epoch)
            for name, rgb in zip(batch.name, batch.rgb, strict=True)
        }
        for epoch in (0, 1)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first.keys() & second.keys())
    other = build_train_loader(config_of(small_set, "seed=1"))
    assert list(other.batch_sampler) != list(build_train_loader(config_of(small_set)).batch_sampler)
    samples = [(loader.dataset[index], other.dataset[index]) for index in range(7)]
    assert any(not torch.equal(sample.rgb, changed.rgb) for sample, changed in samples)


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(small_set, num_workers, cache):
    """Workers persist, and still get to know each epoch."""
    alone = build_train_loader(config_of(small_set, *STRONG))
    helped = build_train_loader(
        config_of(small_set, f"data.num_workers={num_workers}", f"data.cache={cache}", *STRONG)
    )
    for epoch in (0, 3, 1):
        assert_same(epoch_of(helped, epoch), epoch_of(alone, epoch))
    assert helped.persistent_workers


def test_spawned_workers_change_nothing(small_set):
    settings = ("train.batch_size=1", *STRONG)
    expected = epoch_of(build_train_loader(config_of(small_set, *settings)), 2)
    loader = build_train_loader(config_of(small_set, "data.num_workers=1", *settings))
    loader.multiprocessing_context = "spawn"
    assert_same(epoch_of(loader, 2), expected)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_are_read_before_a_worker_fills_their_memory_anew(small_set, num_workers):
    """Workers have all the time to run ahead, as far as they may, and batches are kept."""
    settings = ("train.batch_size=1", f"data.num_workers={num_workers}", "data.cache=ram")
    loader = build_train_loader(config_of(small_set, *settings))
    alone = build_train_loader(config_of(small_set, "train.batch_size=1"))
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        kept = []
        for batch in loader:
            kept.append(batch)
            time.sleep(0.02)
        assert_same(numbers(kept), epoch_of(alone, epoch))


def test_two_iterators_at_once_keep_apart(small_set):
    """Those of an evaluation have workers of their own, with blocks of their own."""
    loader = build_eval_loader(config_of(small_set, "data.num_workers=2"), "test", batch_size=1)
    pairs = list(zip(loader, loader, strict=True))
    expected = numbers(build_eval_loader(config_of(small_set), "test", batch_size=1))
    for batches in zip(*pairs, strict=True):
        assert_same(numbers(batches), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_bytes_with_all_that_their_numbers_need(small_set, num_workers):
    settings = (f"data.num_workers={num_workers}", "data.modalities=thermal")
    (batch,) = build_eval_loader(config_of(small_set, *settings), "val")
    assert isinstance(batch, PackedBatch)
    assert (batch.planes.shape, batch.planes.dtype) == ((2, 6, 40, 48), torch.uint8)
    assert not batch.planes.is_shared()
    assert (batch.name, batch.modalities) == (["val0", "val1"], "both"), "it is scored against both"
    trained = next(iter(build_train_loader(config_of(small_set, *settings))))
    assert (trained.to(torch.device("cpu")).rgb == 0.5).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_is_the_same_for_every_number_of_ranks(small_set, num_workers):
    """CutMix, too: its partner comes from the whole split, not from the batch."""
    settings = ("train.batch_size=6", f"data.num_workers={num_workers}", *STRONG)
    (whole,) = epoch_of(build_train_loader(config_of(small_set, *settings)), 0)
    samples = {
        name: rgb
        for rank in range(2)
        for batch in epoch_of(
            build_train_loader(config_of(small_set, *settings), rank=rank, world_size=2), 0
        )
        for name, rgb in zip(batch.name, batch.rgb, strict=True)
    }
    assert samples.keys() == set(whole.name)
    for name, rgb in zip(whole.name, whole.rgb, strict=True):
        assert torch.equal(samples[name], rgb)


def test_strong_augmentation_is_off_unless_asked_for(small_set):
    def images(*settings):
        return epoch_of(build_train_loader(config_of(small_set, *settings)), 0)[0]

    plain = images()
    assert_same([images("augment.brightness=1.0", "augment.thermal_noise=1.0")], [plain])
    strong = images("augment.probability=1.0", "augment.rotation=0")
    assert not torch.equal(strong.rgb, plain.rgb)
    assert not torch.equal(strong.thermal, plain.thermal)
    assert torch.equal(strong.label, plain.label)  # the same crops
    mixed = images("augment.cutmix=1.0")
    boxes = (mixed.label != plain.label).flatten(1).sum(1)
    assert (boxes > 0).any()
    for index in range(2):
        outside = (mixed.rgb[index] == plain.rgb[index]).all(0)
        assert (mixed.label[index] == plain.label[index])[outside].float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batches_hold_the_same(small_set):
    """And a copy to the GPU that is still under way is not overtaken by the next batches."""
    loader = build_train_loader(config_of(small_set, "train.batch_size=1", "data.num_workers=2"))
    on_gpu, on_cpu = [], []
    for batch in loader:
        assert batch.planes.is_pinned()
        torch.cuda._sleep(10**7)
        on_gpu.append(batch.to(torch.device("cuda")))
        on_cpu.append(batch.to(torch.device("cpu")))
        del batch
    for sample, expected in zip(on_gpu, on_cpu, strict=True):
        for part, other in zip(sample[:4], expected[:4], strict=True):
            assert torch.equal(part.cpu(), other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(small_set, num_workers):
    config = config_of(small_set, f"data.num_workers={num_workers}")
    whole = epoch_of(build_train_loader(config), 4)
    assert_same(epoch_of(build_train_loader(config), 4, start_batch=1), whole[1:])


def test_next_epoch_after_one_that_was_left(small_set):
    """A loop that counts its steps never runs into the end of the iterator."""
    config = config_of(small_set, "data.num_workers=2")
    loader = build_train_loader(config)
    loader.batch_sampler.set_epoch(0)
    batches = iter(loader)
    next(batches)
    assert_same(epoch_of(loader, 1), epoch_of(build_train_loader(config_of(small_set)), 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generator(small_set, num_workers):
    loader = build_train_loader(config_of(small_set, f"data.num_workers={num_workers}"))
    before = torch.get_rng_state()
    epoch_of(loader, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_demo_scenes(demo_config):
    batch = epoch_of(build_train_loader(demo_config), 0)[0]
    assert batch.rgb.shape == (2, 3, 64, 96)
    assert [len(batch.name) for batch in build_eval_loader(demo_config, "test")] == [2]


def test_training_needs_a_val_list(small_set):
    (small_set / "val.txt").unlink()
    with pytest.raises(InputError, match=r"val\.txt does not exist; .*--val-fraction"):
        build_train_loader(config_of(small_set))


def test_train_on_val_trains_on_both(small_set):
    loader = build_train_loader(
        config_of(small_set, "data.train_on_val=true", "train.batch_size=3")
    )
    names = {name for batch in epoch_of(loader, 0) for name in batch.name}
    assert names == {*(f"train{index}" for index in range(7)), "val0", "val1"}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_input_error_of_a_worker_arrives_unchanged(small_set, split, num_workers):
    config = config_of(small_set, f"data.num_workers={num_workers}", "train.batch_size=7")
    is_train = split == "train"
    loader = build_train_loader(config) if is_train else build_eval_loader(config, "val")
    path = small_set / "Label" / f"{split}1.png"
    write_png(path, np.full((40, 48), 77, np.uint8))
    message = (
        f"label {path} holds 77 (1920 pixels); data.class_names has classes 0 to 8, and 255 is "
        "unknown"
    )
    assert error_of(loader) == (InputError, message)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_eval_shows_each_image_once_over_all_ranks(small_set, world_size, num_workers):
    config = config_of(small_set, f"data.num_workers={num_workers}")
    names = []
    for rank in range(world_size):
        for batch in build_eval_loader(config, "test", rank=rank, world_size=world_size):
            assert isinstance(batch.name, list)
            assert len(batch.name) == len(batch.planes) <= 2
            names += batch.name
    assert sorted(names) == [f"test{index}" for index in range(5)]


def test_eval_batches_hold_one_size(small_set):
    loader = build_eval_loader(config_of(small_set), "test", batch_size=5)
    found = [(batch.name, tuple(batch.label.shape)) for batch in numbers(loader)]
    assert found == [
        (["test0", "test1"], (2, 40, 48)),
        (["test2", "test3"], (2, 36, 44)),
        (["test4"], (1, 40, 48)),
    ]


def test_eval_leaves_the_images_as_they_are(small_set):
    loader = build_eval_loader(config_of(small_set), "val")
    (batch,) = numbers(loader)
    for index, sample in enumerate(loader.dataset):
        assert batch.name[index] == sample.name == f"val{index}"
        for part, expected in zip(batch[:4], sample[:4], strict=True):
            assert torch.equal(part[index], expected)
    assert batch.valid.all()


def test_eval_batch_size_is_the_configs_unless_given(small_set):
    config = config_of(small_set, "eval.batch_size=1")
    assert [len(batch.name) for batch in build_eval_loader(config, "val")] == [1, 1]
    assert [len(batch.name) for batch in build_eval_loader(config, "val", batch_size=2)] == [2]


def test_rank_without_images(small_set):
    assert list(build_eval_loader(config_of(small_set), "val", rank=2, world_size=3)) == []


def test_eval_without_labels(small_set):
    (small_set / "Label").rename(small_set / "Hidden")
    for batch in numbers(build_eval_loader(config_of(small_set), "test")):
        assert (batch.label == 255).all()
    with pytest.raises(InputError, match="Label does not exist"):
        build_eval_loader(config_of(small_set), "test", need_labels=True)
    with pytest.raises(InputError, match="Label does not exist"):
        build_train_loader(config_of(small_set))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stop of the group stops workers")
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_outlive_a_stop_of_the_process_group(small_set, start_method):
    """Ctrl-C, torchrun and schedulers signal workers too, while the main process still saves."""
    loader = build_train_loader(config_of(small_set, "data.num_workers=1", "train.batch_size=1"))
    loader.multiprocessing_context = start_method
    others = multiprocessing.active_children()
    batches = iter(loader)
    names = next(batches).name
    (worker,) = [p for p in multiprocessing.active_children() if p not in others]
    for name in ("TERM", "INT", "TERM"):  # from another process: not the main one's own command
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    names += [name for batch in batches for name in batch.name]
    assert len(names) == 7
    names += [name for batch in epoch_of(loader, 1) for name in batch.name]
    assert len(names) == 14
    assert worker.is_alive()
    worker.terminate()  # as multiprocessing ends what is left at the exit of the main process
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="signals are blocked on Linux only")
def test_the_main_process_still_gets_its_signals(small_set):
    list(build_train_loader(config_of(small_set, "data.num_workers=1")))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint({signal.SIGINT, signal.SIGTERM})


def test_real_training_crops(shared_data):
    config = load_config(
        "msrs",
        [
            f"data.dataset_path={shared_data / 'MSRS'}",
            "data.num_workers=0",
            "train.crop=[160,224]",
            "train.scales=[0.5,0.75]",
        ],
    )
    loader = build_train_loader(config)
    assert len(loader) == 181 // 4
    batch = next(iter(loader)).to(torch.device("cpu"))
    assert batch.rgb.shape == (4, 3, 160, 224)
    assert batch.valid.all()
    assert set(batch.label.unique().tolist()) <= {*range(9), 255}


def test_real_eval_of_mixed_sizes_without_labels(shared_data):
    config = config_of(shared_data / "RoadScene", "eval.batch_size=4")
    batches = numbers(build_eval_loader(config, "test"))
    names = [name for batch in batches for name in batch.name]
    assert len(set(names)) == len(names) == 30
    assert 26 <= len(batches) <= 30
    assert all((batch.label == 255).all() for batch in batches)
