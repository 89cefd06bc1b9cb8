"""The objective's sections: corrections for other policies' samples, over-long responses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

CorrectionKind = Literal["truncate", "mask"]
CorrectionLevel = Literal["token", "sequence", "sequence_mean"]
OverlongKind = Literal["mask", "penalty"]

LARGEST_BOUND = 1e6
"""Of a ratio: the largest advantage times two such ratios is still a number of 32 bits."""


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance sampling between the policy that sampled the responses, whose log-probabilities
    are the rollouts' `old_logprobs`, and the old policy, whose log-probabilities the trainer then
    computes itself.

    Raises:
        ValueError: a value is not allowed; the message names the option, its value, and what would
            do.
    """

    kind: CorrectionKind = "truncate"
    """`truncate`: a token's loss is multiplied by rho = pi_old / pi_sampled, held between `low` and
    `high`. `mask`: by rho between these bounds, and by 0 outside of them."""
    level: CorrectionLevel = "token"
    """What rho is of: the token; the whole response, the product over its trained tokens
    (`sequence`); or the geometric mean over them (`sequence_mean`)."""
    low: float = 0.0
    """Lower bound of rho; 0: none. IcePop masks below 0.5."""
    high: float = 2.0
    """Upper bound of rho. IcePop masks above 5."""

    def __post_init__(self) -> None:
        one_of("kind", self.kind, get_args(CorrectionKind))
        one_of("level", self.level, get_args(CorrectionLevel))
        require("low", self.low, 0 <= self.low <= 1, "a number from 0 (no bound) to 1")
        require(
            "high",
            self.high,
            1 <= self.high <= LARGEST_BOUND,
            f"a number from 1 to {LARGEST_BOUND:g}",
        )


@dataclass(frozen=True, kw_only=True)
class OverlongConfig:
    """What becomes of responses that are too long (DAPO, arXiv 2503.14476, section 3.4).

    Raises:
        ValueError: a value is not allowed, or does not go with another; the message names the
            option, its value, and what would do.
    """

    kind: OverlongKind
    """`mask`: a response that was cut off at the limit of length (`finished: false`) is not trained
    on, as if none of its tokens were; its reward still counts in its group's mean. `penalty`: the
    soft penalty of DAPO's eq. 13 on its reward."""
    length: int | None = None
    """Tokens of the longest response that can be sampled. `penalty` needs it. `mask` uses it for
    responses that do not say whether they are finished: those of at least this length are cut
    off."""
    buffer: int | None = None
    """`penalty` alone: the last tokens up to `length` over which the penalty grows from 0 to
    `factor`; the paper has 4096 of 20480."""
    factor: float = 1.0
    """`penalty` alone: what a response of `length` tokens or more loses, in units of reward."""

    def __post_init__(self) -> None:
        one_of("kind", self.kind, get_args(OverlongKind))
        for option in ("length", "buffer"):
            value = getattr(self, option)
            require(option, value, value is None or value >= 1, "a whole number of at least 1")
        require(
            "factor",
            self.factor,
            math.isfinite(self.factor) and self.factor > 0,
            "a number above 0",
        )
        if self.kind == "mask":
            if self.buffer is not None or self.factor != 1.0:
                name = "factor" if self.buffer is None else "buffer"
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not used by kind 'mask': remove it, or set "
                    "kind: penalty"
                )
            return
        for option in ("length", "buffer"):
            require(option, getattr(self, option), getattr(self, option) is not None, "the tokens")
        assert self.length is not None and self.buffer is not None
        require("buffer", self.buffer, self.buffer <= self.length, f"at most {self.length}, length")


def one_of(option: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{option}={value!r}: choose one of {', '.join(allowed)}")


def require(option: str, value: Any, holds: bool, wanted: str) -> None:
    """Refuse a value for which something does not hold."""
    if not holds:
        raise ValueError(f"{option}={value!r}: set {wanted}")
