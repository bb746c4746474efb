"""Baselines of fusion on pairs whose result is known."""

import numpy as np
import pytest

from utils.fusion_baselines import BASELINES, fuse_laplacian, fuse_maximum, fuse_mean


def grey(*values: int) -> tuple[np.ndarray, np.ndarray]:
    """An rgb image (1, N, 3) of grey values, and room for a thermal one."""
    row = np.array([values], np.uint8)
    return np.repeat(row[..., None], 3, 2), np.array([[10, 200, 255]], np.uint8)


def texture(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, *channels), np.uint8)


def test_mean_and_maximum_are_pixel_by_pixel():
    pair = grey(30, 100, 255)
    assert fuse_mean(*pair).tolist() == [[20, 150, 255]]
    assert fuse_maximum(*pair).tolist() == [[30, 200, 255]]


def test_color_counts_by_its_luma():
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 255  # luma 76
    assert fuse_mean(red, np.zeros((1, 1), np.uint8)).item() == 38


@pytest.mark.parametrize("hw", [(45, 61), (64, 96), (7, 9)], ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_two_equal_images_stay_as_they_are(name, hw):
    image = texture(*hw)
    fused = BASELINES[name](np.repeat(image[..., None], 3, 2), image)
    assert fused.dtype == np.uint8
    np.testing.assert_array_equal(fused, image)


def test_the_pyramid_keeps_the_detail_of_both_where_the_mean_halves_it():
    """Stripes of 100 ± 20 on the left of rgb and on the right of thermal."""
    rgb, thermal = np.full((64, 128, 3), 100, np.uint8), np.full((64, 128), 100, np.uint8)
    rgb[:, :48:2], rgb[:, 1:48:2] = 80, 120
    thermal[:, 80::2], thermal[:, 81::2] = 80, 120
    spread = {
        fuse.__name__: [fuse(rgb, thermal)[:, part].std() for part in (slice(40), slice(88, None))]
        for fuse in (fuse_mean, fuse_laplacian)
    }
    assert spread["fuse_mean"] == [pytest.approx(10)] * 2
    assert min(spread["fuse_laplacian"]) > 18
