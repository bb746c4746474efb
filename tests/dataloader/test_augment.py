"""Stronger augmentation: geometry joint, colours of rgb alone, drift of thermal alone, CutMix."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from configs.schema import AugmentConfig
from dataloader.augment import StrongAugmentation, global_draws_from, paste_box
from dataloader.transforms import Pair

HEIGHT, WIDTH = 48, 64
ALL = {
    "rotation": 20, "shear": 8, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2,
    "blur": 1.5, "thermal_gain": 0.3, "thermal_offset": 0.2, "thermal_noise": 0.1,
}  # fmt: skip
OF_RGB = ("brightness", "contrast", "saturation", "hue", "blur")
OF_THERMAL = ("thermal_gain", "thermal_offset", "thermal_noise")


def scene(seed=0):
    """Noise with some padding on the right, and some unknown label."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    thermal = rng.integers(60, 180, (HEIGHT, WIDTH)).astype(np.uint8)
    label = rng.integers(0, 9, (HEIGHT, WIDTH)).astype(np.uint8)
    label[:4] = 255
    valid = np.ones_like(label)
    rgb[:, -8:], thermal[:, -8:], label[:, -8:], valid[:, -8:] = 0, 0, 255, 0
    return Pair(rgb, thermal, label, valid)


def run(seed=0, pair=None, probability=1.0, **settings):
    transform = StrongAugmentation(AugmentConfig(probability=probability, **settings))
    return transform(scene() if pair is None else pair, torch.Generator().manual_seed(seed))


def same(part, other):
    return np.array_equal(part, other)


@pytest.mark.parametrize("field", OF_RGB)
def test_colours_and_blur_change_rgb_alone(field):
    results = [run(seed, **{field: ALL[field]}) for seed in range(3)]
    for result in results:
        assert not same(result.rgb, scene().rgb)
        assert all(same(*parts) for parts in zip(result[1:], scene()[1:], strict=True))
    assert not same(results[0].rgb, results[1].rgb)


@pytest.mark.parametrize("field", OF_THERMAL)
def test_drift_changes_thermal_alone(field):
    results = [run(seed, **{field: ALL[field]}) for seed in range(3)]
    for result in results:
        assert not same(result.thermal, scene().thermal)
        assert same(result.rgb, scene().rgb)
        assert all(same(*parts) for parts in zip(result[2:], scene()[2:], strict=True))
    assert not same(results[0].thermal, results[1].thermal)


@pytest.mark.parametrize("seed", range(4))
def test_thermal_changes_are_of_the_stated_size(seed):
    thermal = scene().thermal.astype(float)
    inside = scene().valid == 1

    def change(**settings):
        return (run(seed, **settings).thermal.astype(float) - thermal)[inside]

    offset = change(thermal_offset=0.1)
    assert np.ptp(offset) <= 1  # the same for all pixels, but for rounding
    assert abs(offset.mean()) <= 25.5
    gain = change(thermal_gain=0.2) / thermal[inside]
    assert np.abs(gain).max() <= 0.2 + 0.01
    assert gain.std() < 0.01
    noise = change(thermal_noise=0.05)
    assert abs(noise.mean()) < 2
    assert 0 < noise.std() < 0.05 * 255 * 1.1


@pytest.mark.parametrize("seed", range(6))
def test_geometry_moves_all_parts_together(seed):
    row, column = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8) + np.uint8(60)
    pair = Pair(np.stack((column, row, row), -1), column, column, np.ones_like(row))
    result = run(seed, pair, rotation=20, shear=8)
    assert not same(result.thermal, column)
    inside = result.valid == 1
    assert 0.5 < inside.mean() < 1
    assert set(np.unique(result.valid)) == {0, 1}
    assert (result.label[~inside] == 255).all()
    assert (result.rgb[~inside] == 0).all()
    assert (result.thermal[~inside] == 0).all()
    deep = (
        cv2.erode(result.valid, np.ones((5, 5), np.uint8), borderValue=0) == 1
    )  # the images fade at the border, indices do not
    difference = result.thermal.astype(int)[deep] - result.label[deep]
    assert np.abs(difference).max() <= 1
    assert np.abs(result.thermal.astype(int) - result.rgb[..., 0])[deep].max() <= 1


@pytest.mark.parametrize(("rotation", "shear"), [(20, 0), (0, 8), (20, 8)])
def test_a_turn_is_that_of_torchvision(rotation, shear):
    """OpenCV before 5 takes places in 32nds of a pixel, hence the three levels."""
    pair = scene()._replace(rgb=cv2.GaussianBlur(scene().rgb, (0, 0), 2))
    settings = AugmentConfig(probability=1, rotation=rotation, shear=shear)
    result = StrongAugmentation(settings)(pair, torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    torch.rand(3, generator=generator)  # which groups act
    turn = v2.RandomAffine(
        rotation, shear=shear, interpolation=v2.InterpolationMode.BILINEAR, fill=None
    )
    with global_draws_from(generator):
        expected = turn(torch.from_numpy(pair.rgb).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    difference = np.abs(result.rgb.astype(int) - expected)[result.valid == 1]
    assert difference.max() <= 3
    assert difference.mean() < 0.2


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_never_blended_and_padding_stays_padding(seed):
    result = run(seed, **ALL)
    assert set(np.unique(result.label)) <= {*range(9), 255}
    outside = result.valid == 0
    assert outside.sum() > 8 * HEIGHT * 0.5
    for image in (result.rgb, result.thermal):
        assert (image[outside] == 0).all()
        assert image.dtype == np.uint8
    assert result.label.dtype == result.valid.dtype == np.uint8
    assert result.rgb.flags.c_contiguous


def test_probability_is_that_of_each_group():
    changed = np.zeros((200, 3), bool)
    pair = scene()
    for seed in range(200):
        result = run(seed, pair, probability=0.3, rotation=9, brightness=0.5, thermal_gain=0.3)
        moved = not same(result.label, pair.label)
        changed[seed] = (moved, not same(result.rgb, pair.rgb), not same(result.thermal, pair[1]))
    assert 0.2 < changed[:, 0].mean() < 0.4
    still = ~changed[:, 0]
    for group in (1, 2):
        assert 0.2 < changed[still, group].mean() < 0.4
    assert 0 < (changed[still, 1] & changed[still, 2]).mean() < 0.2  # one by one, not all at once


def test_draws_come_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = run(5, **ALL), run(5, **ALL), run(6, **ALL)
    torch.manual_seed(2)
    later = run(5, **ALL)
    assert all(same(*parts) for parts in zip(first, again, strict=True))
    assert all(same(*parts) for parts in zip(first, later, strict=True))
    assert not same(first.rgb, other.rgb)
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_source_is_not_changed():
    pair = scene()
    for seed in range(3):
        run(seed, pair, **ALL)
        paste_box(pair, scene(1), torch.Generator().manual_seed(seed))
    assert all(same(*parts) for parts in zip(pair, scene(), strict=True))


def test_global_generator_goes_on_as_the_given_one():
    generator, expected = (torch.Generator().manual_seed(3) for _ in range(2))
    before = torch.get_rng_state()
    with global_draws_from(generator):
        drawn = torch.rand(5)
    assert torch.equal(drawn, torch.rand(5, generator=expected))
    assert torch.equal(torch.rand(2, generator=generator), torch.rand(2, generator=expected))
    with pytest.raises(KeyError), global_draws_from(generator):
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())


def test_box_of_another_pair():
    areas = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        pair, other = scene(0), scene(1)
        marked = [x._replace(valid=np.full_like(x.valid, x is other)) for x in (pair, other)]
        mixed = paste_box(*marked, generator)
        box = mixed.valid == 1
        areas.append(box.mean())
        for part, inner, outer in zip(mixed[:3], other, pair, strict=False):
            np.testing.assert_array_equal(part[box], inner[box])
            np.testing.assert_array_equal(part[~box], outer[~box])
        rows, columns = box.any(1), box.any(0)
        assert box.sum() == rows.sum() * columns.sum()  # a rectangle
    assert min(areas) < 0.05
    assert max(areas) > 0.5
    assert 0.2 < np.mean(areas) < 0.5  # 1/2 less what the borders cut off
