"""What model.recompute may be, for tests that train with it."""

import pytest
from torch.utils import checkpoint

LIGHT = pytest.param(
    "light",
    marks=pytest.mark.skipif(
        not hasattr(checkpoint, "CheckpointPolicy"), reason="needs PyTorch 2.5"
    ),
)
