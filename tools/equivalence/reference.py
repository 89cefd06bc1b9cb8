"""The reference: one process, one whole sequence at a time, plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter

from equivalence.case import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Case,
    mrope_positions,
    trained_tokens,
    with_old_logprobs,
)
from equivalence.microbatches import Name, planned_microbatches
from equivalence.norms import use_zero_centred_norms
from equivalence.objectives import ResponseTerms, response_terms, token_losses
from equivalence.predictions import OwnPredictions
from equivalence.recurrence import hold_in_dtype, use_exact_recurrences
from equivalence.routers import RouterLosses
from megatron_prefix.config import ParallelConfig
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.layout.hybrid_pattern import layers_of
from megatron_prefix.model.build import ModelChunks, build_model
from megatron_prefix.model.full_tensors import full_gradients, full_parameters
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.rollouts.records import RolloutGroup


def sequence_logprobs(
    model: torch.nn.Module,
    case: Case,
    group: RolloutGroup,
    index: int,
    predictions: OwnPredictions | None = None,
) -> Any:
    """[response tokens] log-probabilities and entropies of one response, by a whole forward."""
    tokens = torch.tensor([*group.prompt, *group.responses[index]])
    inputs = tokens[:-1][None]
    length = inputs.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(length)[None]
    if case.model.position_embedding_type == "mrope":
        positions = torch.tensor(mrope_positions(length))[:, None]
    if group.routes is not None:
        _replay(group.routes[index])
    if predictions is None:
        logits = model(inputs, positions, causal)
    else:
        logits = predictions.logits(
            tokens, group, index, position_ids=positions, attention_mask=causal
        )
    logits = logits[0, len(group.prompt) - 1 :]
    logits = logits[:, : case.model.vocab_size]
    if logits.dtype == torch.bfloat16:
        logits = logits.to(torch.float32)
    logprobs = torch.log_softmax(logits / case.objective.temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens[len(group.prompt) :][:, None])[:, 0], entropy


def _replay(routes: np.ndarray) -> None:
    """Give Megatron's own replay the routes of a sequence, [tokens, layers, topk]."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    RouterReplay.set_replay_data(
        [torch.from_numpy(of.astype(np.int64)) for of in routes.swapaxes(0, 1)]
    )
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def reference_loss(
    model: torch.nn.Module,
    case: Case,
    routers: RouterLosses,
    found: dict[Name, np.ndarray] | None,
    predictions: OwnPredictions | None,
) -> Any:
    """The objective's loss over all sequences that are computed; gradients accumulate.

    A sequence's tokens are those of its response that its mask has trained. Losses of routers are
    no part of the result, but of the gradients: their mean over the candidate's microbatches, those
    of all its data-parallel ranks. So are losses of multi-token prediction.
    """
    terms = response_terms(case)
    computed = [
        (g, i) for g, of_group in enumerate(terms) for i, of in enumerate(of_group) if of.computed
    ]
    microbatches = planned_microbatches(case) if routers else [[[name]] for name in computed]
    assert sorted(name for ranks in microbatches for names in ranks for name in names) == computed
    num_rows = sum(map(len, microbatches))
    total = 0.0
    for ranks in filter(any, microbatches):
        loss = torch.zeros(())
        for names in ranks:
            for g, i in names:
                logprobs, entropy = sequence_logprobs(model, case, case.groups[g], i, predictions)
                if found is not None:
                    found[g, i] = logprobs.detach().to(torch.float64).numpy()
                loss = loss + _response_loss(case, (g, i), logprobs, entropy, terms[g][i])
            routers.end_row()
        total += float(loss.detach())
        (loss + routers.of_rows() / num_rows).backward()
    routers.end_step()
    return total


def _response_loss(
    case: Case, name: Name, logprobs: torch.Tensor, entropy: torch.Tensor, terms: ResponseTerms
) -> torch.Tensor:
    """The objective's loss of one response."""
    g, i = name
    group = case.groups[g]
    trained = trained_tokens(group, i)
    of_records = _tensor(group.old_logprobs[i][trained], logprobs)
    old = of_records
    if case.recomputed_logprobs is not None:
        old = _tensor(case.recomputed_logprobs[g][i][trained], logprobs)
    loss = terms.weight * token_losses(
        logprobs[trained],
        entropy[trained],
        old=old,
        sampled=None if case.recomputed_logprobs is None else of_records,
        reference=_tensor(case.reference_logprobs[g][i][trained], logprobs),
        advantage=terms.advantage,
        objective=case.objective,
    )
    return loss.sum()


def _tensor(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype)


def run_reference(case: Case, seed: int) -> dict[str, Any]:
    """Losses, log-probabilities, gradients and parameters of the unmodified model."""
    padded = case.model.padded_vocab_size(case.parallel.tensor_model_parallel_size)
    pattern = case.model.hybrid_layer_pattern
    model_config = dataclasses.replace(
        case.model,
        vocab_size=padded,
        # One process has one stage.
        hybrid_layer_pattern=None if pattern is None else layers_of(pattern),
    )
    training = dataclasses.replace(case.training, recompute="none", device="cpu", kernel=None)
    with runtime(
        ParallelConfig(),
        device="cpu",
        seed=seed,
        timeout_minutes=10,
        float64=training.dtype == "float64",
    ):
        config = transformer_config(model_config, ParallelConfig(), training)
        if case.training.replayed_routes is not None:
            config.moe_enable_routing_replay = True
        use_exact_recurrences(config)
        use_zero_centred_norms(config)
        model = build_model(model_config, config, shared_prefixes=False)
        hold_in_dtype(model, config.params_dtype)
        if config.bf16:
            model.bfloat16()
        routers = RouterLosses(model, config)
        _disturb(model, seed)
        chunks = ModelChunks(wrapped=[], bare=[model], config=config, head=None)
        result: dict[str, Any] = {"initial": full_parameters(chunks)}
        predictions = OwnPredictions(model, case) if config.mtp_num_layers else None
        with torch.no_grad():
            result["sampled"] = [
                [
                    sequence_logprobs(model, case, g, i, predictions)[0].to(torch.float64).numpy()
                    for i in range(len(g.responses))
                ]
                for g in case.groups
            ]
        case = with_old_logprobs(case, result["sampled"], seed)
        result["case"] = case
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in model.parameters() if p.dim() > 1],
                    "weight_decay": WEIGHT_DECAY,
                },
                {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(case.optimizer.adam_beta1, case.optimizer.adam_beta2),
            eps=case.optimizer.adam_eps,
        )
        result["losses"], result["mtp_losses"] = [], []
        for step in range(max(1, case.training.steps)):
            optimizer.zero_grad()
            found: dict[Name, np.ndarray] | None = {} if step == 0 else None
            if predictions is not None:
                predictions.loss = 0.0
            result["losses"].append(reference_loss(model, case, routers, found, predictions))
            if predictions is not None:
                result["mtp_losses"].append(predictions.loss)
            _move_expert_biases(model)
            if step == 0:
                result["logprobs"] = found
                for parameter in model.parameters():
                    gradient = parameter.grad
                    parameter.main_grad = (
                        torch.zeros_like(parameter) if gradient is None else gradient.clone()
                    )
                result["gradients"] = full_gradients(chunks)
            optimizer.step()
        result["parameters"] = full_parameters(chunks)
    return result


def _disturb(model: torch.nn.Module, seed: int) -> None:
    """Random norms and biases too: at their initial ones and zeros errors could hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise.to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.add_(0.2 * noise.to(buffer.dtype))


@torch.no_grad()
def _move_expert_biases(model: torch.nn.Module) -> None:
    """Towards experts that got fewer tokens than the mean (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    Megatron's routers have counted the tokens of all sequences since the last step.
    """
    for router in model.modules():
        if isinstance(router, TopKRouter) and router.enable_expert_bias:
            counts = router.local_tokens_per_expert
            rate = router.config.moe_router_bias_update_rate
            router.expert_bias += (counts.mean() - counts).sign() * rate
            counts.zero_()
