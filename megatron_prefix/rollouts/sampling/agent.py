"""Responses of several turns: the policy samples a turn, the environment answers, and so on.

A turn is asked with exactly the tokens that came before: the prompt, what was sampled, and between
two turns what the chat template writes around the environment's messages. So nothing that was
sampled becomes text and tokens again, and a server that keeps keys of prefixes finds them. The
requests are completions, not chats: a server that applies the template itself would make its own
tokens of earlier turns.

All responses of a batch take a turn together: the turn is sampled for all of them, then come the
calls of the environment. `AgentLoop` does not know who samples (see `sampler`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_prefix.config.rollouts import AgentConfig
from megatron_prefix.rollouts.engine import ServerError
from megatron_prefix.rollouts.prompts import Prompt
from megatron_prefix.rollouts.sampling.environment import Environment, Reaction
from megatron_prefix.rollouts.sampling.sampler import Answers, Response, Tally, Wanted
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.messages import Message
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer, Tokens
from megatron_prefix.rollouts.text.tool_calls import split_tool_calls
from megatron_prefix.rollouts.user_process import CallFailed

logger = logging.getLogger(__name__)

Outcome = Literal["goes on", "ended", "left out"]
"""Of a trajectory after a turn."""

CanBeAsked = Callable[[Tokens], bool]

Play = Generator[list[Wanted], Answers, list[list[Response]]]
"""Gives the turns that are wanted next, takes them, and returns whole responses."""


@dataclass(kw_only=True, eq=False)
class _Trajectory:
    """A response that is under way."""

    index: int
    """Of what was wanted."""
    prompt: Prompt
    seed: int
    messages: list[Message]
    tokens: list[int] = field(default_factory=list)
    """Of the response."""
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of each turn."""
    has_logprobs: bool = True
    from_text: bool = False
    finished: bool = False
    """Whether it ended by itself: not at a limit of turns, tokens or time."""

    def wanted(self) -> Wanted:
        """The next turn."""
        turn = len(self.rewards)
        prompt = dataclasses.replace(self.prompt, tokens=(*self.prompt.tokens, *self.tokens))
        return Wanted(prompt=prompt, count=1, seed=(self.seed + 65537 * turn) % (1 << 31))

    def say(self, turn: Response, message: Message) -> None:
        """Take a turn of the model, which is this message."""
        tokens = turn.tokens.tolist()
        self._add(tokens, is_trained=True)
        self.has_logprobs &= turn.logprobs is not None
        self.logprobs += [0.0] * len(tokens) if turn.logprobs is None else turn.logprobs.tolist()
        self.from_text |= turn.from_text
        self.messages.append({"role": "assistant", **message, "token_ids": tokens})

    def see(self, messages: Sequence[Message], tokens: Sequence[int]) -> None:
        """Take what the environment said, and the template's tokens up to the next turn."""
        self._add(tokens, is_trained=False)
        self.logprobs += [0.0] * len(tokens)
        self.messages += messages

    def _add(self, tokens: Sequence[int], *, is_trained: bool) -> None:
        self.tokens += tokens
        self.mask += [is_trained] * len(tokens)

    def response(self) -> Response:
        """The whole of it."""
        return Response(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32) if self.has_logprobs else None,
            finished=self.finished,
            from_text=self.from_text,
            loss_mask=np.array(self.mask, dtype=np.bool_),
            turn_rewards=tuple(self.rewards),
        )


@dataclass(eq=False)
class AgentLoop:
    """Dialogues of a policy with an environment."""

    environment: Environment
    tokenizer: TextTokenizer
    encoder: DialogueEncoder
    """Writes what stands between two turns."""
    config: AgentConfig
    """Limits of turns and time."""
    max_sequence_length: int = field(kw_only=True)
    """Of the model; a turn begins only where it has room."""
    max_turn_length: int = field(kw_only=True)
    """Tokens of a turn at most."""
    can_be_asked: CanBeAsked = field(default=lambda tokens: True, kw_only=True)
    """Whether a turn can be sampled behind some tokens."""

    def play(self, wanted: Sequence[Wanted], tally: Tally) -> Play:
        """Responses for each of the wanted, as many as came out well.

        Args:
            wanted: at least one.
            tally: of what happens.

        Raises:
            ServerError: a prompt that is no chat.
        """
        ended = time.monotonic() + self.config.max_seconds
        responses: list[list[Response]] = [[] for _ in wanted]
        live = [t for index, item in enumerate(wanted) for t in _begun(index, item)]
        for turn in range(self.config.max_turns):
            if not live:
                break
            answers = yield [trajectory.wanted() for trajectory in live]
            tally.add_failures(answers.tally)
            spoken = list(self._speak(live, answers.responses, tally))
            dialogues = [([_shown(m) for m in t.messages], t.prompt.answer) for t in spoken]
            live = []
            for trajectory, reaction in zip(spoken, self.environment.react(dialogues), strict=True):
                is_last = turn + 1 == self.config.max_turns or time.monotonic() > ended
                outcome = self._take(trajectory, reaction, tally, is_last=is_last)
                if outcome == "goes on":
                    asked = trajectory.wanted().prompt.tokens
                    if self.can_be_asked(asked):
                        live.append(trajectory)
                    else:
                        tally.reject(
                            1, "the server takes text only, and no text gives a dialogue's tokens"
                        )
                elif outcome == "ended":
                    responses[trajectory.index].append(trajectory.response())
                    tally.turns += len(trajectory.rewards)
        return responses

    def close(self) -> None:
        """End the environment's processes."""
        self.environment.close()

    def _speak(
        self, live: Sequence[_Trajectory], found: Sequence[list[Response]], tally: Tally
    ) -> Iterator[_Trajectory]:
        """The trajectories whose next turn was sampled."""
        for trajectory, turns in zip(live, found, strict=True):
            for turn in turns:
                if not trajectory.rewards:  # the first turn: of the response, and counted once
                    tally.count([turn])
                trajectory.finished = turn.finished
                trajectory.say(turn, self._message(turn, len(trajectory.rewards)))
                yield trajectory

    def _message(self, turn: Response, index: int) -> Message:
        """The model's turn of this index, without its tokens."""
        text = self.tokenizer.read(turn.tokens.tolist())
        if self.config.tool_calls == "text":
            return {"content": text}
        content, calls = split_tool_calls(text, turn=index)
        return {"content": content, "tool_calls": calls} if calls else {"content": content}

    def _take(
        self,
        trajectory: _Trajectory,
        reaction: Reaction | CallFailed,
        tally: Tally,
        *,
        is_last: bool,
    ) -> Outcome:
        """What becomes of a trajectory with this reaction to its turn."""
        tokens: Sequence[int] = ()
        if isinstance(reaction, Reaction) and reaction.messages and trajectory.finished:
            try:
                tokens = self.encoder.between(
                    trajectory.messages,
                    reaction.messages,
                    tools=trajectory.prompt.tools,
                    template_options=trajectory.prompt.template_options,
                )
                if not tokens:
                    reaction = CallFailed(
                        "returned messages of which the chat template writes nothing"
                    )
            except ValueError as error:
                reaction = CallFailed(f"returned messages that cannot be written: {error}")
        if isinstance(reaction, CallFailed):
            return self._fail(trajectory, reaction, tally)
        trajectory.rewards.append(reaction.reward)
        if not reaction.messages or not trajectory.finished:
            return "ended"
        seen = len(trajectory.prompt.tokens) + len(trajectory.tokens) + len(tokens)
        if is_last or seen + self.max_turn_length > self.max_sequence_length:
            trajectory.finished = False
            return "ended"
        trajectory.see(reaction.messages, tokens)
        return "goes on"

    def _fail(self, trajectory: _Trajectory, error: CallFailed, tally: Tally) -> Outcome:
        name, reward = self.config.environment, self.config.on_failure
        tally.environment_failures += 1
        logger.warning("%s: environment %s %s", trajectory.prompt.source, name, error)
        if reward is None:
            tally.reject(1, f"environment {name} {error}")
            return "left out"
        trajectory.rewards = [0.0] * len(trajectory.rewards) + [reward]
        trajectory.finished = False
        return "ended"


def _begun(index: int, wanted: Wanted) -> list[_Trajectory]:
    prompt = wanted.prompt
    if not prompt.messages:
        raise ServerError(
            f"{prompt.source}: prompt: rollouts.agent goes on with a chat; give messages, or text "
            "with rollouts.text.chat: true"
        )
    return [
        _Trajectory(
            index=index,
            prompt=prompt,
            seed=(wanted.seed + i) % (1 << 31),
            messages=list(prompt.messages),
        )
        for i in range(wanted.count)
    ]


def _shown(message: Message) -> Message:
    """A message as the environment sees it: token ids are between the model and its trainer."""
    return {key: value for key, value in message.items() if key != "token_ids"}
