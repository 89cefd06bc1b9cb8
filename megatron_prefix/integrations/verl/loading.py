"""What importing the package does in a process of verl."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from megatron_prefix.integrations.verl import trainer
from megatron_prefix.integrations.verl.names import (
    ENGINE_NAMES,
    TESTED_RELEASE,
    V0_TRAINER_NAMES,
    V1_TRAINER_NAMES,
    check_fields,
    check_names,
)


def load() -> None:
    """Register the engine, and let the trainer of this process keep groups together.

    Raises:
        ImportError: one line: verl is not installed, has not what we rely on, or cannot import its
            own Megatron engine.
    """
    if importlib.util.find_spec("verl") is None:
        raise ImportError(
            "megatron_prefix.integrations.verl needs verl, which is not installed; "
            f"pip install verl=={TESTED_RELEASE}"
        )
    v1 = sys.modules.get("verl.trainer.ppo.v1.trainer_base")
    v0 = sys.modules.get("verl.trainer.ppo.ray_trainer")
    _register_engine(needed=v1 is None and v0 is None)
    # A trainer's process has imported its class before this.
    if v1 is not None:
        check_names(V1_TRAINER_NAMES)
        trainer.keep_groups_together_v1(v1.PPOTrainer)
    if v0 is not None:
        check_names(V0_TRAINER_NAMES)
        trainer.keep_groups_together_v0(v0.RayPPOTrainer)


def _register_engine(*, needed: bool) -> None:
    """Let verl take our engine, in every process that imports verl's own.

    Args:
        needed: False in the process of a trainer, which may be on a machine without GPUs, and
            without what the engine imports.
    """
    try:
        importlib.import_module("verl.workers.engine.megatron.transformer_impl")
    except ImportError as error:
        if not needed:
            return
        import verl

        raise ImportError(
            f"the Megatron engine of verl {verl.__version__} cannot be imported ({error}); pip "
            f"install verl=={TESTED_RELEASE}, megatron-core and a bridge: mbridge, or "
            "megatron-bridge with Transformer Engine"
        ) from error
    check_names(ENGINE_NAMES)
    check_fields()
    from verl.utils.device import get_vendor
    from verl.workers.engine import EngineRegistry

    from megatron_prefix.integrations.verl.engine import PrefixMegatronEngine

    # verl looks for an engine of the vendor first. Value models keep verl's own engine.
    EngineRegistry.register(
        model_type="language_model", backend="megatron", device="cuda", vendor=get_vendor()
    )(PrefixMegatronEngine)
