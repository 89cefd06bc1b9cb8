"""Options of how a step runs: CUDA graphs, offloading, random states, logging, inference."""

from __future__ import annotations

from megatron_prefix.megatron.options.record import Option, harmless, is_set, refused, used

_GRAPH = "a captured graph has the first batch's segments in it"
_NO_GRAPH = "only CUDA graphs read it, which are refused"
_INFERENCE = "only inference reads it, which never has a batch with shared prefixes"
_OFFLOADED = "only fine_grained_activation_offloading reads it, which is refused"

OPTIONS: list[Option] = [
    *refused("enable_cuda_graph", "external_cuda_graph", when=is_set, why=_GRAPH, instead=False),
    *refused(
        "cuda_graph_impl",
        when=lambda value: value is not None and value != "none",
        why=_GRAPH,
        instead="none",
        first="0.15",
    ),
    *harmless(
        "cuda_graph_use_single_mempool",
        "cuda_graph_retain_backward_graph",
        "cuda_graph_warmup_steps",
        "cuda_graph_scope",
        why=_NO_GRAPH,
    ),
    *harmless("cuda_graph_modules", why=_NO_GRAPH, first="0.18"),
    *harmless("inference_cuda_graph_scope", why=_INFERENCE, first="0.18"),
    # Activations on the host.
    *refused(
        "cpu_offloading",
        when=is_set,
        why="Transformer Engine's offloading has not been run with attention in stages, whose "
        "saved tensors it would move",
        instead=False,
    ),
    *harmless(
        "cpu_offloading_num_layers",
        "cpu_offloading_activations",
        "cpu_offloading_weights",
        "cpu_offloading_double_buffering",
        "_cpu_offloading_context",
        why="only cpu_offloading reads it, which is refused",
    ),
    *harmless(
        "cpu_offloading_retain_pinned_cpu_buffers",
        why="only cpu_offloading reads it, which is refused",
        first="0.17",
    ),
    *refused(
        "fine_grained_activation_offloading",
        when=is_set,
        why="it replays the first step's microbatches, and packed steps differ in their number",
        instead=False,
        first="0.16",
    ),
    *harmless("offload_modules", "min_offloaded_tensor_size", why=_OFFLOADED, first="0.16"),
    *harmless("fine_grained_offloading_max_inflight_offloads", why=_OFFLOADED, first="0.18"),
    *harmless(
        "delay_offload_until_cuda_graph",
        "delta_offload_bytes_across_pp_ranks",
        "activation_offload_fraction",
        why=_OFFLOADED,
        first="0.19",
    ),
    # Random states, timing, logging, checkpoints.
    *harmless(
        "use_te_rng_tracker",
        "inference_rng_tracker",
        why="nothing random runs in a model without dropout",
    ),
    *harmless("timers", "barrier_with_L1_time", "config_logger_dir", why="it measures or logs"),
    *harmless("test_mode", why="no release reads it"),
    *used("hetereogenous_dist_checkpoint", why="our layers have the checkpoint keys of Megatron's"),
    # Implementations, inference.
    *refused(
        "transformer_impl",
        when=lambda value: value == "inference_optimized",
        why="its layers are for inference",
        instead="transformer_engine",
    ),
    *refused(
        "use_inference_optimized_layers",
        when=is_set,
        why="its layers are for inference",
        instead=False,
        first="0.16",
    ),
    *harmless("flash_decode", "mlp_chunks_for_prefill", why=_INFERENCE),
    *harmless("inference_sampling_seed", why=_INFERENCE, first="0.15"),
    *harmless("inference_fuse_tp_communication", why=_INFERENCE, first="0.16"),
    *harmless(
        "inference_disable_triton_nvls_kernels",
        "inference_grouped_gemm_backend",
        "inference_moe_disable_fused_quant_kernels",
        why=_INFERENCE,
        first="0.17",
    ),
    *harmless("inference_moe_token_dispatcher_type", why=_INFERENCE, first="0.18"),
]
