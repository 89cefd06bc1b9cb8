"""The engines that sample from exported weights, on one rank and on two."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import load_dataclass
from megatron_prefix.rollouts.build import build_engine
from megatron_prefix.rollouts.parts import RolloutParts
from megatron_prefix.rollouts.records import RolloutBatch, RolloutGroup
from megatron_prefix.training.minibatch import build_minibatch
from megatron_prefix.training.step import compute_logprobs
from megatron_prefix.training.trainer import Trainer
from tests.distributed import run_distributed
from tests.rollouts.asking import completion, ids_choice
from tests.rollouts.files import plain, write
from tests.rollouts.replies import Reply, Request, reply_server
from tests.rollouts.servers import DIGITS, END, save_word_tokenizer
from tests.training.runs import TENSOR, trainer

PROMPTS = [{"prompt": [n, 1, 2, 10, 3, n, 10], "answer": [n, END]} for n in range(5)]


def run_values(folder: Path, *, parallel: dict[str, int], **rollouts: Any) -> dict[str, Any]:
    return {
        "model": {
            "vocab_size": len(DIGITS),
            "max_sequence_length": 32,
            "transformer": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 48,
                "gated_linear_unit": True,
                "add_qkv_bias": True,
                "init_method_std": 0.3,
            },
        },
        "parallel": parallel,
        "training": {
            "steps": 1,
            "token_budget": 256,
            "dtype": "float32",
            "device": "cpu",
            "timeout_minutes": 1,
        },
        "objective": {"temperature": rollouts.get("temperature", 1.0)},
        "rollouts": {
            "engine": "hf",
            "paths": [str(folder / "prompts.jsonl")],
            "group_size": 3,
            "groups_per_step": 2,
            "reward": "exact_match",
            "max_response_length": 5,
            "stop_tokens": [END],
            **rollouts,
        },
        "output": {"directory": str(folder / "run"), "tensorboard": False, "plot": False},
    }


def embedded_groups(run: Trainer, values: dict[str, Any], count: int) -> list[RolloutGroup]:
    rollouts = {k: v for k, v in values["rollouts"].items() if k != "server"}
    config = load_dataclass(RunConfig, {**values, "rollouts": {**rollouts, "engine": "embedded"}})
    parts = RolloutParts(config, is_main=run.runtime.is_main)
    engine = build_engine(parts, run.chunks, run.runtime)
    batch = engine.next_rollouts(count, step=0)
    engine.close()
    return groups_on_rank_0(batch)


def groups_on_rank_0(batch: RolloutBatch | None) -> list[RolloutGroup]:
    """The groups where they are, and none elsewhere."""
    assert (batch is None) == (dist.get_rank() != 0)
    return [] if batch is None else plain(batch)


def comparable(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    return [dataclasses.replace(g, old_logprobs=None, policy_version=None) for g in groups]


def test_transformers_samples_with_the_trained_models_log_probabilities(tmp_path):
    write(tmp_path / "prompts.jsonl", PROMPTS)
    with trainer(run_values(tmp_path, parallel={})) as run:
        groups = plain(run.engine.next_rollouts(2, step=0))
        minibatch = build_minibatch(
            groups,
            run.config.objective,
            run.update.packing,
            attention=run.update.attention,
            data_parallel_rank=0,
        )
        own = compute_logprobs(run.chunks, minibatch.batches, run.config.objective)
        for batch, found in zip(minibatch.batches, own, strict=True):
            # float32 on both sides, by different code.
            torch.testing.assert_close(batch.old_logprobs.to(found), found, rtol=0, atol=1e-4)
        for group in groups:
            assert group.policy_version == 0
            assert len(group.responses) == 3
            for response, finished in zip(group.responses, group.finished, strict=True):
                assert finished == (response[-1] == END)
                assert END not in response[:-1]
                assert finished or len(response) == 5
        state = run.engine.state_dict()
        later = plain(run.engine.next_rollouts(2, step=1))
        run.engine.load_state_dict(state)
        assert plain(run.engine.next_rollouts(2, step=1)) == later
        assert run.engine.metrics() == {"policy_version": 1.0, "staleness": 0.0}
        run.engine.close()


def sample_on_ranks(rank: int, world_size: int, folder: str, url: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    values = run_values(Path(folder), parallel=TENSOR, temperature=1e-4)
    with trainer(values) as run:
        found["hf"] = comparable(groups_on_rank_0(run.engine.next_rollouts(3, step=0)))
        found["embedded"] = comparable(embedded_groups(run, values, 3))
        run.engine.close()
    server = {"url": url, "kind": "sglang", "patience_s": 1.0, "max_attempts": 1}
    values = run_values(Path(folder), parallel=TENSOR, engine="openai", server=server)
    with trainer(values) as run:
        found["openai"] = groups_on_rank_0(run.engine.next_rollouts(2, step=0))
        try:
            run.engine.next_rollouts(2, step=1)
        except ValueError as error:
            found["error"] = str(error)
        found["state"] = run.engine.state_dict()
        run.engine.close()
    values["rollouts"] |= {
        "reward": None,
        "paths": [str(Path(folder) / "tasks.jsonl")],
        "stop_tokens": list(range(len(DIGITS))),
        "text": {"tokenizer": str(Path(folder) / "tokenizer")},
        "agent": {"environment": "tests.rollouts.user_environments:echo"},
    }
    values["evaluation"] = {"paths": values["rollouts"]["paths"], "num_prompts": 3}
    with trainer(values) as run:
        found["eval"] = [(run.evaluator.evaluate(), run.evaluator.metrics()) for _ in range(2)]
        run.engine.close()
    return found


def test_one_rank_asks_and_gets_the_groups_and_all_get_the_errors(tmp_path):
    """Two tensor-parallel ranks; the weights that transformers loads are both ranks' together.

    An agent's evaluation has its environment on one rank too.
    """
    write(tmp_path / "prompts.jsonl", PROMPTS)
    tasks = [{"messages": [{"role": "user", "content": f"{n} 1 ?"}]} for n in range(3)]
    write(tmp_path / "tasks.jsonl", [{**tasks[0], "answer": "crash"}, *tasks[1:]])
    folder = save_word_tokenizer(tmp_path / "tokenizer", DIGITS, ";")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}; {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )

    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply(body={"object": "list", "data": [{"id": "policy"}]})
        if request.path == "/update_weights_from_disk":
            if request.body["weight_version"] == "1":
                return Reply(status=400, body={"success": False, "message": "out of memory"})
            return Reply(body={"success": True, "message": "ok"})
        prompt, n = request.body["prompt"], request.body["n"]
        choices = [ids_choice(i, [prompt[0], END], prompt) for i in range(n)]
        return Reply(body=completion(choices, len(prompt), 2 * n))

    with reply_server(answer) as server:
        first, second = run_distributed(sample_on_ranks, 2, str(tmp_path), server.url, timeout=150)
        asked = [request.path for request in server.requests]
    assert first["hf"] == first["embedded"]
    assert [second[engine] for engine in ("hf", "embedded", "openai")] == [[], [], []]
    assert first["error"] == second["error"]
    assert [group.rewards for group in first["openai"]] == [(1.0,) * 3] * 2
    assert {group.policy_version for group in first["openai"]} == {0}
    assert (
        "/update_weights_from_disk: refused with 400 Bad Request: out of memory" in first["error"]
    )
    assert first["eval"] == second["eval"]
    (score, metrics), again = first["eval"]
    assert (score, metrics) == again
    # Each first turn has a quarter; the environment of the first task breaks at its second turn.
    assert score == 0.5 / 3
    assert metrics == {"eval_turns": 2.0, "eval_environment_failures": 1.0}
    # What went wrong has used up no prompt.
    assert first["state"]["number"] == 2
    # One to find out what the server can do, one for each group, three to tell equal responses from
    # copies of one, and one for the log-probabilities before the next weights.
    assert asked.count("/v1/completions") == 7


@pytest.mark.parametrize("experts", [None, {"moe_router_topk": 2, "qk_layernorm": True}])
def test_every_tensor_reaches_transformers(tmp_path, experts):
    """Dense with biases, and experts: greedy tokens are those of the trained model."""
    write(tmp_path / "prompts.jsonl", PROMPTS)
    values = run_values(tmp_path, parallel={}, temperature=1e-4)
    if experts is not None:
        values["model"]["transformer"] |= {
            **experts,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 24,
            "add_qkv_bias": False,
        }
    with trainer(values) as run:
        with torch.no_grad():
            for _, parameter in run.chunks.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        groups = plain(run.engine.next_rollouts(4, step=0))
        assert comparable(groups) == comparable(embedded_groups(run, values, 4))
        assert len({response for group in groups for response in group.responses}) > 1
        run.engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_percent": 0.5}, "model.rotary_percent: 0.5 is nothing that a Hugging Face"),
        ({"activation": "gelu"}, "model.activation: 'gelu' is nothing that a Hugging Face"),
    ],
)
def test_a_model_without_a_hugging_face_form_is_refused_by_its_option(tmp_path, changes, message):
    write(tmp_path / "prompts.jsonl", PROMPTS)
    values = run_values(tmp_path, parallel={})
    values["model"] |= changes
    with pytest.raises(ValueError, match=message), trainer(values):
        pass
