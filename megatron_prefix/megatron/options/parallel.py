"""Options of Megatron's parallelism: sizes, schedules, communication, gradients."""

from __future__ import annotations

from megatron_prefix.megatron.options.record import (
    Option,
    harmless,
    is_set,
    more_than_one,
    refused,
    used,
)

_ONE_PLACE = "Megatron lays the layers out; a row is computed the same on whatever stage"

OPTIONS: list[Option] = [
    *used(
        "tensor_model_parallel_size",
        "sequence_parallel",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        why="attention, trimmed last layer, head and row lengths are made for these sizes",
    ),
    *used(
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        why=_ONE_PLACE,
    ),
    *refused(
        "hybrid_context_parallel",
        when=is_set,
        why="it gives every sequence a context-parallel group of its own, and segments of several "
        "sequences share a row here",
        instead=False,
        first="0.16",
    ),
    *refused(
        "dynamic_context_parallel",
        when=is_set,
        why="it gives every sequence a context-parallel group of its own, and segments of several "
        "sequences share a row here",
        instead=False,
        declared=False,
    ),
    *harmless(
        "max_seqlen_per_dp_cp_rank", why="only hybrid context parallelism reads it", first="0.16"
    ),
    *harmless(
        "hierarchical_context_parallel_sizes",
        why="it splits the ranks for a2a+p2p, which runs as p2p over all of them here",
    ),
    *refused(
        "gtp_weight_remat_size",
        "expert_gtp_weight_remat_size",
        when=more_than_one,
        why="the trimmed last layer and the log-probability head read whole weights of a "
        "tensor-parallel rank, and this option leaves it a shard of them",
        instead=1,
        first="0.19",
    ),
    *harmless(
        "tensor_parallel_num_weight_shards",
        "expert_tensor_parallel_num_weight_shards",
        why="Megatron turns it into gtp_weight_remat_size or its like for experts, which say more",
        first="0.19",
    ),
    *harmless(
        "moe_extended_tp",
        "async_tensor_model_parallel_allreduce",
        why="no release reads it",
        last="0.16",
    ),
    # Pipeline schedules.
    *used(
        "pipeline_dtype",
        "variable_seq_lengths",
        "overlap_p2p_comm",
        "batch_p2p_comm",
        "batch_p2p_sync",
        "use_ring_exchange_p2p",
        "deallocate_pipeline_outputs",
        "overlap_p2p_comm_warmup_flush",
        "microbatch_group_size_per_vp_stage",
        "pipeline_model_parallel_comm_backend",
        why="Megatron's schedules send hidden states of whatever length",
    ),
    *refused(
        "num_microbatches_with_partial_activation_checkpoints",
        when=is_set,
        why="Megatron's schedules then pass a third argument to the forward step, which neither "
        "the trainer's nor GPTModel takes",
        instead=None,
    ),
    *refused(
        "overlap_moe_expert_parallel_comm",
        when=is_set,
        why="its schedule asks the forward step for a plan in place of the model's output, and "
        "runs attention and experts of a layer by themselves, past the layer's forward in which "
        "the last layer is trimmed",
        instead=False,
    ),
    *harmless(
        "delay_wgrad_compute",
        why="Megatron allows it with overlap_moe_expert_parallel_comm only, which is refused",
    ),
    *harmless(
        "ep_overlap_early_attn_memory_release",
        why="Megatron allows it with overlap_moe_expert_parallel_comm only, which is refused",
        first="0.16",
    ),
    *used(
        "overlap_dispatch_backward_with_experts_wgrad",
        why="Transformer Engine's experts compute their own weight gradients later",
        first="0.18",
    ),
    *harmless(
        "high_priority_a2a_comm_stream",
        why="only the schedule of overlap_moe_expert_parallel_comm reads it",
        first="0.18",
    ),
    *refused(
        "defer_embedding_wgrad_compute",
        when=is_set,
        why="it takes the output layer's inputs from the layer's own projection, which the "
        "log-probability head does not run",
        instead=False,
    ),
    *harmless("wgrad_deferral_limit", why="only defer_embedding_wgrad_compute reads it"),
    # Overlap of tensor-parallel communication.
    *refused(
        "tp_comm_overlap",
        when=is_set,
        why="Transformer Engine's communication buffers have one fixed number of tokens, and "
        "packed rows have many",
        instead=False,
    ),
    *harmless(
        "tp_comm_bulk_wgrad",
        "tp_comm_bulk_dgrad",
        "tp_comm_overlap_ag",
        "tp_comm_overlap_rs",
        "tp_comm_overlap_rs_dgrad",
        "tp_comm_split_ag",
        "tp_comm_atomic_ag",
        "tp_comm_split_rs",
        "tp_comm_atomic_rs",
        "tp_comm_overlap_disable_qkv",
        "tp_comm_overlap_disable_fc1",
        "tp_comm_bootstrap_backend",
        why="only tp_comm_overlap reads it, which is refused",
    ),
    *used(
        "symmetric_ar_type",
        why="Transformer Engine's row-parallel layers add up with another kernel",
    ),
    *harmless("nccl_all_reduce_for_prefill", why="only inference reads it", first="0.17"),
    # Gradients.
    *used(
        "gradient_accumulation_fusion",
        why="the trimmed last layer tells Megatron's hook that its gradient comes by autograd",
    ),
    *used(
        "finalize_model_grads_func",
        "grad_scale_func",
        "no_sync_func",
        "grad_sync_func",
        "param_sync_func",
        "calculate_per_token_loss",
        why="Megatron's schedules call it as they do for any batch",
    ),
    *used(
        "moe_grad_scale_func",
        why="Megatron's schedules scale the losses of routers by it",
        first="0.19",
    ),
    *harmless("mtp_grad_scale_func", why="only multi-token prediction reads it", first="0.19"),
]
