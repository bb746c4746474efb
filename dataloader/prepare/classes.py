"""The classes of a set of the user's own, and the config file that names them."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from configs import Config, load_config
from configs.schema import DataConfig
from dataloader.prepare.labels import LabelValues, merge_values, values_of
from dataloader.prepare.plan import Plan
from dataloader.prepare.source import Source
from utils.errors import InputError

CONFIG_FILE = "config.yaml"  # in a prepared custom set, for -n


def find_classes(
    source: Source, plan: Plan, *, is_binary: bool, on_label: Callable[[], object]
) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and palette of what the labels of a plan hold; two stand-ins without labels.

    Raises:
        InputError: what values_of and merge_values find, or a single class.
    """
    values = LabelValues({0, 1}, set())
    if plan.has_labels:
        values = merge_values(_read_values(source, plan, is_binary, on_label))
    if values.colors:
        colors = sorted(values.colors)
        names = [f"class {i} ({', '.join(map(str, c))})" for i, c in enumerate(colors)]
    else:
        count = max(values.indices, default=0) + 1
        colors = distinct_colors(count)
        names = ["background", *(f"class {index}" for index in range(1, count))]
    if len(colors) < 2:
        raise InputError(f"{source.path}: all labels hold one class alone; nothing can be learnt")
    return names, colors


def custom_config(
    out: Path, names: Sequence[str], palette: Sequence[Sequence[int]]
) -> tuple[DataConfig, str]:
    """The data section of a set of one's own at `out`, and its config file as text."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", out.name)
    if not name[0].isalnum():
        name = f"Set{name}"
    differences = {
        "name": name,
        "dataset_path": str(out),
        "class_names": list(names),
        "palette": [list(color) for color in palette],
    }
    text = (
        "# Classes as the labels hold them. Give them names: CLIP reads them (data.prompt).\n"
        + yaml.safe_dump({"data": differences}, sort_keys=False, allow_unicode=True, width=1000)
    )
    fields = differences | {"class_names": tuple(names), "palette": tuple(map(tuple, palette))}
    return _any_config().data.model_copy(update=fields), text


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Black, then RGB colours around the circle of hues."""
    hues = np.linspace(0, 2 * np.pi, max(count - 1, 1), endpoint=False)[:, None]
    colors = 127.5 + 127.5 * np.cos(hues + np.array([0, 2, 4]) * np.pi / 3)
    return [(0, 0, 0), *map(tuple, colors.round().astype(int).tolist())][:count]


def _any_config() -> Config:
    """A config whose data section has the standard folders."""
    return load_config("mfnet")


def _read_values(
    source: Source, plan: Plan, is_binary: bool, on_label: Callable[[], object]
) -> Iterator[LabelValues]:
    for pair in plan.pairs.values():
        with source.fetch([pair.label]) as paths:
            values = values_of(paths[0], is_binary=is_binary)
        on_label()
        yield values
