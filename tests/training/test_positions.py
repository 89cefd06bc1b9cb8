"""A run of a model with mRoPE: of text it is that of rotary embedding, with positions its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from tests.megatron.models import relative_error
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records


def _with_positions(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """As if images lay in the prompt and in one response."""
    positions = [[[9] * len(response)] * 3 for response in record["responses"]]
    positions[1] = rng.integers(0, 20, (3, len(record["responses"][1]))).tolist()
    prompt = rng.integers(0, 20, (3, len(record["prompt"]))).tolist()
    return {**record, "prompt_positions": prompt, "positions": positions}


def _train(folder: Path, name: str, *, mrope: bool, **training: Any) -> FullTensors:
    values = run_values(
        folder / name,
        records=folder / f"{name.split()[0]}.jsonl",
        training={
            "steps": 1,
            "dtype": "float64",
            "optimizer_steps_per_rollout": 2,
            "share_only_where_it_pays": False,
            **training,
        },
        output={"save_last": False, "samples": 0},
    )
    if mrope:
        values["model"]["position_embedding_type"] = "mrope"
        values["model"]["transformer"]["mrope_section"] = [1, 1, 2]
    with trainer(values) as run:
        run.run()
        found = full_parameters(run.chunks)
    assert found is not None
    return found


def test_weights_are_those_of_text_or_of_every_response_alone_with_its_positions(
    tmp_path: Path,
) -> None:
    records = good_records(2)
    for record in records:
        # Its first token is that of another response, which has it in another place.
        record["responses"][1][0] = record["responses"][0][0]
    rng = np.random.default_rng(0)
    write_records(tmp_path / "text.jsonl", records)
    write_records(tmp_path / "images.jsonl", [_with_positions(of, rng) for of in records])
    rope = _train(tmp_path, "text", mrope=False)
    text = _train(tmp_path, "text mrope", mrope=True)
    images = _train(tmp_path, "images", mrope=True, sharing="everything")
    alone = _train(tmp_path, "images alone", mrope=True, sharing="none")
    for name, expected in rope.items():
        assert relative_error(text[name], expected) <= 1e-10, name
        assert relative_error(images[name], alone[name]) <= 1e-10, name
    assert max(relative_error(images[name], text[name]) for name in text) > 1e-6
    shared, repeated = (
        read_rows(tmp_path / name)[0]["tokens_computed"] for name in ("images", "images alone")
    )
    assert shared < repeated
