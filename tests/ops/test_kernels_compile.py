"""The Triton kernels compile for a GPU, on a machine without one.

The interpreter takes what the compiler refuses: a size of 1, which becomes a constant without
tensor methods, or a constant assigned twice.
"""

import inspect
import os

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed here")
compiler = pytest.importorskip("triton.backends.compiler", reason="this triton is too old")

from models.ops.channel_norm import kernels as norms  # noqa: E402
from models.ops.depthwise import kernels as planes  # noqa: E402
from models.ops.epilogue import kernels as epilogues  # noqa: E402
from models.ops.mamba_path import kernels as paths  # noqa: E402
from models.ops.padding import kernels as paddings  # noqa: E402
from models.ops.phase import kernels as phases  # noqa: E402
from models.ops.resize import kernels as resizes  # noqa: E402
from models.ops.selective_scan import kernels as rows  # noqa: E402
from models.ops.sobel import kernels as sobels  # noqa: E402
from models.ops.ss2d_scan import kernels as maps  # noqa: E402
from models.ops.ss2d_scan import products  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1"
    or not hasattr(compiler, "GPUTarget")
    or "constexprs" not in inspect.signature(triton.compiler.ASTSource).parameters,
    reason="this triton does not compile for an absent GPU, or by other names (before 3.3)",
)

SIZES = {"length", "channels", "groups", "R", "N", "chunks", "blocks", "batches", "splits", "rows"}
SIZES |= {"reversed_sets", "columns", "tiles", "rounds", "stride", "z_stride"}
SIZES |= {"outer_stride", "middle_stride", "inner_stride", "middle", "inner"}
SIZES |= {"weight_outer_stride", "weight_middle_stride", "weight_inner_stride"}
SIZES |= {"height", "width", "strips", "x_stride", "grad_stride"}
SIZES |= {"residual_stride", "planes", "new_width", "padded_width", "left", "top", "frequencies"}
INDICES = {"pixels", "steps"}
FLOAT32 = {"A", "ends", "spans", "states", "gradients", "grad_rows", "grad_matrices", "parts"}
FLOAT32 |= {"mean", "rstd", "of_x", "of_weight"}
SCALARS = {"eps", "row_scale", "column_scale"}
TILE = {"ROWS": 2, "LANES": 32, "STEPS": 2}
WARPS = {"ROWS": 8, "WARPS": 4}  # two rows in each warp
ABSENT = {"ACTIVATION": None, "bias": None, "factor": None}
MAPS = {"ROWS": 4, "PIXELS": 128}
PLANES = {"PLANES": 4, "PIXELS": 128}
PRODUCT = {"ROWS": 64, "COLUMNS": 128, "TOKENS": 32}
GRADIENTS = {"ROWS": 64, "COLUMNS": 16, "TOKENS": 64}
LANES = {"KH": 3, "KW": 3, "PAIR": 4, "ROWS": 4, "LANES": 32}
EPILOGUES = (epilogues._epilogue_kernel, epilogues._epilogue_gradient_kernel)
CASES = [
    (rows._chunk_ends_kernel, {"SOFTPLUS": True, "REVERSE": True, **TILE}),
    (rows._carry_kernel, {"WIDTH": 64, "DEPTH": 16}),
    (rows._output_kernel, {"STREAM": True, "SOFTPLUS": True, "CHUNK": 64, **TILE}),
    (rows._output_kernel, {"STREAM": False, "SOFTPLUS": False, "CHUNK": 64, **TILE}),
    (rows._gradient_kernel, {"SOFTPLUS": True, **TILE, **WARPS}),
    (maps._map_ends_kernel, {"GRADIENT": True, **TILE}),
    (maps._map_output_kernel, {"STREAM": True, **TILE}),
    (maps._map_output_kernel, {"STREAM": False, **TILE}),
    (maps._map_gradient_kernel, {**TILE, **WARPS}),
    (products._long_product_kernel, {"PRECISION": "ieee", **PRODUCT}),
    (products._long_product_kernel, {"PRECISION": "tf32", **PRODUCT}),
    (products._linear_gradients_kernel, {"PRECISION": "ieee", **GRADIENTS}),
    (products._linear_gradients_kernel, {"PRECISION": "tf32", **GRADIENTS}),
    (maps._to_orders_kernel, {"ROWS": 4, "TOKENS": 128}),
    (maps._from_orders_kernel, {"ROWS": 4, "TOKENS": 128}),
    (norms._norm_kernel, {"CHANNELS": 32, "PIXELS": 16}),
    (norms._norm_kernel, {"bias": None, "CHANNELS": 32, "PIXELS": 16}),
    (norms._norm_gradient_kernel, {"CENTERED": True, "CHANNELS": 32, "PIXELS": 16}),
    (norms._norm_gradient_kernel, {"CENTERED": False, "CHANNELS": 32, "PIXELS": 16}),
    (paths._conv_kernel, {"WIDTH": 4, "FLIP": True, "ROWS": 4, "TOKENS": 128}),
    (paths._conv_gradient_kernel, {"WIDTH": 4, "FLIP": True, "ROWS": 4, "TOKENS": 128}),
    (paths._conv_input_gradient_kernel, {"WIDTH": 4, "FLIP": True, "ROWS": 4, "TOKENS": 128}),
    (paths._gate_kernel, {"ROWS": 4, "TOKENS": 128}),
    (paths._gate_gradient_kernel, {"ROWS": 4, "TOKENS": 128}),
    (planes._conv_kernel, {"SILU": True, "FLIP": False, **LANES}),
    (planes._conv_kernel, {"SILU": False, "FLIP": True, **LANES, "bias": None, "PAIR": 0}),
    (planes._sums_kernel, {"SILU": True, **LANES}),
    (planes._sums_kernel, {"SILU": False, **LANES, "bias": None, "KW": 11, "KH": 1}),
    (resizes._resize_kernel, PLANES),
    (paddings._pad_kernel, PLANES),
    (paddings._pad_gradient_kernel, {"LEFT": 1, "RIGHT": 1, "TOP": 1, "BOTTOM": 1, **PLANES}),
    (paddings._pad_gradient_kernel, {"LEFT": 0, "RIGHT": 3, "TOP": 0, "BOTTOM": 0, **PLANES}),
    (sobels._sobel_kernel, PLANES),
    (sobels._sobel_gradient_kernel, PLANES),
    *(
        (kernel, {"ACTIVATION": activation, "VECTOR": vector, **MAPS})
        for kernel in EPILOGUES
        for activation, vector in (("gelu", 4), ("relu", 1), ("silu", 8))
    ),
    (epilogues._epilogue_kernel, {**ABSENT, "residual": None, "VECTOR": 4, **MAPS}),
    (
        epilogues._epilogue_gradient_kernel,
        {**ABSENT, "x": None, "grad_x": None, "VECTOR": 4, **MAPS},
    ),
    (
        epilogues._epilogue_gradient_kernel,
        {"ACTIVATION": "gelu", "bias": None, "parts": None, "VECTOR": 4, **MAPS},
    ),
]


def name_of(case):
    kernel, constants = case
    kinds = [k if v is True else v for k, v in constants.items() if v is True or isinstance(v, str)]
    return "-".join([kernel.__name__, *kinds])


@pytest.mark.parametrize(("dtype", "are_one"), [("fp32", True), ("bf16", False)])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_compiles(case, dtype, are_one, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = case
    constants = constants | {name: 1 for name in kernel.arg_names if are_one and name in SIZES}
    assert len(compiled(kernel, constants, dtype)["cubin"]) > 0


@pytest.mark.parametrize(
    "kernel",
    [phases._with_magnitude_kernel, phases._with_magnitude_gradient_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_spectra_compile_in_float32(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert len(compiled(kernel, {"BLOCK": 128}, "fp32")["cubin"]) > 0


@pytest.mark.parametrize(("dtype", "vector"), [("fp32", 4), ("bf16", 8)])
@pytest.mark.parametrize("kernel", EPILOGUES, ids=lambda kernel: kernel.__name__)
def test_maps_are_moved_16_bytes_at_a_time(kernel, dtype, vector, tmp_path, monkeypatch):
    """Though one kernel serves all sizes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"ACTIVATION": "gelu", "VECTOR": vector, "ROWS": 4, "PIXELS": 256}
    code = compiled(kernel, constants, dtype, are_aligned=True)["ptx"]
    assert code.count("ld.global.v4.b32") >= 2
    assert "st.global.v4.b32" in code


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("columns", [6, 32, 64, 128])
def test_gradients_of_products_fit_into_99_kilobytes(columns, precision, tmp_path, monkeypatch):
    """Of shared memory, as a block has on a GPU of compute capability 8.6."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, columns, tokens, _ = products._shape_of_gradients(1024, columns, precision)
    constants = {"ROWS": rows, "COLUMNS": columns, "TOKENS": tokens, "PRECISION": precision}
    kernel = products._linear_gradients_kernel
    aligned = {"gradient", "x", "weight", "of_x", "of_weight", "length"}
    code = compile_kernel(kernel, constants, "fp32", aligned, warps=4, capability=86)
    assert 0 < code.metadata.shared <= 99 * 1024


def compiled(kernel, constants, dtype, *, are_aligned=False):
    """Code of a kernel, by its form; with are_aligned, pointers are multiples of 16."""
    pointers = set(kernel.arg_names) - SIZES - SCALARS - constants.keys()
    warps = constants.get("WARPS", 1)
    return compile_kernel(kernel, constants, dtype, pointers if are_aligned else (), warps).asm


def compile_kernel(kernel, constants, dtype, aligned, warps, capability=90):
    """Arguments named in `aligned` are multiples of 16."""
    kinds = {}
    for name in kernel.arg_names:
        pointer = "*i32" if name in INDICES else "*fp32" if name in FLOAT32 else f"*{dtype}"
        kind = "i32" if name in SIZES else "fp32" if name in SCALARS else pointer
        kinds[name] = "constexpr" if name in constants else kind
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    target = compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps}
    return triton.compile(source, target=target, options=options)
