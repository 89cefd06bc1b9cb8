"""Without verl, loading the integration says what to install."""

from __future__ import annotations

import importlib

import pytest


def test_importing_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"needs verl, .*; pip install verl==0\.9\.1") as raised:
        importlib.import_module("megatron_prefix.integrations.verl")
    assert "\n" not in str(raised.value)
