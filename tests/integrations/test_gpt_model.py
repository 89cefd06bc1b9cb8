"""A framework's packed row, whatever it holds, gives what it gives without sharing."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_prefix import PrefixTree, pack
from megatron_prefix.config import ParallelConfig
from megatron_prefix.integrations import (
    log_probs_of_rows,
    prefix_model_provider,
    share_prefixes,
    token_counter,
)
from megatron_prefix.integrations.sharing_model import POSITIONAL
from megatron_prefix.layers.attention import RopeTable
from megatron_prefix.model.transformer_config import transformer_config
from tests.integrations.framework import (
    Batch,
    build_model,
    pack_batch,
    random_sequences,
    worst_error,
)
from tests.megatron.models import TRAINING, model_config, packed_logits, relative_error
from tests.megatron.models import single_process as one_process

TOLERANCE = 1e-10
MODEL = model_config()


@pytest.fixture(autouse=True)
def single_process() -> Iterator[None]:
    with one_process():
        yield


def pair(*, rope_table: RopeTable | None = None, **options: Any) -> tuple[GPTModel, GPTModel]:
    """A framework's model, and one of the same weights that shares prefixes."""
    config = model_config(**options)
    plain, shared = (
        build_model(config, transformer_config(config, ParallelConfig(), TRAINING)) for _ in "12"
    )
    shared.load_state_dict(plain.state_dict())
    return plain, share_prefixes(shared, rope_table=rope_table)


def gradients(model: GPTModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(plain: GPTModel, shared: GPTModel, batch: Batch, **arguments: Any) -> None:
    """Outputs at all rows of sequences, and gradients of a linear loss of them."""
    given = batch.arguments() | arguments
    expected, found = plain(**given), shared(**given)
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    weights = torch.randn_like(expected)
    weights[:, ~batch.real] = 0
    assert relative_error(found[:, batch.real], expected[:, batch.real]) <= TOLERANCE
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert worst_error(gradients(shared), gradients(plain)) <= TOLERANCE


GROUP = (24, [2, 5, 3])
"""A prompt long enough to be shared whatever its responses begin with, and these."""
EQUAL = [[*range(5, 17)], [*range(5, 17)], [*range(5, 17), 3]]
"""Two equal sequences, and one that goes on."""
ROWS: dict[str, tuple[list[list[int]], dict[str, int]]] = {
    "equal sequences": (EQUAL, {}),
    "padding behind each": (EQUAL, {"pad_each_to": 4}),
    "a last sequence of padding": (EQUAL, {"pad_sequence_to": 48}),
    "a last sequence of one token": ([*EQUAL, [7]], {"pad_sequence_to": 39}),
    "a common first token": ([[1, *sequence] for sequence in [*EQUAL, [2, 3], [4]]], {}),
    "one token in all": ([[3], [3]], {}),
    "empty sequences": ([[], *EQUAL, [], [9]], {}),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("with_labels", [False, True])
def test_rows_as_frameworks_make_them(row: str, with_labels: bool) -> None:
    sequences, options = ROWS[row]
    batch = pack_batch(sequences, **options)
    plain, shared = pair()
    labels = {"labels": batch.labels} if with_labels else {}
    assert_equal(plain, shared, batch, **labels)


sequence = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=12), max_size=2),
    responses=st.lists(st.tuples(st.integers(0, 1), sequence), min_size=1, max_size=6),
    pad_each_to=st.sampled_from([1, 4]),
    pad_sequence_to=st.sampled_from([1, 16]),
    pad_to_multiple=st.sampled_from([1, 8]),
    with_labels=st.booleans(),
)
def test_random_rows(
    prompts: list[list[int]],
    responses: list[tuple[int, list[int]]],
    pad_each_to: int,
    pad_sequence_to: int,
    pad_to_multiple: int,
    with_labels: bool,
) -> None:
    sequences = [
        [*(prompts[i] if i < len(prompts) else ()), *response] for i, response in responses
    ]
    batch = pack_batch(sequences, pad_each_to=pad_each_to, pad_sequence_to=pad_sequence_to)
    if with_labels:
        # Those of the same row of two sequences may differ, and some are no tokens.
        batch.labels[0, ::3] = -100
        batch.labels[0, 1::5] = 1
    plain, shared = pair()
    shared.prefix_sharing.pad_to_multiple = pad_to_multiple
    assert_equal(plain, shared, batch, **({"labels": batch.labels} if with_labels else {}))


def test_tokens_are_shared_where_ids_and_keys_agree() -> None:
    batch = pack_batch([[9] * 24 + [token] for token in (3, 4, 5)])
    keys = torch.tensor([[*range(24), 0, *range(24), 0, *range(100, 124), 0]])
    plain, shared = pair()
    found = shared(**batch.arguments(), token_keys=keys)
    assert relative_error(found, plain(**batch.arguments())) <= TOLERANCE
    # The first two sequences share their image, up to the row that predicts what follows it; the
    # third has another image.
    counter = token_counter(shared)
    assert counter.tokens_computed == 75 - 23
    shared(**batch.arguments())
    assert counter.tokens_computed == (75 - 23) + (75 - 2 * 23)


def test_experts_are_counted_as_the_framework_would_count_them() -> None:
    experts = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    plain, shared = pair(transformer=experts)
    batch = pack_batch(random_sequences(np.random.default_rng(), [GROUP, (30, [4, 1])]))
    rows = torch.arange(0, batch.input_ids.shape[1], 7)
    found = log_probs_of_rows(shared, rows=rows, labels=batch.labels[0, rows], **batch.arguments())
    assert found.requires_grad
    plain(**batch.arguments())
    assert token_counter(shared).shared_rows == 1
    for of_plain, of_shared in zip(plain.decoder.layers, shared.decoder.layers, strict=True):
        expected = of_plain.mlp.router.local_tokens_per_expert
        assert torch.equal(of_shared.mlp.router.local_tokens_per_expert, expected)
        assert expected.sum() == 2 * batch.input_ids.numel()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), "token_keys has shape \\[1, 3\\] and input_ids"),
        (torch.zeros(1, 37), "token_keys holds torch.float32: keys are integers"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: Tensor, message: str) -> None:
    batch = pack_batch(EQUAL)
    with pytest.raises(ValueError, match=message):
        pair()[1](**batch.arguments(), token_keys=keys)


@pytest.mark.parametrize("kind", ["learned_absolute", "none"])
def test_other_positions(kind: str) -> None:
    plain, shared = pair(position_embedding_type=kind)
    batch = pack_batch(random_sequences(np.random.default_rng(0), [GROUP]))
    lengths = batch.params.cu_seqlens_q.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert_equal(plain, shared, batch, position_ids=positions)
    if kind == "learned_absolute":
        with pytest.raises(ValueError, match="position_ids with position_embedding_type="):
            shared(**batch.arguments() | {"position_ids": torch.arange(sum(lengths))[None]})


@pytest.mark.parametrize("rope_table", ["by token", "by position", None])
def test_models_that_make_a_rotary_table_of_their_own(rope_table: RopeTable | None) -> None:
    """One takes rows by position itself, as mcore_bridge's GPTModel does without fused rotary
    embedding. One makes tables of a fixed length, which is that of the row here: nothing but the
    option tells the two apart."""
    plain, shared = pair(rope_table=rope_table)
    batch = pack_batch(random_sequences(np.random.default_rng(0), [GROUP]))
    # The prompt's last token begins every response.
    whole = shared.rotary_pos_emb(23 + 3 + 6 + 4, packed_seq=True)

    def own_table(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = kwargs["packed_seq_params"].position_ids
        table = whole[positions] if rope_table == "by token" else whole
        return args, kwargs | {"rotary_pos_emb": table}

    shared.decoder.register_forward_pre_hook(own_table, with_kwargs=True)
    if rope_table is not None:
        assert_equal(plain, shared, batch)
        return
    with pytest.raises(ValueError, match="rope_table='by token' or rope_table='by position'"):
        shared(**batch.arguments())


def test_a_rotary_table_by_position_is_not_taken_for_one_by_token() -> None:
    _, shared = pair(rope_table="by token")
    batch = pack_batch(random_sequences(np.random.default_rng(0), [GROUP]))
    with pytest.raises(ValueError, match=r"'by token', but .* has 29 rows for 36 tokens"):
        shared(**batch.arguments())


def test_a_tail_of_no_sequence_changes_nothing() -> None:
    _, shared = pair()
    sequences = random_sequences(np.random.default_rng(0), [GROUP])
    expected = shared(**pack_batch(sequences).arguments())
    found = shared(**pack_batch(sequences, tail=7).arguments())
    assert found.shape[1] == expected.shape[1] + 7
    assert torch.equal(found[:, :-7], expected) and torch.isfinite(found).all()


def test_logits_may_be_written_to_in_place() -> None:
    plain, shared = pair()
    batch = pack_batch(EQUAL)
    (shared(**batch.arguments()).div_(0.5) ** 2).sum().backward()
    (plain(**batch.arguments()).div_(0.5) ** 2).sum().backward()
    assert worst_error(gradients(shared), gradients(plain)) <= TOLERANCE
    logits = shared(**batch.arguments())
    first, same = logits[0, 0].clone(), logits[0, 12].clone()
    assert torch.equal(first, same)
    logits[0, 0] = 0
    assert torch.equal(logits[0, 12], same)


def test_rows_are_evaluated_without_gradients_and_trained_after_that() -> None:
    plain, shared = pair()
    batch = pack_batch(random_sequences(np.random.default_rng(0), [GROUP]))
    with torch.inference_mode():
        found, expected = (model.eval()(**batch.arguments()) for model in (shared, plain))
    assert relative_error(found, expected) <= TOLERANCE
    assert token_counter(shared).shared_rows == 1
    assert_equal(plain.train(), shared.train(), batch)


@pytest.mark.parametrize("row", [-1, 37])
def test_rows_outside_of_the_packed_row_are_not_scored(row: int) -> None:
    _, shared = pair()
    batch = pack_batch(EQUAL)
    with pytest.raises(ValueError, match=f"rows has {row}, and the packed row 37 tokens"):
        log_probs_of_rows(
            shared,
            rows=[3, row],
            labels=torch.tensor([1, 2]),
            input_ids=batch.input_ids,
            packed_seq_params=batch.params,
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_log_probabilities_without_all_logits(tied: bool, shares: bool) -> None:
    plain, shared = pair(share_embeddings_and_output_weights=tied)
    groups = [GROUP] if shares else [(3, [4]), (6, [2])]
    batch = pack_batch(random_sequences(np.random.default_rng(0), groups), pad_sequence_to=8)
    # Of sequences that share them the same row twice, a row that both need, and last rows.
    rows = torch.tensor([3, 25, 26 + 3, 2, 25, 54, 26 + 28] if shares else [3, 5, 2, 11, 6, 3])
    labels = batch.labels[0, rows]
    found = log_probs_of_rows(
        shared,
        rows=rows,
        labels=labels,
        temperature=0.7,
        with_entropy=True,
        train_entropy=True,
        chunk_tokens=3,
        input_ids=batch.input_ids,
        packed_seq_params=batch.params,
    )
    log_p = torch.log_softmax(plain(**batch.arguments())[0, rows] / 0.7, dim=-1)
    log_probs = log_p.gather(1, labels[:, None])[:, 0]
    expected = torch.stack((log_probs, -(log_p.exp() * log_p).sum(-1)), dim=-1)
    assert found.shape == (1, len(rows), 2)
    assert relative_error(found[0], expected) <= TOLERANCE
    weights = torch.randn_like(expected)
    (found[0] * weights).sum().backward()
    (expected * weights).sum().backward()
    assert worst_error(gradients(shared), gradients(plain)) <= TOLERANCE
    assert token_counter(shared).shared_rows == shares


def test_batches_without_packed_sequences_are_the_models_own() -> None:
    plain, shared = pair()
    tokens = torch.randint(0, 61, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    assert torch.equal(shared(tokens, positions, mask), plain(tokens, positions, mask))
    labels = torch.roll(tokens, -1, 1)
    assert torch.equal(
        shared(tokens, positions, mask, labels=labels), plain(tokens, positions, mask, None, labels)
    )
    assert token_counter(shared).rows == 0
    with pytest.raises(ValueError, match="log_probs_of_rows needs packed_seq_params"):
        log_probs_of_rows(
            shared, rows=[0], labels=torch.tensor([1]), input_ids=tokens, packed_seq_params=None
        )


def test_our_own_packed_rows_still_run() -> None:
    _, shared = pair()
    layout = pack(PrefixTree.from_groups([([5, 6, 7], [[1, 2], [3]])]))
    assert packed_logits(shared, layout).shape[0] == layout.num_tokens


def test_weights_and_names_stay_and_sharing_twice_is_sharing_once() -> None:
    plain, shared = pair()
    assert shared.state_dict().keys() == plain.state_dict().keys()
    kind = type(shared)
    assert issubclass(kind, GPTModel) and type(share_prefixes(shared)) is kind


def test_a_provider_keeps_its_arguments() -> None:
    def provider(pre_process: bool = True, post_process: bool = True) -> GPTModel:
        assert pre_process and post_process
        return build_model(MODEL, transformer_config(MODEL, ParallelConfig(), TRAINING))

    shared = prefix_model_provider(provider, pad_to_multiple=4)
    assert inspect.signature(shared) == inspect.signature(provider)
    model = shared(pre_process=True)
    model(**pack_batch(EQUAL).arguments())
    assert token_counter([torch.nn.ModuleList([model])]).tokens_computed == 16


def test_what_was_saved_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    _, shared = pair()
    batch = pack_batch(random_sequences(np.random.default_rng(0), [(20, [3, 3, 3, 3])]))
    with caplog.at_level(logging.WARNING, logger="megatron_prefix"):
        for _ in range(11):
            shared(**batch.arguments())
    counter = token_counter(shared)
    assert (counter.rows, counter.shared_rows) == (11, 11)
    # The prompt's last token begins every response.
    assert counter.tokens_given == 11 * 4 * 23 and counter.tokens_computed == 11 * (19 + 4 * 4)
    assert counter.saved_fraction == pytest.approx(1 - 35 / 92)
    lines = [r.getMessage() for r in caplog.records if r.name == "megatron_prefix"]
    assert lines == [
        "megatron_prefix: 1 packed rows of 92 tokens ran as 35 tokens (62% saved); 1 of them "
        "shared a prefix",
        "megatron_prefix: 10 packed rows of 920 tokens ran as 350 tokens (62% saved); 10 of them "
        "shared a prefix",
    ]


def test_positional_arguments_are_those_of_megatron() -> None:
    parameters = list(inspect.signature(GPTModel.forward).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert tuple(positional) == POSITIONAL


def _params(**fields: Any) -> PackedSeqParams:
    return dataclasses.replace(pack_batch(EQUAL).params, **fields)


REFUSED: dict[str, dict[str, Any]] = {
    "input_ids=None on pipeline stage 0": {"input_ids": None},
    "attention_mask beside packed_seq_params": {"attention_mask": torch.ones(1)},
    "decoder_input is given": {"decoder_input": torch.ones(37, 1, 32)},
    "pixel_values is given": {"pixel_values": torch.ones(1)},
    r"input_ids has shape \[37\]": {"input_ids": torch.ones(37, dtype=torch.int64)},
    r"labels has shape \[1, 2\]": {"labels": torch.ones(1, 2, dtype=torch.int64)},
    "cu_seqlens_q ends at 50, .*context-parallel size to 1": {
        "packed_seq_params": _params(cu_seqlens_q=torch.tensor([0, 50]))
    },
    "must begin with 0": {"packed_seq_params": _params(cu_seqlens_q=torch.tensor([0, 8, 5]))},
    "none longer than its place": {
        "packed_seq_params": _params(cu_seqlens_q_padded=torch.tensor([0, 4, 8, 12]))
    },
    "neither cu_seqlens_q nor": {"packed_seq_params": _params(cu_seqlens_q=None)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_shared_is_refused_by_name(message: str) -> None:
    _, shared = pair()
    with pytest.raises(ValueError, match=message):
        shared(**pack_batch(EQUAL).arguments() | REFUSED[message])


def test_models_that_cannot_share_are_refused_by_name() -> None:
    config = transformer_config(MODEL, ParallelConfig(), TRAINING)
    model = build_model(MODEL, config)
    config.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"context_parallel_size=2: .*Set context_parallel_size"):
        share_prefixes(model)
    config.context_parallel_size, config.pipeline_model_parallel_size = 1, 2
    with pytest.raises(ValueError, match="variable_seq_lengths=False with pipeline_model_parall"):
        share_prefixes(model)
    config.pipeline_model_parallel_size, config.hidden_dropout = 1, 0.1
    with pytest.raises(ValueError, match=r"hidden_dropout=0\.1 cannot"):
        share_prefixes(model)
    with pytest.raises(ValueError, match="no GPTModel in Linear"):
        share_prefixes(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="was not called on this GPTModel"):
        token_counter(model)
    model.decoder.layers[1].self_attention = torch.nn.Linear(2, 2)
    config.hidden_dropout = 0.0
    with pytest.raises(ValueError, match="layer 2 has Linear for its self attention"):
        share_prefixes(model)
