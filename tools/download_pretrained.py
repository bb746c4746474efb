"""Fetch the weights that training starts from into pretrained/.

    python tools/download_pretrained.py vmamba     # VMamba-Tiny, ImageNet: the encoders' start
    python tools/download_pretrained.py clip       # CLIP ViT-B/32: for tools/export_text_prior.py
    python tools/download_pretrained.py all
    python tools/download_pretrained.py clip --url https://a.mirror/ViT-B-32.pt

A stopped transfer goes on where it was when the same command runs again. CLIP is checked against
its published SHA-256. For VMamba none is published: what came is shown, kept in <file>.sha256
(`sha256sum -c` reads it), and from then on the file must have it. A file that lies there already is
checked in the same way and not fetched again. A proxy is taken from https_proxy.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import Parser, run_main
from utils.download import download, file_sha256, is_html
from utils.errors import InputError


class Weights(NamedTuple):
    """One file that can be fetched."""

    url: str
    file: str
    sha256: str | None  # None: its publisher names none


_CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
WEIGHTS = {
    "vmamba": Weights(
        "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"
        "vssm1_tiny_0230s_ckpt_epoch_264.pth",
        "vssm1_tiny_0230s_ckpt_epoch_264.pth",
        None,
    ),
    "clip": Weights(
        f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-B-32.pt",
        "ViT-B-32.pt",
        _CLIP_SHA256,
    ),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WEIGHTS, "all"])
    parser.add_argument(
        "--out", type=Path, default=Path("pretrained"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--url", help="fetch from this address; its checksum must be the same")
    options = parser.parse_args(arguments)
    if options.url and options.what == "all":
        raise InputError("--url is the address of one file; name it: vmamba or clip, not all")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    for name in WEIGHTS if options.what == "all" else [options.what]:
        fetch(WEIGHTS[name], options.out, url=options.url)


def fetch(weights: Weights, folder: Path, *, url: str | None = None) -> None:
    """Bring one file into the folder, or check the one that is there.

    Raises:
        InputError: see utils.download.download; or the present file has another checksum.
    """
    path = folder / weights.file
    note = folder / f"{weights.file}.sha256"
    expected = weights.sha256 or _read_note(note)
    is_new = not path.is_file()
    digest = _download(url or weights.url, path, expected) if is_new else _check(path, expected)
    if expected is None:
        note.write_text(f"{digest}  {weights.file}\n", encoding="ascii")
    state = "fetched" if is_new else "was there already"
    print(f"{path}: {state}, {path.stat().st_size / 1e6:,.1f} MB, SHA-256 {digest}")
    if weights.sha256 is not None:
        print("  this is the published checksum")
    elif expected is not None:
        print(f"  this is the checksum in {note}")
    else:
        print(f"  no checksum is published; this one is kept in {note} and checked from now on")


def _download(url: str, path: Path, expected: str | None) -> str:
    with tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:

        def show(size: int, total: int | None) -> None:
            bar.total = total
            bar.update(size - bar.n)

        return download(url, path, sha256=expected, on_progress=show)


def _check(path: Path, expected: str | None) -> str:
    with open(path, "rb") as file:
        if is_html(file.read(64)):
            raise InputError(f"{path} is a web page, not weights; delete it and run this again")
    digest = file_sha256(path)
    if expected not in (None, digest):
        raise InputError(
            f"{path} has the SHA-256 {digest} instead of {expected}; delete it and run this again"
        )
    return digest


def _read_note(note: Path) -> str | None:
    if not note.is_file():
        return None
    digest = note.read_text(encoding="utf-8", errors="replace").partition(" ")[0].strip().lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise InputError(f"{note} does not begin with a SHA-256; delete it to note it anew")
    return digest


if __name__ == "__main__":
    run_main(main)
