"""What the trainer asks of whatever makes rollouts."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_prefix.rollouts.records import RolloutBatch


class EndOfRollouts(Exception):
    """There are not as many groups left as were asked for; the run ends in good order."""


class ServerError(ValueError):
    """Whoever is asked for responses, such as a server, does not give what was asked for."""


ENGINE_ERRORS = (EndOfRollouts, ValueError, OSError)
"""What an engine may raise on rank 0, for what passes errors on to other ranks."""


class RolloutEngine(Protocol):
    """Gives rank 0 the rollouts. Every rank calls every method, in the same order."""

    def next_rollouts(self, num_groups: int, *, step: int) -> RolloutBatch | None:
        """The next groups of rollouts on rank 0, as many as are asked for and valid (see
        `validate_batch`); None on every other rank. An error may be raised on rank 0 alone.

        Args:
            num_groups: how many.
            step: rollout batches trained on so far, for what an engine draws at random.

        Raises:
            EndOfRollouts: fewer groups are left. None of them is used up.
            ValueError: a group that cannot be trained on, naming its source and field.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say about the last `next_rollouts`; the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its data, as plain values; a checkpoint stores rank 0's."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`, with exactly the groups that would have come next.

        Raises:
            ValueError: the state does not belong to this engine's data.
        """
        ...

    def close(self) -> None:
        """Let go of open files and whatever else the engine holds; more than once does no harm."""
        ...
