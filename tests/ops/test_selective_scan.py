"""Every backend of the selective scan against the float64 loop: outputs and all gradients."""

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from models.ops.native import library as native
from models.ops.selective_scan import chunked, selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
# Relative error ||out - truth|| / ||truth||. float32 sums of a few thousand terms stay below 1e-5;
# bfloat16 and float16 inputs and outputs are rounded to 8 and 11 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


HAS_COMPILER = any(map(shutil.which, ("c++", "g++"))) or "CXX" in os.environ
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")
FAST = ["chunked", pytest.param("native", marks=needs_compiler)]
# The dtype in which a backend is compared: its state's own.
EXACT = {"reference": torch.float64, "chunked": torch.float64, "native": torch.float32}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, chunks and tiles so small that short sequences cross every border."""
    monkeypatch.setattr(native, "_TILE_ELEMENTS", 1)
    monkeypatch.setitem(chunked._BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(chunked, "_LEAST_BLOCK", 23)
    monkeypatch.setattr(chunked, "_WIDE_STEP", 10**9)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Unwritten memory reads as NaN."""
    empty_like = torch.empty_like

    def poisoned(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", poisoned)


def make_inputs(batch, channels, states, length, groups, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length) - 1,
        "A": -torch.exp(0.5 * normal(channels, states)),
        "B": normal(batch, groups, states, length),
        "C": normal(batch, groups, states, length),
        "D": normal(channels),
        "delta_bias": 0.1 * normal(channels),
    }
    keep = {"A", "D", "delta_bias"}  # parameters stay in float32
    return {
        name: value.to(torch.float32 if name in keep and dtype != torch.float64 else dtype)
        for name, value in inputs.items()
    }


def run(inputs, backend, **options):
    """Output and gradients of a fixed weighting of it, all in float64."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = selective_scan(**leaves, backend=backend, **options)
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weight).sum(), list(leaves.values()))
    results = dict(zip(leaves, gradients, strict=True), y=y)
    return {name: value.double() for name, value in results.items()}


def assert_same(ours, truth, tolerance):
    for name, expected in truth.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def truth_of(inputs, **options):
    return run({name: value.double() for name, value in inputs.items()}, "reference", **options)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize(
    ("states", "channels", "groups"), [(1, 5, 1), (2, 6, 2), (8, 4, 1), (16, 8, 4), (64, 2, 1)]
)
@pytest.mark.parametrize("backend", FAST)
def test_equals_reference(backend, length, states, channels, groups, small_blocks):
    inputs = make_inputs(3, channels, states, length, groups, EXACT[backend])
    assert_same(run(inputs, backend), truth_of(inputs), TOLERANCE[EXACT[backend]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_dtypes(dtype, backend):
    inputs = make_inputs(2, 6, 4, 150, 2, dtype)
    ours = run(inputs, backend)
    assert_same(ours, truth_of(inputs), TOLERANCE[dtype])
    leaf = inputs["u"]
    assert selective_scan(**inputs, backend=backend).dtype == leaf.dtype


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_mixed_dtypes_as_under_autocast(backend):
    inputs = make_inputs(1, 4, 2, 30, 1, torch.float32)
    inputs["B"] = inputs["B"].bfloat16()
    inputs["delta"] = inputs["delta"].bfloat16()
    assert_same(run(inputs, backend), truth_of(inputs), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("backend", FAST)
def test_optional_arguments(backend, softplus):
    inputs = make_inputs(2, 3, 2, 17, 1, EXACT[backend])
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    assert_same(
        run(inputs, backend, delta_softplus=softplus),
        truth_of(inputs, delta_softplus=softplus),
        TOLERANCE[EXACT[backend]],
    )
    bare = {name: inputs[name] for name in ("u", "delta", "A", "B", "C")}
    assert_same(run(bare, backend), truth_of(bare), TOLERANCE[EXACT[backend]])


@pytest.mark.parametrize("exponent", [-1e-6, -1e-2, -1.0, -100.0])
@pytest.mark.parametrize("backend", FAST)
def test_extreme_decay_neither_overflows_nor_drifts(backend, exponent, small_blocks):
    """dt·A from almost no decay to instant decay, in float32."""
    inputs = make_inputs(1, 2, 2, 700, 1, torch.float32)
    inputs["A"] = torch.full_like(inputs["A"], exponent)
    inputs["delta"] = torch.ones_like(inputs["delta"])
    inputs["delta_bias"] = torch.zeros_like(inputs["delta_bias"])
    ours = run(inputs, backend, delta_softplus=False)
    assert all(torch.isfinite(value).all() for value in ours.values())
    truth = truth_of(inputs, delta_softplus=False)
    del ours["A"], truth["A"]  # at -100 its true gradient is a difference of rounding errors
    assert_same(ours, truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", FAST)
def test_long_sequence_does_not_drift(backend):
    inputs = make_inputs(1, 1, 1, 100_001, 1, torch.float32)
    ours = selective_scan(**inputs, backend=backend)[..., -200:].double()
    truth = selective_scan(**{k: v.double() for k, v in inputs.items()}, backend="chunked")
    assert (ours - truth[..., -200:]).norm() / truth[..., -200:].norm() < 1e-5


@pytest.mark.parametrize("backend", FAST)
def test_batch_equals_singles(backend):
    inputs = make_inputs(3, 4, 2, 40, 2, EXACT[backend])
    together = selective_scan(**inputs, backend=backend)
    for index in range(3):
        single = {
            name: value[index : index + 1] if value.dim() > 2 else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(selective_scan(**single, backend=backend)[0], together[index])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_empty_batch(backend):
    inputs = make_inputs(0, 4, 2, 5, 2, torch.float32)
    assert selective_scan(**inputs, backend=backend).shape == (0, 4, 5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])  # of float64
def test_gradcheck(backend, small_blocks):
    inputs = make_inputs(1, 2, 2, 20, 1)
    leaves = [value.requires_grad_() for value in inputs.values()]

    def scan(*values):
        return selective_scan(**dict(zip(NAMES, values, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("backend", FAST)
def test_non_contiguous_inputs(backend):
    inputs = make_inputs(2, 4, 2, 33, 1, EXACT[backend])
    strided = dict(inputs)
    strided["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["B"] = inputs["B"].flip(-1).contiguous().flip(-1)[:, :, :, :]
    torch.testing.assert_close(
        selective_scan(**strided, backend=backend), selective_scan(**inputs, backend=backend)
    )


@pytest.mark.parametrize("backend", FAST)
def test_saved_memory_does_not_grow_with_the_states(backend):
    """What autograd keeps is O(B·D·L): 32 times the states may not even double it."""

    def saved_bytes(states):
        inputs = make_inputs(1, 16, states, 4096, 1, torch.float32)
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        inputs["u"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            selective_scan(**inputs, backend=backend)
        own = sum(inputs[name].numel() * 4 for name in ("B", "C"))
        return total - own

    assert saved_bytes(32) < 2 * saved_bytes(1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("delta", lambda t: t[..., :-1], "u and delta must be"),
        ("A", lambda t: t[:-1], r"A must be \(4, N\)"),
        ("B", lambda t: t[..., :-1], "B must be"),
        ("C", lambda t: t[:, :1], "C must be"),
        ("D", lambda t: t[:-1], r"D must be \(4,\)"),
        ("delta_bias", lambda t: t[:-1], "delta_bias must be"),
        ("A", lambda t: t.long(), "real floating point"),
        ("u", lambda t: t.to(torch.complex64), "u must be real floating point"),
        ("delta_bias", lambda t: t.to(torch.complex64), "delta_bias must be real floating point"),
        ("delta_bias", lambda t: t.to("meta"), "delta_bias is on meta, u on cpu"),
    ],
)
def test_wrong_arguments_are_named(name, change, message):
    inputs = make_inputs(1, 4, 2, 9, 2)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_groups_must_divide_channels():
    inputs = make_inputs(1, 4, 2, 9, 2)
    inputs["B"] = inputs["B"][:, [0, 0, 1]]
    inputs["C"] = inputs["C"][:, [0, 0, 1]]
    with pytest.raises(ValueError, match="K = 3 groups do not divide D = 4"):
        selective_scan(**inputs)


def test_unknown_and_unavailable_backends():
    inputs = make_inputs(1, 2, 1, 3, 1, torch.float32)
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"):
        selective_scan(**inputs, backend="fast")
    with pytest.raises(RuntimeError, match="mamba_ssm"):
        selective_scan(**inputs, backend="mamba_ssm")


@needs_compiler
def test_native_gives_the_same_on_any_number_of_threads():
    """Parts of a group's channels have gradients of B and C of their own."""
    inputs = make_inputs(1, 7, 3, 100, 1, torch.float32)
    truth = truth_of(inputs)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            assert_same(run(inputs, "native"), truth, TOLERANCE[torch.float32])
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_native_compiles_into_a_graph(backend):
    inputs = make_inputs(1, 4, 2, 30, 2, torch.float32)

    def scan(*values):
        return selective_scan(**dict(zip(NAMES, values, strict=True)), backend=backend)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    y = compiled(*leaves)
    gradients = torch.autograd.grad(y.sum(), leaves)
    expected = scan(*leaves)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaves))


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """No library loaded yet, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_library.cache_clear()
    yield tmp_path / "cmfs"
    native.load_library.cache_clear()


@needs_compiler
def test_native_is_compiled_once(fresh_library, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert native.load_library() is not None
    (library,) = fresh_library.iterdir()
    assert [record.getMessage() for record in caplog.records] == [
        f"compiled the native scan into {library}"
    ]
    native.load_library.cache_clear()
    monkeypatch.setattr(native, "_compile", None)  # calling it would fail
    assert native.load_library() is not None


@needs_compiler
def test_native_is_compiled_again_where_what_is_kept_cannot_be_loaded(
    fresh_library, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", Path.touch)
        assert native._cached_library().read_bytes() == b""
    assert native.load_library() is not None
    assert "compiling the native scan again" in caplog.text


def test_without_a_home_folder_there_is_no_native_scan(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    caplog.set_level(logging.INFO)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    native.load_library.cache_clear()
    assert native.load_library() is None
    native.load_library.cache_clear()
    assert "set XDG_CACHE_HOME" in caplog.text


def test_the_compiler_may_have_arguments(monkeypatch):
    commands = []
    monkeypatch.setenv("CXX", "ccache 'my g++'")
    monkeypatch.setattr(native.subprocess, "run", lambda command, **_: commands.append(command))
    native._compile(Path("scan.so"))
    assert commands[0][:2] == ["ccache", "my g++"]


@needs_compiler
def test_native_is_compiled_by_several_at_once(fresh_library):
    threads = [threading.Thread(target=native._cached_library) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.suffix for path in fresh_library.iterdir()] == [".so"]
    assert native.load_library() is not None


@pytest.mark.parametrize("compiler", ["", "/nowhere/c++", "false"], ids=["none", "missing", "bad"])
def test_without_a_compiler_auto_takes_the_chunked_scan(
    compiler, fresh_library, monkeypatch, caplog
):
    from models.ops.selective_scan import dispatch

    caplog.set_level(logging.INFO)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    dispatch._find_fastest.cache_clear()
    inputs = make_inputs(1, 2, 1, 5, 1, torch.float32)
    try:
        assert_same(run(inputs, "auto"), truth_of(inputs), TOLERANCE[torch.float32])
        said = [record.getMessage() for record in caplog.records]
        assert said[0].startswith("no native scan, taking the one in PyTorch: ")
        assert said[1] == "selective scan on cpu: backend chunked"
        with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
            selective_scan(**inputs, backend="native")
    finally:
        dispatch._find_fastest.cache_clear()


def test_native_refuses_float64():
    with pytest.raises(RuntimeError, match="use 'chunked' for float64"):
        selective_scan(**make_inputs(1, 2, 1, 5, 1), backend="native")
