"""The decision objects of a decode worker as its config wants them.

Called by decode_worker/service.py and by the capacity simulation, which differ in what is around
these objects and must not differ in them.
"""

from decode_worker.claims import Claims
from decode_worker.handoff import HandOff
from decode_worker.prompts import LocalPrompts
from decode_worker.tickets import TicketSigner
from kvrelay.config import WorkerConfig
from kvrelay.kv.layout import KVLayout
from kvrelay.kv.ledger import BlockLedger


def make_handoff(
    config: WorkerConfig, layout: KVLayout, ledger: BlockLedger, signer: TicketSigner | None = None
) -> HandOff:
    """signer: of its tickets; None: one with a key of its own."""
    return HandOff(
        layout,
        ledger,
        lease_ms=config.lease_ms,
        reservations_max=config.reservations_max,
        resends_max=config.resends_max,
        claims=Claims(
            claim_ms=config.claim_ms,
            hold_ms=config.claim_hold_ms,
            claims_max=config.claims_max,
        ),
        signer=signer,
    )


def make_prompts(config: WorkerConfig, layout: KVLayout, handoff: HandOff) -> LocalPrompts:
    """handoff: has the blocks of these prompts."""
    return LocalPrompts(
        layout.block_size,
        chunk_tokens=config.chunk_tokens,
        itl_target_ms=config.itl_target_ms,
        prompts_max=config.local_prompts_max,
        look_again=lambda prompt: handoff.catch_up(prompt.key, prompt.computed),
    )
