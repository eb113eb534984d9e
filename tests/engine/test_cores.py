"""What workers on one host tell each other of their cores."""

from pathlib import Path

from kvrelay.engine.cores import CoreBoard


def test_neighbours_see_each_other_compute(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    prefill, decode = CoreBoard(path, [0, 1], [2, 3]), CoreBoard(path, [2, 3], [0, 1])
    other = CoreBoard(path, [4], [5])
    assert not decode.neighbour_computes
    with prefill.computing():
        assert decode.neighbour_computes
        assert not prefill.neighbour_computes
        assert not other.neighbour_computes
        with decode.computing():
            assert prefill.neighbour_computes
    assert not decode.neighbour_computes


def test_who_starts_anew_computes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cores"
    died, decode = CoreBoard(path, [0], [1]), CoreBoard(path, [1], [0])
    step = died.computing()  # that never ends
    step.__enter__()
    assert decode.neighbour_computes
    CoreBoard(path, [0], [1])
    assert not decode.neighbour_computes


def test_guests_are_on_the_neighbours_cores(tmp_path: Path) -> None:
    board = CoreBoard(tmp_path / "cores", [0], [1, 2])
    assert [guest.core for guest in board.guests()] == [1, 2]
