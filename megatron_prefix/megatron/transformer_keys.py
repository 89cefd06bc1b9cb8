"""The keys of `model.transformer`, checked against Megatron's declarations without importing it.

Importing Megatron takes seconds. Its config classes are dataclasses, and their source says which
fields there are, and of which type.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

_CLASSES = {
    "ModelParallelConfig": "model_parallel_config.py",
    "TransformerConfig": "transformer/transformer_config.py",
}
_LATENT_CLASSES = {"MLATransformerConfig": "transformer/transformer_config.py"}
_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
_SIZES = {
    *_REQUIRED,
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
}
_NOT_NEGATIVE = {"mtp_num_layers", "mtp_loss_scaling_factor"}
_PLAIN = (bool, int, float, str, type(None))

DECIDED_ELSEWHERE = {
    "activation_func": "model.activation",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    "context_parallel_size": "parallel.context_parallel_size",
    "expert_model_parallel_size": "parallel.expert_model_parallel_size",
    "expert_tensor_parallel_size": "parallel.expert_tensor_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "training.dtype",
    "pipeline_dtype": "training.dtype",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "recompute_granularity": "training.recompute",
    "recompute_modules": "training.recompute",
    "calculate_per_token_loss": "objective.aggregation",
    "variable_seq_lengths": "training.token_budget",
    "finalize_model_grads_func": "the trainer",
    "use_cpu_initialization": "training.device",
    "deterministic_mode": "training.deterministic",
}
"""Fields that other sections of the run's config decide."""

_OF_LATENT_DECIDED_ELSEWHERE = {
    "rope_type": "model.position_embedding_type",
    "rotary_base": "model.rotary_base",
    "rotary_percent": "model.rotary_percent",
    **{
        name: f"model.yarn.{name}"
        for name in (
            "rotary_scaling_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        )
    },
}
"""The same of multi-latent attention, which has its own rotary embedding."""


def faults_of_transformer(
    values: Mapping[str, Any], *, decided: Collection[str] = ()
) -> Iterator[str]:
    """What is wrong with the keys and plain values of a `model.transformer` section.

    Args:
        values: of the section.
        decided: required keys that a pattern of layers gives.

    Nothing is found where megatron-core is not installed; importing it says so.
    """
    latent = values.get("multi_latent_attention") is True
    declared = declared_fields(latent=latent)
    if not declared:
        return
    elsewhere = {**DECIDED_ELSEWHERE, **(_OF_LATENT_DECIDED_ELSEWHERE if latent else {})}
    for required in _REQUIRED:
        if required not in values and required not in decided:
            yield f"model.transformer.{required}: required, and missing"
    for key, value in values.items():
        path = f"model.transformer.{key}"
        if key in elsewhere:
            yield f"{path}: {value!r} is decided by {elsewhere[key]}; remove it here"
        elif key not in declared and key in declared_fields(latent=True):
            yield f"{path}: {value!r} needs multi_latent_attention: true; set that, or remove it"
        elif key not in declared:
            close = difflib.get_close_matches(key, declared, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"{path}: Megatron-Core's TransformerConfig has no such field{hint}"
        elif key in _SIZES and type(value) is int and value < 1:
            yield f"{path}: {value} must be at least 1"
        elif key in _NOT_NEGATIVE and type(value) in (int, float) and not value >= 0:
            yield f"{path}: {value} must be at least 0"
        else:
            yield from _faults_of_value(path, value, declared[key])


def _faults_of_value(path: str, value: Any, annotation: Any) -> Iterator[str]:
    """A number, text or flag where Megatron declares another plain type or other choices."""
    members = (
        get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    )
    choices = [c for m in members if get_origin(m) is Literal for c in get_args(m)]
    types = {m for m in members if get_origin(m) is not Literal}
    if not types <= set(_PLAIN) or (choices and value in choices):
        return
    if float in types:
        types.add(int)
    if type(value) in types:
        return
    names = sorted("null" if t is type(None) else t.__name__ for t in types)
    if choices:
        known = ", ".join(map(str, choices))
        null = ", or null" if type(None) in types else ""
        yield f"{path}: {value!r} is none of Megatron-Core's choices: {known}{null}"
    else:
        yield f"{path}: {value!r} is not of type {' or '.join(names)}"


@functools.cache
def declared_fields(*, latent: bool = False) -> dict[str, Any]:
    """The fields of the installed release's `TransformerConfig`, with their types.

    With `latent`, those of its `MLATransformerConfig`.

    Types that need an import to be known are `Any`. Empty where megatron-core is not installed.
    """
    root = _megatron_core()
    if root is None:
        return {}
    fields: dict[str, Any] = {}
    for name, file in {**_CLASSES, **(_LATENT_CLASSES if latent else {})}.items():
        for node in ast.parse((root / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign):
                        assert isinstance(statement.target, ast.Name)
                        fields[statement.target.id] = _type_of(statement.annotation)
    if latent:
        # Declared as int; None is a model without compressed queries.
        fields["q_lora_rank"] = int | None
    return fields


def _megatron_core() -> Path | None:
    """The folder of megatron.core, found without importing it: `megatron` is a namespace."""
    found = importlib.util.find_spec("megatron")
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / "core" / _CLASSES["ModelParallelConfig"]).is_file():
            return Path(place) / "core"
    return None


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return Any


def _type_of(annotation: ast.expr) -> Any:
    known = {name: getattr(typing, name) for name in ("Optional", "Union", "Literal", "List")}
    plain = {cls.__name__: cls for cls in (bool, int, float, str, list, tuple)}
    try:
        return eval(
            compile(ast.Expression(annotation), "<annotation>", "eval"),
            {"__builtins__": {}},
            _Names(**known, **plain),
        )
    except (TypeError, AttributeError):  # a subscript or attribute of a name that is not known
        return Any
