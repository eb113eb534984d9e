"""`kvrelay bench perplexity`: what a way of computing costs in quality, over a text.

Called by commands.py. Perplexity is e to the mean of what each token after the first of its window
surprises the model by; windows do not overlap.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from tokenizers import Tokenizer

from cluster.bench import loading
from cluster.bench.loading import EngineChoice
from cluster.bench.machine import describe_machine
from cluster.bench.report import MISSING, BenchError, Report, Row, number
from cluster.bench.text import WINDOW_TOKENS, Windows, windows_of
from cluster.model_store import PreparedModel
from cluster.preparation import Progress
from kvrelay.engine.step import Slice

UNIT = "perplexity"
PREFIX = "perplexity/"
# Short, so that most tokens see their context as the pool has stored it.
_CHUNK_TOKENS = 128


def name_of(choice: EngineChoice) -> str:
    """The row's: perplexity/int8, or perplexity/int8/kv-float16."""
    name = PREFIX + ("fp32" if choice.quantize == "none" else choice.quantize)
    return name if choice.kv_dtype == "auto" else f"{name}/kv-{choice.kv_dtype}"


@torch.inference_mode()
def bench_perplexity(
    model: PreparedModel, text: str, asked: EngineChoice, on_progress: Progress
) -> Report:
    """The perplexity of `text` by transformers, by our engine in fp32, and as `asked`.

    Raises:
        BenchError: the model cannot be served, or the text is too short.
    """
    config = loading.outline(model.path).config.get_text_config()
    positions_max = getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS
    tokens = _tokenizer(model.path).encode(text).ids
    windows = windows_of(tokens, min(WINDOW_TOKENS, positions_max))
    reference = _by_transformers(model.path, windows, on_progress)
    rows = [Row(PREFIX + "transformers", reference, UNIT)]
    plain = EngineChoice("none", "auto", asked.threads)
    engines = {}
    for choice in dict.fromkeys([plain, asked]):
        name = name_of(choice)
        value, engines[name] = _by_engine(model.path, choice, windows, on_progress)
        rows.append(Row(name, value, UNIT, baseline=reference))
    machine = {
        **describe_machine(asked.threads),
        "model": model.name,
        "tokens": sum(map(len, windows)),
        "window_tokens": len(windows[0]),
        "engines": [f"{name.removeprefix(PREFIX)}: {said}" for name, said in engines.items()],
    }
    return Report(machine, rows)


def comparison_table(report: Report) -> Table:
    """Each perplexity, and by how much it is worse than transformers' and than our fp32's."""
    values = {row.name: row.value for row in report.rows}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for column in (UNIT, "to transformers", "to fp32"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, value in values.items():
        others = (PREFIX + "transformers", PREFIX + "fp32")
        table.add_row(name, number(value), *(_difference(name, other, values) for other in others))
    return table


def _difference(name: str, other: str, values: dict[str, float]) -> str:
    return MISSING if name == other else f"{(values[name] / values[other] - 1) * 100:+.2f} %"


def _tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more exact
        raise BenchError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _by_transformers(path: Path, windows: Windows, on_progress: Progress) -> float:
    on_progress("loading transformers' model", None)
    model = loading.load_transformers(path)

    def surprise(window: list[int]) -> float:
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
        return _surprise(logits, window[1:])

    return _perplexity(windows, surprise, "transformers", on_progress)


def _by_engine(
    path: Path, choice: EngineChoice, windows: Windows, on_progress: Progress
) -> tuple[float, str]:
    """The perplexity, and what the engine says of itself."""
    name = name_of(choice).removeprefix(PREFIX)
    on_progress(f"loading the model, {name}", None)
    with loading.loaded_runner(path, choice, on_progress) as runner:
        end = max(map(len, windows))
        if runner.context_limit is not None and end > runner.context_limit:
            raise BenchError(f"the model ends at {runner.context_limit} tokens, a window at {end}")
        with loading.attached_pool(runner, runner.layout.blocks_for(end)) as pool:
            blocks = list(range(pool.blocks))

            def surprise(window: list[int]) -> float:
                total = 0.0
                for at in range(0, len(window), _CHUNK_TOKENS):
                    chunk = window[at : at + _CHUNK_TOKENS]
                    logits = runner.logits([Slice(chunk, at, blocks)])
                    total += _surprise(logits, window[at + 1 : at + 1 + len(chunk)])
                return total

            value = _perplexity(windows, surprise, f"kvrelay, {name}", on_progress)
        return value, runner.description


def _surprise(logits: torch.Tensor, following: Sequence[int]) -> float:
    """The sum of -log p of the tokens `following` the first len(following) rows of logits."""
    if not following:
        return 0.0
    rows = logits[: len(following)].float()
    return float(F.cross_entropy(rows, torch.tensor(following), reduction="sum"))


def _perplexity(
    windows: Windows, surprise: Callable[[list[int]], float], name: str, on_progress: Progress
) -> float:
    """Raises BenchError when the model's output is not a number."""
    total, count = 0.0, 0
    for index, window in enumerate(windows):
        on_progress(f"reading the text: {name}", index / len(windows))
        total += surprise(window)
        count += len(window) - 1
    if not math.isfinite(total):
        raise BenchError(f"{name}: the model's output is not a number")
    return math.exp(total / count)
