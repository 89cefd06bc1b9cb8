"""Runs of a model with multi-token prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.layers.predicting_model import is_prediction_layer
from megatron_prefix.model.full_tensors import FullTensors, full_parameters
from tests.megatron.models import HAS_PREDICTIONS
from tests.training.runs import (
    good_records,
    read_rows,
    run_values,
    trainer,
    without_times,
    write_records,
)

if not HAS_PREDICTIONS:
    pytest.skip("megatron-core before 0.16 has another model", allow_module_level=True)


def _train(values: dict[str, Any]) -> tuple[FullTensors, int]:
    """A run: its whole parameters, and how often its MTP layer ran."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with trainer(values) as run:
        (layer,) = (m for m in run.chunks.bare[0].modules() if is_prediction_layer(type(m)))
        layer.register_forward_hook(count)
        run.run()
        parameters = full_parameters(run.chunks)
        assert parameters is not None
        return parameters, calls


def test_a_run_learns_to_predict_further_tokens_and_continues_where_it_ended(
    tmp_path: Path,
) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(2))

    def values(name: str, steps: int) -> dict[str, Any]:
        # Old and reference log-probabilities take part: two optimizer steps, and a KL term.
        found = run_values(
            tmp_path / name,
            records=records,
            training={"steps": steps, "optimizer_steps_per_rollout": 2},
            objective={"kl_coefficient": 0.1},
            optimizer={"lr": 5e-3},
        )
        found["model"]["transformer"] |= {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 1.0}
        return found

    whole, calls = _train(values("whole", 4))
    # Each optimizer step has a group, which fits into a microbatch; other passes leave it out.
    assert calls == 4 * 2
    _train(values("parts", 2))
    parts, _ = _train(values("parts", 4))
    assert whole.keys() == parts.keys()
    assert any(name.startswith("mtp.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
    rows = [without_times(row) for row in read_rows(tmp_path / "parts")]
    assert rows == [without_times(row) for row in read_rows(tmp_path / "whole")]
    losses = [row["mtp_loss"] for row in rows]
    # ln 64 is 4.16; the same groups come again in each step.
    assert 4.0 < losses[0] < 4.5
    assert losses == sorted(losses, reverse=True)


def test_a_run_continues_as_the_model_that_its_checkpoint_holds(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(2))

    def values(**changes: Any) -> dict[str, Any]:
        found = run_values(tmp_path / "run", records=records, training={"steps": 1})
        found["model"]["transformer"] |= {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.1}
        for name, value in changes.items():
            section = found["model"] if name == "rotary_base" else found["model"]["transformer"]
            section[name] = value
        return found

    with trainer(values()) as run:
        run.run()
    for name, value, fault in (
        ("mtp_num_layers", None, r"mtp_num_layers: None, but .* made for 2 \(.*trainer\.json\)"),
        ("mtp_num_layers", 1, r"mtp_num_layers: 1, but .* made for 2"),
        ("rotary_base", 500, r"rotary_base: 500, but .* made for 10000"),
    ):
        with pytest.raises(ValueError, match=fault), trainer(values(**{name: value})):
            pass
    with trainer(values(mtp_loss_scaling_factor=1.0)) as run:
        assert run.step == 1


def test_throughput_counts_predictions_where_they_run(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", good_records(2))
    teraflops = {}
    for name, depths, penalty in (("plain", None, 0.0), ("mtp", 2, 0.0), ("reference", 2, 0.1)):
        values = run_values(
            tmp_path / name,
            records=records,
            training={"steps": 1, "trim_last_layer": False},
            objective={"kl_coefficient": penalty},
        )
        values["model"]["transformer"]["mtp_num_layers"] = depths
        with trainer(values) as run:
            run.run()
        (row,) = read_rows(tmp_path / name)
        teraflops[name] = row["tflops_per_second_per_gpu"] * row["train_seconds"]
    # A depth is more than one of the two layers: it has a projection and an output layer.
    assert teraflops["mtp"] > 2 * teraflops["plain"]
    # A pass of the reference policy leaves predictions out; training is three passes.
    of_reference = teraflops["reference"] - teraflops["mtp"]
    assert of_reference == pytest.approx(teraflops["plain"] / 3, rel=1e-6)
