"""Who is calling: headers, tenants, and the salts that follow from them."""

import pytest

from router.callers import Callers
from router.keys import KeySet, new_key
from router.quotas import UNLIMITED, Quota
from router.refusals import Reason, Refusal

CLUSTER_KEY = "k" * 64


@pytest.fixture
def entries(tmp_path):
    """Callers of the names "alice", "bob" and "carol", the last two of one tenant; their keys."""
    made = {"alice": new_key("alice"), "bob": new_key("bob", "team"), "carol": new_key("carol")}
    text = "".join(entry for _, entry in made.values()) + 'tenant = "team"\nrequests_at_once = 3\n'
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return KeySet.load(path), {name: key for name, (key, _) in made.items()}


def test_without_keys_it_is_anybody_whatever_they_say():
    callers = Callers(cluster_key=CLUSTER_KEY)
    assert not callers.need_keys
    assert {callers.identify(a).name for a in (None, "", "Bearer x")} == {"anybody"}
    assert callers.identify(None).quota == UNLIMITED


def test_a_key_names_its_caller(entries):
    keys, of = entries
    callers = Callers(keys, CLUSTER_KEY)
    assert callers.need_keys
    for name, key in of.items():
        for header in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key} "):
            assert callers.identify(header).name == name
    assert callers.identify(f"Bearer {of['carol']}").quota == Quota(requests_at_once=3)


@pytest.mark.parametrize("header", [None, ""])
def test_a_missing_key(entries, header):
    with pytest.raises(Refusal, match="an API key is needed") as caught:
        Callers(entries[0]).identify(header)
    assert caught.value.reason is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    "header", ["{}", "Basic {}", "Bearer", "Bearer ", "Bearer x{}", "Bearer {}x", "x" * 100_000]
)
def test_a_wrong_key_is_not_told_back(entries, header):
    keys, of = entries
    header = header.format(of["alice"])
    with pytest.raises(Refusal) as caught:
        Callers(keys).identify(header)
    assert (caught.value.reason, str(caught.value)) == (
        Reason.UNAUTHENTICATED,
        "the API key is wrong",
    )


def test_a_removed_key_is_refused_at_once(entries):
    keys, of = entries
    callers = Callers(keys)
    callers.identify(f"Bearer {of['alice']}")
    callers.replace(KeySet(()))
    with pytest.raises(Refusal, match="wrong"):
        callers.identify(f"Bearer {of['alice']}")
    assert callers.need_keys, "a file without keys lets nobody in"


def test_tenants_have_salts_of_their_own_equal_at_all_routers_of_a_cluster(entries):
    keys, of = entries

    def salts(cluster_key: str) -> list[str]:
        callers = Callers(keys, cluster_key)
        named = [callers.identify(f"Bearer {key}").tenant for key in of.values()]
        return [*named, Callers(cluster_key=cluster_key).identify(None).tenant]

    alice, bob, carol, anybody = salts(CLUSTER_KEY)
    assert bob == carol
    assert len({alice, bob, anybody}) == 3
    assert salts(CLUSTER_KEY) == [alice, bob, carol, anybody]
    assert not set(salts("another")) & {alice, bob, anybody}
    assert "team" not in bob


def test_what_a_key_may_do_besides_is_in_its_entry(tmp_path):
    (plain, first), (more, second) = new_key("alice"), new_key("watcher")
    path = tmp_path / "keys.toml"
    path.write_text(f"{first}{second}priority_min = -100\nmetrics = true\n")
    callers = Callers(KeySet.load(path))
    known = [callers.identify(f"Bearer {key}") for key in (plain, more)]
    assert [(c.priority_min, c.metrics) for c in known] == [(0, False), (-100, True)]
    anybody = Callers().identify(None)
    assert (anybody.priority_min, anybody.metrics) == (-100, True)
