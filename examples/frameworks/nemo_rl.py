"""A worker of NeMo-RL whose policy shares prefixes: `PrefixMegatronPolicyWorker`.

A launch script names it, and gives it the environment of NeMo-RL's own worker:

    worker = "nemo_rl_prefix.PrefixMegatronPolicyWorker"  # this file, called nemo_rl_prefix.py
    own = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"
    ACTOR_ENVIRONMENT_REGISTRY[worker] = get_actor_python_env(own)
    Policy(..., worker_extension_cls_fqn=worker)
"""

from __future__ import annotations

from typing import Any

import ray
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

from megatron_prefix.integrations import share_prefixes


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))
class PrefixMegatronPolicyWorker(MegatronPolicyWorkerImpl):
    """NeMo-RL's own worker, once its model is built and its weights are loaded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        share_prefixes(self.model)
