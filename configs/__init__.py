"""Typed configs: configs.load_config(name_or_path, overrides) gives the whole tree."""

from configs.loader import ConfigError, available_names, dump_config, load_config
from configs.schema import Config

__all__ = ["Config", "ConfigError", "available_names", "dump_config", "load_config"]
