"""What the trainer asks of whatever makes rollouts."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_prefix.rollouts.records import RolloutGroup


class EndOfRollouts(Exception):
    """There are not as many groups left as were asked for; the run ends in good order."""


class RolloutEngine(Protocol):
    """Gives the trainer its groups, the same ones on every rank."""

    def next_groups(self, num_groups: int, *, step: int) -> list[RolloutGroup]:
        """The next groups of rollouts.

        Args:
            num_groups: how many; never fewer come back.
            step: rollout batches trained on so far, for what an engine draws at random.

        Returns:
            Groups that have passed `validate_group`.

        Raises:
            EndOfRollouts: fewer groups are left. None of them is used up.
            ValueError: a group that cannot be trained on, naming its source and field.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to say about the last `next_groups`; the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the engine stands in its data, as plain values for a checkpoint."""
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
