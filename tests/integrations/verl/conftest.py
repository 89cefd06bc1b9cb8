"""Tests of verl run where verl is: tests/run.sh makes that environment, and runs them there.

In any other environment the one test runs that needs one without verl.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_prefix.packages import is_installed

_WITHOUT = "test_without_verl.py"
_WITH = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))
_WITH.remove(_WITHOUT)

if is_installed("verl"):
    # In the process of verl's trainer its class is there before the integration is loaded. It asks
    # for packages that verl does not name; without them there are the engine's tests.
    with contextlib.suppress(ModuleNotFoundError):
        from tests.integrations.verl import trainers  # noqa: F401

collect_ignore = [_WITHOUT] if is_installed("verl") else _WITH


def pytest_report_header() -> str | None:
    return None if is_installed("verl") else "tests/integrations/verl: in an environment with verl"
