"""What a result was made with: versions, devices, commit."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh"}
_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "opencv-python-headless",
    "pydantic",
    "open_clip_torch",
    "mamba-ssm",
    "causal-conv1d",
)


def environment_info() -> dict[str, Any]:
    """Versions, devices, git commit and command line, ready for JSON; no name of user or host."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }


def git_commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None without git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


@functools.cache
def code_sha256() -> str:
    """Of the project's own source files: what a commit says, also of edited or unpacked ones."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in ("configs", "dataloader", "engine", "models", "utils"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SOURCE_SUFFIXES:
                digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
