"""Routes of experts in records: every form gives the same arrays, and what is wrong is named."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.routes import RouteReader, RouteShape
from tests.megatron.models import model_config
from tests.rollouts.files import engine, write

SHAPE = RouteShape(with_experts=(False, True, True), topk=2, num_experts=5)
EXACT = RouteReader(shape=SHAPE, prompts_as_first=False)
PROMPT, RESPONSES = [1, 2, 3], [[4, 5], [6], [7, 8, 9]]


def _routes() -> list[np.ndarray]:
    """Of three responses; the last one's prompt parts from the others' at its third token."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> np.ndarray:
        return rng.random((count, 2, 5)).argsort(-1)[..., :2]

    prompt = drawn(3)
    found = [np.concatenate([prompt, drawn(len(r) - 1)]) for r in RESPONSES]
    found[2][2] = (found[0][2] + 1) % 5
    return found


def _flat(routes: np.ndarray) -> list[int]:
    return routes.reshape(-1).tolist()


def _text(routes: np.ndarray) -> str:
    return base64.b64encode(routes.astype("<i4").tobytes()).decode()


def _all_layers(routes: np.ndarray) -> list[int]:
    """With something in the layer without experts."""
    return _flat(np.concatenate([np.full_like(routes[:, :1], 7), routes], axis=1))


def _record(form: Any, **changes: Any) -> dict[str, Any]:
    routes = [form(of) for of in _routes()]
    return {
        "prompt": PROMPT,
        "responses": RESPONSES,
        "rewards": [1.0, 0.0, 0.5],
        "routed_experts": routes,
    } | changes


def _flat_records(form: Any) -> list[dict[str, Any]]:
    whole = _record(form)
    columns = zip(RESPONSES, whole["rewards"], whole["routed_experts"], strict=True)
    return [
        {"group": "a", "prompt": PROMPT, "response": r, "reward": w, "routed_experts": e}
        for r, w, e in columns
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", [_flat, np.ndarray.tolist, _text, _all_layers])
def test_every_form_gives_the_same_routes(tmp_path: Path, suffix: str, form: Any) -> None:
    whole = write(tmp_path / f"a{suffix}", [_record(form)] * 2)
    parts = write(tmp_path / f"b{suffix}", _flat_records(form))
    batch = engine(whole, parts, routes=EXACT, epochs=1).next_rollouts(3, step=0)
    assert batch is not None and batch.routes is not None and batch.routes.dtype == np.uint8
    for group in batch.groups():
        assert group.routes is not None
        for found, expected in zip(group.routes, _routes(), strict=True):
            assert np.array_equal(found, np.sort(expected))


def test_a_prompt_is_shared_as_far_as_its_routes_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [_record(_flat)] * 2)
    batch = engine(path, routes=EXACT).next_rollouts(2, step=0)
    assert batch is not None
    routes = batch.summary().of_groups(range(1, 2)).prompt_routes
    assert routes is not None
    tree = routes.tree([0, 1, 2], 3, [2, 1, 3])
    assert tree.parents == (-1, 0, 1, 1, 0) and tree.node_lengths.tolist() == [2, 1, 2, 1, 4]
    assert tree.sequences == ((0, 1, 2), (0, 1, 3), (0, 4))
    # The first two of the prompt's three tokens, without the response that comes between them.
    assert routes.tree([0, 2], 3, [2, 3]).sequence_lengths.tolist() == [5, 6]
    assert routes.tree([0, 2], 3, [2, 3]).node_lengths.tolist() == [2, 3, 4]


def test_the_first_response_may_decide_for_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", _flat_records(_flat))
    first = RouteReader(shape=SHAPE, prompts_as_first=True)
    batch = engine(path, routes=first).next_rollouts(1, step=0)
    assert batch is not None
    expected = _routes()
    expected[2][:3] = expected[0][:3]
    assert np.array_equal(batch.routes, np.sort(np.concatenate(expected)))
    routes = batch.summary().prompt_routes
    assert routes is not None
    assert routes.tree([0, 1, 2], 3, [2, 1, 3]).node_lengths.tolist() == [3, 2, 1, 3]


def _changed(response: int, change: Any) -> list[Any]:
    found = [_flat(of) for of in _routes()]
    found[response] = change(found[response])
    return found


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (None, ": missing, and training.replayed_routes replays those of all records"),
        (3, ": 3 is not a list of those of each response"),
        (_changed(0, lambda ids: ids)[:2], ": 2 for 3 responses; there must be one for each"),
        (_changed(1, lambda ids: 3), "[1]: 3 is no list of experts"),
        (
            _changed(1, lambda ids: [*ids, 0]),
            "[1]: 13 experts for 4 tokens of prompt and response;",
        ),
        (_changed(1, lambda ids: [*ids[:-1], 5]), "[1]: token 2: layer 1: expert 5 is none of the"),
        (_changed(2, lambda ids: [-1, *ids[1:]]), "[2]: token 0: layer 0: expert -1 is none of"),
        (_changed(2, lambda ids: [4, 4, *ids[2:]]), "[2]: token 0: layer 0: the experts [4, 4] na"),
        (_changed(2, lambda ids: [0.5, *ids[1:]]), "[2]: [0.5"),
        (_changed(2, lambda ids: "?"), "[2]: not base64 of int32"),
        (_changed(0, lambda ids: [[1], [2, 3]]), "[0]: its lists differ in length"),
        (_changed(0, lambda ids: [[[0, 1]] * 2] * 3), "[0]: [3, 2, 2] experts for 5 tokens"),
    ],
)
def test_what_is_wrong_with_routes_is_named(tmp_path: Path, routes: Any, message: str) -> None:
    record = {k: v for k, v in _record(_flat, routed_experts=routes).items() if v is not None}
    path = write(tmp_path / "a.jsonl", [_record(_flat), record])
    reading = engine(path, routes=EXACT)
    assert reading.next_rollouts(1, step=0) is not None
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: routed_experts{message}")):
        reading.next_rollouts(1, step=0)


def test_routes_that_nobody_asked_for_are_refused_or_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [_record(_flat)])
    with pytest.raises(ValueError, match=r"routed_experts: given, but training.replayed_routes: n"):
        engine(path).next_rollouts(1, step=0)
    ignoring = RecordForms({"routed_experts": "experts"}, ignored=("routed_experts",))
    renamed = {**_record(_flat), "experts": 5}
    del renamed["routed_experts"]
    path = write(tmp_path / "b.jsonl", [_record(_flat), renamed])
    batch = engine(path, forms=ignoring).next_rollouts(2, step=0)
    assert batch is not None and batch.routes is None and not any(batch.records)


def test_the_shape_is_that_of_megatrons_layers() -> None:
    experts = {"num_layers": 4, "num_moe_experts": 300, "moe_layer_freq": 2}
    shape = RouteShape.of_model(model_config(experts))
    assert shape.with_experts == (True, False, True, False) and shape.topk == 2
    assert shape.dtype is np.int16
    listed = {**experts, "moe_layer_freq": [0, 1, 1, 1], "moe_router_topk": 8}
    assert RouteShape.of_model(model_config(listed)).with_experts == (False, True, True, True)
