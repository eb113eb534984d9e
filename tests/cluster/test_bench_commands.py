"""`kvrelay bench engine` and `kvrelay bench perplexity` on a tiny model, up to what they print."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fake_runner import FakeRunner
from tiny_models import make_not_decoder_only, make_tiny

from cluster.bench import limits, loading, text
from cluster.bench.loading import EngineChoice
from cluster.bench.perplexity import name_of
from cluster.bench.report import BenchError
from cluster.bench.text import windows_of
from cluster.cli import main

QUICK_ROWS = ["prefill/128", "decode/b1/c16", "decode/b8/c16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Measures a smaller machine, keeps the cache to itself, gives torch its threads back."""
    monkeypatch.setenv("KVRELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(limits, "_GEMM_SIZE", 256)
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 20)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeRunner]:
    """The runners that were loaded; none of them computes anything."""
    loaded: list[FakeRunner] = []

    class Noted(FakeRunner):
        @classmethod
        def load(cls, path: Path, **how: Any) -> FakeRunner:
            loaded.append(cls(path, **how))
            return loaded[-1]

    monkeypatch.setattr(loading, "ModelRunner", Noted)
    monkeypatch.setattr(loading, "pack_weights", lambda *asked: None)
    return loaded


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, args)])


def rows_of(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found.keys() == {"machine", "rows"}
    return {row["name"]: row for row in found["rows"]}


def one_line(result: Result) -> str:
    """What the command says on its way out."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    return line


def test_engine_compares_with_transformers_and_the_machine(
    tiny: Path, fakes: list[FakeRunner]
) -> None:
    result = run("engine", tiny, "--quick", "--json", "--threads", "1", "--quantize", "int8")

    rows = rows_of(result)
    assert list(rows) == QUICK_ROWS
    for row in rows.values():
        assert row["unit"] == "tokens/s"
        assert row["ratio"] == pytest.approx(row["value"] / row["baseline"])
        assert row["limit_ratio"] > 0
    machine = json.loads(result.stdout)["machine"]
    assert machine["engine"] == "nothing computed"
    assert machine["threads"] == 1
    assert machine["baseline"] == "transformers' modules, float32, sdpa attention"
    assert machine["read_gb_s"] > 0
    (runner,) = fakes
    assert runner.closed
    how = runner.loaded_with
    assert (how["quantize"], how["kv_dtype"], how["threads"]) == ("int8", "auto", 1)


def test_engine_works_in_the_chunks_of_a_prefill_worker(
    tiny: Path, fakes: list[FakeRunner]
) -> None:
    run("engine", tiny, "--quick", "--compare", "none", "--json", "--chunk-tokens", "100")

    prompt = [(s.start, s.end) for s in fakes[0].slices if s.end in (100, 128)]
    assert prompt[:2] == [(0, 100), (100, 128)]


def test_engine_alone_has_nothing_beside_it_but_the_machine(
    tiny: Path, fakes: list[FakeRunner]
) -> None:
    rows = rows_of(run("engine", tiny, "--quick", "--compare", "none", "--json"))

    assert {(row["baseline"], row["ratio"]) for row in rows.values()} == {(None, None)}
    assert all(row["limit_ratio"] for row in rows.values())


def test_engine_says_what_it_left_out(
    tiny: Path, fakes: list[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "context_limit", 64)

    result = run("engine", tiny, "--quick", "--compare", "none")

    assert result.exit_code == 0
    assert "prefill/128 left out: the model ends at 64 tokens" in result.stdout
    assert "decode/b8/c16" in result.stdout


def test_engine_has_nothing_to_measure_in_a_model_that_is_too_short(
    tiny: Path, fakes: list[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "context_limit", 8)

    assert "ends at 8 tokens" in one_line(run("engine", tiny, "--quick"))


def test_engine_prints_a_table_for_people(tiny: Path, fakes: list[FakeRunner]) -> None:
    result = run("engine", tiny, "--quick")

    assert result.exit_code == 0, result.output
    assert "engine nothing computed" in result.stdout
    for name in (*QUICK_ROWS, "transformers", "of limit"):
        assert name in result.stdout


def test_engine_draws_a_plot(tiny: Path, fakes: list[FakeRunner], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "engine.png"

    result = run("engine", tiny, "--quick", "--json", "--plot", file)

    assert list(rows_of(result)) == QUICK_ROWS
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_anything_is_measured(
    tiny: Path, fakes: list[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    line = one_line(run("engine", tiny, "--plot", "engine.png"))

    assert line == "error: --plot needs matplotlib: pip install 'kvrelay[bench]'"
    assert not fakes


@pytest.mark.parametrize("name", ["engine.pdf", "nowhere/engine.png"])
def test_plot_that_cannot_be_written_is_refused_before_anything_is_measured(
    name: str, tiny: Path, fakes: list[FakeRunner], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")

    assert name in one_line(run("engine", tiny, "--plot", tmp_path / name))
    assert not fakes


@pytest.mark.parametrize("command", ["engine", "perplexity"])
def test_a_model_that_is_not_there_is_one_line(command: str, tmp_path: Path) -> None:
    assert "does not exist" in one_line(run(command, f"{tmp_path}/no/model"))


@pytest.mark.parametrize("command", ["engine", "perplexity"])
def test_a_model_that_is_refused_is_one_line(command: str, tmp_path: Path) -> None:
    one_line(run(command, make_not_decoder_only(tmp_path / "bert")))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_engine_measures_the_real_engine(quantize: str, tiny: Path) -> None:
    rows = rows_of(run("engine", tiny, "--quick", "--json", "--quantize", quantize))

    assert list(rows) == QUICK_ROWS
    assert all(row["ratio"] > 0 and row["limit_ratio"] > 0 for row in rows.values())


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text("The quick brown fox — it jumps over the lazy dog. " * 6, encoding="utf-8")
    return file


def test_perplexity_of_an_engine_that_knows_nothing_is_its_vocabulary(
    tiny: Path, prose: Path, fakes: list[FakeRunner]
) -> None:
    result = run("perplexity", tiny, "--json", "--text", prose, "--kv-dtype", "float16")

    rows = rows_of(result)
    assert list(rows) == [
        "perplexity/transformers",
        "perplexity/fp32",
        "perplexity/int8/kv-float16",
    ]
    reference = rows["perplexity/transformers"]["value"]
    for name in list(rows)[1:]:
        assert rows[name]["value"] == pytest.approx(fakes[0].vocab, rel=1e-5)
        assert rows[name]["ratio"] == pytest.approx(fakes[0].vocab / reference, rel=1e-5)
    assert [runner.loaded_with["quantize"] for runner in fakes] == ["none", "int8"]
    assert all(runner.closed for runner in fakes)
    # Every token once, each chunk after the last.
    count = json.loads(result.stdout)["machine"]["tokens"]
    assert [s.start for s in fakes[0].slices] == list(range(0, count, 128))


def test_perplexity_prints_how_far_apart_they_are(
    tiny: Path, prose: Path, fakes: list[FakeRunner]
) -> None:
    result = run("perplexity", tiny, "--text", prose)

    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "+0.00 %" in lines["perplexity/int8"]
    assert lines["perplexity/fp32"].count("%") == 1


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_perplexity_of_the_real_engine_is_that_of_transformers(
    quantize: str, tiny: Path, prose: Path
) -> None:
    rows = rows_of(run("perplexity", tiny, "--json", "--text", prose, "--quantize", quantize))

    assert rows["perplexity/fp32"]["ratio"] == pytest.approx(1.0, abs=1e-3)
    if quantize == "int8":
        assert rows["perplexity/int8"]["ratio"] == pytest.approx(1.0, abs=0.1)
    else:
        assert list(rows) == ["perplexity/transformers", "perplexity/fp32"]


def test_the_text_that_comes_with_kvrelay_can_be_read() -> None:
    assert len(text.read_text(text.TEXT)) > 10_000


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"caf\xe9 au lait", "not UTF-8 text (byte 3)"),
        (b"", "has 0 tokens: it takes at least 64"),
        (b"too short", "it takes at least 64"),
    ],
)
def test_a_text_that_is_no_use_is_one_line(
    content: bytes | None, complaint: str, tiny: Path, tmp_path: Path, fakes: list[FakeRunner]
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)

    assert complaint in one_line(run("perplexity", tiny, "--text", file))


def test_windows_do_not_overlap_and_drop_a_short_end() -> None:
    tokens = list(range(250))

    assert windows_of(tokens, 100) == [tokens[:100], tokens[100:200]]
    assert windows_of(tokens, 90) == [tokens[:90], tokens[90:180], tokens[180:]]
    assert windows_of(tokens[:64], 1024) == [tokens[:64]]
    with pytest.raises(BenchError, match="63 tokens"):
        windows_of(tokens[:63], 1024)


@pytest.mark.parametrize(
    ("quantize", "kv_dtype", "name"),
    [
        ("none", "auto", "perplexity/fp32"),
        ("int8", "auto", "perplexity/int8"),
        ("int8", "float16", "perplexity/int8/kv-float16"),
        ("int8", "int8", "perplexity/int8/kv-int8"),
    ],
)
def test_row_names_of_perplexity(quantize: Any, kv_dtype: Any, name: str) -> None:
    assert name_of(EngineChoice(quantize, kv_dtype, threads=1)) == name


def test_a_perplexity_that_is_not_a_number_is_refused(
    tiny: Path, prose: Path, fakes: list[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FakeRunner,
        "logits",
        lambda self, slices: torch.full((len(slices[0].tokens), self.vocab), math.nan),
    )

    assert "fp32: the model's output is not a number" in one_line(
        run("perplexity", tiny, "--text", prose)
    )


def test_engine_shows_where_a_step_goes(tiny: Path) -> None:
    asked = ["--quick", "--compare", "none", "--json", "--threads", "1", "--profile"]

    rows = rows_of(run("engine", tiny, *asked))

    parts = {name: row["value"] for name, row in rows.items() if name.startswith("profile/")}
    for case in QUICK_ROWS:
        of_case = [part for name, part in parts.items() if name.startswith(f"profile/{case}/")]
        assert 80 < sum(of_case) < 120  # medians of parts, not one step's
    assert "profile/decode/b1/c16/attention: join" in parts
    assert "profile/prefill/128/attention: join" not in parts
