"""What a model's files must hold, compared with what its configuration asks for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_folder import DTYPES, HFFolder
from megatron_prefix.conversion.mapping import (
    Parameter,
    Shape,
    dtype_name,
    is_no_weight,
)


def check_source(
    folder: HFFolder,
    architecture: Architecture,
    parameters: list[Parameter],
    dtype: torch.dtype | None,
    aside: Collection[str] = (),
) -> None:
    """Compare a folder's tensors with what its config.json asks for.

    Args:
        aside: tensors that no parameter is made of, and that are kept.

    Raises:
        ConversionError: a missing or unknown tensor, or one of another shape or type, naming it.
    """
    wanted = {name: shape for parameter in parameters for name, shape in parameter.sources}
    path, found = folder.path, folder.tensors
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ConversionError(
            f"{path}: no tensor {_listed(missing)}, which config.json asks for; "
            f"{_why_missing(missing[0], list(found))}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            why = "weights and config.json are of different models"
            if _has_more_rows(name, found[name].shape, shape):
                why = (
                    "the vocabulary seems to be padded; set vocab_size to "
                    f"{found[name].shape[0]} in config.json"
                )
            raise ConversionError(
                f"{path}: {name} has shape {list(found[name].shape)}, but config.json asks for "
                f"{list(shape)}; {why}"
            )
        if found[name].dtype not in DTYPES:
            raise ConversionError(
                f"{path}: {name} is of type {found[name].dtype}; only {', '.join(DTYPES)} are "
                "weights that can be trained, so convert the unquantized model"
            )
    known = {*wanted, *aside, *(copy for parameter in parameters for copy in parameter.copies)}
    extra = [name for name in found if name not in known and not is_no_weight(name)]
    if architecture.tied_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        tied = folder.read("lm_head.weight")
        if not torch.equal(tied, folder.read("model.embed_tokens.weight")):
            raise ConversionError(
                f"{path}: config.json ties lm_head.weight to model.embed_tokens.weight "
                "(tie_word_embeddings: true), but the two differ; set it to false there if the "
                "output layer is its own"
            )
    if extra:
        raise ConversionError(
            f"{path}: {_listed(extra)} would be lost: nothing in config.json asks for it, and "
            f"the {architecture.family} family has no such tensor"
        )
    if dtype is not None:
        return
    for parameter in parameters:
        kinds: dict[str, str] = {}
        for name, _ in parameter.sources:
            kinds.setdefault(found[name].dtype, name)
        if len(kinds) > 1:
            named = " and ".join(f"{name} ({kind})" for kind, name in kinds.items())
            raise ConversionError(
                f"{path}: {named} become one parameter, but differ in type; add --dtype to store "
                "all weights in one type"
            )


def parameter_dtype(
    parameter: Parameter, stored: torch.dtype, asked: torch.dtype | None
) -> torch.dtype:
    """The type that a parameter gets: its own, or what is asked for all weights."""
    if parameter.is_less_1:
        return torch.promote_types(stored, torch.float32)
    return stored if asked is None or parameter.is_bias_of_router else asked


def _why_missing(name: str, found: list[str]) -> str:
    """What the tensors that are there say about one that is not."""
    fused = [other for other in found if other.endswith("experts.gate_up_proj")]
    prefixed = [other for other in found if other.endswith(name.removeprefix("model"))]
    if fused and ".experts." in name:
        return (
            f"{fused[0]} holds the experts of a layer as one tensor, as transformers 5 keeps them "
            "in memory; save the model with save_pretrained, which writes one for each"
        )
    if any(".lora_" in other for other in found):
        return "there are LoRA weights beside; merge the adapter into the model first"
    if prefixed:
        return (
            f"but there is {prefixed[0]}: the model is a part of another one, such as one of "
            "images; save it by itself (model.language_model.save_pretrained)"
        )
    return "the weights are incomplete, or config.json is another model's"


def _has_more_rows(name: str, found: Shape, wanted: Shape) -> bool:
    is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    return is_vocabulary and found[1:] == wanted[1:] and found[0] > wanted[0]


def stored_dtypes(
    folder: HFFolder, parameters: list[Parameter], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The type of each key; layers that are stored as one tensor must agree."""
    found: dict[str, tuple[torch.dtype, str]] = {}
    for parameter in parameters:
        name = parameter.sources[0][0]
        own = parameter_dtype(parameter, DTYPES[folder.tensors[name].dtype], dtype)
        for key in (parameter.places[0][0], *parameter.also):
            first, first_name = found.setdefault(key, (own, name))
            if first != own:
                raise ConversionError(
                    f"{folder.path}: {first_name} ({dtype_name(first)}) and {name} "
                    f"({dtype_name(own)}) differ in type, but all layers are stored as one "
                    "tensor; add --dtype to store all weights in one type"
                )
    return {key: kind for key, (kind, _) in found.items()}


def check_stored(
    shapes: Mapping[str, Shape],
    architecture: Architecture,
    parameters: list[Parameter],
    *,
    of: str,
) -> list[tuple[str, Shape]]:
    """Key and leading indices of each parameter, among tensors stored as Megatron does.

    Args:
        shapes: of all tensors, by key.
        architecture: what they should be.
        parameters: of the architecture.
        of: what holds the tensors, for messages.

    Raises:
        ConversionError: a missing or unknown tensor, or one of another shape, naming it.
    """
    shapes = _joined(shapes, parameters)
    family = f"a {architecture.family} model of its configuration"
    places, used = [], set()
    for parameter in parameters:
        here = [place for place in parameter.places if place[0] in shapes]
        if not here:
            raise ConversionError(
                f"{of}: no tensor {parameter.places[0][0]}, which {family} has; it is another "
                "model, or incomplete"
            )
        key, index = here[0]
        used.update(key for key, _ in here)
        # One whose layers are stacked, or not: its own number of leading axes says which.
        leading = parameter.leading[len(parameter.leading) - len(index) :]
        wanted, found = (*leading, *parameter.shape), shapes[key]
        rows = len(leading)
        padded = parameter.name.endswith(("word_embeddings.weight", "output_layer.weight"))
        fits = found == wanted or (
            padded and found[1:] == wanted[1:] and found[rows] > wanted[rows]
        )
        if not fits:
            raise ConversionError(
                f"{of}: {key} has shape {list(found)}, {family} needs {list(wanted)}; it is "
                "another model"
            )
        places.append((key, index))
    extra = [key for key in shapes if key not in used]
    if architecture.tied_embeddings and "output_layer.weight" in extra:
        raise ConversionError(
            f"{of}: holds output_layer.weight, but the model's output is tied to its "
            "embedding (share_embeddings_and_output_weights: true)"
        )
    if extra:
        raise ConversionError(
            f"{of}: {_listed(extra)} would be lost: the {architecture.family} family has "
            "nothing of the kind"
        )
    return places


def _joined(shapes: Mapping[str, Shape], parameters: list[Parameter]) -> dict[str, Shape]:
    """Parameters that are stored in parts as if they were whole."""
    shapes = dict(shapes)
    for parameter in parameters:
        for key, _ in parameter.places:
            parts = [key + end for end, _ in parameter.stored if end]
            if parts and all(part in shapes for part in parts):
                found = [shapes.pop(part) for part in parts]
                shapes[key] = (sum(shape[0] for shape in found), *found[0][1:])
    return shapes


def _listed(names: list[str]) -> str:
    names = sorted(names, key=_natural)
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
