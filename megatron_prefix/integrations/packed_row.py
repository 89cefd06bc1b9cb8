"""A packed row as frameworks hand it to GPTModel, read on the host.

Frameworks lay sequences one behind the other in `input_ids` [1, T] and say by cumulative lengths
where each begins. Some fill sequences up to a multiple (then `cu_seqlens_q_padded` says where they
begin, and `cu_seqlens_q` how long they are without the filling), some append a sequence of padding,
and some leave a tail that belongs to no sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRow:
    """T tokens of S sequences that are not empty, and of padding."""

    tokens: np.ndarray
    """[T] int64"""
    starts: np.ndarray
    """[S] int64 ascending: the first token of each sequence."""
    lengths: np.ndarray
    """[S] int64: tokens of each sequence, at least one."""
    labels: np.ndarray | None = None
    """[T] int64: the token that each row's loss is of, if the framework gives them."""
    position_ids: np.ndarray | None = None
    """[T] int64, if they are looked at."""
    keys: np.ndarray | None = None
    """[T] int64: what the ids of tokens leave open, see `PrefixTree.from_sequences`."""

    @classmethod
    def read(
        cls,
        input_ids: Tensor,
        params: PackedSeqParams,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> PackedRow:
        """A framework's row. The host waits for the device once.

        Args:
            input_ids: [1, T].
            params: with `cu_seqlens_q`, `cu_seqlens_q_padded` or both.
            labels, position_ids, keys: [1, T], if they are needed.

        Raises:
            ValueError: shapes or cumulative lengths that do not fit, by name.
        """
        if input_ids.dim() != 2 or input_ids.size(0) != 1:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}: a packed row is [1, T], with its "
                "sequences one behind the other"
            )
        per_token = {"labels": labels, "position_ids": position_ids, "token_keys": keys}
        for name, given in per_token.items():
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {list(given.shape)} and input_ids "
                    f"{list(input_ids.shape)}: they must agree"
                )
        if keys is not None and (keys.is_floating_point() or keys.dtype == torch.bool):
            raise ValueError(f"token_keys holds {keys.dtype}: keys are integers")
        tokens, labels_of_rows, positions, keys_of_rows, true, padded = _to_host(
            input_ids[0],
            *(None if given is None else given[0] for given in per_token.values()),
            params.cu_seqlens_q,
            params.cu_seqlens_q_padded,
        )
        starts, lengths = _sequences(true, padded, len(tokens))
        return cls(
            tokens=tokens,
            starts=starts,
            lengths=lengths,
            labels=labels_of_rows,
            position_ids=positions,
            keys=keys_of_rows,
        )

    @property
    def num_tokens(self) -> int:
        """T"""
        return len(self.tokens)

    def sequences(self) -> list[np.ndarray]:
        """The tokens of each sequence."""
        return self._of_sequences(self.tokens)

    def sequence_keys(self) -> list[np.ndarray] | None:
        """The keys of each sequence; None where none are given."""
        return None if self.keys is None else self._of_sequences(self.keys)

    def _of_sequences(self, values: np.ndarray) -> list[np.ndarray]:
        return [
            values[start : start + length]
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        ]

    def has_ordinary_positions(self) -> bool:
        """Whether the position ids count every sequence from 0."""
        assert self.position_ids is not None
        return all(
            np.array_equal(self.position_ids[start : start + length], np.arange(length))
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        )


def _sequences(
    true: np.ndarray | None, padded: np.ndarray | None, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the sequences that have tokens."""
    name = "cu_seqlens_q" if padded is None else "cu_seqlens_q_padded"
    offsets = true if padded is None else padded
    if offsets is None:
        raise ValueError(
            "packed_seq_params has neither cu_seqlens_q nor cu_seqlens_q_padded: a packed row "
            "needs one of them"
        )
    spaces = np.diff(offsets)
    if len(offsets) < 2 or offsets[0] != 0 or (spaces < 0).any():
        raise ValueError(f"{name}={offsets.tolist()} must begin with 0 and never decrease")
    if offsets[-1] > num_tokens:
        raise ValueError(
            f"{name} ends at {offsets[-1]}, behind the row's {num_tokens} tokens. Where the "
            "framework has cut the row for context parallelism, prefixes cannot be shared: set the "
            "context-parallel size to 1"
        )
    lengths = spaces
    if true is not None and padded is not None:
        lengths = np.diff(true)
        if len(true) != len(padded) or (lengths < 0).any() or (lengths > spaces).any():
            raise ValueError(
                f"cu_seqlens_q={true.tolist()} and cu_seqlens_q_padded={padded.tolist()}: they "
                "must be of the same sequences, none longer than its place"
            )
    has_tokens = lengths > 0
    return offsets[:-1][has_tokens], lengths[has_tokens]


def _to_host(*tensors: Tensor | None) -> list[np.ndarray | None]:
    """[n] int64 arrays of flat tensors, by one copy from the device; None stays."""
    given = [x.detach().to(torch.int64) for x in tensors if x is not None]
    sizes = [len(x) for x in given]
    # A framework may keep cumulative lengths on the host.
    device = given[0].device
    flat = torch.cat([x.to(device) for x in given]).cpu().numpy()
    parts = iter(np.split(flat, np.cumsum(sizes)[:-1]))
    return [None if x is None else next(parts) for x in tensors]
