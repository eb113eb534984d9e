"""The file of API keys: what it may say, how a key is found, and what a change of it does."""

import asyncio
import contextlib
import logging
import re

import pytest
from waiting import until

from router.callers import Callers
from router.key_watch import KeyWatch
from router.keys import FILE_BYTES_MAX, KeysError, KeySet, new_key
from router.quotas import Quota
from router.refusals import Refusal

DEADLINE_S = 10.0  # only a broken test waits this long
HASH = "sha256:" + "0" * 64
ENTRY = f'[[keys]]\nname = "alice"\nid = "01234567"\nhash = "{HASH}"\n'


def load(tmp_path, text: str | bytes) -> KeySet:
    file = tmp_path / "keys.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return KeySet.load(file)


def test_a_new_key_is_found_by_its_entry_and_is_not_in_it(tmp_path):
    key, entry = new_key("alice")
    found = load(tmp_path, entry).find(key)
    assert (found.name, found.tenant_name, found.quota) == ("alice", "alice", Quota())
    assert re.fullmatch(r"kvr_[0-9a-f]{8}_[0-9a-f]{64}", key)
    assert key.rpartition("_")[2] not in entry
    assert found.hash not in repr(found)


def test_entries_add_up_and_may_have_tenants_and_quotas(tmp_path):
    (one, first), (other, second) = new_key("alice", "research"), new_key("bob")
    keys = load(tmp_path, f"{first}requests_per_minute = 5\nkv_tokens_at_once = 7\n{second}")
    assert keys.find(one).tenant_name == "research"
    assert keys.find(one).quota == Quota(requests_per_minute=5, kv_tokens_at_once=7)
    assert keys.find(other).quota == Quota()
    assert len(keys) == 2


def test_two_new_keys_differ():
    assert len({new_key("alice")[0] for _ in range(100)}) == 100


def test_no_other_key_is_found(tmp_path):
    key, entry = new_key("alice")
    keys = load(tmp_path, entry)
    prefix, secret = key[:13], key[13:]
    wrong = ["", "kvr", prefix, secret, key[:-1], key + "0", key.upper(), f" {key}", f"{key}\n"]
    flipped = prefix + secret[:-1] + ("1" if secret.endswith("0") else "0")
    for other in (*wrong, flipped, new_key("alice")[0], "é", "\ud800", prefix + "x" * 64):
        assert keys.find(other) is None, other


def test_an_empty_file_has_no_keys(tmp_path):
    assert len(load(tmp_path, "")) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[keys]", r"keys\.toml: .*line 1"),
        (b"\xff", "not UTF-8"),
        ("keyz = []", "keyz: Extra inputs"),
        ("keys = 1", "keys: Input should be a valid list"),
        (ENTRY + 'key = "kvr_secret"\n', r"keys\.0\.key: Extra inputs"),
        (ENTRY + "requests_per_minute = 0\n", "keys.0.requests_per_minute: .*greater than"),
        (ENTRY + 'requests_per_minute = "5"\n', "keys.0.requests_per_minute: .*integer"),
        (ENTRY + "tokens_per_minute = 5.0\n", "keys.0.tokens_per_minute: .*integer"),
        (ENTRY.replace("alice", "al ice"), "keys.0.name"),
        (ENTRY.replace("alice", ""), "keys.0.name"),
        (ENTRY + 'tenant = ""\n', "keys.0.tenant"),
        (ENTRY.replace(HASH, "kvr_secret"), "keys.0.hash: String should match"),
        (ENTRY + ENTRY, "two keys with the name 'alice'"),
        (ENTRY + ENTRY.replace("alice", "bob"), "two keys with the id '01234567'"),
        ("#" * (FILE_BYTES_MAX + 1), "more than"),
        ("x = " + "[" * 100_000, "keys.toml"),
        (ENTRY + f"requests_per_minute = {'9' * 5000}\n", r"keys\.toml: .*digits"),
        (ENTRY + f"requests_per_minute = {'9' * 4000}\n", "less than or equal"),
        (ENTRY + "priority_min = -101\n", "keys.0.priority_min: .*greater than"),
        (ENTRY + "metrics = 1\n", "keys.0.metrics: .*boolean"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_in_one_line(tmp_path, text, why):
    with pytest.raises(KeysError, match=why) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "kvr_secret" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(KeysError, match="No such file"):
        KeySet.load(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["", "a b", 'a"', "a\n", "é", "x" * 65])
def test_a_key_has_a_name_for_logs(name):
    with pytest.raises(KeysError, match="name"):
        new_key(name)


# ---- while the router serves


@contextlib.asynccontextmanager
async def watched(path, check_ms):
    callers = Callers()
    watch = KeyWatch(path, callers, check_ms)
    task = asyncio.create_task(watch.run())
    yield callers, watch
    assert not task.done()
    task.cancel()


def put(path, text: str) -> None:
    """As careful people do: nobody sees half of it."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def known(callers: Callers, key: str) -> bool:
    try:
        callers.identify(f"Bearer {key}")
    except Refusal:
        return False
    return True


@pytest.mark.parametrize("way", ["written", "replaced", "told"])
async def test_a_changed_file_is_read_again(tmp_path, way):
    (old, first), (new, second) = new_key("alice"), new_key("bob")
    path = tmp_path / "keys.toml"
    path.write_text(first)
    async with watched(path, 3_600_000 if way == "told" else 5) as (callers, watch):
        assert known(callers, old)
        if way == "replaced":
            put(path, second)
        else:
            path.write_text(second)
        if way == "told":
            watch.look()
        await until(lambda: known(callers, new), within_s=DEADLINE_S)
        assert not known(callers, old)


async def test_a_broken_file_keeps_the_old_keys_and_is_told_of_once(tmp_path, caplog):
    key, entry = new_key("alice")
    path = tmp_path / "keys.toml"
    path.write_text(entry)
    async with watched(path, 5) as (callers, _watch):
        with caplog.at_level(logging.INFO):
            put(path, "[[keys]")
            await until(lambda: "stay as they were" in caplog.text, within_s=DEADLINE_S)
            assert known(callers, key)
            path.unlink()
            await until(lambda: "No such file" in caplog.text, within_s=DEADLINE_S)
            assert known(callers, key)
            put(path, "")
            await until(lambda: "0 API keys" in caplog.text, within_s=DEADLINE_S)
        assert not known(callers, key)
    assert caplog.text.count("stay as they were") == 2


async def test_nothing_that_goes_wrong_ends_the_watch(tmp_path, caplog, monkeypatch):
    key, entry = new_key("alice")
    path = tmp_path / "keys.toml"
    path.write_text(entry)
    load_file = KeySet.load

    def broken(_):
        raise RuntimeError("broken")

    async with watched(path, 5) as (callers, watch):
        monkeypatch.setattr(KeySet, "load", broken)
        watch.look()
        await until(lambda: "RuntimeError: broken" in caplog.text, within_s=DEADLINE_S)
        assert known(callers, key)
        monkeypatch.setattr(KeySet, "load", load_file)
        put(path, "")
        await until(lambda: not known(callers, key), within_s=DEADLINE_S)


def test_a_broken_file_is_refused_at_the_start(tmp_path):
    with pytest.raises(KeysError):
        KeyWatch(tmp_path / "none", Callers(), 1)
