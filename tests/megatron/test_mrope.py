"""mRoPE: tokens with three positions each, as images have, against the unmodified GPTModel.

What these tests do not cover: vision towers, and prompts whose images differ under equal tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ParallelConfig
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.integrations.gpt_model import share_prefixes
from megatron_prefix.layer_spec import prefix_grouped
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import PackedLayout, PrefixTree, pack
from megatron_prefix.megatron.options import UnsupportedOptionError
from megatron_prefix.megatron.options.attention import params_have_cp_group
from megatron_prefix.model.transformer_config import transformer_config
from tests.distributed import run_distributed
from tests.megatron.models import (
    TRAINING,
    model_config,
    randomise,
    relative_error,
    single_process,
)

PARALLEL = ParallelConfig(context_parallel_size=2)
SECTION = [1, 2, 1]  # of the 4 frequencies of heads of 8


def build(parallel: ParallelConfig, *, shared_prefixes: bool, num_layers: int = 2) -> GPTModel:
    options = {"num_layers": num_layers, "mrope_section": list(SECTION)}
    model = model_config(options, position_embedding_type="mrope")
    config = transformer_config(model, parallel, TRAINING)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config,
        prefix_grouped(spec) if shared_prefixes else spec,
        vocab_size=61,
        max_sequence_length=64,
        position_embedding_type="mrope",
        rotary_base=100,
    )


def sequences() -> list[np.ndarray]:
    """Three levels of sharing, and one sequence alone."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, 61, count)

    system = tokens(7)
    stems = [np.concatenate([system, tokens(n)]) for n in (12, 1)]
    return [np.concatenate([stem, tokens(n)]) for stem in stems for n in (5, 1, 9)] + [tokens(11)]


def positions_of(length: int) -> np.ndarray:
    """[3, length] as if images lay in the sequence: rows that differ, and jump back and forth."""
    return np.random.default_rng(8).integers(0, 50, (3, 64))[:, :length]


def layout() -> PackedLayout:
    return pack(PrefixTree.from_sequences(sequences()), pad_to_multiple=4)


def run_row(model: GPTModel, params: PrefixPackedSeqParams, row: PackedLayout) -> torch.Tensor:
    return model(
        params.own(row.input_ids)[None], params.model_position_ids, None, packed_seq_params=params
    )[0]


def loss_weights(row: PackedLayout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(row.num_tokens, 61, generator=generator, dtype=torch.float64)
    return weights * torch.from_numpy(row.multiplicity > 0)[:, None]


def whole_sequences(model: GPTModel, row: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, vocab] logits at the row's positions, and the loss, in which each counts once."""
    logits = torch.full((row.num_tokens, 61), torch.nan, dtype=torch.float64)
    loss, weights = torch.zeros(()), loss_weights(row)
    for i in range(row.tree.num_sequences):
        tokens = row.tree.sequence_tokens(i)
        length = len(tokens) - 1
        of_sequence = model(
            torch.from_numpy(tokens)[None, :-1],
            torch.from_numpy(positions_of(length))[:, None],
            torch.ones(length, length, dtype=torch.bool).triu(1)[None, None],
        )[0]
        rows = torch.from_numpy(row.sequence_positions(i))
        first = logits[rows].isnan().all(-1)
        loss = loss + (of_sequence * weights[rows])[first].sum()
        logits[rows] = of_sequence.detach()
    return logits, loss


def mrope_positions(row: PackedLayout) -> np.ndarray:
    lengths = [len(row.tree.sequence_tokens(i)) for i in range(row.tree.num_sequences)]
    return row.scatter([positions_of(length) for length in lengths])


def expected() -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Weights, logits and gradients of Megatron's own model on whole sequences."""
    model = build(ParallelConfig(), shared_prefixes=False)
    randomise(model)
    state = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    logits, loss = whole_sequences(model, layout())
    loss.backward()
    return state, logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("trim_last_layer", [False, True], ids=["", "trimmed last layer"])
def test_training_equals_the_unmodified_model(trim_last_layer: bool) -> None:
    row = layout()
    real = np.arange(row.num_tokens - row.num_padding)
    with single_process():
        state, logits, gradients = expected()
        model = build(ParallelConfig(), shared_prefixes=True)
        model.load_state_dict(state)
        params = PrefixPackedSeqParams.from_layout(
            row,
            AttentionSetup.of(model.config, torch.device("cpu")),
            needed=real if trim_last_layer else None,
            mrope_positions=mrope_positions(row),
        )
        assert (params.last_layer is not None) == trim_last_layer
        found = run_row(model, params, row)
        rows = torch.from_numpy(params.output_rows)
        (found * loss_weights(row)[rows]).sum().backward()
    assert relative_error(found[real], logits[real]) <= 1e-12
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) <= 1e-11, name


def _train_on_ranks(
    rank: int, world_size: int, state: dict[str, torch.Tensor]
) -> tuple[np.ndarray, torch.Tensor, dict[str, torch.Tensor]]:
    row = layout()
    with runtime(PARALLEL, device="cpu", seed=3, timeout_minutes=2, float64=True):
        group = parallel_state.get_context_parallel_group()
        model = build(PARALLEL, shared_prefixes=True)
        model.load_state_dict(state)
        params = PrefixPackedSeqParams.from_layout(
            row,
            AttentionSetup.of(model.config, torch.device("cpu"), context_parallel_group=group),
            mrope_positions=mrope_positions(row),
        )
        logits = run_row(model, params, row)
        (logits * params.own(loss_weights(row).numpy())).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
        return params.own_rows, logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.skipif(not params_have_cp_group(), reason="megatron-core 0.14 and 0.15 refuse it")
def test_context_parallel_ranks_give_the_same() -> None:
    row = layout()
    with single_process():
        state, logits, gradients = expected()
    found = torch.full_like(logits, torch.nan)
    for rows, rank_logits, rank_gradients in run_distributed(
        _train_on_ranks, 2, state, init_process_group=False
    ):
        found[rows[rows >= 0]] = rank_logits[rows >= 0]
        for name, gradient in gradients.items():
            assert relative_error(rank_gradients[name], gradient) <= 1e-11, name
    real = row.num_tokens - row.num_padding
    assert relative_error(found[:real], logits[:real]) <= 1e-12


@pytest.mark.skipif(params_have_cp_group(), reason="megatron-core 0.16 and newer take it")
def test_older_releases_refuse_it_on_context_parallel_ranks() -> None:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, mrope_section=SECTION
    )
    config.context_parallel_size, config.attention_dropout, config.hidden_dropout = 2, 0.0, 0.0
    from megatron_prefix.megatron.options import refuse_unsupported

    with pytest.raises(UnsupportedOptionError, match="mrope_section"):
        refuse_unsupported(config)


def test_sequences_that_share_tokens_but_not_positions_are_refused() -> None:
    row = pack(PrefixTree.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5]]))
    values = [np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4)]
    assert row.scatter(values).shape == (3, row.num_tokens)
    values[1] = values[1] + np.array([0, 1, 0, 0])
    with pytest.raises(ValueError, match="sequences 0 and 1 share token 1, but have different"):
        row.scatter(values)
    with pytest.raises(ValueError, match=r"sequence 1: values \(3, 5\), expected \(3, 4\)"):
        row.scatter([values[0], np.zeros((3, 5), dtype=np.int64)])
    with pytest.raises(ValueError, match="1 values for 2 sequences"):
        row.scatter(values[:1])


def test_positions_of_another_row_are_refused() -> None:
    row = layout()
    with single_process():
        config = transformer_config(model_config(), ParallelConfig(), TRAINING)
        setup = AttentionSetup.of(config, torch.device("cpu"))
        wrong: Any = np.zeros((3, row.num_tokens - 1), dtype=np.int64)
        with pytest.raises(ValueError, match=r"mrope_positions \(3, \d+\): expected \(3, "):
            PrefixPackedSeqParams.from_layout(row, setup, mrope_positions=wrong)


def test_what_would_merge_images_or_has_no_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.transformer: mrope_section=\[1, 2, 1\]"):
        transformer_config(model_config({"mrope_section": SECTION}), ParallelConfig(), TRAINING)
    without_sections = model_config(position_embedding_type="mrope")
    with pytest.raises(ConfigError, match="mrope_section=None does not go with"):
        transformer_config(without_sections, ParallelConfig(), TRAINING)
    with single_process():
        model = build(ParallelConfig(), shared_prefixes=False)
        with pytest.raises(ValueError, match="position_embedding_type='mrope': images"):
            share_prefixes(model)
