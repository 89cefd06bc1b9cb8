"""The `rollouts` and `evaluation` sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prefix.config.agent import AgentConfig
from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.paths import all_files, matching_files
from megatron_prefix.config.server import ServerConfig, WeightsConfig
from megatron_prefix.config.text import RewardProcessConfig, TextConfig


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """Where groups of responses come from."""

    engine: Literal["file", "embedded", "openai", "hf"] = "file"
    """`file` reads finished rollouts, `embedded` samples from the model being trained, `openai`
    asks a completions server, `hf` generates with transformers in the training processes."""
    paths: tuple[Path, ...] = ()
    """JSONL or Parquet files: rollouts for `file`, prompts with answers for the other engines,
    which also read tasks of reasoning-gym (`.gym.yaml`). `data/*.jsonl` is all files of such a
    name, in order."""
    ratios: tuple[float, ...] = ()
    """For each of `paths` the share of prompts that are taken from it, such as `[3, 1]`; each goes
    through epochs of its own. None: one after the other. Not for `file`."""
    fields: dict[str, str] = field(default_factory=dict)
    """Fields of the records of `file` that stand under other names, such as `{reward: score}`: the
    name that is read, and the file's, where dots lead into objects (`reward_model.score`)."""
    groups_per_step: int = 8
    """Groups (prompts with their responses) of a step, over all ranks."""
    group_size: int | None = None
    """Responses of each prompt; `file` checks it where it is given, the other engines need it."""
    reward: str | dict[str, str] | None = None
    """Name of a reward, or `module:function`, for records with an answer and without rewards; or
    several by names of yours (`{correct: numeric, brief: my_rewards:brevity}`), which
    `objective.reward_weights` weighs."""
    reward_process: RewardProcessConfig = field(default_factory=RewardProcessConfig)
    """The processes that a `module:function`, `math`, `code` and `reasoning_gym` run in."""
    unusable: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of records that the model cannot train on: too long, or with log-probabilities
    that are none (-100, -9999). `leave_out` passes over them."""
    check_records: int = 100_000
    """Records that are read and checked before the first step, from the beginning of the files: so
    many at most, and a summary is logged; 0: none."""
    epochs: int | None = None
    """How often the files are read from beginning to end; null: without end."""
    max_response_length: int | None = None
    """Tokens of a sampled response at most; required by every engine but `file`."""
    temperature: float = 1.0
    """Temperature of sampling."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from all."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a response, which keeps the token. Without any and with `text`, the
    tokenizer's end of sequence ends it."""
    text: TextConfig | None = None
    """Prompts, responses and rewards are text; null: they are token ids."""
    server: ServerConfig | None = None
    """The completions server; required by `engine: openai`."""
    agent: AgentConfig | None = None
    """Responses of several turns, between which an environment answers (`engine: openai`); null: a
    response is one turn."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """How trained weights get to the engines `openai` and `hf`."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.paths:
            yield "paths: none given; name at least one JSONL or Parquet file"
        yield from below(self, 1, "groups_per_step", "group_size", "epochs", "max_response_length")
        yield from below(self, 0, "check_records")
        yield from self._faults_of_ratios()
        if self.engine != "file":
            if self.fields:
                yield f"fields: read by engine: file only, with engine: {self.engine}; remove it"
            for name in ("group_size", "max_response_length", "reward"):
                is_given = name == "reward" and self.agent is not None
                if getattr(self, name) is None and not is_given:
                    yield f"{name}: required by engine: {self.engine}"
        yield from self._faults_of_agent()
        yield from self._faults_of_server()
        if not self.temperature > 0:
            yield f"temperature: {self.temperature} must be above 0"
        if not 0 < self.top_p <= 1:
            yield f"top_p: {self.top_p} must be in (0, 1]"

    @property
    def reward_specs(self) -> dict[str, str]:
        """Every reward by the key that an error names: `reward`, or `reward.correct` and so on."""
        if isinstance(self.reward, dict):
            return {f"reward.{name}": spec for name, spec in self.reward.items()}
        return {} if self.reward is None else {"reward": self.reward}

    def _faults_of_ratios(self) -> Iterator[str]:
        if not self.ratios:
            return
        if self.engine == "file" or self.epochs is not None:
            option = "engine: file" if self.engine == "file" else f"epochs: {self.epochs}"
            yield f"ratios: not with {option}, which goes through the files in order; remove one"
        if len(self.ratios) != len(self.paths) or not all(ratio > 0 for ratio in self.ratios):
            yield (
                f"ratios: {list(self.ratios)} must be a number above 0 for each of the "
                f"{len(self.paths)} paths"
            )

    @property
    def data_sets(self) -> tuple[tuple[Path, ...], ...]:
        """The files of each of `paths`."""
        return tuple(map(matching_files, self.paths))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of `paths`."""
        return all_files(self.paths)

    @property
    def takes_servers_logprobs(self) -> bool:
        """Whether a server's log-probabilities are those that responses were sampled with: of other
        sampling, some give those before it, and others those after it."""
        takes_them = self.server is not None and self.server.logprobs == "server"
        return takes_them and self.temperature == self.top_p == 1

    def _faults_of_agent(self) -> Iterator[str]:
        if self.agent is None:
            return
        if self.engine != "openai":
            yield f"agent: set with engine: {self.engine}; it belongs to engine: openai"
        if self.text is None:
            yield "text: required by agent, whose turns are messages; set text.tokenizer"
        if self.reward is not None:
            yield (
                f"reward: {self.reward}, but with agent the environment gives the rewards; remove "
                "reward"
            )

    def _faults_of_server(self) -> Iterator[str]:
        server = self.server
        if (self.engine == "openai") != (server is not None):
            yield (
                f"server: {'missing' if server is None else 'set'}, with engine: {self.engine}; "
                "it belongs to engine: openai, and only there"
            )
        if server is None:
            return
        if self.text is None and server.kind in ("transformers", "openai"):
            yield (
                f"text: required by server.kind: {server.kind}, which may answer in text only; "
                "set text.tokenizer"
            )
        if server.prefetch and self.weights.max_staleness < 1:
            yield (
                "server.prefetch: makes groups a version old, more than weights.max_staleness: "
                f"{self.weights.max_staleness} allows; raise it, or set prefetch: false"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Sampling on prompts that are never trained on."""

    paths: tuple[Path, ...] | dict[str, tuple[Path, ...]]
    """JSONL or Parquet files of prompts with answers; `data/*.jsonl` is all files of that name.
    Several data sets are a mapping of their names to their files; each is reported by itself, too.
    """
    num_prompts: int
    """Number of prompts, from the beginning of the files; with several data sets, of each."""
    responses_per_prompt: int = 1
    """Responses to each prompt. With more than 1, pass@k is reported: the chance that of k
    responses at least one is right, which is one with a reward of at least 1. It needs a
    temperature above 0. Not with `rollouts.agent`."""
    every: int = 0
    """Steps between evaluations; 0: before the first and after the last step only."""
    temperature: float = 0.0
    """Temperature of sampling; 0 takes the most likely token."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        none = "none given; name at least one JSONL or Parquet file"
        if not self.paths:
            yield f"paths: {none}"
        if isinstance(self.paths, dict) and "" in self.paths:
            yield "paths: a data set has an empty name; give it one"
        for name, paths in self.data_sets.items():
            if self.paths and not paths:
                yield f"paths.{name}: {none}"
        yield from below(self, 1, "num_prompts", "responses_per_prompt")
        yield from below(self, 0, "every", "temperature")
        if self.responses_per_prompt > 1 and self.temperature == 0:
            yield (
                f"responses_per_prompt: {self.responses_per_prompt} with temperature: 0, which "
                "makes them all the same; set a temperature, such as 1.0"
            )

    @property
    def data_sets(self) -> dict[str, tuple[Path, ...]]:
        """The files by the name of their data set, which is empty where there is only one."""
        given = self.paths if isinstance(self.paths, dict) else {"": self.paths}
        return {name: all_files(paths) for name, paths in given.items()}
