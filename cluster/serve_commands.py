"""`kvrelay serve` and `kvrelay demo`: registered by cluster/cli.py."""

import contextlib
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.console import Console

from cluster.model_store import BUILT_IN, ModelError, prepare
from cluster.options import LOG_FORMAT, ServeError, ServeOptions
from cluster.phase_table import phase_table
from cluster.preparation import Progress as Report
from cluster.progress import console, errors_in_one_line, reporting
from cluster.weights import pack_weights
from kvrelay.cache import default_cache
from kvrelay.client import Client, KvrelayError
from kvrelay.config import Device, Dtype, KvDtype, LocalPrefill, Quantize, Transport, WireCodec

if TYPE_CHECKING:
    from cluster.serving import Serving

DEMO_QUESTIONS = ("What is the capital of France?", "Why is the sky blue? Answer in two sentences.")
_DEMO_MAX_TOKENS = 96


class _Finite(click.FloatRange):
    """NaN is in no range, and click's own lets it pass."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail("nan is not a number.", param, ctx)
        return number


@click.command()
@click.argument("model")
@click.option(
    "--prefill",
    type=click.IntRange(0, 64),
    default=1,
    help="Prefill workers; 0: decode workers compute prompts, too.",
)
@click.option("--decode", type=click.IntRange(1, 64), default=1, help="Decode workers.")
@click.option(
    "--routers",
    type=click.IntRange(1, 64),
    default=1,
    help="Router processes, each with all workers. --port and --http-port are the first one's;"
    " the next have the next numbers.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to listen on; others than loopback need --certificates.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=50051, help="gRPC; 0 picks a free one."
)
@click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    default=8000,
    help="OpenAI's API; 0 picks a free one.",
)
@click.option(
    "--transport",
    type=click.Choice(get_args(Transport)),
    default="auto",
    help="How KV moves; auto takes shm on one host.",
)
@click.option("--device", type=click.Choice(get_args(Device)), default="cpu")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="float32")
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantize)),
    default="none",
    help="int8: W8A8 linear layers on the CPU's integer units.",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(get_args(KvDtype)),
    default="auto",
    help="How the KV cache is stored; auto: as the model computes, and int8 with --quantize int8"
    " where heads have 64, 128 ... values.",
)
@click.option(
    "--decode-kv-dtype",
    type=click.Choice(get_args(KvDtype)),
    help="The decode workers', where it differs from --kv-dtype; links convert.",
)
@click.option(
    "--wire-codec",
    type=click.Choice(get_args(WireCodec)),
    default="asis",
    help="What KV travels as over tcp; asis keeps every bit.",
)
@click.option(
    "--checksums/--no-checksums",
    default=True,
    help="Check every KV block that travels (on unless told otherwise).",
)
@click.option(
    "--certificates",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with ca.pem, cert.pem, key.pem: TLS for clients, between router and workers, and"
    " for KV on tcp. Clients show a certificate of the same CA, or with --api-keys a key.",
)
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of the API keys that may call, and their quotas; read again when it changes."
    " `kvrelay keys new` makes keys.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Let strangers in, or keys travel in clear text, where --host is not loopback.",
)
@click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, help="Per worker; 0 shares the cores out."
)
@click.option(
    "--lend-cores/--no-lend-cores",
    default=True,
    help="On CPUs, a prefill and a decode worker use each other's cores for prompts while they are"
    " idle; with --tpot-target-ms the decode worker paces its tokens for that.",
)
@click.option(
    "--kv-gib",
    type=_Finite(0.001, 65_536),
    default=1.0,
    help="KV pool of each worker, in GiB.",
)
@click.option(
    "--chunk-tokens",
    type=click.IntRange(16, 1 << 20),
    default=256,
    help="Prompt tokens a step, at most.",
)
@click.option(
    "--local-prefill",
    type=click.Choice(get_args(LocalPrefill)),
    default="auto",
    help="Prompts that decode workers compute: auto, those that are done sooner so; never, only"
    " with --prefill 0.",
)
@click.option(
    "--itl-target-ms",
    type=click.IntRange(0, 60_000),
    default=150,
    help="The gap between tokens that decode workers keep to while they compute prompts; 0: any.",
)
@click.option(
    "--ttft-target-ms",
    type=_Finite(0, 3_600_000),
    default=0.0,
    help="What first tokens are good for: under load, requests that cannot have theirs in time any"
    " more wait for those that can; 0: none.",
)
@click.option(
    "--tpot-target-ms",
    type=_Finite(0, 60_000),
    default=0.0,
    help="What each answer's tokens may take on the mean: decode workers compute prompts, and take"
    " answers, as far as all keep to it; 0: none.",
)
@click.option(
    "--prefix-caching/--no-prefix-caching",
    default=True,
    help="Keep the KV of ended requests for prompts that begin alike; on by default.",
)
@click.option(
    "--drain-s",
    type=_Finite(0, 86_400),
    default=30.0,
    help="How long running requests may take to finish at shutdown, or where a worker restarts.",
)
@click.option("--verbose", is_flag=True, help="Log what the cluster does, on stderr.")
def serve(model: str, **options: Any) -> None:
    """Serve MODEL: a Hugging Face id, a folder with safetensors, a .gguf file, or smollm2.

    Prints one line `ready grpc=HOST:PORT http=HOST:PORT` when requests can be served, and with
    --routers a line `router grpc=HOST:PORT http=HOST:PORT` for each further one. Ctrl-C finishes
    what is running; a second Ctrl-C does not wait for it. SIGUSR1 restarts the workers one after
    another, each when it has finished what it runs or --drain-s has passed; no request is lost.
    """
    try:
        chosen = ServeOptions(**options)
    except ServeError as error:
        raise click.UsageError(str(error)) from None
    logging.basicConfig(level=chosen.log_level, format=LOG_FORMAT)
    with (
        errors_in_one_line(ModelError, ServeError, KvrelayError),
        _Interrupts() as stop,
        _serving(model, chosen, stop) as cluster,
    ):
        first, *further = cluster.routers.addresses
        lines = [f"ready {first}", *(f"router {router}" for router in further)]
        print("\n".join(lines), file=sys.__stdout__, flush=True)
        stop.polite = True
        with _restarting_on_signal(cluster):
            cluster.watch(stop.stopping)
        with contextlib.suppress(OSError):  # the terminal may be gone
            console.print("finishing what is running ...")


@click.command()
def demo() -> None:
    """Serve the built-in model for two questions and show where the time of each went."""
    chosen = ServeOptions(port=0, http_port=0)
    with (
        errors_in_one_line(ModelError, ServeError, KvrelayError),
        _Interrupts() as stop,
        _serving(BUILT_IN, chosen, stop) as cluster,
    ):
        with Client(cluster.address) as client:
            for question in DEMO_QUESTIONS:
                _ask(client, question)
        console.print("stopping ...")


class _Interrupts:
    """What SIGINT, SIGTERM and SIGHUP do. While `polite`, the first lets running requests finish;
    else it raises KeyboardInterrupt where the program is. A second one is in a hurry."""

    def __init__(self) -> None:
        self.polite = False
        self.stopping = threading.Event()
        self.hurry = threading.Event()

    def __enter__(self) -> "_Interrupts":
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup makes it
            signals.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.is_set():
            self.hurry.set()
            return
        self.stopping.set()
        if not self.polite:
            raise KeyboardInterrupt

    def watching(self, report: Report) -> Report:
        """`report`, but where a library has swallowed the KeyboardInterrupt it comes again."""

        def report_unless_stopping(stage: str, fraction: float | None) -> None:
            if self.stopping.is_set():
                raise KeyboardInterrupt
            report(stage, fraction)

        return report_unless_stopping


@contextlib.contextmanager
def _restarting_on_signal(cluster: "Serving") -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: cluster.restart_workers())
    try:
        yield
    finally:  # a late one does not end a process that is about to
        signal.signal(signal.SIGUSR1, signal.SIG_IGN if before is signal.SIG_DFL else before)


@contextlib.contextmanager
def _serving(model: str, options: ServeOptions, interrupts: _Interrupts) -> "Iterator[Serving]":
    with reporting() as report:
        progress = interrupts.watching(report)
        prepared = prepare(model, on_progress=progress)
        if options.weights_are_packed:
            pack_weights(prepared.path, options.quantize, default_cache(), progress)
    from cluster.serving import Serving  # brings Ray and torch: seconds, so only now

    cluster = Serving(prepared, options)
    # Ray prints what it has to say of dead workers; stdout is for what was asked for.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            with reporting() as report:
                cluster.start(interrupts.watching(report))
            yield cluster
        finally:
            interrupts.stopping.set()
            cluster.stop(interrupts.hurry)


def _ask(client: Client, question: str) -> None:
    out = Console(file=sys.__stdout__, highlight=False, markup=False)
    out.print(f"\n> {question}")
    with client.chat(question, max_tokens=_DEMO_MAX_TOKENS) as stream:
        for text in stream:
            out.file.write(text)
            out.file.flush()
        completion = stream.result()
    out.print("\n")
    out.print(phase_table(completion))
