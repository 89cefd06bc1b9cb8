"""A run starts from a converted model, or says why it does not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_prefix.conversion import hf_to_megatron, megatron_to_hf
from megatron_prefix.conversion.hf_folder import HFFolder
from tests.conversion.models import write_model
from tests.training.runs import good_records, run_command, run_values, write_config, write_records


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    write_model(folder / "hf", "qwen2", vocab_size=64)
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder


def _values(converted: Path, folder: Path, **model: Any) -> dict[str, Any]:
    records = write_records(folder / "rollouts.jsonl", good_records(8))
    values = run_values(
        folder / "run",
        records=records,
        output={"load": str(converted / "megatron")},
        optimizer={"lr": 0.0},
    )
    values["model"] = yaml.safe_load((converted / "megatron" / "model.yaml").read_text())["model"]
    transformer = {**values["model"]["transformer"], **model.pop("transformer", {})}
    values["model"] = {**values["model"], **model, "transformer": transformer}
    return values


def test_a_run_starts_from_the_converted_weights(converted: Path, tmp_path: Path) -> None:
    status, stderr = run_command(write_config(tmp_path / "run.yaml", _values(converted, tmp_path)))
    assert status == 0, stderr
    # At a learning rate of 0 they are also what it ends with.
    megatron_to_hf(tmp_path / "run", tmp_path / "back", hf_source=converted / "hf")
    source, back = HFFolder(converted / "hf"), HFFolder(tmp_path / "back")
    for name in source.tensors:
        assert torch.equal(source.read(name), back.read(name)), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_base": 500}, "model.rotary_base: 500, but the weights .* made for 10000"),
        ({"transformer": {"layernorm_epsilon": 1e-3}}, "layernorm_epsilon: 0.001, but .* 1e-06"),
        ({"vocab_size": 66}, "model.vocab_size: 66, but the weights .* made for 64"),
        ({"transformer": {"add_qkv_bias": False}}, "add_qkv_bias: False, but .* made for True"),
    ],
    ids=["rotary base", "epsilon", "vocabulary", "bias"],
)
def test_an_option_that_the_weights_were_not_made_for_is_refused(
    converted: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = _values(converted, tmp_path, **changes)
    values["rollouts"]["paths"] = [str(write_records(tmp_path / "r.jsonl", good_records(2)))]
    status, stderr = run_command(write_config(tmp_path / "run.yaml", values))
    assert status == 1
    assert re.search(message, stderr), stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformer": {"ffn_hidden_size": 80}},
            r"linear_fc1.weight has shape \[2, 192, 64\], the model needs \[2, 160, 64\]",
        ),
        ({"transformer": {"add_qkv_bias": False}}, "holds decoder.*linear_qkv.bias, for which"),
        ({"transformer": {"qk_layernorm": True}}, "no tensor decoder.*q_layernorm.weight"),
        ({"vocab_size": 128}, r"weight has shape \[64, 64\], the model needs \[128, 64\]"),
    ],
    ids=["shape", "left out", "missing", "vocabulary"],
)
def test_tensors_that_do_not_fit_are_refused_without_a_record_too(
    converted: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = _values(converted, tmp_path, **changes)
    shutil.copytree(converted / "megatron" / "release", tmp_path / "bare")
    values["output"]["load"] = str(tmp_path / "bare")
    status, stderr = run_command(write_config(tmp_path / "run.yaml", values))
    assert status == 1
    assert re.search(message, stderr), stderr
