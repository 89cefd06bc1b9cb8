"""Groups kept together when verl's trainer deals a batch to data-parallel ranks.

Both trainers of verl order a batch by length before they cut it into equal parts, one for each
rank, and each rank cuts its part into mini-batches. We let them do so, and then order the batch
again: groups whole, and ranks even in packed tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_prefix.integrations.verl.options import PrefixOptions
from megatron_prefix.layout.dealing import order_by_groups


def keep_groups_together_v1(trainer: type) -> None:
    """Let verl's v1 trainer, `PPOTrainer`, and its subclasses keep groups together."""
    own = trainer._balance_batch

    @functools.wraps(own)
    def balance(self: Any, batch: Any, metrics: Any, *args: Any, **kwargs: Any) -> Any:
        batch = own(self, batch, metrics, *args, **kwargs)
        if not _applies(self.config):
            return batch
        # The same parts as verl's, which has asked the workers for them.
        num_ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        # A key is <group>_<session>_<trajectory>.
        groups = [key.split("_")[0] for key in batch.keys]
        batch.reorder(
            order_by_groups(
                groups,
                [tag["prompt_len"] for tag in batch.tags],
                [tag["seq_len"] for tag in batch.tags],
                num_ranks=num_ranks,
            )
        )
        metrics["megatron_prefix/groups_split"] = _groups_split(batch.keys, num_ranks)
        return batch

    trainer._balance_batch = balance


def keep_groups_together_v0(trainer: type) -> None:
    """Let verl's v0 trainer, `RayPPOTrainer`, and its subclasses keep groups together."""
    own = trainer._balance_batch

    @functools.wraps(own)
    def balance(
        self: Any, batch: Any, metrics: Any, *args: Any, keep_minibatch: bool = False, **kwargs: Any
    ) -> Any:
        own(self, batch, metrics, *args, keep_minibatch=keep_minibatch, **kwargs)
        # Mini-batches of their own order are left to verl.
        if keep_minibatch or "uid" not in batch.non_tensor_batch or not _applies(self.config):
            return
        mask = batch.batch["attention_mask"]
        prompt_width = mask.shape[1] - batch.batch["responses"].shape[1]
        batch.reorder(
            torch.tensor(
                order_by_groups(
                    batch.non_tensor_batch["uid"].tolist(),
                    mask[:, :prompt_width].sum(-1).tolist(),
                    mask.sum(-1).tolist(),
                    num_ranks=self._get_dp_size(self.actor_rollout_wg, "actor"),
                )
            )
        )

    trainer._balance_batch = balance


def _applies(config: Any) -> bool:
    """Whether the actor is trained by our engine."""
    actor = config.actor_rollout_ref.actor
    if actor.strategy != "megatron":
        return False
    return PrefixOptions.of(actor.megatron.get("override_mcore_model_config")).enabled


def _groups_split(keys: Sequence[str], num_ranks: int) -> int:
    """Groups with samples on several ranks."""
    names, group = np.unique([key.split("_")[0] for key in keys], return_inverse=True)
    rank = np.arange(len(keys)) // (len(keys) // num_ranks)
    pairs = np.unique(np.stack([group, rank]), axis=1)
    return int((np.bincount(pairs[0], minlength=len(names)) > 1).sum())
