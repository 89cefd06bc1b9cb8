"""Each of verl's names that this package relies on, and what is asked of it.

verl's engine is no public interface. A release that changes one of these names is refused by one
line when the package is imported, not by wrong numbers or an error in the middle of training.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

TESTED_RELEASE = "0.9.1"


@dataclass(frozen=True, kw_only=True)
class Name:
    """A function, class or method of verl."""

    module: str
    path: str
    """Within the module, with dots."""
    parameters: tuple[str, ...] = ()
    """Those that we pass by name, or that our own method in its place is passed."""
    mentions: tuple[str, ...] = ()
    """Attributes and keys in its code that we read, or that our own method in its place sets."""

    def fault(self) -> str | None:
        """What this verl has otherwise; None if nothing."""
        found = _find(self.module, self.path)
        if found is None:
            return f"{self.module}.{self.path} is gone"
        missing: list[str] = []
        if self.parameters:
            has = inspect.signature(found).parameters
            missing += [name for name in self.parameters if name not in has]
        if self.mentions:
            said = set(_words(inspect.unwrap(found).__code__))
            missing += [name for name in self.mentions if name not in said]
        if missing:
            return f"{self.module}.{self.path} has no {', '.join(missing)} any more"
        return None


def _find(module: str, path: str) -> Any:
    """The object, or None if this verl has it not."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # a package that verl's own module needs
        return None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _words(code: CodeType) -> Iterator[str]:
    """Names and strings in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        # Names of arguments stand in tuples.
        yield from (c for c in (constant, *_items(constant)) if isinstance(c, str))


def _items(constant: object) -> tuple[object, ...]:
    return constant if isinstance(constant, tuple) else ()


_ENGINE = "verl.workers.engine.megatron.transformer_impl"

ENGINE_NAMES = (
    Name(module="verl.workers.engine", path="EngineRegistry.register", parameters=("vendor",)),
    Name(module="verl.utils.device", path="get_vendor"),
    Name(module="verl.utils.device", path="get_device_id"),
    Name(
        module=_ENGINE,
        path="MegatronEngineWithLMHead.__init__",
        parameters=("model_config", "engine_config", "optimizer_config", "checkpoint_config"),
    ),
    Name(
        module=_ENGINE, path="MegatronEngineWithLMHead.initialize", mentions=("module", "tf_config")
    ),
    Name(
        module=_ENGINE,
        path="MegatronEngineWithLMHead._build_tf_config",
        mentions=("bridge", "provider", "tf_config", "model_config", "engine_config", "hf_config"),
    ),
    Name(
        module=_ENGINE,
        path="MegatronEngineWithLMHead.forward_backward_batch",
        parameters=("data", "loss_function", "forward_only"),
        mentions=("prepare_micro_batches", "num_batches_divided_by", "module"),
    ),
    Name(
        module=_ENGINE,
        path="MegatronEngineWithLMHead.forward_step",
        parameters=("batch_iter", "model", "logits_processor_func", "postprocess_micro_batch_func"),
        mentions=(
            "calculate_entropy",
            "calculate_sum_pi_squared",
            "distillation_only",
            "distillation_use_topk",
            "temperature",
        ),
    ),
    # Our own `forward_step` returns what the engine's has from this.
    Name(
        module=_ENGINE,
        path="MegatronEngineWithLMHead._lm_head_logits_processor",
        mentions=("entropy", "log_probs"),
    ),
    Name(
        module=_ENGINE,
        path="MegatronEngineWithLMHead.postprocess_micro_batch_func",
        parameters=("output", "data"),
    ),
    Name(module=_ENGINE, path="MegatronEngineWithLMHead.get_data_parallel_group"),
    # We stand in its place while a batch runs; it is called with these names.
    Name(
        module=_ENGINE,
        path="prepare_micro_batches",
        parameters=("data", "dp_group", "num_batches_divided_by"),
        mentions=("max_token_len_per_gpu", "micro_batch_size_per_gpu", "use_dynamic_bsz"),
    ),
    Name(
        module="verl.workers.engine.utils",
        path="postprocess_batch_func",
        mentions=("metrics", "model_output"),
    ),
    Name(module="verl.utils.megatron_utils", path="unwrap_model"),
    Name(module="verl.utils.tensordict_utils", path="get_non_tensor_data"),
    Name(module="verl.utils.tensordict_utils", path="assign_non_tensor"),
    Name(module="verl.utils.tensordict_utils", path="index_select_tensor_dict"),
)
"""Of the process that trains."""

ENGINE_FIELDS = {
    "verl.workers.config.McoreEngineConfig": (
        "context_parallel_size",
        "dynamic_context_parallel",
        "full_determinism",
        "override_mcore_model_config",
        "pad_to_length",
        "qat",
        "router_replay",
        "use_fused_kernels",
        "use_megatron_fsdp",
        "use_remove_padding",
    ),
    "verl.workers.config.HFModelConfig": ("hf_config", "mtp", "use_fused_kernels"),
}
"""Fields of verl's configurations that are read."""

V1_TRAINER_NAMES = (
    Name(
        module="verl.trainer.ppo.v1.trainer_base",
        path="PPOTrainer._balance_batch",
        parameters=("batch", "metrics"),
        mentions=("_dispatch_info", "actor_rollout_wg", "reorder", "seq_len", "tags"),
    ),
    # It names each sample <group>_<session>_<trajectory>.
    Name(
        module="verl.trainer.ppo.v1.agent_loop_tq",
        path="AgentLoopWorkerTQ._agent_loop_postprocess",
        mentions=("prompt_len", "seq_len", "session_id", "uid"),
    ),
)
V0_TRAINER_NAMES = (
    Name(
        module="verl.trainer.ppo.ray_trainer",
        path="RayPPOTrainer._balance_batch",
        parameters=("batch", "metrics", "keep_minibatch"),
        mentions=("actor_rollout_wg", "attention_mask", "non_tensor_batch", "uid"),
    ),
    Name(module="verl.trainer.ppo.ray_trainer", path="RayPPOTrainer._get_dp_size"),
)
"""Of the process that has the trainer, old and new."""


def check_names(names: tuple[Name, ...]) -> None:
    """Refuse a verl that has not these names.

    Raises:
        ImportError: one line, with the release that is installed and what it has otherwise.
    """
    _refuse(fault for name in names if (fault := name.fault()) is not None)


def check_fields() -> None:
    """Refuse a verl whose configurations lack a field that is read.

    Raises:
        ImportError: see `check_names`.
    """
    faults = []
    for path, fields in ENGINE_FIELDS.items():
        found = _find(*path.rsplit(".", 1))
        if found is None:
            faults.append(f"{path} is gone")
            continue
        has = found.__dataclass_fields__
        faults += [f"{path} has no field {field} any more" for field in fields if field not in has]
    _refuse(iter(faults))


def _refuse(faults: Iterator[str]) -> None:
    found = "; ".join(faults)
    if found:
        import verl

        raise ImportError(
            f"megatron_prefix.integrations.verl was written for verl {TESTED_RELEASE}, and verl "
            f"{verl.__version__} is installed: {found}. Install verl=={TESTED_RELEASE}, or a "
            "release of megatron-prefix for this verl"
        )
