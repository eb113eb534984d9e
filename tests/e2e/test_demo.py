"""`kvrelay demo`: the first thing that a person runs, in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from cluster.serve_commands import DEMO_QUESTIONS

KVRELAY = Path(sys.executable).with_name("kvrelay")
# Only a broken test waits this long.
DEADLINE_S = 240.0


@pytest.fixture
def short_temp_dir():
    """Short, as unix sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as folder:
        yield Path(folder)


def processes_with(temp_dir: Path) -> list[psutil.Process]:
    """Processes anywhere that were started for this temp folder."""
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if process.environ().get("TMPDIR") == str(temp_dir):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_demo(short_temp_dir):
    done = subprocess.run(
        [KVRELAY, "demo"],
        env={**os.environ, "TMPDIR": str(short_temp_dir)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

    for question in DEMO_QUESTIONS:
        assert f"> {question}" in done.stdout
    first, second = done.stdout.split(f"> {DEMO_QUESTIONS[1]}")
    assert "Paris" in first
    assert "sky" in second.lower()
    for answer in (first, second):
        for phase in ("queue", "prefill", "KV", "TTFT", "TPOT"):
            assert len(re.findall(rf"^ *{phase}\b", answer, re.MULTILINE)) == 1, answer
        assert "tokens/s" in answer

    assert processes_with(short_temp_dir) == []
    # torch makes an empty folder of this name when it is imported.
    assert {entry.name for entry in short_temp_dir.iterdir()} == set()
