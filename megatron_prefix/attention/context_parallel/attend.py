"""The attention of one rank's queries, by the kind of communication."""

from __future__ import annotations

from torch import Tensor

from megatron_prefix.attention.context_parallel.gathered import GatheredAttention
from megatron_prefix.attention.context_parallel.halo import RankHalo
from megatron_prefix.attention.context_parallel.heads import attend_by_heads
from megatron_prefix.attention.context_parallel.latents import LatentAttention, LatentKeys
from megatron_prefix.attention.context_parallel.layer import RankLayer
from megatron_prefix.attention.context_parallel.ring import RingAttention
from megatron_prefix.attention.function import attend_to_row, checked_inputs
from megatron_prefix.layout import CommType


def attend_across_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: RankLayer,
    comm_type: CommType,
    *,
    windowed: bool = False,
    sink: Tensor | None = None,
    latents: LatentKeys | None = None,
) -> Tensor:
    """Attention of this rank's queries. Collective over the group, backward too.

    Args:
        q: [N, H, D]; k: [C, Hk, D]; v: [C, Hk, Dv].
        layer: its stages are those of `comm_type`, if not of all kinds.
        comm_type: the kind of communication.
        windowed: within the sliding window that the row was planned for: only halos travel then,
            whatever the kind.
        sink: [H] see `prefix_attention`. Its gradient is that of this rank's queries (with `a2a`,
            of all queries for this rank's heads): to be summed over the ranks.
        latents: what k and v were expanded from, for `latent_gather`; without them that is
            `all_gather`.

    Returns:
        [N, H, Dv] in q's dtype.

    Raises:
        ValueError: the shapes or dtypes of q, k, v and the stages do not belong together, or the
            row has been planned for other kinds of communication.
    """
    q, k, v = checked_inputs(q, k, v, layer.stages)
    stages = layer.stages
    if windowed and stages.windowed is not None:
        rows = stages.windowed.halo
        halo = None if rows is None else RankHalo(rows=rows, layer=layer)
        of_window = (stages.windowed.stage,)
        return attend_to_row(q, k, v, of_window, layer.compute, sink=sink, halo=halo)
    planned = {
        "all_gather": stages.gathered,
        "p2p": stages.ring,
        "a2a": stages.whole_row,
        "latent_gather": stages.gathered,
    }
    if planned[comm_type] is None:
        kinds = ", ".join(kind for kind, found in planned.items() if found is not None)
        raise ValueError(
            f"cp_comm_type={comm_type} of layer {layer.number}: the row was planned for {kinds} "
            "only; give the batch's AttentionSetup the comm_types of all layers"
        )
    if comm_type == "a2a":
        return attend_by_heads(q, k, v, sink, layer)
    if comm_type == "latent_gather" and latents is not None:
        return LatentAttention.apply(q, k, v, sink, latents.shard, latents.weight, layer, latents)
    function = RingAttention if comm_type == "p2p" else GatheredAttention
    return function.apply(q, k, v, sink, layer)
