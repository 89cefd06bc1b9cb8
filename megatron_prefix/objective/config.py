"""Which objective is optimised, and with which constants.

A field left at None (null in YAML) takes the value that goes with `name`;
`ObjectiveConfig.resolved` fills them in. The papers:

    grpo     Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), eq. 3
    dr_grpo  Liu et al. 2025, Understanding R1-Zero-Like Training (arXiv 2503.20783), fig. 1
    dapo     Yu et al. 2025, DAPO (arXiv 2503.14476), eq. 8
    gspo     Zheng et al. 2025, Group Sequence Policy Optimization (arXiv 2507.18071), eq. 5
    cispo    MiniMax 2025, MiniMax-M1 (arXiv 2506.13585), eq. 4 and 5

`supervised` is the negative log-likelihood of the responses, for a warm start: it looks neither at
rewards nor at a ratio.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

ObjectiveName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "supervised"]
AdvantageKind = Literal["std", "mean", "leave_one_out"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class _Defaults:
    advantage: AdvantageKind
    clip_low: float
    clip_high: float
    aggregation: Aggregation


_DEFAULTS: dict[str, _Defaults] = {
    # The paper names its clip range without a number: 0.2 is PPO's.
    "grpo": _Defaults(advantage="std", clip_low=0.2, clip_high=0.2, aggregation="sequence_mean"),
    "dr_grpo": _Defaults(advantage="mean", clip_low=0.2, clip_high=0.2, aggregation="constant"),
    "dapo": _Defaults(advantage="std", clip_low=0.2, clip_high=0.28, aggregation="token_mean"),
    "gspo": _Defaults(advantage="std", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
    # The paper has no lower bound and gives no upper one; a cap of 5 is our choice.
    "cispo": _Defaults(advantage="std", clip_low=1.0, clip_high=4.0, aggregation="token_mean"),
    # Advantages and ratios take no part in it.
    "supervised": _Defaults(
        advantage="mean", clip_low=0.2, clip_high=0.2, aggregation="token_mean"
    ),
}


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

    advantage_epsilon: float = 1e-6
    """Added to the standard deviation that advantage `std` divides by; in units of reward."""

    clip_low: float | None = None
    """The ratio to the old policy is clipped from below at 1 - clip_low; 1 means no lower bound.
    null: 0.2; gspo 3e-4; cispo 1 (no bound, as in the paper)."""

    clip_high: float | None = None
    """The ratio to the old policy is clipped from above at 1 + clip_high.
    null: 0.2; dapo 0.28; gspo 4e-4; cispo 4 (no number in the paper)."""

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
    started from. The GRPO paper uses 0.04, the other papers 0."""

    kl_estimator: KlEstimator = "k3"
    """Estimator of that KL for a token, not corrected by the ratio. The gradient of k2 is that of
    the reverse KL, of k3 that of the forward KL, of k1 noise (see `losses.kl_per_token`)."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, which is subtracted from the loss."""

    temperature: float = 1.0
    """Logits are divided by this before log-probabilities are taken. It is the temperature that the
    responses were sampled with, so it has to equal `rollouts.temperature`."""

    def __post_init__(self) -> None:
        _one_of("name", self.name, get_args(ObjectiveName))
        if self.advantage is not None:
            _one_of("advantage", self.advantage, get_args(AdvantageKind))
        if self.aggregation is not None:
            _one_of("aggregation", self.aggregation, get_args(Aggregation))
        _one_of("kl_estimator", self.kl_estimator, get_args(KlEstimator))
        _require(
            "clip_low",
            self.clip_low,
            self.clip_low is None or 0 <= self.clip_low <= 1,
            "a number from 0 to 1, where 1 is no lower bound, or leave it out",
        )
        _require(
            "clip_high",
            self.clip_high,
            self.clip_high is None or self.clip_high >= 0,
            "a number of at least 0, or leave it out",
        )
        for option in ("advantage_epsilon", "kl_coefficient", "entropy_coefficient"):
            value = getattr(self, option)
            _require(option, value, math.isfinite(value) and value >= 0, "a number of at least 0")
        _require(
            "temperature",
            self.temperature,
            math.isfinite(self.temperature) and self.temperature > 0,
            "a number above 0, the one that the responses were sampled with",
        )
        self._check_max_response_length()

    def _check_max_response_length(self) -> None:
        aggregation = self.aggregation or _DEFAULTS[self.name].aggregation
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
            _require(
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
            field.name: getattr(_DEFAULTS[self.name], field.name)
            for field in dataclasses.fields(_Defaults)
            if getattr(self, field.name) is None
        }
        return dataclasses.replace(self, **missing)


def _one_of(option: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{option}={value!r}: choose one of {', '.join(allowed)}")


def _require(option: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{option}={value!r}: set {wanted}")
