"""Evaluations: pass@k, a score for each data set, and the checkpoint of the best one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.config import RunConfig
from megatron_prefix.config.loader import ConfigError, load_dataclass
from megatron_prefix.rollouts.embedded.evaluator import EvaluationResult, pass_at_k
from megatron_prefix.training.surroundings import faults_of_surroundings
from megatron_prefix.training.trainer import Trainer
from tests.training.runs import good_records, read_rows, run_values, trainer, write_records


def test_pass_at_k_is_the_share_of_choices_of_k_responses_with_a_right_one() -> None:
    correct = np.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=bool)
    for k in range(1, 6):
        choices = list(itertools.combinations(range(5), k))
        shares = [np.mean([row[list(choice)].any() for choice in choices]) for row in correct]
        assert pass_at_k(correct, k) == pytest.approx(np.mean(shares), abs=1e-12)


def test_a_result_is_reported_by_data_set() -> None:
    result = EvaluationResult(
        rewards=(1.0, 0.0, 0.5, 0.5, 1.0, 2.0), responses_per_prompt=2, data_sets=("a", "b", "a")
    )
    assert (result.mean, result.num_prompts, result.num_correct) == (5 / 6, 3, 3)
    assert result.metrics() == {
        "eval/a": 1.0,
        "eval/b": 0.5,
        "eval_pass_at_1": 0.5,
        "eval_pass_at_1/a": 0.75,
        "eval_pass_at_1/b": 0.0,
        "eval_pass_at_2": pytest.approx(2 / 3),
        "eval_pass_at_2/a": 1.0,
        "eval_pass_at_2/b": 0.0,
    }
    six = EvaluationResult(rewards=(0.0,) * 6, responses_per_prompt=6)
    assert [name for name in six.metrics()] == [f"eval_pass_at_{k}" for k in (1, 2, 4, 6)]
    assert EvaluationResult(rewards=(1.0, 0.0)).metrics() == {}


def _values(folder: Path, **sections: Any) -> dict[str, Any]:
    records = good_records(6)
    for record in records:
        record["answer"] = record["responses"][0]
    values = run_values(
        folder / "out",
        records=write_records(folder / "rollouts.jsonl", records),
        rollouts={"reward": "exact_match", "max_response_length": 4},
        **sections,
    )
    paths = [str(folder / "rollouts.jsonl")]
    return values | {"evaluation": {"paths": paths, "num_prompts": 2, "every": 1}}


def test_a_run_evaluates_each_data_set_with_several_responses(tmp_path: Path) -> None:
    values = _values(tmp_path, output={"save_last": False, "samples": 0})
    prompts = [{"prompt": [1, 2, 3], "answer": [5]}, {"prompt": [4], "answer": [6]}]
    first = write_records(tmp_path / "first.jsonl", prompts)
    second = write_records(tmp_path / "second.jsonl", [*prompts[::-1], *prompts])
    values["evaluation"] |= {
        "paths": {"one": [str(first)], "other": [str(second)]},
        "responses_per_prompt": 3,
        "temperature": 1.0,
    }
    with trainer(values) as run:
        run.run()
        assert run.evaluator is not None and run.evaluator.batch is not None
        assert run.evaluator.batch.num_groups == 4
        assert run.evaluator.batch.num_responses == 12
        sources = [Path(source).name for source in run.evaluator.batch.sources]
    assert sources == [f"{name}.jsonl:{line}" for name in ("first", "second") for line in (1, 2)]
    rows = read_rows(tmp_path / "out")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["eval"] == pytest.approx((row["eval/one"] + row["eval/other"]) / 2)
        for end in ("", "/one", "/other"):
            found = [row[f"eval_pass_at_{k}{end}"] for k in (1, 2, 3)]
            assert found == sorted(found) and 0 <= found[0] <= found[-1] <= 1
        assert row["eval_seconds"] > 0


def _find(run: Trainer, scores: list[float]) -> Iterator[float]:
    """Have evaluations find these; what comes back has those that were not asked for."""
    assert run.evaluator is not None
    left = iter(scores)
    evaluate = run.evaluator.evaluate

    def scored() -> float:
        evaluate()
        return next(left)

    run.evaluator.evaluate = scored  # type: ignore[method-assign]
    return left


def _scored(values: dict[str, Any], scores: list[float]) -> None:
    """A run whose evaluations find these."""
    with trainer(values) as run:
        left = _find(run, scores)
        run.run()
        assert not list(left)


def _kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out" / "checkpoints").iterdir())


def test_the_best_checkpoint_is_kept_beside_the_newest_over_a_restart_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"keep_best": True, "keep": 1, "samples": 0}
    values = _values(tmp_path, output=output, training={"steps": 5})
    _scored(values, [0.1, 0.5, 0.2, 0.9, 0.3, 0.9])
    assert _kept(tmp_path) == ["step_000003", "step_000005"]
    best = f"best: eval 0.900 after step 3 ({tmp_path}/out/checkpoints/step_000003)\n"
    assert best in capsys.readouterr().err
    values["training"]["steps"] = 6
    _scored(values, [0.8])
    assert _kept(tmp_path) == ["step_000003", "step_000006"]
    assert best in capsys.readouterr().err
    values["training"]["steps"] = 7
    _scored(values, [0.95])
    assert _kept(tmp_path) == ["step_000007"]
    state = json.loads((tmp_path / "out/checkpoints/step_000007/trainer.json").read_text())
    assert state["best"] == [7, 0.95]


def test_a_best_checkpoint_stays_until_a_better_one_is_complete(tmp_path: Path) -> None:
    output = {"keep_best": True, "keep": 1, "save_every": 1, "samples": 0}
    values = _values(tmp_path, output=output, training={"steps": 3})
    with trainer(values) as run:
        _find(run, [0.1, 0.9, 0.2, 0.95])
        save = run.checkpoints.save

        def cut_off(step: int, *args: Any, **kwargs: Any) -> Path:
            path = save(step, *args, **kwargs)
            if step == 3:
                raise RuntimeError("the node is gone")
            return path

        run.checkpoints.save = cut_off  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the node is gone"):
            run.run()
    complete = [name for name in _kept(tmp_path) if not name.endswith(".partial")]
    assert complete == ["step_000001", "step_000002"]


def test_a_start_that_nothing_beats_is_said_and_no_checkpoint_is_taken_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"keep_best": True, "keep": 1, "samples": 0}
    _scored(_values(tmp_path, output=output, training={"steps": 2}), [0.5, 0.4, 0.3])
    assert _kept(tmp_path) == ["step_000002"]
    assert "best: eval 0.500 after step 0\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (None, "output.keep_best: true, but there is no evaluation by which a checkpoint is the"),
        (
            {"responses_per_prompt": 2},
            "evaluation.responses_per_prompt: 2 with temperature: 0, which makes them all the same",
        ),
        ({"responses_per_prompt": 0}, "evaluation.responses_per_prompt: 0 must be at least 1"),
        ({"paths": {"a": []}}, "evaluation.paths.a: none given; name at least one"),
        ({"paths": {"": ["a"], "b": ["b"]}}, "evaluation.paths: a data set has an empty name; "),
        ({"paths": {"a": "a.jsonl"}}, "evaluation.paths.a: expected list of path, got "),
        ({"paths": {}}, "evaluation.paths: none given; name at least one"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, evaluation: dict[str, Any] | None, message: str
) -> None:
    values = _values(tmp_path, output={"keep_best": True})
    values["evaluation"] = None if evaluation is None else values["evaluation"] | evaluation
    with pytest.raises(ConfigError) as caught:
        load_dataclass(RunConfig, values)
    (fault,) = caught.value.faults
    assert fault.startswith(message)


def test_a_missing_file_is_named_with_its_data_set(tmp_path: Path) -> None:
    values = _values(tmp_path)
    values["evaluation"]["paths"] = {"a": values["evaluation"]["paths"], "b": ["nowhere.jsonl"]}
    (fault,) = faults_of_surroundings(load_dataclass(RunConfig, values), 0)
    assert fault.startswith("evaluation.paths.b: nowhere.jsonl: there is no such file")
