"""The table of where one request's time went: owns how timings are shown to a person.

Called by `kvrelay generate --timings` and by the demo.
"""

from __future__ import annotations

from rich import box
from rich.table import Table

from kvrelay.client import Completion, Timings


def phase_table(completion: Completion) -> Table:
    """One row per phase: name, milliseconds, what was done in them. Fits 80 columns."""
    timings = completion.timings
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("what")
    table.add_row("queue", _ms(timings.queue_ms), "waiting at the router")
    table.add_row("prefill", _ms(timings.prefill_ms), _prefill(completion))
    table.add_row("KV hand-off", *_hand_off(timings))
    table.add_row("TTFT", _ms(timings.ttft_ms), "arrival to first token")
    table.add_row("TPOT", *_decode(timings))
    table.add_row("tokens", "", _tokens(completion))
    return table


def _prefill(completion: Completion) -> str:
    computed = completion.prompt_tokens - completion.cached_tokens
    return _with_rate(f"{computed:,} prompt tokens", computed, completion.timings.prefill_ms)


def _hand_off(timings: Timings) -> tuple[str, str]:
    if not timings.kv_bytes:
        return "-", "nothing moved"
    moved = f"{timings.kv_bytes / 1e6:,.2f} MB over {timings.transport}"
    if timings.kv_transfer_ms > 0:
        moved += f", {timings.kv_bytes / timings.kv_transfer_ms / 1e6:,.2f} GB/s"
    return _ms(timings.kv_transfer_ms), f"{moved}, {_ms(timings.kv_exposed_ms)} ms exposed"


def _decode(timings: Timings) -> tuple[str, str]:
    # The contract's 0 says that there was no second token, not that it took no time.
    if timings.tpot_ms <= 0:
        return "-", "no token after the first"
    return _ms(timings.tpot_ms), _with_rate("per token after the first", 1, timings.tpot_ms)


def _tokens(completion: Completion) -> str:
    cached = f" ({completion.cached_tokens:,} cached)" if completion.cached_tokens else ""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return f"{prompt:,} prompt{cached} + {answer:,} completion"


def _with_rate(what: str, tokens: int, duration_ms: float) -> str:
    if duration_ms <= 0:
        return what
    return f"{what}, {tokens / duration_ms * 1e3:,.1f} tokens/s"


def _ms(duration_ms: float) -> str:
    return f"{duration_ms:,.2f}"
