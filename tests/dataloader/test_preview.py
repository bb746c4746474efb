"""The picture of the augmentation shows pairs as they are stored, and as training takes them."""

import cv2
import numpy as np

from configs import load_config
from dataloader.build import build_train_loader
from dataloader.preview import augmentation_sheet


def test_before_and_after(demo_config):
    pairs = build_train_loader(demo_config).dataset
    sheet = augmentation_sheet(pairs)
    rows = np.split(sheet[28:], 4)
    assert sheet.shape == (28 + 4 * len(rows[0]), 6 * 324 - 4, 3)
    for index, strip in enumerate(rows):
        stored, trained = pairs.read(index), pairs.transformed(index).pair
        for column, image in ((0, stored.rgb), (3, trained.rgb)):
            shown = strip[:-4, 324 * column :][:, :320]
            expected = cv2.resize(image, (320, shown.shape[0]), interpolation=cv2.INTER_AREA)
            assert np.abs(shown.astype(int) - expected).mean() < 1


def test_stored_pairs_keep_their_proportions(demo_config):
    """64x96 beside crops of 96x96: two thirds of the cell, then white."""
    settings = [f"data.dataset_path={demo_config.data.path}", "train.crop=[96,96]"]
    sheet = augmentation_sheet(build_train_loader(load_config("demo", settings)).dataset)
    cell = sheet[28:][:320, :320]
    assert (cell[-100:] == 255).all()
    assert (cell[:200] < 255).any(-1).mean() > 0.7  # the scene has white parts of its own
