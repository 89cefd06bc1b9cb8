"""Routes in records: the experts that the sampling engine's routers sent each token to.

A sequence has a route for each of its inputs, which are all tokens of the prompt and the response
but the last: for each layer with experts the ids of the experts. Engines give them as SGLang does
(base64 of int32), as vLLM does (base64 of a NumPy file) or as lists, nested or flat, and some have
entries for layers without experts too, which say nothing.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_prefix.layout.hybrid_pattern import EXPERTS, layers_of
from megatron_prefix.layout.routes import check_experts
from megatron_prefix.rollouts.kinds import Lists
from megatron_prefix.rollouts.record import GroupRecords
from megatron_prefix.rollouts.records import RolloutBatch

if TYPE_CHECKING:  # reading rollouts needs NumPy only
    from megatron_prefix.config import ModelConfig, RunConfig

_NUMPY_FILE = b"\x93NUMPY"
"""What such a file begins with."""

FIELD = "routed_experts"
"""The field of a record, which has the name that inference engines give it."""


@dataclass(frozen=True, kw_only=True)
class RouteShape:
    """What routes of a model look like."""

    with_experts: tuple[bool, ...]
    """[layers] whether each layer has experts."""
    topk: int
    """Experts that a layer sends a token to."""
    num_experts: int

    @classmethod
    def of_model(cls, model: ModelConfig) -> RouteShape:
        """Of a model with experts, whose layers are as Megatron counts them."""
        keys = model.transformer
        if model.hybrid_layer_pattern is not None:
            frequency = [kind == EXPERTS for kind in layers_of(model.hybrid_layer_pattern)]
        else:
            frequency = keys.get("moe_layer_freq", 1)
        if isinstance(frequency, int):
            frequency = [layer % frequency == 0 for layer in range(keys["num_layers"])]
        return cls(
            with_experts=tuple(map(bool, frequency)),
            topk=keys.get("moe_router_topk", 2),
            num_experts=keys["num_moe_experts"],
        )

    @property
    def dtype(self) -> type:
        """The narrowest type that torch and NumPy both have for the ids."""
        return np.uint8 if self.num_experts <= 256 else np.int16

    def read(self, value: Any, where: str, num_tokens: int) -> NDArray:
        """The routes of one sequence.

        Args:
            value: of the record.
            where: how errors begin.
            num_tokens: of prompt and response.

        Returns:
            [num_tokens - 1, layers with experts, topk] of `dtype`; a token's experts ascend, since
            their order says nothing.

        Raises:
            ValueError: it is nothing of the kind, has not as many routes, or names an expert that
                the model does not have, or one twice for a token.
        """
        ids = _numbers(value, where)
        num_layers, inputs = len(self.with_experts), num_tokens - 1
        num_with_experts = sum(self.with_experts)
        for layers in (num_with_experts, num_layers):
            shape = (inputs, layers, self.topk)
            if ids.shape == shape or ids.shape == (inputs * layers * self.topk,):
                ids = ids.reshape(shape)
                break
        else:
            also = "" if num_layers == num_with_experts else f" or {num_layers}"
            raise ValueError(
                f"{where}: {_size(ids)} experts for {num_tokens} tokens of prompt and response; "
                f"expected [{inputs}, {num_with_experts}{also}, {self.topk}]: for each token but "
                f"the last, and each of the {num_with_experts} layers with experts"
                f"{also and f' (or of all {num_layers})'}, the {self.topk} experts"
            )
        if ids.shape[1] != num_with_experts:
            ids = ids[:, np.array(self.with_experts)]
        check_experts(where, ids, self.num_experts)
        return np.sort(ids.astype(self.dtype), axis=-1)


@dataclass(frozen=True, kw_only=True)
class RouteReader:
    """Gives groups the routes of their records."""

    shape: RouteShape
    prompts_as_first: bool
    """A group's prompt has the routes of its first response, whatever those of others are."""

    def of_group(self, batch: RolloutBatch, group: GroupRecords) -> RolloutBatch:
        """The batch of one group with the routes of its records.

        Raises:
            ValueError: see `RouteShape.read`.
        """
        prompt = len(batch.prompt_tokens)
        lengths = (prompt + np.diff(batch.response_offsets)).tolist()
        values = group.given(FIELD, len(lengths))
        routes = [
            self.shape.read(value, group.where(FIELD, i), length)
            for i, (value, length) in enumerate(zip(values, lengths, strict=True))
        ]
        if self.prompts_as_first:
            share_prompt_of_first(routes, prompt)
        joined = np.concatenate(routes)
        joined.flags.writeable = False
        return dataclasses.replace(batch, routes=joined)


def share_prompt_of_first(routes: Sequence[NDArray], prompt: int) -> None:
    """Give the prompts of a group's sequences, of so many tokens, the routes of the first one's."""
    for of_response in routes[1:]:
        of_response[:prompt] = routes[0][:prompt]


def route_reader(config: RunConfig) -> RouteReader | None:
    """What reads the routes of a run's records; None where none are replayed."""
    kind = config.training.replayed_routes
    if kind not in ("exact", "first"):
        return None
    return RouteReader(shape=RouteShape.of_model(config.model), prompts_as_first=kind == "first")


def _numbers(value: Any, where: str) -> NDArray:
    """Whole numbers, as an array of any shape."""
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
            if not data.startswith(_NUMPY_FILE):
                return np.frombuffer(data, dtype="<i4")
            value = np.load(io.BytesIO(data), allow_pickle=False)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"{where}: not base64 of int32, or of a NumPy file: {error}"
            ) from error
    if isinstance(value, Lists):  # such as one for each token
        value = value.plain()
    if not isinstance(value, (list, np.ndarray)):
        raise ValueError(f"{where}: {reprlib.repr(value)} is no list of experts")
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where}: its lists differ in length: {error}") from error
    if found.dtype.kind not in "iu":
        raise ValueError(f"{where}: {reprlib.repr(value)} has other things than whole numbers")
    return found


def _size(ids: NDArray) -> str:
    return str(len(ids)) if ids.ndim == 1 else str(list(ids.shape))
