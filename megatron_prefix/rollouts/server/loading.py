"""How each kind of server is told to load new weights from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import httpx

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.server.client import RequestRefused, ServerClient, ServerError


class WeightLoader(Protocol):
    """Has the server load weights."""

    forgets: bool
    """Whether a server that is started anew has other weights than it was told to load, without
    this showing in its answers."""

    def load(self, folder: Path, version: int) -> None:
        """Return when every later request is answered with the weights in `folder`.

        Raises:
            ServerError: it did not load them.
        """
        ...

    def model(self) -> str | None:
        """What requests name as the model; None leaves it to the configuration."""
        ...


class TransformersLoader:
    """`transformers serve`: a model is a folder, loaded by /load_model; /reset drops the others."""

    # A request names the folder, and so its version; a new server loads it by itself.
    forgets = False

    def __init__(self, client: ServerClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._model: str | None = None

    def load(self, folder: Path, version: int) -> None:
        """Drop the models before, whose memory would stay in use, and load this one."""
        self._client.load("/reset", {}, _read_nothing, timeout_s=self._timeout_s)
        try:
            self._client.load(
                "/load_model", {"model": str(folder)}, _read_events, timeout_s=self._timeout_s
            )
        except RequestRefused as error:
            hint = "; is it transformers serve?" if error.status == 404 else ""
            raise ServerError(f"{error}{hint}") from error
        self._model = str(folder)

    def model(self) -> str | None:
        """The folder."""
        return self._model


class SGLangLoader:
    """SGLang: /update_weights_from_disk, which also empties its cache of prefixes."""

    forgets = True

    def __init__(self, client: ServerClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    def load(self, folder: Path, version: int) -> None:
        """Load in place; the version comes back in each answer's metadata."""
        answer = self._client.load(
            "/update_weights_from_disk",
            {
                "model_path": str(folder),
                "flush_cache": True,
                "abort_all_requests": True,
                "weight_version": str(version),
            },
            httpx.Response.json,
            timeout_s=self._timeout_s,
        )
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise ServerError(f"{self._client.url}: did not load {folder}: {answer}")

    def model(self) -> str | None:
        """The served name stays."""
        return None


class VLLMLoader:
    """vLLM: every worker's `reload_weights` from the folder, then an empty cache of prefixes.

    Both calls are there only in a server started with VLLM_SERVER_DEV_MODE=1.
    """

    forgets = True

    def __init__(self, client: ServerClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    def load(self, folder: Path, version: int) -> None:
        """Load in place."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            for path, body in (("/collective_rpc", call), ("/reset_prefix_cache", {})):
                self._client.load(path, body, _read_nothing, timeout_s=self._timeout_s)
        except RequestRefused as error:
            raise ServerError(
                f"{error}; a vLLM server loads weights only if it was started with the environment "
                "variable VLLM_SERVER_DEV_MODE=1, in a release whose reload_weights takes "
                "weights_path"
            ) from error

    def model(self) -> str | None:
        """The served name stays."""
        return None


def weight_loader(
    config: ServerConfig, client: ServerClient, *, timeout_s: float
) -> WeightLoader | None:
    """The loader of a kind of server; None where none is known.

    Args:
        config: of the server.
        client: the way to it.
        timeout_s: of each of the calls that load weights.
    """
    loaders: dict[str, Any] = {
        "transformers": TransformersLoader,
        "sglang": SGLangLoader,
        "vllm": VLLMLoader,
    }
    return loaders[config.kind](client, timeout_s) if config.loads_weights else None


def _read_events(response: httpx.Response) -> None:
    """The progress of a load, as server-sent events; the last one says how it ended.

    Raises:
        ServerError: it failed.
        ValueError: the events break off.
    """
    last: dict[str, Any] = {}
    for line in response.text.splitlines():
        if line.startswith("data:"):
            last = json.loads(line.removeprefix("data:"))
            if last.get("status") == "error":
                raise RequestRefused(
                    f"{response.url}: loading {last.get('model')} failed: {last.get('message')}",
                    response.status_code,
                )
    if last.get("status") != "ready":
        raise ValueError("its progress breaks off before the model is ready")


def _read_nothing(response: httpx.Response) -> None:
    pass
