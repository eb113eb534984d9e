"""Requests of a workload as a simulated router has them: tokens need not exist, their names do.

The names of a prompt's blocks follow from the ids of the workload's prefixes: equal ids, equal
names. What is beyond them is the request's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.workload.asks import Ask
from kvrelay.kv.prefix import HASH_BYTES, PrefixChain, chain_root
from router.admission import Sampling
from router.request import Request, Times

MODEL = "simulated"
_OWN = 1 << 63  # in the first half of a name: a request's number, not a node's

_NONE = Ask(0.0, 1, 1)


@dataclass(eq=False)
class SimRequest(Request):
    """Its prompt is a range, and messages carry none of it. ask: what it is of."""

    ask: Ask = _NONE

    @property
    def prompt_on_wire(self) -> Sequence[int]:
        return ()

    def name_blocks(self, model_fingerprint: str, block_size: int) -> PrefixChain:
        """Made with the request; after a lost attempt its answer so far is prompt, too."""
        assert self.chain is not None
        known = len(self.chain) - len(self.prompt)
        if len(self.answer) > known:
            self.chain.extend(self.answer[known:])
        return self.chain


class Names:
    """Of the blocks of all prompts of a workload."""

    def __init__(self, block_size: int, prefix_tokens: int) -> None:
        self._block_size = block_size
        self._prefix_tokens = prefix_tokens
        self._root = chain_root(MODEL, block_size, salt="")
        self._nodes: dict[tuple[int, int], int] = {}  # by the node before and the id
        self._names: dict[tuple[int, int], bytes] = {}  # by node and block: equal ones are one

    def chain(self, number: int, prompt_tokens: int, prefix: Sequence[int]) -> PrefixChain:
        size = self._block_size
        full, tail = divmod(prompt_tokens, size)
        names = self._shared(prefix, full) if prefix else []
        own = (_OWN | number).to_bytes(8, "big")
        names += [own + block.to_bytes(8, "big") for block in range(len(names), full)]
        return PrefixChain(self._root, size, names, [0] * tail)

    def _shared(self, prefix: Sequence[int], full: int) -> list[bytes]:
        """The names of the leading blocks that the prefix covers whole."""
        path, node = [], 0
        for each in prefix:
            key = (node, each)
            node = self._nodes.setdefault(key, len(self._nodes) + 1)
            path.append(node)
        size, step, known = self._block_size, self._prefix_tokens, self._names
        covered = min(full, len(prefix) * step // size)
        names = []
        for block in range(covered):
            node = path[((block + 1) * size - 1) // step]  # tells all ids up to the block's end
            at = (node, block)
            name = known.get(at)
            if name is None:
                name = known[at] = node.to_bytes(8, "big") + block.to_bytes(8, "big")
            names.append(name)
        return names


assert HASH_BYTES == 16, "names are two halves of 8 bytes"


def make(number: int, ask: Ask, chain: PrefixChain, now_ms: float) -> SimRequest:
    return SimRequest(
        request_id=str(number),
        prompt=range(ask.prompt_tokens),
        sampling=_sampling(ask.answer_tokens),
        times=Times(now_ms),
        chain=chain,
        ask=ask,
    )


_SAMPLINGS: dict[int, Sampling] = {}


def _sampling(max_tokens: int) -> Sampling:
    known = _SAMPLINGS.get(max_tokens)
    if known is None:
        known = _SAMPLINGS[max_tokens] = Sampling(0.0, 0, 1.0, 0, max_tokens, (), ())
    return known
