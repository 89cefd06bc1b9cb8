"""What context-parallel ranks send each other, and how many bytes.

A shard is keys and values of one rank's sharded tokens, [tokens, 2, Hk, D], keys first; ranks may
hold different numbers of tokens. All calls are collective over the group, in the same order on
every rank. Gradients travel in the dtype that they are added up in, and are added up in the order
of the ranks, or of the ring: the same bits every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Direction = Literal["forward", "backward"]
Recorder = Callable[[int, int], None]
"""Counts bytes: called with those sent and those received."""

# The name since torch 2.13; the other one is deprecated.
_all_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that this rank has exchanged with others, by (layer number, direction).

    Counted where tensors are handed to `torch.distributed`. A forward that activation recompute
    runs again counts again.
    """

    sent: Counter[tuple[int, Direction]] = field(default_factory=Counter)
    received: Counter[tuple[int, Direction]] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A tensor that is still being received."""

    tensor: Tensor
    works: Sequence[dist.Work]
    keep: tuple[Tensor, ...] = ()
    """Tensors that are being sent: they must live until then."""

    def wait(self) -> Tensor:
        """The tensor, complete."""
        for work in self.works:
            work.wait()
        return self.tensor


class Exchange:
    """The communication of one row's attention between the ranks of a context-parallel group."""

    def __init__(self, group: dist.ProcessGroup, shard_tokens: Sequence[int]) -> None:
        """Nothing is sent yet.

        Args:
            group: the context-parallel group.
            shard_tokens: tokens of each rank's shard.
        """
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        assert len(shard_tokens) == self.size
        self.shard_tokens = tuple(int(n) for n in shard_tokens)
        self.traffic = Traffic()

    @property
    def own_tokens(self) -> int:
        """n: tokens of this rank's shard, which its row begins with."""
        return self.shard_tokens[self.rank]

    def recorder(self, layer_number: int, direction: Direction) -> Recorder:
        """Counts (sent, received) bytes of a layer in one direction."""

        def record(sent: int, received: int) -> None:
            self.traffic.sent[layer_number, direction] += sent
            self.traffic.received[layer_number, direction] += received

        return record

    def gather(
        self, shard: Tensor, record: Recorder, counts: Sequence[int] | None = None
    ) -> Pending:
        """Start gathering the shards of all ranks, [all tokens, ...], in the order of the ranks.

        Args:
            counts: rows that come from each rank; None: the tokens of its shard.
        """
        counts = self.shard_tokens if counts is None else tuple(counts)
        gathered = shard.new_empty(sum(counts), *shard.shape[1:])
        parts = gathered.split(counts)
        if len(set(counts)) == 1:
            works = []
            if counts[0]:
                works.append(_all_gather_equal(gathered, shard, group=self.group, async_op=True))
            record((self.size - 1) * _bytes(shard), _bytes(gathered) - _bytes(shard))
            return Pending(tensor=gathered, works=works, keep=(shard,))
        parts[self.rank].copy_(shard)
        peers = [peer for peer in range(self.size) if peer != self.rank]
        works = self._send_and_receive(
            [(peer, shard) for peer in peers], [(peer, parts[peer]) for peer in peers], record
        )
        return Pending(tensor=gathered, works=works, keep=(shard,))

    def reduce(self, shares: Tensor, record: Recorder) -> Pending:
        """Start collecting every rank's share of the gradient of this rank's shard.

        Args:
            shares: [all tokens, ...] this rank's share of the gradients of all shards.

        Returns:
            [ranks, tokens of this shard, ...]: sum it over the ranks.
        """
        mine = self.shard_tokens[self.rank]
        received = shares.new_empty(self.size, mine, *shares.shape[1:])
        work = dist.all_to_all_single(
            received.flatten(0, 1),
            shares,
            output_split_sizes=[mine] * self.size,
            input_split_sizes=list(self.shard_tokens),
            group=self.group,
            async_op=True,
        )
        own = _bytes(received[self.rank])
        record(_bytes(shares) - own, _bytes(received) - own)
        return Pending(tensor=received, works=[work], keep=(shares,))

    def rotate(self, tensor: Tensor, num_tokens: int, record: Recorder) -> Pending:
        """Start sending a tensor to the next rank and receiving one of `num_tokens` rows."""
        received = tensor.new_empty(num_tokens, *tensor.shape[1:])
        works = self._send_and_receive(
            [((self.rank + 1) % self.size, tensor)],
            [((self.rank - 1) % self.size, received)],
            record,
        )
        return Pending(tensor=received, works=works, keep=(tensor,))

    def swap(self, tensor: Tensor, record: Recorder) -> Tensor:
        """Send part i of [ranks, ...] to rank i, and return the parts that came, by rank."""
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=self.group)
        own = _bytes(tensor[self.rank])
        record(_bytes(tensor) - own, _bytes(received) - own)
        return received

    def send_rows(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], record: Recorder
    ) -> Tensor:
        """Send the first `sent[0]` rows to rank 0, the next ones to rank 1, ..., and return the
        `received[i]` rows that come from each rank i, in the order of the ranks."""
        found = exchanged_rows(rows, sent, received, self.group)
        record(_bytes(rows), _bytes(found))
        return found

    def _send_and_receive(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        record: Recorder,
    ) -> list[dist.Work]:
        operations = []
        for peer, tensor in sends:
            if tensor.numel():  # the receiver knows as well that there is nothing
                target = dist.get_global_rank(self.group, peer)
                operations.append(dist.P2POp(dist.isend, tensor, target, group=self.group))
        for peer, tensor in receives:
            if tensor.numel():
                source = dist.get_global_rank(self.group, peer)
                operations.append(dist.P2POp(dist.irecv, tensor, source, group=self.group))
        record(sum(_bytes(t) for _, t in sends), sum(_bytes(t) for _, t in receives))
        return dist.batch_isend_irecv(operations) if operations else []


def exchanged_rows(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """See `Exchange.send_rows`; nothing is counted."""
    found = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(
        found,
        rows.contiguous(),
        output_split_sizes=list(received),
        input_split_sizes=list(sent),
        group=group,
    )
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
