"""verl's two trainers, as the process of a trainer has them when it loads the integration."""

from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync

import megatron_prefix.integrations.verl  # noqa: F401  # isort: skip

__all__ = ["PPOTrainer", "PPOTrainerSync", "RayPPOTrainer"]
