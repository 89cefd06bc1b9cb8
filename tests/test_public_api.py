"""The package's public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import megatron_prefix


def test_every_public_name_can_be_imported() -> None:
    assert sorted(megatron_prefix.__all__) == [
        "AttentionSetup",
        "PrefixPackedSeqParams",
        "PrefixTree",
        "__version__",
        "check_kernel",
        "check_same_row",
        "enable_cpu_device",
        "pack",
        "prefix_grouped",
        "prefix_grouped_layer_spec",
        "select_kernel",
        "vocab_parallel_log_probs",
    ]
    for name in megatron_prefix.__all__:
        assert getattr(megatron_prefix, name) is not None


def test_importing_the_package_loads_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; before = set(sys.modules); import megatron_prefix; "
        "print([m for m in ('torch', 'megatron', 'numpy') if m in set(sys.modules) - before])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(megatron_prefix, "no_such_name")
