"""The line that switches it on, as verl reads it in a trainer's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_TRAINER = """
import sys
from hydra import compose, initialize_config_module
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.workers.engine import EngineRegistry

with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", overrides=sys.argv[1:])
trainers = PPOTrainerSync, RayPPOTrainer
own = [trainer._balance_batch for trainer in trainers]
trainer = object.__new__(PPOTrainerSync)
trainer.config = config
trainer._init_tokenizer()
print([getattr(t._balance_batch, "__wrapped__", None) is o for t, o in zip(trainers, own)])
print(EngineRegistry.get_engine_cls("language_model", "megatron").__name__)
"""


def test_verls_model_configuration_loads_it_when_the_trainers_are_there(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-c", _TRAINER),
            "model_engine=megatron",
            f"actor_rollout_ref.model.path={tmp_path}",
            "+actor_rollout_ref.model.load_tokenizer=false",
            "+actor_rollout_ref.model.override_config.attn_implementation=eager",
            "actor_rollout_ref.model.external_lib=megatron_prefix.integrations.verl",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[True, True]", "PrefixMegatronEngine"]
