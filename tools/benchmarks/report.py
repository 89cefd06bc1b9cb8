"""A benchmark's rows as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = (
    f"{'G':>3} {'prefix':>7} {'response':>8} {'side':>14} {'seconds':>9} {'time x':>7} "
    f"{'least':>6} {'most':>6} {'FLOPs x':>8} {'share':>6} {'peak MB':>8}"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table; see `HEADER`."""
    peak = row["peak_mb"]
    return (
        f"{row['G']:>3} {row['prefix']:>7} {row['response']:>8} {row['side']:>14} "
        f"{row['seconds']:>9.4f} {row['time_ratio']:>7.2f} {row['time_ratio_least']:>6.2f} "
        f"{row['time_ratio_most']:>6.2f} {_number(row['flops_ratio']):>8} "
        f"{_number(row['share']):>6} {'-' if peak is None else f'{peak:.0f}':>8}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of each case: how many times the grouped side's time the others take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((r["G"], r["prefix"], r["response"]) for r in rows))
    sides = [s for s in dict.fromkeys(r["side"] for r in rows) if s != "grouped"]
    width = 0.8 / max(len(sides), 1)
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(cases) * len(sides)), 4))
    for offset, side in enumerate(sides):
        of_side = {(r["G"], r["prefix"], r["response"]): r for r in rows if r["side"] == side}
        places = [i for i, case in enumerate(cases) if case in of_side]
        values = [of_side[cases[i]] for i in places]
        heights = [r["time_ratio"] for r in values]
        spread = [
            [r["time_ratio"] - r["time_ratio_least"] for r in values],
            [r["time_ratio_most"] - r["time_ratio"] for r in values],
        ]
        at = [i + offset * width for i in places]
        axes.bar(at, heights, width, yerr=spread, label=side, capsize=2)
        limits = [(x, r["flops_ratio"]) for x, r in zip(at, values, strict=True)]
        for x, limit in limits:
            if limit is not None:
                axes.hlines(limit, x - width / 2, x + width / 2, color="black")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(
        [i + width * (len(sides) - 1) / 2 for i in range(len(cases))],
        [f"G {g}\n{p} + {r}" for g, p, r in cases],
        fontsize=8,
    )
    axes.set_ylabel("time / time of grouped\n(line: FLOPs)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
