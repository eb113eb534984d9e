"""The phase table as a terminal of 80 columns shows it."""

from rich.console import Console

from cluster.phase_table import phase_table
from kvrelay.client import Completion, Timings


def rows(
    timings: Timings, prompt_tokens: int = 512, completion_tokens: int = 64, cached_tokens: int = 0
) -> list[str]:
    completion = Completion(
        "", (), "stop", prompt_tokens, completion_tokens, 1, "r", "tiny", timings, cached_tokens
    )
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(phase_table(completion))
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


def test_every_phase_has_its_row() -> None:
    timings = Timings(1.234, 312.5, 330.1, 12.3, 11_796_480, 5.2, 0.8, "shm")
    header, _, *body = rows(timings)
    assert header == "phase ms what"
    assert body == [
        "queue 1.23 waiting at the router",
        "prefill 312.50 512 prompt tokens, 1,638.4 tokens/s",
        "KV hand-off 5.20 11.80 MB over shm, 2.27 GB/s, 0.80 ms exposed",
        "TTFT 330.10 arrival to first token",
        "TPOT 12.30 per token after the first, 81.3 tokens/s",
        "tokens 512 prompt + 64 completion",
    ]


def test_what_did_not_happen_is_not_divided_by() -> None:
    body = rows(Timings(0, 0, 0, 0, 0, 0, 0, ""), 0, 0)[2:]
    assert body == [
        "queue 0.00 waiting at the router",
        "prefill 0.00 0 prompt tokens",
        "KV hand-off - nothing moved",
        "TTFT 0.00 arrival to first token",
        "TPOT - no token after the first",
        "tokens 0 prompt + 0 completion",
    ]


def test_bytes_moved_in_no_time_have_no_rate() -> None:
    body = rows(Timings(0, 1, 1, 0, 2_000_000, 0, 0.1, "tcp"))
    assert "KV hand-off 0.00 2.00 MB over tcp, 0.10 ms exposed" in body


def test_large_numbers_keep_to_one_line_each() -> None:
    timings = Timings(
        123_456.789, 312_345.5, 333_330.1, 1_234.3, 11_796_480_000, 5_234.2, 99.8, "tcp"
    )
    assert len(rows(timings, 131_072, 65_536)) == 8
    assert len(rows(timings, 131_072, 65_536, 65_536)) == 8


def test_the_rate_of_prefill_is_of_what_was_computed() -> None:
    body = rows(Timings(0, 100.0, 1, 0, 0, 0, 0.1, "shm"), cached_tokens=384)
    assert "prefill 100.00 128 prompt tokens, 1,280.0 tokens/s" in body
    assert "tokens 512 prompt (384 cached) + 64 completion" in body
