"""The two conversions. Both hold one parameter, or one shard of the output, at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.checkpoints.finding import TRACKER, find_checkpoint
from megatron_prefix.checkpoints.initial_weights import MODEL_SECTION, recorded_model
from megatron_prefix.config.loader import dump_yaml
from megatron_prefix.conversion.architecture import (
    Architecture,
    from_model_config,
    to_model_config,
)
from megatron_prefix.conversion.checks import check_source, check_stored, stored_dtypes
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_config import config_values, read_architecture
from megatron_prefix.conversion.hf_folder import (
    HFFolder,
    ShardWriter,
    companions,
    finish_shards,
    read_json,
    write_json,
)
from megatron_prefix.conversion.mapping import (
    Mapping,
    Parameter,
    dtype_name,
    extra_state_keys,
)
from megatron_prefix.conversion.megatron_lm import common_state
from megatron_prefix.conversion.output_folder import output_folder
from megatron_prefix.conversion.torch_dist_files import (
    CheckpointReader,
    Piece,
    write_checkpoint,
)

Progress = Callable[[int], None]
"""Told of so many bytes more."""


def hf_to_megatron(
    source: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Architecture:
    """Write a distributed checkpoint of a Hugging Face model.

        output/latest_checkpointed_iteration.txt    so that Megatron-LM's --load finds it
        output/release/                             the checkpoint
        output/model.yaml                           the `model` section of a run's config

    Args:
        source: folder with config.json and safetensors.
        dtype: of the weights; None keeps the source's.
        max_file_bytes: largest file of the checkpoint.
        force: replace an existing output.

    Raises:
        ConversionError: anything about source or output, naming it; no output is left then.
    """
    folder = HFFolder(source)
    architecture = read_architecture(source)
    mapping = Mapping(architecture)
    parameters = mapping.parameters()
    check_source(folder, architecture, parameters, dtype)
    stored = stored_dtypes(folder, parameters, dtype)

    def piece(parameter: Parameter, key: str, index: tuple[int, ...], counts: bool) -> Piece:
        def make() -> Tensor:
            tensors = [folder.read(name) for name, _ in parameter.sources]
            if dtype is not None:
                tensors = [tensor.to(dtype) for tensor in tensors]
            whole = mapping.to_megatron(parameter, tensors)
            if counts:
                progress(whole.numel() * whole.itemsize)
            return whole

        return Piece(
            key=key,
            index=index,
            leading=parameter.leading,
            shape=parameter.shape,
            dtype=stored[key],
            make=make,
        )

    pieces = []
    for parameter in parameters:
        key, index = parameter.places[0]
        pieces.append(piece(parameter, key, index, counts=True))
        pieces += [piece(parameter, other, index, counts=False) for other in parameter.also]
    needed = sum(p.num_bytes for p in pieces)
    with output_folder(output, force=force, needed_bytes=needed) as partial:
        checkpoint = partial / "release"
        checkpoint.mkdir()
        write_checkpoint(
            checkpoint, pieces, extra_state_keys(architecture), max_file_bytes=max_file_bytes
        )
        # By a file of Python's, whose errors say what went wrong; torch's own would not.
        with (checkpoint / "common.pt").open("wb") as file:
            torch.save(common_state(architecture), file)
        (partial / TRACKER).write_text("release", encoding="utf-8")
        (partial / MODEL_SECTION).write_text(_model_section(architecture), encoding="utf-8")
    return architecture


def megatron_to_hf(
    source: Path,
    output: Path,
    *,
    hf_source: Path | None = None,
    architecture: Architecture | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Architecture:
    """Write a Hugging Face folder from a distributed checkpoint of any layout.

    Args:
        source: a checkpoint, or a folder of them whose newest is taken.
        hf_source: the folder that the model came from: its config.json is kept, and its tokenizer
            files are copied.
        architecture: what the checkpoint holds, where neither it nor `hf_source` says so.
        dtype: of the weights; None keeps the checkpoint's.
        max_shard_bytes: largest safetensors file (a larger tensor gets one of its own).
        force: replace an existing output.

    Raises:
        ConversionError: anything about source or output, naming it; no output is left then.
    """
    reader = read_checkpoint(source)
    architecture = find_architecture(reader.folder, hf_source, architecture)
    mapping = Mapping(architecture)
    parameters = mapping.parameters()
    places = check_stored(reader.shapes(), architecture, parameters, of=str(reader.folder))
    kinds = {reader.dtype(key) for key, _ in places}
    out_dtype = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    values = _config_for(architecture, hf_source, dtype_name(out_dtype))
    itemsizes = [(dtype or reader.dtype(key)).itemsize for key, _ in places]
    needed = sum(
        math.prod(parameter.shape) * size
        for parameter, size in zip(parameters, itemsizes, strict=True)
    )
    with output_folder(output, force=force, needed_bytes=needed) as partial:
        writer = ShardWriter(partial, max_shard_bytes=max_shard_bytes)
        for parameter, (key, index) in zip(parameters, places, strict=True):
            whole = reader.read(key, index)
            if dtype is not None:
                whole = whole.to(dtype)
            for name, tensor in mapping.to_hf(parameter, whole).items():
                writer.add(name, tensor)
            progress(math.prod(parameter.shape) * whole.itemsize)
        finish_shards(partial, writer.close())
        write_json(partial / "config.json", values)
        for file in companions(hf_source) if hf_source is not None else ():
            shutil.copyfile(file, partial / file.name)
    return architecture


def read_checkpoint(path: Path) -> CheckpointReader:
    """Open a checkpoint, or the newest of a folder of them.

    Raises:
        ConversionError: there is none, or it is damaged.
    """
    try:
        return CheckpointReader(find_checkpoint(path))
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(str(error)) from error


def find_architecture(
    checkpoint: Path, hf_source: Path | None, given: Architecture | None = None
) -> Architecture:
    """What a checkpoint holds: as it says itself, as given, or as the folder it came from says.

    Raises:
        ConversionError: nothing says it, or two say different things, naming the difference.
    """
    said = {}
    try:
        model = recorded_model(checkpoint)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if model is not None:
        said[f"{checkpoint} (as recorded beside it)"] = from_model_config(model)
    if given is not None:
        said["--config"] = given
    if hf_source is not None:
        said[str(hf_source / "config.json")] = read_architecture(hf_source)
    if not said:
        raise ConversionError(
            f"{checkpoint}: does not say what model it holds (no {MODEL_SECTION}, no "
            "trainer.json). Name the folder that the model came from (--hf-source), or a run's "
            "config (--config run.yaml)"
        )
    (first, architecture), *others = said.items()
    for name, other in others:
        if differences := architecture.differences(other):
            raise ConversionError(
                f"{first} and {name} are different models: {', '.join(differences)}. Name the "
                "folder that the checkpoint came from"
            )
    return list(said.values())[-1]


def _config_for(a: Architecture, hf_source: Path | None, dtype: str) -> dict[str, Any]:
    """config.json: the source's own where there is one, else made from the architecture."""
    if hf_source is None:
        return config_values(a, dtype)
    values = read_json(hf_source / "config.json")
    for name in {"dtype", "torch_dtype"} & values.keys() or {"torch_dtype"}:
        values[name] = dtype
    return values


def _model_section(architecture: Architecture) -> str:
    body = dump_yaml(to_model_config(architecture))
    indented = "".join(f"  {line}\n" for line in body.splitlines())
    return (
        "# The model of the checkpoint beside this file, as a section of a run's config.\n"
        "# To start from the weights: output: {load: this folder, ...}\n"
        f"model:\n{indented}"
    )
