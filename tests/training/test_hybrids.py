"""Runs of models with recurrent layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import (
    BASE,
    DELTA_NET,
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    HYBRID,
    MAMBA,
    TRAINING,
    model_config,
    relative_error,
)
from tests.training.runs import (
    MAX_SEQUENCE_LENGTH,
    VOCAB_SIZE,
    good_records,
    run_values,
    trainer,
    write_records,
)

pytestmark = pytest.mark.skipif(not HAS_GATED_DELTA_NET, reason="megatron-core before 0.16")


GPT_MODEL = {"transformer": {**BASE, **HYBRID}}
HYBRID_MODEL = {
    "hybrid_layer_pattern": "G-*E",
    "transformer": {
        **{name: value for name, value in BASE.items() if name != "num_layers"},
        **DELTA_NET,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 24,
    },
}

MAMBA_MODEL = {
    "hybrid_layer_pattern": "M*EM",
    "transformer": {**HYBRID_MODEL["transformer"], **MAMBA},
}
MODELS = {"GPTModel": GPT_MODEL}
if HAS_HYBRID_MODEL:
    MODELS |= {"HybridModel": HYBRID_MODEL, "HybridModel with Mamba": MAMBA_MODEL}


def _values(
    folder: Path, records: Path, model: dict[str, Any], **sections: dict[str, Any]
) -> dict[str, Any]:
    model = {"vocab_size": VOCAB_SIZE, "max_sequence_length": MAX_SEQUENCE_LENGTH, **model}
    return run_values(folder, records=records, model=model, **sections)


def _train(
    rank: int, world_size: int, folder: Path, model: dict[str, Any]
) -> dict[str, FullTensors | None]:
    """The parameters after two steps of two optimizer steps each, without and with sharing."""
    weights = {}
    for sharing in ("none", "groups"):
        values = _values(
            folder / sharing,
            folder / "records.jsonl",
            model,
            training={
                "dtype": "float64",
                "sharing": sharing,
                "share_only_where_it_pays": False,
                "optimizer_steps_per_rollout": 2,
            },
            # The reference policy is the run's first weights, which it saves and reads.
            objective={"kl_coefficient": 0.3, "entropy_coefficient": 0.01},
        )
        with trainer(values) as run:
            run.run()
            weights[sharing] = full_parameters(run.chunks)
    return weights


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_run_with_shared_prompts_has_the_weights_of_one_without(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    write_records(tmp_path / "records.jsonl", good_records(4))
    weights = run_distributed(_train, 1, tmp_path, model)[0]
    for name, expected in weights["none"].items():
        # Four Adam steps, each of which divides by the root of a small square.
        assert relative_error(weights["groups"][name], expected) <= 1e-8, name


def test_what_a_run_cannot_do_with_it_is_refused_by_name() -> None:
    def check(transformer: dict[str, Any]) -> None:
        transformer_config(model_config(transformer), ParallelConfig(), TRAINING)

    check(HYBRID)
    with pytest.raises(ConfigError, match=r"linear_attention_freq: \[1\] needs one entry for each"):
        check({**HYBRID, "linear_attention_freq": [1]})
    with pytest.raises(ConfigError, match=r"linear_attention_freq: 0 must be at least 1"):
        check({**HYBRID, "linear_attention_freq": 0})
    with pytest.raises(ConfigError, match=r"linear_attention_freq: 2 needs .*attention_variant"):
        check({"linear_attention_freq": 2})
