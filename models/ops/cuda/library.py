"""CUDA kernels compiled at first use by NVRTC, cached, and launched on tensors.

NVRTC, NVIDIA's run-time compiler, comes with PyTorch's CUDA builds: nothing is compiled at install,
and no toolkit is needed. A compiled kernel is kept in the user's cache folder, under a name that
holds what it was made from and for.
"""

import ctypes
import functools
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from models.ops.compile_cache import cache_path, fill_cache

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_LEAST_CAPABILITY = (7, 0)  # of a GPU: loads and stores that others see in order
_SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_EARLY_CAPABILITY = (9, 0)  # of a GPU that starts a kernel while the one before it ends
_EARLY_DRIVER = 12_030  # and of a driver that can record that in a graph


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int),
                ("rest", ctypes.c_int * 15)]  # fmt: skip


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_EARLY = ctypes.pointer(_Attribute(id=6, value=1))


class _Launch(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in (
            "blocks", "blocks_y", "blocks_z", "threads", "threads_y", "threads_z", "shared_bytes",
        )),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


class Kernels:
    """The compiled functions of one source, for one device."""

    def __init__(self, driver: ctypes.CDLL, image: bytes) -> None:
        self._driver = driver
        self._context = ctypes.c_void_p()
        self._module = ctypes.c_void_p()
        self._image = image  # as long as the module
        self._check(driver.cuCtxGetCurrent(ctypes.byref(self._context)))
        self._check(driver.cuModuleLoadData(ctypes.byref(self._module), image))
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}

    def launch(
        self,
        name: str,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        *,
        starts_early: bool,
    ) -> None:
        """Start a kernel that takes `arguments` on the current stream.

        starts_early: it waits for the kernel before it by itself.
        """
        # a thread that has not used the device yet, as autograd's, has no context
        self._check(self._driver.cuCtxSetCurrent(self._context))
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = ctypes.c_void_p()
            self._check(
                self._driver.cuModuleGetFunction(
                    ctypes.byref(function), self._module, name.encode()
                )
            )
        if shared_bytes > self._shared_bytes.get(name, 0):
            self._check(
                self._driver.cuFuncSetAttribute(function, _SHARED_BYTES_ATTRIBUTE, shared_bytes)
            )
            self._shared_bytes[name] = shared_bytes
        stream = torch.cuda.current_stream().cuda_stream
        launch = _Launch(
            blocks, 1, 1, threads, 1, 1, shared_bytes, stream, _EARLY, int(starts_early)
        )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(launch), function, pointers, None))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode() if text.value else f"error {status}"
            raise RuntimeError(f"CUDA driver: {said}")


def check_tensor(x: Tensor) -> None:
    """Raise a RuntimeError where the CUDA kernels cannot run on x."""
    if not x.is_cuda:
        raise RuntimeError(f"scan backend 'cuda' needs GPU tensors, got {x.device}")
    if x.dtype == torch.float64:
        raise RuntimeError("scan backend 'cuda' has a float32 state; use 'chunked' for float64")
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"scan backend 'cuda' cannot run here: {reason}")


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """What keeps the CUDA kernels from being used on the current GPU, or None.

    A compiler need not look into how it is found.
    """
    return _find_reason()


@functools.cache
def _find_reason() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return "the GPU is older than compute capability 7.0"
    try:
        load_kernels(torch.cuda.current_device(), "reorder.cu", ("TOKENS=float",))
    except (OSError, AttributeError, RuntimeError) as error:
        log.info("no CUDA scan: %s", error)
        return str(error)
    return None


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block can have, less what kernels declare for themselves."""
    properties = torch.cuda.get_device_properties(device)
    # an older PyTorch does not tell: what every GPU from compute capability 7.0 on has
    return getattr(properties, "shared_memory_per_block_optin", 65_536) - 1024


@functools.cache
def copies_to_shared(device: torch.device) -> bool:
    """Whether a GPU brings global memory to shared memory while its threads go on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it runs (numbers.cuh: it waits)."""
    version = ctypes.c_int()
    _load_library().cuDriverGetVersion(ctypes.byref(version))
    capability = torch.cuda.get_device_capability(device)
    return capability >= _EARLY_CAPABILITY and version.value >= _EARLY_DRIVER


def launch(
    source: str,
    definitions: tuple[str, ...],
    name: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    arguments: ctypes.Structure,
    like: Tensor,
) -> None:
    """Start kernel `name` of a source in this folder on the current stream of like's device."""
    with torch.cuda.device(like.device):
        kernels = load_kernels(like.device.index, source, definitions)
        kernels.launch(
            name,
            blocks,
            threads,
            shared_bytes,
            arguments,
            starts_early=_starts_early(like.device),
        )


@functools.cache
def load_kernels(device: int, source: str, definitions: tuple[str, ...]) -> Kernels:
    """The kernels of a source in this folder, compiled for a device with macros "NAME=value".

    Raises:
        OSError: PyTorch has no NVRTC, or there is no driver.
        RuntimeError: the compiler or the driver refused; with what it said.
    """
    library = _load_library()
    major, minor = torch.cuda.get_device_capability(device)
    options = (f"--gpu-architecture=sm_{major}{minor}", "--std=c++17",
               *(f"-D{definition}" for definition in definitions))  # fmt: skip
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # makes the context that a module is loaded into
        return _load_kept(library, source, options)


def _load_kept(library: ctypes.CDLL, source: str, options: tuple[str, ...]) -> Kernels:
    """The kernels as they are in the cache, or compiled anew where the driver refuses that."""
    try:
        return Kernels(library, _cached_image(library, source, options))
    except RuntimeError as error:
        log.info("compiling %s again: %s", source, error)
        return Kernels(library, _cached_image(library, source, options, renew=True))


@functools.cache
def _load_library() -> ctypes.CDLL:
    """PyTorch's own door to NVRTC and the driver."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))


def _cached_image(
    library: ctypes.CDLL, source: str, options: tuple[str, ...], *, renew: bool = False
) -> bytes:
    """Machine code of a source; from the cache where it is there, else compiled and put there."""
    texts = {name: (_FOLDER / name).read_bytes() for name in (source, *_header_names())}
    made_for = f"{torch.version.cuda} {options}".encode()
    name = f"{source}-{hashlib.sha256(b''.join(texts.values()) + made_for).hexdigest()[:16]}"
    path = cache_path(name)
    if not renew and path.is_file():
        return path.read_bytes()
    image = _compile(library, source, texts, options)
    try:
        fill_cache(path, lambda target: target.write_bytes(image))
    except OSError as error:
        log.info("the compiled CUDA scan is not kept: %s", error)
    else:
        log.info("compiled the CUDA scan into %s", path)
    return image


def _header_names() -> list[str]:
    return sorted(path.name for path in _FOLDER.glob("*.cuh"))


def _compile(
    library: ctypes.CDLL, source: str, texts: dict[str, bytes], options: tuple[str, ...]
) -> bytes:
    program = ctypes.c_void_p()
    names = _header_names()
    strings = ctypes.c_char_p * len(names)
    headers = strings(*(texts[name] for name in names))
    header_names = strings(*(name.encode() for name in names))
    _check_compiler(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), texts[source], source.encode(), len(names), headers, header_names
        ),
    )
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        # in a thread of its own, which NVRTC of CUDA 12.1 leaves with the locale "C": text is ASCII
        with ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(library.nvrtcCompileProgram, program, len(options), encoded)
            status = compiling.result()
        if status:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            said = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, said)
            raise RuntimeError(f"NVRTC: {said.value.decode(errors='replace').strip()[:2000]}")
        size = ctypes.c_size_t()
        _check_compiler(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check_compiler(library, library.nvrtcGetCUBIN(program, image))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def _check_compiler(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
