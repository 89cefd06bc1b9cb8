"""The largest transient beside what is kept; T, N, h, q, kv, f and b as in `memory.py`."""

from __future__ import annotations

from megatron_prefix.planning.activation_memory import (
    kept_by_delta_net_norm,
    kept_by_final_norm,
    kept_by_layer,
    kept_by_outer,
    kept_of_exchange,
    layer_activations,
    mlp_activations,
)
from megatron_prefix.planning.latent_memory import latent_expansion
from megatron_prefix.planning.memory import MemoryModel
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.recurrent_memory import recurrent_backward
from megatron_prefix.planning.recurrent_rows import RecurrentRow, RecurrentRows


def largest_transient(
    memory: MemoryModel,
    layers: list[int],
    tokens: int,
    labels: int,
    ranks: RankSizes,
    *,
    last: bool,
    travelling: int = 0,
    root_tokens: int = 0,
    halo_tokens: int = 0,
    window_copies: int = 0,
    recurrent_rows: RecurrentRows | None = None,
) -> int:
    """The most that exists at once beside what is kept, while a microbatch runs.

    That is one of: the head's chunk of logits in forward, or with the weight's gradient in
    backward; a layer in backward, for which full recompute has all of its activations made
    again.

    Args:
        layers: of the chunk.
        tokens, labels: T and N of the microbatch.
        ranks: the sizes of the run.
        last: whether the chunk has the output layer.
        travelling: tokens whose keys and values come from other context-parallel ranks.
        root_tokens: of a root that an earlier row has run, which the row attends to.
        halo_tokens: the same as `travelling` in layers with a sliding window.
        window_copies: rows of keys that such a layer copies side by side.
        recurrent_rows: in recurrent layers; None: their chunks are full, and no rank sends
            states.
    """
    candidates = [0]
    if recurrent_rows is None:
        full = RecurrentRow(chunk_tokens=tokens)
        recurrent_rows = {r: full for r in memory.shape.recurrent_layers if r is not None}
    s, b = memory.shape, memory.element
    if last:
        candidates += _head_transients(memory, tokens, labels, ranks)
    # By the time the layers' backward begins, what the norm, head and loss kept is gone.
    gone = kept_by_outer(memory, tokens, labels, ranks=ranks, first=False, last=last)
    for layer in sorted(layers, reverse=True):
        again = 0
        if memory.recompute == "full":
            again = layer_activations(memory, layer, tokens, labels, ranks)
            again += kept_of_exchange(memory, layer, recurrent_rows, tokens, labels, ranks)
        # Gathered, in the order of the stages, and the gradients of both.
        windowed = s.is_windowed(layer)
        width = 2 * memory.key_width // ranks.tensor * s.attends(layer)
        gathered = (halo_tokens if windowed else travelling) * width * 2 * (b + memory.wide)
        # The row's share of the gradients of the root's keys and values.
        gathered += root_tokens * width * b
        copies = window_copies if windowed else 0
        backward = _layer_backward(memory, layer, tokens, labels, ranks, copies, recurrent_rows)
        if layer >= s.num_layers:
            # The final norm's backward is behind theirs, and waits for its gradient's sum.
            backward += kept_by_final_norm(memory, tokens, labels, ranks)
            backward += tokens // ranks.sequence * s.hidden_size * b
        candidates.append(again - gone + gathered + backward)
        gone += kept_by_layer(memory, layer, tokens, labels, ranks)
    return max(candidates)


def _head_transients(
    memory: MemoryModel, tokens: int, labels: int, ranks: RankSizes
) -> tuple[int, int]:
    """The most that exists at once in the output layer and loss: in forward, and in backward."""
    h, b = memory.shape.hidden_size, memory.element
    table = memory.padded_vocab_size // ranks.tensor
    logits = min(memory.head_chunk_tokens, labels) * table
    narrow = b if b < memory.wide else 0
    weight = table * h
    backward = weight * memory.wide + max(logits * (memory.wide + narrow), weight * narrow)
    rows = memory.rows_of(memory.shape.num_layers - 1, tokens, labels, ranks)
    return logits * 2 * memory.wide, backward + (labels + rows) * h * b


def _layer_backward(
    memory: MemoryModel,
    layer: int,
    tokens: int,
    labels: int,
    ranks: RankSizes,
    copies: int,
    recurrent_rows: RecurrentRows,
) -> int:
    """The most that exists at once in a layer's backward, beside all of its activations.

    `copies`: rows of keys that its attention copies. `recurrent_rows`: in recurrent layers.
    """
    s, b, tp = memory.shape, memory.element, ranks.tensor
    layer = min(layer, s.num_layers - 1)
    rows = memory.rows_of(layer, tokens, labels, ranks)
    row = rows // ranks.sequence * s.hidden_size * b
    if memory.moe_layers[layer]:
        f = s.moe_ffn_hidden_size // ranks.expert_tensor
        width = rows * s.num_experts_per_token * s.moe_ffn_hidden_size // tp
        row += row * s.num_experts_per_token  # the experts' rows
    else:
        f = s.ffn_hidden_size // tp
        width = rows * f
    # The second product: gradients of its input and weight. Then the activation: gradients of
    # its factors, when the second product's input is gone.
    factors = 2 if s.gated_linear_unit else 1
    mlp = row + max(width + f * s.hidden_size, factors * width) * b
    if not s.mixes(layer):
        return mlp
    if not s.has_mlp(layer):
        mlp = 0
    recurrent = memory.shape.recurrent_of(layer)
    if recurrent is not None:
        of_row = recurrent_rows[recurrent]
        again = recurrent_backward(
            recurrent,
            chunk_tokens=of_row.chunk_tokens,
            widest_wave=of_row.widest_wave,
            tokens=tokens,
            rows=rows,
            tensor=tp,
            element=b,
            wide=memory.wide,
        )
        again -= kept_by_delta_net_norm(memory, recurrent, rows, ranks)
        if of_row.copied and b == memory.wide and rows == tokens:
            # The gate, whose backward is through, alone has read what the first projection made.
            again -= tokens * recurrent.projected // tp * b
        return max(mlp, row + again - mlp_activations(memory, layer, rows, ranks))
    # dq, dk and dv in a wide dtype, then in their own, and dout; the MLP's activations are
    # gone by then.
    heads = (rows * memory.query_width + tokens * 2 * memory.key_width) // tp * (memory.wide + b)
    attention = (
        row
        + heads
        + rows * memory.query_width // tp * b
        - mlp_activations(memory, layer, rows, ranks)
    )
    if s.latent is not None:  # the gradient of what keys and values are split from
        attention += tokens * latent_expansion(s, s.latent) // tp * b
    # Copied keys and values, the gradients of both, and those of one sorted by their rows; on
    # the CPU the kernel copies all four once more in its blocks.
    attention += (
        copies * memory.key_width // tp * (2 * b + (3 if memory.fused else 6) * memory.wide)
    )
    return max(mlp, attention)
