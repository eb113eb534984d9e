"""Deterministic simulation: whole clusters of production objects in virtual time, by seed.

    python -m cluster.simulation --seeds 0:10000           every seed of the range, two processes
    python -m cluster.simulation --seed 4711 --trace       one again, with all that happened

Production code, as it is: the router's Fleet with all under it, the services of both workers with
all under them, and the KV links' WriterPool, Transfer, Listener and ReaderLink. Simulated are what
they meet: time (loop.py), streams between processes (network.py), the sockets and bytes of links
(links.py), engine and KV memory (engine.py, memory.py, model.py), clients (clients.py).

A seed decides on cluster, limits, load and faults (settings.py, faults.py): processes are killed
and replaced, stopped and go on, cut apart; streams break; blocks arrive spoilt and frames twice;
steps are slow or fail; clients leave. The same seed gives the same trace hash in every process.

What must hold (checks.py, memory.py, clients.py, refusals.py, world.py):
1. A client sees the tokens of the reference, each once, without a gap.
2. Every write into a block is by whom the ledger gives leave at that moment, every read finds one
   whole prefix; the ledger's states sum up; at the end every block is free or cached.
3. When faults are over every request ends, with its answer or a refusal that has a cause: no room
   for as long as it had to wait, or faults enough of a kind that counts against it. Queues keep to
   their limits, nobody works on what nobody wants, and no worker keeps an answer for ever.
4. The objects' own checks; nothing is logged as an error that no fault has planned.
5. No two tenants share prefixes.

Layers: loop, network and processes know no faults and no checks, so that a simulation of capacity
can use them alone. tests/simulation/ plants bugs in production objects and shows that they are
found.
"""
