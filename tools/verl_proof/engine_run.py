"""One side of the comparison, on one rank: verl's engine over the case, by verl's own calls."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from verl_proof.case import Case, Layout
from verl_proof.stand_ins import float32, stand_in

_NO_FUSION = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}
"""Kernels that need a GPU, off."""

_LIKE_SGD = {"adam_eps": 1.0}
"""Adam's first step is the sign of the gradient, also where that is rounding alone. Beside an eps
of 1 it is the gradient itself."""


def run_side(rank: int, case: Case, layout: Layout, ours: bool, results: Path) -> None:
    """Run one engine and save what this rank has found.

    Args:
        rank: of this process.
        case: with `samples_of_rank` for the layout.
        layout: of this side.
        ours: whether shared prefixes are on.
        results: folder.
    """
    # What verl prints does not belong to the tool's output.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    dist.init_process_group("gloo")
    stand_in()
    engine = _build(case, layout, ours)
    counts = _count(engine)
    found: dict[str, Any] = {"samples": case.samples_of_rank[engine.get_data_parallel_rank()]}
    data = _batch(case, found["samples"])

    started = time.perf_counter()
    with engine.eval_mode():
        output = engine.infer_batch(data.clone(), loss_function=None)
    found["infer_seconds"] = time.perf_counter() - started
    found["infer_tokens"], _ = counts.pop()
    if engine.is_mp_src_rank_with_outputs():
        found["output"] = {
            name: _responses(output["model_output"][name], case, found["samples"])
            for name in ("log_probs", "entropy")
        }
    loss = _loss_function(case)
    found["losses"], found["grad_norms"], found["train_seconds"] = [], [], 0.0
    for _ in range(case.optimizer_steps):
        started = time.perf_counter()
        with engine.train_mode():
            output = engine.train_batch(data.clone(), loss_function=loss)
        found["train_seconds"] += time.perf_counter() - started
        found["train_tokens"], found["train_rows"] = counts.pop()
        if engine.is_mp_src_rank_with_outputs():
            found["losses"].append(sum(output["loss"]))
            found["grad_norms"].append(float(output["metrics"]["grad_norm"]))
    found["parameters"] = _parameters(engine)
    torch.save(found, results / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _build(case: Case, layout: Layout, ours: bool) -> Any:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    model = HFModelConfig(
        path=str(case.folder),
        load_tokenizer=False,
        # What a user of verl sets, and nothing else.
        external_lib="megatron_prefix.integrations.verl" if ours else None,
        override_config={"attn_implementation": "eager"},
    )
    # Only the number that padding has is read of it.
    model.tokenizer = _Tokenizer()
    overrides = dict(_NO_FUSION)
    if case.num_experts:
        overrides["moe_grouped_gemm"] = False
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="megatron",
        model_config=model,
        engine_config=float32(
            McoreEngineConfig(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=1 if case.num_experts else None,
                sequence_parallel=layout.tp > 1,
                vanilla_mbridge=True,
                use_distributed_optimizer=case.distributed_optimizer,
                override_transformer_config=overrides,
            )
        ),
        optimizer_config=McoreOptimizerConfig(
            # Megatron shards the state of Adam only.
            optimizer="adam" if case.distributed_optimizer else "sgd",
            override_optimizer_config=_LIKE_SGD if case.distributed_optimizer else {},
            # Steps that are so long that the gradient halves amplify the rounding of those before.
            lr=0.1,
            total_training_steps=100,
            lr_warmup_steps=0,
            lr_decay_style="constant",
            weight_decay=0.0,
            clip_grad=1.0,
        ),
        checkpoint_config=CheckpointConfig(),
    )
    model_parallel_cuda_manual_seed(case.seed)
    engine.initialize()
    return engine


class _Tokenizer:
    pad_token_id = 0


def _batch(case: Case, samples: tuple[int, ...]) -> Any:
    """A rank's part of the batch as verl's workers have it."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    prompts = [torch.tensor(case.prompts[i]) for i in samples]
    responses = [torch.tensor(case.responses[i]) for i in samples]
    ids = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    masks = [torch.tensor(case.response_masks[i], dtype=torch.float32) for i in samples]
    data = TensorDict(
        {
            "input_ids": nested(ids),
            "position_ids": nested([torch.arange(len(i)) for i in ids]),
            "prompts": nested(prompts),
            "responses": nested(responses),
            "response_mask": nested(masks),
            "loss_mask": nested(masks),
            "old_log_probs": nested([torch.tensor(case.old_log_probs[i]) for i in samples]),
            "ref_log_prob": nested([torch.tensor(case.reference_log_probs[i]) for i in samples]),
            "advantages": nested(
                [
                    torch.full_like(m, case.advantages[i])
                    for m, i in zip(masks, samples, strict=True)
                ]
            ),
            "temperature": torch.full((len(ids),), 0.8),
        },
        batch_size=[len(ids)],
    )
    tensordict_utils.assign_non_tensor(
        data,
        use_dynamic_bsz=case.micro_batch_size is None,
        max_token_len_per_gpu=case.token_budget,
        calculate_entropy=True,
        global_batch_size=len(case.prompts),
        use_fused_kernels=False,
    )
    if case.micro_batch_size is not None:
        tensordict_utils.assign_non_tensor(data, micro_batch_size_per_gpu=case.micro_batch_size)
    return data


def _loss_function(case: Case) -> Any:
    from verl.workers.config.actor import McoreActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = McoreActorConfig(
        rollout_n=1,
        ppo_mini_batch_size=len(case.prompts),
        ppo_micro_batch_size_per_gpu=1,
        strategy="megatron",
        use_kl_loss=True,
        kl_loss_coef=0.05,
        entropy_coeff=0.01,
    )
    return functools.partial(ppo_loss, config)


class _Counts:
    """Tokens and rows that the first layer of the model has been given since the last `pop`."""

    def __init__(self) -> None:
        self.tokens = self.rows = 0

    def pop(self) -> tuple[int, int]:
        """The counts, which begin anew."""
        counts = self.tokens, self.rows
        self.tokens = self.rows = 0
        return counts


def _count(engine: Any) -> _Counts:
    """Count on ranks that count for all: the first stage's, of tensor-parallel rank 0."""
    from megatron.core import parallel_state
    from verl.utils.megatron_utils import unwrap_model

    counts = _Counts()
    first = unwrap_model(engine.module[0])
    if not first.pre_process or parallel_state.get_tensor_model_parallel_rank() != 0:
        return counts

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts.tokens += kwargs["input_ids"].numel()
        counts.rows += 1

    first.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def _responses(nested: torch.Tensor, case: Case, samples: tuple[int, ...]) -> list[torch.Tensor]:
    """What verl reads of its output: the positions that predict each sample's response."""
    return [
        row[len(row) - len(case.responses[i]) - 1 : -1].clone()
        for row, i in zip(nested.unbind(), samples, strict=True)
    ]


def _parameters(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's, by its place in the model."""
    from megatron.core import parallel_state
    from verl.utils.megatron_utils import unwrap_model

    place = f"pp{parallel_state.get_pipeline_model_parallel_rank()}"
    place += f".tp{parallel_state.get_tensor_model_parallel_rank()}"
    expert = f".ep{parallel_state.get_expert_model_parallel_rank()}"
    found = {}
    for chunk, module in enumerate(engine.module):
        for name, parameter in unwrap_model(module).named_parameters():
            where = place + (expert if ".experts." in name else "")
            found[f"{where}.chunk{chunk}.{name}"] = parameter.detach().clone()
    return found
