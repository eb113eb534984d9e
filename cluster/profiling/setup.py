"""What the two sides of an engine in a process of its own tell each other first.

Light to import: the process pins itself to its cores before torch is loaded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from kvrelay.config import KvDtype, Quantize
from kvrelay.kv.layout import KVLayout


@dataclass(frozen=True)
class EngineSetup:
    """To the process. cores: none, wherever the system puts it."""

    path: Path
    quantize: Quantize
    kv_dtype: KvDtype
    threads: int
    cores: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "path": str(self.path)})

    @classmethod
    def from_json(cls, line: str) -> "EngineSetup":
        found = json.loads(line)
        return cls(**{**found, "path": Path(found["path"]), "cores": tuple(found["cores"])})


@dataclass(frozen=True)
class EngineInfo:
    """From the process, once the model is loaded. positions_max: of one sequence; None: any."""

    layout: KVLayout
    positions_max: int | None
    description: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "EngineInfo":
        found = json.loads(line)
        return cls(**{**found, "layout": KVLayout(**cast(dict[str, Any], found["layout"]))})
