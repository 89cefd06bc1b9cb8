"""Real servers for the tests: `transformers serve` on loopback, and the tokenizers they serve."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

DIGITS = [*"0123456789", ">", ";", "?", "!", "+", "="]
END = DIGITS.index(";")


def save_word_tokenizer(folder: Path, words: list[str], end: str) -> Path:
    """A tokenizer of whole words between spaces, as transformers loads it from a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return folder


_WITH_PARENT = """
parent=$1; shift
"$@" &
while kill -0 "$parent" && kill -0 $!; do sleep 1; done 2> /dev/null
kill -9 $!
"""


class TransformersServer:
    """`transformers serve` in a process of its own, at a port that stays the same."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self._arguments = arguments
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    # A test that is killed leaves no server behind.
                    *("bash", "-c", _WITH_PARENT, "server", str(os.getpid())),
                    *(str(Path(sys.executable).with_name("transformers")), "serve"),
                    *("--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"),
                    *self._arguments,
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while wait:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def transformers_server(log: Path, *arguments: str) -> Iterator[TransformersServer]:
    server = TransformersServer(log, *arguments)
    try:
        server.start()
        yield server
    finally:
        server.kill()
