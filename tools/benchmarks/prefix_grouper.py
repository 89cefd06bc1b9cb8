"""The released `prefix_grouper` package on a Hugging Face Qwen2 of equal size and weights.

It ships no attention function for the CPU, so two on torch's scaled_dot_product_attention are
registered here. `prefix_grouper` computes the prompt causally and the responses with one [R, P + R]
mask for all, key/value heads shared in place: the padding mask that the package hands over changes
nothing where padding is at the end, so the function leaves it out. `prefix_grouper_mask` takes it
in, as a function for any padding has to: [G, 1, R, P + R], key/value heads repeated. The step is
the one that the package's documentation describes: grouped inputs, logits of all of them,
`split_output`, and the loss on the responses.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.model.build import ModelChunks

from .shapes import advantages, rollouts

_ATTENTION = "{}_sdpa"


class PrefixGrouperRunner:
    """Forward, loss and backward; see `Runner`."""

    def __init__(self, case: Any, chunks: ModelChunks, *, side: str) -> None:
        """Build the model with the weights of `chunks`, and the attention function of this side.

        Raises:
            ImportError: `prefix_grouper` or `transformers` is missing.
        """
        package = importlib.import_module("prefix_grouper")
        _register(side, with_mask=side == "prefix_grouper_mask")
        self._model = _qwen2(case, chunks, attention=_ATTENTION.format(side))
        self._chunks = chunks
        prompt, responses = rollouts(case.shape, case.sizes.vocab, case.seed)
        longest = max(case.shape.responses)
        completions = torch.zeros(len(responses), longest, dtype=torch.int64)
        mask = torch.zeros(len(responses), longest, dtype=torch.bool)
        for i, response in enumerate(responses):
            completions[i, : len(response)] = torch.from_numpy(response)
            mask[i, : len(response)] = True
        prompts = torch.from_numpy(prompt)[None]
        prompt_mask = torch.ones_like(prompts, dtype=torch.bool)
        self._grouper = package.PrefixGrouper.from_ungrouped_masks(
            prefix_mask=prompt_mask,
            suffix_mask=mask,
            group_sizes=len(responses),
            padding_mode="right",
        )
        self._inputs = self._grouper.concat_input(prompts, prompt_mask, completions, mask)
        positions = [np.arange(len(prompt))]
        positions += [len(prompt) + np.arange(len(r)) for r in responses]
        self._positions = torch.from_numpy(np.concatenate(positions))[None]
        self._completions = completions
        weight = 1.0 / sum(case.shape.responses)
        self._weights = weight * torch.tensor(advantages(case.shape))[:, None]
        self._loss = torch.zeros(())

    def step(self) -> None:
        """See `Runner`."""
        self._model.zero_grad(set_to_none=True)
        logits = self._model(
            input_ids=self._inputs,
            position_ids=self._positions,
            use_cache=False,
            prefix_grouper=self._grouper,
        ).logits
        _, _, output, mask = self._grouper.split_output(logits, include_prefix_last=1)
        output, mask = output[:, :-1], mask[:, 1:]
        chosen = output.gather(-1, self._completions[..., None])[..., 0]
        log_probs = chosen - output.logsumexp(-1)
        ratio = (log_probs - log_probs.detach()).exp()
        self._loss = -(ratio * self._weights * mask).sum()
        self._loss.backward()

    def result(self) -> dict[str, Tensor]:
        """See `Runner`."""
        gradients = {n: p.grad for n, p in self._model.named_parameters()}
        return {
            "loss": 2 + self._loss.detach(),
            **{
                f"gradient of {name}": tensor
                for name, tensor in _to_megatron(gradients, self._chunks).items()
            },
        }


def _register(side: str, *, with_mask: bool) -> None:
    from transformers import AttentionInterface

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scaling: float, **_: Any
    ) -> Tensor:
        size, keys = q.shape[2], k.shape[2]
        causal = None
        if with_mask or size < keys:
            causal = torch.ones(size, keys, dtype=torch.bool).tril_(keys - size)
        if with_mask:
            causal = causal & mask[:, None, None]
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=causal,
            is_causal=causal is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2)

    def of_layer(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        prefix_grouper: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        return prefix_grouper.forward(attend, query, key, value, scaling=scaling), None

    AttentionInterface.register(_ATTENTION.format(side), of_layer)


def _qwen2(case: Any, chunks: ModelChunks, *, attention: str) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = case.sizes
    model_config = chunks.config
    config = Qwen2Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=1 << 20,
        rms_norm_eps=model_config.layernorm_epsilon,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Qwen2ForCausalLM(config).to(getattr(torch, case.dtype)).train()
    weights = {name: p.data for name, p in chunks.named_parameters()}
    with torch.no_grad():
        for name, tensor in _to_hugging_face(weights, chunks).items():
            model.get_parameter(name).copy_(tensor)
    return model


_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_OF_LAYER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}


def _names(name: str) -> list[str]:
    """Hugging Face's names of what a Megatron parameter is made of."""
    if name in _WHOLE:
        return [_WHOLE[name]]
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return [f"model.layers.{layer}.{part}" for part in _OF_LAYER[rest]]


def _to_hugging_face(tensors: dict[str, Tensor], chunks: ModelChunks) -> dict[str, Tensor]:
    config, found = chunks.config, {}
    groups, dim = config.num_query_groups, config.kv_channels
    heads = config.num_attention_heads // groups
    for name, tensor in tensors.items():
        if "linear_qkv" in name:
            by_group = tensor.unflatten(0, (groups, heads + 2, dim))
            parts = [p.flatten(0, 2) for p in by_group.split([heads, 1, 1], dim=1)]
        else:
            names = _names(name)
            parts = list(tensor.chunk(len(names)))
        found.update(zip(_names(name), parts, strict=True))
    return found


def _to_megatron(tensors: dict[str, Tensor], chunks: ModelChunks) -> dict[str, Tensor]:
    config, found = chunks.config, {}
    groups, dim = config.num_query_groups, config.kv_channels
    for name, _ in chunks.named_parameters():
        parts = [tensors[n] for n in _names(name)]
        if "linear_qkv" in name:
            parts = [p.unflatten(0, (groups, -1, dim)) for p in parts]
            found[name] = torch.cat(parts, dim=1).flatten(0, 2)
        else:
            found[name] = torch.cat(parts)
    return found
