"""Compute a dataset's CLIP text features once: what model.text_prior names.

    python tools/download_pretrained.py clip         # once: pretrained/ViT-B-32.pt
    python tools/export_text_prior.py -n mfnet       # -> pretrained/clip_text_mfnet.safetensors
    python tools/export_text_prior.py -n fmb --clip weights/open_clip_model.safetensors
    python tools/export_text_prior.py -n msrs --clip openai      # open_clip fetches the weights

Each class but class 0 is put into the config's prompt ("the photo of {class}") and encoded by
open_clip's ViT-B-32-quickgelu in float32. The file keeps the unit vectors, the prompts, and the
SHA-256 of the weights.

CLIP weights: OpenAI's TorchScript archive, or a state dict of the same network (.pt, .bin,
.safetensors). OpenAI's weights want quick GELU; those of plain ViT-B-32 (most of LAION's) have the
same names and shapes but another activation, and are refused. An archive tells its activation, and
so does an open_clip_config.json beside a state dict; for a state dict alone you must say it.
"""

import argparse
import importlib.metadata
import json
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import load_config
from models.text_prior import CLIP_MODEL, save_text_prior
from utils.cli import Parser, run_main
from utils.download import file_sha256, is_html
from utils.errors import InputError

DEFAULT_CLIP = Path("pretrained/ViT-B-32.pt")
OPENAI_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_FETCH = "`python tools/download_pretrained.py clip`"
# What OpenAI's archive holds beside weights, and the causal mask that a traced network keeps.
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-n",
        "--dataset_name",
        required=True,
        metavar="NAME",
        help="dataset whose prompts are encoded, or a .yaml file of your own",
    )
    parser.add_argument(
        "--clip",
        default=str(DEFAULT_CLIP),
        metavar="FILE",
        help='CLIP weights, or "openai" (default: %(default)s)',
    )
    parser.add_argument(
        "--quick-gelu",
        action="store_true",
        help="say that a state dict was trained with quick GELU, as OpenAI's are",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: pretrained/clip_text_<name>.safetensors",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help='change config values, e.g. --set data.prompt="a thermal photo of a {}"',
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.dataset_name, options.set)
    data = config.data
    out = options.out or Path("pretrained", f"clip_text_{data.name.lower()}.safetensors")
    if options.clip == "openai":
        path, is_quick_gelu = _fetch_by_open_clip(), True
    else:
        path, is_quick_gelu = Path(options.clip), options.quick_gelu
    features = encode_prompts(data.prompts, read_clip(path, is_quick_gelu=is_quick_gelu))
    sha256 = file_sha256(path)
    is_openai = options.clip == "openai" or sha256 == OPENAI_SHA256
    metadata = {
        "model": CLIP_MODEL,
        "pretrained": "openai" if is_openai else path.name,
        "sha256": sha256,
        "open_clip": importlib.metadata.version("open_clip_torch"),
    }
    save_text_prior(out, features, data.prompts, metadata)
    print(f"{out}: {len(data.prompts)} prompts, {CLIP_MODEL}, {metadata['pretrained']}")
    print(f"  weights {path}, SHA-256 {sha256}")
    if Path(config.text_prior) != out:
        print(f"  to use it: --set model.text_prior={out}")


def encode_prompts(prompts: Sequence[str], weights: Mapping[str, Tensor]) -> Tensor:
    """Unit text features of CLIP ViT-B/32 with quick GELU: (Q, 512) float32.

    Args:
        weights: every tensor of the network, as read_clip gives them.
    """
    network = open_clip.CLIP(**open_clip.get_model_config(CLIP_MODEL)).eval()
    network.load_state_dict(weights)
    tokens = open_clip.get_tokenizer(CLIP_MODEL)(list(prompts))
    with torch.no_grad():
        return F.normalize(network.encode_text(tokens), dim=-1)


def read_clip(path: Path, *, is_quick_gelu: bool = False) -> dict[str, Tensor]:
    """Read and check a file of CLIP ViT-B/32 weights.

    Args:
        is_quick_gelu: the user's word for a state dict that does not tell its activation.
    Returns:
        Exactly the tensors of open_clip's network.
    Raises:
        InputError: missing, a web page, cut short, another network, another activation.
    """
    if not path.is_file():
        raise InputError(f"CLIP weights {path} not found; run {_FETCH}, or name a file with --clip")
    with open(path, "rb") as file:
        if is_html(file.read(64)):
            raise InputError(f"{path} is a web page, not CLIP weights; delete it and run {_FETCH}")
    weights, activation = _read_file(path)
    _check_network(path, weights)
    if activation == "gelu":
        raise InputError(
            f"{path} was trained with plain GELU (open_clip's ViT-B-32); CMFS wants weights with "
            f"quick GELU ({CLIP_MODEL}), such as OpenAI's: run {_FETCH}"
        )
    if activation is None and not is_quick_gelu:
        raise InputError(
            f"{path} is a state dict, which does not tell its activation, and CMFS wants quick "
            f"GELU; run {_FETCH} for OpenAI's archive, or say --quick-gelu if you know it"
        )
    return weights


def _fetch_by_open_clip() -> Path:
    tag = open_clip.get_pretrained_cfg(CLIP_MODEL, "openai")
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # a hub's client fails in its own many ways
        raise InputError(
            f"open_clip could not fetch OpenAI's weights ({type(error).__name__}); run {_FETCH}"
        ) from error


def _read_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors and, where the file tells it, the activation ("quick_gelu" or "gelu")."""
    try:
        if _is_archive(path):
            return _read_archive(path)
        content = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # inside a damaged file a reader can fail in any way
        raise InputError(
            f"{path} cannot be read: it is cut short, or holds more than tensors "
            f"({type(error).__name__}); delete it and run {_FETCH}"
        ) from error
    return _tensors(content), _activation_beside(path)


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which keeps its constants apart."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_archive(path: Path) -> tuple[dict[str, Tensor], str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is how OpenAI ships it
        network = torch.jit.load(path, map_location="cpu")
    encode_text = getattr(network, "encode_text", None)
    graph = str(encode_text.inlined_graph) if encode_text else ""
    activation = None
    if "aten::gelu" in graph:
        activation = "gelu"
    elif "aten::sigmoid" in graph:  # x · sigmoid(1.702 x)
        activation = "quick_gelu"
    return _tensors(network.state_dict()), activation


def _tensors(content: Any) -> dict[str, Tensor]:
    """The named tensors of a state dict, a training checkpoint or an archive; {} if none."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return {}
    named = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and name not in _NO_WEIGHTS
    }


def _activation_beside(path: Path) -> str | None:
    """What open_clip's own config in the same folder says, as in a folder from a hub."""
    config = path.with_name("open_clip_config.json")
    if not config.is_file():
        return None
    try:
        model = json.loads(config.read_text(encoding="utf-8"))["model_cfg"]
        return "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{config} is no config of open_clip; move it away") from error


def _check_network(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Names and shapes must be those of open_clip's network, all of them and no more."""
    with torch.device("meta"):
        expected = open_clip.CLIP(**open_clip.get_model_config(CLIP_MODEL)).state_dict()
    differences = {
        "it lacks": [name for name in expected if name not in weights],
        "it adds": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    found = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in differences.items()
        if names
    ]
    if found:
        raise InputError(
            f"{path} holds another network than CLIP ViT-B/32 ({'; '.join(found)}); run {_FETCH}"
        )


if __name__ == "__main__":
    run_main(main)
