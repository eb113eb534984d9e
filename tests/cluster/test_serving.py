"""The parts of Serving that need neither Ray nor a model: its folder, its router, its children."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from cluster import serve_commands, serving
from cluster.cli import main
from cluster.model_store import PreparedModel
from cluster.options import ServeError, ServeOptions
from cluster.serve_commands import _Interrupts
from cluster.serving import Serving


@pytest.fixture
def temp_dir(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def new_serving(**options) -> Serving:
    return Serving(PreparedModel("tiny", Path("/nowhere")), ServeOptions(**options))


# ---- the run folder


def test_a_temp_dir_too_long_for_sockets(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 90)
    assert serving._temp_dir() == Path("/tmp")


def test_a_run_folder_has_its_name_only_when_it_is_locked(temp_dir):
    run_dir = temp_dir / "kvr-1"
    serving._make_run_dir(run_dir)
    assert run_dir.stat().st_mode & 0o077 == 0
    assert [path.name for path in temp_dir.iterdir()] == ["kvr-1"]
    with pytest.raises(BlockingIOError):
        serving._lock(run_dir / "owner.lock")


def test_only_what_nobody_holds_is_removed(temp_dir):
    serving._make_run_dir(temp_dir / "kvr-1")
    (temp_dir / "kvr-2").mkdir()
    (temp_dir / "kvr-2" / "owner.lock").touch()
    serving._remove_abandoned(temp_dir)
    assert [path.name for path in temp_dir.iterdir()] == ["kvr-1"]


def test_a_run_folder_that_cannot_be_locked_is_not_left(temp_dir, monkeypatch):
    def refuse(path: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving, "_lock", refuse)
    with pytest.raises(ServeError, match="No space left"):
        serving._make_run_dir(temp_dir / "kvr-1")
    assert list(temp_dir.iterdir()) == []


# ---- odd numbers


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kv_gib", 1e-10),
        ("kv_gib", float("inf")),
        ("kv_gib", float("nan")),
        ("drain_s", float("inf")),
        ("block_size", 0),
    ],
)
def test_odd_options_are_refused_in_one_line_and_leave_nothing(temp_dir, option, value):
    with pytest.raises(ServeError) as refused:
        new_serving(**{option: value})
    assert "\n" not in str(refused.value)
    assert list(temp_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--kv-gib", value) for value in ("1e-10", "0", "-1", "inf", "nan", "1e300")]
    + [("--drain-s", value) for value in ("-1", "inf", "nan", "1e300")]
    + [("--itl-target-ms", value) for value in ("-1", "60001", "nan")]
    + [("--prefill", "-1"), ("--decode", "0")],
)
def test_the_command_refuses_odd_numbers(option, value):
    done = CliRunner().invoke(main, ["serve", "no-model", option, value])
    assert (done.exit_code, "Traceback" in done.output) == (2, False)
    assert f"Invalid value for '{option}'" in done.output


# ---- what the workers are told


@pytest.mark.parametrize(
    ("flags", "caching"),
    [([], True), (["--prefix-caching"], True), (["--no-prefix-caching"], False)],
)
def test_prefix_caching_is_on_unless_told_otherwise(temp_dir, monkeypatch, flags, caching):
    def refuse(model: str, options: ServeOptions, stop: object) -> None:
        _, worker = serving._configs(PreparedModel("tiny", temp_dir), options, temp_dir / "kvr-1")
        raise ServeError(f"prefix caching: {worker.prefix_caching}")

    monkeypatch.setattr(serve_commands, "_serving", refuse)
    done = CliRunner().invoke(main, ["serve", "tiny", *flags])
    assert f"prefix caching: {caching}" in done.output


@pytest.mark.parametrize(("flags", "target_ms"), [([], 150), (["--itl-target-ms", "0"], 0)])
def test_workers_are_told_the_gap_to_keep_to(temp_dir, monkeypatch, flags, target_ms):
    def refuse(model: str, options: ServeOptions, stop: object) -> None:
        _, worker = serving._configs(PreparedModel("tiny", temp_dir), options, temp_dir / "kvr-1")
        raise ServeError(f"target: {worker.itl_target_ms}, prefill: {options.prefill}")

    monkeypatch.setattr(serve_commands, "_serving", refuse)
    done = CliRunner().invoke(main, ["serve", "tiny", "--prefill", "0", *flags])
    assert f"target: {target_ms}, prefill: 0" in done.output


# ---- choices that do not go together


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["--device", "cuda"], "Error: --quantize int8 runs on the CPU: drop it, or drop --device"),
        (["--dtype", "bfloat16"], "drop it, or drop --dtype bfloat16"),
        (["--dtype", "float16"], "drop it, or drop --dtype float16"),
    ],
)
def test_int8_is_refused_where_it_cannot_be(monkeypatch, chosen, said):
    monkeypatch.setattr("cluster.serve_commands.prepare", None)  # nothing has begun
    done = CliRunner().invoke(main, ["serve", "no-model", "--quantize", "int8", *chosen])
    assert done.exit_code == 2
    assert said in done.output.splitlines()[-1]


@pytest.mark.parametrize(
    "wrong", [("--quantize", "int4"), ("--wire-codec", "fp8"), ("--kv-dtype", "fp8")]
)
def test_kinds_of_numbers_that_there_are_not(wrong):
    done = CliRunner().invoke(main, ["serve", "no-model", *wrong])
    assert done.exit_code == 2
    assert f"Invalid value for '{wrong[0]}'" in done.output


def test_workers_are_told_what_was_chosen(temp_dir, monkeypatch):
    monkeypatch.setenv("KVRELAY_CACHE", "/tmp/own-cache")
    config = new_serving(quantize="int8", kv_dtype="bfloat16")._pools.config
    assert (config.quantize, config.kv_dtype) == ("int8", "bfloat16")
    assert config.cache_dir == Path("/tmp/own-cache")


# ---- what the routers are told


def test_each_router_has_ports_and_a_control_socket_of_its_own(temp_dir):
    options = ServeOptions(routers=3, port=50_000, http_port=0)
    routers, _ = serving._configs(PreparedModel("tiny", temp_dir), options, temp_dir / "kvr-1")
    assert [router.port for router in routers] == [50_000, 50_001, 50_002]
    assert [router.http_port for router in routers] == [0, 0, 0]
    assert len({router.control_socket for router in routers}) == 3
    assert len({router.cluster_key for router in routers}) == 1


@pytest.mark.parametrize("option", ["port", "http_port"])
def test_ports_beyond_the_last_are_refused(option):
    ServeOptions(**{option: 65_534, "routers": 2})
    with pytest.raises(ServeError, match=r"port 65534: 3 routers take that port and the next"):
        ServeOptions(**{option: 65_534, "routers": 3})


# ---- the end


def test_a_grandchild_whose_parent_is_gone_is_ended(monkeypatch):
    monkeypatch.setattr(serving, "_END_S", 1.0)
    start_another = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', 'print(1, flush=True); input()']); input()"
    )
    command = [sys.executable, "-c", start_another]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        below = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
        parent.wait()
        serving._end(below)
    assert len(below) == 1
    assert not serving._is_alive(below[0])


def test_a_terminal_that_is_closed_is_a_polite_request_to_stop():
    with _Interrupts() as interrupts:
        interrupts.polite = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.stopping.wait(5)
        assert not interrupts.hurry.is_set()


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupts.stopping.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_that_a_library_swallowed_comes_again():
    with _Interrupts() as interrupts:
        said: list[str] = []
        report = interrupts.watching(lambda stage, fraction: said.append(stage))
        report("one", None)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            report("two", None)
        assert said == ["one"]
