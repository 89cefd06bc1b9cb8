"""Rollouts of wanted lengths, as files that the `file` engine reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 152_064


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of every prompt and response."""

    prompts: NDArray[np.int64]
    """[groups]"""
    responses: NDArray[np.int64]
    """[groups, responses]"""

    @property
    def tokens(self) -> int:
        """Of all prompts, each once, and all responses."""
        return int(self.prompts.sum() + self.responses.sum())


def draw_lengths(
    kind: str, *, groups: int, responses: int, prompt: int, response: int, seed: int
) -> Lengths:
    """Lengths that are all alike, or lognormal around the same mean with a long tail.

    Args:
        kind: "fixed" or "lognormal".
        groups, responses: how many, and of each.
        prompt, response: tokens on average.
        seed: of what is drawn.
    """
    shape = (groups, responses)
    if kind == "fixed":
        return Lengths(prompts=np.full(groups, prompt), responses=np.full(shape, response))
    rng = np.random.default_rng(seed)

    def lognormal(mean: int, size: int | tuple[int, int], sigma: float) -> NDArray[np.int64]:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, size)
        return np.clip(drawn, 1, 8 * mean).astype(np.int64)

    return Lengths(
        prompts=lognormal(prompt, groups, 0.5), responses=lognormal(response, shape, 0.6)
    )


def read_lengths(path: Path) -> Lengths:
    """Lengths from a JSON file: [{"prefix": 512, "responses": [900, 1200]}, ...].

    Raises:
        ValueError: the file is none such, or its groups have different numbers of responses.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        prompts = np.array([group["prefix"] for group in values], dtype=np.int64)
        responses = np.array([group["responses"] for group in values], dtype=np.int64)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a list of groups of equal size: {error!r}") from error
    if responses.ndim != 2 or not responses.size or min(prompts.min(), responses.min()) < 1:
        raise ValueError(f"{path}: every group needs a prefix and responses of at least 1 token")
    return Lengths(prompts=prompts, responses=responses)


def write_rollouts(path: Path, lengths: Lengths, *, seed: int) -> None:
    """Random tokens and log-probabilities of these lengths, as Parquet or JSON Lines."""
    rng = np.random.default_rng(seed)
    if path.suffix == ".parquet":
        _write_parquet(path, lengths, rng)
        return
    with path.open("w", encoding="utf-8") as file:
        for prompt, responses in zip(lengths.prompts, lengths.responses, strict=True):
            record = {
                "prompt": _tokens(rng, prompt).tolist(),
                "responses": [_tokens(rng, n).tolist() for n in responses],
                "rewards": _rewards(rng, len(responses)).tolist(),
                "old_logprobs": [np.round(_logprobs(rng, n), 4).tolist() for n in responses],
            }
            file.write(json.dumps(record) + "\n")


def _write_parquet(path: Path, lengths: Lengths, rng: np.random.Generator) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    token_lists, number_lists = pa.list_(pa.int32()), pa.list_(pa.float32())
    schema = pa.schema(
        {
            "prompt": token_lists,
            "responses": pa.list_(token_lists),
            "rewards": pa.list_(pa.float64()),
            "old_logprobs": pa.list_(number_lists),
        }
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for chosen in _chunks(len(lengths.prompts), 32):
            prompts, responses = lengths.prompts[chosen], lengths.responses[chosen]
            inner = _offsets(responses.ravel())
            outer = _offsets(np.full(len(prompts), responses.shape[1]))
            columns = [
                pa.ListArray.from_arrays(_offsets(prompts), _tokens(rng, prompts.sum())),
                pa.ListArray.from_arrays(
                    outer, pa.ListArray.from_arrays(inner, _tokens(rng, responses.sum()))
                ),
                pa.ListArray.from_arrays(outer, _rewards(rng, responses.size)),
                pa.ListArray.from_arrays(
                    outer, pa.ListArray.from_arrays(inner, _logprobs(rng, responses.sum()))
                ),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start, stop in itertools.pairwise([*range(0, count, size), count]):
        yield slice(start, stop)


def _offsets(lengths: Sequence[int] | NDArray) -> NDArray[np.int32]:
    return np.append(0, np.cumsum(lengths)).astype(np.int32)


def _tokens(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
    return rng.integers(0, VOCAB_SIZE, count, dtype=np.int32)


def _rewards(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    return rng.integers(0, 2, count).astype(np.float64)


def _logprobs(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return -rng.exponential(0.5, count).astype(np.float32)
