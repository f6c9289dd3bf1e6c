"""What only a process shows: imports, signals, pipes, terminals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from nanorun.cli.app import COMMANDS
from tests.support.waiting import PATIENCE_S, wait_until

FAKE = Path(__file__).parents[1] / "support" / "fake_nanorun.py"
HEAVY = ("numpy", "llama_cpp", "torch", "textual", "rich", "fastapi", "uvicorn", "jinja2")

_IMPORTS = """
import sys
from nanorun.cli import main
try:
    main({args!r})
except SystemExit as end:
    assert end.code == 0, end.code
loaded = sorted(name for name in sys.modules if name.startswith("nanorun.cli.commands."))
print(*[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
print(*loaded, file=sys.stderr)
"""


def modules_loaded(*args: str) -> tuple[list[str], list[str]]:
    """Heavy modules, and those of the command line, that a command line imports."""
    code = _IMPORTS.format(args=list(args), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, own = done.stderr.splitlines()
    return heavy.split(), [name.removeprefix("nanorun.cli.commands.") for name in own.split()]


@pytest.mark.parametrize("args", [["--help"], ["--version"]], ids=str)
def test_root_imports_nothing_heavy_and_no_command(args: list[str]) -> None:
    heavy, own = modules_loaded(*args)
    assert heavy == []
    assert not set(own) & set(COMMANDS)


@pytest.mark.parametrize("command", ["chat", "run", "serve", "eval"])
def test_help_of_a_command_imports_nothing_heavy_and_no_other(command: str) -> None:
    heavy, own = modules_loaded(command, "--help")
    assert heavy == []
    assert own == [command.replace("-", "_")]


@contextmanager
def process(case: str, *args: str, **options: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    streams: dict[str, int | IO[bytes]] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options,
    }
    running = subprocess.Popen([sys.executable, str(FAKE), case, *args], **streams)  # type: ignore[call-overload]
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        for stream in (running.stdout, running.stderr):
            if stream is not None:
                stream.close()
        running.wait()


def read_until(stream: IO[bytes] | None, text: bytes) -> bytes:
    assert stream is not None
    read = b""
    while text not in read:
        piece = os.read(stream.fileno(), 4096)
        assert piece, read
        read += piece
    return read


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    with process("long", "run", "pico", "x") as running:
        begun = read_until(running.stdout, b"word word")
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert (begun + out).startswith(b"word word")
    assert (begun + out).endswith(b"\n")
    assert err == b"hm\n\n"


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a fake notes how far it is."""
    monkeypatch.setenv("FAKE_NANORUN_NOTES", str(tmp_path))
    return tmp_path


def test_ctrl_c_as_json_still_prints_the_object(notes: Path) -> None:
    with process("long and noted", "run", "pico", "x", "--json") as running:
        wait_until((notes / "asked").exists)
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert json.loads(out)["finish_reason"] == "cancelled"


def test_ctrl_c_while_loading_ends_without_a_traceback(notes: Path) -> None:
    with process("loading", "run", "pico", "x") as running:
        wait_until((notes / "started").exists)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_twice_leaves_at_once() -> None:
    with process("stubborn", "run", "pico", "x") as running:
        read_until(running.stdout, b"word")
        running.send_signal(signal.SIGINT)
        read_until(running.stdout, b"word word")
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    assert rest.count(b"word") < 2000  # of 3000: it did not go on to the end


def test_reader_that_has_enough_ends_it_quietly() -> None:
    with process("long", "run", "pico", "x") as running:
        read_until(running.stdout, b"word")
        assert running.stdout is not None
        running.stdout.close()
        running.stdout = None
        _, err = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, err) == (1, b"hm\n\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("args", [["run", "pico", "x"], ["run", "pico", "x", "--json"]], ids=str)
def test_disk_that_is_full_is_told_once(args: list[str]) -> None:
    with Path("/dev/full").open("wb") as full, process("short", *args, stdout=full) as running:
        _, err = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 1
    lines = err.decode().splitlines()
    assert lines[-1] == (
        "nanorun: error: standard output cannot be written: no space left on device"
    )
    assert b"Exception" not in err


def test_answer_arrives_although_nobody_takes_the_thinking() -> None:
    command = f'"{sys.executable}" "{FAKE}" short run pico x 2>&-'
    done = subprocess.run(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == b"it is 4\n"


def on_terminal(case: str, **environment: str) -> str:
    """What a person sees."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", **environment}
    try:
        command = [sys.executable, str(FAKE), case, "run", "pico", "x"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env
        ) as running:
            os.close(theirs)
            seen = b""
            # Linux reports the end of a terminal as an error.
            with suppress(OSError):
                while piece := os.read(ours, 4096):
                    seen += piece
            assert running.wait(PATIENCE_S) == 0
    finally:
        os.close(ours)
    return seen.decode().replace("\r\n", "\n")


def test_terminal_shows_thinking_dimmed_and_the_cost() -> None:
    seen = on_terminal("short")
    assert "\x1b[2mtwo \x1b[0m" in seen
    assert "it is 4\n" in seen
    assert "3 thinking + 3 answer tokens, 50.0 t/s" in seen


def test_terminal_without_colour_gets_none() -> None:
    seen = on_terminal("short", NO_COLOR="1")
    assert "\x1b[2m" not in seen
    assert "two and two\n\nit is 4\n" in seen


def test_terminal_is_not_steered_by_the_model() -> None:
    seen = on_terminal("escapes", NO_COLOR="1")
    assert "reading the prompt: 512 of 4096 tokens" in seen
    assert "]0;titlehm\n" in seen
    assert "red [31malert0m\tend\n" in seen
    assert "\x1b]" not in seen
    assert "\x9b" not in seen


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a shell script in which `nanorun` answers with the question."""
    function = f'nanorun() {{ "{sys.executable}" "{FAKE}" echo "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", function + script], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


STANDARD_INPUTS = {
    "pipe": ("printf '1\\n2\\n' | nanorun run pico sum", b"sum||1|2\n"),
    "slow pipe": ("(sleep 1; echo 1; sleep 1; echo 2) | nanorun run pico sum", b"sum||1|2\n"),
    "empty pipe": (": | nanorun run pico sum", b"sum\n"),
    "file": ("nanorun run pico sum < list", b"sum||a|b|c\n"),
    "device": ("nanorun run pico sum < /dev/null", b"sum\n"),
    "closed": ("nanorun run pico sum <&-", b"sum\n"),
    "no prompt": ("nanorun run pico < list", b"a|b|c\n"),
    "dash": ("nanorun run pico - < list", b"a|b|c\n"),
    "dash below": ("nanorun run pico sum - < list", b"sum||a|b|c\n"),
    "dash waits": ("(sleep 7; echo 1) | nanorun run pico sum -", b"sum||1\n"),
    "chain": ("nanorun run pico a | nanorun run pico b -", b"b||a\n"),
    "loop": ("while read q; do nanorun run pico $q; done < list", b"a\nb\nc\n"),
    "loop with dash": (
        "while read q; do nanorun run pico $q -; done < list", b"a||b|c\n"
    ),
    "loop over a pipe": (
        "cat list | while read q; do nanorun run pico $q < /dev/null; done", b"a\nb\nc\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STANDARD_INPUTS)
def test_standard_input_is_read_when_it_is_meant(tmp_path: Path, case: str) -> None:
    script, answer = STANDARD_INPUTS[case]
    (tmp_path / "list").write_text("a\nb\nc\n")
    assert shell(f"cd {tmp_path}; {script}").stdout == answer


def test_pipe_that_brings_nothing_is_left_alone_with_a_word() -> None:
    ours, theirs = os.pipe()  # never written to, never closed
    try:
        with process("echo", "run", "pico", "2+3?", stdin=ours) as running:
            out, err = running.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (running.returncode, out) == (0, b"2+3?\n")
    assert err.startswith(b"nanorun: standard input brought nothing in 5 s and is left alone")


def test_pipe_that_does_not_end_is_waited_for_with_a_word() -> None:
    with process("echo", "run", "pico", "sum", stdin=subprocess.PIPE) as running:
        assert running.stdin is not None
        running.stdin.write(b"1")
        running.stdin.flush()
        assert read_until(running.stderr, b"\n") == (
            b"nanorun: waiting for the end of standard input\n"
        )
        out, _ = running.communicate(b"2", timeout=60)
    assert (running.returncode, out) == (0, b"sum||12\n")


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("flags", ["", "--json"])
def test_texts_are_utf8_where_the_locale_says_nothing(flags: str) -> None:
    done = shell(f"nanorun run pico 'say “é”' --system 'ü' {flags}", **C_LOCALE)
    assert (done.returncode, done.stderr) == (0, b"")
    answer = json.loads(done.stdout)["answer"] if flags else done.stdout.decode()
    assert answer.strip() == "say “é”"


def test_text_that_is_not_utf8_is_refused_in_any_locale() -> None:
    for environment in (C_LOCALE, {}):
        done = shell("nanorun run pico $'caf\\xe9'", **environment)
        assert done.returncode == 2
        assert done.stderr == b"nanorun: error: the prompt is not UTF-8 text\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("args", ["--help", "run --help", "--version", "doctor --help"])
@pytest.mark.parametrize(
    ("where", "reason"), [(">/dev/full", "no space left on device"), (">&-", "it is closed")]
)
def test_help_that_cannot_be_written_is_told_once(args: str, where: str, reason: str) -> None:
    done = shell(f"nanorun {args} {where}")
    error = f"nanorun: error: standard output cannot be written: {reason}\n"
    assert (done.returncode, done.stderr.decode()) == (1, error)


def test_answer_that_nobody_can_get_is_not_called_a_success() -> None:
    done = shell("nanorun run pico 1+1 >&-")
    assert done.returncode == 1
    assert done.stderr == (b"nanorun: error: standard output cannot be written: it is closed\n")
