"""What the tests of this folder have measured, shown at the end of the run whatever is captured.

`pytest -m slow tests/chaos` is the full form of all of them; seeds.py says what can be set.
"""

from collections.abc import Callable

import pytest

_measured: list[str] = []


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes one line for the end of the run."""
    name = request.node.name
    return lambda line: _measured.append(f"{name}: {line}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:
        terminalreporter.section("measured")
        for line in _measured:
            terminalreporter.write_line(line)
