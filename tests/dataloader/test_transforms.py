"""Joint transforms: all parts of a pair move together, and draws come from the generator."""

import numpy as np
import pytest
import torch

from dataloader.transforms import Pair, RandomScaleCropMirror

HEIGHT, WIDTH = 60, 80


def coordinate_pair(height=HEIGHT, width=WIDTH):
    """Values that say where a pixel came from: 1 + 2 * column, and 1 + 2 * row in rgb's green."""
    row, column = np.mgrid[1 : 2 * height : 2, 1 : 2 * width : 2].astype(np.uint8)
    rgb = np.stack((column, row, np.full_like(row, 7)), -1)
    return Pair(rgb, column.copy(), column.copy(), np.ones_like(row))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def run(seed, *, crop=(32, 48), scales=(1.0,), use_mirror=False, pair=None):
    transform = RandomScaleCropMirror(crop, scales, use_mirror=use_mirror)
    return transform(coordinate_pair() if pair is None else pair, generator(seed))


@pytest.mark.parametrize("scale", [0.37, 0.5, 0.75, 1.0, 1.25, 1.75])
@pytest.mark.parametrize("crop", [(32, 48), (64, 32), (96, 128)], ids=str)
def test_parts_move_together(scale, crop):
    for seed in range(6):
        result = run(seed, crop=crop, scales=(scale,), use_mirror=True)
        assert [part.shape[:2] for part in result] == [crop] * 4
        assert all(part.dtype == np.uint8 for part in result)
        inside = result.valid == 1
        column = result.rgb[..., 0].astype(int)
        assert (np.abs(column - result.thermal)[inside] <= 1).all()
        assert (np.abs(column - result.label)[inside] <= 2).all()  # one column: nearest, bilinear


@pytest.mark.parametrize("part", ["label", "valid"])
def test_indices_and_masks_are_never_blended(part):
    values = np.where(np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5, 0, 8)
    pair = coordinate_pair()._replace(**{part: values.astype(np.uint8)})
    result = getattr(run(0, scales=(1.37,), pair=pair), part)
    assert set(np.unique(result)) == {0, 8}


def test_label_has_no_shift_against_the_images():
    """Plain nearest sampling lies a fraction of a pixel up and left of bilinear sampling."""
    differences = [
        (result.rgb[..., 0].astype(int) - result.label)[:, 4:-4].mean()
        for result in (run(seed, scales=(1.75,)) for seed in range(8))
    ]
    assert abs(np.mean(differences)) < 0.25  # plain nearest: 0.37


def test_scale_one_is_an_exact_window():
    pair = coordinate_pair()
    result = run(3, pair=pair)
    left, top = ((result.rgb[0, 0, :2].astype(int) - 1) // 2).tolist()
    for part, source in zip(result, pair, strict=True):
        np.testing.assert_array_equal(part, source[top : top + 32, left : left + 48])


def test_mirror_is_the_mirrored_window():
    mirrored = 0
    for seed in range(40):
        straight, result = run(seed), run(seed, use_mirror=True)
        is_mirrored = result.label[0, 0] > result.label[0, -1]
        mirrored += is_mirrored
        for part, expected in zip(result, straight, strict=True):
            np.testing.assert_array_equal(part, expected[:, ::-1] if is_mirrored else expected)
    assert 10 <= mirrored <= 30


@pytest.mark.parametrize(("scale", "shown"), [(0.5, (30, 40)), (1.0, (60, 80)), (1.25, (75, 96))])
def test_padding_is_right_and_bottom_and_marked(scale, shown):
    for use_mirror in (False, True):
        result = run(1, crop=(90, 96), scales=(scale,), use_mirror=use_mirror)
        inside = np.zeros((90, 96), bool)
        inside[: shown[0], : shown[1]] = True
        np.testing.assert_array_equal(result.valid == 1, inside)
        assert (result.label[~inside] == 255).all()
        assert (result.label[inside] != 255).all()
        for image in (result.rgb.max(-1), result.thermal):
            assert (image[~inside] == 0).all()
            assert (image[inside] > 0).all()


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 1.75])
def test_magnification(scale):
    """Neighbouring pixels of the result lie 1 / scale pixels of the source apart, both ways."""
    result = run(0, crop=(28, 36), scales=(scale,))
    across = (int(result.rgb[5, 33, 0]) - int(result.rgb[5, 3, 0])) / 30 / 2
    down = (int(result.rgb[25, 5, 1]) - int(result.rgb[5, 5, 1])) / 20 / 2
    assert across == pytest.approx(1 / scale, rel=0.05)
    assert down == pytest.approx(1 / scale, rel=0.05)


def test_windows_reach_every_place_and_scales_are_all_used():
    corners = [(run(seed).rgb[0, 0, :2].astype(int) - 1) // 2 for seed in range(400)]
    lefts, tops = zip(*(corner.tolist() for corner in corners), strict=True)
    assert set(lefts) == set(range(80 - 48 + 1))
    assert set(tops) == set(range(60 - 32 + 1))
    assert abs(np.corrcoef(lefts, tops)[0, 1]) < 0.2, "each side is drawn for itself"
    scales = (0.5, 1.0, 1.5)
    widths = [run(s, crop=(120, 160), scales=scales).valid[0].sum() for s in range(150)]
    counts = [widths.count(width) for width in (40, 80, 120)]
    assert sum(counts) == 150
    assert min(counts) > 30


def test_enlarged_windows_reach_both_borders():
    results = [run(seed, scales=(1.5,)) for seed in range(300)]
    assert min(result.label.min() for result in results) == 1
    assert max(result.label.max() for result in results) == 2 * WIDTH - 1


def test_draws_come_from_the_generator_alone():
    before = torch.get_rng_state()
    options = {"scales": (0.5, 1.0, 1.5), "use_mirror": True}
    first, again, other = run(5, **options), run(5, **options), run(6, **options)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.rgb, other.rgb)
    assert torch.equal(before, torch.get_rng_state())


def test_the_source_is_not_changed():
    """Cached pairs are used again in the next epoch."""
    pair, untouched = coordinate_pair(), coordinate_pair()
    for seed in range(5):
        run(seed, crop=(64, 96), scales=(0.5, 1.0, 1.5), use_mirror=True, pair=pair)
    assert all(np.array_equal(a, b) for a, b in zip(pair, untouched, strict=True))
