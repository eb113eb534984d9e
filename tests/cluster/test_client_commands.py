"""`kvrelay generate` and `kvrelay chat` against a scripted server; some in their own process."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import click
import grpc
import pytest
from click.testing import CliRunner, Result
from ports import silent_address
from scripted_server import (
    DEADLINE_S,
    Hold,
    Refusal,
    ScriptedServer,
    accepted,
    answer,
    delta,
    finished,
    scripted_server,
)

from cluster.client_commands import chat, generate

# A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from cluster.client_commands import chat, generate
{command}(prog_name="kvrelay")
"""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as double:
        yield double


def run(command: click.Command, server: ScriptedServer, *args: str, typed: bytes = b"") -> Result:
    return CliRunner().invoke(command, [*args, "--address", server.address], input=typed)


@contextlib.contextmanager
def process(command: str, server: ScriptedServer, *args: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", PROGRAM.format(command=command), *args]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [*argv, "--address", server.address], text=True, encoding="utf-8", **pipes
    ) as child:
        deadline = threading.Timer(DEADLINE_S, child.kill)  # ends a read that nothing else would
        deadline.start()
        try:
            yield child
        finally:
            deadline.cancel()
            deadline.join()
            child.kill()  # without effect on one that has ended


# ---- generate


def test_the_answer_is_all_there_is_on_standard_output(server: ScriptedServer) -> None:
    server.scripts = [answer("naïve ", "日本", "🦊")]
    result = run(generate, server, "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "naïve 日本🦊\n", "")


def test_pieces_are_printed_as_they_come(server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[accepted(), delta(0, [1], "日"), gate, delta(1, [2], "本"), finished(2)]]
    with process("generate", server, "hi") as child:
        assert child.stdout.read(1) == "日"  # the server goes on only when this has come
        gate.set()
        assert child.communicate(timeout=DEADLINE_S) == ("本\n", "")
        assert child.returncode == 0


def test_the_prompt_is_a_users_message_unless_raw(server: ScriptedServer) -> None:
    run(generate, server, "日本 🦊")
    run(generate, server, "--raw", "日本 🦊")
    through_chat, raw = server.requests
    assert [(m.role, m.content) for m in through_chat.messages] == [("user", "日本 🦊")]
    assert raw.text == "日本 🦊"


def test_sampling_options_reach_the_server(server: ScriptedServer) -> None:
    options = "--max-tokens 9 --temperature 0.5 --top-k 4 --top-p 0.9 --seed 18446744073709551615"
    run(generate, server, "hi", *options.split(), "--stop", "a", "--stop", "b")
    run(generate, server, "hi")
    given, none = (request.sampling for request in server.requests)
    assert (given.max_tokens, given.temperature, given.top_k, given.top_p) == (9, 0.5, 4, 0.9)
    assert (given.seed, list(given.stop)) == (2**64 - 1, ["a", "b"])
    assert not none.ListFields()


def test_extras_of_sampling_reach_the_server(server: ScriptedServer) -> None:
    penalties = "--repetition-penalty 1.5 --presence-penalty -2 --frequency-penalty 0.25"
    ends = "--min-p 0.1 --min-tokens 4 --ignore-eos --stop-token-id 5 --stop-token-id 0"
    run(generate, server, "hi", *penalties.split(), *ends.split())
    given = server.requests[0].sampling
    told = (given.repetition_penalty, given.presence_penalty, given.frequency_penalty)
    assert told == (1.5, -2, 0.25)
    assert (given.min_p, given.min_tokens, given.ignore_eos) == (0.1, 4, True)
    assert list(given.stop_token_ids) == [5, 0]


def test_a_dash_reads_standard_input_as_it_is(server: ScriptedServer) -> None:
    assert run(generate, server, "--raw", "-", typed="één\nzwei\n".encode()).exit_code == 0
    assert server.requests[0].text == "één\nzwei\n"


def test_standard_input_that_is_not_text_is_an_error(server: ScriptedServer) -> None:
    for command, args in ((generate, ["-"]), (chat, [])):
        result = run(command, server, *args, typed=b"\xff\xfe\n")
        assert result.exit_code == 1
        assert result.stderr == "error: standard input is not UTF-8 text\n"


def test_json_is_one_object_and_nothing_else(server: ScriptedServer) -> None:
    server.scripts = [answer("naïve ", "🦊")]
    result = run(generate, server, "hi", "--json")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert "🦊" in result.stdout
    assert json.loads(result.stdout) == {
        "text": "naïve 🦊",
        "token_ids": [100, 101],
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "cached_tokens": 3,
        "completion_tokens": 2,
        "seed": 7,
        "queue_ms": 1.5,
        "prefill_ms": 20.0,
        "ttft_ms": 25.0,
        "tpot_ms": 10.0,
        "kv_bytes": 4_000_000,
        "kv_transfer_ms": 2.0,
        "kv_exposed_ms": 0.5,
        "transport": "shm",
    }


@pytest.mark.parametrize("also", [[], ["--json"]])
def test_timings_go_to_standard_error(server: ScriptedServer, also: list[str]) -> None:
    plain = run(generate, server, "hi", *also)
    timed = run(generate, server, "hi", "--timings", *also)
    assert timed.stdout == plain.stdout
    assert "KV hand-off" in timed.stderr


def test_address_from_the_environment(server: ScriptedServer) -> None:
    result = CliRunner().invoke(generate, ["hi"], env={"KVRELAY_ADDRESS": server.address})
    assert result.stdout == "Hello\n"


@pytest.mark.parametrize("raw", [[], ["--raw"], ["--json"]])
def test_an_error_is_one_line(server: ScriptedServer, raw: list[str]) -> None:
    server.scripts = [[Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full;\nretry in 2 s")]]
    result = run(generate, server, "hi", *raw)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: queue full; retry in 2 s\n"


def test_an_answer_broken_off_ends_its_line(server: ScriptedServer) -> None:
    server.scripts = [[*answer("a")[:-1], Refusal(grpc.StatusCode.INTERNAL, "oh")]]
    result = run(generate, server, "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "a\n", "error: oh\n")


def test_nothing_listening() -> None:
    with silent_address() as address:
        result = CliRunner().invoke(generate, ["hi", "--address", address])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: nothing answers at {address}; start a server with `kvrelay serve MODEL`\n"
    )


def test_a_prompt_that_is_not_unicode_is_an_error(server: ScriptedServer) -> None:
    result = run(generate, server, "\udce9")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    ["--max-tokens=0", "--temperature=3", "--top-k=-1", "--top-p=0", "--seed=-1", "--nonsense"],
)
def test_a_bad_option_is_clicks_usage_error(server: ScriptedServer, option: str) -> None:
    for command, args in ((generate, ["hi"]), (chat, [])):
        assert run(command, server, *args, option).exit_code == 2
    assert not server.requests


@pytest.mark.parametrize(("also", "printed", "line_end"), [([], "a", "\n"), (["--json"], "", "")])
def test_ctrl_c_cancels_and_is_quiet(
    server: ScriptedServer, also: list[str], printed: str, line_end: str
) -> None:
    server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
    with process("generate", server, "hi", *also) as child:
        assert server.held.wait(DEADLINE_S)
        assert child.stdout.read(len(printed)) == printed
        child.send_signal(signal.SIGINT)
        assert server.cancelled.wait(DEADLINE_S)
        assert child.communicate(timeout=DEADLINE_S) == (line_end, "")
        assert child.returncode == 130


def test_a_closed_pipe_is_quiet_and_cancels(server: ScriptedServer) -> None:
    gate = threading.Event()
    server.scripts = [[accepted(), delta(0, [1], "a"), gate, delta(1, [2], "b"), Hold()]]
    with process("generate", server, "hi") as child:
        assert child.stdout.read(1) == "a"
        child.stdout.close()
        gate.set()
        assert server.cancelled.wait(DEADLINE_S)
        assert child.wait(DEADLINE_S) == 1
        assert child.stderr.read() == ""


def test_a_server_that_goes_away_is_one_line_too() -> None:
    with scripted_server() as server:
        server.scripts = [[accepted(), delta(0, [1], "a"), Hold()]]
        with process("generate", server, "hi", "--resume-for", "0.2") as child:
            assert child.stdout.read(1) == "a"
            server.stop()
            stdout, stderr = child.communicate(timeout=DEADLINE_S)
    assert (child.returncode, stdout) == (1, "\n")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


# ---- chat


def test_chat_keeps_the_history(server: ScriptedServer) -> None:
    server.scripts = [answer("Hal", "lo"), answer("ja")]
    result = run(chat, server, "--system", "Be brief.", typed="één\n\nzwei\n".encode())
    assert result.exit_code == 0
    assert result.stdout == "you> model> Hallo\nyou> you> model> ja\nyou> \n"
    assert [(m.role, m.content) for m in server.requests[1].messages] == [
        ("system", "Be brief."),
        ("user", "één"),
        ("assistant", "Hallo"),
        ("user", "zwei"),
    ]


def test_reset_forgets_all_but_the_system_message(server: ScriptedServer) -> None:
    run(chat, server, "--system", "Be brief.", "--seed", "3", typed=b"one\n/reset\ntwo\n")
    last = server.requests[1]
    assert [m.content for m in last.messages] == ["Be brief.", "two"]
    assert last.sampling.seed == 3


def test_exit_leaves(server: ScriptedServer) -> None:
    result = run(chat, server, typed=b"/exit\nnever asked\n")
    assert result.exit_code == 0
    assert not server.requests


def test_an_error_is_shown_and_its_question_dropped(server: ScriptedServer) -> None:
    broken = [*answer("half")[:-1], Refusal(grpc.StatusCode.INTERNAL, "oh")]
    server.scripts = [answer("one"), broken, answer("three")]
    result = run(chat, server, typed=b"1\n2\n3\n")
    assert result.exit_code == 0
    assert result.stderr == "error: oh\n"
    assert result.stdout == "you> model> one\nyou> model> half\nyou> model> three\nyou> \n"
    assert [m.content for m in server.requests[2].messages] == ["1", "one", "3"]


def test_ctrl_c_stops_the_answer_and_not_the_talk(server: ScriptedServer) -> None:
    server.scripts = [[accepted(), delta(0, [1], "long"), Hold()], answer("short")]
    with process("chat", server) as child:
        child.stdin.write("first\n")
        child.stdin.flush()
        begun = "you> model> long"
        assert child.stdout.read(len(begun)) == begun
        child.send_signal(signal.SIGINT)
        assert server.cancelled.wait(DEADLINE_S)
        # The next prompt says that the signal has been dealt with.
        assert child.stdout.read(len("\nyou> ")) == "\nyou> "
        stdout, stderr = child.communicate("shorter\n", timeout=DEADLINE_S)
        assert (child.returncode, stderr) == (0, "")
        assert stdout == "model> short\nyou> \n"
    assert [m.content for m in server.requests[1].messages] == ["first", "long", "shorter"]


def test_ctrl_c_at_the_prompt_stays(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not a signal: CPython misses one that comes just before input() begins to wait.
    typed: Iterator[str | BaseException] = iter([KeyboardInterrupt(), "hi", EOFError()])

    def scripted_input(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", scripted_input)
    result = run(chat, server)
    assert result.exit_code == 0
    assert result.stdout == "\n(/exit or Ctrl-D leaves)\nmodel> Hello\n\n"


# ---- several addresses


@pytest.mark.parametrize("command", [generate, chat])
def test_an_answer_goes_on_at_the_next_address(
    server: ScriptedServer, command: click.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    with scripted_server() as other:
        server.scripts = [[accepted(), delta(0, [1], "one "), lost]]
        other.scripts = [[accepted(), delta(1, [2], "two"), finished(2)]]
        monkeypatch.setenv("KVRELAY_ADDRESS", f"{server.address},{other.address}")
        arguments = ["hi"] if command is generate else []
        result = CliRunner().invoke(command, arguments, input=b"hi\n/exit\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "one two\n" in result.stdout
    assert len(other.requests) == 1
