"""A converted checkpoint loads at any layout, and any layout's checkpoint converts back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_prefix.checkpoints.folder import CheckpointFolder
from megatron_prefix.config import OptimizerSettings, ParallelConfig
from megatron_prefix.conversion import hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.hf_folder import HFFolder
from megatron_prefix.distributed.runtime import runtime
from megatron_prefix.megatron.torch_adam import initialise_adam
from megatron_prefix.model.build import build_gpt_model
from megatron_prefix.model.full_tensors import full_parameters
from megatron_prefix.model.transformer_config import transformer_config
from megatron_prefix.training.optimizer import build_scheduler
from tests.conversion.loading import load_converted, model_section
from tests.conversion.models import (
    CASES,
    GPT_OSS,
    HAS_SHARED_EXPERT_GATE,
    MINIMAX,
    QWEN2_MOE,
    QWEN3_NEXT,
    write_model,
)
from tests.conversion.mtp import add_mtp_layers
from tests.distributed import run_distributed
from tests.megatron.models import HAS_GATED_DELTA_NET, HAS_PREDICTIONS, HAS_WINDOWS, TRAINING

SINGLE: dict[str, int] = {}
TP_PP = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TP_PP_VPP = {**TP_PP, "virtual_pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
CASE_LAYOUTS = [
    ("llama, tied", TP_PP),
    ("qwen2", TP_PP_VPP),
    ("qwen3", TP_PP),
    ("qwen3_moe", EXPERTS),
    ("mixtral", EXPERTS),
    (
        "deepseek_v3",
        {**TP_PP, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
]
CASE_LAYOUTS.append((MINIMAX, CASE_LAYOUTS[-1][1]))
if HAS_WINDOWS:
    CASE_LAYOUTS.append((GPT_OSS, CASE_LAYOUTS[-1][1]))
if HAS_SHARED_EXPERT_GATE:
    CASE_LAYOUTS.append((QWEN2_MOE, CASE_LAYOUTS[-1][1]))
if HAS_GATED_DELTA_NET:
    CASE_LAYOUTS.append((QWEN3_NEXT, CASE_LAYOUTS[-1][1]))
WITH_MTP = ("deepseek_v3", QWEN3_NEXT) if HAS_PREDICTIONS else ()
"""Cases with a layer that predicts further tokens, which is on the last stage."""


def _load_and_save(
    rank: int, world_size: int, jobs: list[tuple[Path, Path, dict[str, int]]]
) -> list[Any]:
    """Load each checkpoint at its layout, return the whole parameters, and save them there."""
    results = []
    for megatron, saved, layout in jobs:
        parallel = ParallelConfig(**layout)
        with runtime(parallel, device="cpu", seed=9, timeout_minutes=1):
            model, chunks, optimizer = load_converted(megatron, parallel)
            results.append(full_parameters(chunks))
            # What the first step does; without it there is no state to save.
            initialise_adam(optimizer)
            CheckpointFolder(saved, keep=1).save(
                1,
                chunks,
                optimizer,
                build_scheduler(OptimizerSettings(), optimizer, total_steps=1),
                state={"config": {"model": dataclasses.asdict(model)}},
            )
    return results


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each case: its folders, and its parameters as one process and as four load them."""
    jobs: dict[str, list[Any]] = {"one": [], "four": []}
    folders = {}
    for case, layout in CASE_LAYOUTS:
        folder = tmp_path_factory.mktemp("case")
        family, options = CASES[case]
        write_model(folder / "hf", family, **{**options, "num_hidden_layers": 4})
        if case in WITH_MTP:
            add_mtp_layers(folder / "hf")
        hf_to_megatron(folder / "hf", folder / "megatron", mtp=case in WITH_MTP)
        folders[case] = folder
        jobs["one"].append((folder / "megatron", folder / "one", SINGLE))
        jobs["four"].append((folder / "megatron", folder / "four", layout))
    one = run_distributed(_load_and_save, 1, jobs["one"], timeout=300)[0]
    four = run_distributed(_load_and_save, 4, jobs["four"], timeout=300)[0]
    return {case: (folders[case], one[i], four[i]) for i, (case, _) in enumerate(CASE_LAYOUTS)}


@pytest.mark.parametrize("case", [case for case, _ in CASE_LAYOUTS])
def test_four_processes_load_the_same_parameters_as_one(loaded: Any, case: str) -> None:
    _, one, four = loaded[case]
    assert one.keys() == four.keys()
    assert any(name.startswith("mtp.") for name in one) == (case in WITH_MTP)
    for name, tensor in one.items():
        # 61 tokens at tp 2: a row of padding, which is zero.
        assert torch.equal(four[name][: tensor.shape[0]], tensor), name
        assert not four[name][tensor.shape[0] :].any(), name


@pytest.mark.parametrize("case", [case for case, _ in CASE_LAYOUTS])
@pytest.mark.parametrize("ranks", ["one", "four"])
def test_the_trainers_checkpoint_of_any_layout_converts_back(
    loaded: Any, case: str, ranks: str, tmp_path: Path
) -> None:
    folder, _, _ = loaded[case]
    megatron_to_hf(folder / ranks, tmp_path / "back")
    source, back = HFFolder(folder / "hf"), HFFolder(tmp_path / "back")
    assert source.tensors.keys() == back.tensors.keys()
    for name in source.tensors:
        assert torch.equal(source.read(name), back.read(name)), name


def test_an_unmodified_model_loads_it_by_either_specs_names(tmp_path: Path) -> None:
    family, options = CASES["qwen3_moe"]
    write_model(tmp_path / "hf", family, **options)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    run_distributed(_load_unmodified, 1, tmp_path / "megatron", timeout=120)


def _load_unmodified(rank: int, world_size: int, megatron: Path) -> None:
    checkpoint = str(megatron / "release")
    model = model_section(megatron)
    training = dataclasses.replace(TRAINING, dtype="float32")
    with runtime(ParallelConfig(), device="cpu", seed=9, timeout_minutes=1):
        config = transformer_config(model, ParallelConfig(), training)
        built = [build_gpt_model(model, config, shared_prefixes=False) for _ in range(2)]
        for number, gpt in enumerate(built):
            state = {"model": gpt.sharded_state_dict()}
            if number == 1:
                state["extra"] = _as_transformer_engine_asks(state["model"])
            loaded = dist_checkpointing.load(state, checkpoint)
            gpt.load_state_dict(loaded["model"])
        for name, parameter in built[0].named_parameters():
            assert torch.equal(parameter, dict(built[1].named_parameters())[name]), name
        # What Megatron-LM reads of it before it builds a model.
        common = dist_checkpointing.load_common_state_dict(checkpoint)
        assert common["args"].num_query_groups == 2 and common["checkpoint_version"] == 3.0


def _as_transformer_engine_asks(state: dict[str, Any]) -> dict[str, ShardedObject]:
    """Rename the norm before experts, and ask for extra states that the local spec has not."""
    for item in nested_values(state):
        item.key = item.key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    places = {"decoder.final_layernorm": 1}
    for module in ("self_attention.core_attention", "pre_mlp_layernorm"):
        places[f"decoder.layers.{module}"] = 2
    return {
        f"{module}.{i}": ShardedObject(f"{module}._extra_state", None, (count,), (i,))
        for module, count in places.items()
        for i in range(count)
    }
