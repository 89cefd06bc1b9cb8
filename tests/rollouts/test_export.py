"""The weights in training become the Hugging Face folder that they came from, in any layout."""

from __future__ import annotations

import math
import resource
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_prefix.config import ParallelConfig
from megatron_prefix.conversion import hf_to_megatron
from megatron_prefix.conversion.hf_folder import HFFolder
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.rollouts.hf import export
from tests.conversion.loading import load_converted
from tests.conversion.models import (
    CASES,
    GPT_OSS,
    MANY_SHARDS,
    MINIMAX,
    QWEN3_NEXT,
    write_model,
)
from tests.distributed import run_distributed
from tests.megatron.models import HAS_GATED_DELTA_NET, HAS_WINDOWS
from tests.resident_memory import peak_growth

TP_PP = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
EP_PP = {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
LAYOUTS: list[tuple[str, dict[str, int]]] = [
    ("llama, tied", TP_PP),
    ("llama, biases", {}),
    ("qwen2", {**TP_PP, "virtual_pipeline_model_parallel_size": 2}),
    ("qwen3", {"tensor_model_parallel_size": 2}),
    ("qwen3_moe", EP_PP),
    ("qwen3_moe, dense layer, weights as they are", EP_PP),
    ("mixtral", {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    (
        "deepseek_v3",
        {**TP_PP, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
]
LAYOUTS.append((MINIMAX, LAYOUTS[-1][1]))
if HAS_WINDOWS:
    LAYOUTS.append((GPT_OSS, LAYOUTS[-1][1]))
if HAS_GATED_DELTA_NET:
    LAYOUTS.append((QWEN3_NEXT, LAYOUTS[-1][1]))
SHARD = 20_000
"""Several files for each rank."""


def _assert_same(folder: Path, source: Path) -> None:
    found, expected = HFFolder(folder), HFFolder(source)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {stored.file.name for stored in found.tensors.values()}
        | {"config.json", "model.safetensors.index.json"}
    )


Written = list[Counter[int]]
"""Elements by rank: where all see the folder, and where some do."""


def _export_all(rank: int, world_size: int, folders: list[Path]) -> list[Written]:
    """What was written in each case."""
    written: list[Written] = []
    assign = export._writers

    def watched(stored: Any, seeing: list[int]) -> list[int]:
        writers = assign(stored, seeing)
        written[-1].append(Counter())
        for tensors, writer in zip(stored, writers, strict=True):
            for parts in tensors:
                written[-1][-1][writer] += math.prod(next(iter(parts)).whole_shape)
        return writers

    for folder, (_, layout) in zip(folders, LAYOUTS, strict=True):
        written.append([])
        parallel = ParallelConfig(**layout)
        with (
            runtime(parallel, device="cpu", seed=9, timeout_minutes=1),
            mock.patch.object(export, "_writers", watched),
        ):
            model, chunks, _ = load_converted(folder / "megatron", parallel)
            write = export.weights_exporter(chunks, model, timeout_minutes=1, shard_bytes=SHARD)
            if rank == 0:
                (folder / "all").mkdir()
                (folder / "some").mkdir()
            write(folder / "all")
            with mock.patch.object(export, "_ranks_that_see", return_value=[1, 3]):
                write(folder / "some")
    return written


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Written]]:
    folders = []
    for case, _ in LAYOUTS:
        folders.append(tmp_path_factory.mktemp("case"))
        family, options = CASES[case]
        write_model(folders[-1] / "hf", family, **{**options, "num_hidden_layers": 4})
        hf_to_megatron(folders[-1] / "hf", folders[-1] / "megatron")
    written = run_distributed(_export_all, 4, folders, timeout=300)
    assert all(of_rank == written[0] for of_rank in written)
    cases = [case for case, _ in LAYOUTS]
    return dict(zip(cases, zip(folders, written[0], strict=True), strict=True))


@pytest.mark.parametrize("case", [case for case, _ in LAYOUTS])
def test_four_ranks_write_the_model_that_they_were_given(exported: Any, case: str) -> None:
    folder, (_, some) = exported[case]
    _assert_same(folder / "all", folder / "hf")
    _assert_same(folder / "some", folder / "hf")
    assert some.keys() <= {1, 3}


def test_all_ranks_write_and_copies_take_turns(exported: Any) -> None:
    for case, (folder, (everyone, _)) in exported.items():
        assert everyone.keys() == {0, 1, 2, 3}, case
        if case in ("llama, biases", "qwen3"):  # each rank holds some of every parameter
            largest = max(tensor.num_bytes for tensor in HFFolder(folder / "hf").tensors.values())
            # Megatron's parameters are up to three of Hugging Face's, of 4 bytes an element.
            assert max(everyone.values()) - min(everyone.values()) <= 3 * largest / 4, case


def _fail(rank: int, world_size: int, folder: Path) -> list[str]:
    """What a disk that is full for rank 1 gives, and a folder that is not there."""
    errors = []
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with runtime(parallel, device="cpu", seed=9, timeout_minutes=1):
        model, chunks, _ = load_converted(folder / "megatron", parallel)
        write = export.weights_exporter(chunks, model, timeout_minutes=1, shard_bytes=SHARD)
        out = folder / "out"
        if rank == 0:
            out.mkdir()
        for path, limit in ((out, 100), (folder / "missing", resource.RLIM_INFINITY)):
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write(path)
            except OSError as error:
                errors.append(str(error))
    return errors


def test_a_rank_that_cannot_write_ends_all_with_its_error(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    for full, missing in run_distributed(_fail, 2, tmp_path, timeout=120):
        assert "File too large" in full and "rank-00001-00001.safetensors" in full
        assert "No such file or directory" in missing and str(tmp_path / "missing") in missing


LARGE_SHARD = 8_000_000


def _peak(rank: int, world_size: int, folder: Path) -> int:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with runtime(parallel, device="cpu", seed=9, timeout_minutes=1):
        model, chunks, _ = load_converted(folder / "megatron", parallel)
        write = export.weights_exporter(chunks, model, timeout_minutes=1, shard_bytes=LARGE_SHARD)
        if rank == 0:
            for name in ("first", "out"):
                (folder / name).mkdir()
        write(folder / "first")  # what is set up once
        return peak_growth(lambda: write(folder / "out"))


def test_a_rank_holds_a_shard_and_a_parameter_beside_its_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", max_shard_size=LARGE_SHARD, **MANY_SHARDS)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    source = HFFolder(tmp_path / "hf")
    layer = sum(t.num_bytes for name, t in source.tensors.items() if ".layers.3." in name)
    assert source.num_bytes > 12 * LARGE_SHARD
    for peak in run_distributed(_peak, 2, tmp_path, timeout=120):
        assert peak < LARGE_SHARD + 2 * layer + 8_000_000, f"{peak / 1e6:.0f} MB"
    _assert_same(tmp_path / "out", tmp_path / "hf")
