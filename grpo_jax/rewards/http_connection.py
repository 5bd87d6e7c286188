"""Connections to an HTTP endpoint that answers with JSON: retries, deadlines, what to show of errors."""

import functools
import json
import ssl
import threading
import time
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from grpo_jax.rewards.endpoint_error import EndpointError

MAX_ANSWER = 64 * 2**20  # bytes
LONGEST_PAUSE = 30.0  # seconds, where the server does not say how long to wait
LONGEST_RETRY_AFTER = 600.0  # seconds, where it does
PATIENCE = 5.0  # seconds to wait for the answer that shows that the server is up
_PART = 2**16  # bytes that one read takes at most
_RETRIED = frozenset({429, *range(500, 600)})  # statuses


class EndpointRetry(urllib3.Retry):
    """Pauses before the first retry as well, which urllib3 makes at once."""

    def get_backoff_time(self) -> float:
        """Returns the seconds before the next try, which double with each retry."""
        return min(self.backoff_factor * 2 ** (len(self.history) - 1), self.backoff_max)


class _Adapter(HTTPAdapter):
    """Trusts what the system trusts, such as the authority of a company, beside the list of requests."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=ssl.create_default_context(), **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> urllib3.ProxyManager:
        return super().proxy_manager_for(proxy, ssl_context=ssl.create_default_context(), **kwargs)


@functools.lru_cache
def session_of(process: int, max_concurrency: int) -> requests.Session:
    """Returns the session of a process, which keeps its connections from one call to the next."""
    session = requests.Session()
    session.mount("http://", _Adapter(pool_maxsize=max_concurrency))
    session.mount("https://", _Adapter(pool_maxsize=max_concurrency))
    # The environment names proxies. Without an auth of its own, a session would replace the header
    # Authorization by what ~/.netrc has for the host.
    session.auth = lambda request: request
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session


def check_reachable(session: requests.Session, url: str) -> None:
    """Raises ValueError if the server cannot be reached. Any answer shows that it is up, even `busy`."""
    try:
        session.head(url, timeout=PATIENCE, allow_redirects=False).close()
    except requests.Timeout:
        pass
    except requests.RequestException as error:
        cause = _cause(error)
        if isinstance(cause, ConnectionResetError):  # it has accepted the connection
            return
        raise ValueError(f"{shown_url(url)} cannot be reached ({_text(cause)}): is the server up?") from None


def ask_endpoint(
    session: requests.Session,
    request: requests.Request,
    *,
    timeout: float,
    retry: EndpointRetry,
    stopped: threading.Event,
) -> Any:
    """Sends a request until there is an answer, and returns its JSON."""
    shown = shown_url(str(request.url))
    tries = f" ({retry.total + 1} tries)" if retry.total else ""
    while True:
        pause = None
        try:
            body, response = _send(session, request, timeout)
            if body is not None:
                break
            reason = f"status {response.status_code} {response.reason}"
            if response.status_code not in _RETRIED:
                raise EndpointError(f"{shown} answers with {reason}")
            pause = _retry_after(retry, response)
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            reason = f"no answer within {timeout:g} s"
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            reason = _text(_cause(error))
        try:
            retry = retry.increment()
        except urllib3.exceptions.MaxRetryError:
            raise EndpointError(f"{shown} gives no scores: {reason}{tries}") from None
        if stopped.wait(retry.get_backoff_time() if pause is None else pause):
            raise EndpointError(f"{shown} gives no scores: {reason}")
    if len(body) > MAX_ANSWER:
        raise EndpointError(f"{shown} answers with more than {MAX_ANSWER >> 20} MiB")
    try:
        return json.loads(body)
    except ValueError:
        raise EndpointError(f"{shown} answers, but not with JSON: {body[:60]!r}") from None


def _send(session: requests.Session, request: requests.Request, timeout: float) -> tuple[bytes | None, Any]:
    """Sends a request once.

    Returns:
        (body of the answer, response). The body is None for a status that stands for a failure.

    Raises:
        TimeoutError: the answer was not whole in time. It is an exception of requests before it begins.
    """
    deadline = time.monotonic() + timeout
    prepared = session.prepare_request(request)
    settings = session.merge_environment_settings(str(prepared.url), {}, True, None, None)
    limit: Any = urllib3.Timeout(total=timeout)  # requests passes it on, which its annotations do not say
    with session.send(prepared, timeout=limit, allow_redirects=False, **settings) as response:
        if not 200 <= response.status_code < 300:
            return None, response
        body = bytearray()
        while len(body) <= MAX_ANSWER:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection = response.raw.connection  # None where the server closes it after the answer
            if connection is not None and connection.sock is not None:
                connection.sock.settimeout(left)
            # `read` waits for many parts, each of which may take as long as the timeout.
            part = response.raw.read1(_PART)
            if not part:
                break
            body += part
        return bytes(body), response


def _retry_after(retry: EndpointRetry, response: requests.Response) -> float | None:
    """Returns the seconds for which a server wants to be left alone, or None if it does not say."""
    try:
        seconds = retry.get_retry_after(response.raw)
    except urllib3.exceptions.InvalidHeader:
        return None
    return None if seconds is None else min(seconds, LONGEST_RETRY_AFTER)


def _cause(error: BaseException) -> BaseException:
    """Returns the first of the errors that led to one of requests, whose own text holds the whole URL."""
    while True:
        inner = getattr(error, "reason", None)
        inner = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
        if inner is None:
            return error
        error = inner


def _text(error: BaseException) -> str:
    """Returns what may be shown of an error. The texts of the two libraries may hold a URL or a header."""
    foreign = isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError)
    return type(error).__name__ if foreign else str(error) or type(error).__name__


def shown_url(url: str) -> str:
    """Returns a URL without its query, which may hold a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"
