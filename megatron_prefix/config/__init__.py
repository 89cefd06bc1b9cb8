"""The typed configuration of a run: what a YAML file may say, with every combination checked.

Nothing here touches a process group or a GPU: a wrong file fails before anything starts. Names are
Megatron's where Megatron has one. A file holds a section of the YAML file.
"""

from megatron_prefix.config.evaluation import EvaluationConfig
from megatron_prefix.config.model import ModelConfig, YarnConfig
from megatron_prefix.config.optimizer import OptimizerSettings
from megatron_prefix.config.output import OutputConfig
from megatron_prefix.config.parallel import ParallelConfig
from megatron_prefix.config.rollouts import (
    RewardProcessConfig,
    RolloutsConfig,
    ServerConfig,
    TextConfig,
    WeightsConfig,
)
from megatron_prefix.config.run import RunConfig, config_summary
from megatron_prefix.config.training import TrainingConfig

__all__ = [
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerSettings",
    "OutputConfig",
    "ParallelConfig",
    "RewardProcessConfig",
    "RolloutsConfig",
    "RunConfig",
    "ServerConfig",
    "TextConfig",
    "TrainingConfig",
    "WeightsConfig",
    "YarnConfig",
    "config_summary",
]
