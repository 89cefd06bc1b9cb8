"""What a model folder or a checkpoint holds, from its headers alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from megatron_prefix.checkpoints.initial_weights import recorded_model
from megatron_prefix.checkpoints.torch_dist import contents
from megatron_prefix.conversion.convert import read_checkpoint
from megatron_prefix.conversion.errors import ConversionError
from megatron_prefix.conversion.hf_config import read_architecture
from megatron_prefix.conversion.hf_folder import DTYPES, HFFolder, read_json
from megatron_prefix.conversion.mapping import Mapping, dtype_name
from megatron_prefix.conversion.model_section import from_model_config


def inspect(path: Path) -> dict[str, Any]:
    """Describe a Hugging Face folder or a distributed checkpoint, as plain values.

    Returns:
        format, path, model (the sizes; or why they are not known), parameters (their number),
        bytes, tensors ([{name, shape, dtype}]), others (names of what is no weight).

    Raises:
        ConversionError: it is neither, or damaged.
    """
    if any(path.glob("*.safetensors")) or (path / "config.json").exists():
        return _inspect_hf(path)
    return _inspect_megatron(path)


def _inspect_hf(path: Path) -> dict[str, Any]:
    folder = HFFolder(path)
    try:
        model: dict[str, Any] = dataclasses.asdict(read_architecture(path))
    except ConversionError as error:
        model = {"unsupported": str(error)}
        if (path / "config.json").exists():
            model["family"] = read_json(path / "config.json").get("model_type")
    tensors = [
        {
            "name": name,
            "shape": list(stored.shape),
            "dtype": dtype_name(DTYPES[stored.dtype]) if stored.dtype in DTYPES else stored.dtype,
        }
        for name, stored in folder.tensors.items()
    ]
    return {
        "format": "Hugging Face safetensors",
        "path": str(path),
        "model": model,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": folder.num_bytes,
        "tensors": tensors,
        "others": [],
    }


def _inspect_megatron(path: Path) -> dict[str, Any]:
    reader = read_checkpoint(path)
    found = contents(reader.metadata)
    parameters = sum(math.prod(entry.size) for entry in found.tensors.values())
    try:
        recorded = recorded_model(reader.folder)
        if recorded is None:
            model: dict[str, Any] = {"unsupported": "nothing beside it says what model it is"}
        else:
            architecture = from_model_config(recorded)
            model = dataclasses.asdict(architecture)
            # The stored tensors may pad the vocabulary, and hold a norm under two names.
            parameters = sum(math.prod(p.shape) for p in Mapping(architecture).parameters())
    except ValueError as error:
        model = {"unsupported": str(error)}
    tensors = [
        {
            "name": key,
            "shape": list(entry.size),
            "dtype": dtype_name(entry.properties.dtype),
        }
        for key, entry in found.tensors.items()
    ]
    return {
        "format": "Megatron distributed checkpoint (torch_dist)",
        "path": str(reader.folder),
        "model": model,
        "parameters": parameters,
        "bytes": sum(
            math.prod(entry.size) * entry.properties.dtype.itemsize
            for entry in found.tensors.values()
        ),
        "tensors": tensors,
        "others": list(found.others),
    }
