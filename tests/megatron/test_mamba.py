"""Mamba's layers over shared prefixes: variants of Megatron's mixer, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.hybrid import prefix_hybrid_model
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import pack
from megatron_prefix.megatron.hybrid_model import HybridModel, hybrid_stack_spec
from megatron_prefix.model.transformer_config import transformer_config
from tests.megatron.mamba_reference import run_token_by_token
from tests.megatron.models import (
    BASE,
    HAS_HYBRID_MODEL,
    MAMBA,
    TRAINING,
    assert_equal_training,
    model_config,
    packed_logits,
    random_groups,
    randomise,
    single_process,
)

if not HAS_HYBRID_MODEL:
    pytest.skip("megatron-core before 0.18 has no HybridModel", allow_module_level=True)

# Prompts shorter than the convolution, of one token, of several chunks; responses of one token.
SHAPES = [(70, [4, 66, 1]), (1, [5, 1]), (2, [3, 2]), (130, [1, 17, 64])]


def build(
    pattern: str, *, grouped: bool, mixer: dict[str, Any] | None = None, **transformer: Any
) -> torch.nn.Module:
    """A model whose mixers are built with other arguments than Megatron's spec has."""
    model = model_config({**MAMBA, **transformer}, hybrid_layer_pattern=pattern)
    config = transformer_config(model, ParallelConfig(), TRAINING)
    spec = hybrid_stack_spec(config, use_transformer_engine=False)
    of_mixer = spec.submodules.mamba_layer.submodules.mixer
    assert isinstance(of_mixer, ModuleSpec)
    of_mixer.params = mixer or {}
    built = (prefix_hybrid_model() if grouped else HybridModel)(
        config,
        prefix_grouped(spec) if grouped else spec,
        vocab_size=61,
        max_sequence_length=256,
        hybrid_layer_pattern=pattern,
    )
    if not grouped:
        run_token_by_token(built)
    return built


@pytest.mark.parametrize("trim", [False, True], ids=["", "trimmed last layer"])
@pytest.mark.parametrize(
    ("mixer", "transformer"),
    [
        ({}, {}),
        ({"D_has_hdim": True}, {"mamba_num_groups": 1}),
        ({"rmsnorm": False}, {"mamba_num_groups": 4}),
        ({"d_conv": 2, "chunk_size": 16}, {"mamba_num_heads": None, "mamba_head_dim": 16}),
        ({}, {"layernorm_epsilon": 0.1, "add_bias_linear": True}),
    ],
    ids=["", "D of each channel", "no norm", "narrow convolution", "another epsilon"],
)
def test_training_equals_every_sequence_alone(
    mixer: dict[str, Any], transformer: dict[str, Any], trim: bool
) -> None:
    with single_process():
        reference = build("M-M", grouped=False, mixer=mixer, **transformer)
        grouped = build("M-M", grouped=True, mixer=mixer, **transformer)
        randomise(reference)
        grouped.load_state_dict(reference.state_dict())
        tree = random_groups(np.random.default_rng(), SHAPES)
        assert_equal_training(reference, grouped, tree, 1e-10, trim_last_layer=trim)


def test_what_is_kept_for_backward_does_not_grow_with_the_branches() -> None:
    """Beyond the rows: equally many tokens in one response and in 30 keep as much."""
    kept = []
    for lengths in ([240], [8] * 30):
        layout = pack(random_groups(np.random.default_rng(), [(128, lengths)]), pad_to=400)
        sizes: dict[int, int] = {}

        def note(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with single_process():
            grouped = build("M", grouped=True)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                packed_logits(grouped, layout)
        kept.append(sum(sizes.values()))
    assert kept[1] <= 1.01 * kept[0]


def test_ordinary_batches_need_mamba_ssm_and_say_so() -> None:
    with single_process():
        grouped = build("M*", grouped=True)
        with pytest.raises(ValueError, match=r"need mamba_ssm in MambaMixer: pip install"):
            grouped(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], None)


def test_what_the_layer_cannot_do_is_refused() -> None:
    with single_process():
        with pytest.raises(ValueError, match=r"d_conv=6: rows are planned for .* at most 4 inputs"):
            build("M", grouped=True, mixer={"d_conv": 6})
        grouped = build("M", grouped=True)
        layout = pack(random_groups(np.random.default_rng(), [(5, [3])]))
        setup = AttentionSetup.of(
            transformer_config(model_config(BASE), ParallelConfig(), TRAINING), torch.device("cpu")
        )
        params = PrefixPackedSeqParams.from_layout(layout, setup)
        with pytest.raises(ValueError, match=r"layer 1 is recurrent, but the row was not planned"):
            grouped(
                torch.from_numpy(layout.input_ids)[None],
                params.position_ids[None],
                None,
                packed_seq_params=params,
            )


@pytest.mark.parametrize(
    ("transformer", "parallel", "message"),
    [
        ({"mamba_num_groups": 3}, {}, r"mamba_num_groups: 3 does not divide the 4 heads"),
        (
            {"mamba_num_heads": None, "mamba_head_dim": 9},
            {},
            r"mamba_head_dim: 9 does not divide twice the hidden_size: 32; set mamba_num_heads",
        ),
        (
            {"mamba_num_groups": 1},
            {"tensor_model_parallel_size": 2},
            r"mamba_num_groups: 1 does not divide by tensor_model_parallel_size: 2",
        ),
        (
            {"mamba_num_groups": 1, "mamba_num_heads": 3},
            {"context_parallel_size": 2},
            r"mamba_num_heads: 3 \(3 heads\) does not divide by .*context_parallel_size: 2",
        ),
        (
            {"mamba_num_groups": 3, "mamba_num_heads": 6},
            {"context_parallel_size": 2},
            r"mamba_num_groups: 3 over .* is neither a multiple nor a divisor of context_para",
        ),
        (
            {"mamba_num_groups": 1, "cp_comm_type": "a2a"},
            {"context_parallel_size": 2},
            r"a2a needs mamba_num_groups=1 to be a multiple of .* = 1 x 2",
        ),
        ({"mamba_state_dim": 0}, {}, r"mamba_state_dim: 0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(
    transformer: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    model = model_config({**MAMBA, **transformer}, hybrid_layer_pattern="M*")
    with pytest.raises(ConfigError, match=message):
        transformer_config(model, ParallelConfig(**parallel), TRAINING)
