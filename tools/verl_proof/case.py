"""What both engines are given: the model's folder, the samples, the layout, a run's options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.layout import ModelShape, PrefixTree, share_where_it_pays
from megatron_prefix.layout.dealing import order_by_groups
from megatron_prefix.planning.shapes import responses_of

DEFAULT_SHAPES: list[dict[str, Any]] = [
    {"prefix": 37, "responses": [5, 9, 3, 7]},
    {"prefix": 41, "responses": [6, 6, 2, 11]},
    {"prefix": 22, "responses": [8]},
    {"prefix": 30, "responses": [4, [6, {"seen": 4}, 3], 1]},
    {"prefix": 37, "responses": [2, 3]},
    {"prefix": 25, "responses": [6, 7]},
]
"""Ragged groups, a group of one, a response of one token and one with tokens that are not trained
on, two groups that may have one prompt."""

VOCAB_SIZE = 128
HEAD_DIM = 16
NUM_HEADS = 4
NUM_KV_HEADS = 2
HIDDEN_SIZE = 64
FFN_HIDDEN_SIZE = 96
EXPERT_HIDDEN_SIZE = 48
EXPERTS_PER_TOKEN = 2
NUM_LAYERS = 4
MAX_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism."""

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    ep: int

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def pad_to_multiple(self) -> int:
        """What the length of our packed rows is a multiple of."""
        return self.tp * self.cp


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    layout: Layout
    folder: Path
    """Of the model, as Hugging Face has it."""
    prompts: tuple[tuple[int, ...], ...]
    """Of each sample; samples of a group follow one another."""
    responses: tuple[tuple[int, ...], ...]
    response_masks: tuple[tuple[bool, ...], ...]
    """Of each response's tokens: whether it is trained on."""
    old_log_probs: tuple[tuple[float, ...], ...]
    reference_log_probs: tuple[tuple[float, ...], ...]
    advantages: tuple[float, ...]
    samples_of_rank: tuple[tuple[int, ...], ...]
    """[data-parallel rank]"""
    token_budget: int
    """`max_token_len_per_gpu`"""
    micro_batch_size: int | None
    """Samples of a microbatch; None: by tokens (`use_dynamic_bsz`)."""
    optimizer_steps: int
    distributed_optimizer: bool
    num_experts: int
    seed: int

    @property
    def groups_of_ranks(self) -> list[list[list[int]]]:
        """[data-parallel rank][group] samples with the same prompt, in the order dealt."""
        ranks = []
        for samples in self.samples_of_rank:
            groups: dict[tuple[int, ...], list[int]] = {}
            for i in samples:
                groups.setdefault(self.prompts[i], []).append(i)
            ranks.append(list(groups.values()))
        return ranks

    @property
    def tokens_of_whole_groups(self) -> int:
        """Tokens of all ranks' rows if each prompt runs once on a rank, without padding.

        A prompt whose sharing would not pay runs once for each response.
        """
        return sum(self._tokens_of(group) for groups in self.groups_of_ranks for group in groups)

    def can_keep_groups_whole(self, num_microbatches: int) -> bool:
        """Whether every group fits a microbatch, and no rank has fewer groups than microbatches.

        Args:
            num_microbatches: of each data-parallel rank.
        """
        capacity = self._capacity
        if capacity is None:
            return all(map(self._ends_with_microbatches, self.groups_of_ranks))
        return all(
            num_microbatches <= len(groups) and max(map(self._tokens_of, groups)) <= capacity
            for groups in self.groups_of_ranks
        )

    def _ends_with_microbatches(self, groups: list[list[int]]) -> bool:
        """Whether microbatches of so many samples, group after group, split no group."""
        sizes = np.array([len(group) for group in groups])
        stops = sizes.cumsum()
        starts = stops - sizes
        return bool((starts // self.micro_batch_size == (stops - 1) // self.micro_batch_size).all())

    @property
    def _capacity(self) -> int | None:
        """Tokens of a row at most, on all context-parallel ranks; None: counted in samples."""
        if self.micro_batch_size is not None:
            return None
        multiple = self.layout.pad_to_multiple
        return self.token_budget * self.layout.cp // multiple * multiple

    def _tokens_of(self, group: list[int]) -> int:
        """The last token of a sample is nobody's input, and one input predicts the first of each
        response: a group takes P - 1 tokens and those of its responses.
        """
        prompt = self.prompts[group[0]]
        responses = [self.responses[i] for i in group]
        of_responses = sum(map(len, responses))
        unshared = len(group) * (len(prompt) - 1) + of_responses
        tree = PrefixTree.from_sequences([np.array(prompt + response) for response in responses])
        packed = share_where_it_pays(tree, self._model_shape, token_budget=self._capacity)
        return unshared if packed.grouped_tokens == unshared else len(prompt) - 1 + of_responses

    @property
    def _model_shape(self) -> ModelShape:
        return ModelShape(
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN_SIZE,
            ffn_hidden_size=FFN_HIDDEN_SIZE,
            num_attention_heads=NUM_HEADS,
            num_query_groups=NUM_KV_HEADS,
            kv_channels=HEAD_DIM,
            vocab_size=VOCAB_SIZE,
            gated_linear_unit=True,
            num_moe_layers=NUM_LAYERS if self.num_experts else 0,
            num_experts=self.num_experts,
            num_experts_per_token=EXPERTS_PER_TOKEN,
            moe_ffn_hidden_size=EXPERT_HIDDEN_SIZE,
        )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Of all groups, group after group."""

    prompts: list[tuple[int, ...]]
    responses: list[tuple[int, ...]]
    response_masks: list[tuple[bool, ...]]


def draw_samples(shapes: list[dict[str, Any]], seed: int, *, same_prompts: bool) -> Samples:
    """Draw the tokens of all samples.

    Args:
        shapes: of each group, see `read_shapes`.
        seed: of the tokens.
        same_prompts: groups of the same shape of prompt have the same prompt.

    Raises:
        ValueError: responses of a shape that branch.
    """
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(1, VOCAB_SIZE, count).tolist())

    system = tokens(max(shape.get("system", 0) for shape in shapes))
    drawn: dict[tuple[int, int], tuple[int, ...]] = {}
    samples = Samples(prompts=[], responses=[], response_masks=[])
    for index, shape in enumerate(shapes):
        if any(isinstance(response, dict) for response in shape["responses"]):
            raise ValueError(
                f"shapes: the responses of entry {index} branch (turns, then), and verl's samples "
                "are whole responses; write each as a list of its turns"
            )
        of_prompt = (shape.get("system", 0), shape["prefix"])
        if not same_prompts or of_prompt not in drawn:
            drawn[of_prompt] = system[: of_prompt[0]] + tokens(of_prompt[1])
        for response in responses_of(shape):
            samples.prompts.append(drawn[of_prompt])
            samples.responses.append(tokens(response.tokens))
            samples.response_masks.append(tuple(response.loss_mask().tolist()))
    return samples


def deal_samples(
    prompts: list[tuple[int, ...]], lengths: list[int], num_ranks: int
) -> tuple[tuple[int, ...], ...]:
    """[data-parallel rank] samples, as the integration lets verl's trainer deal them.

    verl has as many samples on every rank; where they do not divide, some ranks have less here.
    """
    missing = -len(prompts) % num_ranks
    order = order_by_groups(
        [*prompts, *range(missing)],
        [*map(len, prompts), *[1] * missing],
        [*lengths, *[1] * missing],
        num_ranks=num_ranks,
    )
    part = len(order) // num_ranks
    return tuple(
        tuple(i for i in order[rank * part : (rank + 1) * part] if i < len(prompts))
        for rank in range(num_ranks)
    )


def write_model(folder: Path, *, num_experts: int, seed: int) -> None:
    """A small Qwen3, or Qwen3-MoE where there are experts, as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if num_experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if num_experts else "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": FFN_HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    if num_experts:
        config |= {"num_experts": num_experts, "num_experts_per_tok": EXPERTS_PER_TOKEN}
        config |= {"moe_intermediate_size": EXPERT_HIDDEN_SIZE, "router_aux_loss_coef": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 0.08

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    weights = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE),
        "model.norm.weight": norm(HIDDEN_SIZE),
        "lm_head.weight": matrix(VOCAB_SIZE, HIDDEN_SIZE),
    }
    for number in range(NUM_LAYERS):
        layer = f"model.layers.{number}"
        for name, rows in (("q", NUM_HEADS), ("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS)):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = matrix(rows * HEAD_DIM, HIDDEN_SIZE)
        weights[f"{layer}.self_attn.o_proj.weight"] = matrix(HIDDEN_SIZE, NUM_HEADS * HEAD_DIM)
        for name in ("q_norm", "k_norm"):
            weights[f"{layer}.self_attn.{name}.weight"] = norm(HEAD_DIM)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = norm(HIDDEN_SIZE)
        experts = [f"experts.{i}." for i in range(num_experts)] or [""]
        width = EXPERT_HIDDEN_SIZE if num_experts else FFN_HIDDEN_SIZE
        for expert in experts:
            for name in ("gate", "up"):
                weights[f"{layer}.mlp.{expert}{name}_proj.weight"] = matrix(width, HIDDEN_SIZE)
            weights[f"{layer}.mlp.{expert}down_proj.weight"] = matrix(HIDDEN_SIZE, width)
        if num_experts:
            weights[f"{layer}.mlp.gate.weight"] = matrix(num_experts, HIDDEN_SIZE)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
