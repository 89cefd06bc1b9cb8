"""Tensors of a Hugging Face folder that Megatron does not compute: kept beside the checkpoint.

They are the tensors of MTP layers that are not converted. With MTP layers that are, some families
store the model's embedding and output layer once more. Such copies come back as copies of these
two, which training may have changed by then. A tensor of their names that is no copy is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.conversion import mtp_tensors
from megatron_prefix.conversion.architecture import Architecture
from megatron_prefix.conversion.hf_folder import (
    HFFolder,
    ShardWriter,
    finish_shards,
    read_json,
    write_json,
)
from megatron_prefix.conversion.mapping import BIAS_OF_ROUTER

KEPT_ASIDE = "kept_aside"
"""Beside a checkpoint."""
_OF_MTP = "mtp.json"
"""In that folder: how the tensors of converted MTP layers were stored."""


@dataclass(frozen=True, kw_only=True)
class Aside:
    """What of a folder no parameter of Megatron is made of."""

    folder: HFFolder | None = None
    """Where the tensors are; None: there are none."""
    names: tuple[str, ...] = ()
    """Tensors that are kept as they are."""
    copies: tuple[str, ...] | None = None
    """Tensors that are the embedding or the output layer once more. None: those of published
    folders."""
    fused_mtp_experts: bool = False
    """The experts of converted MTP layers are one tensor."""

    @property
    def of_mapping(self) -> dict[str, Any]:
        """Arguments of a `Mapping` of the folder."""
        return {"copies": self.copies, "fused_mtp_experts": self.fused_mtp_experts}

    @property
    def num_bytes(self) -> int:
        """Size of the tensors that are kept."""
        if self.folder is None:
            return 0
        return sum(self.folder.tensors[name].num_bytes for name in self.names)

    def copy(self, writer: ShardWriter, dtype: torch.dtype | None) -> None:
        """Write the tensors that are kept, as `dtype` unless they keep their type."""
        for name in self.names:
            assert self.folder is not None
            tensor = self.folder.read(name)
            keeps_type = dtype is None or name.endswith(BIAS_OF_ROUTER)
            writer.add(name, tensor if keeps_type else tensor.to(dtype))

    def write(self, output: Path, dtype: torch.dtype | None, *, max_file_bytes: int) -> None:
        """Keep it in a folder of `output`, if there is anything to keep."""
        has_record = self.copies is not None or self.fused_mtp_experts
        if not self.names and not has_record:
            return
        kept = output / KEPT_ASIDE
        kept.mkdir()
        if self.names:
            writer = ShardWriter(kept, max_shard_bytes=max_file_bytes)
            self.copy(writer, dtype)
            finish_shards(kept, writer.close())
        if has_record:
            write_json(kept / _OF_MTP, self.of_mapping)


def aside_of(folder: HFFolder, a: Architecture) -> Aside:
    """What of a folder is kept."""
    if not a.mtp_computed:
        return Aside(folder=folder, names=tuple(mtp_tensors.names_in(a, folder.tensors)))
    copies = mtp_tensors.copies(a)
    there = [name for name in copies if name in folder.tensors]
    same = tuple(name for name in there if _equal(folder, name, copies[name]))
    return Aside(
        folder=folder,
        names=tuple(name for name in there if name not in same),
        copies=same if copies else None,
        fused_mtp_experts=mtp_tensors.has_fused_experts(a, folder.tensors),
    )


def kept_aside(checkpoint: Path, hf_source: Path | None, a: Architecture) -> Aside:
    """What was kept of the folder that a checkpoint came from.

    Args:
        checkpoint: beside which it may lie.
        hf_source: the folder; where nothing lies beside the checkpoint, this is read.
        a: of the checkpoint.
    """
    beside = checkpoint.parent / KEPT_ASIDE
    if beside.is_dir():
        has_tensors = any(beside.glob("*.safetensors"))
        folder = HFFolder(beside) if has_tensors else None
        record = read_json(beside / _OF_MTP) if (beside / _OF_MTP).exists() else {}
        copies = record.get("copies")
        return Aside(
            folder=folder,
            names=tuple(folder.tensors if folder else ()),
            copies=None if copies is None else tuple(copies),
            fused_mtp_experts=record.get("fused_mtp_experts", False),
        )
    may_have = a.mtp_layers or a.linear is not None
    return aside_of(HFFolder(hf_source), a) if hf_source is not None and may_have else Aside()


def _equal(folder: HFFolder, name: str, other: str) -> bool:
    if other not in folder.tensors or folder.tensors[name].dtype != folder.tensors[other].dtype:
        return False
    return torch.equal(folder.read(name), folder.read(other))
