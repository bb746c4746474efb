"""Shared fixtures: the data and parity folders beside the checkout, a small config and data set."""

import html
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import Config, load_config

torch.set_num_threads(1)  # the tests run in parallel processes, one a core

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
# Added to a copy of a page: writes what the browser has drawn into the page itself.
_PROBE = """<script>addEventListener("load", () => {
  const has_area = element => {
    const box = element.getBoundingClientRect();
    return box.width * box.height > 0;
  };
  const facts = {
    title: document.title,
    text: document.body.innerText,
    images: Object.fromEntries([...document.images].map(
      i => [i.alt, i.complete && has_area(i) ? [i.naturalWidth, i.naturalHeight] : null])),
    charts: [...document.querySelectorAll("svg")].filter(has_area).map(s => s.classList.value),
    requests: performance.getEntriesByType("resource").map(r => r.name)
      .filter(name => !name.startsWith("data:")),
    is_too_wide: document.documentElement.scrollWidth > innerWidth,
  };
  document.body.innerHTML = '<pre id="facts"></pre>';
  document.getElementById("facts").textContent = JSON.stringify(facts);
});</script>"""

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared_folder(name: str) -> Path:
    folder = _SHARED / name
    if not folder.is_dir():
        pytest.skip(f"../shared/{name} is not on this machine")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    return _shared_folder("parity")


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn scenes of 64x96 in the standard layout: 8 train, 2 val, 2 test."""
    from dataloader.synthetic import write_dataset

    folder = tmp_path_factory.mktemp("datasets") / "Demo"
    write_dataset(folder, counts={"train": 8, "val": 2, "test": 2}, height=64, width=96, seed=1)
    return folder


@pytest.fixture(autouse=True)
def restored_logging():
    """Scripts set up the root logger; later tests get it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def demo_config(demo_dataset: Path, tmp_path: Path) -> Config:
    return load_config(
        "demo",
        [
            f"data.dataset_path={demo_dataset}",
            f"experiment_path={tmp_path / 'experiment'}",
            "train.crop=[64,96]",
            "train.batch_size=2",
            "eval.batch_size=2",
            "train.save_every_s=0",
        ],
    )


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """Start a real browser without a screen: browser(page, *flags) gives what it prints."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on this machine")

    def start(page: Path, *flags: str) -> str:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", "--window-size=1400,2400", "--force-color-profile=srgb",
            f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri(),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return start


@pytest.fixture
def look_at(browser: Callable[..., str], tmp_path: Path) -> Callable[[Path], dict[str, Any]]:
    """What a browser shows of a page of HTML: look_at(page) gives the facts of _PROBE."""

    def look(page: Path) -> dict[str, Any]:
        probed = tmp_path / "probed.html"
        probed.write_text(page.read_text(encoding="utf-8") + _PROBE, encoding="utf-8")
        dump = browser(probed, "--dump-dom")
        return json.loads(html.unescape(re.search('<pre id="facts">(.*)</pre>', dump)[1]))

    return look
