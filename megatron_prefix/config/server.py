"""The parts of the `rollouts` section about servers and their weights."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prefix.config.bounds import below, refuse


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
