"""A run that replays the routes of its records is the run of every response alone with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.config.loader import ConfigError
from megatron_prefix.megatron.releases import replays_routes
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from tests.distributed import run_distributed
from tests.megatron.models import relative_error
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records

EXPERTS, TOPK, LAYERS = 6, 2, 2


def _records(count: int) -> list[dict[str, Any]]:
    """The last response of each group goes ways of its own from its prompt's fourth token on."""
    rng = np.random.default_rng(1)
    records = good_records(count)
    for record in records:
        length = len(record["prompt"])
        drawn = rng.random((length + 8, LAYERS, EXPERTS)).argsort(-1)[..., :TOPK]
        routes = [drawn[: length + len(r) - 1].copy() for r in record["responses"]]
        routes[-1][4:] = (routes[-1][4:] + 1) % EXPERTS
        record["routed_experts"] = [of.reshape(-1).tolist() for of in routes]
    return records


def _with_prompts_of_first(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    changed = []
    for record in records:
        ids = len(record["prompt"]) * LAYERS * TOPK
        first = record["routed_experts"][0][:ids]
        changed.append(
            {**record, "routed_experts": [first + of[ids:] for of in record["routed_experts"]]}
        )
    return changed


def _values(folder: Path, name: str, records: str, **training: Any) -> dict[str, Any]:
    values = run_values(
        folder / name,
        records=folder / f"{records}.jsonl",
        training={
            "steps": 1,
            "dtype": "float64",
            "optimizer_steps_per_rollout": 2,
            "share_only_where_it_pays": False,
            **training,
        },
        objective={"kl_coefficient": 0.2},
        output={"save_last": False, "samples": 0},
    )
    values["model"]["transformer"] |= {
        "num_layers": 3,
        "moe_layer_freq": [1, 0, 1],
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_ffn_hidden_size": 16,
        "init_method_std": 0.3,  # so that it matters which experts there are
    }
    return values


RUNS = {
    "exact": ("recorded", {"replayed_routes": "exact"}),
    "alone": ("recorded", {"replayed_routes": "exact", "sharing": "none"}),
    "first": ("recorded", {"replayed_routes": "first"}),
    "first alone": ("first", {"replayed_routes": "exact", "sharing": "none"}),
    "ignored": ("recorded", {"replayed_routes": "ignore"}),
}


def _run_all(rank: int, world_size: int, folder: Path) -> dict[str, FullTensors | None]:
    found = {}
    for name, (records, training) in RUNS.items():
        with trainer(_values(folder, name, records, **training)) as run:
            run.run()
            found[name] = full_parameters(run.chunks)
    return found


@pytest.mark.skipif(not replays_routes(), reason="megatron-core before 0.16")
def test_weights_are_those_of_every_response_alone_with_its_routes(tmp_path: Path) -> None:
    records = _records(4)
    write_records(tmp_path / "recorded.jsonl", records)
    write_records(tmp_path / "first.jsonl", _with_prompts_of_first(records))
    found = run_distributed(_run_all, 2, tmp_path)[0]
    for name, other in (("exact", "alone"), ("first", "first alone")):
        for parameter, expected in found[other].items():
            assert relative_error(found[name][parameter], expected) <= 1e-10, parameter
    router = "decoder.layers.0.mlp.router.weight"
    for name, other in (("exact", "first"), ("exact", "ignored")):
        assert relative_error(found[name][router], found[other][router]) > 1e-6
    rows = {name: read_rows(tmp_path / name) for name in RUNS}
    tokens = {name: rows[name][0]["tokens_computed"] for name in RUNS}
    assert tokens["first"] == tokens["ignored"] < tokens["exact"] < tokens["alone"]
    # The reference has the policy's weights in the first step, but chooses experts by itself.
    assert rows["exact"][0]["kl"] > 10 * rows["ignored"][0]["kl"] > 0


@pytest.mark.skipif(replays_routes(), reason="megatron-core 0.16 and newer")
def test_a_release_without_replay_is_named(tmp_path: Path) -> None:
    write_records(tmp_path / "recorded.jsonl", _records(1))
    values = _values(tmp_path, "run", "recorded", replayed_routes="exact")
    with (
        pytest.raises(ConfigError, match=r"replayed_routes: exact: the routers of megatron-core 0"),
        trainer(values),
    ):
        pass
