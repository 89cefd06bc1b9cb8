"""The reward `reasoning_gym`: the score that the task's own data set gives.

Scorers compute with what the response says, some of them by sympy, so they run in a process with
a time limit (see `user_process`), and with a limit of memory.
"""

from __future__ import annotations

import functools
import json
import reprlib
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from megatron_prefix.rollouts.memory_limit import limit_memory

limit_memory()


def reasoning_gym_score(prompt: str, response: str, answer: Any) -> float:
    """What `score_answer` gives the response: what stands in its last <answer> tags, else all.

    Raises:
        ValueError: the answer is not that of a task of reasoning-gym.
    """
    if not isinstance(answer, dict) or not {"task", "config", "entry"} <= answer.keys():
        raise ValueError(
            "it scores tasks of a .gym.yaml file, whose records have a task, a config and an entry "
            f"in answer; answer is {reprlib.repr(answer)}"
        )
    data = _data_set(answer["task"], json.dumps(answer["config"]))
    said = extract_answer(response)
    said = response.strip() if said is None else said
    entry = answer["entry"]
    try:
        return float(data.score_answer(said, entry))
    except Exception:  # whatever the library makes of a text that it did not expect
        # An entry that cannot be scored at all is not the response's fault.
        data.score_answer(entry["answer"], entry)
        return 0.0


@functools.lru_cache(maxsize=16)
def _data_set(task: str, config: str) -> Any:
    return reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(config))
