"""Keeps secrets out of the logs."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_SECRET = {"secret", "password", "passwd", "passphrase", "credential", "auth", "apikey", "env", "environ"}
_SECRET_UNLESS_NUMBER = {"key", "token"}  # max_new_tokens is no secret
_SECRET_TEXT = re.compile(
    r"\b(?:(?:hf_|ghp_|AKIA)[A-Za-z0-9]{16,}|(?:github_pat_|sk-|wandb_v1_)[\w-]{16,})"
    r"|(?<=://)[^/@\s]+(?=@)"
)
_REDACTED = "[redacted]"
_PLAIN_WORD = re.compile(r"[\w@%+=:,./-]*|.*\[redacted\].*")


def _is_secret(name: str, value: Any = "") -> bool:
    found = re.findall(r"[a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    words = {word.removesuffix("s") for word in found}
    if value is None or isinstance(value, bool):
        return False
    return bool(words & _SECRET) or (
        bool(words & _SECRET_UNLESS_NUMBER) and not isinstance(value, (int, float))
    )


def redact(config: Any) -> Any:
    """Returns a config without secrets.

    It hides values under a name with a word such as key, token, secret, password or env. A number under a key
    or token stays, because `max_new_tokens` is no secret. It also hides credentials in URLs, tokens of known
    form, and the values of environment variables with such a name, wherever they occur in a text.

    >>> redact({"api_key": "abc", "max_new_tokens": 64, "url": "https://me:pw@host/x"})
    {'api_key': '[redacted]', 'max_new_tokens': 64, 'url': 'https://[redacted]@host/x'}
    """
    values = {v for k, v in os.environ.items() if _is_secret(k) and len(v) >= 8}
    return _redact(config, sorted(values, key=len, reverse=True))


def redact_command(argv: Sequence[str]) -> str:
    """Returns a command line without secrets, quoted for a shell.

    An option's name decides whether its value is hidden, and in a value such as `[{api_key: abc}]` the names
    in it do.

    >>> redact_command(["train", "--seed=1", "--api_key", "abc", "--rewards=[{token: abc}]"])
    'train --seed=1 --api_key [redacted] --rewards=[{"token": "[redacted]"}]'
    """
    shown = []
    option = ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and equals:
            shown.append(f"{name}={_redact_option(name, value)}")
            option = ""
        elif argument.startswith("--"):
            shown.append(argument)
            option = argument
        else:
            shown.append(_redact_option(option, argument))
            option = ""
    return " ".join(word if _PLAIN_WORD.fullmatch(word) else shlex.quote(word) for word in shown)


def _redact_option(name: str, value: str) -> str:
    content: Any = None
    if value.lstrip().startswith(("{", "[")):
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            content = None
    if isinstance(content, Mapping | list) and not _is_secret(name, value):
        hidden = redact(content)
        return value if hidden == content else json.dumps(hidden, default=str)
    return redact({name: value})[name]


def _redact(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _REDACTED if _is_secret(str(name), v) else _redact(v, secrets) for name, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redact(v, secrets) for v in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _REDACTED)
        return _SECRET_TEXT.sub(_REDACTED, value)
    return value
