"""From base_config.yaml, a dataset's file and --set overrides to one checked Config."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs.schema import Config
from utils.errors import InputError

_FOLDER = Path(__file__).parent
_ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+$|.*:")  # to base 8; to base 60


class ConfigError(InputError):
    """A config that cannot be used; the message is one line for the user."""


def available_names() -> list[str]:
    """Names that -n/--dataset_name takes, from the config_<name>.yaml files."""
    return sorted(path.stem.removeprefix("config_") for path in _FOLDER.glob("config_*.yaml"))


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Read one dataset's config.

    Args:
        name_or_path: a name of available_names(), in any case, or the path of a YAML file that
            holds differences from base_config.yaml (a run's resolved config.yaml is one, too).
        overrides: "section.field=value" texts, values in YAML; later ones win.
    Raises:
        ConfigError: unknown name or key (with the nearest one), wrong type, value out of range.
    """
    tree = _read_yaml(_FOLDER / "base_config.yaml")
    path = _find(name_or_path)
    _merge(tree, _read_yaml(path), source=str(path))
    for override in overrides:
        _merge(tree, _parse_override(override), source=f"--set {override}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML text; load_config reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find(name_or_path: str) -> Path:
    if name_or_path.lower() in available_names():
        return _FOLDER / f"config_{name_or_path.lower()}.yaml"
    path = Path(name_or_path)
    if path.suffix.lower() in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"config file {path} does not exist")
        return path
    names = available_names()
    raise ConfigError(
        f"unknown dataset '{name_or_path}'{_nearest(name_or_path.lower(), names)}; "
        f"known: {', '.join(names)}, or the path of a .yaml file"
    )


def _nearest(word: str, candidates: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def _parse_yaml(text: str) -> Any:
    """The values of a YAML text; a YAMLError also for what YAML reads as nobody means it."""
    _check_node(yaml.compose(text, yaml.SafeLoader), set())
    try:
        return yaml.safe_load(text)
    except ValueError as error:  # of a number such as 0b_
        raise yaml.YAMLError(str(error)) from error


def _check_node(node: yaml.Node | None, checked: set[int]) -> None:
    """Raise a YAMLError where a mapping has a key twice: the loader would drop the first value.

    So it does where YAML takes 010 for 8, 1:30 for 90, or a text for a date.

    checked: ids of the nodes before, since an alias may stand for what it is in.
    """
    if isinstance(node, yaml.ScalarNode):
        kind = node.tag.rpartition(":")[2]
        if kind == "timestamp" or (kind in ("int", "float") and _ODD_NUMBER.match(node.value)):
            raise yaml.MarkedYAMLError(
                problem=f"'{node.value}' is a date, or a number to base 8 or 60, for YAML; write "
                f"numbers without leading zeros, and put texts in quotes",
                problem_mark=node.start_mark,
            )
    if not isinstance(node, yaml.CollectionNode) or id(node) in checked:
        return
    checked.add(id(node))
    is_mapping = isinstance(node, yaml.MappingNode)
    names = set()
    for key, value in node.value if is_mapping else [(None, item) for item in node.value]:
        if isinstance(key, yaml.ScalarNode):
            if key.value in names:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' is there twice", problem_mark=key.start_mark
                )
            names.add(key.value)
        _check_node(value, checked)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = _parse_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"config file {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold sections, got {type(tree).__name__}")
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set takes section.field=value, got '{text}'")
    try:
        tree = _parse_yaml(value)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(f"--set {text}: '{value}' is not a YAML value: {reason}") from error
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _merge(
    tree: dict[str, Any],
    changes: Mapping[Any, Any],
    *,
    source: str,
    schema: type[BaseModel] = Config,
    prefix: str = "",
) -> None:
    """Write changes into tree in place, refusing keys that the schema does not have."""
    for key, value in changes.items():
        field = schema.model_fields.get(key)
        if field is None:
            raise ConfigError(
                f"{source}: unknown key '{prefix}{key}'{_nearest(str(key), schema.model_fields)}"
            )
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: '{prefix}{key}' is a section, not a value; "
                    f"its fields: {', '.join(section.model_fields)}"
                )
            _merge(tree[key], value, source=source, schema=section, prefix=f"{prefix}{key}.")
        else:
            tree[key] = value


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        lines.append(f"{where}: {item['msg']}{got}")
    return "; ".join(lines)
