import io
import json
import math
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import grpo_jax
from grpo_jax.config.run import TrackingConfig
from grpo_jax.trackers import (
    ConsoleTracker,
    JsonlTracker,
    TensorBoardTracker,
    Trackers,
    is_timing,
    make_trackers,
    redact,
)
from grpo_jax.trackers.console import bars, figures_table, printable, samples_table, spread
from grpo_jax.trackers.wandb import WandbTracker, has_wandb_key

SAMPLE = {
    "prompt": "1+1=",
    "completion": "2",
    "reward": 1.0,
    "advantage": 0.5,
    "rewards/exact_match": 1.0,
}


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No test sees the credentials or the settings of whoever runs it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no_config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # W&B replaces these for the rest of the process.
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------- JSONL


def test_jsonl_writes_each_call_at_once(tmp_path):
    tracker = JsonlTracker(tmp_path / "run")
    tracker.log(1, {"reward": 0.1, "num_tokens": 12})
    metrics, chat = tmp_path / "run" / "metrics.jsonl", [{"role": "user", "content": "q"}]
    assert metrics.read_text() == '{"step": 1, "reward": 0.1, "num_tokens": 12}\n'
    tracker.log(1, {"eval/greedy_accuracy": 0.5})
    tracker.log(2, {})  # nothing to say
    tracker.log_completions(1, [SAMPLE, {**SAMPLE, "reward": None, "prompt": chat}])
    tracker.close()
    assert lines(metrics)[1:] == [{"step": 1, "eval/greedy_accuracy": 0.5}]
    rows = lines(tmp_path / "run" / "completions.jsonl")
    assert rows[0] == {"step": 1, **SAMPLE}
    assert rows[1]["reward"] is None and rows[1]["prompt"] == chat


def test_jsonl_says_numbers_exactly_and_stays_valid(tmp_path):
    values = {
        "float": 1 / 3,
        "float32": np.float32(0.1),
        "array": np.array(0.5),
        "int": np.int64(7),
        "bool": np.bool_(True),
        "nan": math.nan,
        "inf": np.float32(-np.inf),
        "big": 2**60,
    }
    tracker = JsonlTracker(tmp_path)
    tracker.log(1, values)
    tracker.log_completions(1, [{"completion": "\ud800 \u2028\x1b[0m é"}])
    with pytest.raises(TypeError, match="not a number"):
        tracker.log(1, {"x": np.zeros(2)})
    tracker.close()

    def strict(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=strict)
    assert row["float"] == 1 / 3 and row["float32"] == float(np.float32(0.1))
    assert row["nan"] is None and row["inf"] is None
    assert (row["array"], row["int"], row["bool"], row["big"]) == (0.5, 7, True, 2**60)
    assert lines(tmp_path / "completions.jsonl")[0]["completion"] == "\ud800 \u2028\x1b[0m é"


def run_to(directory, first, last, resume_step, every=3):
    """What the training loop logs in steps first..last."""
    tracker = JsonlTracker(directory, resume_step)
    if resume_step is None:
        tracker.log(0, {"eval/accuracy": 0.0})
    for step in range(first, last + 1):
        tracker.log(step, {"reward": step / 7})
        tracker.log_completions(step, [{"completion": str(step)}] * 2)
        if step % every == 0:
            tracker.log(step, {"eval/accuracy": step / 9})
    tracker.close()


@pytest.mark.parametrize("killed, checkpoint", [(8, 6), (9, 9), (2, 0), (7, 6), (2, None)])
@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "rew', b'{"step": 9', b"\xff\xfe"])
def test_a_killed_and_resumed_run_leaves_the_same_record(tmp_path, killed, checkpoint, torn):
    run_to(tmp_path / "whole", 1, 12, None)
    run_to(tmp_path / "run", 1, killed, None)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / "run" / name).open("ab") as file:
            file.write(torn)
    run_to(tmp_path / "run", 1 + (checkpoint or 0), 12, checkpoint)
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_complete_row_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    JsonlTracker(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_crash_while_rewinding_loses_nothing(tmp_path, monkeypatch):
    run_to(tmp_path, 1, 4, None)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="power cut"):
        JsonlTracker(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_timings_are_told_apart():
    assert is_timing("time/generate") and is_timing("step_time")
    assert not is_timing("reward") and not is_timing("num_tokens")


# ------------------------------------------------------------------------------------------ console


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def steps(tracker, first, last, clock=None, seconds=1.0):
    for step in range(first, last + 1):
        if clock:
            clock.now += seconds
        tracker.log(
            step,
            {
                "reward": step / 1000,
                "kl": 0.01,
                "completions/mean_length": 4.0,
                "num_tokens": 50 * step,
                "step_time": 0.5,
            },
        )


def test_plain_lines_are_few_and_say_what_matters():
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(1000, stream=stream, clock=clock)
    tracker.log(0, {"eval/greedy_accuracy": 0.25, "eval/mean@4": 0.125})
    steps(tracker, 1, 1000, clock, seconds=0.01)
    tracker.close()
    text = stream.getvalue().splitlines()
    assert text[0] == "step 0/1000  evaluation: greedy_accuracy 0.25  mean@4 0.125"
    assert text[1] == "step 1/1000  reward 0.001  kl 0.0100  length 4.0  100 tokens/s  - left"
    assert text[2] == "step 26/1000  reward 0.026  kl 0.0100  length 4.0  100 tokens/s  0:00:10 left"
    assert text[-1].startswith("step 1000/1000  reward 1.000") and text[-1].endswith("0:00:00 left")
    assert 30 <= len(text) <= 52
    assert "\x1b" not in stream.getvalue()


def test_slow_steps_get_a_line_every_ten_seconds():
    stream, clock = io.StringIO(), Clock()
    steps(ConsoleTracker(10_000, stream=stream, clock=clock), 1, 30, clock, seconds=6)
    assert len(stream.getvalue().splitlines()) == 15


def test_the_last_step_and_missing_numbers_are_shown():
    stream = io.StringIO()
    tracker = ConsoleTracker(100, 98, stream=stream, clock=Clock())
    tracker.log(99, {"reward": None, "num_tokens": 5000, "step_time": 1.0})
    tracker.log(100, {"reward": 1.0, "num_tokens": 5050, "step_time": 0.5})
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 99/100  reward -  kl -  length -  - tokens/s")  # tokens before: unknown
    assert last.startswith("step 100/100  reward 1.000  kl -  length -  100 tokens/s")


HOSTILE = "[red]bold[/red] [/] \x1b]0;owned\x07\r\n\u202e\ud800 :smile: \x9b31m é"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_samples_are_a_table_of_harmless_text(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = stream()
    tracker = ConsoleTracker(10, stream=stream)
    row = {**SAMPLE, "prompt": HOSTILE, "completion": HOSTILE, "reward": None, "rewards/b": None}
    tracker.log_completions(5, [row, {**SAMPLE, "prompt": [{"role": "user", "content": HOSTILE}]}])
    tracker.log_completions(6, [])
    tracker.message("note: " + HOSTILE)
    tracker.close()
    text = stream.getvalue()
    for heading in ("step 5: completions", "prompt", "completion", "reward", "exact_match", "advantage"):
        assert heading in text
    assert "step 6" not in text
    assert "note: [red]bold[/red] [/] \\x1b]0;owned\\x07\\r\n\\u202e\\ud800 :smile: \\x9b31m é" in text
    for forbidden in ("\x1b]", "\x07", "\u202e", "\ud800", "\x9b"):
        assert forbidden not in text
    text.encode("utf-8")


def test_tables_of_figures_and_of_samples():
    stream = io.StringIO()
    tracker = ConsoleTracker(0, stream=stream)
    tracker.show(figures_table(f"title {HOSTILE}", ["name", "a"], [[HOSTILE, "1"], ["short", "22.5"]]))
    without = {name: value for name, value in SAMPLE.items() if name != "advantage"}
    tracker.show(samples_table("samples", [without]))
    text = stream.getvalue()
    for forbidden in ("\x1b]", "\x07", "\u202e", "\ud800", "\x9b"):
        assert forbidden not in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["short", "22.5"] in rows and ["1+1=", "2", "1"] in rows
    assert "title [red]bold[/red]" in text and "advantage" not in text


def test_a_plain_log_has_no_escape_codes_whatever_the_environment(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = io.StringIO()
    tracker = ConsoleTracker(10, stream=stream)
    steps(tracker, 1, 10)
    tracker.log_completions(5, [SAMPLE])
    tracker.close()
    assert "\x1b" not in stream.getvalue()


def test_an_ascii_log_takes_any_text():
    raw = io.BytesIO()
    tracker = ConsoleTracker(10, stream=io.TextIOWrapper(raw, encoding="ascii"))
    tracker.message("é ✓")
    tracker.log_completions(1, [{**SAMPLE, "completion": "é"}])
    assert b"\\xe9 \\u2713\n" in raw.getvalue()


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    tracker = ConsoleTracker(20, 5, stream=stream)
    try:
        steps(tracker, 6, 19)
        tracker.message("wandb sync " + "x" * 200)
        tracker.log(19, {"eval/greedy_accuracy": 0.75})
        steps(tracker, 20, 20)
    finally:
        tracker.close()
    text = stream.getvalue()
    assert "20/20" in text and "reward 0.020" in text and "length 4.0" in text and "100 tokens/s" in text
    assert "evaluation: greedy_accuracy 0.75" in text
    assert "wandb sync " + "x" * 200 in text  # not wrapped: it can be copied
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    steps(ConsoleTracker(4, stream=stream), 1, 4)
    assert len(stream.getvalue().splitlines()) == 4 and "\x1b" not in stream.getvalue()


def test_printable_keeps_what_is_readable():
    assert printable("é 中文 ∑ a b") == "é 中文 ∑ a b"
    assert printable("a\tb\n") == "a\\tb\\n"
    assert printable([{"role": "user", "content": "é"}]) == '[{"role": "user", "content": "é"}]'


# -------------------------------------------------------------------------------------- TensorBoard


def scalars(run_dir, name):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_is_read_back_by_tensorboard(tmp_path):
    tracker = TensorBoardTracker(tmp_path, {"training": {"batch_size": 4, "api_key": "hidden"}})
    tracker.log(0, {"eval/greedy_accuracy": 0.25})
    for step in range(1, 6):
        tracker.log(step, {"reward": step / 4, "rewards/a/mean": float(step), "kl": None})
    tracker.log_completions(5, [SAMPLE])
    tracker.close()
    assert scalars(tmp_path, "reward") == [(step, step / 4) for step in range(1, 6)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"eval/greedy_accuracy", "reward", "rewards/a/mean"}
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]
    }
    completions = next(text for tag, text in texts.items() if tag.startswith("completions"))
    config = next(text for tag, text in texts.items() if tag.startswith("config"))
    assert json.loads(completions) == SAMPLE
    assert '"batch_size": 4' in config and "hidden" not in config


def test_tensorboard_resumes_without_double_steps(tmp_path):
    for first, last, resume_step, sign in ((1, 8, None, -1), (1, 5, None, 1), (5, 9, 4, 2)):
        tracker = TensorBoardTracker(tmp_path, {}, resume_step)
        for step in range(first, last + 1):
            tracker.log(step, {"reward": sign * step})
        tracker.close()
    assert scalars(tmp_path, "reward") == [(s, s) for s in range(1, 5)] + [(s, 2 * s) for s in range(5, 10)]


def test_tensorboard_on_a_full_disk_never_hangs(tmp_path, monkeypatch):
    tracker = TensorBoardTracker(tmp_path, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    threads = threading.active_count()
    monkeypatch.setattr(tracker._writer._py_recordio_writer, "write", full)
    stream = io.StringIO()
    trackers = Trackers(
        JsonlTracker(tmp_path), ConsoleTracker(200, stream=stream), [tracker], num_completions=2
    )
    start = time.perf_counter()
    with trackers:
        steps(trackers, 1, 200)
    assert time.perf_counter() - start < 5
    assert threading.active_count() == threads  # nothing is left that the end of the process waits for
    assert stream.getvalue().count("TensorBoardTracker failed, and the run goes on without it: OSError") == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 200


# ---------------------------------------------------------------------------------- Weights & Biases


def wandb_records(path):
    """Reads a .wandb file: a LevelDB log of protocol buffers behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, payload, records = path.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b"")
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break  # still being written
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(payload))
            payload = b""
    return records


def wandb_history(path):
    """Returns {step: {metric: value}} of a finished run, whose last bytes come after `finish` returned."""
    deadline, records = time.monotonic() + 20, []
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        assert time.monotonic() < deadline, "the run was never completed"
        time.sleep(0.01)
        records = wandb_records(path)
    history = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history[row["_step"]] = row
    return history


def test_wandb_offline_holds_metrics_completions_and_config(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SOME_API_KEY", "value-of-a-secret")
    run_dir, said = tmp_path / "my run", []
    config = {"training": {"learning_rate": 1e-5}, "token": "hidden-1", "note": "see value-of-a-secret"}
    for resume_step in (None, 4):
        tracker = WandbTracker(run_dir, config, project="p", resume_step=resume_step, message=said.append)
        first = (resume_step or 0) + 1
        for step in range(first, first + 4):
            tracker.log(step, {"reward": step / 8, "rewards/exact_match/mean": 0.5, "kl": None})
        tracker.log(first + 3, {"eval/greedy_accuracy": 0.75})
        tracker.log_completions(first + 3, [SAMPLE, {**SAMPLE, "prompt": [{"role": "user", "content": "é"}]}])
        tracker.close()
        if resume_step is None:
            time.sleep(1.1)  # W&B names directories by the second

    run_id = (run_dir / "wandb_id").read_text()
    first, second = sorted(run_dir.glob(f"wandb/offline-run-*-{run_id}"))
    assert said[0] == f"wandb: the run is offline. Upload it with: wandb sync '{first}'"
    assert said[1] == f"wandb: the run is offline. Upload it with: wandb sync '{first}' '{second}'"
    assert capfd.readouterr() == ("", "")

    (file,) = first.glob("run-*.wandb")
    history = wandb_history(file)
    assert [history[step]["reward"] for step in range(1, 5)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert history[4]["rewards/exact_match/mean"] == 0.5
    assert history[4]["eval/greedy_accuracy"] == 0.75
    assert history[4]["completions/_type"] == "table-file"
    (path,) = first.glob("files/media/table/*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == list(SAMPLE)
    assert table["data"][0] == list(SAMPLE.values())
    assert json.loads(table["data"][1][0]) == [{"role": "user", "content": "é"}]
    (file2,) = second.glob("run-*.wandb")
    assert sorted(wandb_history(file2)) == [5, 6, 7, 8]

    (run,) = [r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name) == (run_id, "p", "my run")
    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert logged["training"] == {"learning_rate": 1e-5}
    for secret in (b"hidden-1", b"value-of-a-secret"):
        assert secret not in file.read_bytes()


@pytest.mark.parametrize("mode", ["disabled", "online"])
def test_wandb_mode_is_respected(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    said = []
    tracker = WandbTracker(tmp_path / "run", {}, project="p", message=said.append)
    tracker.log(1, {"reward": 0.5})
    tracker.close()
    offline = list(tmp_path.glob("run/wandb/offline-run-*"))
    if mode == "disabled":
        assert not offline and not said
    else:  # without a key nobody is asked for one
        expected = "wandb: WANDB_MODE is online but there is no key, so the run is written offline"
        assert offline and said[0] == expected


def test_wandb_that_cannot_be_opened_online_is_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    said, modes, init = [], [], wandb.init

    def no_network(*args, mode, **keywords):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no\nnetwork")
        return init(*args, mode=mode, **keywords)

    monkeypatch.setattr(wandb, "init", no_network)
    tracker = WandbTracker(tmp_path / "run", {}, project="p", message=said.append)
    tracker.log(1, {"reward": 0.5})
    tracker.close()
    assert modes == ["online", "offline"]
    assert said[0] == "wandb: it cannot be opened (CommError: no network), so the run is written offline"
    (file,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    assert wandb_history(file)[1]["reward"] == 0.5
    assert b"x" * 40 not in file.read_bytes()


def test_a_key_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("not a netrc {")
    assert not has_wandb_key()
    (tmp_path / "no_config").mkdir()
    (tmp_path / "no_config" / "settings").write_text("[default]\napi_key = 1%2\n")
    assert has_wandb_key()
    (tmp_path / "no_config" / "settings").write_text("nonsense\n")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_wandb_key()


@pytest.mark.parametrize("option, package", [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_extra_is_said_before_anything_is_touched(tmp_path, monkeypatch, option, package):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setitem(sys.modules, package, None)
    tracking = TrackingConfig(**{option: True})
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "grpo-jax\[{option}\]"'):
        make_trackers(tracking, run_dir=tmp_path, config={}, total_steps=1, resume_step=None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# ------------------------------------------------------------------------------------------ secrets


def test_secrets_are_hidden_and_the_rest_is_not(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cret-value")
    hidden = {
        "api_key": "a",
        "apiKey": "a",
        "hf_token": "a",
        "client-secret": 7,
        "PASSWORD": 1234,
        "credentials": {"user": "a"},
        "env": {"PATH": "a"},
        "keys": ["a"],
    }
    assert redact({"deep": [hidden]}) == {"deep": [dict.fromkeys(hidden, "[redacted]")]}
    texts = ["use s3cret-value now", "https://me:pw@host/x", "hf_" + "a" * 34, "sk-proj-" + "b" * 30]
    assert redact(texts) == ["use [redacted] now", "https://[redacted]@host/x", "[redacted]", "[redacted]"]
    shown = {
        "max_new_tokens": 64,
        "num_tokens": 1.5,
        "token": None,
        "monkey": "see",
        "keep": 2,
        "hf_model_name": "packaged:arithmetic",
        "revision": "hf-internal-testing/tiny-random-gpt2",
        "resume": "auto",
    }
    assert redact(shown) == shown


# ----------------------------------------------------------------------------------------- together


class Broken:
    def __init__(self):
        self.calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("no\nroute [red]")

    log_completions = log

    def close(self):
        raise RuntimeError("still broken")


def test_an_outage_is_said_once_and_stops_nothing(tmp_path):
    stream, broken = io.StringIO(), Broken()
    with Trackers(
        JsonlTracker(tmp_path), ConsoleTracker(5, stream=stream), [broken], num_completions=1
    ) as trackers:
        steps(trackers, 1, 5)
        trackers.log_completions(5, [SAMPLE, SAMPLE])
        trackers.message("a notice")
    text = stream.getvalue()
    assert broken.calls == 6  # it may come back
    assert text.count("Broken failed, and the run goes on without it: ConnectionError: no route [red]\n") == 1
    assert "still broken" not in text and "a notice\n" in text
    assert len(lines(tmp_path / "metrics.jsonl")) == 5
    assert len(lines(tmp_path / "completions.jsonl")) == 1  # num_completions


def test_a_closed_pipe_stops_nothing(tmp_path, capsys):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    with Trackers(JsonlTracker(tmp_path), ConsoleTracker(5, stream=Closed()), num_completions=1) as trackers:
        steps(trackers, 1, 5)
        trackers.message("lost")
    assert len(lines(tmp_path / "metrics.jsonl")) == 5
    assert capsys.readouterr().err.count("ConsoleTracker failed") == 1


def test_an_error_of_the_record_goes_through(tmp_path):
    trackers = Trackers(JsonlTracker(tmp_path), ConsoleTracker(5, stream=io.StringIO()), num_completions=1)
    trackers.close()
    with pytest.raises(ValueError, match="closed"):
        trackers.log(1, {"reward": 1.0})


def test_rows_of_a_table_are_spread():
    assert (
        spread("abcdefgh", 4) == ["a", "c", "e", "g"] and spread([1, 2], 5) == [1, 2] and spread([], 3) == []
    )


def test_bars():
    assert bars([8, 0, 1, 4]) == "█.▁▄" and bars([]) == "" and bars([0, 0]) == ".."
    assert bars([1000, 1, 125, 126]) == "█▁▁▂"


def test_make_trackers_opens_what_the_config_asks_for(tmp_path, capsys):
    tracking = TrackingConfig(tensorboard=True, wandb=True, wandb_name="name", num_completions=1)
    for resume_step in (None, 2):
        with make_trackers(
            tracking, run_dir=tmp_path, config={"a": 1}, total_steps=4, resume_step=resume_step
        ) as trackers:
            first = (resume_step or 0) + 1
            steps(trackers, first, first + 2)
            trackers.log(first + 2, {})
            trackers.log_completions(first + 1, [SAMPLE, SAMPLE])
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in lines(tmp_path / "completions.jsonl")] == [2, 4]
    assert [step for step, _ in scalars(tmp_path, "reward")] == [1, 2, 3, 4, 5]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    text = capsys.readouterr().out
    assert "step 4/4" in text and "wandb sync" in text


def test_a_plain_run_needs_no_extra_and_no_jax(tmp_path):
    code = (
        "import sys, types; p = types.ModuleType('grpo_jax'); p.__path__ = [sys.argv[1]]\n"
        "sys.modules['grpo_jax'] = p  # the package itself re-exports the algebra\n"
        "from grpo_jax.trackers import make_trackers\n"
        "t = types.SimpleNamespace(tensorboard=False, wandb=False, num_completions=1)\n"
        "with make_trackers(t, run_dir=sys.argv[2], config={}, total_steps=1) as trackers:\n"
        "    trackers.log(1, {'reward': 1.0})\n"
        "print([m for m in ('jax', 'transformers', 'orbax', 'wandb', 'tensorboardX') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, grpo_jax.__path__[0], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
