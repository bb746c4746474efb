"""What the program must never do with a user's files and text, read from its source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not path.relative_to(ROOT).parts[0].startswith(".")
    and path.relative_to(ROOT).parts[0] not in {"tests", "experiment", "datasets", "pretrained"}
]

UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"pickle.UnpicklingError"}  # what a refused file raises
UNSAFE_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "numpy.fromfile", "tempfile.mktemp",
}  # fmt: skip
SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def found_in(source: str) -> list[str]:
    """Every unsafe thing in a piece of code, with its line."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (what := _unsafe_call(node, names)):
            found.append(f"{node.lineno}: {what}")
        elif isinstance(node, ast.Attribute | ast.Name):
            what = _full_name(node, names)
            if "." in what and what.split(".")[0] in UNSAFE_MODULES and what not in HARMLESS:
                found.append(f"{node.lineno}: {what}")
    return found


def _unsafe_call(node: ast.Call, names: dict[str, str]) -> str | None:
    called = _full_name(node.func, names)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if called in UNSAFE_CALLS:
        return called
    shell = keywords.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        return "a shell"
    if called == "yaml.load":
        given = [*node.args[1:], *keywords.values()]
        loaders = {_full_name(value, names).rpartition(".")[2] for value in given}
        return None if loaders & SAFE_LOADERS else "yaml.load without a safe loader"
    if called == "torch.load" and not _is_true(keywords.get("weights_only")):
        return "torch.load without weights_only"
    if called == "numpy.load" and _is_true(keywords.get("allow_pickle")):
        return "numpy.load of pickles"
    if called.endswith((".extractall", "unpack_archive")) and "filter" not in keywords:
        return "an archive unpacked as it likes"
    return None


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """The dotted name that an expression stands for, by its module's own name."""
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_files_and_no_shell(path):
    assert found_in(path.read_text(encoding="utf-8")) == []


def test_every_room_is_read():
    rooms = {path.relative_to(ROOT).parts[0] for path in SOURCES}
    assert rooms >= {"configs", "dataloader", "engine", "models", "tools", "utils", "train.py"}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(data)",
        "import pickle as p\nread = p.Unpickler",
        "from joblib import load\nload(path)",
        "eval(text)",
        "import os\nos.system(text)",
        "from os import popen as run\nrun(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess as s\ns.Popen(text, shell=flag)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "import shutil\nshutil.unpack_archive(path)",
    ],
)
def test_each_rule_finds_its_mistake(code):
    assert len(found_in(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "import pickle\nexpected = pickle.UnpicklingError",
        "import re\nre.compile(text)",
        "import torch\ntorch.compile(model)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.CSafeLoader)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import subprocess\nsubprocess.run([program, text])",
        "import numpy as np\nnp.load(path)",
    ],
)
def test_what_is_safe_passes(code):
    assert found_in(code) == []
