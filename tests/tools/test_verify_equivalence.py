"""The proof tool: it passes where it should, and it is able to fail."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.config import ModelConfig, ParallelConfig
from megatron_prefix.config.loader import load_dataclass
from megatron_prefix.megatron.options.attention import params_have_cp_group
from megatron_prefix.megatron.releases import has_global_auxiliary_loss
from tests import fork_server
from tests.megatron.models import HAS_WINDOWS

# One-token prompts and responses, a group of one, very unequal responses.
SHAPES = [
    {"prefix": 11, "responses": [3, 7, 1, 5]},
    {"prefix": 1, "responses": [2, 4]},
    {"prefix": 9, "responses": [6]},
    {"prefix": 5, "responses": [20, 1]},
]


# The shapes are short, so that a run would share few of them: each of these proofs is of sharing.
ALWAYS = {"share_only_where_it_pays": False}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/verify_equivalence.py; its processes come from the tests' server, and find it by the
    path that they inherit."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    fork_server.ensure_running()
    import verify_equivalence

    return verify_equivalence


def _model(tool: ModuleType, **transformer: Any) -> ModelConfig:
    values = {
        **tool.DEFAULT_MODEL,
        "transformer": {**tool.DEFAULT_MODEL["transformer"], "hidden_size": 32, **transformer},
    }
    return load_dataclass(ModelConfig, values)


def _assert_exact(tool: ModuleType, report: dict[str, Any]) -> None:
    assert report["ok"]
    for name, bound in tool.TOLERANCES["float64"].items():
        assert report[name] <= bound


def test_interleaved_pipeline_tensor_parallel_recompute_and_a_split_group(
    tool: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    report = tool.verify(
        model=_model(tool),
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
    _assert_exact(tool, report)
    split = capfd.readouterr().out.split("data-parallel rank, ")[1].split(" groups split")[0]
    assert int(split) >= 1


def test_three_steps_of_the_distributed_optimizer(tool: ModuleType) -> None:
    report = tool.verify(
        model=_model(tool),
        shapes=SHAPES,
        parallel=ParallelConfig(),
        data_parallel_size=2,
        optimizer_steps=3,
        packing=ALWAYS,
    )
    _assert_exact(tool, report)


@pytest.mark.parametrize(("tensor", "expert", "data"), [(1, 2, 2), (2, 1, 1), (2, 2, 1), (2, 2, 2)])
def test_experts_on_ranks(tool: ModuleType, tensor: int, expert: int, data: int) -> None:
    """Spread over ranks, split, and spread over ranks that split the other layers."""
    report = tool.verify(
        model=_model(tool, num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24),
        shapes=SHAPES,
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
        ),
        data_parallel_size=data,
        packing=ALWAYS,
    )
    _assert_exact(tool, report)


@pytest.mark.parametrize("rate", [0.0, 1e-3], ids=["frozen", "moving"])
@pytest.mark.parametrize(
    ("parallel", "data", "recompute"),
    [
        ({}, 1, "none"),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, "none"),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 2}, 1, "full"),
        ({"expert_model_parallel_size": 2}, 2, "none"),
    ],
)
def test_experts_that_a_bias_chooses(
    tool: ModuleType, parallel: dict[str, int], data: int, recompute: str, rate: float
) -> None:
    """Groups of experts, scaled scores and a shared expert, as DeepSeek-V3 has them; by a bias that
    stays as it is, and by one that follows the counts of three steps."""
    report = tool.verify(
        model=_model(
            tool,
            num_moe_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            moe_shared_expert_intermediate_size=16,
            moe_router_score_function="sigmoid",
            moe_router_num_groups=4,
            moe_router_group_topk=2,
            moe_router_topk_scaling_factor=2.5,
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=rate,
        ),
        shapes=[*SHAPES, {"system": 7, "prefix": 3, "responses": [4, 9]}] * 2,
        parallel=ParallelConfig(**parallel),
        data_parallel_size=data,
        recompute=recompute,
        optimizer_steps=3,
        packing=ALWAYS,
    )
    _assert_exact(tool, report)


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
        model=_model(tool),
        shapes=[*SHAPES, *SHAPES_OF_TURNS[:2]],
        parallel=parallel,
        data_parallel_size=data,
        optimizer_steps=2,
        objective=objective,
        objective_options=options,
        packing=ALWAYS,
        seed=1,
    )
    _assert_exact(tool, report)


# Prompts of fewer tokens than chunks, one response far longer than the rest, fewer responses than
# ranks, a group of one, and groups whose prompts begin alike.
SHAPES_OF_RANKS = [
    {"prefix": 5, "responses": [19, 23, 18]},
    {"system": 17, "prefix": 30, "responses": [9, 14, 7]},
    {"system": 17, "prefix": 2, "responses": [41, 3]},
    {"prefix": 22, "responses": [2, 60]},
    {"prefix": 37, "responses": [12]},
]


def test_context_parallel_with_every_kind_pipelines_and_recompute(tool: ModuleType) -> None:
    model = tool.with_comm_types(_model(tool), ["all_gather", "p2p", "a2a"])
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
    _assert_exact(tool, report)


def test_context_parallel_with_tensor_parallel_and_a_sequence_level_ratio(tool: ModuleType) -> None:
    report = tool.verify(
        model=tool.with_comm_types(_model(tool), ["a2a", "p2p"]),
        shapes=SHAPES_OF_RANKS,
        parallel=ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2),
        objective="gspo",
        packing=ALWAYS,
        token_budget=110,
    )
    _assert_exact(tool, report)


def test_four_context_parallel_ranks_with_three_levels_of_sharing(tool: ModuleType) -> None:
    report = tool.verify(
        model=tool.with_comm_types(_model(tool), ["all_gather", "p2p"]),
        shapes=SHAPES_OF_RANKS,
        parallel=ParallelConfig(context_parallel_size=4),
        packing={**ALWAYS, "sharing": "everything"},
    )
    _assert_exact(tool, report)


EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}


@pytest.mark.skipif(not HAS_WINDOWS, reason="megatron-core 0.14, which refuses windows and sinks")
@pytest.mark.parametrize(
    ("keys", "transformer", "parallel", "recompute"),
    [
        pytest.param(
            5,
            {},
            ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2),
            "full",
            id="context and tensor parallelism, recompute",
        ),
        pytest.param(
            64,
            {},
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            "none",
            id="interleaved pipeline",
        ),
        pytest.param(
            5,
            EXPERTS,
            ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
            "none",
            id="context and expert parallelism",
        ),
    ],
)
def test_sliding_windows_on_every_other_layer_with_learnable_sinks(
    tool: ModuleType,
    keys: int,
    transformer: dict[str, Any],
    parallel: ParallelConfig,
    recompute: str,
) -> None:
    model = _model(
        tool,
        window_size=[keys - 1, 0],
        window_attn_skip_freq=2,
        softmax_type="learnable",
        **transformer,
    )
    report = tool.verify(
        model=tool.with_comm_types(model, ["a2a", "a2a", "p2p", "p2p"]),
        shapes=SHAPES_OF_RANKS,
        parallel=parallel,
        recompute=recompute,
        packing={**ALWAYS, "sharing": "everything"},
        optimizer_steps=2,
    )
    _assert_exact(tool, report)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
        ),
        pytest.param(
            ParallelConfig(context_parallel_size=2),
            marks=pytest.mark.skipif(
                not params_have_cp_group(), reason="megatron-core 0.14 and 0.15 refuse it"
            ),
        ),
    ],
    ids=["tensor parallelism and an interleaved pipeline", "context parallelism"],
)
def test_mrope(tool: ModuleType, parallel: ParallelConfig) -> None:
    model = _model(tool, num_attention_heads=4, num_query_groups=2, mrope_section=[1, 2, 1])
    report = tool.verify(
        model=dataclasses.replace(model, position_embedding_type="mrope"),
        shapes=SHAPES_OF_RANKS,
        parallel=parallel,
        packing={**ALWAYS, "sharing": "everything"},
    )
    _assert_exact(tool, report)


# Turns of tools, first, last and in between; responses that share turns with some of their group or
# with none of it; and a group without any.
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
        model=_model(tool),
        shapes=SHAPES_OF_TURNS,
        parallel=parallel,
        data_parallel_size=data,
        **{"packing": ALWAYS, **options},
    )
    _assert_exact(tool, report)
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
SHAPES_OVER_THE_BUDGET = [
    {"prefix": 20, "responses": [3, 7, 1, 5, 6, 2]},
    {"prefix": 1, "responses": [2, 4]},
    {"prefix": 9, "responses": [6, 3]},
    {"prefix": 15, "responses": [20, 1, 9, 11]},
    {"prefix": 12, "responses": [5]},
]
SERIES = {**ALWAYS, "share_across_microbatches": True}


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
        model=_model(tool, **transformer),
        shapes=SHAPES_OVER_THE_BUDGET,
        parallel=parallel,
        data_parallel_size=data,
        token_budget=34,
        **{"packing": SERIES, **options},
    )
    _assert_exact(tool, report)
    assert int(re.search(r"(\d+) series of rows", capfd.readouterr().out)[1]) == 2


def test_what_is_proved_is_the_packing_of_a_run_unless_said_otherwise(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # A prompt that pays for its sharing, and one that does not.
    shapes = [{"prefix": 60, "responses": [5, 9, 3, 7]}, {"prefix": 3, "responses": [30, 20]}]
    texts = {}
    for name, packing in (("run", {}), ("always", ALWAYS)):
        report = tool.verify(
            model=_model(tool), shapes=shapes, parallel=ParallelConfig(), packing=packing
        )
        _assert_exact(tool, report)
        texts[name] = capfd.readouterr().out
    assert "1 packed without sharing" in texts["run"]
    assert "0 packed without sharing" in texts["always"]
    assert f"{59 + 24 + 2 * 2 + 50} packed;" in texts["run"]
    assert f"{59 + 24 + 2 + 50} packed;" in texts["always"]


LOSSES = {"aux_loss": 0.5, "seq_aux_loss": 0.3}
if has_global_auxiliary_loss():
    LOSSES["global_aux_loss"] = 0.4
AUXILIARY_LOSSES = {
    "moe_router_load_balancing_type": list(LOSSES),
    "moe_aux_loss_coeff": list(LOSSES.values()),
}


@pytest.mark.parametrize(
    ("parallel", "data", "options"),
    [
        ({}, 2, {"optimizer_steps": 3}),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, {}),
        ({"context_parallel_size": 2, "expert_model_parallel_size": 2}, 1, {"recompute": "full"}),
        ({}, 1, {"token_budget": 34, "packing": SERIES}),
    ],
    ids=["data parallel", "tensor and pipeline parallel", "context parallel", "series"],
)
def test_losses_of_routers(
    tool: ModuleType, parallel: dict[str, int], data: int, options: dict[str, Any]
) -> None:
    """Means over each microbatch, in which a token counts once for each of its sequences."""
    transformer = {"moe_z_loss_coeff": 0.3}
    if "packing" not in options:  # Rows of a series cannot have the others.
        transformer |= AUXILIARY_LOSSES
    report = tool.verify(
        model=_model(
            tool,
            num_moe_experts=4,
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            **transformer,
        ),
        shapes=SHAPES_OVER_THE_BUDGET,
        parallel=ParallelConfig(**parallel),
        data_parallel_size=data,
        **{"packing": ALWAYS, "token_budget": 70, **options},
    )
    _assert_exact(tool, report)


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
    report = tool.verify(model=_model(tool), shapes=SHAPES[:2], parallel=ParallelConfig())
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
