import asyncio
from local_cluster import local_cluster
from tiny_models import make_tiny

async def test_answer(tmp_path):
    model = make_tiny("llama", tmp_path / "llama")
    async with local_cluster(model) as cluster, cluster.client() as client:
        r = await client.generate([5]*40, max_tokens=20).result()
        print(r)
        assert r.completion_tokens == 20
        await asyncio.sleep(0.5)
