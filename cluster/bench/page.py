"""What reports of one HTML file that needs nothing else are made of: style, tables, plots as SVG.

Used by chaos/ and load/. Loads matplotlib, which only the `bench` extra brings, when it draws.
"""

import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.bench.report import BenchError
from cluster.preparation import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #111827; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: 2px 14px 2px 0; border-bottom: 1px solid #e5e7eb; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: #15803d; } .failed { color: #b91c1c; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; }
.columns { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 3rem; }
"""


def write_page(file: Path, title: str, body: Iterable[str]) -> None:
    """`body` is HTML. Raises BenchError when the file cannot be written."""
    try:
        file.write_text("\n".join(_page(title, body)), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--report {file}: {one_line(error)}") from error


def _page(title: str, body: Iterable[str]) -> Iterator[str]:
    yield "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
    yield f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield from body
    yield "</body></html>"


def paragraph(text: str, css_class: str = "") -> str:
    """With its line breaks."""
    marked = f" class='{css_class}'" if css_class else ""
    return f"<p{marked}>{html.escape(text).replace(chr(10), '<br>')}</p>"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells that begin with a digit are numbers, which stand on the right; as in the first row, so
    in the heading."""
    firsts = rows[0] if rows else [""] * len(columns)
    head = "".join(
        f"<th{_numeric(first)}>{html.escape(name)}</th>"
        for name, first in zip(columns, firsts, strict=True)
    )
    lines = [
        "".join(f"<td{_numeric(cell)}>{html.escape(cell)}</td>" for cell in row) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def svg_of(figure: "Figure") -> str:
    """The same for the same figure, with its text as text."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvrelay"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _numeric(cell: str) -> str:
    return " class='number'" if cell[:1].isdigit() or cell[:1] == "-" else ""
