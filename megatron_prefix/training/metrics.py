"""What a run reports: a JSONL file, TensorBoard, and a picture of the reward.

Only rank 0 writes. A resumed run first drops the lines of steps that it will run again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from megatron_prefix.packages import needed_by


class MetricsLog:
    """Appends one line per step to metrics.jsonl, and the same scalars to TensorBoard."""

    def __init__(self, directory: Path, *, resume_after: int, tensorboard: bool) -> None:
        """Open the log.

        Args:
            directory: where metrics.jsonl and tensorboard/ go.
            resume_after: lines of later steps are dropped; 0 starts anew.
            tensorboard: also write TensorBoard events (needs the `train` extra).
        """
        self.path = directory / "metrics.jsonl"
        self._file = open_lines(self.path, resume_after=resume_after)
        self._tensorboard = None
        if tensorboard:
            with needed_by("output.tensorboard: true", extra="train"):
                from torch.utils.tensorboard import SummaryWriter
            self._tensorboard = SummaryWriter(
                directory / "tensorboard", purge_step=resume_after + 1 if resume_after else None
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one step's values; numbers that are not finite are written as null."""
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in {"step": step, **values}.items()
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._tensorboard.add_scalar(name, value, step)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Show a text, in Markdown, in TensorBoard if it is written at all."""
        if self._tensorboard is not None:
            whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
            self._tensorboard.add_text(name, whole, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def open_lines(path: Path, *, resume_after: int) -> TextIO:
    """A JSONL file with a `step` in each line, opened to append to.

    Args:
        path: in a folder that is made.
        resume_after: lines of later steps are dropped; 0 starts anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if resume_after:
        kept = [row for row in read_metrics(path) if row["step"] <= resume_after]
    temporary = path.with_suffix(".tmp")
    # A lone surrogate, which an answer may hold, is written as JSON escapes it.
    how = {"encoding": "utf-8", "errors": "backslashreplace"}
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    temporary.write_text(text, **how)
    os.replace(temporary, path)
    return path.open("a", **how)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; a last line cut off by a kill is dropped."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise ValueError(f"{path}:{number}: not a line of metrics: {line[:80]!r}") from None
    return rows


def plot_reward(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward (and evaluation, where there is any) over steps as a PNG."""
    with needed_by("output.plot: true", extra="train"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    trained = [(row["step"], row["reward"]) for row in rows if row.get("reward") is not None]
    evaluated = [(row["step"], row["eval"]) for row in rows if row.get("eval") is not None]
    if trained:
        axes.plot(*zip(*trained, strict=True), label="reward of sampled rollouts", linewidth=1.5)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o--", label="evaluation on unseen prompts")
    axes.set_title(f"Reward by step: {path.parent.name}")
    axes.set_xlabel("step (rollout batches trained on)")
    axes.set_ylabel("mean reward of a batch's responses")
    axes.set_ylim(bottom=min(0.0, *(value for _, value in trained + evaluated), 0.0))
    axes.grid(alpha=0.3)
    if trained or evaluated:
        axes.legend()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    os.replace(temporary, path)
