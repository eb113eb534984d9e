"""`kvrelay generate` and `kvrelay chat`: owns what a person at a terminal types, sees and can stop.

Registered by cluster/cli.py. Standard output carries the answer and nothing else; errors are one
line on standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack

import click
from click.exceptions import Exit

# Read when gRPC is loaded. It would report a server's going away on standard error by itself.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from grpc import StatusCode

from kvrelay.client import (
    DEFAULT_ADDRESS,
    DEFAULT_RESUME_S,
    Client,
    Completion,
    KvrelayError,
    RequestOptions,
    Stream,
)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_REQUEST_OPTIONS: tuple[_Decorator, ...] = (
    click.option(
        "--address",
        default=DEFAULT_ADDRESS,
        envvar="KVRELAY_ADDRESS",
        show_default=True,
        show_envvar=True,
        metavar="HOST:PORT[,...]",
        help="Where the server listens; several routers of a cluster with commas between.",
    ),
    click.option(
        "--api-key",
        envvar="KVRELAY_API_KEY",
        show_envvar=True,
        metavar="KEY",
        help="For a server that asks for one; others can see what is on a command line.",
    ),
    click.option(
        "--certificates",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        envvar="KVRELAY_CERTIFICATES",
        show_envvar=True,
        help="Folder with ca.pem, and cert.pem and key.pem if the server asks for them: TLS.",
    ),
    click.option(
        "--resume-for",
        "resume_for_s",
        type=click.FloatRange(0),
        default=DEFAULT_RESUME_S,
        show_default=True,
        metavar="SECONDS",
        help="How long an answer may take to go on when its server is lost; 0: it ends.",
    ),
    click.option("--max-tokens", type=click.IntRange(1, 2**31 - 1), help="Answer length limit."),
    click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy."),
    click.option(
        "--top-k", type=click.IntRange(0, 2**31 - 1), help="Keep the K likeliest tokens; 0: all."
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Keep the likeliest tokens that add up to P.",
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**64 - 1), help="Same request and seed, same answer."
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
    ),
    click.option("--min-p", type=click.FloatRange(0, 1), help="Keep what is P times as likely."),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(0, min_open=True),
        help="Above 1: tokens that were there come less.",
    ),
    click.option("--presence-penalty", type=click.FloatRange(-2, 2), help="Above 0: new topics."),
    click.option("--frequency-penalty", type=click.FloatRange(-2, 2), help="Above 0: less again."),
    click.option("--min-tokens", type=click.IntRange(0, 2**31 - 1), help="No end before so many."),
    click.option("--ignore-eos", is_flag=True, help="Go on where the model would end."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        multiple=True,
        type=click.IntRange(0, 2**32 - 1),
        help="End at this token; may be repeated.",
    ),
)


def _request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("prompt")
@_request_options
@click.option("--raw", is_flag=True, help="Continue PROMPT as it stands, without chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when all is there.")
@click.option("--timings", is_flag=True, help="Print where the time went, on standard error.")
def generate(
    prompt: str,
    address: str,
    api_key: str | None,
    certificates: Path | None,
    resume_for_s: float,
    raw: bool,
    as_json: bool,
    timings: bool,
    **options: Unpack[RequestOptions],
) -> None:
    """Answer PROMPT, streaming to standard output; - reads it from standard input, as it is."""
    with (
        _exit_codes(),
        Client(
            address, api_key=api_key, certificates=certificates, resume_for_s=resume_for_s
        ) as client,
    ):
        text = _standard_input() if prompt == "-" else prompt
        with client.generate(text, **options) if raw else client.chat(text, **options) as stream:
            if not as_json:
                _print_answer(stream)
            completion = stream.result()
        if as_json:
            click.echo(json.dumps(_as_json(completion), ensure_ascii=False))
        if timings:
            _print_phases(completion)


@click.command()
@_request_options
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
def chat(
    address: str,
    api_key: str | None,
    certificates: Path | None,
    resume_for_s: float,
    system: str | None,
    **options: Unpack[RequestOptions],
) -> None:
    """Talk with the model; it is told the conversation so far each time.

    Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() line editing
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    with (
        _exit_codes(),
        Client(
            address, api_key=api_key, certificates=certificates, resume_for_s=resume_for_s
        ) as client,
    ):
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                history = list(start)
            elif line:
                history = _take_turn(client, history, line, options)


def _take_turn(
    client: Client, history: list[dict[str, str]], line: str, options: RequestOptions
) -> list[dict[str, str]]:
    """The history after one question; unchanged when it got no answer."""
    asked = [*history, {"role": "user", "content": line}]
    pieces: list[str] = []
    try:
        with client.chat(asked, **options) as stream:
            _print_answer(stream, pieces, prompt="model> ")
    except KvrelayError as error:
        _print_error(error)
        return history
    except KeyboardInterrupt:
        # What was read before the answer was stopped is part of the talk: "shorter, please".
        if not pieces:
            return history
    return [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _read_line() -> str | None:
    """What was typed after `you> `, or None at the end of the input."""
    try:
        return input("you> ").strip()
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        # Likely meant for an answer that had just ended: leaving would lose the conversation.
        click.echo("\n(/exit or Ctrl-D leaves)")
        return ""
    except UnicodeDecodeError as error:
        raise _not_text() from error


def _print_answer(stream: Stream, pieces: list[str] | None = None, *, prompt: str = "") -> None:
    """Prints `prompt`, then the text as it comes, kept in `pieces`; a line begun is ended."""
    pieces = [] if pieces is None else pieces
    click.echo(prompt, nl=False)
    try:
        for text in stream:
            pieces.append(text)
            click.echo(text, nl=False)
    finally:
        if prompt or pieces:
            click.echo()


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise _not_text() from error


def _not_text() -> KvrelayError:
    return KvrelayError(StatusCode.INVALID_ARGUMENT, "standard input is not UTF-8 text")


def _as_json(completion: Completion) -> dict[str, Any]:
    timings = completion.timings
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
        "completion_tokens": completion.completion_tokens,
        "seed": completion.seed,
        "queue_ms": timings.queue_ms,
        "prefill_ms": timings.prefill_ms,
        "ttft_ms": timings.ttft_ms,
        "tpot_ms": timings.tpot_ms,
        "kv_bytes": timings.kv_bytes,
        "kv_transfer_ms": timings.kv_transfer_ms,
        "kv_exposed_ms": timings.kv_exposed_ms,
        "transport": timings.transport,
    }


def _print_phases(completion: Completion) -> None:
    # Loaded here: rich takes tens of milliseconds, and few runs print the table.
    from rich.console import Console

    from cluster.phase_table import phase_table

    Console(stderr=True).print(phase_table(completion))


def _print_error(error: KvrelayError) -> None:
    click.echo(f"error: {error}", err=True)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Ends the command as scripts expect. click itself is quiet about a broken pipe."""
    try:
        yield
    except KvrelayError as error:
        _print_error(error)
        raise Exit(EXIT_FAILED) from error
    except KeyboardInterrupt:
        raise Exit(EXIT_INTERRUPTED) from None
