"""Layers with sliding windows and sinks against the unmodified GPTModel, sequence by sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.windows import layer_window
from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.layers.built_model import share_in_layers
from megatron_prefix.layout import PrefixTree, pack
from megatron_prefix.model.build import build_gpt_model
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron.models import (
    HAS_WINDOWS,
    TRAINING,
    assert_equal_training,
    model_config,
    model_pair,
    packed_logits,
    random_groups,
    single_process,
)

SHAPES = [(9, [4, 6, 1]), (1, [5, 1]), (12, [3]), (30, [1, 17, 2])]

MODELS: dict[str, dict[str, Any]] = {
    "every layer": {"window_size": [4, 0]},
    "every other layer": {"window_size": [4, 0], "window_attn_skip_freq": 2},
    "the layers of a list": {"window_size": [7, 0], "window_attn_skip_freq": [0, 1]},
    "of one key": {"window_size": [0, 0], "window_attn_skip_freq": 2},
    "longer than every sequence": {"window_size": [63, 0]},
    "softmax off by one": {"softmax_type": "off-by-one"},
    "learnable sinks": {"softmax_type": "learnable"},
    "windows and learnable sinks": {
        "window_size": [5, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
    },
}
needs_windows = pytest.mark.skipif(
    not HAS_WINDOWS, reason="megatron-core 0.14, whose local spec has no windows and no sinks"
)


@needs_windows
@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_training_equals_the_unmodified_model(
    options: dict[str, Any], trim_last_layer: bool
) -> None:
    with single_process():
        reference, grouped = model_pair(model_config(options))
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-11, trim_last_layer=trim_last_layer)


@needs_windows
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_deep_trees_with_recompute(recompute: str) -> None:
    rng = np.random.default_rng()
    stems = [rng.integers(0, 3, 20) for _ in range(3)]
    sequences = [
        np.concatenate([stems[rng.integers(3)][: rng.integers(2, 20)], rng.integers(0, 61, 5)])
        for _ in range(8)
    ]
    training = dataclasses.replace(TRAINING, recompute=recompute)
    with single_process():
        options = MODELS["windows and learnable sinks"]
        reference, grouped = model_pair(model_config(options), training)
        assert_equal_training(reference, grouped, PrefixTree.from_sequences(sequences), 1e-11)


@needs_windows
def test_a_model_that_is_built_already_has_its_windows_and_sinks() -> None:
    config = model_config(MODELS["windows and learnable sinks"])
    with single_process():
        reference, _ = model_pair(config)
        built = build_gpt_model(config, reference.config, shared_prefixes=False)
        built.load_state_dict(reference.state_dict())
        share_in_layers(built, built.config)
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, built, tree, 1e-11)


@needs_windows
@pytest.mark.parametrize("skip", [None, 1, 2, 3, [1, 0, 0, 1, 1, 0]])
def test_the_layers_that_have_the_window_are_those_of_megatron(
    skip: int | list[int] | None,
) -> None:
    from megatron.core.transformer.utils import is_layer_window_attention

    config = TransformerConfig(num_layers=6, hidden_size=32, num_attention_heads=4)
    config.window_size, config.window_attn_skip_freq = (9, 0), skip
    for number in range(1, 7):
        expected = 9 if is_layer_window_attention(config.window_size, skip, number) else None
        assert layer_window(config, number) == expected


@needs_windows
def test_a_row_that_was_planned_for_another_window_is_refused() -> None:
    layout = pack(random_groups(np.random.default_rng(), SHAPES))
    with single_process():
        _, grouped = model_pair(model_config(MODELS["every layer"]))
        grouped.config.window_size = None  # what `packed_logits` plans by
        with pytest.raises(ValueError, match=r"layer 1 has a sliding window of 4 .* for None"):
            packed_logits(grouped, layout)


@pytest.mark.skipif(HAS_WINDOWS, reason="megatron-core 0.15 and newer have windows")
def test_a_release_without_windows_in_its_local_spec_refuses_them_by_name() -> None:
    with pytest.raises(ConfigError, match="window_size"):
        transformer_config(model_config({"window_size": [4, 0]}), ParallelConfig(), TRAINING)
