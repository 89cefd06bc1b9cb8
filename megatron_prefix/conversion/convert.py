"""The two conversions. Both hold one parameter, or one shard of the output, at a time."""

from __future__ import annotations

import dataclasses
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
from megatron_prefix.conversion import mtp_tensors
from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.aside import aside_of, kept_aside
from megatron_prefix.conversion.checks import (
    check_source,
    check_stored,
    parameter_dtype,
    stored_dtypes,
)
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.extra_states import extra_state_keys
from megatron_prefix.conversion.hf_config import config_values, read_architecture
from megatron_prefix.conversion.hf_folder import (
    HFFolder,
    ShardWriter,
    companions,
    finish_shards,
    read_json,
    write_json,
)
from megatron_prefix.conversion.hf_qwen3_next import MTP_KEYS
from megatron_prefix.conversion.mapping import Mapping, Parameter, dtype_name
from megatron_prefix.conversion.megatron_lm import common_state
from megatron_prefix.conversion.model_section import from_model_config, to_model_config
from megatron_prefix.conversion.output_folder import output_folder
from megatron_prefix.conversion.torch_dist_files import (
    CheckpointReader,
    Piece,
    write_checkpoint,
)

Progress = Callable[[int], None]
"""Told of so many bytes more."""
Report = Callable[[str], None]
"""Told of what is worth knowing, in a sentence."""


def hf_to_megatron(
    source: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    mtp: bool = False,
    max_file_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Progress = lambda _: None,
    report: Report = lambda _: None,
) -> Architecture:
    """Write a distributed checkpoint of a Hugging Face model.

        output/latest_checkpointed_iteration.txt    so that Megatron-LM's --load finds it
        output/release/                             the checkpoint
        output/model.yaml                           the `model` section of a run's config
        output/kept_aside/                          what Megatron does not compute, where there is
                                                    any: of MTP layers (see `aside.py`)

    Args:
        source: folder with config.json and safetensors.
        dtype: of the weights; None keeps the source's.
        mtp: convert layers that predict further tokens (multi-token prediction), so that a run
            trains them; else they are kept aside.
        max_file_bytes: largest file of the checkpoint.
        force: replace an existing output.

    Raises:
        ConversionError: anything about source or output, naming it; no output is left then.
    """
    folder = HFFolder(source)
    architecture = read_architecture(source)
    if mtp:
        architecture = mtp_tensors.with_mtp(folder.path, architecture, folder.tensors)
    aside = aside_of(folder, architecture)
    mapping = Mapping(architecture, **aside.of_mapping)
    parameters = mapping.parameters()
    check_source(folder, architecture, parameters, dtype, aside.names)
    for name in aside.names if mtp else ():
        of = mtp_tensors.copies(architecture)[name]
        report(f"{name} differs from {of}, which Megatron's MTP layer uses; it is kept aside")
    stored = stored_dtypes(folder, parameters, dtype)

    def piece(parameter: Parameter, key: str, part: tuple[str, slice], counts: bool) -> Piece:
        end, rows = part

        def make() -> Tensor:
            tensors = [folder.read(name).to(stored[key]) for name, _ in parameter.sources]
            data = mapping.to_megatron(parameter, tensors)[rows]
            if counts:
                progress(data.numel() * data.itemsize)
            return data

        return Piece(
            key=key + end,
            index=parameter.places[0][1],
            leading=parameter.leading,
            shape=(len(range(*rows.indices(parameter.shape[0]))), *parameter.shape[1:]),
            dtype=stored[key],
            make=make,
        )

    pieces = []
    for parameter in parameters:
        for key in (parameter.places[0][0], *parameter.also):
            counts = key not in parameter.also
            pieces += [piece(parameter, key, part, counts) for part in parameter.stored]
    needed = sum(p.num_bytes for p in pieces) + aside.num_bytes
    with output_folder(output, force=force, needed_bytes=needed) as partial:
        checkpoint = partial / "release"
        checkpoint.mkdir()
        write_checkpoint(
            checkpoint, pieces, extra_state_keys(architecture), max_file_bytes=max_file_bytes
        )
        aside.write(partial, dtype, max_file_bytes=max_file_bytes)
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
    computed = mtp_tensors.layers_stored(reader.shapes())
    if computed:
        architecture = dataclasses.replace(architecture, mtp_layers=computed, mtp_computed=True)
        mtp_tensors.refuse_mtp(architecture)
    aside = kept_aside(reader.folder, hf_source, architecture)
    if aside.folder is not None and not computed:
        found = mtp_tensors.layers_in(architecture, aside.names)
        architecture = dataclasses.replace(architecture, mtp_layers=found)
    mapping = Mapping(architecture, **aside.of_mapping)
    parameters = mapping.parameters()
    places = check_stored(reader.shapes(), architecture, parameters, of=str(reader.folder))
    stored = [
        reader.dtype(key + parameter.stored[0][0])
        for parameter, (key, _) in zip(parameters, places, strict=True)
    ]
    kinds = {
        kind
        for parameter, kind in zip(parameters, stored, strict=True)
        if not parameter.is_bias_of_router and not parameter.is_less_1
    }
    out_dtype = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    values = _config_for(architecture, hf_source, dtype_name(out_dtype))
    types = [
        out_dtype if parameter.is_less_1 else parameter_dtype(parameter, kind, dtype)
        for parameter, kind in zip(parameters, stored, strict=True)
    ]
    needed = sum(
        math.prod(parameter.shape) * kind.itemsize * (1 + len(parameter.copies))
        for parameter, kind in zip(parameters, types, strict=True)
    )
    needed += aside.num_bytes
    with output_folder(output, force=force, needed_bytes=needed) as partial:
        writer = ShardWriter(partial, max_shard_bytes=max_shard_bytes)
        for parameter, (key, index), kind in zip(parameters, places, types, strict=True):
            whole = _read(reader, parameter, key, index)
            for name, tensor in mapping.to_hf(parameter, whole).items():
                writer.add(name, tensor.to(kind))
            progress(math.prod(parameter.shape) * whole.itemsize)
        aside.copy(writer, dtype)
        finish_shards(partial, writer.close())
        write_json(partial / "config.json", values)
        for file in companions(hf_source) if hf_source is not None else ():
            shutil.copyfile(file, partial / file.name)
    return architecture


def _read(
    reader: CheckpointReader, parameter: Parameter, key: str, index: tuple[int, ...]
) -> Tensor:
    parts = [reader.read(key + end, index) for end, _ in parameter.stored]
    return torch.cat(parts) if parameter.parts else parts[0]


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
    if a.mtp_computed:
        values[MTP_KEYS.get(a.family, "num_nextn_predict_layers")] = a.mtp_layers
    return values


def _model_section(architecture: Architecture) -> str:
    body = dump_yaml(to_model_config(architecture))
    indented = "".join(f"  {line}\n" for line in body.splitlines())
    return (
        "# The model of the checkpoint beside this file, as a section of a run's config.\n"
        "# To start from the weights: output: {load: this folder, ...}\n"
        f"model:\n{indented}"
    )
