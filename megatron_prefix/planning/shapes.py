"""The shapes of groups as a YAML file, which the tools share.

- {prefix: 4096, responses: [512, 380, 700]}
- {prefix: 900, responses: [64, 64]}
- {system: 200, prefix: 700, responses: [64, 64]}

`system` are tokens that the prompts of all groups with it begin with, before `prefix` tokens of
their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_prefix.layout import PrefixTree


def read_shapes(path: Path) -> list[dict[str, Any]]:
    """The groups' shapes: [{prefix: int, responses: [int, ...]}, ...], `system` where given.

    Raises:
        ValueError: naming the file and the entry that is not of this form.
    """
    try:
        shapes = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(shapes, list) or not shapes:
        raise ValueError(f"{path}: expected a list of {{prefix: int, responses: [int, ...]}}")

    def positive(value: Any) -> bool:
        return type(value) is int and value >= 1

    for index, shape in enumerate(shapes):
        if (
            not isinstance(shape, dict)
            or set(shape) - {"system"} != {"prefix", "responses"}
            or not positive(shape.get("system", 1))
            or not positive(shape["prefix"])
            or not isinstance(shape["responses"], list)
            or not shape["responses"]
            or not all(positive(length) for length in shape["responses"])
        ):
            raise ValueError(
                f"{path}: entry {index} is {shape!r}; expected "
                "{prefix: int, responses: [int, ...]} with lengths of at least 1"
            )
    return shapes


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
    responses = [[-1 - i] * length for i, length in enumerate(shape["responses"])]
    return PrefixTree.from_groups([(prompt, responses)])
