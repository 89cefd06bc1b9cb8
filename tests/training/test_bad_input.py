"""Wrong data and wrong configurations: one error that names the item, nothing half-trained.

Most cases call the entry point on two ranks that stay for all of them; what torchrun adds (ending
the other ranks, one report) is tested with torchrun itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_prefix.training import launch
from tests.distributed import run_distributed
from tests.training.runs import (
    MAX_SEQUENCE_LENGTH,
    VOCAB_SIZE,
    good_records,
    read_rows,
    run_command,
    run_values,
    torchrun,
    write_config,
    write_records,
)

GOOD = good_records(2)


def _changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD[1], **fields}


def _response(name: str, prompt: list[int], response: list[int]) -> dict[str, Any]:
    return {"group": name, "prompt": prompt, "response": response, "reward": 1.0}


# What follows the good first line of a file (or stands on its first lines), and the error.
BAD_RECORDS: dict[str, tuple[list[Any], str]] = {
    "empty response": (
        [GOOD[0], _changed(responses=[[1], [], [2], [3]])],
        r":2: responses\[1\]: is empty; it needs at least one token",
    ),
    "prompt beyond the positions": (
        [GOOD[0], _changed(prompt=[1] * (MAX_SEQUENCE_LENGTH + 1))],
        r":2: prompt: its 33 tokens exceed the model's 32 positions",
    ),
    "token outside the vocabulary": (
        [GOOD[0], _changed(prompt=[5, VOCAB_SIZE])],
        r":2: prompt\[1\]: token 64 is outside the vocabulary of 64 \(0 to 63\)",
    ),
    "NaN reward": (
        [GOOD[0], _changed(rewards=[1.0, 0.0, float("nan"), 0.0])],
        r":2: rewards\[2\]: nan is not a finite number",
    ),
    "group of different prompts": (
        [GOOD[0], _response("a", [1, 2], [3]), _response("a", [1, 4], [3])],
        r":3: prompt: group 'a' of different prompts; .*:2 begins it .* at position 1",
    ),
    "malformed line": ([GOOD[0], '{"prompt": [1,'], r":2: not a JSON object: "),
    "group over the budget": (
        [GOOD[0], _changed(responses=[[7] * 15] * 2 + [[8] * 15, [9] * 15])],
        r":2\) packs to \d+ tokens, over token_budget=48, and allow_split is off; raise "
        r"token_budget or set allow_split",
    ),
}


def _commands(rank: int, world_size: int, configs: dict[str, Path]) -> dict[str, tuple[int, str]]:
    return {name: run_command(path) for name, path in configs.items()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every case of BAD_RECORDS: its file, and status and stderr of each rank."""
    folder = tmp_path_factory.mktemp("bad")
    configs = {}
    for index, (name, (records, _)) in enumerate(BAD_RECORDS.items()):
        values = run_values(
            folder / f"out{index}",
            records=write_records(folder / f"{index}.jsonl", records),
            training={"token_budget": 48, "allow_split": False},
            output={"save_every": 1},
        )
        configs[name] = write_config(folder / f"{index}.yaml", values)
    ranks = run_distributed(_commands, 2, configs, timeout=200)
    return {name: (path, [rank[name] for rank in ranks]) for name, path in configs.items()}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_rollouts_end_the_run_with_an_error_that_names_them(
    name: str, refused: dict[str, tuple[Path, Any]]
) -> None:
    config, ranks = refused[name]
    records = re.escape(str(config.with_suffix(".jsonl")))
    for rank, (status, stderr) in enumerate(ranks):
        assert status == 1
        (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
        prefix = "error: " if rank == 0 else f"error: rank {rank}: "
        prefix += r"(group \d+ \()?"
        assert re.match(prefix + records + BAD_RECORDS[name][1], line), line
        assert "Traceback" not in stderr
    # The whole first batch is refused: no step of it is taken, reported or saved.
    output = config.with_name(f"out{config.stem}")
    assert read_rows(output) == []
    assert not (output / "checkpoints").exists()


def test_an_error_in_the_middle_leaves_a_checkpoint_that_continues_when_it_is_mended(
    tmp_path: Path,
) -> None:
    records = good_records(6)
    path = write_records(tmp_path / "rollouts.jsonl", [*records[:4], "[1, 2", records[5]])
    values = run_values(
        tmp_path / "out",
        records=path,
        training={"steps": 3},
        output={"save_every": 1},
        # As of a file that is damaged while the run goes on: else it is named at the start.
        rollouts={"check_records": 0},
    )
    config = write_config(tmp_path / "run.yaml", values)
    # Far from a hang, whose end would be the run's own timeout of a minute.
    for rank, (status, stderr) in enumerate(run_distributed(_command, 2, config, timeout=50)):
        assert status == 1
        (error,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
        prefix = "error: " if rank == 0 else f"error: rank {rank}: "
        assert error.startswith(f"{prefix}{path}:5: not a JSON object")
        assert "Traceback" not in stderr
    assert [row["step"] for row in read_rows(tmp_path / "out")] == [1, 2]
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step_000001", "step_000002"]

    write_records(path, records)
    ((status, stderr),) = run_distributed(_command, 1, config)
    assert status == 0, stderr
    assert [row["step"] for row in read_rows(tmp_path / "out")] == [1, 2, 3]
    assert "step_000003" in {p.name for p in checkpoints.iterdir()}


def _command(rank: int, world_size: int, config: Path) -> tuple[int, str]:
    return run_command(config)


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "out"
    in_the_way.write_text("a file")
    records = write_records(tmp_path / "rollouts.jsonl", good_records(2))
    values = run_values(in_the_way / "run", records=records)
    config = write_config(tmp_path / "run.yaml", values)
    ((status, stderr),) = run_distributed(_command, 1, config)
    assert status == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "output.directory" in line and "Not a directory" in line and str(in_the_way) in line
    assert "Traceback" not in stderr and in_the_way.read_text() == "a file"


def test_a_kernel_that_cannot_run_here_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    values = run_values(
        tmp_path / "out", records=tmp_path / "missing.jsonl", training={"kernel": "torch_cuda"}
    )
    config = write_config(tmp_path / "run.yaml", values)
    ((status, stderr),) = run_distributed(_command, 1, config)
    assert status == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "torch_cuda cannot compute on device: cpu" in line and "torch_cpu" in line
    assert "Traceback" not in stderr


REWARD = """
import os

if os.environ["RANK"] == "0":
    raise RuntimeError("the judge is away")

def reward(prompt, response, answer):
    return 1.0
"""


def test_an_error_of_what_rank_0_reads_ends_all_ranks_and_is_said_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rewards_of_this_test.py").write_text(REWARD)
    record = {k: v for k, v in GOOD[0].items() if k != "rewards"} | {"answer": [1]}
    path = write_records(tmp_path / "rollouts.jsonl", [record])
    values = run_values(
        tmp_path / "out",
        records=path,
        rollouts={
            "paths": [str(path)],
            "groups_per_step": 1,
            "reward": "rewards_of_this_test:reward",
        },
        training={"timeout_minutes": 5},
    )
    failed = torchrun(write_config(tmp_path / "run.yaml", values), timeout=150)
    assert failed.returncode != 0
    (error,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert error == (
        "error: reward 'rewards_of_this_test:reward': importing rewards_of_this_test "
        "failed: RuntimeError: the judge is away"
    )
    assert "trainer.py" not in failed.stderr
    assert read_rows(tmp_path / "out") == []
    assert not (tmp_path / "out" / "checkpoints").exists()


WRONG_CONFIGS: dict[str, tuple[dict[str, dict[str, Any]], str | tuple[str, ...]]] = {
    "unknown key": (
        {"training": {"token_bugdet": 3}},
        "training.token_bugdet: unknown key; did you mean token_budget?",
    ),
    "wrong type": ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected float, got"),
    "processes": (
        {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
        "parallel: 2 processes do not divide by tensor_model_parallel_size x "
        "pipeline_model_parallel_size = 4; start a multiple of it",
    ),
    "experts": (
        {
            "parallel": {"expert_model_parallel_size": 4},
            "model": {"transformer": {"num_moe_experts": 4}},
        },
        "parallel.expert_model_parallel_size: 4 does not divide the 2 ranks of a pipeline stage",
    ),
    "experts of a dense model": (
        {"parallel": {"expert_model_parallel_size": 2}},
        "parallel.expert_model_parallel_size: 2 needs model.transformer.num_moe_experts; set it, "
        "or set this to 1",
    ),
    "split experts of a dense model": (
        {
            "parallel": {
                "tensor_model_parallel_size": 2,
                "expert_tensor_parallel_size": 2,
            }
        },
        "parallel.expert_tensor_parallel_size: 2 needs model.transformer.num_moe_experts; set it, "
        "or set this to null",
    ),
    "width of split experts": (
        {
            "parallel": {"tensor_model_parallel_size": 2},
            "model": {"transformer": {"num_moe_experts": 2, "moe_ffn_hidden_size": 15}},
        },
        "model.transformer.moe_ffn_hidden_size: 15 does not divide by expert_tensor_parallel_size",
    ),
    "experts split on the CPU": (
        {
            "parallel": {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
            "model": {"transformer": {"num_moe_experts": 2, "moe_ffn_hidden_size": 16}},
        },
        "parallel.expert_tensor_parallel_size: 2 with expert_model_parallel_size: 2 gathers",
    ),
    "heads": (
        {
            "parallel": {"tensor_model_parallel_size": 2},
            "model": {"transformer": {"num_attention_heads": 3}},
        },
        "model.transformer: Megatron-Core refuses it: num_attention_heads (3) must be a multiple",
    ),
    "query groups": (
        {
            "parallel": {"tensor_model_parallel_size": 2},
            "model": {"transformer": {"num_query_groups": 1}},
        },
        # Releases before 0.16 refuse it themselves.
        (
            "model.transformer.num_query_groups: 1 does not divide by tensor_model_parallel_size: "
            "2",
            "model.transformer: Megatron-Core refuses it: num_query_groups (1) must be a multiple",
        ),
    ),
    "feed-forward size": (
        {
            "parallel": {"tensor_model_parallel_size": 2},
            "model": {"transformer": {"ffn_hidden_size": 49}},
        },
        "model.transformer.ffn_hidden_size: 49 does not divide by tensor_model_parallel_size: 2",
    ),
    "layers": (
        {
            "parallel": {"pipeline_model_parallel_size": 2},
            "model": {"transformer": {"num_layers": 3}},
        },
        "model.transformer.num_layers: 3 does not divide by the 2 pipeline stages and chunks",
    ),
    "head size": (
        {"model": {"transformer": {"hidden_size": 28}}},
        "model.transformer.kv_channels: 7 (the size of a head) times rotary_percent: 1.0 gives 7",
    ),
    "nothing": (
        {"model": {"transformer": {"num_attention_heads": 0}}},
        "model.transformer.num_attention_heads: 0 must be at least 1",
    ),
    "fewer than no further tokens": (
        {"model": {"transformer": {"mtp_num_layers": -1}}},
        "model.transformer.mtp_num_layers: -1 must be at least 0",
    ),
    "Megatron's own key": (
        {"model": {"transformer": {"nun_layers": 1}}},
        "model.transformer.nun_layers: Megatron-Core's TransformerConfig has no such field; did "
        "you mean num_layers?",
    ),
    "a key of another section": (
        {"model": {"transformer": {"sequence_parallel": True}}},
        "model.transformer.sequence_parallel: True is decided by parallel.sequence_parallel",
    ),
    "auxiliary loss of a series": (
        {
            "model": {
                "transformer": {
                    "num_moe_experts": 4,
                    "moe_router_load_balancing_type": "aux_loss",
                    "moe_aux_loss_coeff": 0.01,
                }
            },
            "training": {"share_across_microbatches": True},
        },
        "training.share_across_microbatches: true with model.transformer.moe_aux_loss_coeff: 0.01: "
        "an auxiliary loss is made of the tokens of a whole microbatch",
    ),
    "dropout": (
        {"model": {"transformer": {"hidden_dropout": 0.1}}},
        "model.transformer: hidden_dropout=0.1 cannot be combined with shared prefixes",
    ),
    "temperatures": (
        {"objective": {"temperature": 0.5}},
        "objective.temperature: 0.5 differs from rollouts.temperature: 1.0",
    ),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_configuration_ends_with_status_2_before_any_process_group(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections, expected = WRONG_CONFIGS[name]
    records = write_records(tmp_path / "rollouts.jsonl", GOOD)
    values = run_values(tmp_path / "out", records=records)
    for section, changes in sections.items():
        transformer = {**values["model"]["transformer"], **changes.get("transformer", {})}
        values[section] = {**values[section], **changes}
        if section == "model":
            values["model"]["transformer"] = transformer
    config = write_config(tmp_path / "run.yaml", values)
    # Split and spread over 2 each, experts fill 4 processes.
    monkeypatch.setenv("WORLD_SIZE", "4" if name == "experts split on the CPU" else "2")
    monkeypatch.setenv("RANK", "0")
    with mock.patch.object(
        launch, "runtime_of_run", side_effect=AssertionError("a group was started")
    ):
        status, stderr = run_command(config)
    assert status == 2
    expected = (expected,) if isinstance(expected, str) else expected
    assert stderr.startswith(tuple(f"error: {config}: {text}" for text in expected)), stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_is_not_there_or_no_yaml_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    missing = tmp_path / "missing.yaml"
    status, stderr = run_command(missing)
    assert status == 2 and stderr.startswith(f"error: {missing}: ")
    missing.write_text("model: [1")
    status, stderr = run_command(missing)
    assert status == 2 and re.match(rf"error: {re.escape(str(missing))}: line \d+", stderr)


def test_torchrun_reports_a_wrong_configuration_once(tmp_path: Path) -> None:
    values = run_values(tmp_path / "out", records=tmp_path / "rollouts.jsonl")
    values["training"]["token_bugdet"] = 3
    config = write_config(tmp_path / "run.yaml", values)
    failed = torchrun(config)
    assert failed.returncode != 0
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "training.token_bugdet: unknown key" in errors[0]
    assert re.search(r"exitcode\s*: 2 ", failed.stderr)
