"""The shapes of groups as a YAML file, which the tools share.

- {prefix: 4096, responses: [512, 380, 700]}
- {prefix: 900, responses: [64, 64]}
- {system: 200, prefix: 700, responses: [64, 64]}
- {prefix: 900, responses: [[40, {seen: 25}, 60], 64]}
- {prefix: 900, responses: [{turns: [40, {seen: 25}], then: [60, [30, {seen: 9}, 20]]}]}

`system` are tokens that the prompts of all groups with it begin with, before `prefix` tokens of
their own. A response is a number of tokens or a list of turns; tokens of a turn that is written
`{seen: n}` are not trained on. `then` lists how the responses that begin with the same `turns`
go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_prefix.layout import PrefixTree

EXPECTED = (
    "expected {prefix: int, responses: [response, ...]} with lengths of at least 1, where a "
    "response is a number of tokens, a list of turns (int, or {seen: int} for tokens that are not "
    "trained on) with a trained one, or {turns: [turn, ...], then: [response, ...]}"
)


@dataclass(frozen=True, kw_only=True)
class TurnShape:
    """Consecutive tokens of a response that are trained on, or are not."""

    name: tuple[int, ...]
    """Where it stands in its group; responses that share a turn have it under the same name."""
    tokens: int
    is_trained: bool


@dataclass(frozen=True, kw_only=True)
class ResponseShape:
    """A response as its turns."""

    turns: tuple[TurnShape, ...]

    @property
    def tokens(self) -> int:
        """Of all turns."""
        return sum(turn.tokens for turn in self.turns)

    def loss_mask(self) -> NDArray[np.bool_]:
        """[tokens] whether each is trained on."""
        return np.repeat(
            [turn.is_trained for turn in self.turns], [turn.tokens for turn in self.turns]
        )


def read_shapes(path: Path) -> list[dict[str, Any]]:
    """The groups' shapes: [{prefix: int, responses: [response, ...]}, ...], `system` where given.

    `responses_of` reads what a response is.

    Raises:
        ValueError: naming the file and the entry that is not of this form.
    """
    try:
        shapes = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(shapes, list) or not shapes:
        raise ValueError(f"{path}: expected a list of {{prefix: int, responses: [int, ...]}}")
    for index, shape in enumerate(shapes):
        if (
            not isinstance(shape, dict)
            or set(shape) - {"system"} != {"prefix", "responses"}
            or not _is_length(shape.get("system", 1))
            or not _is_length(shape["prefix"])
            or not _are_responses(shape["responses"])
            or not all(response.loss_mask().any() for response in responses_of(shape))
        ):
            raise ValueError(f"{path}: entry {index} is {shape!r}; {EXPECTED}")
    return shapes


def responses_of(shape: dict[str, Any]) -> list[ResponseShape]:
    """The responses of a group's shape, those that branch one by one."""
    return [ResponseShape(turns=turns) for turns in _branches(shape["responses"], (), ())]


def prompt_tokens(shape: dict[str, Any]) -> int:
    """Of the prompt, its system included."""
    return shape.get("system", 0) + shape["prefix"]


def longest_sequence(shape: dict[str, Any]) -> int:
    """Tokens of the prompt and the longest response."""
    return prompt_tokens(shape) + max(response.tokens for response in responses_of(shape))


def parse_case(text: str) -> dict[str, Any]:
    """The shape of a group that is written G,prefix,response.

    A response is a number of tokens, or shortest-longest for lengths spread evenly in between.

    Raises:
        ValueError: naming the text that is not of this form, with numbers of at least 1.
    """
    try:
        group_size, prefix, response = text.split(",")
        ends = [int(part) for part in response.split("-", 1)]
        numbers = [int(group_size), int(prefix), *ends]
        if min(numbers) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text!r} is not G,prefix,response (response: tokens, or shortest-longest), where all "
            "must be at least 1"
        ) from None
    lengths = np.linspace(ends[0], ends[-1], numbers[0])
    return {"prefix": numbers[1], "responses": [round(n) for n in lengths.tolist()]}


def tree_of_shape(shape: dict[str, Any], index: int) -> PrefixTree:
    """The group `index` of this shape: prompts of different groups share their systems only."""
    prompt = [0] * shape.get("system", 0) + [1 + index] * shape["prefix"]
    numbers: dict[tuple[int, ...], int] = {}
    responses = [
        np.concatenate(
            [
                np.full(turn.tokens, -1 - numbers.setdefault(turn.name, len(numbers)))
                for turn in response.turns
            ]
        )
        for response in responses_of(shape)
    ]
    return PrefixTree.from_groups([(prompt, responses)])


def _branches(
    responses: list[Any], name: tuple[int, ...], before: tuple[TurnShape, ...]
) -> Iterator[tuple[TurnShape, ...]]:
    for index, response in enumerate(responses):
        turns = response["turns"] if isinstance(response, dict) else response
        found = before
        for place, turn in enumerate(turns if isinstance(turns, list) else [turns]):
            is_trained = not isinstance(turn, dict)
            found += (
                TurnShape(
                    name=(*name, index, place),
                    tokens=turn if is_trained else turn["seen"],
                    is_trained=is_trained,
                ),
            )
        if isinstance(response, dict):
            yield from _branches(response["then"], (*name, index), found)
        else:
            yield found


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 1


def _are_responses(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_response, values))


def _is_response(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            set(value) == {"turns", "then"}
            and _are_turns(value["turns"])
            and _are_responses(value["then"])
        )
    return _is_length(value) or _are_turns(value)


def _are_turns(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_turn, values))


def _is_turn(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {"seen"} and _is_length(value["seen"])
    return _is_length(value)
