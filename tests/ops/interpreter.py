"""For tests of Triton kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is imported: tests named "interpreted" run in a process of
their own, which one test of their file starts with run_interpreted.
"""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from models.ops.triton_support import INTERPRETED, has_triton

OLD_TRITON = has_triton() and importlib.metadata.version("triton").startswith(("3.0", "3.1", "3.2"))

with_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed here")
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_kernels_in_the_interpreter starts"
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or not (has_triton() and torch.cuda.is_available()),
        reason="needs a CUDA device",
    ),
]


def run_interpreted(file: str) -> None:
    """Pass if all interpreted tests of a file do, in a process where triton is its interpreter."""
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["-o", "addopts=", "--import-mode=importlib", "-k", "interpreted"]
    command = [sys.executable, "-m", "pytest", *options, file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    summary = result.stdout.strip().rpartition("\n")[2]
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in summary, summary
    assert "skipped" not in summary, summary
