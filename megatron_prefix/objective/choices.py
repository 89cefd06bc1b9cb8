"""The values of the objective's options that are names."""

from __future__ import annotations

from typing import Literal

ObjectiveName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "supervised"]
AdvantageKind = Literal["std", "mean", "leave_one_out"]
TurnAdvantage = Literal["return", "reward"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["loss", "reward"]
ZeroAdvantages = Literal["keep", "skip", "resample"]
