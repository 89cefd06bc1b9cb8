"""Folders of Hugging Face models: reading tensors by name, writing them shard by shard.

Only safetensors: a `.bin` or `.pt` file is a pickle, which can run code when it is read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prefix.conversion.errors import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
OUTPUT = "lm_head.weight"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that go with a model unchanged."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors file, by its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        size = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1
        return size * math.prod(self.shape)


class HFFolder:
    """The tensors of a model folder."""

    def __init__(self, path: Path) -> None:
        """Read the index and the headers.

        Raises:
            ConversionError: no safetensors, a damaged file, or files and index that disagree.
        """
        self.path = path
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise ConversionError(
                f"{path}: {what}; name the folder of a Hugging Face model (config.json and "
                "*.safetensors)"
            )
        if (path / ADAPTER).exists():
            raise ConversionError(
                f"{path}: a PEFT adapter ({ADAPTER}), not a model; merge it into its base and save "
                "that: PeftModel.from_pretrained(base, ...).merge_and_unload().save_pretrained(...)"
            )
        self.tensors: dict[str, StoredTensor] = {}
        index = _read_index(path)
        files = sorted(set(index.values())) if index is not None else [_single_file(path)]
        for name in files:
            self._add(path / name, index)
        for tensor, file in (index or {}).items():
            # An index may name the output layer of a model that keeps it as its embedding.
            if tensor not in self.tensors and tensor != OUTPUT:
                raise ConversionError(
                    f"{path / INDEX}: {tensor} should be in {file}, which does not have it; the "
                    "download is incomplete or mixed, get it again"
                )

    def _add(self, file: Path, index: dict[str, str] | None) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    if index is not None and index.get(name) != file.name:
                        said = index.get(name)
                        where = f"says it is in {said}" if said else "does not name it"
                        raise ConversionError(
                            f"{file}: holds {name}, but {INDEX} {where}; the folder mixes two "
                            "models or versions, get it again"
                        )
                    part = opened.get_slice(name)
                    self.tensors[name] = StoredTensor(
                        file=file, shape=tuple(part.get_shape()), dtype=str(part.get_dtype())
                    )
        except FileNotFoundError as error:
            raise ConversionError(
                f"{file}: missing, though {INDEX} names it; get it again"
            ) from error
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{file}: not a whole safetensors file ({error}); it is cut off or damaged, get "
                "it again"
            ) from error

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor. The file is open for this call only, so that its pages can leave memory."""
        stored = self.tensors[name]
        try:
            with safe_open(stored.file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{stored.file}: cannot read {name}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConversionError: it is missing, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: missing; it belongs to the model, get it again") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _read_index(path: Path) -> dict[str, str] | None:
    if not (path / INDEX).exists():
        return None
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ConversionError(f"{path / INDEX}: has no weight_map of tensors to files")
    if (path / SINGLE).exists() and SINGLE not in index.values():
        raise ConversionError(
            f"{path}: has {INDEX} and beside it {SINGLE}, which the index does not name and "
            "transformers would read; remove the one that is not the model"
        )
    for tensor, file in index.items():
        # A name, never a path: an index must not lead out of its folder.
        if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
            raise ConversionError(f"{path / INDEX}: {tensor} is in {file!r}, which is no file name")
        if not file.endswith(".safetensors"):
            raise ConversionError(
                f"{path / INDEX}: {tensor} is in {file}, which is no safetensors file"
            )
    return index


def _single_file(path: Path) -> str:
    if (path / SINGLE).exists():
        return SINGLE
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ConversionError(
            f"{path}: {len(found)} safetensors files ({', '.join(found[:3])}, ...) but no {INDEX} "
            "that says which of them make the model; get the index"
        )
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if pickles:
        raise ConversionError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when they are read. "
            "Get the model's safetensors, or load and save it once with transformers where you "
            "trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise ConversionError(f"{path}: no *.safetensors file; name the folder of a model")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of tensors that `finish_shards` has not named yet."""

    file: str
    tensors: tuple[str, ...]
    num_bytes: int


class ShardWriter:
    """Writes tensors as they come, holding at most one shard of them."""

    def __init__(self, folder: Path, *, max_shard_bytes: int, prefix: str = "part") -> None:
        """Write to `folder`.

        Args:
            folder: which is there.
            max_shard_bytes: a larger tensor gets a shard of its own.
            prefix: of the files' names until `finish_shards`; another one for each writer.
        """
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._prefix = prefix
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[Shard] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it must not change any more."""
        size = tensor.numel() * tensor.itemsize
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != size:
            # A view would keep the whole tensor that it is part of.
            tensor = tensor.contiguous().clone()
        self._pending[name] = tensor
        self._pending_bytes += size

    def close(self) -> list[Shard]:
        """Write what is left; all shards, for `finish_shards`."""
        if self._pending:
            self._flush()
        return self._shards

    def _flush(self) -> None:
        name = f"{self._prefix}-{len(self._shards) + 1:05d}.safetensors"
        file = self.folder / name
        # safetensors lets the owner alone read its files; a server may run as another user.
        file.touch()
        mode = file.stat().st_mode
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
            file.chmod(mode)
        except SafetensorError as error:
            # The library has the system's error as text only.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        self._shards.append(
            Shard(file=name, tensors=tuple(self._pending), num_bytes=self._pending_bytes)
        )
        self._pending = {}
        self._pending_bytes = 0


def finish_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Give the shards of all writers their final names, and write the index."""
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
        os.replace(folder / shard.file, folder / final)
        weight_map.update(dict.fromkeys(shard.tensors, final))
    if count > 1:
        total = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """In the form of config.json and the index."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def companions(path: Path) -> Iterator[Path]:
    """The files beside the weights that a model needs: tokenizer, generation settings."""
    for name in COMPANIONS:
        if (path / name).is_file():
            yield path / name
