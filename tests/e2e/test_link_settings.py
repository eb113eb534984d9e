"""What can be chosen of the links, through whole requests: dtypes that differ, codecs, TLS."""

from pathlib import Path

import pytest
from certificates import make_certificates
from local_cluster import local_cluster
from tiny_models import make_endless

from kvrelay.tls import CertificatesError

PROMPT = list(range(3, 60))
ANSWER_TOKENS = 20
HEAD_DIM = 64  # int8 KV is smaller than any other from here on


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_endless(tmp_path_factory.mktemp("tiny"), head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "cluster")


async def ask(model: Path, **settings):
    """The answer and, of the KV that moved, the bytes a block."""
    async with local_cluster(model, **settings) as cluster, cluster.client() as client:
        answer = await client.generate(PROMPT, max_tokens=ANSWER_TOKENS, temperature=0).result()
        blocks = cluster.prefill[0]._layout.blocks_for(len(PROMPT))
        return answer, answer.timings.kv_bytes / blocks


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("there", ["float16", "bfloat16", "int8"])
async def test_workers_may_keep_kv_in_different_dtypes(model, transport, there):
    """P computes on what it keeps; D goes on with what it keeps. Less of it travels."""
    worker = {"transport": transport}
    whole, whole_bytes = await ask(model, worker=worker)
    answer, block_bytes = await ask(model, worker=worker, decode_worker={"kv_dtype": there})
    assert len(answer.token_ids) == ANSWER_TOKENS
    assert answer.token_ids[0] == whole.token_ids[0]  # P's own, from the same KV
    assert block_bytes < whole_bytes


@pytest.mark.parametrize("here", ["float16", "int8"])
async def test_a_wider_pool_takes_what_a_narrower_one_has(model, here):
    worker = {"transport": "tcp", "kv_dtype": here}
    answer, narrow_bytes = await ask(model, worker=worker)
    wider, block_bytes = await ask(model, worker=worker, decode_worker={"kv_dtype": "float32"})
    assert len(wider.token_ids) == ANSWER_TOKENS
    assert block_bytes == narrow_bytes
    assert wider.token_ids[0] == answer.token_ids[0]


@pytest.mark.parametrize("codec", ["bf16", "int8"])
async def test_a_codec_makes_less_travel_over_tcp(model, codec):
    _, whole_bytes = await ask(model, worker={"transport": "tcp"})
    answer, block_bytes = await ask(model, worker={"transport": "tcp", "wire_codec": codec})
    assert len(answer.token_ids) == ANSWER_TOKENS
    assert block_bytes < whole_bytes


async def test_kv_over_tls_gives_the_same_tokens(model, certificates):
    plain, _ = await ask(model, worker={"transport": "tcp"})
    over_tls, _ = await ask(model, worker={"transport": "tcp", "certificates": certificates})
    assert over_tls.token_ids == plain.token_ids


async def test_without_checksums_requests_are_answered_the_same(model):
    with_them, _ = await ask(model)
    without, _ = await ask(model, worker={"checksums": False})
    assert without.token_ids == with_them.token_ids


async def test_a_folder_without_certificates_is_refused_at_start(model, tmp_path):
    with pytest.raises(CertificatesError, match=r"has no ca\.pem and no cert\.pem and no key\.pem"):
        await ask(model, worker={"certificates": tmp_path})
