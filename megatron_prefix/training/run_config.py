"""A run's YAML file, checked by its sections and by Megatron."""

from __future__ import annotations

from pathlib import Path

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import load_yaml
from megatron_prefix.model.transformer_config import transformer_config


def load_run_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML file; `overrides` are section.key=value.

    Raises:
        ConfigError: an unknown key, wrong type or impossible combination, naming the key, its
            value and what would do.
    """
    config = load_yaml(path, RunConfig, overrides)
    transformer_config(config.model, config.parallel, config.training)
    return config
