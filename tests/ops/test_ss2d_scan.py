"""The four-direction scan against its pixel-by-pixel reference: outputs and all gradients."""

import os
import shutil
import threading
from collections import OrderedDict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.native import library
from models.ops.ss2d_scan import orders, ss2d_scan
from models.ops.ss2d_scan.composed import _Permute
from models.ops.ss2d_scan.orders import orders_read, scan_orders
from models.ops.ss2d_scan.reference import pixel_orders

HAS_COMPILER = any(map(shutil.which, ("c++", "g++"))) or "CXX" in os.environ
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")
FAST = ["chunked", pytest.param("native", marks=needs_compiler)]
# The dtype in which a backend is compared, its state's own, and how near it must come.
EXACT = {"chunked": torch.float64, "native": torch.float32}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
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
@pytest.mark.parametrize(("states", "rank", "batch"), [(1, 2, 1), (3, 1, 3), (8, 5, 1)])
@pytest.mark.parametrize("backend", FAST)
def test_equals_reference(backend, hw, scan, states, rank, batch, monkeypatch):
    monkeypatch.setattr(library, "_TILE_ELEMENTS", 1)  # tiles of 16 tokens
    inputs = make_inputs(batch, 3, hw, states, rank, EXACT[backend])
    ours = run(inputs, scan=scan, backend=backend)
    doubles = {name: value.double() for name, value in inputs.items()}
    for name, truth in run(doubles, scan=scan, backend="reference").items():
        error = (ours[name] - truth).norm() / truth.norm().clamp_min(1e-12)
        assert error < TOLERANCE[EXACT[backend]], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_dtypes(backend, dtype):
    """bfloat16 rounds dt_low as well as inputs and outputs, hence 2e-2."""
    inputs = make_inputs(2, 4, (9, 6), 2, 2, dtype)
    ours = ss2d_scan(**inputs, backend=backend)
    truth = ss2d_scan(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    assert ours.dtype == dtype
    assert (ours.double() - truth).norm() / truth.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_a_map_of_half_precision_with_parameters_in_float32(backend, dtype):
    inputs = make_inputs(2, 4, (9, 6), 2, 2, torch.float32)
    inputs["x"] = inputs["x"].to(dtype)
    ours = ss2d_scan(**inputs, backend=backend)
    truth = ss2d_scan(**{k: v.double() for k, v in inputs.items()}, backend="reference")
    assert ours.dtype == dtype
    assert (ours.double() - truth).norm() / truth.norm() < TOLERANCE[torch.bfloat16]


def test_orders_that_one_thread_has_found_no_other_removes_meanwhile(monkeypatch):
    caller, rest = threading.current_thread(), ("cross", 4, torch.device("cpu"))

    class Kept(OrderedDict):
        def get(self, key):
            found = super().get(key)
            if found is not None and threading.current_thread() is caller:
                other = threading.Thread(target=scan_orders, args=(2, 5, *rest))
                other.start()
                other.join(0.5)  # it waits for its turn
            return found

    monkeypatch.setattr(orders, "_kept", Kept())
    monkeypatch.setattr(orders, "_MOST_KEPT", 1)
    first, again = (scan_orders(3, 4, *rest) for _ in range(2))
    assert again is first


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("scan", ["cross", "window"])
@pytest.mark.parametrize("window", [2, 4])
def test_orders_are_the_reference_orders(hw, scan, window):
    order, _ = scan_orders(*hw, scan, window, torch.device("cpu"))
    for ours, pixels in zip(order, pixel_orders(*hw, scan, window), strict=True):
        assert ours.tolist() == [row * hw[1] + column for row, column in pixels]


@pytest.mark.parametrize("hw", SIZES, ids=str)
@pytest.mark.parametrize("scan", ["cross", "window"])
def test_round_trip_puts_every_pixel_back(hw, scan):
    """Defect 3 of the published code: the window scan never undid its own order."""
    order, back = scan_orders(*hw, scan, 4, torch.device("cpu"))
    x = torch.randn(2, 4, 3, hw[0] * hw[1])
    assert torch.equal(_Permute.apply(_Permute.apply(x, order, back), back, order), x)


def test_orders_are_made_once_and_the_latest_kept():
    """A reader, such as a CUDA graph, holds what it read after others have taken its place."""
    cpu = torch.device("cpu")
    with orders_read() as read:
        first = scan_orders(5, 6, "cross", 4, cpu)
        assert scan_orders(5, 6, "cross", 4, cpu) is first
    for width in range(orders._MOST_KEPT):
        scan_orders(2, 1 + width, "cross", 4, cpu)
    assert len(orders._kept) == orders._MOST_KEPT
    assert scan_orders(5, 6, "cross", 4, cpu) is not first
    assert len(read) == 2 and all(pair is first for pair in read)


def test_a_tracers_stand_ins_are_not_kept():
    cpu = torch.device("cpu")
    orders._kept.clear()
    with FakeTensorMode():
        assert type(scan_orders(5, 6, "cross", 4, cpu)[0]) is not torch.Tensor
    assert type(scan_orders(5, 6, "cross", 4, cpu)[0]) is torch.Tensor


def test_window_order_by_hand():
    """4x4 windows over 4x8: the left window's 16 tokens come before the right window's."""
    rows, columns, rows_reversed, _ = pixel_orders(4, 8, "window", 4)
    assert rows[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert rows[16] == (0, 4)
    assert columns[:5] == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]
    assert rows_reversed[0] == (3, 7)


@pytest.mark.parametrize("backend", FAST)
def test_output_stays_local_to_its_pixel(backend):
    """With B = 0 and D = 1 the scan is 4·x: any misplaced output would show."""
    inputs = make_inputs(1, 2, (6, 10), 2, 1, EXACT[backend])
    inputs["x_proj_weight"] = torch.zeros_like(inputs["x_proj_weight"])
    inputs["Ds"] = torch.ones_like(inputs["Ds"])
    for scan in ("cross", "window"):
        torch.testing.assert_close(ss2d_scan(**inputs, scan=scan, backend=backend), 4 * inputs["x"])


@pytest.mark.parametrize("backend", FAST)
def test_training_after_inference_mode(backend):
    """Orders are cached; a first use in inference mode must not bar a later backward."""
    inputs = make_inputs(1, 2, (11, 3), 1, 1, EXACT[backend])
    orders._kept.clear()
    with torch.inference_mode():
        ss2d_scan(**inputs, backend=backend)
    assert all(torch.isfinite(g).all() for g in run(inputs, backend=backend).values())


@needs_compiler
def test_native_gives_the_same_on_any_number_of_threads():
    inputs = make_inputs(2, 7, (9, 13), 3, 2, torch.float32)
    truth = run({name: value.double() for name, value in inputs.items()}, backend="reference")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            ours = run(inputs, backend="native")
            for name, expected in truth.items():
                assert (ours[name] - expected).norm() / expected.norm() < 1e-5, name
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_native_compiles_into_a_graph():
    inputs = make_inputs(1, 3, (5, 6), 2, 1, torch.float32)
    compiled = torch.compile(ss2d_scan, fullgraph=True, backend="aot_eager")
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    ours, eager = compiled(**leaves, backend="native"), ss2d_scan(**leaves, backend="native")
    torch.testing.assert_close(ours, eager)
    gradients, expected = (
        torch.autograd.grad(y.square().sum(), list(leaves.values())) for y in (ours, eager)
    )
    torch.testing.assert_close(gradients, expected)


@needs_compiler
def test_native_refuses_float64():
    with pytest.raises(RuntimeError, match="use 'chunked' for float64"):
        ss2d_scan(**make_inputs(1, 2, (4, 4), 1, 1), backend="native")


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
