"""What the tools' command lines share: help with defaults, and Megatron after the arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prefix.packages import MissingPackageError
from megatron_prefix.training.imports import import_megatron


def require_megatron(parser: argparse.ArgumentParser) -> None:
    """Import Megatron once the arguments are known to be right, or end with what to install."""
    try:
        import_megatron()
    except MissingPackageError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that are values; an option that is off says so by its name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)
