"""The `kvrelay` command. Each command lives with what it drives; heavy imports wait for it."""

import click

# First: it quiets gRPC's own log lines, which must happen before gRPC is loaded.
from cluster.client_commands import chat, generate
from cluster.serve_commands import demo, serve


@click.group()
@click.version_option(package_name="kvrelay")
def main() -> None:
    """Serve large language models with prefill and decode on separate workers."""


for command in (serve, demo, generate, chat):
    main.add_command(command)
