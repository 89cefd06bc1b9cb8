"""HTTP to one server, patiently: limits, timeouts, retries with back-off.

httpx rather than the openai client: that one drops the fields that only some servers send (token
ids), counts attempts but not time, and knows no call that loads weights.

    ServerError
      RequestRefused    the server understood and said no (4xx): the same again would not help
      RequestFailed     the server is there, but this request kept failing
      ServerDown        it could not be reached, or was overloaded, for longer than the patience
"""

from __future__ import annotations

import itertools
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

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 10.0
_CONNECT_TIMEOUT_S = 10.0
_REPORT_EVERY_S = 30.0

# 429: too many requests; 502 to 504: a proxy whose server is away, or one that is starting.
_BUSY = {408, 425, 429, 502, 503, 504}
_AWAY = (httpx.ConnectError, httpx.ConnectTimeout)
_BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
"""The connection broke: a server that ended in the middle of the answer, most often."""


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
        """Nothing is sent yet; the key goes along as a bearer token."""
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

    def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        read: Callable[[httpx.Response], Any] = httpx.Response.json,
        attempts: int | None = None,
        load_timeout_s: float | None = None,
    ) -> Any:
        """What `read` makes of the answer.

        Args:
            method: of HTTP.
            path: below the server's address.
            body: sent as JSON.
            read: its ValueErrors, other than ServerErrors, are answers that were cut off.
            attempts: if the server is there and fails; None: `server.max_attempts`.
            load_timeout_s: of a request that loads weights: one that fails or takes too long is
                not sent again, since it would fail again.

        Raises:
            ServerError: see the head of the file.
        """
        timeout_s = load_timeout_s or self._config.request_timeout_s
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        down_since: float | None = None
        failures = 0
        for tries in itertools.count(1):
            retry_after = None
            try:
                with self._places:
                    response = self._http.request(method, path, json=body, timeout=timeout)
                if not response.is_error:
                    return read(response)
                is_down = response.status_code in _BUSY
                what = f"{response.status_code} {response.reason_phrase}: {_excerpt(response)}"
                if response.status_code < 500 and not is_down:
                    raise RequestRefused(
                        f"{method} {self.url}{path}: refused with {what}", response.status_code
                    )
                if load_timeout_s is not None and not is_down:
                    raise RequestFailed(f"{self.url}{path}: {what}")
                retry_after = response.headers.get("retry-after")
            except ServerError:
                raise
            except (httpx.HTTPError, ValueError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not self._closed.is_set():
                    raise
                is_down = isinstance(error, _AWAY)
                what = f"{type(error).__name__}: {error}"
                if isinstance(error, ValueError):
                    what = f"an answer that cannot be read: {error}"
                elif isinstance(error, httpx.TimeoutException) and not is_down:
                    what += f" ({timeout_s:g} s)"
                    if load_timeout_s is not None:
                        raise RequestFailed(
                            f"{self.url}{path}: took longer than {timeout_s:g} s "
                            "(weights.load_timeout_s)"
                        ) from error
                if isinstance(error, _BROKEN) or (is_down and down_since is None):
                    with self._lock:
                        self.outages += 1
            if self._closed.is_set():
                raise RequestFailed(f"{self.url}{path}: given up, since the run ends")
            if is_down:
                down_since = down_since or time.monotonic()
                if time.monotonic() - down_since > self._config.patience_s:
                    raise ServerDown(
                        f"{self.url}: not reachable for {self._config.patience_s:g} s "
                        f"(server.patience_s); last: {what}. Start the server, then the run again: "
                        "it continues from its last checkpoint"
                    )
            else:
                down_since = None
                failures += 1
                if failures >= (attempts or self._config.max_attempts):
                    raise RequestFailed(
                        f"{self.url}{path}: failed {failures} times (server.max_attempts); "
                        f"last: {what}"
                    )
            self._report(what, down_since)
            self.retries += 1
            self._closed.wait(_delay(tries, retry_after))

    def close(self) -> None:
        """Give up what is waiting, and close the connections."""
        self._closed.set()
        self._http.close()

    def _report(self, what: str, down_since: float | None) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last_report < _REPORT_EVERY_S and self._last_report:
                return
            self._last_report = now
        left = ""
        if down_since is not None:
            left = f", for {self._config.patience_s - (now - down_since):.0f} s more"
        logger.warning("%s: %s; trying again%s", self.url, what, left)


def _delay(tries: int, retry_after: str | None) -> float:
    """Seconds: exponential, with full jitter, so that many clients do not come back at once."""
    longest = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(tries, 10))
    delay = random.uniform(longest / 2, longest)
    if retry_after is not None and retry_after.isdigit():
        delay = max(delay, min(float(retry_after), 60.0))
    return delay


def _excerpt(response: httpx.Response) -> str:
    """The server's own words about an error."""
    try:
        found = response.json()
    except ValueError:
        found = None
    for _ in range(2):  # {"error": {"message": "..."}}
        if isinstance(found, dict):
            found = found.get("error") or found.get("detail") or found.get("message")
    text = found if isinstance(found, str) else " ".join(response.text.split())
    key = ""
    if response.status_code in (401, 403):
        key = "; set server.api_key_variable to the name of the environment variable with the key"
    return f"{text[:300] or '(no text)'}{key}"
