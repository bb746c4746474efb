"""Seeds, and the state of the random generators that a checkpoint keeps."""

import random

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), and numpy and random for libraries that draw from them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Tensor]:
    """The state of torch's generators on the CPU and, where it is in use, on the current GPU.

    Only these draw numbers during training (drop path, dropout); data is sampled from generators
    of its own.
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Go on from what rng_state() gave; a GPU state is skipped where no GPU is in use."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
