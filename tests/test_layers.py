"""The rooms: who may import whom, and that no import has an effect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room may import from the project, itself aside.
ALLOWED = {
    "utils": set(),
    "configs": {"utils"},
    "models/ops": {"utils"},
    "models": {"models/ops", "utils", "configs"},
    "dataloader": {"models", "models/ops", "utils", "configs"},
    "engine": {"models", "models/ops", "utils", "configs"},
}
ROOMS = sorted(ALLOWED, key=len, reverse=True)


def room_of(module: str) -> str | None:
    path = module.replace(".", "/")
    return next((room for room in ROOMS if path == room or path.startswith(room + "/")), None)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def source_files() -> list[Path]:
    return [path for room in ("utils", "configs", "models", "dataloader", "engine")
            for path in sorted((ROOT / room).rglob("*.py"))]  # fmt: skip


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_rooms_never_import_higher_ones(path):
    own = room_of(str(path.relative_to(ROOT).with_suffix("")).replace("/", "."))
    for module in imports_of(path):
        target = room_of(module)
        if target is not None and target != own:
            assert target in ALLOWED[own], f"{path.relative_to(ROOT)} imports {module}"
        assert module.split(".")[0] not in {"tools", "tests", "benchmarks", "train", "eval"}


def test_data_folders_are_no_packages():
    """Hugging Face's `datasets` must stay importable."""
    for folder in ("datasets", "pretrained", "experiment"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_importing_everything_has_no_effect():
    """No log handler, environment change, seed, file, warning filter or CUDA context."""
    modules = [
        str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in source_files()
        if p.stem not in {"triton", "kernels"}  # only where Triton is installed
    ]
    scripts = [p.stem for p in ROOT.glob("*.py")]
    code = f"""
import logging, os, random, sys, warnings
import numpy, torch, torchvision, cv2, yaml, pydantic, tqdm, safetensors.torch
import torch.utils.tensorboard
state = torch.get_rng_state(), random.getstate(), dict(os.environ), list(warnings.filters)
handlers, path, files = list(logging.root.handlers), list(sys.path), set(os.listdir("."))
for name in {modules + scripts!r}:
    __import__(name)
assert torch.equal(state[0], torch.get_rng_state()), "torch seeded"
assert state[1] == random.getstate(), "random seeded"
assert state[2] == dict(os.environ), "environment changed"
assert state[3] == list(warnings.filters), "warning filter added"
assert handlers == logging.root.handlers, "log handler added"
assert path == sys.path, "sys.path changed"
assert files == set(os.listdir(".")), "file written"
assert not torch.cuda.is_initialized(), "CUDA touched"
"""
    result = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
