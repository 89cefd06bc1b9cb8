"""What the benchmark's options may be, without importing what they name."""

from __future__ import annotations

LEVELS = ("attention", "layer", "step")
MECHANISMS = ("grouped", "ungrouped", "dense_mask", "flex", "kv_copy")
ROWS = "ungrouped_rows"
"""A side at level "step" only."""
PEERS = ("prefix_grouper", "prefix_grouper_mask")
"""Whole models of others, at level "step" only."""
# Relative L2 error: sums over thousands of tokens in another order, in each format.
TOLERANCES = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 6e-2, "float16": 2e-2}
