"""How each kind of server is told to load new weights from a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from megatron_prefix.rollouts.server.client import RequestRefused, ServerClient, ServerError


class WeightLoader:
    """Has a server load weights."""

    def __init__(self, kind: str, client: ServerClient, *, timeout_s: float) -> None:
        """Nothing is asked yet.

        Args:
            kind: of the server, one that loads weights.
            client: the way to it.
            timeout_s: of each of the calls that load weights.
        """
        self._load = {
            "transformers": self._transformers,
            "sglang": self._sglang,
            "vllm": self._vllm,
        }[kind]
        self._client = client
        self._timeout_s = timeout_s
        self.names_folder = kind == "transformers"
        """Whether requests name the folder as the model, so that a server that is started anew
        loads it by itself. Another one has other weights then, without this showing."""

    def load(self, folder: Path, version: int) -> None:
        """Return when every later request is answered with the weights in `folder`.

        Raises:
            ServerError: it did not load them.
        """
        self._load(folder, version)

    def _transformers(self, folder: Path, version: int) -> None:
        """`transformers serve`: /reset drops models, whose memory would stay in use."""
        self._post("/reset", {}, _read_nothing)
        try:
            self._post("/load_model", {"model": str(folder)}, _read_events)
        except RequestRefused as error:
            hint = "; is it transformers serve?" if error.status == 404 else ""
            raise ServerError(f"{error}{hint}") from error

    def _sglang(self, folder: Path, version: int) -> None:
        """In place, with its cache of prefixes; the version comes back in each answer."""
        body = {
            "model_path": str(folder),
            "flush_cache": True,
            "abort_all_requests": True,
            "weight_version": str(version),
        }
        answer = self._post("/update_weights_from_disk", body, httpx.Response.json)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise ServerError(f"{self._client.url}: did not load {folder}: {answer}")

    def _vllm(self, folder: Path, version: int) -> None:
        """In place, by every worker, then the cache of prefixes: in a server's developer mode."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._post("/collective_rpc", body, _read_nothing)
            self._post("/reset_prefix_cache", {}, _read_nothing)
        except RequestRefused as error:
            raise ServerError(
                f"{error}; a vLLM server loads weights only if it was started with the environment "
                "variable VLLM_SERVER_DEV_MODE=1, in a release whose reload_weights takes "
                "weights_path"
            ) from error

    def _post(self, path: str, body: dict[str, Any], read: Callable[[httpx.Response], Any]) -> Any:
        return self._client.load(path, body, read, timeout_s=self._timeout_s)


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
