"""What the suite runs, in this order, and where each part puts its results. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICE = "device.json"  # the profile that is measured, simulated with and compared with reality
_ADDRESS = "ADDRESS"  # of a server that is started for the part


@dataclass(frozen=True)
class Part:
    """One command. words: after `kvrelay`; about: a sentence for the page; beside: what stands in
    the column beside each value. paged: it writes a page of its own, which becomes its section.
    makes: files beside its results. wants: such files of earlier parts, without which it cannot
    run."""

    name: str
    words: tuple[str, ...]
    about: str
    limit_s: float
    beside: str = ""
    paged: bool = False
    makes: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()

    @property
    def wants_server(self) -> bool:
        return _ADDRESS in self.words

    def command(self, folder: Path, address: str) -> list[str]:
        """address: of the server, if it wants one."""
        words = [address if word == _ADDRESS else word for word in self.words]
        page = ["--report", str(self.page(folder))] if self.paged else []
        return [*words, "--json", *page]

    def json(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"

    def page(self, folder: Path) -> Path:
        return folder / f"{self.name}.html"


def all_parts(model: str, folder: Path) -> list[Part]:
    """Each bounded; with a small model on two cores about a quarter of an hour in all."""
    device = folder / DEVICE
    int8 = ("--quantize", "int8")
    return [
        Part(
            "engine",
            ("bench", "engine", model, *int8, "--quick"),
            "Prefill and decode of one engine on all cores, beside transformers in float32.",
            180.0,
            "transformers",
        ),
        Part(
            "transport",
            ("bench", "transport", "--model", model, *int8, "--quick"),
            "KV from process to process over each link, beside gloo, and what a hand-off costs.",
            240.0,
            "gloo",
        ),
        Part(
            "prefix",
            ("bench", "prefix", model, *int8, "--prefill", "1", "--decode", "1", "--quick"),
            "Prompts that begin alike, beside the same without caching, placed at random.",
            240.0,
            "no cache",
        ),
        Part(
            "placement",
            ("bench", "placement", "--quick"),
            "What choosing the workers of a request costs, beside the same in the smallest fleet.",
            120.0,
            "smallest",
        ),
        Part(
            "router",
            ("bench", "router", "--quick"),
            "The router between stand-in workers and clients, beside a bare gRPC server.",
            120.0,
            "bare gRPC",
        ),
        Part(
            "serve",
            ("bench", "serve", _ADDRESS, "--rate", "1", "--seconds", "45"),
            "Open-loop load on one prefill and one decode worker.",
            180.0,
            paged=True,
        ),
        Part(
            "goodput",
            ("bench", "goodput", model, *int8, "--quick"),
            "The highest rate that meets its SLOs, for three arrangements of the same cores.",
            480.0,
            paged=True,
        ),
        Part(
            "profile",
            ("profile", model, *int8, "--out", str(device)),
            "What steps of an engine take with the cores of one worker, beside their fit.",
            300.0,
            "fitted",
            makes=(DEVICE,),
        ),
        Part(
            "validate",
            ("bench", "validate", model, *int8, "--profile", str(device), "--seconds", "60"),
            "The same requests simulated, beside what they took for real.",
            180.0,
            "real",
            wants=(DEVICE,),
        ),
        Part(
            "simulate",
            (
                *("simulate", "--profile", str(device), "--mix", "mixed", "--rate", "20"),
                *("--seconds", "60", "--prefill", "50", "--decode", "50"),
            ),
            "A hundred such workers, simulated.",
            180.0,
            paged=True,
            wants=(DEVICE,),
        ),
    ]


def chosen(parts: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """Those that are named; all when nobody names any."""
    return [part for part in parts if not only or part.name in only]
