"""Every signature and private name of Megatron-Core that the package relies on.

A new release fails here first, with the name that changed. Behaviour is tested elsewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any

import megatron.core
import pytest
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import dict_utils, mapping
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    param_and_grad_buffer,
)
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import transformer_block
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, TransformerLayer

from megatron_prefix.megatron.options import OPTIONS
from megatron_prefix.megatron.output import takes_output_processor
from megatron_prefix.megatron.transformer_keys import declared_fields
from tests.megatron.option_fields import config_fields, release_of, what_is_wrong

VERSION = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])

SIGNATURES: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (SelfAttention.forward, ("hidden_states", "attention_mask", "rotary_pos_emb")),
    (SelfAttention.forward, ("packed_seq_params", "inference_context")),
    (
        DotProductAttention.__init__,
        ("config", "layer_number", "attn_mask_type", "attention_type", "softmax_scale"),
    ),
    (
        DotProductAttention.forward,
        ("query", "key", "value", "attention_mask", "attn_mask_type", "attention_bias"),
    ),
    (DotProductAttention.forward, ("packed_seq_params",)),
    (WrappedTorchNorm.__new__, ("config", "hidden_size", "eps")),
    (FusedLayerNorm.__init__, ("config", "hidden_size", "eps")),
    (
        GPTModel.__init__,
        (
            "config",
            "transformer_layer_spec",
            "vocab_size",
            "max_sequence_length",
            "pre_process",
            "post_process",
            "parallel_output",
            "share_embeddings_and_output_weights",
            "position_embedding_type",
            "rotary_percent",
            "rotary_base",
            "rope_scaling",
            "rope_scaling_factor",
            "vp_stage",
        ),
    ),
    (GPTModel.forward, ("input_ids", "position_ids", "attention_mask", "packed_seq_params")),
    (
        gpt_layer_specs.get_gpt_decoder_block_spec,
        ("config", "use_transformer_engine", "vp_stage"),
    ),
    (
        gpt_layer_specs.get_gpt_layer_local_spec,
        ("num_experts", "qk_layernorm", "normalization"),
    ),
    (
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec,
        ("num_experts", "moe_grouped_gemm", "qk_layernorm"),
    ),
    (tensor_parallel.ColumnParallelLinear.forward, ("input_", "weight")),
    (
        tensor_parallel.gather_from_sequence_parallel_region,
        ("input_", "tensor_parallel_output_grad"),
    ),
    (tensor_parallel.copy_to_tensor_model_parallel_region, ("input_",)),
    (
        schedules.forward_backward_no_pipelining,
        (
            "forward_step_func",
            "data_iterator",
            "model",
            "num_microbatches",
            "seq_length",
            "micro_batch_size",
            "forward_only",
            "collect_non_loss_data",
        ),
    ),
    (finalize_model_grads, ("model", "num_tokens")),
    (DistributedDataParallel.__init__, ("config", "ddp_config", "module", "disable_bucketing")),
    (Float16Module.__init__, ("config", "module")),
    (get_megatron_optimizer, ("config", "model_chunks")),
    (
        OptimizerParamScheduler.__init__,
        (
            "optimizer",
            "init_lr",
            "max_lr",
            "min_lr",
            "lr_warmup_steps",
            "lr_decay_steps",
            "lr_decay_style",
            "start_wd",
            "end_wd",
            "wd_incr_steps",
            "wd_incr_style",
        ),
    ),
    (
        parallel_state.initialize_model_parallel,
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "distributed_timeout_minutes",
        ),
    ),
    (parallel_state.is_pipeline_first_stage, ("ignore_virtual", "vp_stage")),
    (parallel_state.is_pipeline_last_stage, ("ignore_virtual", "vp_stage")),
    (rope_utils._apply_rotary_pos_emb_thd, ("t", "cu_seqlens", "freqs", "cp_group")),
]

DATACLASS_FIELDS: list[tuple[type, tuple[str, ...]]] = [
    (
        PackedSeqParams,
        ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    ),
    (SelfAttentionSubmodules, ("linear_qkv", "core_attention", "q_layernorm", "k_layernorm")),
    (ModuleSpec, ("module", "params", "submodules")),
    (
        mapping.ShardedTensor,
        ("key", "data", "local_shape", "global_shape", "global_offset", "prepend_axis_num"),
    ),
    (
        DistributedDataParallelConfig,
        ("use_distributed_optimizer", "grad_reduce_in_fp32", "overlap_grad_reduce"),
    ),
    (
        OptimizerConfig,
        ("optimizer", "lr", "min_lr", "clip_grad", "bf16", "params_dtype", "adam_eps"),
    ),
    (
        TransformerConfig,
        (
            "activation_func",
            "calculate_per_token_loss",
            "context_parallel_size",
            "cp_comm_type",
            "variable_seq_lengths",
            "overlap_p2p_comm",
            "batch_p2p_comm",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
            "recompute_modules",
            "finalize_model_grads_func",
            "moe_layer_freq",
            "moe_router_load_balancing_type",
            "moe_aux_loss_coeff",
            "use_cpu_initialization",
        ),
    ),
]

NAMES: list[tuple[Any, str]] = [
    (megatron_random, "_get_cuda_rng_state"),
    (megatron_random, "_set_cuda_rng_state"),
    (gpt_layer_specs, "HAVE_TE"),
    (dict_utils, "nested_values"),
    (mapping, "apply_factories"),
    (parallel_state, "destroy_model_parallel"),
    (parallel_state, "get_data_parallel_group"),
    (parallel_state, "get_context_parallel_group"),
    (filesystem_async, "_results_queue"),
    (DistributedDataParallel, "zero_grad_buffer"),
    (DistributedDataParallel, "broadcast_params"),
    (transformer_block, "LayerNormImpl"),
    (TopKRouter, "routing"),
    (TopKRouter, "apply_z_loss"),
    (TopKRouter, "_apply_aux_loss"),
    (TopKRouter, "_apply_seq_aux_loss"),
    (TopKRouter, "get_aux_loss_coeff"),
]


@pytest.mark.parametrize(
    ("function", "parameters"),
    SIGNATURES,
    ids=[getattr(function, "__qualname__", str(function)) for function, _ in SIGNATURES],
)
def test_functions_take_the_parameters_we_pass(
    function: Callable[..., Any], parameters: tuple[str, ...]
) -> None:
    signature = inspect.signature(function)
    missing = [name for name in parameters if name not in signature.parameters]
    assert not missing, f"{function.__qualname__}{signature} lacks {missing}"


@pytest.mark.parametrize(
    ("cls", "fields"), DATACLASS_FIELDS, ids=[cls.__name__ for cls, _ in DATACLASS_FIELDS]
)
def test_dataclasses_have_the_fields_we_use(cls: type, fields: tuple[str, ...]) -> None:
    present = {field.name for field in dataclasses.fields(cls)}
    assert not set(fields) - present


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[name for _, name in NAMES])
def test_names_we_use_exist(owner: Any, name: str) -> None:
    assert hasattr(owner, name)


def test_every_option_of_this_release_is_used_refused_or_harmless_and_no_other_has_a_row() -> None:
    """A new option fails here by name, and so does one that was renamed or went."""
    wrong = what_is_wrong(config_fields(), release_of(megatron.core.__version__))
    assert not wrong, "\n".join(wrong)


def test_options_have_one_row_each() -> None:
    names = [option.name for option in OPTIONS]
    assert len(names) == len(set(names))


def test_buckets_know_the_ranks_that_their_gradients_are_sharded_over() -> None:
    source = inspect.getsource(param_and_grad_buffer)
    assert "self.intra_distributed_optimizer_instance_group = " in source
    assert "grad_data" in source


def test_weights_whose_gradient_a_layer_has_added_itself_bear_the_mark_that_we_reset() -> None:
    assert "param.grad_added_to_main_grad = False" in inspect.getsource(DistributedDataParallel)
    assert "weight.grad_added_to_main_grad = True" in inspect.getsource(tensor_parallel.layers)


def test_a_layer_spec_class_may_be_any_base_transformer_layer() -> None:
    assert issubclass(TransformerLayer, BaseTransformerLayer)


def test_the_output_processor_is_there_since_0_18() -> None:
    assert takes_output_processor() == (VERSION >= (0, 18))


def test_declarations_read_from_the_source_are_those_of_the_class() -> None:
    hints = typing.get_type_hints(TransformerConfig)
    declared = declared_fields()
    assert declared.keys() == {field.name for field in dataclasses.fields(TransformerConfig)}
    known = {name for name, hint in declared.items() if "Any" not in str(hint)}
    assert not {name for name in known if declared[name] != hints[name]}
    assert len(known) > 150


@pytest.mark.skipif(VERSION < (0, 18), reason="HybridModel is there since 0.18")
def test_a_hybrid_stack_has_the_names_that_ours_builds_it_by() -> None:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    assert {"config", "submodules", "post_layer_norm", "post_process", "layer_type_list"} <= set(
        inspect.signature(HybridStack.__init__).parameters
    )
    assert {"gdn_layer", "attention_layer", "mlp_layer", "moe_layer"} <= {
        field.name for field in dataclasses.fields(HybridStackSubmodules)
    }
    assert (Symbols.GDN, Symbols.ATTENTION, Symbols.MLP, Symbols.MOE) == ("G", "*", "-", "E")
    assert (Symbols.PIPE, Symbols.MTP_SEPARATOR) == ("|", "/")
    # No spec says which norm stands behind the last layer.
    assert "self.final_norm = TENorm(" in inspect.getsource(HybridStack.__init__)
    parameters = inspect.signature(HybridModel.__init__).parameters
    assert {"hybrid_stack_spec", "hybrid_layer_pattern", "vp_stage"} <= set(parameters)
    # The output layer is called by the model itself, and its output's dimensions swapped.
    assert "output_processor" not in inspect.signature(HybridModel.forward).parameters
    assert "logits.transpose(0, 1)" in inspect.getsource(HybridModel.forward)
