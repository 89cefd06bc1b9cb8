"""The objectives, a file each, by name."""

from __future__ import annotations

from megatron_prefix.objective.choices import ObjectiveName
from megatron_prefix.objective.losses.cispo import CISPO
from megatron_prefix.objective.losses.dapo import DAPO
from megatron_prefix.objective.losses.dr_grpo import DR_GRPO
from megatron_prefix.objective.losses.form import Clipped, Objective, Terms
from megatron_prefix.objective.losses.grpo import GRPO
from megatron_prefix.objective.losses.gspo import GSPO
from megatron_prefix.objective.losses.supervised import SUPERVISED

OBJECTIVES: dict[ObjectiveName, Objective] = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "supervised": SUPERVISED,
}

__all__ = ["OBJECTIVES", "Clipped", "Objective", "Terms"]
