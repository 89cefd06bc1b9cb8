"""How each kind of server is told to load new weights from a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import httpx

from megatron_prefix.rollouts.server.client import RequestRefused, ServerClient, ServerError

_IS_TRANSFORMERS = "; is it transformers serve?"
_IS_VLLM = (
    "; a vLLM server loads weights only if it was started with the environment variable "
    "VLLM_SERVER_DEV_MODE=1, in a release whose reload_weights takes weights_path"
)


@dataclass(frozen=True)
class WeightLoader:
    """Has a server load weights."""

    kind: str
    """Of the server, one that loads weights."""
    client: ServerClient
    timeout_s: float
    """Of each of the calls that load weights."""

    @property
    def names_folder(self) -> bool:
        """Whether requests name the folder as the model, so that a server that is started anew
        loads it by itself. Another one has other weights then, without this showing."""
        return self.kind == "transformers"

    def load(self, folder: Path, version: int) -> None:
        """Return when every later request is answered with the weights in `folder`."""
        if self.kind == "transformers":  # /reset drops models, whose memory would stay in use
            calls = [("/reset", {}), ("/load_model", {"model": str(folder)})]
        elif self.kind == "sglang":  # in place; the version comes back in each answer
            body = {"model_path": str(folder), "weight_version": str(version)}
            flags = {"flush_cache": True, "abort_all_requests": True}
            calls = [("/update_weights_from_disk", body | flags)]
        else:  # in place, by every worker of a server in developer mode
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            calls = [("/collective_rpc", body), ("/reset_prefix_cache", {})]
        try:
            for path, body in calls:
                self.client.send("POST", path, body, read=_read, load_timeout_s=self.timeout_s)
        except RequestRefused as error:
            hints = {"vllm": _IS_VLLM, "transformers": _IS_TRANSFORMERS * (error.status == 404)}
            raise ServerError(f"{error}{hints.get(self.kind, '')}") from error


def _read(response: httpx.Response) -> None:
    """How a call ended: SGLang says it in JSON, transformers in the last of its events. A load
    that failed is a `ServerError`, an answer that breaks off another ValueError."""
    if response.url.path.endswith("/update_weights_from_disk"):
        answer = response.json()
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise ServerError(f"{response.url}: did not load the weights: {answer}")
    if response.url.path.endswith("/load_model"):
        lines = response.text.splitlines()
        events = [json.loads(line.removeprefix("data:")) for line in lines if line[:5] == "data:"]
        for event in events:
            if event.get("status") == "error":
                raise ServerError(
                    f"{response.url}: loading {event.get('model')} failed: {event.get('message')}"
                )
        if not events or events[-1].get("status") != "ready":
            raise ValueError("its progress breaks off before the model is ready")
