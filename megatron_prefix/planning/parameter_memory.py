"""Parameters of a rank, and what it holds for them the whole time: gradients, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prefix.layout import DeltaNetShape
from megatron_prefix.planning.latent_memory import latent_parameters
from megatron_prefix.planning.memory import MemoryModel
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.recurrent_memory import recurrent_parameters


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """What a rank holds the whole time."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def layer_parameters(memory: MemoryModel, layer: int, ranks: RankSizes) -> tuple[int, int]:
    """(dense, expert) parameters of a layer on a rank.

    Layers behind the model's last one are those of multi-token prediction.
    """
    s, tp, h = memory.shape, ranks.tensor, memory.shape.hidden_size
    depth = layer - s.num_layers
    if depth >= 0:
        assert s.predictions is not None
        if s.predictions.repeated and depth > 0:
            return 0, 0
        dense, expert = layer_parameters(memory, s.num_layers - 1, ranks)
        # Three norms, and the projection of two of them.
        return dense + 3 * h * (1 if memory.rms_norm else 2) + 2 * h * h // tp, expert
    biases = memory.linear_bias
    norm = 1 if memory.rms_norm else 2
    recurrent = memory.shape.recurrent_of(layer)
    dense = 0
    if s.attends(layer):
        dense += norm * h + _attention_parameters(memory, tp) + h * biases
    elif recurrent is not None:
        dense += norm * h + recurrent_parameters(recurrent, h, tensor=tp)
        if isinstance(recurrent, DeltaNetShape):
            dense += norm * recurrent.value_channels
    if not s.has_mlp(layer):
        return dense, 0
    dense += norm * h
    first = 2 if s.gated_linear_unit else 1
    if not memory.moe_layers[layer]:
        f = s.ffn_hidden_size // tp
        return dense + (first + 1) * f * h + (first * f + h) * biases, 0
    dense += s.num_experts * (h + biases) + h * memory.shared_expert_gate
    shared = s.moe_shared_expert_ffn_hidden_size // tp
    dense += (first + 1) * shared * h + (first * shared + h) * (biases and shared > 0)
    f = s.moe_ffn_hidden_size // ranks.expert_tensor
    expert = (first + 1) * f * h + (first * f + h) * biases
    return dense, s.num_experts // ranks.expert * expert


def _attention_parameters(memory: MemoryModel, tensor: int) -> int:
    """Of a layer that attends, without the bias of its last projection."""
    s, q, kv = memory.shape, memory.query_width, memory.key_width
    if s.latent is None:
        count = (q + 2 * kv) // tensor * (s.hidden_size + (memory.qkv_bias or memory.linear_bias))
        count += q // tensor * s.hidden_size
        normed = q + kv if memory.qk_norm_all_heads else 2 * s.kv_channels
    else:
        count = latent_parameters(s, s.latent, tensor=tensor, whole_down=memory.fused)
        normed = s.latent.query_rank + s.latent.rank
    count += (1 if memory.rms_norm else 2) * normed * memory.qk_norm
    return count + s.num_attention_heads // tensor * memory.sinks


def outer_parameters(memory: MemoryModel, ranks: RankSizes, *, first: bool, last: bool) -> int:
    """Parameters of the first stage's embeddings and the last one's norm and output layer."""
    h, table = memory.shape.hidden_size, memory.padded_vocab_size // ranks.tensor
    count = 0
    if first:
        count += (table + memory.learned_positions) * h
    if last:
        count += h * (1 if memory.rms_norm else 2)
        if not (memory.tied_embeddings and first):
            count += table * h
        if memory.shape.predictions is not None and not first:
            count += table * h  # an embedding of its own
    return count


def static_bytes(
    memory: MemoryModel, layers: list[int], ranks: RankSizes, *, first: bool, last: bool
) -> StaticBytes:
    """Parameters, gradients and optimizer state of a rank with these layers.

    Gradients are float32 (float64 in float64). Adam keeps two moments, and below float32 a
    float32 copy of the parameters; the distributed optimizer divides these over the ranks that
    have the same parameters.
    """
    dense, expert = outer_parameters(memory, ranks, first=first, last=last), 0
    for layer in layers:
        of_layer = layer_parameters(memory, layer, ranks)
        dense += of_layer[0]
        expert += of_layer[1]
    state = 2 * memory.wide + (memory.wide if memory.element < 4 else 0)
    shards = (ranks.dense_replicas, ranks.expert_replicas)
    if not ranks.distributed_optimizer:
        shards = (1, 1)
    return StaticBytes(
        parameters=(dense + expert) * memory.element,
        gradients=(dense + expert) * memory.wide,
        optimizer=-(-dense * state // shards[0]) - (-expert * state // shards[1]),
    )
