"""Logs to Weights & Biases (an extra), online with a key and offline without."""

import configparser
import json
import netrc
import os
import shlex
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo_jax.trackers.console import describe_error
from grpo_jax.trackers.jsonl import LogRow, Metrics, plain
from grpo_jax.trackers.redaction import redact


def has_wandb_key() -> bool:
    """Says whether the environment, netrc or W&B's settings file has credentials."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(path.expanduser())).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    settings = configparser.ConfigParser(interpolation=None)
    directory = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    try:
        settings.read(directory / "settings")
    except (configparser.Error, UnicodeDecodeError):
        return False
    return settings.has_option("default", "api_key")


class WandbTracker:
    """Logs to Weights & Biases, online with a key, and otherwise offline into run_dir/wandb.

    WANDB_MODE decides if it is set. A run that cannot be opened online is opened offline. On resume the same
    W&B run goes on. Steps that it already has are equal to the repeated ones, which W&B ignores.

    Args:
        run_dir: directory of the run. Its file `wandb_id` keeps the id.
        config: config of the run, logged without secrets.
        project: W&B project.
        name: name of the W&B run. None means the name of the run directory.
        resume_step: step that the run continues from. None means a new W&B run.
        message: function that prints a line.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Mapping[str, Any],
        *,
        project: str,
        name: str | None = None,
        resume_step: int | None = None,
        message: Callable[[str], None] = print,
    ):
        try:
            import wandb
        except ImportError:
            raise ImportError('tracking.wandb needs wandb: pip install "grpo-jax[wandb]"') from None
        self._wandb = wandb
        self._message = message
        self._run_dir = Path(run_dir).resolve()
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        if mode == "online" and not has_wandb_key():
            message("wandb: WANDB_MODE is online but there is no key, so the run is written offline")
            mode = "offline"  # wandb would wait at a prompt
        self._run_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "project": project,
            "name": name or self._run_dir.name,
            "id": self._run_id(resume_step),
            "config": redact(config),
        }
        try:
            self._run = self._open(mode, options)
        except Exception as error:
            if mode == "offline":
                raise
            message(f"wandb: it cannot be opened ({describe_error(error)}), so the run is written offline")
            self._run = self._open("offline", options)
        self._offline = self._run.settings.mode == "offline"

    def _run_id(self, resume_step: int | None) -> str:
        path = self._run_dir / "wandb_id"
        if resume_step is None or not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        return path.read_text().strip()

    def _open(self, mode: str, options: Mapping[str, Any]):
        settings = self._wandb.Settings(
            silent=True,
            console="off",  # the console may show a secret of somebody's reward function
            disable_git=True,
            disable_code=True,
            init_timeout=30,
            finish_timeout=120,  # an upload that hangs must not keep the run from ending
            finish_timeout_raises=True,
        )
        return self._wandb.init(
            mode=mode,
            dir=str(self._run_dir),
            resume="allow",
            reinit="create_new",
            settings=settings,
            **options,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def log_completions(self, step: int, rows: Sequence[LogRow]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_cell(row.get(name)) for name in columns] for row in rows]
        self._run.log({"completions": self._wandb.Table(columns=columns, data=cells)}, step=step)

    def close(self) -> None:
        self._run.finish()
        if self._offline:
            runs = sorted(self._run_dir.glob(f"wandb/offline-run-*-{self._run.id}"))
            new = [str(path) for path in runs if not list(path.glob("*.synced"))]
            self._message(f"wandb: the run is offline. Upload it with: wandb sync {shlex.join(new)}")


def _cell(value: Any) -> Any:
    return json.dumps(plain(value)) if isinstance(value, (list, dict)) else value
