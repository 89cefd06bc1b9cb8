"""Run a training configuration: `python -m megatron_prefix.training run.yaml`, or under torchrun.

Neither torch nor Megatron is imported before the arguments and the configuration's own rules have
been checked: a wrong key is answered at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.config import RunConfig
from megatron_prefix.config.bounds import refuse
from megatron_prefix.config.loader import ConfigError, load_dataclass, read_values
from megatron_prefix.megatron.transformer_keys import faults_of_transformer
from megatron_prefix.packages import MissingPackageError
from megatron_prefix.training.errors import report_error
from megatron_prefix.training.help import USAGE, help_text
from megatron_prefix.training.imports import import_megatron
from megatron_prefix.training.requirements import missing_packages
from megatron_prefix.training.surroundings import faults_of_surroundings

_CHECK = "--check"
_YAML = (".yaml", ".yml")
_INTERRUPTED = 128 + signal.SIGINT
"""Exit status, as shells have it."""


def main() -> int:
    """Command line.

    Returns:
        0: done or checked, or stopped and saved because of a signal (`distributed.stop`); 1: an
        error, or other ranks were lost; 2: a wrong configuration; 130: interrupted.
    """
    rank = int(os.environ.get("RANK", "0"))
    source: Path | None = None
    try:
        args = _arguments(sys.argv[1:], rank)
        if args is None:
            return 0
        source = args.config
        config = _load(source, args.overrides, rank)
        _log_to_stderr(rank)
        import_megatron()
        from megatron_prefix.training import launch

        launch.check(config)
    except ConfigError as error:
        report_error(error.faults, rank, source=source)
        return 2
    except MissingPackageError as error:
        report_error([str(error)], rank)
        return 2
    try:
        return launch.run(config, rank, only_checks=args.checks)
    except KeyboardInterrupt:
        report_error(["interrupted (Ctrl-C); steps behind the newest checkpoint are lost"], rank)
        return _INTERRUPTED


def _load(path: Path, overrides: Sequence[str], rank: int) -> RunConfig:
    """The configuration, as far as it can be checked without torch.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        values = read_values(path, overrides)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}") from error
    try:
        config = load_dataclass(RunConfig, values)
    except ConfigError as error:
        raise ConfigError(*error.faults, *_faults_of_transformer(values)) from error
    refuse(
        [
            *_faults_of_layout(config),
            *_faults_of_transformer(values),
            *missing_packages(config),
            *faults_of_surroundings(config, rank),
        ]
    )
    return config


def _faults_of_layout(config: RunConfig) -> Sequence[str]:
    try:
        config.parallel.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        return error.faults
    return ()


def _faults_of_transformer(values: Mapping[str, Any]) -> list[str]:
    model = values.get("model")
    transformer = model.get("transformer") if isinstance(model, Mapping) else None
    if not isinstance(transformer, Mapping):
        return []
    decided = ("num_layers",) if model.get("hybrid_layer_pattern") else ()
    return list(faults_of_transformer(transformer, decided=decided))


def _log_to_stderr(rank: int) -> None:
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"[rank {rank}] %(levelname)s %(name)s: %(message)s",
    )
    # At INFO it lists every parameter.
    logging.getLogger("megatron").setLevel(logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """What was asked for on the command line."""

    config: Path
    """The run's file."""
    overrides: tuple[str, ...]
    """section.key=value"""
    checks: bool
    """Whether the run is only checked."""


def _arguments(words: Sequence[str], rank: int) -> _Arguments | None:
    """The parsed arguments; None where help was asked for, and given by rank 0.

    Raises:
        ConfigError: they are wrong.
    """
    if {"-h", "--help"} & set(words):
        names = [word for word in words if not word.startswith("-") and "=" not in word]
        text = help_text(next((name for name in names if Path(name).suffix not in _YAML), None))
        if rank == 0:
            print(text, end="")
        return None
    for index, word in enumerate(words):
        if word.startswith("-") and word != _CHECK:
            name, equals, value = word.lstrip("-").partition("=")
            if "." not in name:
                raise ConfigError(f"{word}: there is no such option; options are {_CHECK}, --help")
            if not equals:
                value = next(iter(words[index + 1 :]), "value")
            raise ConfigError(
                f"{word}: options are keys of the configuration, without dashes: {name}={value}"
            )
    values = [word for word in words if word != _CHECK]
    if not values:
        raise ConfigError(f"the following arguments are required: run.yaml; usage: {USAGE}")
    return _Arguments(config=Path(values[0]), overrides=tuple(values[1:]), checks=_CHECK in words)


if __name__ == "__main__":
    sys.exit(main())
