"""Records of other programs as records of one response each.

    {"group": 7, "messages": [{"role": "user", ...}, {"role": "assistant", ...}], "reward": 1.0}
    {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}          TRL
    {"group": 7, "steps": [{"source": "user", "message": ...}, ...], "reward": 1.0}        ATIF
    {"group": 7, "input_ids": [...], "loss_mask": [...], "logprobs": [...], "rewards": 1.0}  AReaL
    {"uid": "a", "prompts": [...], "responses": [...], "response_mask": [...],
     "attention_mask": [...], "rollout_log_probs": [...], "token_level_scores": [...]}     verl

`rollouts.fields` names fields that stand under other names. A record in this package's own form
goes through as it is. Fields that none of these forms has are passed over, as in any record.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_prefix.rollouts.kinds import NUMBERS, TOKENS, Kind, plain_value, read_list
from megatron_prefix.rollouts.parsing import FIELDS
from megatron_prefix.rollouts.record import Record, value_at
from megatron_prefix.rollouts.text.atif import messages_of_steps
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.messages import checked_messages, without_nulls, writable

_OTHER_FIELDS = (
    "completion",
    "steps",
    "tools",
    "chat_template_kwargs",
    "input_ids",
    "attention_mask",
    "logprobs",
    "prompts",
    "response_mask",
    "rollout_log_probs",
    "token_level_scores",
)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """One form of record."""

    known_by: tuple[str, ...]
    """Fields that a record of this form has."""
    not_read: tuple[str, ...]
    """Fields of other forms that would change what is trained on, and that this one has not."""


_TOKENS_OF_OTHERS = ("response_mask", "rollout_log_probs", "old_log_probs", "token_level_scores")
_KEYS = ("prompt_keys", "keys", "routed_experts", "prompt_positions", "positions")
_VERL = _Form(
    known_by=("prompts", "response_mask"),
    not_read=("loss_mask", "old_logprobs", "logprobs", *_KEYS),
)
_OWN_GROUP = _Form(
    known_by=("responses",),
    not_read=("messages", "attention_mask", "logprobs", *_TOKENS_OF_OTHERS),
)
_OWN = _Form(known_by=("response",), not_read=_OWN_GROUP.not_read)
_AREAL = _Form(
    known_by=("input_ids",),
    not_read=("prompt", "messages", "old_logprobs", *_KEYS, *_TOKENS_OF_OTHERS),
)
_BESIDE_MESSAGES = (
    *("prompt", "loss_mask", "old_logprobs", "advantages"),
    *("attention_mask", "logprobs", *_KEYS, *_TOKENS_OF_OTHERS),
)
_ATIF = _Form(known_by=("steps",), not_read=("messages", *_BESIDE_MESSAGES))
_MESSAGES = _Form(known_by=("messages",), not_read=_BESIDE_MESSAGES)
_TRL = _Form(
    known_by=("prompt", "completion"),
    not_read=("messages", *(name for name in _BESIDE_MESSAGES if name != "prompt")),
)
_FORMS = (_VERL, _OWN_GROUP, _OWN, _AREAL, _ATIF, _MESSAGES, _TRL)
"""A record is of the first form by whose fields it is known."""


def _check_read(record: Record, form: _Form) -> None:
    for name in form.not_read:
        if name in record.values:
            raise ValueError(
                f"{record.source}: {name}: not read in a record with "
                f"{' and '.join(form.known_by)}; remove it, or give the record in one form"
            )


class RecordForms:
    """Turns any known form of record into this package's own."""

    def __init__(
        self,
        fields: Mapping[str, str] | None = None,
        *,
        dialogues: DialogueEncoder | None = None,
        need_rewards: bool = True,
        ignored: Collection[str] = (),
    ) -> None:
        """Read records whose fields have these names.

        Args:
            fields: this package's name of a field to the file's; dots lead into objects.
            dialogues: for records of messages.
            need_rewards: False where the objective looks at no rewards: a record without has
                reward 0, and one that names no group is a group of its own.
            ignored: fields that are taken out of every record.

        Raises:
            ValueError: a name that no form of record has.
        """
        for own in fields or {}:
            if own not in _KNOWN:
                raise ValueError(
                    f"rollouts.fields: {own}: no field that is read; choose one of "
                    f"{', '.join(sorted(_KNOWN))}"
                )
        self._fields = dict(fields or {})
        self._dialogues = dialogues
        self._need_rewards = need_rewards
        self._ignored = frozenset(ignored)

    def __call__(self, record: Record) -> Record:
        """The record in this package's form.

        Raises:
            ValueError: a field that its form needs is missing or wrong, naming it.
        """
        record = self._in_own_form(self._without_ignored(self._renamed(record)))
        if self._need_rewards:
            return record
        return dataclasses.replace(record, values=_as_taught(record.values))

    def _without_ignored(self, record: Record) -> Record:
        if not self._ignored.intersection(record.values):
            return record
        kept = {n: value for n, value in record.values.items() if n not in self._ignored}
        return dataclasses.replace(record, values=kept)

    def _in_own_form(self, record: Record) -> Record:
        values = record.values
        form = next(
            (form for form in _FORMS if all(name in values for name in form.known_by)), None
        )
        if form is None:
            return record
        _check_read(record, form)
        if form is _OWN or form is _OWN_GROUP:
            return record
        if form is _VERL:
            found = _of_padded(record)
        elif form is _AREAL:
            found = _of_sequence(record)
        elif form is _TRL:
            found = self._of_completion(record)
        else:
            (field,) = form.known_by
            where = f"{record.source}: {field}"
            read = messages_of_steps if form is _ATIF else checked_messages
            found = self._of_messages(record, read(values[field], where), field)
        kept = {n: v for n, v in values.items() if n in _KEPT or n not in _KNOWN}
        return dataclasses.replace(record, values={**kept, **found})

    def _renamed(self, record: Record) -> Record:
        if not self._fields:
            return record
        values = dict(record.values)
        for own, name in self._fields.items():
            value = value_at(record.values, name)
            if value is None:
                continue
            if own in record.values:
                raise ValueError(
                    f"{record.source}: {own}: the record has it, and rollouts.fields takes it from "
                    f"{name}, which the record has too; remove one of them"
                )
            values.pop(name, None)
            values[own] = value
        return dataclasses.replace(record, values=values)

    def _of_completion(self, record: Record) -> dict[str, Any]:
        """A prompt and what follows it, both text or both messages."""
        source = record.source
        prompt, completion = (plain_value(record.values[n]) for n in ("prompt", "completion"))
        if isinstance(prompt, str) and isinstance(completion, str):
            encoder = self._encoder(source, "completion")
            tokens, response = encoder.encode_texts(
                writable(prompt, f"{source}: prompt"),
                writable(completion, f"{source}: completion"),
            )
            return {"prompt": list(tokens), "response": list(response), **_reward(record)}
        before = checked_messages(prompt, f"{source}: prompt")
        # What the assistant says in a prompt is not trained on.
        before = [
            {**message, "weight": 0} if message["role"] == "assistant" else message
            for message in before
        ]
        after = checked_messages(completion, f"{source}: completion")
        return self._of_messages(record, [*before, *after], "prompt and completion")

    def _encoder(self, source: str, field: str) -> DialogueEncoder:
        if self._dialogues is None:
            raise ValueError(
                f"{source}: {field}: messages become tokens by a chat template, and text by a "
                "tokenizer; set rollouts.text.tokenizer, or give token ids (prompt, response, "
                "loss_mask)"
            )
        return self._dialogues

    def _of_messages(
        self, record: Record, messages: Sequence[dict[str, Any]], field: str
    ) -> dict[str, Any]:
        encoder = self._encoder(record.source, field)
        try:
            dialogue = encoder.encode(
                messages,
                tools=without_nulls(record.values.get("tools")),
                template_options=without_nulls(record.values.get("chat_template_kwargs")),
            )
        except ValueError as error:
            separator = "" if str(error).startswith("[") else ": "
            raise ValueError(f"{record.source}: {field}{separator}{error}") from error
        found: dict[str, Any] = {
            "prompt": list(dialogue.prompt),
            "response": list(dialogue.response),
            "loss_mask": list(dialogue.loss_mask),
        }
        if dialogue.logprobs is not None:
            found["old_logprobs"] = list(dialogue.logprobs)
        return {**found, **_reward(record)}


_KNOWN = {*FIELDS, *_OTHER_FIELDS, "old_log_probs", "rm_scores", "uid"}
_KEPT = ("group", "reward", "turn_rewards", "answer", "finished")
"""Fields that say the same in every form."""


_WHOLE = {"response": "responses", "reward": "rewards"}
"""Fields of one response by their names in a record of a whole group."""


_OF_RESPONSES = (
    *("old_logprobs", "loss_mask", "turn_rewards", "advantages", "finished"),
    *("keys", "routed_experts", "positions"),
)
"""Fields of one response that have the same name there."""


def _as_taught(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record that needs no reward, and no group of its response."""
    found = dict(values)
    has_reward = any(name in values for name in ("reward", "rewards", "turn_rewards"))
    if "responses" in found and not has_reward:
        found["rewards"] = [0.0] * len(found["responses"])
    if "response" not in found:
        return found
    if not has_reward:
        found["reward"] = 0.0
    if "group" in found:
        return found
    whole = {
        _WHOLE.get(name, name): [plain_value(found.pop(name))]
        for name in (*_WHOLE, *_OF_RESPONSES)
        if name in found
    }
    return {**found, **whole}


def _of_sequence(record: Record) -> dict[str, Any]:
    """A whole sequence whose mask says what is trained on; the prompt is what comes before."""
    tokens = _list(record, "input_ids", TOKENS)
    real = np.ones(len(tokens), dtype=np.bool_)
    if "attention_mask" in record.values:
        real = _list(record, "attention_mask", _FLAGS, len(tokens))
    trained = _list(record, "loss_mask", _FLAGS, len(tokens)) & real
    per_token = {
        own: _list(record, name, _NUMBERS, len(tokens))
        for own, name in (("old_logprobs", "logprobs"), ("advantages", "advantages"))
        if name in record.values
    }
    return {**_split(record, "loss_mask", tokens, real, trained, per_token), **_reward(record)}


def _of_padded(record: Record) -> dict[str, Any]:
    """A prompt padded on its left and a response padded on its right."""
    values = record.values
    prompt, response = (_list(record, name, TOKENS) for name in ("prompts", "responses"))
    tokens, before = np.concatenate([prompt, response]), np.zeros(len(prompt))
    real = _list(record, "attention_mask", _FLAGS, len(tokens))
    of_response = _list(record, "response_mask", _FLAGS, len(response))
    trained = np.concatenate([before, of_response]).astype(np.bool_)
    per_token: dict[str, np.ndarray] = {}
    for own, names in (
        ("old_logprobs", ("rollout_log_probs", "old_log_probs")),
        ("advantages", ("advantages",)),
    ):
        name = next((name for name in names if name in values), None)
        if name is not None:
            found = _list(record, name, _NUMBERS, len(response))
            per_token[own] = np.concatenate([before, found])
    found = _split(record, "response_mask", tokens, real, trained & real, per_token)
    if "uid" in values and "group" not in values:
        found["group"] = values["uid"]
    scores = next((n for n in ("token_level_scores", "rm_scores") if n in values), None)
    if scores is not None and "reward" not in values:
        return {**found, "reward": float(_list(record, scores, _NUMBERS, len(response)).sum())}
    return {**found, **_reward(record)}


def _split(
    record: Record,
    mask_name: str,
    tokens: np.ndarray,
    real: np.ndarray,
    trained: np.ndarray,
    per_token: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Prompt and response of a sequence: from its first trained token to its last one."""
    places = np.flatnonzero(trained)
    if not len(places):
        raise ValueError(f"{record.source}: {mask_name}: no token is trained on; leave it out")
    before = np.flatnonzero(real[: places[0]])
    if not len(before):
        raise ValueError(
            f"{record.source}: {mask_name}: the first token is trained on, but nothing predicts it"
        )
    own = places[0] + np.flatnonzero(real[places[0] : places[-1] + 1])
    return {
        "prompt": tokens[before],
        "response": tokens[own],
        "loss_mask": trained[own],
        # What is not trained on has no log-probability that counts.
        **{name: np.where(trained[own], of[own], 0.0) for name, of in per_token.items()},
    }


def _reward(record: Record) -> dict[str, Any]:
    """The reward under its name of a whole group: a number, a list of one, or several by name."""
    value = plain_value(record.values.get("rewards"))
    if value is None:
        return {}
    if "reward" in record.values:
        raise ValueError(f"{record.source}: rewards: given beside reward; remove one of them")
    if isinstance(value, Mapping):
        return {"reward": value}
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if type(value) not in (int, float):
        raise ValueError(
            f"{record.source}: rewards: {reprlib.repr(value)} is not the reward of one response"
        )
    return {"reward": value}


_FLAGS = Kind(
    types=frozenset({bool, int, float}),
    codes="biuf",
    wide=np.float64,
    dtype=np.bool_,
    other_type="{} is neither 0 nor 1",
    beyond="{} is neither 0 nor 1",
)
_NUMBERS = dataclasses.replace(NUMBERS, is_finite=False)
"""Of tokens that are not trained on, anything may be given."""


def _list(record: Record, name: str, kind: Kind, count: int | None = None) -> np.ndarray:
    """A field that has a value for each of so many tokens; None: of any length."""
    where = f"{record.source}: {name}"
    found = read_list(record.values.get(name), where, kind)
    if count is not None and len(found) != count:
        raise ValueError(
            f"{where}: {len(found)} values for {count} tokens; there must be one for each"
        )
    return found
