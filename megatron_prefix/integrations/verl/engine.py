"""verl's Megatron engine, with the prompt of each group computed once.

What a batch is, how its loss and metrics are made, optimizer, checkpoints and weights for the
rollout are verl's own. Ours are the layer spec, the microbatches, and the way from tokens to
log-probabilities.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from verl.utils import tensordict_utils
from verl.utils.device import get_device_id
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.megatron import transformer_impl
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from megatron_prefix.attention.row_attention import AttentionSetup
from megatron_prefix.distributed.agreement import check_equal_across_ranks
from megatron_prefix.integrations.verl.microbatches import Microbatches, MicrobatchPlanner
from megatron_prefix.integrations.verl.options import (
    REFUSED_IN_BATCHES,
    PrefixOptions,
    refuse_in_batch,
    refuse_verl_options,
)
from megatron_prefix.integrations.verl.rows import DeviceRow, PlannedRow, nested_like, plan_row
from megatron_prefix.integrations.verl.samples import Samples, temperature_of
from megatron_prefix.integrations.verl.spec import (
    refuse_other_layers,
    share_prefixes_in_mbridge,
    share_prefixes_in_provider,
)
from megatron_prefix.layout import ModelShape
from megatron_prefix.model.build import model_shape
from megatron_prefix.model.head import LogProbHead

_ROW = "megatron_prefix_row"
"""In a microbatch's data: which of the pass's rows it is."""

_COMPUTED_PART = "megatron_prefix/computed_part"
"""Metric of a training pass: tokens computed, as a part of the tokens handed over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    """What is the same in every pass."""

    setup: AttentionSetup
    shape: ModelShape
    head: LogProbHead | None
    """On the last pipeline stage."""
    pad_to_multiple: int
    context_parallel_group: dist.ProcessGroup | None


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One `forward_backward_batch`."""

    microbatches: Microbatches = field(default_factory=list)
    rows: list[PlannedRow] = field(default_factory=list)
    on_device: dict[int, DeviceRow] = field(default_factory=dict)
    """By row; chunks of an interleaved pipeline share them."""
    temperature: float = 1.0
    handed_over: int = 0
    """Tokens of all samples."""

    @property
    def computed(self) -> int:
        """Tokens of all packed rows, padding included."""
        return sum(row.num_tokens for row in self.rows)


class PrefixMegatronEngine(MegatronEngineWithLMHead):
    """verl's `MegatronEngineWithLMHead` over packed rows with shared prompts."""

    def __init__(
        self,
        model_config: Any,
        engine_config: Any,
        optimizer_config: Any,
        checkpoint_config: Any,
    ) -> None:
        """See verl's; it is called by these names.

        Raises:
            ValueError: an option of verl or of `megatron_prefix` that cannot be.
        """
        self.prefix_options = PrefixOptions.of(engine_config.override_mcore_model_config)
        if self.prefix_options.enabled:
            refuse_verl_options(model_config, engine_config)
        self._prefix_model: _Model | None = None
        self._pass = _Pass()
        self._reported: set[bool] = set()
        """Kinds of passes, by whether they train, that were reported."""
        super().__init__(
            model_config=model_config,
            engine_config=engine_config,
            optimizer_config=optimizer_config,
            checkpoint_config=checkpoint_config,
        )

    def _build_tf_config(self) -> None:
        super()._build_tf_config()
        if not self.prefix_options.enabled:
            return
        if self.provider is not None:
            share_prefixes_in_provider(self.provider)
        else:
            share_prefixes_in_mbridge(self.bridge)

    def initialize(self) -> None:
        """Build the model; see verl's.

        Raises:
            ValueError: an option of Megatron that cannot be combined with shared prefixes.
        """
        super().initialize()
        if self.prefix_options.enabled:
            self._prefix_model = self._describe_model()

    def _describe_model(self) -> _Model:
        config = self.tf_config
        for chunk in self.module:
            refuse_other_layers(chunk)
        last = unwrap_model(self.module[-1])
        head = None
        if last.post_process:
            if not isinstance(last.output_layer, ColumnParallelLinear):
                raise ValueError(
                    f"the output layer is a {type(last.output_layer).__name__}, not with shared "
                    "prefixes: leave lm_head (output_layer) out of the layers that are adapted"
                )
            # Rows of the weight that are padding take part in the softmax, as in verl's own engine.
            head = LogProbHead.of(
                last,
                vocab_size=last.output_layer.output_size,
                chunk_tokens=self.prefix_options.log_prob_chunk_tokens,
            )
        group = None
        if config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
        shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        device = get_device_id()
        return _Model(
            setup=AttentionSetup.of(
                config,
                device if isinstance(device, torch.device) else torch.device("cuda", device),
                kernel=self.prefix_options.kernel,
                deterministic=self.engine_config.full_determinism,
                context_parallel_group=group,
            ),
            shape=model_shape(self.model_config.hf_config, config),
            head=head,
            pad_to_multiple=shards * config.context_parallel_size,
            context_parallel_group=group,
        )

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> Any:
        """Run a batch; see verl's.

        Raises:
            ValueError: the batch asks for what cannot be, or cannot be planned; on every rank.
        """
        if self._prefix_model is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        asked = {
            name: tensordict_utils.get_non_tensor_data(data, key=name, default=False)
            for name in REFUSED_IN_BATCHES
        }
        refuse_in_batch(asked)
        self._pass = _Pass(temperature=temperature_of(data))
        try:
            with _microbatches_made_by(self._prepare_micro_batches):
                output = super().forward_backward_batch(data, loss_function, forward_only)
            return self._finished(output, data, forward_only)
        finally:
            self._pass = _Pass()

    def _prepare_micro_batches(
        self, data: Any, num_batches_divided_by: int | None = None, **_: Any
    ) -> tuple[list[Any], Microbatches]:
        """Ours in the place of verl's function of this name, which is called by these names."""
        model = self._prefix_model
        assert model is not None
        samples = Samples.of_batch(data, model.shape)
        planner = MicrobatchPlanner(
            group=self.get_data_parallel_group(),
            pad_to_multiple=model.pad_to_multiple,
            microbatch_multiple=num_batches_divided_by or 1,
        )
        refuse_split = not self._reported and self.prefix_options.split_groups == "refuse"
        budget: int | None = None
        if _is_dynamic(data):
            # As verl counts it: what each context-parallel rank may hold.
            budget = data["max_token_len_per_gpu"] * model.setup.num_ranks
            microbatches = planner.by_tokens(
                samples, token_budget=budget, refuse_split_groups=refuse_split
            )
        else:
            microbatches = planner.by_samples(
                samples, size=data["micro_batch_size_per_gpu"], refuse_split_groups=refuse_split
            )
        if model.context_parallel_group is not None:
            check_equal_across_ranks(
                "the plan of the microbatches",
                repr(microbatches),
                group=model.context_parallel_group,
            )
        self._pass.microbatches = microbatches
        self._pass.handed_over = samples.num_tokens
        self._pass.rows = [
            plan_row(
                samples,
                chosen,
                model.setup,
                pad_to_multiple=model.pad_to_multiple,
                token_budget=budget and budget - budget % model.pad_to_multiple,
            )
            for chosen in microbatches
        ]
        batches = []
        for index, chosen in enumerate(microbatches):
            batch = tensordict_utils.index_select_tensor_dict(data, chosen)
            batches.append(tensordict_utils.assign_non_tensor(batch, **{_ROW: index}))
        return batches, microbatches

    def forward_step(
        self,
        batch_iter: Iterator[Any],
        model: Any,
        logits_processor_func: Callable[..., Any] | None,
        postprocess_micro_batch_func: Callable[..., Any],
    ) -> tuple[Any, Callable[..., Any]]:
        """Run the next microbatch through a chunk of the model; see verl's."""
        ours = self._prefix_model
        if ours is None:
            return super().forward_step(
                batch_iter, model, logits_processor_func, postprocess_micro_batch_func
            )
        batch = next(batch_iter).to(get_device_id())
        row = self._row_on_device(
            tensordict_utils.get_non_tensor_data(batch, key=_ROW, default=None), ours
        )
        postprocess = functools.partial(postprocess_micro_batch_func, data=batch)
        if ours.head is None or not unwrap_model(model).post_process:
            return row.hidden(model), postprocess
        found = row.log_probs(
            model,
            ours.head,
            temperature=self._pass.temperature,
            with_entropy=tensordict_utils.get_non_tensor_data(
                batch, key="calculate_entropy", default=False
            ),
            context_parallel_group=ours.context_parallel_group,
        )
        names = ("log_probs", "entropy")[: len(found)]
        return {
            name: nested_like(values, batch["input_ids"])
            for name, values in zip(names, found, strict=True)
        }, postprocess

    def _row_on_device(self, index: int, ours: _Model) -> DeviceRow:
        on_device = self._pass.on_device
        if index not in on_device:
            on_device[index] = DeviceRow.of(self._pass.rows[index], ours.setup)
        return on_device[index]

    def _finished(self, output: Any, data: Any, forward_only: bool) -> Any:
        """verl's output of the pass, in verl's order, with our metric; and a line for the first."""
        computed, handed_over = self._pass.computed, self._pass.handed_over
        if forward_only not in self._reported:
            self._reported.add(forward_only)
            if dist.get_rank() == 0:
                print(
                    f"megatron_prefix: {'log-probabilities' if forward_only else 'training'}: "
                    f"{computed:,} tokens computed of {handed_over:,} handed over, in "
                    f"{len(self._pass.rows)} microbatches (first pass, data-parallel rank 0)",
                    flush=True,
                )
        if not output:
            return output
        if not forward_only:
            output["metrics"][_COMPUTED_PART] = [computed / handed_over]
        if not _is_dynamic(data):
            # verl restores the order of dynamic microbatches only.
            output["model_output"] = {
                name: _in_order(nested, self._pass.microbatches)
                for name, nested in output["model_output"].items()
            }
        return output


def _is_dynamic(data: Any) -> bool:
    return bool(tensordict_utils.get_non_tensor_data(data, key="use_dynamic_bsz", default=True))


def _in_order(nested: torch.Tensor, microbatches: Sequence[Sequence[int]]) -> torch.Tensor:
    """The samples of microbatches, in the order that the batch has them."""
    ran = [sample for chosen in microbatches for sample in chosen]
    parts = dict(zip(ran, nested.unbind(), strict=True))
    return torch.nested.as_nested_tensor([parts[i] for i in range(len(ran))], layout=torch.jagged)


@contextlib.contextmanager
def _microbatches_made_by(prepare: Callable[..., Any]) -> Iterator[None]:
    """Within the block verl's engine asks `prepare` for its microbatches."""
    own = transformer_impl.prepare_micro_batches
    transformer_impl.prepare_micro_batches = prepare
    try:
        yield
    finally:
        transformer_impl.prepare_micro_batches = own
