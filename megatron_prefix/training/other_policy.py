"""A warning where rollouts come with log-probabilities that are not the policy's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_FAR = 0.1
"""k3 in nats for a token. Engines that round to bfloat16 are some 0.001 to 0.02 away."""


class OtherPolicyWatch:
    """Says so when the rollouts' log-probabilities begin to be far from the policy's."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._is_far = False

    def see(self, first_step: Mapping[str, float], *, step: int, corrects: bool) -> None:
        """Compare, before the policy has moved from the weights that a rollout batch began with.

        Args:
            first_step: `PolicyMetrics.means` of the rollout batch's first optimizer step.
            step: number of the rollout batch.
            corrects: whether the objective corrects for the policy that sampled.
        """
        distance = first_step.get("mismatch_kl", 0.0) if corrects else first_step["old_kl"]
        was_far, self._is_far = self._is_far, distance > _FAR
        if was_far or not self._is_far:
            return
        name = "mismatch" if corrects else "ratio"
        logger.warning(
            "step %d: the rollouts' log-probabilities are not those of the policy: they are %.3g "
            "nats away for a token (k3 estimate), and the ratio of the policy to them is between "
            "%.3g and %.3g for 98 %% of the tokens. Perhaps the sampling engine has older weights, "
            "tells log-probabilities after top_p, top_k or another temperature, or the files are "
            "of another policy%s",
            *(step, distance, first_step[f"{name}_p01"], first_step[f"{name}_p99"]),
            "" if corrects else "; if that is meant, look at objective.correction",
        )
