"""The kernels of a run, checked on every rank before anything is loaded."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.delta_rule_check import check_delta_rule_of_model
from megatron_prefix.attention.delta_rules import DeltaRule
from megatron_prefix.attention.kernels import Kernel, select_kernel
from megatron_prefix.attention.row_attention import delta_rule_of_model, head_dim
from megatron_prefix.attention.self_check import check_kernel
from megatron_prefix.attention.windows import model_window
from megatron_prefix.config import TrainingConfig
from megatron_prefix.distributed.rank_results import raise_together
from megatron_prefix.model.transformer_config import DTYPES


def check_kernel_of_run(
    training: TrainingConfig, model: TransformerConfig, device: torch.device
) -> Kernel:
    """Select the run's kernel and compare it with the reference on this rank. Collective.

    Raises:
        ValueError: on every rank, where some rank's kernel cannot compute what the run asks for,
            or computes it wrongly; see `select_kernel` and `check_kernel`.
    """
    inputs = {
        "device": device,
        "dtype": DTYPES[training.dtype],
        "head_dim": head_dim(model),
        "deterministic": training.deterministic,
        "windows": model_window(model) is not None,
    }
    tensor_size = model.tensor_model_parallel_size
    with raise_together():
        kernel = select_kernel(training.kernel, **inputs)
        check_kernel(
            kernel,
            num_heads=model.num_attention_heads // tensor_size,
            num_key_heads=max(1, model.num_query_groups // tensor_size),
            **inputs,
        )
    return kernel


def check_delta_rule_of_run(
    training: TrainingConfig, model: TransformerConfig, device: torch.device
) -> DeltaRule:
    """Select what computes the run's recurrent layers, and compare it on this rank. Collective.

    Raises:
        ValueError: on every rank, as `check_kernel_of_run` does; see `select_delta_rule` and
            `check_delta_rule`.
    """
    with raise_together():
        rule = delta_rule_of_model(
            model, device, training.delta_rule_kernel, deterministic=training.deterministic
        )
        check_delta_rule_of_model(rule, model, device)
    return rule
