"""The attention kernel of a run, checked on every rank before anything is loaded."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.attention.kernels import Kernel, select_kernel
from megatron_prefix.attention.row_attention import head_dim
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
