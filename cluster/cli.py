"""The `kvrelay` command. Each command lives with what it drives; heavy imports wait for it."""

import signal

# While the imports last, Ctrl-C ends the process without a traceback.
_before = signal.getsignal(signal.SIGINT)
if _before is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import click  # noqa: E402

from cluster.bench.commands import bench  # noqa: E402
from cluster.bench.goodput import commands as goodput_commands  # noqa: E402, F401  # its command
from cluster.bench.suite import commands as suite_commands  # noqa: E402, F401  # `kvrelay bench all`
from cluster.capacity.commands import simulate  # noqa: E402
from cluster.chaos.commands import chaos  # noqa: E402

# Before whatever else loads gRPC: it quiets gRPC's own log lines.
from cluster.client_commands import chat, generate  # noqa: E402
from cluster.key_commands import keys  # noqa: E402
from cluster.load import commands as load_commands  # noqa: E402, F401  # `kvrelay bench serve`
from cluster.profiling.commands import profile  # noqa: E402
from cluster.serve_commands import demo, serve  # noqa: E402

signal.signal(signal.SIGINT, _before)


@click.group()
@click.version_option(package_name="kvrelay")
def main() -> None:
    """Serve large language models with prefill and decode on separate workers."""


for command in (serve, demo, generate, chat, keys, bench, chaos, profile, simulate):
    main.add_command(command)
