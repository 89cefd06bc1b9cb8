"""What a user of verl can say about shared prefixes, and what of verl's own options is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

KEY = "megatron_prefix"
"""In verl's `override_mcore_model_config`, a dictionary that verl leaves to its user."""


@dataclass(frozen=True, kw_only=True)
class PrefixOptions:
    """`...megatron.override_mcore_model_config.megatron_prefix` of a verl run.

    `false` in its place is the same as `{enabled: false}`.
    """

    enabled: bool = True
    """False: verl's own engine and trainer, unchanged."""
    kernel: str | None = None
    """Name of the attention kernel; null: the best for the device."""
    log_prob_chunk_tokens: int = 1024
    """Rows of logits that are in memory at a time."""
    split_groups: Literal["refuse", "allow"] = "refuse"
    """What becomes of a run whose trainer has dealt most groups to several data-parallel ranks,
    each of which computes the prompt again: an error before the first step, or the run as it is."""

    @classmethod
    def of(cls, override_mcore_model_config: Any) -> PrefixOptions:
        """Read the options.

        Args:
            override_mcore_model_config: verl's; a mapping, or None.

        Raises:
            ValueError: an unknown option or a value that it cannot have.
        """
        value = (override_mcore_model_config or {}).get(KEY, {})
        if value is None or isinstance(value, bool):
            value = {"enabled": value is not False}
        if not isinstance(value, Mapping):
            raise ValueError(f"{KEY}: {value!r} must be a mapping of options, or false")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ValueError(f"{KEY}.{name}: no such option; there are {', '.join(known)}")
        options = cls(**value)
        if options.split_groups not in ("refuse", "allow"):
            raise ValueError(
                f"{KEY}.split_groups: {options.split_groups!r} must be 'refuse' or 'allow'"
            )
        if options.log_prob_chunk_tokens < 1:
            raise ValueError(
                f"{KEY}.log_prob_chunk_tokens: {options.log_prob_chunk_tokens} must be at least 1"
            )
        return options


def refuse_verl_options(model_config: Any, engine_config: Any) -> None:
    """Refuse what cannot run with shared prefixes, before anything is built.

    Args:
        model_config: verl's `HFModelConfig`.
        engine_config: verl's `McoreEngineConfig`.

    Raises:
        ValueError: one line that names each option, its value, and what to set instead.
    """
    faults = list(_faults(model_config, engine_config))
    if faults:
        raise ValueError(
            f"not with shared prefixes: {'; '.join(faults)}. Or set "
            f"override_mcore_model_config.{KEY}=false, which runs verl's own engine"
        )


def _faults(model_config: Any, engine_config: Any) -> Iterator[str]:
    if model_config.use_fused_kernels or engine_config.use_fused_kernels:
        yield (
            "model.use_fused_kernels=True (it computes log-probabilities of repeated rows; ours "
            "are made in chunks too): set it to False"
        )
    if model_config.mtp.enable:
        yield "model.mtp.enable=True (multi-token prediction): set it to False"
    mode = engine_config.router_replay.mode
    if mode != "disabled":
        yield f"router_replay.mode={mode!r} (routes are by repeated row): set it to 'disabled'"
    if hasattr(model_config.hf_config, "vision_config"):
        yield (
            f"the model {model_config.hf_config.model_type} has a vision_config (images stand in "
            "for tokens that are the same): take a language model"
        )
    if not engine_config.use_remove_padding:
        yield "model.use_remove_padding=False (padded rows, bshd): set it to True"
    for name, instead in (
        ("dynamic_context_parallel", "context_parallel_size shares prompts over ranks"),
        ("pad_to_length", "packed rows have the length that they need"),
        ("use_megatron_fsdp", "use_distributed_optimizer shards the optimizer"),
    ):
        if getattr(engine_config, name):
            yield f"megatron.{name}=True ({instead}): set it to False"
    if engine_config.qat.enable:
        yield "megatron.qat.enable=True (its layers have a spec of their own): set it to False"


_REFUSED_IN_BATCHES = {
    "distillation_use_topk": "top-k distillation",
    "distillation_only": "distillation",
    "calculate_sum_pi_squared": "actor.calculate_sum_pi_squared=True",
    "enable_routing_replay": "router replay",
}


def refuse_in_batch(asked: Mapping[str, bool]) -> None:
    """Refuse what a batch asks for and what needs the logits of repeated rows.

    Args:
        asked: verl's non-tensor data of a batch, by name.

    Raises:
        ValueError: naming it.
    """
    for name, what in _REFUSED_IN_BATCHES.items():
        if asked.get(name):
            raise ValueError(
                f"not with shared prefixes: {what} (the batch has {name}=True). Turn it off, or "
                f"set override_mcore_model_config.{KEY}=false, which runs verl's own engine"
            )


REFUSED_IN_BATCHES = tuple(_REFUSED_IN_BATCHES)
