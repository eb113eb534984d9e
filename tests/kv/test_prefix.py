import random
import subprocess
import sys

import pytest

from kvrelay.kv.prefix import HASH_BYTES, PrefixChain, chain_root, join_hashes, split_hashes

ROOT = chain_root("model", 4, "")


def chain_of(tokens, root=ROOT) -> PrefixChain:
    chain = PrefixChain(root, 4)
    chain.extend(tokens)
    return chain


def test_only_full_blocks_have_names():
    for length in range(13):
        chain = chain_of(range(length))
        assert len(chain.hashes) == length // 4
        assert chain.tail == list(range(length))[length - length % 4 :]
        assert len(chain) == length
    assert {len(name) for name in chain.hashes} == {HASH_BYTES}


def test_two_chains_have_the_names_of_their_common_prefix_in_common():
    one, other = chain_of([1, 2, 3, 4, 5, 6, 7, 8]), chain_of([1, 2, 3, 4, 5, 6, 7, 9])
    assert one.hashes[0] == other.hashes[0]
    assert one.hashes[1] != other.hashes[1]


def test_a_name_stands_for_all_that_comes_before_it():
    one, other = chain_of([1, 2, 3, 4, 7, 7, 7, 7]), chain_of([1, 2, 3, 5, 7, 7, 7, 7])
    assert not set(one.hashes) & set(other.hashes)
    assert len(set(chain_of([7] * 40).hashes)) == 10


@pytest.mark.parametrize(
    "other", [("other model", 4, ""), ("model", 8, ""), ("model", 4, "x"), ("model", 4, "x" * 999)]
)
def test_another_model_block_size_or_tenant_shares_no_name(other):
    root = chain_root(*other)
    assert root != ROOT
    assert not set(chain_of(range(8)).hashes) & set(chain_of(range(8), root).hashes)


def test_it_does_not_matter_in_how_many_pieces_a_sequence_comes():
    dice = random.Random(1)
    tokens = dice.choices(range(1 << 32), k=100)
    whole = chain_of(tokens)
    for _ in range(20):
        chain, at = chain_of([]), 0
        while at < len(tokens):
            size = dice.randint(0, 9)
            chain.extend(tokens[at : at + size])
            at += size
        assert (chain.hashes, chain.tail) == (whole.hashes, whole.tail)


@pytest.mark.parametrize("prompt", [0, 3, 4, 9])
def test_a_chain_goes_on_from_its_names_and_its_tail(prompt):
    """As a decode worker does, which never sees the prompt."""
    tokens = list(range(20))
    router = chain_of(tokens[:prompt])
    chain = PrefixChain(router.root, 4, split_hashes(join_hashes(router.hashes)), router.tail)
    chain.extend(tokens[prompt:])
    assert chain.hashes == chain_of(tokens).hashes


def test_names_are_the_same_in_every_process():
    code = (
        "from kvrelay.kv.prefix import *; c = PrefixChain(chain_root('m', 2, 's'), 2)\n"
        "c.extend([1, 2]); print(c.hashes[0].hex())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chain = PrefixChain(chain_root("m", 2, "s"), 2)
    chain.extend([1, 2])
    assert out.stdout.strip() == chain.hashes[0].hex()


def test_half_a_name_is_refused():
    with pytest.raises(ValueError, match="17 bytes"):
        split_hashes(b"x" * 17)
    assert split_hashes(b"") == []
