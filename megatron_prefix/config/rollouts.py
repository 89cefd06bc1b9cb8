"""The `rollouts` section."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prefix.config.bounds import below, refuse
from megatron_prefix.config.loader import ConfigError
from megatron_prefix.config.paths import all_files, matching_files


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Prompts and responses as text: the tokenizer, and how records become prompts."""

    tokenizer: Path
    """A folder with a Hugging Face tokenizer, or a name in its cache."""
    prompt_template: str | None = None
    """Text of the prompt with the record's fields in braces: `"Q: {question}\\nA:"`; null: the
    record's `prompt` (text or token ids) or `messages`."""
    chat: bool = False
    """A text prompt becomes a user's message in the tokenizer's chat template. `messages` go
    through the template in any case."""
    system: str | None = None
    """System message in front of a chat that has no system message."""
    answer_field: str = "answer"
    """Field of the record that the reward compares with."""
    shuffle: bool = True
    """Prompts come in another order each epoch, which depends on `training.seed`."""

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise ConfigError("system: needs chat: true; set it, or leave system out")


@dataclass(frozen=True, kw_only=True)
class RewardProcessConfig:
    """The processes that a reward function of your own (`module:function`), `math`, `code` and
    `reasoning_gym` run in."""

    processes: int = 2
    """Processes at most, on each rank that computes rewards; they start when they are needed."""
    timeout_s: float = 10.0
    """Seconds of a call at most; a longer call is ended, with its process."""
    on_failure: float | None = None
    """Reward of a response whose call raised, crashed or took too long; null: the run ends with an
    error that names the record, but with `math`, `code` and `reasoning_gym` what crashed or took
    too long counts as 0."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 1, "processes")
        if not self.timeout_s > 0:
            yield f"timeout_s: {self.timeout_s} must be above 0"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """An OpenAI-compatible completions server, and how patiently it is asked."""

    url: str
    """`http://host:port`, without `/v1`."""
    kind: Literal["vllm", "sglang", "transformers", "openai"] = "openai"
    """It decides the request's extra fields and the call that loads new weights. `openai` sends
    only what OpenAI documents, and loads no weights."""
    model: str | None = None
    """The model's name on the server; null: the only one it lists, or (`transformers`) the folder
    of the weights."""
    api_key_variable: str | None = None
    """Name of the environment variable that holds the key. The key itself is never configured."""
    concurrency: int = 32
    """Requests at a time."""
    request_timeout_s: float = 600.0
    """Seconds of a request, from sending to the last byte of the answer."""
    patience_s: float = 600.0
    """Seconds that an unreachable or overloaded server is tried again before the run ends."""
    max_attempts: int = 5
    """How often a request is sent to a server that answers but fails (status 500, a cut-off answer,
    a timeout)."""
    partial_groups: Literal["resample", "drop", "keep"] = "resample"
    """What to do when some responses of a group fail: ask for them again, replace the group by a
    group of the next prompt, or train on the responses that came (at least two)."""
    logprobs: Literal["server", "trainer"] = "server"
    """Whose log-probabilities are the old policy's. Those of the server are used only where it
    gives them, and `rollouts.temperature` and `rollouts.top_p` are 1: of other sampling, servers
    give other numbers, and the trainer computes its own."""
    prefetch: bool = False
    """Sample the next rollout batch during training; its policy is then one version old."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"url: {self.url} is not of the form http://host:port"
        if parts.username or parts.password:
            yield (
                "url: holds a user name or password; put the key into the environment and name its "
                "variable in api_key_variable"
            )
        yield from below(self, 1, "concurrency", "max_attempts")
        for name in ("request_timeout_s", "patience_s"):
            if not getattr(self, name) > 0:
                yield f"{name}: {getattr(self, name)} must be above 0"

    @property
    def address(self) -> str:
        """The URL in front of every path."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def loads_weights(self) -> bool:
        """Whether weights can be handed over to this kind of server."""
        return self.kind != "openai"


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How the trained weights get to the engine that samples (`openai` and `hf`)."""

    every: int = 1
    """Steps between hand-overs. The weights are also handed over before the first step."""
    max_staleness: int = 1
    """Versions (steps) that a group's policy may lag behind the trained policy. Older groups are
    sampled again, and counted in the metric `stale_groups`."""
    load_timeout_s: float = 1800.0
    """Seconds in which the server has to load weights."""
    directory: Path | None = None
    """Folder of the weights, with a folder for each version. The server must see it under the same
    path; null: `policy/` in `output.directory`."""
    keep: int = 2
    """Versions that are kept in the folder."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from below(self, 1, "every", "keep")
        yield from below(self, 0, "max_staleness")
        if not self.load_timeout_s > 0:
            yield f"load_timeout_s: {self.load_timeout_s} must be above 0"
        if self.every - 1 > self.max_staleness:
            yield (
                f"every: {self.every} makes groups {self.every - 1} versions old, more than "
                f"max_staleness: {self.max_staleness} allows; lower it, or raise max_staleness"
            )


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Responses of several turns, between which an environment answers."""

    environment: str
    """`module:function`, called after each turn with the messages so far and the record's answer;
    see [agents](../rollouts/README.md#agents)."""
    tool_calls: Literal["text", "hermes"] = "text"
    """How the model's calls of tools reach the environment: in the text, as the model wrote them,
    or read from it into the message's `tool_calls`. `hermes` reads
    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, which the chat templates of Hermes'
    and Qwen's models ask for."""
    max_turns: int = 8
    """Turns of the model in a response at most."""
    max_seconds: float = 600.0
    """Seconds after which responses take no further turn."""
    turn_timeout_s: float = 30.0
    """Seconds of a call of the environment at most; a longer call is ended, with its process."""
    processes: int = 4
    """Processes that calls of the environment run in, at most."""
    on_failure: float | None = None
    """Reward of a response whose environment raised, crashed or took too long, in place of its
    others; null: the response is left out, as one that the server did not give
    (`server.partial_groups`)."""
    turn_rewards: bool = False
    """Rewards that the environment gives are those of turns (`objective.turn_advantage`); false:
    their sum is the reward of the response."""

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        module, colon, function = self.environment.partition(":")
        if not (module and colon and function):
            yield f"environment: {self.environment} is not of the form module:function"
        yield from below(self, 1, "max_turns", "processes")
        for name in ("max_seconds", "turn_timeout_s"):
            if not getattr(self, name) > 0:
                yield f"{name}: {getattr(self, name)} must be above 0"


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
    def takes_samplers_logprobs(self) -> bool:
        """Whether log-probabilities are those that responses were sampled with, by other code than
        the trainer's. Of a temperature or top_p other than 1, some servers give those before it,
        and others those after it."""
        if self.server is None:
            return self.engine == "hf"
        return self.server.logprobs == "server" and self.temperature == self.top_p == 1

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
