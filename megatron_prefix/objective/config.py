"""Which objective is optimised, and with which constants.

A field left at None (null in YAML) takes the value that goes with `name`, which stands in the
objective's own file under `losses`; `ObjectiveConfig.resolved` fills them in.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import get_args

from megatron_prefix.objective.choices import (
    AdvantageKind,
    Aggregation,
    KlEstimator,
    KlPlace,
    ObjectiveName,
    TurnAdvantage,
    ZeroAdvantages,
)
from megatron_prefix.objective.losses import OBJECTIVES
from megatron_prefix.objective.options import (
    LARGEST_BOUND,
    CorrectionConfig,
    OverlongConfig,
    one_of,
    require,
)

_DEFAULTS = ("advantage", "clip_low", "clip_high", "aggregation")
"""Fields that an objective has defaults of."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective and its constants.

    Example:
        ObjectiveConfig(name="dapo").resolved().clip_high == 0.28

    Raises:
        ValueError: a value is not allowed or does not go with another; the message names the
            option, its value, and what would do.
    """

    name: ObjectiveName = "grpo"
    """The objective. It decides the form of the loss and the defaults of the fields below."""

    advantage: AdvantageKind | None = None
    """How a group's rewards become advantages (see `group_advantages`): minus their mean and
    divided by their standard deviation; minus their mean; or minus the mean of the other responses.
    null: `mean` for dr_grpo, `std` for all other objectives."""

    turn_advantage: TurnAdvantage = "return"
    """How rewards of turns (`turn_rewards` of a record) become advantages, once they are normalised
    over all turns of their group: the sum over a turn and those after it (DeepSeekMath, section
    4.1.3), or the turn's own."""

    reward_weights: dict[str, float] | None = None
    """Weights of rewards by name, where the records or `rollouts.reward` give several for a
    response, such as `{correct: 1.0, brief: 0.2}`. Its reward, from which its advantage comes, is
    their weighted sum; one of weight 0 is reported only. null: a response has one reward."""

    advantage_epsilon: float = 1e-6
    """Added to the standard deviation that advantage `std` divides by; in units of reward."""

    clip_low: float | None = None
    """The ratio to the old policy is clipped from below at 1 - clip_low; 1 means no lower bound.
    null: 0.2; gspo 3e-4; cispo 1 (no bound, as in the paper)."""

    clip_high: float | None = None
    """The ratio to the old policy is clipped from above at 1 + clip_high.
    null: 0.2; dapo 0.28; gspo 4e-4; cispo 4 (no number in the paper)."""

    dual_clip: float | None = None
    """The loss of a token with a negative advantage A is at most this times -A, a number above 1
    (Ye et al. 2020, arXiv 1912.09729, has 3); it grows with the ratio otherwise. null: no bound.
    Not with cispo and supervised, which have no such loss."""

    aggregation: Aggregation | None = None
    """How the losses of tokens add up to the loss of an optimizer step (see `token_weights`): mean
    over each sequence, then over sequences; mean over all tokens; or sum divided by
    `max_response_length` x sequences.
    null: `sequence_mean` for grpo and gspo, `constant` for dr_grpo, `token_mean` for all other
    objectives."""

    max_response_length: int | None = None
    """Tokens that aggregation `constant` divides by; not used by other aggregations."""

    kl_coefficient: float = 0.0
    """Weight of the KL penalty against the reference policy, which is the weights that the run
    started from, or `reference_refresh_steps` says otherwise. The GRPO paper uses 0.04, the other
    papers 0."""

    kl_in: KlPlace = "loss"
    """Where the penalty is: a term of the loss of each token, or a part of the reward, from which
    advantages come: minus `kl_coefficient` times the sum over the response of
    log pi_old - log pi_reference. The latter computes the old policy's log-probabilities in any
    case."""

    reference_refresh_steps: int | None = None
    """The policy becomes the reference policy after every so many rollout batches; null: never."""

    kl_final_coefficient: float | None = None
    """What `kl_coefficient` becomes evenly over `kl_decay_steps`, and stays; null: it stays as it
    is."""

    kl_decay_steps: int | None = None
    """Rollout batches over which it does so: the first one has `kl_coefficient`, and the one after
    so many has `kl_final_coefficient`."""

    kl_estimator: KlEstimator = "k3"
    """Estimator of that KL for a token, not corrected by the ratio. The gradient of k2 is that of
    the reverse KL, of k3 that of the forward KL, of k1 noise (see `kl.kl_per_token`)."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, which is subtracted from the loss."""

    correction: CorrectionConfig | None = None
    """Corrects for another policy having sampled the responses than the trainer's own, such as a
    server's; null: the ratio compares with the rollouts' `old_logprobs`, where they bring them."""

    zero_advantages: ZeroAdvantages = "keep"
    """What becomes of responses whose advantage is 0: above all groups of equal rewards. `keep`:
    they are computed like all others. `skip`: they count in all denominators but are not computed,
    since their gradient is 0; the weights come out the same. `resample`: groups of equal rewards
    are left out of the batch, and further rollout batches are sampled to replace them (DAPO's
    dynamic sampling)."""

    resample_limit: int = 3
    """Further rollout batches of a step at most with `zero_advantages: resample`; a batch that is
    not full by then is trained on as it is."""

    overlong: OverlongConfig | None = None
    """What becomes of responses that are too long; null: they are trained on like all others."""

    report_entropy: bool = False
    """Report the entropy as a metric also where `entropy_coefficient` is 0. It costs a second chunk
    of logits and its exponential."""

    temperature: float = 1.0
    """Logits are divided by this before log-probabilities are taken. It is the temperature that the
    responses were sampled with, so it has to equal `rollouts.temperature`."""

    def __post_init__(self) -> None:
        one_of("name", self.name, get_args(ObjectiveName))
        if self.advantage is not None:
            one_of("advantage", self.advantage, get_args(AdvantageKind))
        if self.aggregation is not None:
            one_of("aggregation", self.aggregation, get_args(Aggregation))
        one_of("turn_advantage", self.turn_advantage, get_args(TurnAdvantage))
        one_of("kl_estimator", self.kl_estimator, get_args(KlEstimator))
        require(
            "clip_low",
            self.clip_low,
            self.clip_low is None or 0 <= self.clip_low <= 1,
            "a number from 0 to 1, where 1 is no lower bound, or leave it out",
        )
        require(
            "clip_high",
            self.clip_high,
            self.clip_high is None or 0 <= self.clip_high <= LARGEST_BOUND,
            f"a number from 0 to {LARGEST_BOUND:g}, or leave it out",
        )
        require(
            "dual_clip",
            self.dual_clip,
            self.dual_clip is None or 1 < self.dual_clip <= LARGEST_BOUND,
            f"a number above 1, at most {LARGEST_BOUND:g}, or leave it out",
        )
        if self.dual_clip is not None and not OBJECTIVES[self.name].takes_dual_clip:
            raise ValueError(
                f"dual_clip={self.dual_clip!r} is not used by name={self.name!r}: remove it"
            )
        for option in ("advantage_epsilon", "kl_coefficient", "entropy_coefficient"):
            value = getattr(self, option)
            require(option, value, math.isfinite(value) and value >= 0, "a number of at least 0")
        require(
            "temperature",
            self.temperature,
            math.isfinite(self.temperature) and self.temperature > 0,
            "a number above 0, the one that the responses were sampled with",
        )
        one_of("zero_advantages", self.zero_advantages, get_args(ZeroAdvantages))
        require(
            "resample_limit",
            self.resample_limit,
            self.resample_limit >= 1,
            "a whole number of at least 1",
        )
        one_of("kl_in", self.kl_in, get_args(KlPlace))
        refresh = self.reference_refresh_steps
        require(
            "reference_refresh_steps",
            refresh,
            refresh is None or refresh >= 1,
            "a whole number of at least 1",
        )
        if refresh is not None and self.kl_coefficient == 0:
            raise ValueError(
                f"reference_refresh_steps={refresh!r} with kl_coefficient=0, which has no "
                "reference policy: set kl_coefficient above 0, or remove it"
            )
        self._check_reward_weights()
        self._check_kl_schedule()
        self._check_use_of_advantages()
        self._check_max_response_length()

    @property
    def needs_entropy(self) -> bool:
        """Whether an optimizer step computes entropies."""
        return self.entropy_coefficient > 0 or self.report_entropy

    def at_step(self, step: int) -> ObjectiveConfig:
        """The objective of a rollout batch, by its number from 1, without schedules."""
        if self.kl_final_coefficient is None or self.kl_decay_steps is None:
            return self
        done = min((step - 1) / self.kl_decay_steps, 1.0)
        coefficient = (1 - done) * self.kl_coefficient + done * self.kl_final_coefficient
        return dataclasses.replace(
            self,
            kl_coefficient=coefficient,
            kl_final_coefficient=None,
            kl_decay_steps=None,
            kl_in=self.kl_in if coefficient else "loss",
            reference_refresh_steps=None,
        )

    def _check_reward_weights(self) -> None:
        weights = self.reward_weights
        require(
            "reward_weights",
            weights,
            weights is None or any(weights.values()),
            "at least one weight that is not 0, or leave it out",
        )
        for name, weight in (weights or {}).items():
            require(f"reward_weights.{name}", weight, math.isfinite(weight), "a finite number")

    def _check_kl_schedule(self) -> None:
        if (self.kl_final_coefficient is None) != (self.kl_decay_steps is None):
            raise ValueError(
                f"kl_final_coefficient={self.kl_final_coefficient!r} and "
                f"kl_decay_steps={self.kl_decay_steps!r} go together: set both or neither"
            )
        if self.kl_final_coefficient is None or self.kl_decay_steps is None:
            return
        for option, value, holds, wanted in (
            (
                "kl_final_coefficient",
                self.kl_final_coefficient,
                math.isfinite(self.kl_final_coefficient) and self.kl_final_coefficient >= 0,
                "a number of at least 0",
            ),
            (
                "kl_decay_steps",
                self.kl_decay_steps,
                self.kl_decay_steps >= 1,
                "a whole number of at least 1",
            ),
            (
                "kl_coefficient",
                self.kl_coefficient,
                self.kl_coefficient > 0,
                "a number above 0, from which kl_final_coefficient is reached",
            ),
        ):
            require(option, value, holds, wanted)

    def _check_use_of_advantages(self) -> None:
        if self.zero_advantages == "skip":
            for option in ("kl_coefficient", "entropy_coefficient"):
                if getattr(self, option) > 0:
                    raise ValueError(
                        f"zero_advantages='skip' with {option}={getattr(self, option)!r}: a "
                        "response of advantage 0 has a gradient then; set zero_advantages: keep, "
                        f"or {option}: 0"
                    )
        if self.kl_in == "reward" and self.kl_coefficient == 0:
            raise ValueError(
                "kl_in='reward' with kl_coefficient=0: set it above 0, or remove kl_in"
            )
        if OBJECTIVES[self.name].uses_advantages:
            return
        if self.correction is not None:
            raise ValueError(
                f"correction={self.correction!r} is not used by name={self.name!r}, which compares "
                "with no other policy: remove it"
            )
        if self.kl_in == "reward":
            raise ValueError(
                f"kl_in='reward' is not used by name={self.name!r}, which looks at no reward: set "
                "kl_in: loss"
            )
        if self.zero_advantages != "keep":
            raise ValueError(
                f"zero_advantages={self.zero_advantages!r} is not used by name={self.name!r}, "
                "which trains on every response: remove it"
            )
        if self.overlong is not None and self.overlong.kind == "penalty":
            raise ValueError(
                f"overlong.kind='penalty' is not used by name={self.name!r}, which looks at no "
                "reward: remove overlong, or set overlong.kind: mask"
            )

    def _check_max_response_length(self) -> None:
        aggregation = self.aggregation or OBJECTIVES[self.name].aggregation
        if aggregation != "constant":
            if self.max_response_length is not None:
                raise ValueError(
                    f"max_response_length={self.max_response_length!r} is not used by "
                    f"aggregation {aggregation!r} (name={self.name!r}): remove it, or set "
                    "aggregation: constant"
                )
        elif self.max_response_length is None:
            raise ValueError(
                f"max_response_length=None, but aggregation 'constant' (name={self.name!r}) "
                "divides by it: set max_response_length to the longest response, in tokens, that "
                "can be sampled, or set aggregation: token_mean or sequence_mean"
            )
        else:
            require(
                "max_response_length",
                self.max_response_length,
                self.max_response_length >= 1,
                "a whole number of tokens, at least 1",
            )

    def resolved(self) -> ObjectiveConfig:
        """This config with every field that was left at None filled in for its `name`.

        `max_response_length` stays None where nothing divides by it.
        """
        missing = {
            option: getattr(OBJECTIVES[self.name], option)
            for option in _DEFAULTS
            if getattr(self, option) is None
        }
        return dataclasses.replace(self, **missing)
