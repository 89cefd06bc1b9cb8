"""HTTP to one server, patiently: limits, timeouts, retries with back-off.

httpx rather than the openai client: that one drops the fields that only some servers send (token
ids), counts attempts but not time, and knows no call that loads weights.

    ServerError
      RequestRefused    the server understood and said no (4xx): the same again would not help
      RequestFailed     the server is there, but this request kept failing
      ServerDown        it could not be reached, or was overloaded, for longer than the patience
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from megatron_prefix.config import ServerConfig
from megatron_prefix.rollouts.engine import ServerError

logger = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 10.0
_CONNECT_TIMEOUT_S = 10.0
_REPORT_EVERY_S = 30.0

# 429: too many requests; 502 to 504: a proxy whose server is away, or one that is starting.
_BUSY = {408, 425, 429, 502, 503, 504}


class RequestRefused(ServerError):
    """A 4xx answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RequestFailed(ServerError):
    """A request that failed on a server that is there."""


class ServerDown(ServerError):
    """A server that stayed away."""


class ServerClient:
    """Sends requests, from any thread, at most `concurrency` at once."""

    def __init__(self, config: ServerConfig, *, api_key: str | None = None) -> None:
        """Nothing is sent yet.

        Args:
            config: of the server.
            api_key: sent as a bearer token.
        """
        self.url = config.address
        self._config = config
        self._places = threading.BoundedSemaphore(config.concurrency)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._last_report = 0.0
        self.retries = 0
        """Requests that were sent again."""
        self.outages = 0
        """Times that the server could not be reached; it may have been started anew since."""
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(
                max_connections=config.concurrency, max_keepalive_connections=config.concurrency
            ),
            # A proxy for the world outside is not for the server next door.
            trust_env=False,
        )

    def get(self, path: str) -> Any:
        """The JSON of a GET.

        Raises:
            ServerError: see the head of the file.
        """
        return self._send("GET", path, None, _read_json)

    def post(self, path: str, body: dict[str, Any], *, attempts: int | None = None) -> Any:
        """The JSON that answers a POST.

        Args:
            path: below the server's address.
            body: sent as JSON.
            attempts: if it is there and fails; None: `server.max_attempts`.

        Raises:
            ServerError: see the head of the file.
        """
        return self._send("POST", path, body, _read_json, attempts=attempts)

    def load(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[httpx.Response], Any],
        *,
        timeout_s: float,
    ) -> Any:
        """What `read` makes of the answer to a POST that loads weights; its ValueErrors are answers
        that were cut off.

        A load that fails or takes too long is not asked for again: it would fail again.

        Raises:
            ServerError: see the head of the file.
        """
        return self._send("POST", path, body, read, load_timeout_s=timeout_s)

    def close(self) -> None:
        """Give up what is waiting, and close the connections."""
        self._closed.set()
        self._http.close()

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[httpx.Response], Any],
        *,
        attempts: int | None = None,
        load_timeout_s: float | None = None,
    ) -> Any:
        attempts = attempts or self._config.max_attempts
        timeout_s = load_timeout_s or self._config.request_timeout_s
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        down_since: float | None = None
        failures = tries = 0
        while True:
            retry_after = None
            try:
                with self._places:
                    response = self._http.request(method, path, json=body, timeout=timeout)
                if response.status_code not in _BUSY and response.status_code < 500:
                    if response.is_error:
                        raise RequestRefused(
                            self._refusal(method, path, response), response.status_code
                        )
                    return read(response)
                what = f"{response.status_code} {response.reason_phrase}: {_excerpt(response)}"
                is_down = response.status_code in _BUSY
                if load_timeout_s is not None and not is_down:
                    raise RequestFailed(f"{self.url}{path}: {what}")
                retry_after = response.headers.get("retry-after")
            except (RequestRefused, RequestFailed):
                raise
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                what, is_down = _described(error), True
                self._count_outage(down_since is None)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                # The connection broke: a server that ended in the middle of the answer, most often.
                what, is_down = _described(error), False
                self._count_outage(True)
            except httpx.TimeoutException as error:
                what, is_down = f"{_described(error)} ({timeout_s:g} s)", False
                if load_timeout_s is not None:
                    raise RequestFailed(
                        f"{self.url}{path}: took longer than {timeout_s:g} s "
                        "(weights.load_timeout_s)"
                    ) from error
            except httpx.HTTPError as error:
                what, is_down = _described(error), False
            except ValueError as error:
                what, is_down = f"an answer that cannot be read: {error}", False
            except RuntimeError as error:
                if not self._closed.is_set():
                    raise
                what, is_down = _described(error), False
            if self._closed.is_set():
                raise RequestFailed(f"{self.url}{path}: given up, since the run ends")
            tries += 1
            now = time.monotonic()
            if is_down:
                down_since = now if down_since is None else down_since
                if now - down_since > self._config.patience_s:
                    raise ServerDown(
                        f"{self.url}: not reachable for {self._config.patience_s:g} s "
                        f"(server.patience_s); last: {what}. Start the server, then the run again: "
                        "it continues from its last checkpoint"
                    )
            else:
                failures += 1
                down_since = None
                if failures >= attempts:
                    raise RequestFailed(
                        f"{self.url}{path}: failed {failures} times (server.max_attempts); "
                        f"last: {what}"
                    )
            self._report(what, down_since)
            self.retries += 1
            self._closed.wait(_delay(tries, retry_after))

    def _count_outage(self, is_new: bool) -> None:
        if is_new:
            with self._lock:
                self.outages += 1

    def _report(self, what: str, down_since: float | None) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last_report < _REPORT_EVERY_S and self._last_report:
                return
            self._last_report = now
        left = ""
        if down_since is not None:
            remaining = self._config.patience_s - (now - down_since)
            left = f", for {remaining:.0f} s more"
        logger.warning("%s: %s; trying again%s", self.url, what, left)

    def _refusal(self, method: str, path: str, response: httpx.Response) -> str:
        text = (
            f"{method} {self.url}{path}: refused with {response.status_code} "
            f"{response.reason_phrase}: {_excerpt(response)}"
        )
        if response.status_code in (401, 403):
            text += (
                "; set server.api_key_variable to the name of the environment variable with the key"
            )
        return text


def _delay(tries: int, retry_after: str | None) -> float:
    """Seconds: exponential, with full jitter, so that many clients do not come back at once."""
    longest = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(tries, 10))
    delay = random.uniform(longest / 2, longest)
    if retry_after is not None and retry_after.isdigit():
        delay = max(delay, min(float(retry_after), 60.0))
    return delay


def _read_json(response: httpx.Response) -> Any:
    return response.json()


def _excerpt(response: httpx.Response) -> str:
    """The server's own words."""
    try:
        values = json.loads(response.text)
    except ValueError:
        values = None
    for path in (("error", "message"), ("detail",), ("message",), ("error",)):
        found: Any = values
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, str):
            return found[:300]
    return " ".join(response.text.split())[:300] or "(no text)"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
