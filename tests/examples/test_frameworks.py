"""What of the frameworks' examples needs no framework."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "frameworks"


def _load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, FOLDER / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LENGTHS = [9, 7, 9, 7, 9, 7, 9, 7]
ARGUMENTS = types.SimpleNamespace(use_dynamic_batch_size=True, max_tokens_per_gpu=31)
PARALLEL = {"dp_size": 2, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 2}
PROMPTS = {10 + i: [1, 2, 3] if i % 2 == 0 else [4, 5] for i in range(8)}


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("slime's own schedule")


def test_slimes_microbatches_hold_whole_groups() -> None:
    partitions, microbatches, counts, batch_sizes = _load(
        "slime/slime_prefix.py"
    ).schedule_of_whole_groups(
        ARGUMENTS,
        PARALLEL,
        LENGTHS,
        global_batch_size=8,
        rollout_indices=list(PROMPTS),
        prompts=PROMPTS,
        own=_never,
    )
    assert sorted(partitions) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # The budget holds either group: 2 + 4 * 7 tokens, and 1 + 4 * 6.
    assert counts == [1] and batch_sizes == [8]
    for rank, own in enumerate(microbatches):
        assert sorted(i for members in own for i in members) == list(range(len(partitions[rank])))


def test_steps_of_slime_stay_apart() -> None:
    partitions, microbatches, counts, batch_sizes = _load(
        "slime/slime_prefix.py"
    ).schedule_of_whole_groups(
        ARGUMENTS,
        PARALLEL | {"dp_size": 1},
        LENGTHS,
        global_batch_size=4,
        rollout_indices=list(PROMPTS),
        prompts=PROMPTS,
        own=_never,
    )
    assert batch_sizes == [4, 4] and len(counts) == 2
    first = [i for members in microbatches[0][: counts[0]] for i in members]
    assert sorted(partitions[0][i] for i in first) == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [{"use_dynamic_batch_size": False}, {"prompts": {}}])
def test_slimes_own_schedule_where_groups_are_not_known(change: dict[str, Any]) -> None:
    prompts = change.pop("prompts", PROMPTS)
    found = _load("slime/slime_prefix.py").schedule_of_whole_groups(
        types.SimpleNamespace(**vars(ARGUMENTS) | change),
        PARALLEL,
        LENGTHS,
        global_batch_size=8,
        rollout_indices=list(PROMPTS),
        prompts=prompts,
        own=lambda *args, **kwargs: (args[2], kwargs),
    )
    assert found == (LENGTHS, {"global_batch_size": 8, "rollout_indices": list(PROMPTS)})


def test_prompts_of_slimes_samples() -> None:
    """Its data source numbers samples by `index` only; rollouts of several samples have an id."""

    def sample(index: int, rollout_id: int | None, *tokens: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            index=index, rollout_id=rollout_id, tokens=list(tokens), response_length=2
        )

    prompts_of = _load("slime/slime_prefix.py").prompts_of
    samples = [sample(4, None, 1, 2, 3, 4), sample(5, None, 1, 2, 5, 6)]
    assert prompts_of(samples) == {4: [1, 2], 5: [1, 2]}
    assert [s.rollout_id for s in samples] == [4, 5]
    assert prompts_of([sample(0, 7, 1, 8, 9), sample(1, 7, 1, 6, 6)]) == {7: [1]}
    assert prompts_of([sample(0, 7, 1, 8, 9), sample(1, 7, 1, 8, 9, 3, 3)]) == {}


BUILDER = """
def gpt_builder(args):
    from tests.integrations.framework import build_model
    from tests.megatron.models import TRAINING, model_config
    from megatron_prefix.config import ParallelConfig
    from megatron_prefix.model.transformer_config import transformer_config

    model = model_config()
    return build_model(model, transformer_config(model, ParallelConfig(), TRAINING))
"""
SCRIPT = """
import sys
from gpt_builders import gpt_builder
from megatron_prefix.integrations import token_counter
from tests.megatron.models import single_process

if __name__ == "__main__":
    with single_process():
        print(sys.argv[1:], token_counter(gpt_builder(None)).rows)
"""


def test_a_script_of_megatron_lm_gets_models_that_share_prefixes(tmp_path: Path) -> None:
    """In a folder that is laid out as its checkout is."""
    (tmp_path / "gpt_builders.py").write_text(BUILDER, encoding="utf-8")
    (tmp_path / "train.py").write_text(SCRIPT, encoding="utf-8")
    root = FOLDER.parents[1]
    with fork_server.changed_environment(
        fork_server.gloo_environment() | {"PYTHONPATH": str(root)}
    ):
        done = subprocess.run(
            [sys.executable, FOLDER / "megatron_lm.py", "train.py", "--option", "1"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['--option', '1'] 0"
