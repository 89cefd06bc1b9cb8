"""A conversion holds a shard and a layer, not the model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from megatron_prefix.conversion import hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.hf_folder import HFFolder
from tests.conversion.models import MANY_SHARDS, write_model
from tests.distributed import run_distributed
from tests.resident_memory import peak_growth

SHARD = 12_000_000
MB = 1_000_000


def _peak(rank: int, world_size: int, folder: Path) -> list[int]:
    """How far each direction raises the process's resident memory, in bytes."""
    # Imports and first uses do not count.
    write_model(folder / "tiny", "llama")
    hf_to_megatron(folder / "tiny", folder / "tiny megatron")
    megatron_to_hf(folder / "tiny megatron", folder / "tiny back")
    peaks = []
    for convert, source, target in (
        (lambda a, b: hf_to_megatron(a, b, max_file_bytes=SHARD), "hf", "megatron"),
        (lambda a, b: megatron_to_hf(a, b, max_shard_bytes=SHARD), "megatron", "back"),
    ):
        paths = folder / source, folder / target
        peaks.append(peak_growth(functools.partial(convert, *paths)))
    return peaks


def test_memory_is_that_of_a_shard_and_a_layer(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", max_shard_size=SHARD, **MANY_SHARDS)
    source = HFFolder(tmp_path / "hf")
    layer = sum(t.num_bytes for name, t in source.tensors.items() if ".layers.3." in name)
    assert source.num_bytes > 8 * SHARD
    assert len({stored.file for stored in source.tensors.values()}) > 8
    peaks = run_distributed(_peak, 1, tmp_path, timeout=120)[0]
    for peak in peaks:
        assert peak < SHARD + 2 * layer + 8 * MB, [f"{peak / MB:.0f} MB" for peak in peaks]
    back = HFFolder(tmp_path / "back")
    for name in source.tensors:
        assert torch.equal(source.read(name), back.read(name)), name
