"""The scans on this machine: ops_cuda.py where there is a GPU, else ops_cpu.py, with their options.

python benchmarks/ops.py --repeats 9
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ops_cpu, ops_cuda

if __name__ == "__main__":
    (ops_cuda if torch.cuda.is_available() else ops_cpu).main()
