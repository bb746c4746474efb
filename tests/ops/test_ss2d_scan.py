"""The four-direction scan against its pixel-by-pixel reference: outputs and all gradients."""

import pytest
import torch

from models.ops.ss2d_scan import ss2d_scan
from models.ops.ss2d_scan.composed import _permutations, _Permute
from models.ops.ss2d_scan.reference import pixel_orders

SIZES = [(8, 8), (7, 5), (4, 12), (1, 6), (9, 13)]


def make_inputs(batch, channels, hw, states, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, channels, *hw),
        "x_proj_weight": normal(4, rank + 2 * states, channels) / channels**0.5,
        "dt_projs_weight": normal(4, channels, rank),
        "dt_projs_bias": normal(4, channels),
        "A_logs": 0.5 * normal(4 * channels, states),
        "Ds": normal(4 * channels),
    }


def run(inputs, **options):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = ss2d_scan(**leaves, **options)
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weight).sum(), list(leaves.values()))
    return {name: g.double() for name, g in zip(leaves, gradients, strict=True)} | {"y": y.double()}


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("scan", ["cross", "window"])
@pytest.mark.parametrize(("states", "rank", "batch"), [(1, 2, 1), (3, 1, 3)])
def test_equals_reference(hw, scan, states, rank, batch):
    inputs = make_inputs(batch, 3, hw, states, rank)
    ours = run(inputs, scan=scan, backend="chunked")
    for name, truth in run(inputs, scan=scan, backend="reference").items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_dtypes(dtype, tolerance):
    """bfloat16 rounds dt_low and dt as well as inputs and outputs, hence 2e-2."""
    inputs = make_inputs(2, 4, (9, 6), 2, 2, dtype)
    ours = ss2d_scan(**inputs, backend="chunked")
    truth = ss2d_scan(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    assert ours.dtype == dtype
    assert (ours.double() - truth).norm() / truth.norm() < tolerance


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("scan", ["cross", "window"])
@pytest.mark.parametrize("window", [2, 4])
def test_permutations_are_the_reference_orders(hw, scan, window):
    order, _ = _permutations(*hw, scan, window, torch.device("cpu"))
    for ours, pixels in zip(order, pixel_orders(*hw, scan, window), strict=True):
        assert ours.tolist() == [row * hw[1] + column for row, column in pixels]


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("scan", ["cross", "window"])
def test_round_trip_puts_every_pixel_back(hw, scan):
    """Defect 3 of the published code: the window scan never undid its own order."""
    order, back = _permutations(*hw, scan, 4, torch.device("cpu"))
    x = torch.randn(2, 4, 3, hw[0] * hw[1])
    assert torch.equal(_Permute.apply(_Permute.apply(x, order, back), back, order), x)


def test_window_order_by_hand():
    """4x4 windows over 4x8: the left window's 16 tokens come before the right window's."""
    rows, columns, rows_reversed, _ = pixel_orders(4, 8, "window", 4)
    assert rows[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert rows[16] == (0, 4)
    assert columns[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert rows_reversed[0] == (3, 7)


def test_output_stays_local_to_its_pixel():
    """With B = 0 and D = 1 the scan is 4·x: any misplaced output would show."""
    inputs = make_inputs(1, 2, (6, 10), 2, 1)
    inputs["x_proj_weight"] = torch.zeros_like(inputs["x_proj_weight"])
    inputs["Ds"] = torch.ones_like(inputs["Ds"])
    for scan in ("cross", "window"):
        torch.testing.assert_close(ss2d_scan(**inputs, scan=scan), 4 * inputs["x"])


def test_training_after_inference_mode():
    """Permutations are cached; a first use in inference mode must not bar a later backward."""
    inputs = make_inputs(1, 2, (11, 3), 1, 1)
    with torch.inference_mode():
        ss2d_scan(**inputs, backend="chunked")
    assert all(torch.isfinite(g).all() for g in run(inputs, backend="chunked").values())


def test_gradcheck():
    inputs = make_inputs(1, 2, (3, 5), 2, 1)
    leaves = [value.requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *values: ss2d_scan(*values, scan="window", window=2, backend="chunked"), leaves
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scan": "spiral"}, "unknown scan 'spiral'"),
        ({"window": 0}, "window must be at least 1"),
        ({"Ds": torch.zeros(3)}, r"Ds must be \(8,\), got \(3,\)"),
        ({"x": torch.zeros(2, 2, 4)}, r"x must be \(batch, D, H, W\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ss2d_scan(**(make_inputs(1, 2, (4, 4), 1, 1) | change))
