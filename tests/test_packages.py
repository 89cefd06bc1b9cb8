"""A missing package is one line that says what needs it and which extra holds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prefix.packages import MissingPackageError, is_installed, needed_by

ROOT = Path(__file__).resolve().parents[1]


def test_a_missing_package_is_named_with_what_needs_it_and_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with (
        pytest.raises(MissingPackageError) as caught,
        needed_by("rollouts.engine: openai", extra="rollouts"),
    ):
        import httpx  # noqa: F401
    assert str(caught.value) == (
        "rollouts.engine: openai needs httpx, which is not installed; "
        "pip install 'megatron-prefix[rollouts]'"
    )
    assert not is_installed("httpx") and is_installed("numpy")


def test_a_missing_part_of_a_package_is_named_by_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat", None)
    with (
        pytest.raises(MissingPackageError, match=r"^x needs tensorboard,"),
        needed_by("x", extra="train"),
    ):
        from tensorboard.compat import tf  # noqa: F401


def test_a_package_that_refuses_to_be_imported_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "too_new_for_this.py").write_text('raise ImportError("wants NumPy 3")')
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.raises(MissingPackageError, match=r"^x needs a package .* \(wants NumPy 3\); pip"),
        needed_by("x", extra="train"),
    ):
        import too_new_for_this  # noqa: F401


def test_a_module_of_our_own_that_is_not_there_is_the_programmers_error() -> None:
    with (
        pytest.raises(ModuleNotFoundError, match=r"megatron_prefix\.no_such"),
        needed_by("x", extra="train"),
    ):
        import megatron_prefix.no_such  # noqa: F401


_IMPORT_WITHOUT_EXTRAS = """
import sys
for name in ("httpx", "transformers", "datasets", "mbridge", "pyarrow", "tensorboard", "matplotlib",
             "psutil", "tqdm", "jinja2", "safetensors", "einops", "simdjson"):
    sys.modules[name] = None
import megatron_prefix.training.trainer
import megatron_prefix.rollouts.server.sampler as build
"""


def test_training_starts_without_any_extra_and_only_the_engine_asks_for_its_package() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _IMPORT_WITHOUT_EXTRAS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    # The last line alone fails: what an openai engine is built from.
    assert done.returncode == 1
    assert "line 7, in <module>" in done.stderr and "httpx" in done.stderr.splitlines()[-1]
