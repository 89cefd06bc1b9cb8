"""Activations that autograd keeps for backward; T, N, h, q, kv and b as in `memory.py`."""

from __future__ import annotations

from megatron_prefix.layout.layer_shapes import DeltaNetShape, LatentShape, RecurrentShape
from megatron_prefix.planning.latent_memory import latent_kept
from megatron_prefix.planning.memory import MemoryModel
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.recurrent_memory import (
    recurrent_kept,
    recurrent_root,
    recurrent_states,
)
from megatron_prefix.planning.recurrent_rows import RecurrentRows

_INDEX = 8


def kept_by_layer(
    memory: MemoryModel, layer: int, tokens: int, labels: int, ranks: RankSizes
) -> int:
    """Bytes that autograd keeps of a layer between its forward and backward."""
    predicts = layer >= memory.shape.num_layers
    given = _given(memory, layer, tokens, labels, ranks)
    hidden = given // ranks.sequence * memory.shape.hidden_size * memory.element
    kept = _of_prediction_ends(memory, tokens, labels, ranks) if predicts else 0
    if memory.recompute == "full":
        # That of a depth reads the embeddings of its tokens too.
        return kept + hidden * (1 + predicts)
    return kept + layer_activations(memory, layer, tokens, labels, ranks)


def kept_by_outer(
    memory: MemoryModel, tokens: int, labels: int, *, ranks: RankSizes, first: bool, last: bool
) -> int:
    """Bytes kept by the embedding, and by the final norm, head and loss."""
    kept = 0
    if first:
        kept += tokens * _INDEX
    if last:
        kept += kept_by_final_norm(memory, tokens, labels, ranks)
        # Hidden states, rows, labels, normaliser, entropy and the loss's own few numbers.
        kept += labels * (memory.shape.hidden_size * memory.element + 2 * _INDEX + 2 * memory.wide)
    return kept


def kept_at_borders(
    memory: MemoryModel, tokens: int, ranks: RankSizes, *, first: bool, last: bool
) -> int:
    """Bytes of a chunk's input and output that the pipeline schedule holds until backward."""
    hidden = tokens // ranks.sequence * memory.shape.hidden_size * memory.element
    # Where autograd keeps the input too, it is the same tensor.
    own_input = not first and memory.recompute != "full" and not _norm_keeps_input(memory)
    return hidden * (own_input + (not last))


def kept_of_ranks(
    memory: MemoryModel,
    layers: list[int],
    rows: RecurrentRows,
    tokens: int,
    labels: int,
    ranks: RankSizes,
) -> int:
    """Bytes that autograd keeps more of these layers, where they are recurrent and something comes
    from other ranks."""
    if memory.recompute == "full":
        return 0
    return sum(kept_of_exchange(memory, layer, rows, tokens, labels, ranks) for layer in layers)


def kept_of_exchange(
    memory: MemoryModel,
    layer: int,
    rows: RecurrentRows,
    tokens: int,
    labels: int,
    ranks: RankSizes,
) -> int:
    """Bytes that autograd keeps more of a recurrent layer for what comes from other ranks, or less;
    0 in other layers."""
    recurrent = memory.shape.recurrent_of(layer)
    if recurrent is None:
        return 0
    row, b = rows[recurrent], memory.element
    kept = recurrent_states(recurrent, row.begins, tensor=ranks.tensor, wide=memory.wide)
    kept += row.copied * b
    gate_is_copied = b < memory.wide or memory.rows_of(layer, tokens, labels, ranks) < tokens
    if row.copied and gate_is_copied:
        # Then nothing reads what the first projection has made any longer.
        kept -= tokens * recurrent.projected // ranks.tensor * b
    return kept


def kept_of_root(memory: MemoryModel, layers: list[int], tokens: int, ranks: RankSizes) -> int:
    """Bytes that a series holds of its root's T tokens beside what autograd keeps of them:
    copies of keys and values, or states, and the wide sums of their gradients, in these
    layers."""
    kinds = [memory.shape.recurrent_of(layer) for layer in layers]
    width = memory.shape.recurrence_width
    widths = 2 * memory.key_width // ranks.tensor
    of_keys = (
        sum(map(memory.shape.attends, layers)) * tokens * widths * (memory.element + memory.wide)
    )
    return of_keys + sum(
        recurrent_root(
            kind, width=width, tensor=ranks.tensor, element=memory.element, wide=memory.wide
        )
        for kind in kinds
        if kind is not None
    )


def _given(memory: MemoryModel, layer: int, tokens: int, labels: int, ranks: RankSizes) -> int:
    """Rows that a layer is given: fewer behind the first one that is trimmed."""
    return memory.rows_of(layer - 1, tokens, labels, ranks) if layer else tokens


def _of_prediction_ends(memory: MemoryModel, tokens: int, labels: int, ranks: RankSizes) -> int:
    """What a depth of prediction keeps around what full recompute makes again."""
    head = labels * (memory.shape.hidden_size * memory.element + 2 * _INDEX + 2 * memory.wide)
    return tokens * 2 * _INDEX + head


def layer_activations(
    memory: MemoryModel, layer: int, tokens: int, labels: int, ranks: RankSizes
) -> int:
    """Bytes that autograd keeps of a layer whose forward has run, without full recompute."""
    s, b, tp = memory.shape, memory.element, ranks.tensor
    if layer >= s.num_layers:
        inner = layer_activations(memory, s.num_layers - 1, tokens, labels, ranks)
        # The three norms, and both outputs side by side.
        ends = 3 * _hidden_norm(memory) + 2 * s.hidden_size * b
        if memory.detached_predictions and memory.rms_norm and not memory.fused:
            ends -= s.hidden_size * memory.wide  # no gradient goes to the embeddings
        return inner + tokens // ranks.sequence * ends
    h, q, kv = s.hidden_size, memory.query_width // tp, memory.key_width // tp
    rows = memory.rows_of(layer, tokens, labels, ranks)
    normed = tokens * s.mixes(layer) + rows * s.has_mlp(layer)
    # The norms, and the first products' inputs.
    kept = normed // ranks.sequence * (_hidden_norm(memory) + h * b)
    if not s.mixes(layer):
        return kept + mlp_activations(memory, layer, rows, ranks)
    recurrent = memory.shape.recurrent_of(layer)
    if recurrent is not None:
        kept += recurrent_kept(
            recurrent, tokens=tokens, rows=rows, tensor=tp, element=b, wide=memory.wide
        )
        kept += kept_by_delta_net_norm(memory, recurrent, rows, ranks)
        return kept + mlp_activations(memory, layer, rows, ranks)
    if s.latent is not None:
        kept += _of_latent_attention(memory, s.latent, tokens, rows, ranks)
        return kept + mlp_activations(memory, layer, rows, ranks)
    if rows == tokens or memory.fused:
        kept += tokens * (q + 2 * kv) * b  # the first product's output: values are a view of it
        own_queries = rows < tokens
    else:
        # Queries are a product of their own, of rows and weights that are picked out, and the
        # rows of all tensor-parallel ranks are kept for it.
        kept += tokens * 2 * kv * b + (q + 2 * kv) * h * b
        kept += (tokens - tokens // ranks.sequence + rows) * h * b
        own_queries = True
    if memory.rotary_channels:
        kept += (rows * q + tokens * kv) * b
        if not memory.fused:
            kept += (rows + tokens) * 2 * memory.rotary_channels * b  # cosine and sine
    elif own_queries:
        kept += rows * q * b
    if memory.qk_norm:
        kept += rows * _head_norm(memory, q, copied=own_queries or q > kv)
        kept += tokens * _head_norm(memory, kv, copied=False)
    kept += rows * q * b  # the attention's output
    if memory.recompute == "none":
        kept += rows * s.num_attention_heads // tp * memory.wide  # the log-sum-exp
    return kept + mlp_activations(memory, layer, rows, ranks)


def _of_latent_attention(
    memory: MemoryModel, latent: LatentShape, tokens: int, rows: int, ranks: RankSizes
) -> int:
    """Between the layer's input and its output projection, with the norms of the latents."""
    kept = latent_kept(
        memory.shape,
        latent,
        tokens=tokens,
        rows=rows,
        tensor=ranks.tensor,
        sequence=ranks.sequence,
        element=memory.element,
    )
    if memory.qk_norm:
        norms = _norm(memory, latent.query_rank) * (latent.query_rank > 0)
        kept += tokens // ranks.sequence * (norms + _norm(memory, latent.rank))
    if memory.recompute == "none":
        kept += rows * memory.shape.num_attention_heads // ranks.tensor * memory.wide
    return kept


def kept_by_delta_net_norm(
    memory: MemoryModel, recurrent: RecurrentShape, rows: int, ranks: RankSizes
) -> int:
    """Bytes that the norm of a gated delta net's heads keeps beside its output, 0 in others."""
    if not isinstance(recurrent, DeltaNetShape):
        return 0
    width, size = recurrent.values // ranks.tensor, recurrent.value_channels
    return rows * _head_norm(memory, width, copied=True, size=size)


def mlp_activations(memory: MemoryModel, layer: int, tokens: int, ranks: RankSizes) -> int:
    """Bytes that autograd keeps of a layer's MLP or experts, 0 without them."""
    s, b = memory.shape, memory.element
    if not s.has_mlp(layer):
        return 0
    if not memory.moe_layers[layer]:
        return tokens * memory.mlp_widths * s.ffn_hidden_size // ranks.tensor * b
    k = s.num_experts_per_token
    # The weighting by the router's probability keeps one more, where it is not fused.
    widths = memory.mlp_widths + (not memory.fused)
    experts = k * (
        widths * s.moe_ffn_hidden_size * b * tokens // ranks.tensor
        + s.hidden_size * b * tokens * ranks.expert_tensor // ranks.tensor
    )
    shared = memory.mlp_widths * s.moe_shared_expert_ffn_hidden_size // ranks.tensor * b
    routing = s.num_experts * (b + 1) + k * (2 * _INDEX + memory.wide + b)
    gated = s.hidden_size * b * memory.shared_expert_gate
    return experts + tokens * shared + tokens // ranks.sequence * (routing + gated)


def kept_by_final_norm(memory: MemoryModel, tokens: int, labels: int, ranks: RankSizes) -> int:
    """Bytes that the norm behind the last layer keeps."""
    rows = memory.rows_of(memory.shape.num_layers - 1, tokens, labels, ranks)
    return rows // ranks.sequence * _hidden_norm(memory)


def _hidden_norm(memory: MemoryModel) -> int:
    """Bytes per token that a norm of the hidden states keeps, beside its output."""
    return _norm(memory, memory.shape.hidden_size)


def _norm_keeps_input(memory: MemoryModel) -> bool:
    return memory.fused or not memory.rms_norm or memory.element == memory.wide


def _norm(memory: MemoryModel, width: int) -> int:
    """Bytes per token that a norm over a width keeps, beside its output."""
    if memory.fused:
        return width * memory.element + (4 if memory.rms_norm else 8)
    if memory.rms_norm:
        return 2 * width * memory.wide + memory.wide
    return width * memory.element + 2 * memory.wide


def _head_norm(memory: MemoryModel, width: int, *, copied: bool, size: int | None = None) -> int:
    """Bytes per token that a norm over heads of a width keeps, beside its output.

    `copied`: its input is nothing else's (the queries of a group are gathered from between the
    keys). `size`: of a head, where it is not that of the attention.
    """
    if memory.qk_norm_all_heads and size is None:
        same = memory.element == memory.wide
        own = copied * width * memory.element if same else width * memory.wide
        return own + width * memory.element + memory.wide
    statistics = width // (size or memory.shape.kv_channels) * memory.wide
    if memory.fused or not memory.rms_norm:
        return copied * width * memory.element + statistics * (1 if memory.rms_norm else 2)
    if memory.element == memory.wide:
        return (copied + 1) * width * memory.wide + statistics
    return 2 * width * memory.wide + statistics
