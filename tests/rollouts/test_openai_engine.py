"""The `openai` engine against a real server: `transformers serve`, on loopback."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_prefix.rollouts.build import build_engine
from megatron_prefix.rollouts.engine import EndOfRollouts
from megatron_prefix.rollouts.parts import RolloutParts
from megatron_prefix.rollouts.server.answers import ServerMismatch
from megatron_prefix.rollouts.server.client import ServerError
from megatron_prefix.training.trainer import Trainer
from tests.rollouts.asking import completion, ids_choice
from tests.rollouts.files import plain
from tests.rollouts.replies import Reply, Request, reply_server
from tests.rollouts.servers import (
    DIGITS,
    END,
    TransformersServer,
    save_word_tokenizer,
    transformers_server,
)
from tests.training.runs import read_rows, trainer

OUTAGE_S = 10.0


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    """The quickstart's task, with one worked example in each prompt instead of ten."""
    path = Path(__file__).parents[2] / "examples" / "quickstart" / "make_data.py"
    spec = importlib.util.spec_from_file_location("quickstart_make_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SHOTS = 1
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory, quickstart) -> Path:
    """Rollouts for the warm start, as token ids; prompts and answers for GRPO, as text."""
    folder = tmp_path_factory.mktemp("quickstart")
    rng = random.Random(0)
    queries = list(itertools.permutations(range(10), 3))
    rng.shuffle(queries)
    warm_start = quickstart.make_prompts(queries, queries, 3000, rng)
    quickstart.write(folder / "warm_start.jsonl", map(quickstart.add_responses, warm_start))
    for name, count in (("grpo", 1000), ("evaluation", 240)):
        records = quickstart.make_prompts(queries, queries, count, rng)
        quickstart.write(
            folder / f"{name}.jsonl",
            ({"prompt": text(r["prompt"]), "answer": text(r["answer"][:-1])} for r in records),
        )
    save_word_tokenizer(folder / "tokenizer", DIGITS, ";")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TransformersServer]:
    with transformers_server(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """Tables of prompts go where the tests' files go."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def text(tokens: list[int]) -> str:
    return " ".join(DIGITS[token] for token in tokens)


def run_values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": {
            "vocab_size": len(DIGITS),
            "max_sequence_length": 64,
            "transformer": {
                "num_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 192,
                "gated_linear_unit": True,
                "init_method_std": 0.1,
            },
        },
        "training": {"steps": 1, "token_budget": 4096, "dtype": "float32", "device": "cpu"},
        "output": {"directory": str(folder), "tensorboard": False, "plot": False},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return values


def rollouts(data: Path, url: str, **changes: Any) -> dict[str, Any]:
    server = {"url": url, "kind": "transformers", "concurrency": 8, **changes.pop("server", {})}
    return {
        "engine": "openai",
        "paths": [str(data / "grpo.jsonl")],
        "groups_per_step": 6,
        "group_size": 8,
        "reward": "exact_match",
        "max_response_length": 6,
        "text": {"tokenizer": str(data / "tokenizer")},
        "server": server,
        **changes,
    }


class Interruption:
    """Kills the server in the middle of a step's requests, and starts it again `OUTAGE_S` later."""

    def __init__(self, server: TransformersServer, *, at_step: int) -> None:
        self._server = server
        self._at_step = at_step
        self._left: int | None = None
        self.began = self.ended = 0.0
        self._thread = threading.Thread(target=self._restart)

    def watch(self, run: Trainer) -> None:
        next_rollouts, send = run.engine.next_rollouts, run.engine.sampler.client.send

        def watched_rollouts(num_groups: int, *, step: int) -> Any:
            if step == self._at_step:
                self._left = 10
            return next_rollouts(num_groups, step=step)

        def watched_send(method: str, path: str, *body: Any, **options: Any) -> Any:
            if self._left is not None and path == "/v1/completions":
                self._left -= 1
                if self._left == 0:
                    self._server.kill()
                    self.began = time.monotonic()
                    self._thread.start()
            return send(method, path, *body, **options)

        run.engine.next_rollouts, run.engine.sampler.client.send = watched_rollouts, watched_send

    def _restart(self) -> None:
        time.sleep(OUTAGE_S)
        self._server.start()
        self.ended = time.monotonic()

    def join(self) -> None:
        self._thread.join()


def test_grpo_on_the_servers_rollouts_learns_and_an_outage_costs_time_only(
    data, server, tmp_path, caplog
):
    """Weights are handed over before every step; the server is away for 10 s in the middle."""
    caplog.set_level(logging.WARNING, logger="megatron_prefix.rollouts.server.client")
    warm_start = run_values(
        tmp_path / "warm_start",
        training={"steps": 200},
        optimizer={"lr": 5e-3, "lr_warmup_steps": 10, "lr_decay_style": "cosine"},
        objective={"name": "supervised"},
        rollouts={"paths": [str(data / "warm_start.jsonl")], "groups_per_step": 32},
    )
    with trainer(warm_start) as run:
        run.run()

    steps = 18
    grpo = run_values(
        tmp_path / "grpo",
        training={"steps": steps, "optimizer_steps_per_rollout": 2},
        optimizer={"lr": 1e-3},
        rollouts=rollouts(data, server.url),
        evaluation={
            "paths": [str(data / "evaluation.jsonl")],
            "num_prompts": 240,
            "temperature": 1.0,
        },
        output={"load": str(tmp_path / "warm_start" / "checkpoints")},
    )
    with trainer(grpo) as run:
        interruption = Interruption(server, at_step=steps // 2)
        interruption.watch(run)
        run.run()
        interruption.join()

    rows = read_rows(tmp_path / "grpo")
    assert [row["step"] for row in rows] == list(range(steps + 1))
    before, after = rows[0]["eval"], rows[-1]["eval"]
    rows = rows[1:]
    # The warm start teaches six answers alike, of which one is right.
    assert before < 0.4
    assert after > max(0.5, before + 0.2)
    # Every batch comes from the weights of its own step, whole and without a response to spare.
    assert [row["policy_version"] for row in rows] == list(range(steps))
    for name in ("staleness", "stale_groups", "dropped_groups"):
        assert {row[name] for row in rows} == {0.0}
    assert {row["tokens_from_text"] for row in rows} == {1.0}
    assert interruption.ended - interruption.began >= OUTAGE_S
    assert rows[steps // 2]["server_retries"] > 0
    assert {row["server_retries"] for row in rows[: steps // 2]} == {0.0}
    assert "trying again" in caplog.text
    # Older versions are not kept.
    assert sorted(path.name for path in (tmp_path / "grpo" / "policy").iterdir()) == [
        f"version_{steps - 2:06d}",
        f"version_{steps - 1:06d}",
    ]


def test_the_server_samples_from_exactly_the_weights_that_were_handed_over(data, server, tmp_path):
    """At next to no temperature it gives the trained model's own likeliest tokens."""
    cold = {"temperature": 1e-4, "group_size": 2, "groups_per_step": 4}
    values = run_values(
        tmp_path, rollouts=rollouts(data, server.url, **cold), objective={"temperature": 1e-4}
    )
    with trainer(values) as run:
        groups = plain(run.engine.next_rollouts(4, step=0))
        embedded = {**values["rollouts"], "engine": "embedded"}
        del embedded["server"]
        from megatron_prefix.config import RunConfig
        from megatron_prefix.config.loader import load_dataclass

        config = load_dataclass(RunConfig, {**values, "rollouts": embedded})
        parts = RolloutParts(config, is_main=True)
        own = plain(build_engine(parts, run.chunks, run.runtime).next_rollouts(4, step=0))
        run.engine.close()
    assert [group.prompt for group in groups] == [group.prompt for group in own]
    assert [group.answer for group in groups] == [group.answer for group in own]
    assert [group.responses for group in groups] == [group.responses for group in own]


def test_a_resumed_engine_asks_for_the_prompts_that_come_next(data, server, tmp_path):
    few = {"group_size": 2, "groups_per_step": 2, "epochs": 1}
    values = run_values(tmp_path, rollouts=rollouts(data, server.url, **few))
    with trainer(values) as run:
        first = plain(run.engine.next_rollouts(2, step=0))
        state = json.loads(json.dumps(run.engine.state_dict()))
        expected = plain(run.engine.next_rollouts(2, step=1))
        run.engine.close()
    with trainer(values) as run:
        run.engine.load_state_dict(state)
        found = plain(run.engine.next_rollouts(2, step=1))
        run.engine.close()
        with pytest.raises(ValueError, match="the order of the prompts has changed"):
            run.engine.load_state_dict({**state, "shuffle_seed": 1})
    assert [group.source for group in found] == [group.source for group in expected]
    assert {group.source for group in found}.isdisjoint(group.source for group in first)
    assert {group.policy_version for group in found} == {1}


def test_a_tokenizer_that_is_not_the_servers_is_found_out(data, server, tmp_path):
    """The server's prompts are counted; here it makes one token of what are three to the run."""
    folder = tmp_path / "policy" / "version_000000"
    values = run_values(tmp_path, rollouts=rollouts(data, server.url, groups_per_step=1))
    with trainer(values) as run:
        write = run.engine.sampler.folders.write

        def other_tokenizer(version: int) -> Path:
            path = write(version)
            words = [*DIGITS[:-2], "##", "<unknown>"]
            save_word_tokenizer(folder, words, ";")
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokenizer["pre_tokenizer"] = None
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
            return path

        run.engine.sampler.folders.write = other_tokenizer
        with pytest.raises(ServerMismatch, match=r"grpo.jsonl:\d+: prompt: .* counts"):
            run.engine.next_rollouts(1, step=0)
        run.engine.close()


def test_a_folder_that_the_server_cannot_load_is_an_error_in_its_words(data, server, tmp_path):
    values = run_values(tmp_path, rollouts=rollouts(data, server.url))
    with trainer(values) as run:
        write = run.engine.sampler.folders.write

        def broken(version: int) -> Path:
            path = write(version)
            (path / "model.safetensors").write_bytes(b"nothing")
            return path

        run.engine.sampler.folders.write = broken
        with pytest.raises(ServerError, match=r"loading .*version_000000 failed: .*header"):
            run.engine.next_rollouts(1, step=0)
        run.engine.close()


def sglang(request: Request) -> Reply:
    if request.path == "/v1/models":
        return Reply(body={"object": "list", "data": [{"id": "policy"}]})
    if request.path == "/update_weights_from_disk":
        return Reply(body={"success": True, "message": "ok"})
    prompt = request.body["prompt"]
    choices = [ids_choice(i, [1, 2, END], prompt) for i in range(request.body["n"])]
    return Reply(body=completion(choices, len(prompt), 3 * len(choices)))


def test_batches_sampled_ahead_carry_their_version_and_too_old_ones_are_sampled_again(
    data, tmp_path
):
    """Weights every second step and a batch ahead: every other one would be two versions old."""
    with reply_server(sglang) as server:
        values = run_values(
            tmp_path,
            rollouts=rollouts(
                data,
                server.url,
                server={"kind": "sglang", "prefetch": True},
                weights={"every": 2, "max_staleness": 1, "keep": 5},
                groups_per_step=2,
                epochs=1,
            ),
        )
        sources: list[str] = []
        seen = []
        with trainer(values) as run:
            for step in range(5):
                groups = plain(run.engine.next_rollouts(2, step=step))
                sources += [group.source for group in groups]
                found = run.engine.metrics()
                seen.append((found["policy_version"], found["staleness"], found["stale_groups"]))
                assert {group.policy_version for group in groups} == {int(seen[-1][0])}
            run.engine.close()
        loaded = [r.body["weight_version"] for r in server.requests if "weight" in r.path]
    # At step 2 and 4 the batch under way is of the version two steps ago.
    assert seen == [(0, 0, 0), (0, 1, 0), (2, 0, 2), (2, 1, 0), (4, 0, 2)]
    assert loaded == ["0", "2", "4"]
    # None is left out or comes twice.
    with trainer(
        {**values, "rollouts": {**values["rollouts"], "server": {"url": "http://x"}}}
    ) as run:
        expected = [prompt.source for prompt in run.engine.source.take(10)]
        with pytest.raises(EndOfRollouts):
            run.engine.source.take(1000)
        run.engine.close()
    assert sources == expected
