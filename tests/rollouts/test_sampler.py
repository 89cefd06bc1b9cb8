"""What the sampler draws is what the unmodified model says, in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.model.build import ModelChunks, build_model_chunks
from megatron_prefix.model.full_tensors import (
    FullTensors,
    full_parameters,
    load_full_parameters,
)
from megatron_prefix.rollouts.embedded.kv_cache import KeyValueCache, prompt_row
from megatron_prefix.rollouts.embedded.recurrent_states import state_tokens
from megatron_prefix.rollouts.embedded.sampler import EmbeddedSampler
from megatron_prefix.rollouts.sampling.sampler import Response, SamplingSpec
from tests.distributed import run_distributed
from tests.megatron.models import (
    DELTA_NET,
    HAS_GATED_DELTA_NET,
    HAS_HYBRID_MODEL,
    HAS_PREDICTIONS,
    HAS_WINDOWS,
    HYBRID,
    LATENT,
    MAMBA,
    TRAINING,
    model_config,
    single_process,
)
from tests.rollouts.sampling import (
    PADDED_VOCABULARY,
    greedy_response,
    next_token_logits,
    random_prompts,
    sampler,
    sampling_model,
    unmodified,
)

MODELS: dict[str, dict[str, Any]] = {
    "multi-latent": {"transformer": LATENT},
    "rope": {"transformer": {"qk_layernorm": True, "add_qkv_bias": True}},
    "learned absolute positions": {"position_embedding_type": "learned_absolute"},
    "no positions, tied embeddings": {
        "position_embedding_type": "none",
        "share_embeddings_and_output_weights": True,
    },
    "multi-query, partial rotary": {
        "rotary_percent": 0.5,
        "transformer": {"num_query_groups": 1},
    },
    "multi-head, scaled rope": {"rope_scaling": True, "transformer": {"num_query_groups": 4}},
    "experts": {"transformer": {"num_moe_experts": 4, "moe_router_topk": 2}},
    "experts with losses": {
        "transformer": {
            "num_moe_experts": 4,
            "moe_z_loss_coeff": 0.1,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.1,
        }
    },
}

DELTA_NETS = {**HYBRID, "num_layers": 4, "linear_attention_freq": [1, 1, 0, 1]}
if HAS_GATED_DELTA_NET:
    MODELS["gated delta nets, experts"] = {
        "transformer": {**DELTA_NETS, "num_moe_experts": 4, "moe_router_topk": 2}
    }
    MODELS["gated delta nets alone"] = {"transformer": {**HYBRID, "linear_attention_freq": [1, 1]}}

if HAS_HYBRID_MODEL:
    MODELS["a pattern of layers"] = {
        "hybrid_layer_pattern": "G-*E",
        "transformer": {**DELTA_NET, "num_moe_experts": 4, "moe_router_topk": 2},
    }
    MODELS["Mamba among others"] = {
        "hybrid_layer_pattern": "M-*GM",
        "transformer": {**DELTA_NET, **MAMBA},
    }
    MODELS["Mamba, a wider convolution beside"] = {
        "hybrid_layer_pattern": "MG",
        "transformer": {**DELTA_NET, **MAMBA, "linear_conv_kernel_dim": 6},
    }

# One-token prompts, prompts of equal length, and in any order.
LENGTHS = [7, 1, 12, 7, 3]


@pytest.fixture(autouse=True)
def _megatron() -> Iterator[None]:
    with single_process():
        yield


def assert_logprobs_of(
    responses: list[list[Response]],
    prompts: list[list[int]],
    config: ModelConfig,
    chunks: ModelChunks,
    *,
    temperature: float,
) -> None:
    """The responses' log-probabilities are those of a forward pass of the whole sequence."""
    model = unmodified(config, chunks)
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            tokens = [*prompt, *response.tokens]
            logits = next_token_logits(model, tokens[:-1], config.vocab_size)
            logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 :]
            expected = logprobs.gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
            assert np.abs(expected.numpy() - response.logprobs).max() < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_greedy_responses_are_those_of_naive_decoding(name):
    config = model_config(**PADDED_VOCABULARY, **MODELS[name])
    chunks = sampling_model(config)
    model = unmodified(config, chunks)
    prompts = random_prompts(LENGTHS)
    found = sampler(chunks).sample(
        prompts, num_responses=2, max_response_length=6, temperature=0.0, seed=0, step=0
    )
    for prompt, group in zip(prompts, found, strict=True):
        expected = greedy_response(model, prompt, 6, config.vocab_size)
        assert group == [expected, expected]


# A window that ends within prompts, within what they begin with, and within responses.
WINDOWS = {"window_size": [6, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"}


@pytest.mark.parametrize(
    ("common", "transformer"),
    [(0, {}), (20, {})]
    + [(20, DELTA_NETS)] * HAS_GATED_DELTA_NET
    + [(0, WINDOWS), (20, WINDOWS)] * HAS_WINDOWS,
)
def test_log_probabilities_are_those_of_whole_forward_passes(common, transformer):
    config = model_config(**PADDED_VOCABULARY, transformer=transformer)
    chunks = sampling_model(config)
    prompts = random_prompts([common + length for length in LENGTHS], common=common)
    if common:
        prompts.append(prompts[0][:common])  # a prompt that is nothing but the common beginning
    responses = sampler(chunks).sample_with_logprobs(
        prompts,
        max_response_length=9,
        temperature=0.8,
        stop_tokens=tuple(range(0, 61, 5)),
        num_responses=4,
        seed=1,
        step=0,
    )
    # The stop tokens end some responses early, so that rows have been dropped.
    lengths = {len(response.tokens) for group in responses for response in group}
    assert {1, 9} < lengths
    assert_logprobs_of(responses, prompts, config, chunks, temperature=0.8)


def test_a_response_ends_with_its_first_stop_token():
    chunks = sampling_model(model_config(**PADDED_VOCABULARY))
    prompts = random_prompts(LENGTHS)
    options = {"num_responses": 6, "max_response_length": 8, "seed": 3, "step": 1}
    whole = sampler(chunks).sample(prompts, **options)
    stops = set(range(0, 61, 4))
    cut = sampler(chunks).sample(prompts, stop_tokens=tuple(stops), **options)
    for whole_group, cut_group in zip(whole, cut, strict=True):
        for response, found in zip(whole_group, cut_group, strict=True):
            ends = [i for i, token in enumerate(response) if token in stops]
            assert found == response[: ends[0] + 1 if ends else 8]


def test_pairs_of_tokens_are_as_frequent_as_the_model_says():
    config = model_config(vocab_size=4)
    chunks = sampling_model(config, spread=0.5)
    prompt, count = [1, 3, 0, 2], 3000
    [responses] = sampler(chunks).sample(
        [prompt], num_responses=count, max_response_length=2, temperature=1.3, seed=7, step=0
    )
    model = unmodified(config, chunks)
    expected = []
    for first in range(4):
        logits = next_token_logits(model, [*prompt, first], 4)[-2:]
        first_probability, second = (logits / 1.3).softmax(-1)
        expected += (count * first_probability[first] * second).tolist()
    found = np.bincount([4 * first + second for first, second in responses], minlength=16)
    # Exceeded with probability 1e-4 by a chi-square of 15 degrees of freedom.
    assert ((found - expected) ** 2 / np.array(expected)).sum() < 44.3


def test_top_p_draws_from_the_nucleus_only():
    config = model_config(**PADDED_VOCABULARY)
    chunks = sampling_model(config)
    prompts = random_prompts(LENGTHS)
    responses = sampler(chunks).sample(
        prompts, num_responses=8, max_response_length=4, top_p=0.6, seed=2, step=0
    )
    model = unmodified(config, chunks)
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logits = next_token_logits(model, [*prompt, *response[:-1]], config.vocab_size)
            for token, row in zip(response, logits[len(prompt) - 1 :].softmax(-1), strict=True):
                assert row[row > row[token]].sum() < 0.6


def test_batches_change_no_response():
    chunks = sampling_model(model_config(**PADDED_VOCABULARY))
    prompts = random_prompts([9, 2, 9, 5, 1, 7])
    options = {"num_responses": 3, "max_response_length": 5, "seed": 1, "step": 4}
    whole = sampler(chunks).sample(prompts, **options)
    for max_cached_tokens in (1, 50, 70):
        parts = sampler(chunks, max_cached_tokens=max_cached_tokens)
        assert parts.sample(prompts, **options) == whole
    # Nor do the other prompts, as long as a prompt keeps its place.
    assert sampler(chunks).sample(prompts[:2], **options) == whole[:2]


HAVE_STATES: list[tuple[dict[str, Any], int]] = []
"""Models with one layer of attention, and numbers of a sequence's inputs and states."""
if HAS_GATED_DELTA_NET:
    HAVE_STATES.append(({"transformer": DELTA_NETS}, 3 * (3 * (2 * 16 + 24) + 4 * 8 * 6)))
if HAS_HYBRID_MODEL:
    HAVE_STATES.append(
        (
            MODELS["Mamba among others"],
            3 * (2 * 16 + 24) + 4 * 8 * 6 + 2 * (3 * (32 + 2 * 12) + 4 * 6 * 8),
        )
    )


@pytest.mark.parametrize(("model", "numbers"), HAVE_STATES)
def test_recurrent_states_count_as_the_tokens_that_take_as_much_memory(model, numbers):
    chunks = sampling_model(model_config(**PADDED_VOCABULARY, **model))
    cache = KeyValueCache(
        prompt_row([[1, 2, 3], [4]]),
        AttentionSetup.of(chunks.config, torch.device("cpu")),
        num_responses=5,
        slots=2,
    )
    row = torch.tensor([[1, 2, 3, 4]])
    params = cache.prefill_params(max_seqlen=8)
    with torch.no_grad():
        chunks.bare[0](row, params.position_ids[None], None, packed_seq_params=params)
        cache.decode_params(torch.zeros(10, dtype=torch.int64), slot=0, max_seqlen=8)
    held = sum(
        tensor.numel() * tensor.itemsize
        for layer in cache.states.layers.values()
        for tensor in (layer.inputs, layer.state)
    )
    # One layer of attention, two heads of 8 channels in float64.
    of_token = 2 * 2 * 8 * 8
    assert held == 10 * 8 * numbers
    assert state_tokens(chunks.config) == -(-held // (10 * of_token))
    # A group that fits without them runs alone with them.
    small = EmbeddedSampler(
        chunks,
        SamplingSpec(max_response_length=3),
        device=torch.device("cpu"),
        max_cached_tokens=2 * (4 + 5 * 3),
    )
    assert len(small._rounds([4, 4], [4 + 5 * (3 + state_tokens(chunks.config))] * 2)) == 2


def test_another_step_or_seed_gives_other_responses():
    chunks = sampling_model(model_config())
    prompts = random_prompts(LENGTHS)

    def sample(**changed: int) -> list[list[tuple[int, ...]]]:
        options = {"num_responses": 4, "max_response_length": 5, "seed": 1, "step": 0, **changed}
        return sampler(chunks).sample(prompts, **options)

    assert sample() == sample()
    assert sample() != sample(step=1)
    assert sample() != sample(seed=2)
    assert len(set(sample()[0])) > 1


def test_the_model_is_left_as_it_was():
    chunks = sampling_model(model_config(transformer={"num_moe_experts": 4, "moe_router_topk": 2}))
    before = {name: p.detach().clone() for name, p in chunks.named_parameters()}
    random_state = torch.get_rng_state()
    sampler(chunks).sample(
        random_prompts(LENGTHS), num_responses=2, max_response_length=3, seed=0, step=0
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert chunks.wrapped[0].training
    assert torch.is_grad_enabled()
    for name, parameter in chunks.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_a_prompt_without_room_for_a_response_is_named():
    chunks = sampling_model(model_config(max_sequence_length=16))
    options = {"num_responses": 1, "max_response_length": 6, "seed": 0, "step": 0}
    assert len(sampler(chunks).sample(random_prompts([10]), **options)[0][0]) == 6
    with pytest.raises(ValueError, match=r"b.jsonl:4: prompt: its 11 tokens .* of up to 6 exceed"):
        sampler(chunks).sample(
            random_prompts([10, 11]), sources=["b.jsonl:3", "b.jsonl:4"], **options
        )
    with pytest.raises(ValueError, match="prompt 1: prompt: is empty"):
        sampler(chunks).sample([[1], []], **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_responses", 0),
        ("max_response_length", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_an_option_out_of_its_range_is_named(option, value):
    chunks = sampling_model(model_config())
    options = {"num_responses": 1, "max_response_length": 2, "seed": 0, "step": 0}
    named = "group_size" if option == "num_responses" else option
    with pytest.raises(ValueError, match=f"{named}={value}"):
        sampler(chunks).sample([[1, 2]], **{**options, option: value})


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    "tp2, sequence parallel": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2, vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
DENSE: dict[str, Any] = {"num_layers": 4}
EXPERTS: dict[str, Any] = {"num_layers": 2, "num_moe_experts": 4, "moe_router_topk": 2}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "experts, tp2, sequence parallel": {"tensor_model_parallel_size": 2},
    "experts, ep2": {"expert_model_parallel_size": 2},
}
HYBRID_LAYOUTS = {
    f"gated delta nets, {name}": LAYOUTS[name]
    for name in ("tp2", "cp2", "pp2, vpp2")
    if HAS_GATED_DELTA_NET
}
MAMBA_LAYOUTS = {
    f"Mamba, {name}": {"hybrid_layer_pattern": pattern, **LAYOUTS[name]}
    for name, pattern in (
        ("tp2, sequence parallel", "M-*M"),
        ("cp2", "M-*M"),
        ("pp2", "M-|*M"),
    )
    if HAS_HYBRID_MODEL
}
SAMPLING = {
    "num_responses": 3,
    "max_response_length": 6,
    "temperature": 0.9,
    "top_p": 0.95,
    "stop_tokens": tuple(range(0, 61, 6)),
    "seed": 5,
    "step": 2,
}
# A single prompt leaves data-parallel ranks and microbatches without any.
PROMPT_SETS = [random_prompts([20, 17, 30, 20, 17], common=16), random_prompts([4])]


def _sample_in_layouts(
    rank: int, world_size: int, cases: list[tuple[str, ModelConfig, FullTensors, dict[str, Any]]]
) -> dict[str, list[Any]]:
    responses = {}
    for name, config, weights, layout in cases:
        pattern = layout.pop("hybrid_layer_pattern", None)
        if pattern is not None:
            config = dataclasses.replace(config, hybrid_layer_pattern=pattern)
        parallel = ParallelConfig(**layout)
        with runtime(parallel, device="cpu", seed=9, timeout_minutes=1, float64=True):
            chunks = build_model_chunks(config, parallel, TRAINING, use_distributed_optimizer=False)
            load_full_parameters(chunks, weights)
            responses[name] = [
                sampler(chunks, max_cached_tokens=70).sample(prompts, **SAMPLING)
                for prompts in PROMPT_SETS
            ]
            assert chunks.config.sequence_parallel == parallel.uses_sequence_parallel
            for module in chunks.wrapped[-1].modules():
                if hasattr(module, "sequence_parallel"):
                    assert module.sequence_parallel == parallel.uses_sequence_parallel
    return responses


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (
            2,
            [
                ({"transformer": DENSE}, LAYOUTS),
                ({"transformer": EXPERTS}, EXPERT_LAYOUTS),
                ({"transformer": DELTA_NETS}, HYBRID_LAYOUTS),
                ({"transformer": MAMBA, "hybrid_layer_pattern": "M-*M"}, MAMBA_LAYOUTS),
            ],
        ),
        (
            4,
            [
                (
                    {"transformer": DENSE},
                    {"tp2, pp2, vpp2": {**LAYOUTS["tp2"], **LAYOUTS["pp2, vpp2"]}},
                )
            ],
        ),
    ],
    ids=["two ranks", "four ranks"],
)
def test_every_layout_gives_the_responses_of_one_process(world_size, layouts):
    cases, expected = [], {}
    for options, named in layouts:
        if not named:
            continue
        config = model_config(**PADDED_VOCABULARY, **options)
        chunks = sampling_model(config)
        weights = full_parameters(chunks)
        for name, layout in named.items():
            cases.append((name, config, weights, layout))
            expected[name] = [sampler(chunks).sample(p, **SAMPLING) for p in PROMPT_SETS]
    first, *others = run_distributed(_sample_in_layouts, world_size, cases)
    for name in expected:
        assert first[name] == expected[name], name
        # Rank 0 alone gets them.
        assert all(responses[name] == [None, None] for responses in others)


@pytest.mark.skipif(not HAS_PREDICTIONS, reason="megatron-core before 0.16 has another model")
def test_layers_that_predict_further_tokens_take_no_part() -> None:
    chunks = sampling_model(model_config({"mtp_num_layers": 1}, **PADDED_VOCABULARY))
    config = model_config(**PADDED_VOCABULARY)
    (prompt,) = random_prompts([5])
    ((found,),) = sampler(chunks).sample(
        [prompt], num_responses=1, max_response_length=6, temperature=0.0, seed=0, step=0
    )
    assert found == greedy_response(unmodified(config, chunks), prompt, 6, config.vocab_size)


def test_a_model_with_mrope_is_refused() -> None:
    config = model_config({"mrope_section": [1, 1, 2]}, position_embedding_type="mrope")
    with pytest.raises(ValueError, match=r"^mrope_section=.* the embedded engine cannot sample"):
        sampler(sampling_model(config))
