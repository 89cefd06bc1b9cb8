"""Prove that prefix-grouped, packed, parallel training computes what the repeated prompt would.

    python tools/verify_equivalence.py --tp 2 --pp 2 --dtype float64 --optimizer-steps 3

The reference is the unmodified Megatron GPTModel with Megatron's own layer spec, in one process
without any parallelism: one whole sequence at a time, unpacked, with the loss written out in plain
PyTorch and torch.optim.AdamW. The candidate starts from the same weights and sees the same
rollouts, but shares each prompt, packs, and runs through the trainer's own step on tp x pp x dp
processes. Loss, every log-probability, every parameter's whole gradient and the parameters after
the optimizer steps are compared; the exit status is 0 only if all are within tolerance.

The last line of stdout is a JSON object. Runs on the CPU (gloo); no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_prefix.objective import ObjectiveConfig
from megatron_prefix.rollouts.records import RolloutGroup
from megatron_prefix.shapes import read_shapes
from megatron_prefix.training.config import (
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prefix.training.config_loader import ConfigError, load_dataclass, read_yaml
from megatron_prefix.training.model import transformer_config

# grad_rel and param_rel are relative L2 errors per parameter, the worst one counts. float64's are
# the project's promise; float32's and bfloat16's are the rounding of a few layers in that format.
TOLERANCES = {
    "float64": {"loss_rel": 1e-10, "logprob_abs": 1e-10, "grad_rel": 1e-10, "param_rel": 1e-8},
    "float32": {"loss_rel": 1e-4, "logprob_abs": 1e-4, "grad_rel": 1e-3, "param_rel": 1e-2},
    "bfloat16": {"loss_rel": 5e-2, "logprob_abs": 2e-1, "grad_rel": 1e-1, "param_rel": 5e-2},
}

DEFAULT_SHAPES: list[dict[str, Any]] = [
    {"prefix": 24, "responses": [5, 9, 3, 7]},
    {"prefix": 1, "responses": [4, 6]},
    {"prefix": 17, "responses": [1, 1, 12]},
    {"prefix": 30, "responses": [8]},
    {"prefix": 9, "responses": [2, 40, 1, 5, 3]},
    {"prefix": 1, "responses": [1]},
]

DEFAULT_MODEL: dict[str, Any] = {
    "vocab_size": 93,
    "max_sequence_length": 128,
    "position_embedding_type": "rope",
    "activation": "silu",
    "transformer": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "gated_linear_unit": True,
        "qk_layernorm": True,
        "add_qkv_bias": True,
    },
}

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that both sides are given."""

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerSettings
    objective: ObjectiveConfig
    groups: tuple[RolloutGroup, ...]
    reference_logprobs: tuple[tuple[np.ndarray, ...], ...] | None
    data_parallel_size: int
    folder: Path

    @property
    def world_size(self) -> int:
        """Processes of the candidate."""
        return self.parallel.model_parallel_size * self.data_parallel_size


def draw_groups(shapes: list[dict[str, Any]], vocab_size: int, seed: int) -> list[RolloutGroup]:
    """Random rollouts of the given shapes."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(0, vocab_size, count))

    return [
        RolloutGroup(
            prompt=tokens(shape["prefix"]),
            responses=tuple(tokens(length) for length in shape["responses"]),
            rewards=tuple(float(r) for r in rng.normal(size=len(shape["responses"]))),
            old_logprobs=None,
            source=f"shape {index}",
        )
        for index, shape in enumerate(shapes)
    ]


def check_layout(
    model: ModelConfig, parallel: ParallelConfig, data_parallel_size: int, optimizer_steps: int
) -> None:
    """Refuse, before any process starts, what a run's configuration would be refused for.

    Raises:
        ValueError: naming the option.
    """
    for name, value in (("dp", data_parallel_size), ("optimizer-steps", optimizer_steps)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    experts = parallel.expert_model_parallel_size
    if experts > 1 and model.transformer.get("num_moe_experts") is None:
        raise ValueError(f"ep: {experts} needs a model with num_moe_experts; give one with --model")
    parallel.data_parallel_size(parallel.model_parallel_size * data_parallel_size)
    training = TrainingConfig(steps=1, token_budget=1, dtype="float32", device="cpu")
    transformer_config(model, parallel, training)


def check_lengths(shapes: list[dict[str, Any]], model: ModelConfig, path: Path | None) -> None:
    """Refuse sequences beyond the model's positions.

    Raises:
        ValueError: naming the file and the entry.
    """
    for index, shape in enumerate(shapes):
        longest = shape["prefix"] + max(shape["responses"])
        if longest > model.max_sequence_length:
            raise ValueError(
                f"{path or 'shapes'}: entry {index}: a prefix and response of {longest} tokens "
                f"exceed the model's max_sequence_length: {model.max_sequence_length}"
            )


# --- the reference: one process, one sequence at a time, plain PyTorch ---------------------------


def sequence_logprobs(model: torch.nn.Module, case: Case, group: RolloutGroup, index: int) -> Any:
    """[response tokens] log-probabilities and entropies of one response, by a whole forward."""
    tokens = torch.tensor([*group.prompt, *group.responses[index]])
    inputs = tokens[:-1][None]
    length = inputs.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    logits = model(inputs, torch.arange(length)[None], causal)[0, len(group.prompt) - 1 :]
    logits = logits[:, : case.model.vocab_size]
    if logits.dtype == torch.bfloat16:
        logits = logits.to(torch.float32)
    logprobs = torch.log_softmax(logits / case.objective.temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, tokens[len(group.prompt) :][:, None])[:, 0], entropy


def reference_loss(model: torch.nn.Module, case: Case, found: list[list[np.ndarray]] | None) -> Any:
    """GRPO's loss over all sequences as in the paper: group by group, sequence by sequence."""
    objective = case.objective
    num_sequences = sum(len(group.responses) for group in case.groups)
    total = 0.0
    for g, group in enumerate(case.groups):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        spread = rewards.std(unbiased=True) if len(rewards) > 1 else torch.zeros(())
        centred = (rewards - rewards.mean()) / (spread + objective.advantage_epsilon)
        for i in range(len(group.responses)):
            logprobs, entropy = sequence_logprobs(model, case, group, i)
            if found is not None:
                found[g].append(logprobs.detach().to(torch.float64).numpy())
            old = torch.tensor(group.old_logprobs[i], dtype=logprobs.dtype)
            ratio = torch.exp(logprobs - old)
            clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
            surrogate = torch.minimum(ratio * centred[i], clipped * centred[i])
            drift = torch.tensor(case.reference_logprobs[g][i], dtype=logprobs.dtype) - logprobs
            kl = torch.exp(drift) - drift - 1
            token_loss = -surrogate + objective.kl_coefficient * kl
            token_loss = token_loss - objective.entropy_coefficient * entropy
            loss = token_loss.mean() / num_sequences
            loss.backward()
            total += float(loss)
    return total


def run_reference(case: Case, seed: int) -> dict[str, Any]:
    """Losses, log-probabilities, gradients and parameters of the unmodified model."""
    from megatron_prefix.training.full_tensors import full_gradients, full_parameters
    from megatron_prefix.training.model import ModelChunks, build_gpt_model
    from megatron_prefix.training.runtime import runtime

    padded = case.model.padded_vocab_size(case.parallel.tensor_model_parallel_size)
    model_config = dataclasses.replace(case.model, vocab_size=padded)
    training = dataclasses.replace(case.training, recompute="none")
    with runtime(
        ParallelConfig(),
        device="cpu",
        seed=seed,
        timeout_minutes=10,
        float64=training.dtype == "float64",
    ):
        config = transformer_config(model_config, ParallelConfig(), training)
        model = build_gpt_model(model_config, config, shared_prefixes=False)
        if config.bf16:
            model.bfloat16()
        _disturb(model, seed)
        chunks = ModelChunks(wrapped=[], bare=[model], config=config, head=None)
        result: dict[str, Any] = {"initial": full_parameters(chunks)}
        with torch.no_grad():
            result["sampled"] = [
                [
                    sequence_logprobs(model, case, g, i)[0].to(torch.float64).numpy()
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
        result["losses"] = []
        for step in range(max(1, case.training.steps)):
            optimizer.zero_grad()
            found: list[list[np.ndarray]] | None = [[] for _ in case.groups] if step == 0 else None
            result["losses"].append(reference_loss(model, case, found))
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


def with_old_logprobs(case: Case, sampled: list[list[np.ndarray]], seed: int) -> Case:
    """Old and reference log-probabilities near the current ones, so that clipping takes part."""
    rng = np.random.default_rng(seed + 1)

    def near(values: np.ndarray) -> np.ndarray:
        return np.minimum(values + rng.normal(scale=0.25, size=values.shape), -1e-3)

    groups = tuple(
        dataclasses.replace(
            group, old_logprobs=tuple(tuple(float(x) for x in near(v)) for v in values)
        )
        for group, values in zip(case.groups, sampled, strict=True)
    )
    reference = tuple(tuple(near(v) for v in values) for values in sampled)
    return dataclasses.replace(case, groups=groups, reference_logprobs=reference)


# --- the candidate: shared prefixes, packed, parallel, through the trainer's step -----------------


def run_candidate(case: Case, initial: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The same quantities by the trainer's own code; on rank 0, None elsewhere."""
    import torch.distributed as dist

    from megatron_prefix.training.full_tensors import (
        full_gradients,
        full_parameters,
        load_full_parameters,
    )
    from megatron_prefix.training.minibatch import PackingConfig, build_minibatch
    from megatron_prefix.training.model import build_model_chunks, model_shape
    from megatron_prefix.training.optimizer import build_optimizer, build_scheduler
    from megatron_prefix.training.runtime import runtime
    from megatron_prefix.training.step import (
        accumulate_gradients,
        compute_logprobs,
        reduce_sums,
        train_step,
    )

    parallel, training = case.parallel, case.training
    with runtime(
        parallel,
        device="cpu",
        seed=1,
        timeout_minutes=training.timeout_minutes,
        float64=training.dtype == "float64",
    ) as place:
        chunks = build_model_chunks(
            case.model,
            parallel,
            training,
            use_distributed_optimizer=case.optimizer.use_distributed_optimizer,
        )
        load_full_parameters(chunks, initial)
        optimizer = build_optimizer(case.optimizer, chunks)
        optimizer.reload_model_params()
        scheduler = build_scheduler(case.optimizer, optimizer, total_steps=training.steps)
        packing = PackingConfig(
            token_budget=training.token_budget,
            data_parallel_size=place.data_parallel_size,
            model_shape=model_shape(case.model, chunks.config),
            pad_to_multiple=parallel.pad_to_multiple,
            microbatch_multiple=parallel.microbatch_multiple,
        )
        minibatch = build_minibatch(
            case.groups,
            case.objective,
            packing,
            data_parallel_rank=place.data_parallel_rank,
            device=place.device,
        )
        slices = minibatch.plan.microbatches[place.data_parallel_rank]
        for batch, parts in zip(minibatch.batches, slices, strict=True):
            values = [case.reference_logprobs[p.group][i] for p in parts for i in p.sequences]
            batch.reference_logprobs = torch.from_numpy(np.concatenate([*values, np.zeros(0)]))
        found = compute_logprobs(chunks, minibatch.batches, case.objective)
        mine = []
        if place.reports_metrics:
            for batch, parts, logprobs in zip(minibatch.batches, slices, found, strict=True):
                names = [(p.group, i) for p in parts for i in p.sequences]
                for local, name in enumerate(names):
                    chosen = logprobs[batch.sequence_ids == local]
                    mine.append((name, chosen.to(torch.float64).numpy()))
        gathered: list[Any] = [None] * place.world_size
        dist.all_gather_object(gathered, mine)
        result: dict[str, Any] = {
            "logprobs": {name: values for part in gathered for name, values in part},
            "num_microbatches": minibatch.plan.num_microbatches,
            "packed_tokens": minibatch.packed_tokens,
            "ungrouped_tokens": minibatch.ungrouped_tokens,
            "split": _num_splits(minibatch.plan),
            "losses": [],
        }

        def loss_of(metrics: list[Any]) -> float:
            objective = case.objective
            total = torch.zeros(1, dtype=torch.float64)
            for m in metrics:
                total += m.policy_loss + objective.kl_coefficient * m.kl
                total -= objective.entropy_coefficient * m.entropy
            return float(reduce_sums(total, contributes=place.reports_metrics)[0])

        accumulate_gradients(chunks, minibatch.batches, case.objective)
        result["gradients"] = full_gradients(chunks)
        for _ in range(max(1, training.steps)):
            step = train_step(chunks, optimizer, scheduler, minibatch.batches, case.objective)
            result["losses"].append(loss_of(step.metrics))
        result["parameters"] = full_parameters(chunks)
        return result if place.is_main else None


def _num_splits(plan: Any) -> int:
    """Groups that run in more than one microbatch."""
    runs: dict[int, int] = {}
    for rank in plan.microbatches:
        for microbatch in rank:
            for part in microbatch:
                runs[part.group] = runs.get(part.group, 0) + 1
    return sum(count > 1 for count in runs.values())


# --- processes, comparison, report ---------------------------------------------------------------


def _worker(rank: int, world_size: int, port: int, job: str, folder: Path, seed: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        # Written by this very run in its own temporary folder.
        inputs = torch.load(folder / "inputs.pt", weights_only=False)
        if job == "reference":
            result = run_reference(inputs["case"], seed)
        else:
            result = run_candidate(inputs["case"], inputs["initial"])
        if rank == 0:
            torch.save(result, folder / f"{job}.pt")
    except BaseException:
        print(f"{job}: rank {rank} failed", file=sys.stderr)
        traceback.print_exc()
        raise


def spawn(job: str, world_size: int, folder: Path, seed: int) -> Any:
    """Run a job on fresh processes and return what rank 0 saved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _worker,
        args=(world_size, port, job, folder, seed),
        nprocs=world_size,
        start_method="spawn",
    )
    return torch.load(folder / f"{job}.pt", weights_only=False)


def _relative_errors(
    candidate: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], floor: float
) -> list[tuple[str, float]]:
    """Relative L2 error of each parameter, worst first.

    A norm below `floor` times the norm of all parameters together counts as that much: gradients
    that are zero in exact arithmetic have no relative error.
    """
    if candidate.keys() != reference.keys():
        raise RuntimeError(f"parameters differ: {sorted(candidate.keys() ^ reference.keys())}")
    whole = sum(float(t.double().norm()) ** 2 for t in reference.values()) ** 0.5
    errors = []
    for name, expected in reference.items():
        difference = float((candidate[name].double() - expected.double()).norm())
        errors.append((name, difference / max(float(expected.double().norm()), floor * whole)))
    # A NaN sorts first: it is the worst.
    return sorted(errors, key=lambda item: (not np.isnan(item[1]), -item[1]))


def compare(reference: dict[str, Any], candidate: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The report, with a printed table of the worst parameters."""
    gradients = _relative_errors(candidate["gradients"], reference["gradients"], 1e-6)
    parameters = _relative_errors(candidate["parameters"], reference["parameters"], 1e-6)
    expected = {
        (g, i): v for g, values in enumerate(reference["logprobs"]) for i, v in enumerate(values)
    }
    if candidate["logprobs"].keys() != expected.keys():
        raise RuntimeError("the candidate did not compute every response's log-probabilities")
    logprob_abs = max(
        float(np.max(np.abs(candidate["logprobs"][name] - values)))
        for name, values in expected.items()
    )
    loss_rel = max(
        abs(a - b) / max(abs(b), 1e-12)
        for a, b in zip(candidate["losses"], reference["losses"], strict=True)
    )
    report = {
        "loss_rel": loss_rel,
        "logprob_abs": logprob_abs,
        "grad_rel": gradients[0][1],
        "param_rel": parameters[0][1],
    }
    report["ok"] = all(report[name] <= bound for name, bound in TOLERANCES[dtype].items())
    print(f"{'worst gradients':<64} relative error")
    for name, error in gradients[:5]:
        print(f"  {name:<62} {error:.2e}")
    print(f"{'worst parameters after the optimizer steps':<64} relative error")
    for name, error in parameters[:5]:
        print(f"  {name:<62} {error:.2e}")
    return report


def verify(
    *,
    model: ModelConfig,
    shapes: list[dict[str, Any]],
    parallel: ParallelConfig,
    data_parallel_size: int = 1,
    dtype: str = "float64",
    optimizer_steps: int = 1,
    recompute: str = "none",
    token_budget: int | None = None,
    distributed_optimizer: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Run both sides and compare; returns the report that the tool prints as JSON."""
    groups = draw_groups(shapes, model.vocab_size, seed)
    largest = max(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    training = TrainingConfig(
        steps=optimizer_steps,
        token_budget=token_budget or max(2 * largest, 64),
        dtype=dtype,
        recompute=recompute,
        device="cpu",
        log_prob_chunk_tokens=16,
        timeout_minutes=5,
    )
    with tempfile.TemporaryDirectory(prefix="verify_equivalence_") as name:
        folder = Path(name)
        case = Case(
            model=model,
            parallel=parallel,
            training=training,
            optimizer=OptimizerSettings(
                lr=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                clip_grad=0.0,
                use_distributed_optimizer=distributed_optimizer,
            ),
            objective=ObjectiveConfig(kl_coefficient=0.05, entropy_coefficient=0.01),
            groups=tuple(groups),
            reference_logprobs=None,
            data_parallel_size=data_parallel_size,
            folder=folder,
        )
        torch.save({"case": case}, folder / "inputs.pt")
        reference = spawn("reference", 1, folder, seed)
        case = reference["case"]
        torch.save({"case": case, "initial": reference["initial"]}, folder / "inputs.pt")
        candidate = spawn("candidate", case.world_size, folder, seed)
    print(
        f"{len(groups)} groups, {candidate['ungrouped_tokens']} tokens ungrouped, "
        f"{candidate['packed_tokens']} packed; {candidate['num_microbatches']} microbatches per "
        f"data-parallel rank, {candidate['split']} groups split over microbatches"
    )
    return compare(reference, candidate, dtype)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="YAML with the `model` section of a run")
    parser.add_argument("--shapes", type=Path, help="YAML: [{prefix: int, responses: [int]}]")
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor parallel (with sequence parallel)"
    )
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--dp", type=int, default=1, help="data parallel")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel")
    parser.add_argument("--no-sequence-parallel", action="store_true")
    parser.add_argument("--no-distributed-optimizer", action="store_true")
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="float64")
    parser.add_argument("--optimizer-steps", type=int, default=1)
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--token-budget", type=int, help="tokens of one microbatch at most")
    parser.add_argument("--seed", type=int, help="of weights and rollouts; a fresh one by default")
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(3), "little") if args.seed is None else args.seed
    print(f"seed {seed}")
    try:
        values = DEFAULT_MODEL
        if args.model is not None:
            values = read_yaml(args.model)
            values = values.get("model", values)
        model = load_dataclass(ModelConfig, values, path="model")
        parallel = ParallelConfig(
            tensor_model_parallel_size=args.tp,
            pipeline_model_parallel_size=args.pp,
            virtual_pipeline_model_parallel_size=args.vpp if args.vpp > 1 else None,
            expert_model_parallel_size=args.ep,
            sequence_parallel=False if args.no_sequence_parallel else None,
        )
        shapes = DEFAULT_SHAPES if args.shapes is None else read_shapes(args.shapes)
        check_lengths(shapes, model, args.shapes)
        check_layout(model, parallel, args.dp, args.optimizer_steps)
    except (ConfigError, ValueError, OSError) as error:
        print(f"verify_equivalence: {error}", file=sys.stderr)
        return 2
    report = verify(
        model=model,
        shapes=shapes,
        parallel=parallel,
        data_parallel_size=args.dp,
        dtype=args.dtype,
        optimizer_steps=args.optimizer_steps,
        recompute=args.recompute,
        token_budget=args.token_budget,
        distributed_optimizer=not args.no_distributed_optimizer,
        seed=seed,
    )
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
