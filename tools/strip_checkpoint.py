"""Make a release file of a checkpoint: network, config and scores, without the training state.

    python tools/strip_checkpoint.py experiment/MFNet/exp/checkpoint/best.pth
    python tools/strip_checkpoint.py epoch-500.pth --out cmfs-mfnet.safetensors

Writes a .safetensors file (default: beside the checkpoint, under its name) and its SHA-256. It
holds no code, no optimiser and no path of this machine, and is read wherever a .pth is: -e of
eval.py and eval_vision.py, --checkpoint of predict.py, engine.checkpoint.load_model. Where the run
kept an average of its weights (train.ema_decay), that is what it holds.
"""

import argparse
import sys
from pathlib import Path, PurePath
from typing import Any

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import load_config
from engine.atomic import read_digest
from engine.checkpoint import load_checkpoint, write_checkpoint
from utils.cli import Parser, run_main
from utils.errors import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, help="default: the checkpoint with .safetensors")
    options = parser.parse_args(arguments)
    out = options.out or options.checkpoint.with_suffix(".safetensors")
    if out.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, got {out}")
    if out.exists():
        raise InputError(f"{out} exists; remove it, or choose another name with --out")
    checkpoint = load_checkpoint(options.checkpoint)
    stripped = checkpoint._replace(
        training_state=None, config=without_local_paths(checkpoint.config)
    )
    write_checkpoint(out, stripped)
    before, after = (path.stat().st_size / 1e6 for path in (options.checkpoint, out))
    values = sum(tensor.numel() for tensor in checkpoint.model.values())
    print(f"{out}: {len(checkpoint.model)} tensors, {values:,} values")
    print(f"{before:.1f} MB -> {after:.1f} MB, epoch {checkpoint.epoch}, step {checkpoint.step}")
    print(f"SHA-256 {read_digest(out)}")


def without_local_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the project's own folders in place of where this machine keeps its data."""
    base = load_config("demo").model_dump(mode="json")
    data = config["data"] | {"dataset_path": base["data"]["dataset_path"]}
    model = dict(config["model"])
    for key in ("pretrained", "text_prior"):
        if model[key] not in (None, "orthogonal"):
            model[key] = f"pretrained/{PurePath(model[key]).name}"
    return config | {"experiment_path": base["experiment_path"], "data": data, "model": model}


if __name__ == "__main__":
    run_main(main)
