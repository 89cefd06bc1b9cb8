"""The calls that load weights into each kind of server.

That these servers really take them is not covered here, but for the one of `test_openai_engine.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.server.client import RequestFailed, ServerClient, ServerError
from megatron_prefix.rollouts.server.loading import WeightLoader
from tests.rollouts.replies import Reply, Request, reply_server


def loading(script: Any, kind: str) -> ServerClient:
    return ServerClient(ServerConfig(url=script.url, kind=kind, max_attempts=2, patience_s=2.0))


def test_weights_are_loaded_by_the_calls_that_each_server_documents():
    def answer(request: Request) -> Reply:
        if request.path == "/load_model":
            events = [{"status": "loading"}, {"status": "ready"}]
            return Reply(body="".join(f"data: {json.dumps(e)}\n\n" for e in events).encode())
        return Reply(body={"success": True, "message": "ok"})

    with reply_server(answer) as server:
        for kind in ("vllm", "sglang", "transformers"):
            client = loading(server, "vllm")
            made = WeightLoader(kind, client, timeout_s=60.0)
            made.load(Path("/policy/version_000003"), 3)
            client.close()
    assert made.names_folder
    folder = "/policy/version_000003"
    assert [(r.path, r.body) for r in server.requests] == [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache", {}),
        (
            "/update_weights_from_disk",
            {
                "model_path": folder,
                "flush_cache": True,
                "abort_all_requests": True,
                "weight_version": "3",
            },
        ),
        ("/reset", {}),
        ("/load_model", {"model": folder}),
    ]


@pytest.mark.parametrize(
    ("kind", "reply", "error", "message"),
    [
        ("vllm", Reply(status=404, body={"detail": "Not Found"}), ServerError, "DEV_MODE=1"),
        ("sglang", Reply(body={"success": False, "message": "shapes"}), ServerError, "shapes"),
        (
            "transformers",
            Reply(body=b'data: {"status": "error", "model": "m", "message": "no config"}\n\n'),
            ServerError,
            "loading m failed: no config",
        ),
        (
            "transformers",
            Reply(body=b'data: {"status": "load'),
            RequestFailed,
            "failed 2 times",
        ),
        (
            "vllm",
            Reply(status=500, body={"error": {"message": "no such file"}}),
            RequestFailed,
            "collective_rpc: 500 .*: no such file",
        ),
        (
            "sglang",
            Reply(body={"success": True}, delay_s=1.5),
            RequestFailed,
            r"took longer than 1 s \(weights.load_timeout_s\)",
        ),
        ("transformers", Reply(status=404, body={}), ServerError, "is it transformers serve"),
    ],
)
def test_weights_that_are_not_loaded_are_an_error_in_the_servers_words(kind, reply, error, message):
    def answer(request: Request) -> Reply:
        return Reply(body={"status": "ok"}) if request.path == "/reset" else reply

    with reply_server(answer) as server:
        client = loading(server, "vllm")
        with pytest.raises(error, match=message):
            WeightLoader(kind, client, timeout_s=1.0).load(Path("/policy/version_000003"), 3)
        client.close()
    # A load that failed or took too long would do so again.
    if reply.status == 500 or reply.delay_s:
        assert len(server.requests) == 1
