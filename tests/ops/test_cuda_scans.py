"""Both scans on CUDA against the float64 loops: outputs and all gradients.

On a CPU the kernels' code runs in an emulator, and NVRTC compiles it for GPUs that are not there.
"""

import ctypes
import importlib.util
import itertools
import locale
import threading
import types
from pathlib import Path

import pytest
import torch

from models.ops.cuda import library, reorder, scan, sums
from models.ops.selective_scan import cuda as rows
from models.ops.selective_scan import dispatch, selective_scan
from models.ops.selective_scan.chunked import selective_scan_chunked
from models.ops.selective_scan.reference import selective_scan_reference
from models.ops.ss2d_scan import cuda as maps
from models.ops.ss2d_scan import ss2d_scan
from tests.ops import test_selective_scan_triton as of_rows
from tests.ops import test_ss2d_scan_triton as of_maps
from tests.ops.emulator import (  # noqa: F401 (emulated is a fixture)
    FOLDER,
    emulated,
    gpu,
    needs_compiler,
    pretend_gpu,
    schedule,
)

# (batch, D, N, L, K): one lane, warp, block and chunk, and more; rows and states that are not even
ROWS = [
    (1, 1, 1, 1, 1),
    (1, 4, 2, 2, 2),
    (3, 5, 1, 63, 1),
    (2, 2, 2, 64, 1),
    (1, 3, 4, 700, 1),
    (2, 4, 1, 1100, 2),
    (2, 4, 1, 2500, 2),
    (1, 50, 2, 520, 1),
    (1, 2, 16, 300, 1),
    (1, 40, 17, 300, 2),
    (2, 10, 8, 1000, 2),
    (1, 20, 1, 2052, 1),
    (1, 1, 64, 65, 1),
]
# (batch, D, N, R, (H, W))
MAPS = [
    (1, 1, 1, 1, (1, 1)),
    (1, 3, 2, 1, (5, 7)),
    (2, 3, 1, 2, (4, 8)),
    (1, 7, 2, 3, (13, 36)),
    (2, 20, 1, 3, (33, 40)),
    (1, 6, 1, 2, (50, 45)),
    (1, 20, 3, 40, (20, 20)),
    (1, 4, 18, 2, (9, 35)),
    (1, 30, 1, 2, (9, 20)),  # many blocks, whose sums are added up
]


def errors(ours, truth):
    """||ours - truth|| / ||truth|| of each, NaN where something was not written."""
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-12))
            for a, b in zip(ours, truth, strict=True)]  # fmt: skip


def poisoned(call):
    """What call returns while torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def assert_rows(inputs, tolerance, softplus=True, truth=selective_scan_reference):
    doubles = [None if x is None else x.double() for x in inputs]
    ours = poisoned(lambda: of_rows.run(rows.selective_scan_cuda, inputs, softplus))
    found = errors(ours, of_rows.run(truth, doubles, softplus))
    assert all(error < tolerance for error in found), found


def assert_maps(inputs, tolerance, order, truth="reference"):
    def run(inputs, backend):
        return of_maps.run(inputs, scan=order, backend=backend).values()

    ours = poisoned(lambda: run(inputs, "cuda"))
    found = errors(ours, run({k: v.double() for k, v in inputs.items()}, truth))
    assert all(error < tolerance for error in found), found


def take_few_blocks(monkeypatch, enough=1):
    """Blocks take further passes while there are so many blocks."""
    for name in ("_ENOUGH_BLOCKS", "_ENOUGH_SMALL_BLOCKS"):
        monkeypatch.setattr(scan, name, {"forward": enough, "backward": enough})


@needs_compiler
@pytest.mark.usefixtures("emulated")
class TestEmulated:
    @pytest.mark.parametrize("sizes", ROWS, ids=str)
    def test_rows_equal_reference(self, sizes):
        assert_rows(of_rows.make_inputs(*sizes), 1e-5)

    @pytest.mark.parametrize("order", ["cross", "window"])
    @pytest.mark.parametrize("sizes", MAPS, ids=str)
    def test_maps_equal_reference(self, sizes, order):
        assert_maps(of_maps.make_inputs(*sizes), 1e-5, order)

    @pytest.mark.parametrize("states", [1, 2])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype, states):
        inputs = of_rows.make_inputs(1, 2, states, 1100, 1, dtype)
        assert_rows(inputs, of_rows.TOLERANCE[dtype])
        inputs = of_maps.make_inputs(1, 2, states, 1, (14, 25), dtype)
        assert_maps(inputs, of_maps.TOLERANCE[dtype], "cross")

    @pytest.mark.parametrize("states", [1, 4])
    def test_extreme_decays(self, states):
        assert_rows(of_rows.extreme_inputs(1, 6, states, 2600, 1), 1e-5, softplus=False)
        assert_maps(of_maps.extreme_inputs((1, 3, states, 1, (14, 25))), 1e-5, "cross")

    @pytest.mark.parametrize("states", [1, 2])
    def test_no_drift_where_decays_are_near_one(self, states):
        """Over chunks: products of decays of lanes were 2e-6 off, and grew with the length."""
        inputs = of_rows.make_inputs(1, 2, states, 40_000, 1)
        inputs[2] *= 1e-4  # states that remember some ten thousand tokens
        assert_rows(inputs, 1e-6, truth=selective_scan_chunked)

    @pytest.mark.parametrize("states", [1, 2])
    def test_small_steps(self, states):
        """Where dt is 1e-4, so is the slope of softplus: 1 - e^-dt as it stands has four digits."""
        inputs = of_rows.make_inputs(1, 3, states, 40, 1)
        inputs[1] -= 8
        assert_rows(inputs, 1e-5)

    @pytest.mark.parametrize("states", [1, 2])
    def test_steps_past_the_end_count_for_nothing(self, states):
        """Without softplus the bias alone, as there is no delta, would make infinite decays."""
        inputs = of_rows.make_inputs(1, 3, states, 37, 1)
        inputs[1], inputs[6] = inputs[1].abs() + 100, torch.full((3,), -100.0)
        inputs[2] = inputs[2] - 5
        assert_rows(inputs, 1e-5, softplus=False)

    @pytest.mark.parametrize("states", [1, 3])
    def test_without_skip_and_bias(self, states):
        inputs = of_rows.make_inputs(1, 2, states, 40, 1)
        assert_rows([*inputs[:5], None, None], 1e-5)

    def test_mixed_dtypes_as_under_autocast(self):
        inputs = of_rows.make_inputs(1, 4, 2, 300, 1)
        inputs[3], inputs[4] = inputs[3].bfloat16(), inputs[4].bfloat16()
        assert_rows(inputs, of_rows.TOLERANCE[torch.bfloat16])
        inputs[1] = inputs[1].bfloat16()
        assert_rows(inputs, of_rows.TOLERANCE[torch.bfloat16])

    def test_non_contiguous(self):
        inputs = of_rows.make_inputs(2, 2, 2, 12, 1)
        assert_rows([x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs], 1e-5)
        inputs = of_maps.make_inputs(2, 3, 2, 1, (4, 8))
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
        assert_maps(inputs, 1e-5, "cross")

    def test_addresses_that_are_not_aligned(self):
        inputs = of_rows.make_inputs(1, 2, 2, 300, 1)
        for index in range(5):
            shifted = torch.empty(inputs[index].numel() + 1)[1:].view_as(inputs[index])
            moved = [*inputs]
            moved[index] = shifted.copy_(inputs[index])
            assert_rows(moved, 1e-5)

    @pytest.mark.parametrize("available", [64_000, 100_000])
    @pytest.mark.parametrize("states", [1, 8, 20])
    def test_little_shared_memory_and_no_copies(self, states, available, monkeypatch):
        monkeypatch.setattr(library, "shared_bytes", lambda device: available)
        assert_rows(of_rows.make_inputs(1, 20, states, 600, 1), 1e-5)
        assert_maps(of_maps.make_inputs(1, 5, states, 20, (15, 20)), 1e-5, "cross")
        monkeypatch.setattr(library, "copies_to_shared", lambda device: False)
        assert_rows(of_rows.make_inputs(1, 20, states, 600, 1), 1e-5)
        take_few_blocks(monkeypatch)
        assert_rows(of_rows.make_inputs(1, 20, states, 300, 1), 1e-5)

    @pytest.mark.parametrize(("states", "warps"), [(2, {4, 6}), (8, {4, 6}), (9, {8, 12})], ids=str)
    def test_blocks_of_few_states_are_small(self, states, warps, monkeypatch):
        asked = []
        monkeypatch.setattr(library, "launch", lambda *arguments: asked.append(arguments[1]))
        of_rows.run(rows.selective_scan_cuda, of_rows.make_inputs(1, 2, states, 300, 1))
        chosen = {macro for definitions in asked for macro in definitions}
        chosen = {int(macro[10:]) for macro in chosen if macro.startswith("ROW_WARPS=")}
        assert chosen == warps

    @pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])  # of a block: Turing to Hopper
    @pytest.mark.parametrize("rank", [1, 12, 13, 40])
    @pytest.mark.parametrize("states", [1, 3, 16, 64])
    @pytest.mark.parametrize("enough", [1, 1000], ids=["many passes", "one pass"])
    def test_fits_into_shared_memory(self, states, rank, kilobytes, enough, monkeypatch):
        take_few_blocks(monkeypatch, enough)
        available = (kilobytes - 1) * 1024
        monkeypatch.setattr(library, "shared_bytes", lambda device: available)
        asked = []
        monkeypatch.setattr(library, "launch", lambda *arguments: asked.append(arguments))
        inputs = of_maps.make_inputs(1, 2, states, rank, (48, 48))
        of_maps.run(inputs, backend="cuda")
        of_rows.run(rows.selective_scan_cuda, of_rows.make_inputs(1, 2, states, 3000, 1))
        sizes = [arguments[5] for arguments in asked]
        assert len(sizes) == 15
        assert max(sizes) <= available
        for _, definitions, *_, size, _, _ in asked:
            chosen = dict(definition.split("=") for definition in definitions)
            if int(chosen.get("TOGETHER", 1)) > 1 or chosen.get("NEAR") == "1":
                assert int(chosen["BLOCKS"]) * size <= available  # nor does it cost a block

    @pytest.mark.parametrize("states", [1, 2])
    def test_blocks_take_further_rows(self, states, monkeypatch):
        take_few_blocks(monkeypatch)
        assert_rows(of_rows.make_inputs(1, 150, states, 600, 1), 1e-5)
        assert_maps(of_maps.make_inputs(1, 150, states, 2, (12, 25)), 1e-5, "window")

    @pytest.mark.parametrize(("states", "rank"), [(1, 3), (1, 14), (3, 5), (2, 35)])
    def test_dt_of_several_passes_is_made_at_once(self, states, rank, monkeypatch):
        take_few_blocks(monkeypatch)
        assert_maps(of_maps.make_inputs(1, 70, states, rank, (9, 20)), 1e-5, "cross")

    @pytest.mark.parametrize("architecture", [750, 900])
    @pytest.mark.parametrize("hw", [(32, 36), (31, 37)], ids=["aligned", "not aligned"])
    def test_dt_of_one_state_with_and_without_tensor_cores(self, hw, architecture, monkeypatch):
        """Tiles of rows and channels that are not full, tokens past the end, both walks."""
        take_few_blocks(monkeypatch)
        monkeypatch.setitem(gpu, "architecture", architecture)
        assert_maps(of_maps.make_inputs(1, 13, 1, 9, hw), 2e-6, "cross")

    def test_where_scalars_of_all_passes_have_no_room(self, monkeypatch):
        """As in the backward of the segmentation head, which needs the room for its copies."""
        take_few_blocks(monkeypatch)
        launch, seen = library.launch, set()
        monkeypatch.setattr(
            library, "launch", lambda *arguments: (seen.update(arguments[1]), launch(*arguments))
        )
        assert_maps(of_maps.make_inputs(1, 75, 16, 32, (4, 15)), 1e-5, "cross")
        assert {"SCALARS_AHEAD=0", "SCALARS_AHEAD=1", "NEAR=0", "NEAR=1", "PREFETCH=1"} <= seen
        assert "PREFETCH=0" not in seen

    @pytest.mark.parametrize("terms", [1, 2, 9, 70, 300])
    @pytest.mark.parametrize("many", [0, 10_000], ids=["four a thread", "one a thread"])
    @pytest.mark.parametrize("most_blocks", [2, 1000])
    def test_sums(self, terms, many, most_blocks, monkeypatch):
        monkeypatch.setattr(sums, "_MANY", many)
        monkeypatch.setattr(sums, "_MOST_BLOCKS", most_blocks)
        arrays = [torch.randn(terms, 3, 111), torch.randn(terms, 4, 111), torch.randn(7, 1000)]
        for given, goal in zip(sums.sum_first(*arrays), arrays, strict=True):
            assert torch.allclose(given, goal.sum(0), atol=1e-4)
        assert torch.equal(*sums.sum_first(arrays[0], arrays[0]))

    def test_blocks_take_further_rows_of_many_states(self, monkeypatch):
        take_few_blocks(monkeypatch)
        assert_rows(of_rows.make_inputs(1, 60, 11, 300, 1), 1e-5)

    @pytest.mark.parametrize("order", ["cross", "window"])
    def test_blocks_reorder_several_rows(self, order, monkeypatch):
        monkeypatch.setattr(reorder, "_ENOUGH_BLOCKS", 1)
        assert_maps(of_maps.make_inputs(1, 11, 1, 2, (33, 35)), 1e-5, order)

    @pytest.mark.parametrize("sizes", [(1, 36, 9, 600, 1), (1, 8, 1, 1500, 2)], ids=str)
    def test_the_same_in_whatever_order_warps_come(self, sizes, monkeypatch):
        inputs = of_rows.make_inputs(*sizes)
        expected = of_rows.run(rows.selective_scan_cuda, inputs)
        for seed in (1, 2):
            monkeypatch.setitem(schedule, "seed", seed)
            ours = of_rows.run(rows.selective_scan_cuda, inputs)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 1), (1, 2, 2, 0, 1), (1, 2, 1, 0, 1)], ids=str)
    def test_empty(self, sizes):
        inputs = of_rows.make_inputs(*sizes)
        results = of_rows.run(rows.selective_scan_cuda, inputs)
        assert [x.shape for x in results] == [inputs[0].shape, *(x.shape for x in inputs)]
        assert all((x == 0).all() for x in results)

    def test_kept_for_the_backward_is_a_state_of_each_chunk(self):
        *inputs, _, _ = of_rows.make_inputs(1, 4, 16, 2560, 1)
        y, borders = rows._forward(*inputs, None, None, True)
        assert borders.numel() == 9 * 4 * 16 + 1 < y.numel()
        inputs[2:5] = inputs[2][:, :1], inputs[3][:, :, :1], inputs[4][:, :, :1]
        assert rows._forward(*inputs, None, None, True)[1].numel() == 2 * 4 + 1

    def test_operators_are_well_registered(self):
        inputs = [x.requires_grad_() for x in of_rows.make_inputs(1, 2, 1, 5, 1)]
        torch.library.opcheck(rows._forward, (*inputs, True))
        y, borders = rows._forward(*inputs, True)
        tensors = [x.detach() for x in (y, *inputs, borders)]
        torch.library.opcheck(rows._backward, (*tensors, True))

    def test_operators_of_maps_are_well_registered(self):
        x, to_projected, weight, bias, A_logs, D = of_maps.make_inputs(1, 2, 2, 1, (3, 4)).values()
        inputs = [x, to_projected, weight, bias, A_logs.view(4, 2, 2), D.view(4, 2)]
        inputs = [t.detach().requires_grad_() for t in inputs]
        for order in ("cross", "window"):
            torch.library.opcheck(maps._forward, (*inputs, order, 4))
            y, *saved = maps._forward(*inputs, order, 4)
            tensors = [t.detach() for t in (y, *inputs, *saved)]
            torch.library.opcheck(maps._backward, (*tensors, order, 4))

    def test_compiles_without_graph_break(self):
        inputs = of_rows.make_inputs(1, 2, 1, 5, 1)
        compiled = torch.compile(rows.selective_scan_cuda, fullgraph=True, backend="aot_eager")
        eager = of_rows.run(rows.selective_scan_cuda, inputs)
        for a, b in zip(of_rows.run(compiled, inputs), eager, strict=True):
            assert torch.equal(a, b)


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC out of PyTorch's packages, without the driver that a CPU lacks."""
    package = importlib.util.find_spec("nvidia")
    folders = list(package.submodule_search_locations) if package else []
    found = itertools.chain(*(Path(f).glob("*/lib/libnvrtc.so.*") for f in folders))
    path = next(found, None)
    return None if path is None else ctypes.CDLL(str(path))


needs_nvrtc = pytest.mark.skipif(nvrtc() is None, reason="this PyTorch comes without NVRTC")
ARCHITECTURE = "--gpu-architecture=sm_90"


def options_of(monkeypatch, call) -> list[tuple[str, tuple[str, ...]]]:
    """Sources and options that the launches of `call` ask for."""
    asked = []
    pretend_gpu(monkeypatch, lambda *arguments: asked.append(arguments[:2]))
    call()
    return asked


@needs_nvrtc
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [
        (torch.float32, 75),
        (torch.bfloat16, 75),  # which has no instructions for it
        (torch.float32, 80),
        (torch.float16, 80),
        (torch.bfloat16, 90),
    ],
    ids=str,
)
def test_compiles_for_absent_gpus(dtype, states, architecture, monkeypatch):
    def call():
        of_rows.run(rows.selective_scan_cuda, of_rows.make_inputs(1, 2, states, 8, 1, dtype))
        of_maps.run(of_maps.make_inputs(1, 2, states, 1, (3, 5), dtype), backend="cuda")

    asked = set(options_of(monkeypatch, call))
    assert {source for source, _ in asked} > {"reorder.cu"}
    names = [path.name for path in FOLDER.glob("*.cu*")]
    texts = {name: (FOLDER / name).read_bytes() for name in names}
    before = locale.nl_langinfo(locale.CODESET)
    for source, definitions in asked:
        if architecture < 80:  # these cannot copy to shared memory by themselves
            definitions = [d.replace("PREFETCH=1", "PREFETCH=0") for d in definitions]
        options = (f"--gpu-architecture=sm_{architecture}", *(f"-D{d}" for d in definitions))
        assert library._compile(nvrtc(), source, texts, options).startswith(b"\x7fELF")
    assert locale.nl_langinfo(locale.CODESET) == before  # text files stay UTF-8


@needs_nvrtc
def test_what_was_compiled_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = (ARCHITECTURE, "-DTOKENS=float")
    image = library._cached_image(nvrtc(), "reorder.cu", options)
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert library._cached_image(nvrtc(), "reorder.cu", options) == image


def test_what_is_kept_and_cut_short_is_compiled_again(monkeypatch, tmp_path):
    class Refusing(Driver):
        """Takes nothing but what was compiled whole."""

        def __getattr__(self, name):
            if name != "cuModuleLoadData":
                return super().__getattr__(name)
            return lambda module, image: 0 if image == b"whole" else 200

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_compile", lambda *_: b"whole")
    library._load_kept(Refusing(), "reorder.cu", ())
    (kept,) = (tmp_path / "cmfs").iterdir()
    kept.write_bytes(b"who")
    library._load_kept(Refusing(), "reorder.cu", ())
    assert kept.read_bytes() == b"whole"


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_no_failure(monkeypatch, tmp_path):
    (tmp_path / "cmfs").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library._cached_image(nvrtc(), "reorder.cu", (ARCHITECTURE, "-DTOKENS=float"))


@needs_nvrtc
def test_what_the_compiler_says_is_passed_on():
    texts = {path.name: path.read_bytes() for path in FOLDER.glob("*.cu*")}
    with pytest.raises(RuntimeError, match='(?s)NVRTC.*identifier "nonsense" is undefined'):
        library._compile(nvrtc(), "reorder.cu", texts, (ARCHITECTURE, "-DTOKENS=nonsense"))


class Driver:
    """A driver whose functions return what they are told."""

    def __init__(self, **statuses):
        self.statuses = statuses

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"out of memory"
            return self.statuses.get(name, 0)

        return call


def test_what_the_driver_says_is_passed_on():
    with pytest.raises(RuntimeError, match="CUDA driver: out of memory"):
        library.Kernels(Driver(cuModuleLoadData=2), b"")


@pytest.mark.parametrize("starts_early", [False, True])
def test_what_the_driver_is_told_to_launch(starts_early, monkeypatch):
    class Launching(Driver):
        """Keeps what is launched."""

        def cuLaunchKernelEx(self, launch, function, pointers, extra):  # noqa: N802
            self.launched = launch._obj
            return 0

    driver, stream = Launching(), types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    kernels = library.Kernels(driver, b"")
    kernels.launch("clear", 3, 256, 1000, library._Attribute(), starts_early=starts_early)
    launch = driver.launched
    assert (launch.blocks, launch.blocks_y, launch.blocks_z) == (3, 1, 1)
    assert (launch.threads, launch.threads_y, launch.threads_z) == (256, 1, 1)
    assert (launch.shared_bytes, launch.stream) == (1000, 77)
    asked = [launch.attributes[k] for k in range(launch.attribute_count)]
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert [(attribute.id, attribute.value) for attribute in asked] == [(6, 1)] * starts_early
    assert ctypes.sizeof(library._Attribute) == 72  # CUlaunchAttribute


def test_cpu_tensors_and_machines_without_a_gpu_are_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        selective_scan(*of_rows.make_inputs(1, 2, 1, 5, 1)[:5], backend="cuda")
    with pytest.raises(RuntimeError, match="needs GPU tensors, got cpu"):
        ss2d_scan(**of_maps.make_inputs(1, 2, 1, 1, (2, 2)), backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    library._find_reason.cache_clear()
    try:
        assert library.why_not() == "there is no NVIDIA GPU"
    finally:
        library._find_reason.cache_clear()


def test_a_compiler_does_not_look_into_what_keeps_from_cuda():
    def call(x):
        return x + 1 if library.why_not() else x

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == call(torch.zeros(2)).tolist()


@pytest.mark.parametrize(("reason", "expected"), [(None, "cuda"), ("it is old", "triton")])
def test_auto_takes_cuda_where_it_can(reason, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda: reason)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert dispatch._find_fastest.__wrapped__("cuda", False) == expected
    assert dispatch._find_fastest.__wrapped__("cuda", True) == "chunked"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("sizes", [*ROWS, *of_rows.LARGE], ids=str)
    def test_rows_equal_reference(self, sizes):
        truth = selective_scan_reference if sizes[3] < 100 else selective_scan_chunked
        assert_rows(of_rows.make_inputs(*sizes, device="cuda"), 1e-5, truth=truth)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("sizes", of_rows.LARGE, ids=str)
    def test_half_precision(self, sizes, dtype):
        inputs = of_rows.make_inputs(*sizes, dtype, "cuda")
        assert_rows(inputs, of_rows.TOLERANCE[dtype], truth=selective_scan_chunked)

    @pytest.mark.parametrize("order", ["cross", "window"])
    @pytest.mark.parametrize("sizes", [*MAPS, *of_maps.LARGE], ids=str)
    def test_maps_equal_reference(self, sizes, order):
        inputs = of_maps.make_inputs(*sizes, device="cuda")
        assert_maps(inputs, 1e-5, order, truth="chunked")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("sizes", of_maps.LARGE, ids=str)
    def test_maps_of_half_precision(self, sizes, dtype):
        inputs = of_maps.make_inputs(*sizes, dtype, device="cuda")
        assert_maps(inputs, of_maps.TOLERANCE[dtype], "cross", truth="chunked")

    def test_maps_under_autocast_keep_the_state_in_float32(self):
        inputs = of_maps.make_inputs(1, 96, 4, 6, (40, 60), device="cuda")
        truth = ss2d_scan(**{k: v.double() for k, v in inputs.items()}, backend="chunked")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = ss2d_scan(**inputs, backend="cuda")
        assert errors([y], [truth])[0] < of_maps.TOLERANCE[torch.bfloat16]

    def test_a_thread_that_is_new_to_the_device(self):
        """As autograd's: it has no context until somebody gives it one."""
        inputs = of_maps.make_inputs(1, 8, 2, 1, (12, 16), device="cuda")
        expected = ss2d_scan(**inputs, backend="cuda").detach().cpu()
        found = []
        thread = threading.Thread(target=lambda: found.append(ss2d_scan(**inputs, backend="cuda")))
        thread.start()
        thread.join()
        assert torch.equal(found[0].detach().cpu(), expected)

    @pytest.mark.parametrize("order", ["cross", "window"])
    def test_maps_are_deterministic_and_replay_in_a_graph(self, order):
        inputs = of_maps.make_inputs(2, 96, 4, 6, (60, 80), device="cuda")
        expected = of_maps.run(inputs, scan=order, backend="cuda")
        again = of_maps.run(inputs, scan=order, backend="cuda")
        assert all(torch.equal(expected[name], again[name]) for name in expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = ss2d_scan(**inputs, scan=order, backend="cuda")
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected["y"])

    @pytest.mark.parametrize("sizes", [(1, 5, 8, 1000, 1), (4, 384, 1, 3000, 4)], ids=str)
    def test_extreme_decays(self, sizes):
        inputs = of_rows.extreme_inputs(*sizes, device="cuda")
        assert_rows(inputs, 1e-5, softplus=False, truth=selective_scan_chunked)

    @pytest.mark.parametrize("states", [1, 2])
    def test_no_drift_over_a_million_tokens(self, states):
        inputs = of_rows.make_inputs(1, 2, states, 1_000_000, 1, device="cuda")
        inputs[2] *= 1e-4  # states that remember some ten thousand tokens
        assert_rows(inputs, 1e-5, truth=selective_scan_chunked)

    @pytest.mark.parametrize("states", [1, 16])
    def test_is_deterministic(self, states):
        inputs = of_rows.make_inputs(2, 96, states, 5000, 1, device="cuda")
        first, *others = (of_rows.run(rows.selective_scan_cuda, inputs) for _ in range(5))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

    def test_compiles_under_autocast(self):
        inputs = of_rows.make_inputs(1, 32, 8, 300, 2, torch.bfloat16, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            compiled = torch.compile(rows.selective_scan_cuda, fullgraph=True)
            ours = of_rows.run(compiled, inputs)
            eager = of_rows.run(rows.selective_scan_cuda, inputs)
        for result, expected in zip(ours, eager, strict=True):
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)

    @pytest.mark.parametrize("states", [1, 8])
    def test_replays_in_a_graph(self, states):
        inputs = of_rows.make_inputs(1, 32, states, 3000, 2, device="cuda")
        expected = of_rows.run(rows.selective_scan_cuda, inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        weight = torch.sin(torch.arange(inputs[0].numel(), dtype=torch.float64, device="cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = rows.selective_scan_cuda(*leaves, True)
            results = [y, *torch.autograd.grad(y, leaves, weight.view_as(y).float())]
        for _ in range(3):
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
