"""Checks the arguments of the selective scan and hands them to a backend."""

import functools
import logging
from typing import Literal, get_args

import torch
from torch import Tensor

from models.ops.cuda.library import why_not
from models.ops.native.library import load_library
from models.ops.selective_scan.chunked import selective_scan_chunked
from models.ops.selective_scan.cuda import selective_scan_cuda
from models.ops.selective_scan.native import selective_scan_native
from models.ops.selective_scan.reference import selective_scan_reference
from models.ops.triton_support import has_triton

log = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "chunked", "native", "cuda", "triton", "mamba_ssm"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Selective state-space scan (S6; Gu and Dao, Mamba, 2023, Algorithm 2).

    dt = softplus(delta + delta_bias); h_l = exp(dt_l·A) h_{l-1} + dt_l·B_l·u_l;
    y_l = Σ_n C_l[n] h_l[n] + D·u_l. Arguments as in mamba-ssm's selective_scan_fn.

    Args:
        u, delta: (batch, D, L), any floating dtype.
        A: (D, N), negative for a stable system.
        B, C: (batch, K, N, L); channel d belongs to group d // (D / K).
        D, delta_bias: (D,).
        backend: one of BACKENDS; "auto" takes the fastest that runs on u's device.
    Returns:
        (batch, D, L) in u's dtype; the state is float32 (float64 for float64 u).
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown backend.
        RuntimeError: a backend asked for by name cannot run here.
    """
    _check(u, delta, A, B, C, D, delta_bias)
    if backend == "auto":
        backend = fastest_backend(u.device.type, u.dtype == torch.float64)
    scan = _implementation(backend, u.device.type)
    return scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


@torch.compiler.assume_constant_result
def fastest_backend(device_type: str, is_float64: bool) -> str:
    """What "auto" takes. A compiler need not look into how it is found."""
    return _find_fastest(device_type, is_float64)


@functools.cache  # so that the log says it once
def _find_fastest(device_type: str, is_float64: bool) -> str:
    if is_float64:
        backend = "chunked"  # the only fast one with a state of float64
    elif device_type == "cuda" and why_not() is None:
        backend = "cuda"
    elif device_type == "cuda" and has_triton():
        backend = "triton"
    elif device_type == "cpu" and load_library() is not None:
        backend = "native"
    else:
        backend = "chunked"
    log.info("selective scan on %s: backend %s", device_type, backend)
    return backend


def _implementation(backend: str, device_type: str):
    if backend == "reference":
        return selective_scan_reference
    if backend == "chunked":
        return selective_scan_chunked
    if backend == "native":
        return selective_scan_native
    if backend == "cuda":
        return selective_scan_cuda
    if backend == "triton":
        return _triton()
    if backend == "mamba_ssm":
        return _mamba_ssm(device_type)
    raise ValueError(f"unknown scan backend '{backend}'; known: {', '.join(BACKENDS)}")


def _triton():
    try:
        from models.ops.selective_scan.triton import selective_scan_triton
    except ImportError as error:
        raise RuntimeError(
            "scan backend 'triton' needs the package triton, which comes with PyTorch on Linux"
        ) from error
    return selective_scan_triton


def _mamba_ssm(device_type: str):
    """mamba-ssm's compiled CUDA kernel with our argument order."""
    if device_type != "cuda":
        raise RuntimeError(f"scan backend 'mamba_ssm' needs CUDA tensors, got {device_type}")
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise RuntimeError(
            "scan backend 'mamba_ssm' needs the package: pip install -r requirements-cuda.txt"
        ) from error

    def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
        vectors = [None if v is None else v.float() for v in (D, delta_bias)]
        return selective_scan_fn(
            u,
            delta.to(u.dtype),
            A.float(),
            B.to(u.dtype),
            C.to(u.dtype),
            vectors[0],
            delta_bias=vectors[1],
            delta_softplus=delta_softplus,
        )

    return scan


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or delta.shape != u.shape:
        raise ValueError(
            f"u and delta must be (batch, D, L), got {tuple(u.shape)} and {tuple(delta.shape)}"
        )
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be ({channels}, N), got {tuple(A.shape)}")
    states = A.shape[1]
    for name, matrix in (("B", B), ("C", C)):
        if matrix.dim() != 4 or matrix.shape != (batch, B.shape[1], states, length):
            raise ValueError(
                f"{name} must be ({batch}, K, {states}, {length}), got {tuple(matrix.shape)}"
            )
    if B.shape[1] < 1 or channels % B.shape[1]:
        raise ValueError(f"K = {B.shape[1]} groups do not divide D = {channels} channels")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} must be ({channels},), got {tuple(vector.shape)}")
    if not torch.is_floating_point(u):
        raise ValueError(f"u must be real floating point, got {u.dtype}")
    others = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")
        if not torch.is_floating_point(tensor):
            raise ValueError(f"{name} must be real floating point, got {tensor.dtype}")
