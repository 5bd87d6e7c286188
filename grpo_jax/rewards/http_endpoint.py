"""Gets rewards from a server, which may be any HTTP endpoint that judges a batch of completions.

The request is a POST of one JSON object, in which each key has a list with one entry per completion:

    {"prompts": [...], "completions": [...], "<column of the data>": [...], ...}

The answer is `{"scores": [...]}` with as many numbers. A null means that the completion has no reward. The
argument `columns` names the columns to send. Without it, every column is sent that JSON has a form for, and
NaN and infinity become null.
"""

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from grpo_jax.rewards.endpoint_error import EndpointError


def http_score(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    url: str,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 1.0,
    max_concurrency: int = 4,
    batch_size: int = 32,
    headers: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
    **data: Sequence[Any],
) -> list[float | None]:
    """Asks an HTTP endpoint for the rewards. `grpo_jax/rewards/http_endpoint.py` describes the protocol.

    Args:
        prompts: B prompts.
        completions: B completions. With an empty list only a HEAD request is sent, to check that the server
            is up.
        url: URL of the endpoint, http or https.
        timeout: seconds for one try, until all of its answer is here.
        retries: number of further tries after a refused or lost connection, a timeout, or a status of 429 or
            5xx.
        backoff: seconds before the first retry. They double with each retry, up to 30. Where the server says
            how long to wait (Retry-After), it is that long, up to 600.
        max_concurrency: number of requests at a time.
        batch_size: number of completions in a request.
        headers: mapping from a header to the environment variable that holds its value, such as
            {Authorization: REWARD_AUTHORIZATION}, so that no secret is in a config.
        columns: columns of the data to send. Every value must have a form in JSON, which is checked at the
            start of the run. None sends all columns except those that hold something else, such as a date or
            bytes.
        data: all columns of the data.

    Returns:
        B numbers. None stands for a null of the endpoint.

    Raises:
        EndpointError: there is no answer after the retries, it is not a list of scores, or JSON has no form
            for a value in one of `columns`.
        ValueError: an argument is wrong, or, without completions, the server cannot be reached.
    """
    # A worker process that judges by another function loads no requests.
    import requests

    from grpo_jax.rewards.http_connection import (
        LONGEST_PAUSE,
        EndpointRetry,
        ask_endpoint,
        check_reachable,
        session_of,
        shown_url,
    )

    _check(url, timeout, retries, backoff, max_concurrency, batch_size)
    _check_names(columns)
    fixed = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        **_from_environment(headers),
    }
    session = session_of(os.getpid(), max_concurrency)
    if not completions:
        check_reachable(session, url)
        return []
    everything = {**_sent(data, columns), "prompts": prompts, "completions": completions}
    starts = range(0, len(completions), batch_size)
    batches = [{name: list(x[i : i + batch_size]) for name, x in everything.items()} for i in starts]
    try:
        bodies = [json.dumps(batch, allow_nan=False).encode() for batch in batches]
    except (TypeError, ValueError) as error:
        raise EndpointError(f"the prompts cannot be sent as JSON: {error}") from None

    retry = EndpointRetry(total=retries, backoff_factor=backoff, backoff_max=LONGEST_PAUSE)
    stopped = threading.Event()

    def ask(body, batch):
        request = requests.Request("POST", url, data=body, headers=fixed)
        answer = ask_endpoint(session, request, timeout=timeout, retry=retry, stopped=stopped)
        return _scores(answer, len(batch["completions"]), shown_url(url))

    pool = ThreadPoolExecutor(max_workers=max_concurrency)
    try:
        parts = [pool.submit(ask, body, batch) for body, batch in zip(bodies, batches, strict=True)]
        for part in wait(parts, return_when=FIRST_EXCEPTION).done:
            part.result()  # it raises the error of the batch that failed first
        return [score for part in parts for score in part.result()]
    finally:
        stopped.set()  # after an error or Ctrl-C nobody waits for the retries of the other batches
        pool.shutdown(wait=False, cancel_futures=True)


def check_sent(columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Checks that the columns of one row that the arguments ask for can be sent.

    Raises:
        ValueError: the message names the column and the value that JSON has no form for.
    """
    for name in arguments.get("columns") or ():
        try:
            _json_form(columns[name], strict=True)
        except _NoForm as found:
            raise ValueError(
                f"column `{name}` cannot be sent as JSON: it has {found}. Leave it out of `columns`, or "
                "change the data"
            ) from None


class _NoForm(Exception):
    """JSON has no form for a value. The text names the value."""


def _sent(data: Mapping[str, Sequence[Any]], wanted: Sequence[str] | None) -> dict[str, list[Any]]:
    """Returns the columns to send: the wanted ones, or else all that JSON has a form for."""
    sent = {}
    for name in data if wanted is None else wanted:
        try:
            sent[name] = [_json_form(value, strict=wanted is not None) for value in data[name]]
        except _NoForm as found:
            if wanted is not None:
                raise EndpointError(f"column `{name}` cannot be sent as JSON: it has {found}") from None
    return sent


def _json_form(value: Any, *, strict: bool) -> Any:
    """Returns the form of a value in JSON. For NaN and infinity it is null, or an error if strict."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if strict and not math.isfinite(value):
            raise _NoForm(str(value))
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_json_form(each, strict=strict) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json_form(each, strict=strict) for key, each in value.items()}
    raise _NoForm(f"{value!r:.60} of type {type(value).__name__}")


def _check_names(columns: Sequence[str] | None) -> None:
    if columns is not None and (
        isinstance(columns, str) or not all(isinstance(name, str) for name in columns)
    ):
        raise ValueError(f"columns={columns!r}: give a list of names of columns, such as [answer]")


def _check(url, timeout, retries, backoff, max_concurrency, batch_size) -> None:
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url={url!r}: give an address like http://localhost:8000/score")
    if parts.username or parts.password:
        raise ValueError("url: it holds a user or password; give them in `headers`, by environment variable")
    if not timeout > 0 or not backoff >= 0:
        raise ValueError(f"timeout={timeout}, backoff={backoff}: seconds, above 0 and at least 0")
    if retries < 0 or max_concurrency < 1 or batch_size < 1:
        raise ValueError(
            f"retries={retries}, max_concurrency={max_concurrency}, batch_size={batch_size}: retries is 0 or "
            "more, the others at least 1"
        )


def _from_environment(headers: Mapping[str, str] | None) -> dict[str, str]:
    values = {}
    for name, variable in (headers or {}).items():
        value = os.environ.get(variable)
        if not value:
            raise ValueError(
                f"headers: {name} comes from the environment variable {variable!r:.60}, which is not set"
            )
        if not value.isprintable() or not value.isascii() or value != value.strip():
            raise ValueError(
                f"headers: {name} comes from the environment variable {variable!r:.60}, which holds what no "
                "header may, such as a space or a line break at its end"
            )
        values[name] = value
    return values


def _scores(answer: Any, size: int, shown: str) -> list[float | None]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise EndpointError(f'{shown} answers with {str(answer)[:60]!r}, not {{"scores": [...]}}')
    if len(scores) != size:
        raise EndpointError(f"{shown} answers with {len(scores)} scores for {size} completions")
    for row, score in enumerate(scores):
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise EndpointError(f"{shown}: score {row} is {str(score)[:60]!r}, not a number or null")
    return scores
