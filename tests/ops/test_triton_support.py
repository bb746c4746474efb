"""Which backend is taken, and how maps are shared out among programs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.triton_support import PlaneTile, pick_backend


def fake(device, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(2, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "dtype", "is_there", "expected"),
    [
        (fake("cuda"), None, True, "triton"),
        (fake("cuda", torch.bfloat16), None, True, "triton"),
        (fake("cuda", torch.complex64), torch.float32, True, "triton"),
        (fake("cuda", torch.complex64), None, True, "reference"),
        (fake("cuda", torch.int64), None, True, "reference"),
        (fake("cuda"), None, False, "reference"),
        (fake("cpu"), None, True, "reference"),
        (fake("cuda", torch.float64), None, True, "reference"),
        (fake("cuda"), torch.float64, True, "reference"),
    ],
)
def test_auto_is_triton_on_a_gpu_but_for_float64(x, dtype, is_there, expected):
    assert pick_backend("f", "auto", x, dtype=dtype, is_there=lambda: is_there) == expected


def test_a_backend_is_taken_by_name():
    for name in ("reference", "triton"):
        assert pick_backend("f", name, torch.ones(1), is_there=lambda: False) == name
    with pytest.raises(ValueError, match="unknown f backend 'cudnn'; known: auto, reference, tri"):
        pick_backend("f", "cudnn", torch.ones(1))


@pytest.mark.parametrize(
    ("planes", "pixels", "programs"), [(1, 1, 1), (2, 16, 1), (3, 17, 4), (7, 32, 8)]
)
def test_a_grid_is_as_many_programs_as_cover_all_maps(planes, pixels, programs):
    assert PlaneTile(2, 16, 4).grid(planes, pixels) == (programs,)
