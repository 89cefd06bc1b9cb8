"""What a training step holds in memory, in bytes, from shapes alone.

Counted on each rank: parameters, gradient buffers and the optimizer's state; activations that
autograd keeps for backward, of as many microbatches as the pipeline schedule has in flight; and the
largest transient on top of them. Not counted: what the allocator, CUDA, communication libraries and
kernels' workspaces add, and tensors of a few bytes per token.

Activations are those of this package on Megatron's layers. `fused=False` is what Megatron's local
layers keep, with torch's norms, activation and rotary embedding; the tests hold it to real models.
`fused=True` is what Transformer Engine's norms and Megatron's fused activation and rotary embedding
keep, by their source.

Legend: T tokens of the row on this rank, N labelled positions, which are the rows that a trimmed
last layer goes on with, h hidden size, q and kv widths of all query and key/value heads, f MLP
width, b bytes of an element, "wide" float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.layer_shapes import LatentShape, RecurrentShape
from megatron_prefix.planning.latent_memory import (
    latent_expansion,
    latent_kept,
    latent_parameters,
)
from megatron_prefix.planning.rank_sizes import RankSizes
from megatron_prefix.planning.recurrent_memory import (
    recurrent_backward,
    recurrent_kept,
    recurrent_parameters,
    recurrent_root,
    recurrent_states,
)
from megatron_prefix.planning.recurrent_rows import RecurrentRow

Recompute = Literal["none", "selective", "full"]

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
_INDEX = 8


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


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """The sizes of a decoder and of its execution that memory depends on."""

    shape: ModelShape
    moe_layers: tuple[bool, ...]
    """[num_layers] whether each has experts."""
    padded_vocab_size: int
    tied_embeddings: bool
    learned_positions: int = 0
    """Rows of a learned position embedding."""
    rotary_channels: int = 0
    """Rotated channels of a head; 0 without rotary embedding."""
    rms_norm: bool = True
    qk_norm: bool = False
    qk_norm_all_heads: bool = False
    qkv_bias: bool = False
    linear_bias: bool = False
    sinks: bool = False
    shared_expert_gate: bool = False
    mlp_widths: int = 3
    """Tensors of the MLP's width f that are kept from its first product's output to its second
    one's input."""
    fused: bool = True
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    recompute: Recompute = "none"
    trim_last_layer: bool = True
    """The last layer goes on with the labelled positions only."""
    detached_predictions: bool = False
    """Multi-token prediction trains its own layers alone."""
    head_chunk_tokens: int = 1024
    """Rows of logits that exist at once."""

    @property
    def element(self) -> int:
        """b"""
        return ELEMENT_BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of an element of sums, softmax statistics and logits."""
        return max(4, self.element)

    # Parameters

    def layer_parameters(self, layer: int, ranks: RankSizes) -> tuple[int, int]:
        """(dense, expert) parameters of a layer on a rank.

        Layers behind the model's last one are those of multi-token prediction.
        """
        s, tp, h = self.shape, ranks.tensor, self.shape.hidden_size
        depth = layer - s.num_layers
        if depth >= 0:
            assert s.predictions is not None
            if s.predictions.repeated and depth > 0:
                return 0, 0
            dense, expert = self.layer_parameters(s.num_layers - 1, ranks)
            # Three norms, and the projection of two of them.
            return dense + 3 * h * (1 if self.rms_norm else 2) + 2 * h * h // tp, expert
        biases = self.linear_bias
        norm = 1 if self.rms_norm else 2
        recurrent = self._recurrent(layer)
        dense = 0
        if s.attends(layer):
            dense += norm * h + self._attention_parameters(tp) + h * biases
        elif recurrent is not None:
            dense += norm * (h + recurrent.value_channels)
            dense += recurrent_parameters(recurrent, h, tensor=tp)
        if not s.has_mlp(layer):
            return dense, 0
        dense += norm * h
        first = 2 if s.gated_linear_unit else 1
        if not self.moe_layers[layer]:
            f = s.ffn_hidden_size // tp
            return dense + (first + 1) * f * h + (first * f + h) * biases, 0
        dense += s.num_experts * (h + biases) + h * self.shared_expert_gate
        shared = s.moe_shared_expert_ffn_hidden_size // tp
        dense += (first + 1) * shared * h + (first * shared + h) * (biases and shared > 0)
        f = s.moe_ffn_hidden_size // ranks.expert_tensor
        expert = (first + 1) * f * h + (first * f + h) * biases
        return dense, s.num_experts // ranks.expert * expert

    def _attention_parameters(self, tensor: int) -> int:
        """Of a layer that attends, without the bias of its last projection."""
        s, q, kv = self.shape, self._q, self._kv
        if s.latent is None:
            count = (q + 2 * kv) // tensor * (s.hidden_size + (self.qkv_bias or self.linear_bias))
            count += q // tensor * s.hidden_size
            normed = q + kv if self.qk_norm_all_heads else 2 * s.kv_channels
        else:
            count = latent_parameters(s, s.latent, tensor=tensor, whole_down=self.fused)
            normed = s.latent.query_rank + s.latent.rank
        count += (1 if self.rms_norm else 2) * normed * self.qk_norm
        return count + s.num_attention_heads // tensor * self.sinks

    def _recurrent(self, layer: int) -> RecurrentShape | None:
        """Of a recurrent layer; None: the layer is none."""
        return self.shape.recurrent if any(self.shape.recurrent_layers[layer : layer + 1]) else None

    def outer_parameters(self, ranks: RankSizes, *, first: bool, last: bool) -> int:
        """Parameters of the first stage's embeddings and the last one's norm and output layer."""
        h, table = self.shape.hidden_size, self.padded_vocab_size // ranks.tensor
        count = 0
        if first:
            count += (table + self.learned_positions) * h
        if last:
            count += h * (1 if self.rms_norm else 2)
            if not (self.tied_embeddings and first):
                count += table * h
            if self.shape.predictions is not None and not first:
                count += table * h  # an embedding of its own
        return count

    def static(
        self, layers: list[int], ranks: RankSizes, *, first: bool, last: bool
    ) -> StaticBytes:
        """Parameters, gradients and optimizer state of a rank with these layers.

        Gradients are float32 (float64 in float64). Adam keeps two moments, and below float32 a
        float32 copy of the parameters; the distributed optimizer divides these over the ranks that
        have the same parameters.
        """
        dense, expert = self.outer_parameters(ranks, first=first, last=last), 0
        for layer in layers:
            of_layer = self.layer_parameters(layer, ranks)
            dense += of_layer[0]
            expert += of_layer[1]
        state = 2 * self.wide + (self.wide if self.element < 4 else 0)
        shards = (ranks.dense_replicas, ranks.expert_replicas)
        if not ranks.distributed_optimizer:
            shards = (1, 1)
        return StaticBytes(
            parameters=(dense + expert) * self.element,
            gradients=(dense + expert) * self.wide,
            optimizer=-(-dense * state // shards[0]) - (-expert * state // shards[1]),
        )

    # Activations

    def kept_by_layer(self, layer: int, tokens: int, labels: int, ranks: RankSizes) -> int:
        """Bytes that autograd keeps of a layer between its forward and backward."""
        predicts = layer >= self.shape.num_layers
        given = self._given(layer, tokens, labels, ranks)
        hidden = given // ranks.sequence * self.shape.hidden_size * self.element
        kept = self._of_prediction_ends(tokens, labels, ranks) if predicts else 0
        if self.recompute == "full":
            # That of a depth reads the embeddings of its tokens too.
            return kept + hidden * (1 + predicts)
        return kept + self._all_of_layer(layer, tokens, labels, ranks)

    def kept_by_outer(
        self, tokens: int, labels: int, *, ranks: RankSizes, first: bool, last: bool
    ) -> int:
        """Bytes kept by the embedding, and by the final norm, head and loss."""
        kept = 0
        if first:
            kept += tokens * _INDEX
        if last:
            kept += self._final_norm(tokens, labels, ranks)
            # Hidden states, rows, labels, normaliser, entropy and the loss's own few numbers.
            kept += labels * (self.shape.hidden_size * self.element + 2 * _INDEX + 2 * self.wide)
        return kept

    def _final_norm(self, tokens: int, labels: int, ranks: RankSizes) -> int:
        rows = self._rows(self.shape.num_layers - 1, tokens, labels, ranks)
        return rows // ranks.sequence * self._norm

    def kept_at_borders(self, tokens: int, ranks: RankSizes, *, first: bool, last: bool) -> int:
        """Bytes of a chunk's input and output that the pipeline schedule holds until backward."""
        hidden = tokens // ranks.sequence * self.shape.hidden_size * self.element
        # Where autograd keeps the input too, it is the same tensor.
        own_input = not first and self.recompute != "full" and not self._norm_keeps_input
        return hidden * (own_input + (not last))

    def root_keys(self, layers: list[int], tokens: int, ranks: RankSizes) -> int:
        """Bytes that a series holds of its root's T tokens beside what autograd keeps of them:
        copies of keys and values, or states, and the wide sums of their gradients, in these
        layers."""
        kinds = [self._recurrent(layer) for layer in layers]
        widths = 2 * self._kv // ranks.tensor
        of_keys = (
            sum(map(self.shape.attends, layers)) * tokens * widths * (self.element + self.wide)
        )
        return of_keys + sum(
            recurrent_root(kind, tensor=ranks.tensor, element=self.element, wide=self.wide)
            for kind in kinds
            if kind is not None
        )

    def kept_of_ranks(self, layers: list[int], row: RecurrentRow, ranks: RankSizes) -> int:
        """Bytes that autograd keeps of what comes from other ranks, in recurrent ones of these
        layers."""
        if self.recompute == "full":
            return 0
        return sum(self._of_ranks(layer, row, ranks) for layer in layers)

    def _of_ranks(self, layer: int, row: RecurrentRow, ranks: RankSizes) -> int:
        recurrent = self._recurrent(layer)
        if recurrent is None:
            return 0
        states = recurrent_states(recurrent, row.begins, tensor=ranks.tensor, wide=self.wide)
        return states + row.copied * self.element

    def transient(
        self,
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
        recurrent_row: RecurrentRow | None = None,
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
            recurrent_row: of recurrent layers; None: their chunks are full, and no rank sends
                states.
        """
        candidates = [0]
        recurrent_row = recurrent_row or RecurrentRow(chunk_tokens=tokens)
        s, b = self.shape, self.element
        if last:
            table = self.padded_vocab_size // ranks.tensor
            logits = min(self.head_chunk_tokens, labels) * table
            narrow = b if b < self.wide else 0
            forward = logits * 2 * self.wide
            weight = table * s.hidden_size
            backward = weight * self.wide + max(logits * (self.wide + narrow), weight * narrow)
            rows = self._rows(s.num_layers - 1, tokens, labels, ranks)
            backward += (labels + rows) * s.hidden_size * b
            candidates += [forward, backward]
        # By the time the layers' backward begins, what the norm, head and loss kept is gone.
        gone = self.kept_by_outer(tokens, labels, ranks=ranks, first=False, last=last)
        for layer in sorted(layers, reverse=True):
            again = 0
            if self.recompute == "full":
                again = self._all_of_layer(layer, tokens, labels, ranks)
                again += self._of_ranks(layer, recurrent_row, ranks)
            # Gathered, in the order of the stages, and the gradients of both.
            windowed = s.is_windowed(layer)
            width = 2 * self._kv // ranks.tensor * s.attends(layer)
            gathered = (halo_tokens if windowed else travelling) * width * 2 * (b + self.wide)
            # The row's share of the gradients of the root's keys and values.
            gathered += root_tokens * width * b
            copies = window_copies if windowed else 0
            backward = self._layer_backward(layer, tokens, labels, ranks, copies, recurrent_row)
            if layer >= s.num_layers:
                # The final norm's backward is behind theirs, and waits for its gradient's sum.
                backward += self._final_norm(tokens, labels, ranks)
                backward += tokens // ranks.sequence * s.hidden_size * b
            candidates.append(again - gone + gathered + backward)
            gone += self.kept_by_layer(layer, tokens, labels, ranks)
        return max(candidates)

    def _rows(self, layer: int, tokens: int, labels: int, ranks: RankSizes) -> int:
        """Rows that a layer goes on with: the labelled ones, filled up, where it is trimmed."""
        if not (self.trim_last_layer and layer >= self.shape.first_trimmed):
            return tokens
        return min(tokens, -(-max(labels, 1) // ranks.sequence) * ranks.sequence)

    def _given(self, layer: int, tokens: int, labels: int, ranks: RankSizes) -> int:
        """Rows that a layer is given: fewer behind the first one that is trimmed."""
        return self._rows(layer - 1, tokens, labels, ranks) if layer else tokens

    def _of_prediction_ends(self, tokens: int, labels: int, ranks: RankSizes) -> int:
        """What a depth of prediction keeps around what full recompute makes again."""
        head = labels * (self.shape.hidden_size * self.element + 2 * _INDEX + 2 * self.wide)
        return tokens * 2 * _INDEX + head

    def _all_of_layer(self, layer: int, tokens: int, labels: int, ranks: RankSizes) -> int:
        s, b, tp = self.shape, self.element, ranks.tensor
        if layer >= s.num_layers:
            inner = self._all_of_layer(s.num_layers - 1, tokens, labels, ranks)
            # The three norms, and both outputs side by side.
            ends = 3 * self._norm + 2 * s.hidden_size * b
            if self.detached_predictions and self.rms_norm and not self.fused:
                ends -= s.hidden_size * self.wide  # no gradient goes to the embeddings
            return inner + tokens // ranks.sequence * ends
        h, q, kv = s.hidden_size, self._q // tp, self._kv // tp
        rows = self._rows(layer, tokens, labels, ranks)
        normed = tokens * s.mixes(layer) + rows * s.has_mlp(layer)
        # The norms, and the first products' inputs.
        kept = normed // ranks.sequence * (self._norm + h * b)
        if not s.mixes(layer):
            return kept + self._of_mlp(layer, rows, ranks)
        recurrent = self._recurrent(layer)
        if recurrent is not None:
            kept += recurrent_kept(
                recurrent, tokens=tokens, rows=rows, tensor=tp, element=b, wide=self.wide
            )
            kept += rows * self._head_norm(
                recurrent.values // tp, copied=True, size=recurrent.value_channels
            )
            return kept + self._of_mlp(layer, rows, ranks)
        if s.latent is not None:
            kept += self._of_latent_attention(s.latent, tokens, rows, ranks)
            return kept + self._of_mlp(layer, rows, ranks)
        if rows == tokens or self.fused:
            kept += tokens * (q + 2 * kv) * b  # the first product's output: values are a view of it
            own_queries = rows < tokens
        else:
            # Queries are a product of their own, of rows and weights that are picked out, and the
            # rows of all tensor-parallel ranks are kept for it.
            kept += tokens * 2 * kv * b + (q + 2 * kv) * h * b
            kept += (tokens - tokens // ranks.sequence + rows) * h * b
            own_queries = True
        if self.rotary_channels:
            kept += (rows * q + tokens * kv) * b
            if not self.fused:
                kept += (rows + tokens) * 2 * self.rotary_channels * b  # cosine and sine
        elif own_queries:
            kept += rows * q * b
        if self.qk_norm:
            kept += rows * self._head_norm(q, copied=own_queries or q > kv)
            kept += tokens * self._head_norm(kv, copied=False)
        kept += rows * q * b  # the attention's output
        if self.recompute == "none":
            kept += rows * s.num_attention_heads // tp * self.wide  # the log-sum-exp
        return kept + self._of_mlp(layer, rows, ranks)

    def _of_latent_attention(
        self, latent: LatentShape, tokens: int, rows: int, ranks: RankSizes
    ) -> int:
        kept = latent_kept(
            self.shape,
            latent,
            tokens=tokens,
            rows=rows,
            tensor=ranks.tensor,
            sequence=ranks.sequence,
            element=self.element,
        )
        if self.qk_norm:
            norms = self._norm_of(latent.query_rank) * (latent.query_rank > 0)
            kept += tokens // ranks.sequence * (norms + self._norm_of(latent.rank))
        if self.recompute == "none":
            kept += rows * self.shape.num_attention_heads // ranks.tensor * self.wide
        return kept

    def _of_mlp(self, layer: int, tokens: int, ranks: RankSizes) -> int:
        s, b = self.shape, self.element
        if not s.has_mlp(layer):
            return 0
        if not self.moe_layers[layer]:
            return tokens * self.mlp_widths * s.ffn_hidden_size // ranks.tensor * b
        k = s.num_experts_per_token
        # The weighting by the router's probability keeps one more, where it is not fused.
        widths = self.mlp_widths + (not self.fused)
        experts = k * (
            widths * s.moe_ffn_hidden_size * b * tokens // ranks.tensor
            + s.hidden_size * b * tokens * ranks.expert_tensor // ranks.tensor
        )
        shared = self.mlp_widths * s.moe_shared_expert_ffn_hidden_size // ranks.tensor * b
        routing = s.num_experts * (b + 1) + k * (2 * _INDEX + self.wide + b)
        gated = s.hidden_size * b * self.shared_expert_gate
        return experts + tokens * shared + tokens // ranks.sequence * (routing + gated)

    def _layer_backward(
        self,
        layer: int,
        tokens: int,
        labels: int,
        ranks: RankSizes,
        copies: int,
        recurrent_row: RecurrentRow,
    ) -> int:
        """The most that exists at once in a layer's backward, beside all of its activations.

        `copies`: rows of keys that its attention copies. `recurrent_row`: of recurrent layers.
        """
        s, b, tp = self.shape, self.element, ranks.tensor
        layer = min(layer, s.num_layers - 1)
        rows = self._rows(layer, tokens, labels, ranks)
        row = rows // ranks.sequence * s.hidden_size * b
        if self.moe_layers[layer]:
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
        recurrent = self._recurrent(layer)
        if recurrent is not None:
            again = recurrent_backward(
                recurrent, tokens=recurrent_row.chunk_tokens, tensor=tp, wide=self.wide
            )
            return max(mlp, row + again - self._of_mlp(layer, rows, ranks))
        # dq, dk and dv in a wide dtype, then in their own, and dout; the MLP's activations are
        # gone by then.
        heads = (rows * self._q + tokens * 2 * self._kv) // tp * (self.wide + b)
        attention = row + heads + rows * self._q // tp * b - self._of_mlp(layer, rows, ranks)
        if s.latent is not None:  # the gradient of what keys and values are split from
            attention += tokens * latent_expansion(s, s.latent) // tp * b
        # Copied keys and values, the gradients of both, and those of one sorted by their rows; on
        # the CPU the kernel copies all four once more in its blocks.
        attention += copies * self._kv // tp * (2 * b + (3 if self.fused else 6) * self.wide)
        return max(mlp, attention)

    @property
    def _norm(self) -> int:
        return self._norm_of(self.shape.hidden_size)

    def _norm_of(self, width: int) -> int:
        """Bytes per token that a norm over a width keeps, beside its output."""
        if self.fused:
            return width * self.element + (4 if self.rms_norm else 8)
        if self.rms_norm:
            return 2 * width * self.wide + self.wide
        return width * self.element + 2 * self.wide

    @property
    def _norm_keeps_input(self) -> bool:
        return self.fused or not self.rms_norm or self.element == self.wide

    def _head_norm(self, width: int, *, copied: bool, size: int | None = None) -> int:
        """Bytes per token that a norm over heads of a width keeps, beside its output.

        `copied`: its input is nothing else's (the queries of a group are gathered from between the
        keys). `size`: of a head, where it is not that of the attention.
        """
        if self.qk_norm_all_heads and size is None:
            same = self.element == self.wide
            own = copied * width * self.element if same else width * self.wide
            return own + width * self.element + self.wide
        statistics = width // (size or self.shape.kv_channels) * self.wide
        if self.fused or not self.rms_norm:
            return copied * width * self.element + statistics * (1 if self.rms_norm else 2)
        if self.element == self.wide:
            return (copied + 1) * width * self.wide + statistics
        return 2 * width * self.wide + statistics

    @property
    def _q(self) -> int:
        return self.shape.num_attention_heads * self.shape.kv_channels

    @property
    def _kv(self) -> int:
        return self.shape.num_query_groups * self.shape.kv_channels
