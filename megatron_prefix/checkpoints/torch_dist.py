"""What a distributed checkpoint (torch_dist) holds, read without running anything from it.

    CHECKPOINT/
      .metadata          what is in it: key -> shape, dtype, chunks; where each chunk lies
      metadata.json      that it is a Megatron checkpoint
      common.pt          what is not sharded
      __0_0.distcp ...   the chunks

`.metadata` is a pickle. Megatron and torch unpickle whatever is in it; here only the classes that
describe tensors are admitted, so a checkpoint from elsewhere can be looked at before it is loaded.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_ADMITTED: dict[str, set[str] | None] = {
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}
_ADMITTED_OF_TORCH = re.compile(r"Size|(u?int|float|bfloat|complex)\d+(_\w+)?|bool|q?u?int\d+")


class _MetadataUnpickler(pickle.Unpickler):
    """Admits the classes that describe a checkpoint, and nothing that acts."""

    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and _ADMITTED_OF_TORCH.fullmatch(name)
        if of_torch or name in (_ADMITTED.get(module) or ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's table of contents.

    Raises:
        ValueError: it is missing, damaged, or asks for code to be run.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing, so the checkpoint is incomplete") from error
    # Damaged bytes make the unpickler raise nearly anything.
    except Exception as error:
        raise ValueError(
            f"{path}: not the table of contents of a checkpoint: {error}. It is damaged, or not "
            "to be trusted; get the checkpoint again"
        ) from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ValueError(f"{path}: not the table of contents of a checkpoint; it is damaged")
    return metadata


@dataclass(frozen=True, kw_only=True)
class CheckpointContents:
    """The tensors and objects of a checkpoint, by key."""

    tensors: dict[str, TensorStorageMetadata]
    """Of the model; not the optimizer's."""
    others: tuple[str, ...]
    """Everything else: optimizer, random states, Transformer Engine's extra states."""


_OF_THE_RUN = ("optimizer.", "chained_", "random", "rng_state", "rerun_state", "opt_param")


def contents(metadata: Metadata) -> CheckpointContents:
    """Sort a table of contents into the model's tensors and the rest."""
    tensors = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith(_OF_THE_RUN)
    }
    others = tuple(key for key in metadata.state_dict_metadata if key not in tensors)
    return CheckpointContents(tensors=tensors, others=others)
