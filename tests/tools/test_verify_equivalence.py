"""The proof tool: it passes where it should, and it is able to fail."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import ParallelConfig
from tests.megatron.models import HAS_WINDOWS
from tests.tools.proofs import (
    ALWAYS,
    SERIES,
    SHAPES,
    SHAPES_OF_RANKS,
    SHAPES_OVER_THE_BUDGET,
    assert_exact,
    small_model,
    tool,
)

__all__ = ["tool"]


def test_interleaved_pipeline_tensor_parallel_recompute_and_a_split_group(
    tool: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tool.verify(
        model=small_model(tool),
        shapes=SHAPES,
        parallel=ParallelConfig(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        recompute="full",
        packing=ALWAYS,
        # The first group packs to 26 tokens, the last to 26 too.
        token_budget=24,
    )
    assert_exact(tool, report)
    split = capfd.readouterr().out.split("data-parallel rank, ")[1].split(" groups split")[0]
    assert int(split) >= 1


def test_three_steps_of_the_distributed_optimizer(tool: ModuleType) -> None:
    report = tool.verify(
        model=small_model(tool),
        shapes=SHAPES,
        parallel=ParallelConfig(),
        data_parallel_size=2,
        optimizer_steps=3,
        packing=ALWAYS,
    )
    assert_exact(tool, report)


NO_PENALTY = {"kl_coefficient": 0.0, "entropy_coefficient": 0.0}


@pytest.mark.parametrize(
    ("objective", "options", "parallel", "data"),
    [
        (
            "gspo",
            {
                "correction": {"kind": "mask", "level": "sequence", "high": 3.0},
                "overlong": {"kind": "mask"},
                "dual_clip": 1.05,
            },
            ParallelConfig(context_parallel_size=2),
            1,
        ),
        (
            "dapo",
            {
                **NO_PENALTY,
                "zero_advantages": "skip",
                "correction": {"level": "sequence_mean", "high": 1.05},
                "overlong": {"kind": "penalty", "length": 7, "buffer": 4},
            },
            ParallelConfig(),
            2,
        ),
        (
            "cispo",
            {"clip_high": 0.1, "correction": {"kind": "mask", "low": 0.8, "high": 1.2}},
            ParallelConfig(tensor_model_parallel_size=2),
            1,
        ),
        ("dr_grpo", {"kl_estimator": "k2"}, ParallelConfig(), 1),
        ("supervised", {"overlong": {"kind": "mask"}}, ParallelConfig(), 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objectives_corrections_and_filters(
    tool: ModuleType, objective: str, options: dict[str, Any], parallel: ParallelConfig, data: int
) -> None:
    report = tool.verify(
        model=small_model(tool),
        shapes=[*SHAPES, *SHAPES_OF_TURNS[:2]],
        parallel=parallel,
        data_parallel_size=data,
        optimizer_steps=2,
        objective=objective,
        objective_options=options,
        packing=ALWAYS,
        seed=1,
    )
    assert_exact(tool, report)


# Prompts of fewer tokens than chunks, one response far longer than the rest, fewer responses than
# ranks, a group of one, and groups whose prompts begin alike.


def test_context_parallel_with_every_kind_pipelines_and_recompute(tool: ModuleType) -> None:
    model = tool.with_comm_types(small_model(tool), ["all_gather", "p2p", "a2a"])
    report = tool.verify(
        model=model,
        shapes=SHAPES_OF_RANKS,
        parallel=ParallelConfig(
            context_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        recompute="full",
        packing=ALWAYS,
        token_budget=110,
        optimizer_steps=3,
    )
    assert_exact(tool, report)


def test_context_parallel_with_tensor_parallel_and_a_sequence_level_ratio(tool: ModuleType) -> None:
    report = tool.verify(
        model=tool.with_comm_types(small_model(tool), ["a2a", "p2p"]),
        shapes=SHAPES_OF_RANKS,
        parallel=ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2),
        objective="gspo",
        packing=ALWAYS,
        token_budget=110,
    )
    assert_exact(tool, report)


def test_four_context_parallel_ranks_with_three_levels_of_sharing(tool: ModuleType) -> None:
    report = tool.verify(
        model=tool.with_comm_types(small_model(tool), ["all_gather", "p2p"]),
        shapes=SHAPES_OF_RANKS,
        parallel=ParallelConfig(context_parallel_size=4),
        packing={**ALWAYS, "sharing": "everything"},
    )
    assert_exact(tool, report)


SHAPES_OF_TURNS = [
    {
        "prefix": 11,
        "responses": [
            {
                "turns": [9, {"seen": 40}],
                "then": [
                    3,
                    [5, {"seen": 3}, 2],
                    {"turns": [4], "then": [[{"seen": 1}, 6], 2]},
                ],
            },
            7,
        ],
    },
    {"prefix": 5, "responses": [[{"seen": 4}, 6], [1, {"seen": 9}]]},
    {"prefix": 1, "responses": [[2, {"seen": 1}, 2]]},
    {"prefix": 20, "responses": [3, 8]},
]


@pytest.mark.parametrize(
    ("parallel", "data", "options"),
    [
        pytest.param(ParallelConfig(), 1, {"optimizer_steps": 3}, id="one process"),
        pytest.param(
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            1,
            {"objective": "gspo"},
            id="tensor and pipeline parallelism, a sequence-level ratio",
        ),
        pytest.param(
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            1,
            {"token_budget": 120},
            id="interleaved pipeline, the branching group split",
        ),
        pytest.param(
            ParallelConfig(context_parallel_size=2), 2, {}, id="context and data parallelism"
        ),
        pytest.param(
            ParallelConfig(),
            1,
            {"token_budget": 120, "packing": {**ALWAYS, "share_across_microbatches": True}},
            id="the branching group as a series",
        ),
    ],
)
def test_turns_that_are_seen_and_not_trained_and_responses_that_share_turns(
    tool: ModuleType,
    capfd: pytest.CaptureFixture[str],
    parallel: ParallelConfig,
    data: int,
    options: dict[str, Any],
) -> None:
    report = tool.verify(
        model=small_model(tool),
        shapes=SHAPES_OF_TURNS,
        parallel=parallel,
        data_parallel_size=data,
        **{"packing": ALWAYS, **options},
    )
    assert_exact(tool, report)
    text = capfd.readouterr().out
    if "packing" in options:
        assert int(re.search(r"(\d+) series of rows", text)[1]) == 1
    elif parallel.model_parallel_size == 1:
        # 10 + 49 of the turns that four responses share, which are computed once; nothing else.
        packed = 10 + (49 + 3 + 10 + 4 + 7 + 4 + 2 + 7) + 4 + 20 + 5 + 19 + 11
        assert f", {packed} packed;" in text
        labels, trained = 9 + 3 + 7 + 4 + 6 + 4 + 2 + 7 + 7 + 4 + 11, 69 + 7 + 4 + 11
        assert f"; {labels} positions through the output layer, for {trained} trained" in text


# Two groups over the budget of 34, one of them with a response that fits beside its prompt exactly;
# one that fits, one with a one-token prompt, and one of a single response.
@pytest.mark.parametrize(
    ("transformer", "parallel", "data", "options"),
    [
        pytest.param(
            {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24},
            ParallelConfig(),
            1,
            {
                "objective": "gspo",
                "recompute": "selective",
                "packing": {**SERIES, "trim_last_layer": False},
            },
            id="experts, a sequence-level ratio, selective recompute, a whole last layer",
        ),
        pytest.param(
            {},
            ParallelConfig(tensor_model_parallel_size=2),
            1,
            {"recompute": "full"},
            id="tensor and sequence parallelism with full recompute",
        ),
        pytest.param(
            {},
            ParallelConfig(),
            2,
            {"optimizer_steps": 3},
            id="two data-parallel ranks and the distributed optimizer",
        ),
        pytest.param(
            {"window_size": [4, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
            ParallelConfig(tensor_model_parallel_size=2),
            1,
            {"recompute": "full"},
            id="sliding windows and sinks",
            marks=pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14 refuses them"),
        ),
    ],
)
def test_pieces_of_a_large_group_that_run_its_prompt_once(
    tool: ModuleType,
    capfd: pytest.CaptureFixture[str],
    transformer: dict[str, Any],
    parallel: ParallelConfig,
    data: int,
    options: dict[str, Any],
) -> None:
    report = tool.verify(
        model=small_model(tool, **transformer),
        shapes=SHAPES_OVER_THE_BUDGET,
        parallel=parallel,
        data_parallel_size=data,
        token_budget=34,
        **{"packing": SERIES, **options},
    )
    assert_exact(tool, report)
    assert int(re.search(r"(\d+) series of rows", capfd.readouterr().out)[1]) == 2


def test_what_is_proved_is_the_packing_of_a_run_unless_said_otherwise(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # A prompt that pays for its sharing, and one that does not.
    shapes = [{"prefix": 60, "responses": [5, 9, 3, 7]}, {"prefix": 3, "responses": [30, 20]}]
    texts = {}
    for name, packing in (("run", {}), ("always", ALWAYS)):
        report = tool.verify(
            model=small_model(tool), shapes=shapes, parallel=ParallelConfig(), packing=packing
        )
        assert_exact(tool, report)
        texts[name] = capfd.readouterr().out
    assert "1 packed without sharing" in texts["run"]
    assert "0 packed without sharing" in texts["always"]
    assert f"{59 + 24 + 2 * 2 + 50} packed;" in texts["run"]
    assert f"{59 + 24 + 2 + 50} packed;" in texts["always"]


def test_options_of_packing_are_passed_on_only_where_they_are_given(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tool, "verify", lambda **o: found.append(o["packing"]) or {"ok": True})
    assert _main(tool, monkeypatch) == 0
    arguments = ["--share-always", "--whole-last-layer", "--sharing", "everything"]
    assert _main(tool, monkeypatch, *arguments) == 0
    assert _main(tool, monkeypatch, "--share-across-microbatches") == 0
    everything = {"sharing": "everything", "trim_last_layer": False}
    assert found == [{}, {**ALWAYS, **everything}, {"share_across_microbatches": True}]


def test_a_weight_that_is_off_by_a_millionth_is_found(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tool.spawn

    def disturb(job: str, *args: Any) -> Any:
        result = original(job, *args)
        if job == "reference":
            result["initial"]["decoder.layers.self_attention.linear_proj.weight"][1] *= 1 + 1e-6
        return result

    monkeypatch.setattr(tool, "spawn", disturb)
    report = tool.verify(model=small_model(tool), shapes=SHAPES[:2], parallel=ParallelConfig())
    assert not report["ok"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "FAILED: see the rows above"
    assert re.fullmatch(r"  log-probabilities, absolute +\S+ +1e-10  FAILED", lines[-4])
    # Small, and still far above what it accepts.
    for name in ("logprob_abs", "grad_rel", "param_rel"):
        assert tool.TOLERANCES["float64"][name] < report[name] < 1e-2, name


def _main(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verify_equivalence.py", *arguments])
    return tool.main()


def test_the_last_line_is_the_report_and_a_failure_the_exit_status(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"loss_rel": 0.0, "logprob_abs": 0.0, "grad_rel": 1.0, "param_rel": 0.0, "ok": False}
    monkeypatch.setattr(tool, "verify", lambda **options: report)
    assert _main(tool, monkeypatch) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    report["ok"] = True
    assert _main(tool, monkeypatch) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefix: 3", r"expected a list of {prefix: int, responses: [int, ...]}"),
        ("[]", r"expected a list of {prefix: int, responses: [int, ...]}"),
        ("[{prefix: 3, responses: [1]}, {prefix: 0, responses: [1]}]", "entry 1 is {'prefix': 0,"),
        ("[{prefix: 3, responses: []}]", "entry 0 is {'prefix': 3, 'responses': []}"),
        ("[{prefix: 3, responses: [1, 0]}]", "entry 0 is {'prefix': 3, 'responses': [1, 0]}"),
        ("[{prefix: 3, responses: [1], reward: 1}]", "entry 0 is {'prefix': 3,"),
        ("[{prefix: 3}]", "entry 0 is {'prefix': 3}"),
        ("[{prefix: 3, responses: [[{seen: 2}]]}]", "with a trained one"),
        ("[{prefix: 3, responses: [{seen: 2}]}]", "entry 0 is {'prefix': 3,"),
        ("[{prefix: 3, responses: [{turns: [1], then: []}]}]", "entry 0 is {'prefix': 3,"),
        ("[{prefix: 3, responses: [{turns: [1], then: [[{seen: 1}]]}, [{seen: 0}, 1]]}]", "0 is"),
        ("[{prefix: 3, responses: [[1, [2]]]}]", "entry 0 is {'prefix': 3,"),
        ("[{prefix: 3, responses: [200]}]", "entry 0: "),
        ("[{prefix: ", "not readable as YAML"),
    ],
)
def test_wrong_shapes_end_with_status_2_and_name_the_entry(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    monkeypatch.setattr(tool, "verify", lambda **options: pytest.fail("it went on"))
    path = tmp_path / "shapes.yaml"
    path.write_text(text)
    assert _main(tool, monkeypatch, "--shapes", str(path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"verify_equivalence: {path}: ") and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vpp", "2"], "virtual_pipeline_model_parallel_size: 2 needs"),
        (["--tp", "0"], "tensor_model_parallel_size: 0 must be at least 1"),
        (["--tp", "3"], "num_attention_heads (8) must be a multiple"),
        (["--pp", "3"], "num_layers: 4 does not divide by the 3 pipeline stages"),
        (["--ep", "2", "--dp", "2"], "parallel.expert_model_parallel_size: 2 needs"),
        (["--dp", "0"], "dp: 0 must be at least 1"),
        (["--set", "correction.kind=drop"], "objective.correction.kind: expected one of truncate"),
        (["--set", "zero_advantages=resample"], "zero_advantages: resample is the trainer's"),
        (["--set", "dual_clip"], "override 'dual_clip': write it as section.key=value"),
        (["--model", "missing.yaml"], "missing.yaml"),
        (["--share-across-microbatches", "--pp", "2"], "parallel.pipeline_model_parallel_size: 2"),
        (["--share-across-microbatches", "--sharing", "everything"], "with sharing: everything"),
    ],
)
def test_an_impossible_layout_ends_with_status_2(
    tool: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(tool, "verify", lambda **options: pytest.fail("it went on"))
    assert _main(tool, monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("verify_equivalence: ") and message in error, error
