"""How the groups of an optimizer step become packed rows: the one record of its options.

The trainer, the proof, the benchmark and the planner all pack by it, so that what is proved,
measured or predicted is what a run does. No option has a default here: those of a run are
`TrainingConfig`'s, see `megatron_prefix.config.packing.packing_of_run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from numpy.typing import NDArray

from megatron_prefix.layout.cost import ModelShape
from megatron_prefix.layout.planner import (
    GroupSlice,
    MicrobatchPlan,
    microbatch_tree,
    plan_microbatches,
)
from megatron_prefix.layout.sharing import share_where_it_pays
from megatron_prefix.layout.tree import PrefixTree
from megatron_prefix.layout.tree_shape import AnyTree, TreeShape

Member = TypeVar("Member")


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How groups become microbatches."""

    token_budget: int
    """Tokens of one packed row at most, padding included."""
    data_parallel_size: int
    model_shape: ModelShape
    """For the balance of work, for what pays, and for the predicted FLOPs."""
    pad_to_multiple: int
    """Context-parallel ranks, times tensor-parallel ones under sequence parallelism."""
    microbatch_multiple: int
    """The pipeline size under interleaving."""
    allow_split: bool
    """See `TrainingConfig.allow_split`, and so on."""
    sharing: Literal["groups", "everything", "none"]
    trim_last_layer: bool
    share_only_where_it_pays: bool
    share_across_microbatches: bool

    @property
    def capacity(self) -> int:
        """Tokens of the longest row: the budget, to a whole multiple."""
        return self.token_budget - self.token_budget % self.pad_to_multiple

    def group(self, tree: AnyTree) -> AnyTree:
        """The tree that a group is planned by."""
        if not self.share_only_where_it_pays:
            return tree
        return share_where_it_pays(tree, self.model_shape)

    def units(
        self, trees: Sequence[AnyTree], members: Sequence[Sequence[Member]]
    ) -> tuple[list[AnyTree], list[list[Member]], list[int]]:
        """What is planned as one: each group, or each of its sequences where nothing is shared.

        Args:
            trees: one for each group.
            members: for each group, whatever belongs to each of its sequences.

        Returns:
            The trees of the units, the members of each, and the group that each comes from.
        """
        if self.sharing != "none":
            owners = list(range(len(trees)))
            return [self.group(tree) for tree in trees], [list(m) for m in members], owners
        owners = [index for index, tree in enumerate(trees) for _ in range(tree.num_sequences)]
        separate = [sequence for tree in trees for sequence in tree.separate()]
        return separate, [[member] for group in members for member in group], owners

    def plan(
        self,
        trees: Sequence[TreeShape],
        *,
        labels: Sequence[NDArray],
        spans: Sequence[NDArray] | None = None,
        names: Sequence[str] | None = None,
    ) -> MicrobatchPlan:
        """The microbatches of these units; see `plan_microbatches`.

        Raises:
            ValueError: a sequence or unit over the token budget, naming it.
        """
        return plan_microbatches(
            trees,
            token_budget=self.token_budget,
            data_parallel_size=self.data_parallel_size,
            cost=self.model_shape,
            allow_split=self.allow_split,
            pad_to_multiple=self.pad_to_multiple,
            microbatch_multiple=self.microbatch_multiple,
            names=names,
            labels=labels,
            spans=spans,
            trim_last_layer=self.trim_last_layer,
            share_across_microbatches=self.share_across_microbatches,
        )

    def microbatch(
        self, trees: Sequence[PrefixTree] | Mapping[int, PrefixTree], slices: Sequence[GroupSlice]
    ) -> PrefixTree:
        """The tree to pack for a microbatch, of at most the planned tokens.

        Args:
            trees: by unit, at least those of the slices.
            slices: of the microbatch.
        """
        if self.sharing == "groups":
            parts = [trees[part.group].subset(part.sequences) for part in slices]
            return PrefixTree.concat(map(self._with_shared_turns, parts)).merge_chains()
        tree = microbatch_tree(trees, slices)
        if self.sharing != "everything":
            return tree
        tree = tree.as_trie()
        if not self.share_only_where_it_pays:
            return tree
        return share_where_it_pays(tree, self.model_shape, token_budget=self.capacity)

    def series_row(self, tree: PrefixTree) -> PrefixTree:
        """The tree to pack for a row of a series, of at most the planned tokens.

        Args:
            tree: of the row's sequences; another row runs its only root, node 0, which stays.
        """
        return self._with_shared_turns(tree).with_root_of(len(tree.tokens[0]))

    def _with_shared_turns(self, tree: PrefixTree) -> PrefixTree:
        """Sequences of a unit that share their turns too, as far as they agree and it pays.

        A prompt that the plan shares stays shared. Of turns it is asked what pays even where
        prompts are always shared, or responses would share their first few words.
        """
        if not _siblings_begin_alike(tree):
            return tree
        found = share_where_it_pays(
            tree.as_trie(),
            self.model_shape,
            always_roots=max(tree.parents) >= 0,  # it is planned with a shared prompt
        )
        return found if found.grouped_tokens < tree.grouped_tokens else tree


def _siblings_begin_alike(tree: PrefixTree) -> bool:
    """Whether two children of a node, or two roots, have the same first token (keys aside)."""
    begins = {
        (parent, int(tokens[0])) for parent, tokens in zip(tree.parents, tree.tokens, strict=True)
    }
    return len(begins) < tree.num_nodes
