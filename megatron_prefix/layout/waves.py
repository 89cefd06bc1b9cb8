"""Waves of chunks: those of a wave have as many chunks before them on their paths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from megatron_prefix.layout.stages import Wave


def in_waves(before: Sequence[int]) -> tuple[tuple[Wave[np.ndarray], ...], np.ndarray]:
    """The waves of chunks, and the chunks in their order: wave after wave, each as given.

    Args:
        before: the chunk before each, one of those given earlier; -1: none.
    """
    wave_of: list[int] = []
    for chunk in before:
        wave_of.append(wave_of[chunk] + 1 if chunk >= 0 else 0)
    parents, waves_of = np.array(before, dtype=np.int64), np.array(wave_of, dtype=np.int64)
    order = np.argsort(waves_of, kind="stable")
    number = np.argsort(order)
    bounds = np.searchsorted(waves_of[order], np.arange(waves_of.max(initial=-1) + 2)).tolist()
    waves = []
    for wave, (start, stop) in enumerate(itertools.pairwise(bounds)):
        of_wave = parents[order[start:stop]]
        waves.append(
            Wave(
                chunks=slice(start, stop),
                before=number[of_wave] - bounds[wave - 1] if wave else of_wave[:0],
            )
        )
    return tuple(waves), order
