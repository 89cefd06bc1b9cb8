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


class RequestRefused(ServerError):
    """A 4xx answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RequestFailed(ServerError):
    """A request that failed on a server that is there."""


class ServerDown(ServerError):
    """A server that stayed away."""


class _Again(Exception):
    """A request that may be sent again, and why it has to be.

    A server is "away" or "busy" for as long as the run is patient; the connection was "broken" by
    one that ended in the middle of its answer, most often; others have "failed" so many times.
    """

    def __init__(self, kind: str, what: str, *, retry_after: str | None = None) -> None:
        self.kind, self.what, self.retry_after = kind, what, retry_after


class ServerClient:
    """Sends requests, from any thread."""

    def __init__(self, config: ServerConfig, *, api_key: str | None = None) -> None:
        """Nothing is sent yet; the key goes along as a bearer token."""
        self.url = config.address
        self._config = config
        self._closed = threading.Event()
        self._last_report = -_REPORT_EVERY_S
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
            method, path, body: of the request, below the server's address and in JSON.
            read: its ValueErrors, other than ServerErrors, are answers that were cut off.
            attempts: if the server is there and fails; None: `server.max_attempts`.
            load_timeout_s: of a request that loads weights: one that fails or takes too long is
                not sent again, since it would fail again.

        Raises:
            ServerError: see the head of the file.
        """
        down_since: float | None = None
        failures = 0
        for tries in itertools.count(1):
            try:
                return self._once(method, path, body, read, load_timeout_s)
            except _Again as error:
                again = error
            if again.kind == "broken" or (again.kind == "away" and down_since is None):
                self.outages += 1
            if self._closed.is_set():
                raise RequestFailed(f"{self.url}{path}: given up, since the run ends") from again
            if again.kind in ("away", "busy"):
                down_since = down_since or time.monotonic()
                if time.monotonic() - down_since > self._config.patience_s:
                    raise ServerDown(
                        f"{self.url}: not reachable for {self._config.patience_s:g} s "
                        f"(server.patience_s); last: {again.what}. Start the server, then the run "
                        "again: it continues from its last checkpoint"
                    ) from again
            else:
                down_since = None
                failures += 1
                if failures >= (attempts or self._config.max_attempts):
                    raise RequestFailed(
                        f"{self.url}{path}: failed {failures} times (server.max_attempts); "
                        f"last: {again.what}"
                    ) from again
            self._report(again.what, down_since)
            self.retries += 1
            self._closed.wait(_delay(tries, again.retry_after))

    def _once(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[httpx.Response], Any],
        load_timeout_s: float | None,
    ) -> Any:
        is_load = load_timeout_s is not None
        timeout_s = load_timeout_s or self._config.request_timeout_s
        try:
            timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
            response = self._http.request(method, path, json=body, timeout=timeout)
            if not response.is_error:
                return read(response)
        except ServerError:
            raise
        except ValueError as error:
            raise _Again("failed", f"an answer that cannot be read: {error}") from error
        except (httpx.HTTPError, RuntimeError) as error:
            what = f"{type(error).__name__}: {error}"
            if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                raise _Again("away", what) from error
            if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)):
                raise _Again("broken", what) from error
            if isinstance(error, RuntimeError) and not self._closed.is_set():
                raise
            if isinstance(error, httpx.TimeoutException) and is_load:
                what = f"took longer than {timeout_s:g} s (weights.load_timeout_s)"
                raise RequestFailed(f"{self.url}{path}: {what}") from error
            limit = f" ({timeout_s:g} s)" if isinstance(error, httpx.TimeoutException) else ""
            raise _Again("failed", f"{what}{limit}") from error
        what = f"{response.status_code} {response.reason_phrase}: {_excerpt(response)}"
        if response.status_code in _BUSY:
            raise _Again("busy", what, retry_after=response.headers.get("retry-after"))
        if response.status_code < 500:
            raise RequestRefused(
                f"{method} {self.url}{path}: refused with {what}", response.status_code
            )
        if is_load:
            raise RequestFailed(f"{self.url}{path}: {what}")
        raise _Again("failed", what, retry_after=response.headers.get("retry-after"))

    def close(self) -> None:
        """Give up what is waiting, and close the connections."""
        self._closed.set()
        self._http.close()

    def _report(self, what: str, down_since: float | None) -> None:
        now = time.monotonic()
        if now - self._last_report < _REPORT_EVERY_S:
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
