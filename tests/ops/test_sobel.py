"""Sobel gradients: scale, sign, borders, and that they are nobody's parameters."""

import cv2
import pytest
import torch

from models.ops.sobel import sobel


@pytest.mark.parametrize("hw", [(8, 8), (7, 5), (1, 4)], ids=str)
def test_equals_opencv(hw):
    x = torch.randn(2, 3, *hw)
    gradient_x, gradient_y = sobel(x)
    for batch in range(2):
        for channel in range(3):
            plane = x[batch, channel].numpy()
            for ours, (dx, dy) in ((gradient_x, (1, 0)), (gradient_y, (0, 1))):
                theirs = cv2.Sobel(plane, cv2.CV_32F, dx, dy, borderType=cv2.BORDER_REPLICATE)
                torch.testing.assert_close(ours[batch, channel], torch.from_numpy(theirs))


def test_sign_follows_the_edge():
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 1
    rising, _ = sobel(step)
    falling, _ = sobel(1 - step)
    assert rising.max() == 4
    assert torch.equal(rising, -falling)


def test_gradcheck():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sobel, x)
