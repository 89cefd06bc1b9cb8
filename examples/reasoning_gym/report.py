"""Say how much the reward on unseen tasks rose, with its interval of 95 % confidence.

    python examples/reasoning_gym/report.py outputs/reasoning_gym/grpo/evaluations.jsonl

The first and the last evaluation ask the same tasks, so the interval is that of the mean of the
differences, task by task: mean +- 1.96 * standard deviation / sqrt(tasks). The tasks are what
another sample would draw anew, and a task's responses are averaged first. The last line of the
output is a JSON object. The exit status is 1 where the interval holds 0 or less.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def read_rewards(path: Path) -> dict[int, dict[str, float]]:
    """For each evaluation's step, the mean reward of each task."""
    found: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {})[row["source"]] = float(np.mean(row["rewards"]))
    return found


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The means of two evaluations of the same tasks, and the interval of their difference."""
    assert before.keys() == after.keys()
    differences = np.array([after[task] - before[task] for task in before])
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences))
    return {
        "tasks": len(differences),
        "before": float(np.mean(list(before.values()))),
        "after": float(np.mean(list(after.values()))),
        "rise": float(differences.mean()),
        "low": float(differences.mean() - half),
        "high": float(differences.mean() + half),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluations", type=Path, help="a run's evaluations.jsonl")
    rewards = read_rewards(parser.parse_args(arguments).evaluations)
    if len(rewards) < 2:
        parser.error("there are fewer than two evaluations; train to the end first")
    first, last = min(rewards), max(rewards)
    found = compare(rewards[first], rewards[last])
    print(
        f"reward on {found['tasks']} unseen tasks: {found['before']:.3f} before, "
        f"{found['after']:.3f} after {last - first} steps; rise {found['rise']:.3f}, "
        f"95 % confidence {found['low']:.3f} to {found['high']:.3f}"
    )
    print(json.dumps({"steps": last - first, **found}))
    return 0 if found["low"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
