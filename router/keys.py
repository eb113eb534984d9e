"""Owns the file of API keys: what an entry says, how it is read and made, and finding a key in it.

router/callers.py asks a KeySet who a key belongs to; `kvrelay keys new` makes entries. The file is
TOML and holds no key, only hashes:

    [[keys]]
    name = "alice"
    id = "9f86d081"
    hash = "sha256:..."
    tenant = "research"             # optional; the name unless given
    requests_per_minute = 600       # optional, as the other quotas of router/quotas.py
    priority_min = -10              # optional; requests may be as urgent as this, 0 unless given
    metrics = true                  # optional; may read /metrics, which tells of all tenants

Keys of one tenant share cached prefixes; keys of two never do. To change a key for another, add a
second entry with the same tenant and remove the first when nobody uses it any more.
"""

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from router.admission import DEFAULT_LIMITS
from router.quotas import Quota

FILE_BYTES_MAX = 1 << 20  # some 5,000 keys
_SECRET_BYTES = 32
_ID_BYTES = 4
_KEY = re.compile(r"kvr_([0-9a-f]{8})_[0-9a-f]{64}")
_PRIORITY_MAX = DEFAULT_LIMITS.priority_max
# What a key that is in no entry is compared with, so that both take the same time.
_NO_HASH = "sha256:" + "0" * 64

# In logs and metrics: printable ASCII without quotes.
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class KeysError(ValueError):
    """The file cannot be used; one line that says why."""


class ApiKey(Quota):
    """One entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: _Name
    id: str = Field(pattern="^[0-9a-f]{8}$")
    # Plain SHA-256, not bcrypt or argon2: those make guessing dear where people choose secrets
    # that can be guessed. A key has 256 random bits, which nobody guesses, and every call would
    # pay for it.
    hash: str = Field(pattern="^sha256:[0-9a-f]{64}$", repr=False)
    tenant: _Name | None = None
    # Lower goes first: by itself nobody overtakes others.
    priority_min: int = Field(default=0, ge=-_PRIORITY_MAX, le=_PRIORITY_MAX)
    metrics: bool = False

    @property
    def tenant_name(self) -> str:
        return self.tenant or self.name

    @property
    def quota(self) -> Quota:
        return Quota(**{field: getattr(self, field) for field in Quota.model_fields})


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keys: list[ApiKey] = Field(default_factory=list)


class KeySet:
    """All keys that are good now."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        """Raises KeysError when two entries have the same name or id."""
        keys = tuple(keys)
        for field in ("name", "id"):
            values = Counter(getattr(key, field) for key in keys)
            twice = [value for value, times in values.items() if times > 1]
            if twice:
                raise KeysError(f"two keys with the {field} {twice[0]!r}")
        self._by_id = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._by_id.values())

    def find(self, given: str) -> ApiKey | None:
        """The entry of a key; None for one that is in no entry, in the same time."""
        match = _KEY.fullmatch(given)
        entry = self._by_id.get(match[1]) if match else None
        known = entry.hash if entry else _NO_HASH
        same = hmac.compare_digest(_hash(given), known)
        return entry if same else None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises KeysError."""
        try:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise KeysError(f"cannot read {path}: {error.strerror}") from error
        if len(data) > FILE_BYTES_MAX:
            raise KeysError(f"{path} has more than {FILE_BYTES_MAX} bytes")
        try:
            return cls(_File.model_validate(tomllib.loads(data.decode())).keys)
        except ValidationError as error:
            raise KeysError(f"{path}: {_first(error)}") from None
        except UnicodeDecodeError:
            raise KeysError(f"{path} is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:  # not TOML, or a number of 5,000 digits
            raise KeysError(f"{path}: {' '.join(str(error).split())}") from None


def new_key(name: str, tenant: str | None = None) -> tuple[str, str]:
    """A new key, and the entry that lets it in, as text to append to the file.

    Raises:
        KeysError: there cannot be a key of that name or tenant.
    """
    key_id = secrets.token_hex(_ID_BYTES)
    key = f"kvr_{key_id}_{secrets.token_hex(_SECRET_BYTES)}"
    fields = {"name": name, "id": key_id, "hash": _hash(key)}
    if tenant is not None:
        fields["tenant"] = tenant
    try:
        ApiKey(**fields)  # type: ignore[arg-type]
    except ValidationError as error:
        raise KeysError(_first(error)) from None
    # A JSON string of these letters is a TOML string.
    lines = [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
    return key, "\n".join(["[[keys]]", *lines]) + "\n"


def _hash(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode(errors='replace')).hexdigest()}"


def _first(error: ValidationError) -> str:
    """The first thing that is wrong. Never the value: it may be a key in the wrong place."""
    wrong = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in wrong["loc"])
    return f"{place}: {wrong['msg']}"
