"""What a training step holds in memory, in bytes, from shapes alone.

Counted on each rank: parameters, gradient buffers and the optimizer's state, in
`parameter_memory.py`; activations that autograd keeps for backward, in `activation_memory.py`, of
as many microbatches as the pipeline schedule has in flight; and the largest transient on top of
them, in `backward_memory.py`. Not counted: what the allocator, CUDA, communication libraries and
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
from megatron_prefix.planning.rank_sizes import RankSizes

Recompute = Literal["none", "selective", "full"]

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


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

    @property
    def query_width(self) -> int:
        """q"""
        return self.shape.num_attention_heads * self.shape.kv_channels

    @property
    def key_width(self) -> int:
        """kv"""
        return self.shape.num_query_groups * self.shape.kv_channels

    def rows_of(self, layer: int, tokens: int, labels: int, ranks: RankSizes) -> int:
        """Rows that a layer goes on with: the labelled ones, filled up, where it is trimmed."""
        if not (self.trim_last_layer and layer >= self.shape.first_trimmed):
            return tokens
        return min(tokens, -(-max(labels, 1) // ranks.sequence) * ranks.sequence)
