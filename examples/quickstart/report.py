"""What the quickstart found, as a short table; the last line of stdout is a JSON object.

The exit status is 1 if GRPO has not learned the task: a score of at most 0.4 before it, and one
after it that is at least 0.8 with 95 % confidence, given the number of evaluation prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import yaml

from megatron_prefix.training.metrics import read_metrics

MOST_BEFORE, LEAST_AFTER = 0.4, 0.8


def wilson_interval(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval (Wilson 1927) of a rate found in `count` trials."""
    center = mean + z**2 / (2 * count)
    width = z * math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return (center - width) / scale, (center + width) / scale


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of the GRPO run")
    parser.add_argument("--metrics", type=Path, required=True, help="its metrics.jsonl")
    parser.add_argument("--compare", type=Path, required=True, help="what compare.py wrote")
    parser.add_argument("--plot", type=Path, required=True, help="its reward.png")
    args = parser.parse_args()

    num_prompts = yaml.safe_load(args.config.read_text(encoding="utf-8"))["evaluation"][
        "num_prompts"
    ]
    scores = [row["eval"] for row in read_metrics(args.metrics) if "eval" in row]
    before, after = scores[0], scores[-1]
    intervals = [wilson_interval(score, num_prompts) for score in (before, after)]
    learned = before <= MOST_BEFORE and intervals[1][0] >= LEAST_AFTER
    compared = json.loads(args.compare.read_text(encoding="utf-8"))

    print(f"\nRight answers on {num_prompts} prompts never trained on    [95 % confidence]")
    for name, score, (low, high) in zip(
        ("before", "after"), (before, after), intervals, strict=True
    ):
        print(f"  {name + ' GRPO':<14}{score:>7.1%}    [{low:.1%}, {high:.1%}]")
    print("\nAn optimizer step on the same rollouts       tokens     seconds")
    for side in ("grouped", "ungrouped"):
        tokens, seconds = compared[f"tokens_{side}"], compared[f"seconds_{side}"]
        print(f"  {side:<39}{tokens:>10}{seconds:>12.3f}")
    print(
        f"  {compared['speedup_vs_ungrouped']:.1f} times as fast on "
        f"{compared['tokens_saved_frac']:.0%} fewer tokens; gradients equal to "
        f"{compared['gradient_difference']:.0e}"
    )
    print(f"\nReward curve: {args.plot.resolve()}")
    if not learned:
        print(
            f"error: not learned: the score before must be at most {MOST_BEFORE}, and after it at "
            f"least {LEAST_AFTER} with 95 % confidence",
            file=sys.stderr,
        )
    print(
        json.dumps(
            {
                "eval_before": before,
                "eval_after": after,
                "speedup_vs_ungrouped": round(compared["speedup_vs_ungrouped"], 3),
                "tokens_saved_frac": round(compared["tokens_saved_frac"], 4),
            }
        ),
        flush=True,
    )
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
