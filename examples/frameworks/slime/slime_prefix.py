"""slime with shared prefixes: two functions for its command line.

    --custom-model-provider-path slime_prefix.model_provider
    --rollout-function-path slime_prefix.generate_rollout

The first lets the actor share prefixes. The second changes nothing of the rollouts; it lets slime
pack its microbatches by whole groups, where slime itself packs by length and tears groups apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from megatron_prefix.integrations import share_prefixes, whole_groups

Schedule = tuple[list[list[int]], list[list[list[int]]], list[int], list[int]]

_prompts: dict[Any, Sequence[int]] = {}
"""By the id of a rollout, the tokens of its prompt; of the rollouts that train next."""


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None
) -> Any:
    """slime's own model, sharing prefixes."""
    from megatron.training.global_vars import get_args
    from slime.backends.megatron_utils.model_provider import get_model_provider_func

    args = copy.copy(get_args())
    args.custom_model_provider_path = None
    provider = get_model_provider_func(args)
    return share_prefixes(
        provider(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
    )


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """slime's own rollouts; remembers their prompts for the schedule of their microbatches."""
    from slime.ray import rollout
    from slime.rollout import sglang_rollout
    from slime.utils.dp_schedule import build_dp_schedule

    output = sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=evaluation)
    if evaluation:
        return output
    _prompts.clear()
    _prompts.update(prompts_of(_samples(output.samples)))

    def schedule(args: Any, config: dict, lengths: list[int], **ids: Any) -> Schedule:
        own = build_dp_schedule
        return schedule_of_whole_groups(args, config, lengths, prompts=_prompts, own=own, **ids)

    rollout.build_dp_schedule = schedule
    return output


def _samples(output: Any) -> list[Any]:
    """All samples of slime's nested lists."""
    if not isinstance(output, list):
        return [output]
    return [sample for part in output for sample in _samples(part)]


def prompts_of(samples: list[Any]) -> dict[Any, Sequence[int]]:
    """The tokens of the prompt of each rollout, by its id.

    A sample without `rollout_id` gets its index for one, which slime would number by its place
    later on. Empty where a rollout has made samples of several prompts: slime then packs itself.
    """
    prompts: dict[Any, Sequence[int]] = {}
    for sample in samples:
        if sample.rollout_id is None:
            sample.rollout_id = sample.index
        prompt = sample.tokens[: len(sample.tokens) - sample.response_length]
        if prompts.setdefault(sample.rollout_id, prompt) != prompt:
            return {}
    return prompts


def schedule_of_whole_groups(
    args: Any,
    train_parallel_config: dict[str, int],
    total_lengths: list[int],
    *,
    global_batch_size: int,
    rollout_indices: list[int],
    prompts: dict[Any, Sequence[int]],
    own: Callable[..., Schedule],
) -> Schedule:
    """What slime's `build_dp_schedule` returns, with groups whole.

    Args:
        args, train_parallel_config, total_lengths, global_batch_size, rollout_indices: slime's.
        prompts: by the ids in `rollout_indices`.
        own: slime's function, for static batch sizes and rollouts whose prompts are not known.
    """
    if not args.use_dynamic_batch_size or not set(rollout_indices) <= prompts.keys():
        return own(
            args,
            train_parallel_config,
            total_lengths,
            global_batch_size=global_batch_size,
            rollout_indices=rollout_indices,
        )
    num_ranks = train_parallel_config["dp_size"]
    interleaved = train_parallel_config["vpp_size"] > 1
    rollouts = list(dict.fromkeys(rollout_indices))
    num_steps = len(rollouts) // global_batch_size
    partitions: list[list[int]] = [[] for _ in range(num_ranks)]
    microbatches: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    counts = []
    for step in range(num_steps):
        chosen = set(rollouts[step * global_batch_size : (step + 1) * global_batch_size])
        samples = [i for i, rollout in enumerate(rollout_indices) if rollout in chosen]
        ranks = whole_groups(
            [prompts[rollout_indices[i]] for i in samples],
            [total_lengths[i] for i in samples],
            token_budget=args.max_tokens_per_gpu,
            data_parallel_size=num_ranks,
            microbatch_multiple=(
                train_parallel_config["microbatch_group_size_per_vp_stage"] if interleaved else 1
            ),
        )
        counts.append(len(ranks[0]))
        for rank, own_microbatches in enumerate(ranks):
            for members in own_microbatches:
                start = len(partitions[rank])
                partitions[rank] += [samples[i] for i in members]
                microbatches[rank].append(list(range(start, start + len(members))))
    return partitions, microbatches, counts, [global_batch_size] * num_steps
