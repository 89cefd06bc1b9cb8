"""The forward of a GPTModel that shares prefixes: from a packed row to what all its rows get.

Legend: T rows of the framework, N rows that run, V/tp columns of logits on this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prefix.attention.row_attention import AttentionSetup, attention_dtype, head_dim
from megatron_prefix.attention.self_check import check_kernel
from megatron_prefix.device_copy import copy_to_device
from megatron_prefix.integrations.counting import TokenCounter
from megatron_prefix.integrations.expansion import Expansion, expand
from megatron_prefix.integrations.packed_row import PackedRow
from megatron_prefix.integrations.router_losses import router_loss_scale
from megatron_prefix.integrations.scored_rows import ScoredRows
from megatron_prefix.integrations.shared_row import SharedRow
from megatron_prefix.layers.packed_seq_params import PrefixPackedSeqParams
from megatron_prefix.layout import ModelShape
from megatron_prefix.model.head import LogProbHead

POSITIONAL = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "decoder_input",
    "labels",
    "inference_context",
    "packed_seq_params",
    "extra_block_kwargs",
    "runtime_gather_output",
)
"""Arguments of GPTModel.forward that may be given by position, in every known release."""

_TAKEN = {
    "input_ids",
    "position_ids",
    "attention_mask",
    "labels",
    "packed_seq_params",
    "runtime_gather_output",
    # What multi-token prediction and the statistics of experts read, which are refused.
    "loss_mask",
    "padding_mask",
}

_READS_POSITIONS = "learned_absolute"
"""The kind of position embedding for which GPTModel reads `position_ids`."""


@dataclass(kw_only=True)
class Sharing:
    """What a chunk shares prefixes by."""

    config: TransformerConfig
    shape: ModelShape
    kernel: str | None
    pad_to_multiple: int
    counter: TokenCounter = field(default_factory=TokenCounter)
    setup: AttentionSetup | None = None

    def setup_on(self, device: torch.device) -> AttentionSetup:
        """The attention of all rows, made and checked with the first one."""
        if self.setup is None:
            config = self.config
            setup = AttentionSetup.of(
                config, device, kernel=self.kernel, deterministic=config.deterministic_mode
            )
            ranks = config.tensor_model_parallel_size
            check_kernel(
                setup.kernel,
                device=device,
                dtype=attention_dtype(config),
                num_heads=config.num_attention_heads // ranks,
                num_key_heads=max(1, config.num_query_groups // ranks),
                head_dim=head_dim(config),
                deterministic=setup.deterministic,
                windows=setup.window is not None,
            )
            self.setup = setup
        return self.setup


class SharesPrefixes:
    """What a GPTModel that shares prefixes does otherwise, before its own class."""

    prefix_sharing: Sharing

    def forward(
        self,
        *args: Any,
        scored_rows: ScoredRows | None = None,
        token_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See Megatron's `GPTModel.forward`, and `log_probs_of_rows` for `scored_rows`.

        `token_keys` [1, T] say of a packed row's tokens what their ids leave open: tokens are
        shared where ids and keys agree.
        """
        given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
        if not _is_packed_row(given):
            if scored_rows is not None:
                raise ValueError(
                    "log_probs_of_rows needs packed_seq_params with qkv_format='thd'; score other "
                    "batches by the model's logits"
                )
            return super().forward(*args, **kwargs)
        self._refuse_arguments(given)
        row = self._read(given, token_keys)
        if scored_rows is not None:
            scored_rows.refuse_rows_outside(row.num_tokens)
        sharing = self.prefix_sharing
        shared = SharedRow.of(row, sharing.shape, pad_to_multiple=sharing.pad_to_multiple)
        self._count(row, shared)
        if shared is None:
            if scored_rows is None:
                return super().forward(*args, **kwargs)
            return self._scores(functools.partial(super().forward, **given), scored_rows)
        needed = None if scored_rows is None else np.unique(shared.rows[scored_rows.rows])
        params = PrefixPackedSeqParams.from_layout(
            shared.layout,
            sharing.setup_on(given["input_ids"].device),
            needed=needed,
            multiple=sharing.pad_to_multiple,
            router_losses=router_loss_scale(row, sharing.config),
        )
        run = functools.partial(
            super().forward,
            **given
            | {
                "input_ids": params.own(shared.layout.input_ids)[None],
                "position_ids": params.position_ids[None],
                "attention_mask": None,
                "packed_seq_params": params,
                "labels": None,
            }
            | {name: None for name in ("loss_mask", "padding_mask") if name in given},
        )
        if scored_rows is not None:
            return self._scores(run, scored_rows, shared.rows, params.output_rows)
        output = run()
        if not self.post_process:
            return output
        if row.labels is not None:
            return self._losses(output[0], row.labels, shared)
        expansion = Expansion.of(shared.rows, shared.layout.num_tokens, ignored=shared.is_padding)
        return expand(output[0], expansion.to(output.device))[None]

    def build_schedule_plan(self, *args: Any, **kwargs: Any) -> Any:
        """See Megatron's GPTModel; not for packed rows, which would not pass `forward`."""
        if _is_packed_row(dict(zip(POSITIONAL, args, strict=False)) | kwargs):
            raise ValueError(
                "a schedule plan (overlap_moe_expert_parallel_comm) runs layers past the model's "
                "forward, in which prefixes are shared. Set overlap_moe_expert_parallel_comm to "
                "False"
            )
        return super().build_schedule_plan(*args, **kwargs)

    def _refuse_arguments(self, given: Mapping[str, Any]) -> None:
        if given.get("input_ids") is None:
            stage = parallel_state.get_pipeline_model_parallel_rank()
            raise ValueError(
                f"input_ids=None on pipeline stage {stage}: every stage finds the shared prefixes "
                "in the row's tokens. Pass input_ids on every stage"
            )
        if given.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask beside packed_seq_params: what a packed row's tokens see follows "
                "from cu_seqlens. Pass attention_mask=None"
            )
        for name, value in given.items():
            if name not in _TAKEN and value is not None:
                raise ValueError(
                    f"{name} is given with a packed row: tokens that are equal would be taken for "
                    f"the same, whatever {name} says of them. Leave it out, or run this model "
                    "without share_prefixes"
                )
        params = given["packed_seq_params"]
        if getattr(params, "local_cp_size", None) not in (None, 1):
            raise ValueError(
                f"packed_seq_params.local_cp_size={params.local_cp_size}: a row that is cut for "
                "context parallelism cannot share prefixes. Set 1"
            )

    def _read(self, given: Mapping[str, Any], keys: Tensor | None) -> PackedRow:
        """The framework's row, with labels if there are any."""
        reads_positions = self.position_embedding_type == _READS_POSITIONS
        row = PackedRow.read(
            given["input_ids"],
            given["packed_seq_params"],
            labels=given.get("labels"),
            position_ids=given.get("position_ids") if reads_positions else None,
            keys=keys,
        )
        if row.position_ids is not None and not row.has_ordinary_positions():
            raise ValueError(
                f"position_ids with position_embedding_type={_READS_POSITIONS!r}: prefixes can be "
                "shared where every sequence is counted from 0. Set position_ids so"
            )
        return row

    def _count(self, row: PackedRow, shared: SharedRow | None) -> None:
        counter = self.prefix_sharing.counter
        counter.add(
            given=int(row.lengths.sum()),
            computed=row.num_tokens if shared is None else shared.layout.num_tokens,
            shared=shared is not None,
        )
        if self.pre_process and (not dist.is_initialized() or dist.get_rank() == 0):
            counter.log_now_and_then()

    def _scores(
        self,
        run: Callable[..., Tensor],
        scored: ScoredRows,
        rows: np.ndarray | None = None,
        output_rows: np.ndarray | None = None,
    ) -> Tensor:
        """[1, n, 1 or 2] of the scored rows, on the last stage.

        Args:
            run: the model's forward on the row that runs.
            scored: of the framework's row.
            rows: [T] which of the N rows is each of the framework's; None: the same.
            output_rows: ascending, those of the N rows that the model puts out.
        """
        if not self.post_process:
            return run()
        head = LogProbHead.of(
            self, vocab_size=self.output_layer.output_size, chunk_tokens=scored.chunk_tokens
        )
        positions = scored.rows
        if rows is not None:
            positions = np.searchsorted(output_rows, rows[positions])
        return head.log_probs(
            run,
            copy_to_device([positions], scored.labels.device)[0],
            scored.labels,
            temperature=scored.temperature,
            with_entropy=scored.with_entropy,
            train_entropy=scored.train_entropy,
        )

    def _losses(self, logits: Tensor, labels: np.ndarray, shared: SharedRow) -> Tensor:
        """[1, T] Megatron's own loss of each label, computed once for equal rows and labels.

        Args:
            logits: [N, V/tp]
            labels: [T] of the framework, whatever is no token included.
            shared: the row.
        """
        real = ~shared.is_padding
        lowest = labels.min()
        span = labels.max() - lowest + 1
        pairs, of_row = np.unique(
            shared.rows[real] * span + labels[real] - lowest, return_inverse=True
        )
        pair_rows, pair_labels = np.divmod(pairs, span)
        pair_of_row = np.zeros(len(labels), dtype=np.int64)
        pair_of_row[real] = of_row
        rows_of_pairs = Expansion.of(pair_rows, len(logits))
        pairs_of_rows = Expansion.of(pair_of_row, len(pairs), ignored=shared.is_padding)
        of_pairs = expand(logits, rows_of_pairs.to(logits.device))
        labels_of_pairs = copy_to_device([pair_labels + lowest], logits.device)[0]
        losses = self.compute_language_model_loss(labels_of_pairs[None], of_pairs[:, None])
        return expand(losses[0], pairs_of_rows.to(logits.device))[None]


def _is_packed_row(given: Mapping[str, Any]) -> bool:
    params = given.get("packed_seq_params")
    return (
        isinstance(params, PackedSeqParams)
        and not isinstance(params, PrefixPackedSeqParams)
        and params.qkv_format == "thd"
        and given.get("inference_context") is None
        and given.get("inference_params") is None
    )
