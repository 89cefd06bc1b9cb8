"""Which samples run in which microbatch: groups whole, budgeted in packed tokens.

Invariants:

- every sample of the rank is in exactly one microbatch, and no microbatch is empty;
- with a token budget, a microbatch's packed row keeps to it, padding included; groups over the
  budget are split, and only these, unless there would be fewer pieces than microbatches;
- every data-parallel rank has the same number of microbatches, a multiple of what the pipeline
  schedule asks for;
- it is a function of the samples of all ranks, so every tensor-, pipeline- and context-parallel
  rank that has the same samples finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_prefix.integrations.verl.options import KEY
from megatron_prefix.integrations.verl.samples import Samples, part_of_groups_split
from megatron_prefix.layout import MicrobatchPlan, plan_microbatches

Microbatches = list[list[int]]
"""Samples of each microbatch, in the order in which they run."""

_MOST = 0.5
"""Equal prompts of different groups may well be on different ranks, a part of the groups may have
to be; a trainer that does not look at groups splits nearly all of them."""


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """What the other data-parallel ranks have to know of one."""

    fault: str | None
    """Why its samples cannot be planned."""
    num_microbatches: int
    num_samples: int
    prompts: tuple[bytes, ...]
    """Of its samples; empty where nobody asks for them."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchPlanner:
    """Plans the microbatches of a rank, together with the other data-parallel ranks."""

    group: dist.ProcessGroup | None
    """The data-parallel ranks; None: this one alone."""
    pad_to_multiple: int
    """A packed row's length is a multiple of this."""
    microbatch_multiple: int
    """The number of microbatches is a multiple of this."""

    def by_tokens(
        self, samples: Samples, *, token_budget: int, refuse_split_groups: bool
    ) -> Microbatches:
        """Microbatches of at most `token_budget` packed tokens. Collective.

        Args:
            samples: of this rank.
            token_budget: of one packed row on all of its context-parallel ranks.
            refuse_split_groups: end here where most groups are on several ranks.

        Raises:
            ValueError: the same on every rank: a sample over the budget, fewer samples than
                microbatches, or most groups split over ranks.
        """
        fault, plan = None, None
        try:
            plan = self._plan(samples, token_budget, multiple=1)
        except ValueError as error:
            fault = str(error).replace("token_budget", "max_token_len_per_gpu x context parallel")
        ranks = self._tell(
            _Rank(
                fault=fault,
                num_microbatches=1 if plan is None else plan.num_microbatches,
                num_samples=len(samples.tokens),
                prompts=_names_to_compare(samples, refuse_split_groups),
            )
        )
        _refuse(ranks)
        needed = max(rank.num_microbatches for rank in ranks)
        count = -(-needed // self.microbatch_multiple) * self.microbatch_multiple
        fewest = min(rank.num_samples for rank in ranks)
        if count > fewest:
            raise ValueError(
                f"{count} microbatches are needed ({needed} for the token budget, in multiples of "
                f"{self.microbatch_multiple}), and a data-parallel rank has {fewest} samples: "
                "raise the batch size or max_token_len_per_gpu"
            )
        assert plan is not None
        if plan.num_microbatches != count:
            plan = self._plan(samples, token_budget, multiple=count)
        return _without_empty(
            [
                [samples.groups[part.group][i] for part in slices for i in part.sequences]
                for slices in plan.microbatches[0]
            ]
        )

    def by_samples(self, samples: Samples, *, size: int, refuse_split_groups: bool) -> Microbatches:
        """Microbatches of `size` samples, group after group. Collective.

        Groups are whole where the size is a multiple of theirs.

        Raises:
            ValueError: the same on every rank: the samples do not divide, or most groups are split
                over ranks.
        """
        fault, count = None, len(samples.tokens)
        if count % size or count // size % self.microbatch_multiple:
            fault = (
                f"{count} samples of a data-parallel rank do not divide into microbatches of "
                f"micro_batch_size_per_gpu={size}, their number a multiple of "
                f"{self.microbatch_multiple}: set another, or use_dynamic_bsz=True"
            )
        _refuse(
            self._tell(
                _Rank(
                    fault=fault,
                    num_microbatches=count // size,
                    num_samples=count,
                    prompts=_names_to_compare(samples, refuse_split_groups),
                )
            )
        )
        ordered = [sample for group in samples.groups for sample in group]
        return [ordered[start : start + size] for start in range(0, count, size)]

    def _plan(self, samples: Samples, token_budget: int, *, multiple: int) -> MicrobatchPlan:
        capacity = token_budget - token_budget % self.pad_to_multiple
        return plan_microbatches(
            [samples.tree(group, token_budget=capacity) for group in samples.groups],
            token_budget=token_budget,
            data_parallel_size=1,
            cost=samples.shape,
            pad_to_multiple=self.pad_to_multiple,
            microbatch_multiple=multiple,
            names=[f"of sample {group[0]}" for group in samples.groups],
            trim_last_layer=not samples.shape.whole_last_layer,
        )

    def _tell(self, rank: _Rank) -> list[_Rank]:
        """Of all ranks."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return [rank]
        ranks: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(ranks, rank, group=self.group)
        return ranks


def _names_to_compare(samples: Samples, refuse_split_groups: bool) -> tuple[bytes, ...]:
    return samples.prompt_names if refuse_split_groups and samples.has_prompts else ()


def _refuse(ranks: list[_Rank]) -> None:
    for number, rank in enumerate(ranks):
        if rank.fault is not None:
            raise ValueError(f"data-parallel rank {number}: {rank.fault}")
    split = part_of_groups_split([rank.prompts for rank in ranks])
    if split > _MOST:
        raise ValueError(
            f"the trainer has dealt {split:.0%} of the groups to several data-parallel ranks, each "
            "of which would compute the prompt again: take a trainer that keeps groups together "
            "(trainer.use_v1=true, or main_ppo_v0, with actor.shuffle=false), or set "
            f"override_mcore_model_config.{KEY}.split_groups=allow"
        )


def _without_empty(microbatches: Microbatches) -> Microbatches:
    """Give each empty microbatch a sample of the fullest.

    The planner leaves one empty only where too few samples differ: equal ones run in one place.
    """
    for empty in (members for members in microbatches if not members):
        fullest = max(microbatches, key=len)
        empty.append(fullest.pop())
    return microbatches
