"""What a run's configuration says of rollouts, built once: tokenizer, reward, files, prompts.

The engine, the evaluation, the look at all records and the log share these.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prefix.config import RunConfig
from megatron_prefix.distributed.rank_results import rank_0_alone
from megatron_prefix.rollouts.engine import ENGINE_ERRORS
from megatron_prefix.rollouts.file_engine import FileEngine
from megatron_prefix.rollouts.group_reader import GroupReader
from megatron_prefix.rollouts.prompts import Prompt, prompt_stream, take_first
from megatron_prefix.rollouts.record_forms import RecordForms
from megatron_prefix.rollouts.rewards import RewardFunction, WeightedReward, load_reward
from megatron_prefix.rollouts.routes import FIELD as ROUTES
from megatron_prefix.rollouts.routes import route_reader
from megatron_prefix.rollouts.sampling.sampler import SamplingSpec
from megatron_prefix.rollouts.stream import RecordStream
from megatron_prefix.rollouts.survey import Survey, survey_groups, survey_prompts
from megatron_prefix.rollouts.text.dialogue import DialogueEncoder
from megatron_prefix.rollouts.text.prompts import TextPrompts
from megatron_prefix.rollouts.text.tokenizer import TextTokenizer
from megatron_prefix.rollouts.usable import Usable
from megatron_prefix.rollouts.validation import Limits

ALL_RECORDS = sys.maxsize
"""To be looked at."""


class RolloutParts:
    """Builds each part when it is first asked for.

    Every rank may ask for the tokenizer, the sampling and the file engine; rank 0 alone for rewards
    and prompts. What is wrong with files, a tokenizer or a reward is a ValueError, there and then.
    """

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        """Nothing is built yet.

        Args:
            config: of the run.
            is_main: whether this is rank 0, which alone reads records and computes rewards.
        """
        self.config = config
        self.is_main = is_main
        self._usable = Usable(leave_out=config.rollouts.unusable == "leave_out")

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """None: the run knows token ids only."""
        text = self.config.rollouts.text
        if text is None:
            return None
        return TextTokenizer(text.tokenizer, vocab_size=self.config.model.vocab_size)

    def read(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens included; ids where the run has no tokenizer."""
        tokenizer = self.tokenizer
        return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens)

    @functools.cached_property
    def reward(self) -> RewardFunction | None:
        """Of `rollouts.reward`; it may start processes, which `close_reward` ends."""
        rollouts = self.config.rollouts
        load = functools.partial(
            load_reward, tokenizer=self.tokenizer, process=rollouts.reward_process
        )
        if rollouts.reward is None:
            return None
        if isinstance(rollouts.reward, str):
            return load(rollouts.reward)
        assert self.config.objective.reward_weights is not None
        return WeightedReward(
            {name: load(spec) for name, spec in rollouts.reward.items()},
            self.config.objective.reward_weights,
        )

    def sampling(self, *, group_size: int, temperature: float) -> SamplingSpec:
        """How responses are sampled."""
        rollouts = self.config.rollouts
        assert rollouts.max_response_length is not None
        return SamplingSpec(
            group_size=group_size,
            max_response_length=rollouts.max_response_length,
            temperature=temperature,
            top_p=rollouts.top_p,
            stop_tokens=self.stop_tokens,
            seed=self.config.training.seed,
        )

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Those that are configured, or else the tokenizer's."""
        rollouts, tokenizer = self.config.rollouts, self.tokenizer
        if rollouts.stop_tokens or tokenizer is None:
            return rollouts.stop_tokens
        if rollouts.server is not None and rollouts.server.kind == "transformers":
            # It ends with what the hand-over tells it, and answers in text, which says one token.
            return () if tokenizer.end_token is None else (tokenizer.end_token,)
        return tokenizer.stop_tokens

    @functools.cached_property
    def dialogues(self) -> DialogueEncoder | None:
        """None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return DialogueEncoder(self.tokenizer, stop_tokens=self.stop_tokens)

    @property
    def limits(self) -> Limits:
        """Of the model."""
        return Limits(
            vocab_size=self.config.model.vocab_size,
            max_positions=self.config.model.max_sequence_length,
            is_corrected=self.config.objective.correction is not None,
        )

    @functools.cached_property
    def file_engine(self) -> FileEngine:
        """The engine that reads finished rollouts."""
        config, rollouts = self.config, self.config.rollouts
        reader = GroupReader(
            limits=self.limits,
            group_size=rollouts.group_size,
            reward=self.reward if self.is_main else None,
            forms=RecordForms(
                rollouts.fields,
                dialogues=self.dialogues,
                need_rewards=config.objective.name != "supervised" or rollouts.reward is not None,
                ignored=(ROUTES,) if config.training.replayed_routes == "ignore" else (),
            ),
            reward_weights=config.objective.reward_weights,
            usable=self._usable,
            routes=route_reader(config),
            has_mrope=config.model.position_embedding_type == "mrope",
        )
        return FileEngine(
            rollouts.files,
            reader,
            reads=self.is_main,
            run_alone=functools.partial(rank_0_alone, errors=ENGINE_ERRORS),
            epochs=rollouts.epochs,
        )

    @functools.cached_property
    def data_sets(self) -> list[RecordStream[Prompt] | TextPrompts]:
        """The prompts to train on: of each data set, or of all files together."""
        rollouts = self.config.rollouts
        return [
            self._prompts(files, self._usable, epochs=rollouts.epochs)
            for files in (rollouts.data_sets if rollouts.ratios else [rollouts.files])
        ]

    def evaluation_prompts(self) -> tuple[list[Prompt], list[str]]:
        """The prompts to evaluate on, and for each the name of its data set, if they have names.

        Raises:
            ValueError: a prompt is wrong, or there are too few.
        """
        evaluation = self.config.evaluation
        assert evaluation is not None
        usable = Usable(leave_out=self.config.rollouts.unusable == "leave_out")
        prompts: list[Prompt] = []
        names: list[str] = []
        for name, files in evaluation.data_sets.items():
            source = self._prompts(files, usable, epochs=1, is_shuffled=False)
            prompts += take_first(source, evaluation.num_prompts, names=", ".join(map(str, files)))
            names += [name] * evaluation.num_prompts if name else []
        return prompts, names

    def survey(self, at_most: int) -> Survey:
        """Look at the records before the first step (see `survey`), on rank 0.

        Args:
            at_most: records of each data set that are read.

        Raises:
            ValueError: what is wrong with one, naming it.
        """
        if at_most == 0:
            return Survey()
        if self.config.rollouts.engine == "file":
            return survey_groups(
                self.file_engine.each(), self.reward, self._usable, at_most=at_most
            )
        found = []
        for source in self.data_sets:
            fields = source.read_fields if isinstance(source, TextPrompts) else frozenset()
            found.append(
                survey_prompts(
                    source.each(), self.reward, self._usable, at_most=at_most, read_fields=fields
                )
            )
        return functools.reduce(Survey.plus, found)

    def _prompts(
        self,
        files: Sequence[Path],
        usable: Usable,
        *,
        epochs: int | None,
        is_shuffled: bool = True,
    ) -> RecordStream[Prompt] | TextPrompts:
        config, text = self.config, self.config.rollouts.text
        assert config.rollouts.max_response_length is not None
        vocab_size = config.model.vocab_size
        max_prompt_length = config.model.max_sequence_length - config.rollouts.max_response_length
        if text is None or self.tokenizer is None:
            return prompt_stream(
                files,
                vocab_size=vocab_size,
                max_prompt_length=max_prompt_length,
                epochs=epochs,
                usable=usable,
            )
        return TextPrompts(
            files,
            self.tokenizer,
            text,
            vocab_size=vocab_size,
            max_prompt_length=max_prompt_length,
            shuffle=text.shuffle and is_shuffled,
            seed=config.training.seed,
            epochs=epochs,
            usable=usable,
        )
