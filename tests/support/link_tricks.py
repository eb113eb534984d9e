"""What the proxy and the prefill end do for a plan of link_plans.py, on each kind of link."""

from link_plans import INTERRUPTIONS, WIRE_FAULTS, Plan
from link_proxy import Trick


def trick_for(plan: Plan, link: str) -> Trick | None:
    """What the proxy does for the plan; None where frames cannot be told apart, or in memory."""
    if plan.fault in WIRE_FAULTS:
        return _spoiling(plan, link)
    if plan.fault not in INTERRUPTIONS:
        return None
    if plan.phase == "before hello":
        return Trick("hold", "decode", at=0)
    if plan.phase == "after hello":
        return Trick("hold", "prefill", at=0)
    if link == "tls":
        return None  # in `_reach`
    if plan.phase == "in a push" and (plan.fault == "stall" or on_wire(plan, link)):
        return Trick("hold", "decode", "blocks", plan.skip % len(plan.pieces), plan.at)
    if plan.phase == "after commit":
        return Trick("hold", "prefill", "committed", at=plan.at)
    return None


def _spoiling(plan: Plan, link: str) -> Trick | None:
    if plan.fault != "flip":
        return Trick(plan.fault, plan.toward, skip=plan.skip, at=plan.at)
    if not on_wire(plan, link):
        return None  # in memory, then
    if plan.times == 1 or link == "tls":
        return Trick("flip", plan.toward, skip=plan.skip, at=plan.at)
    skip = plan.skip % len(plan.pieces)  # the first blocks, and what is sent again
    return Trick("flip", "decode", "blocks", skip, plan.at, plan.times)


def on_wire(plan: Plan, link: str) -> bool:
    """Whether blocks go over the socket."""
    return link in ("tcp", "tls") or (link == "nccl" and not plan.paired)


def pause_for(plan: Plan, link: str) -> str:
    """The phase at which P waits to be told to go on; none if empty."""
    pauses = {"after begin": "begun", "between pushes": "between", "before commit": "pushed"}
    if link == "tls":  # where frames cannot be told apart
        pauses |= {"in a push": "begun", "after commit": "committing"}
    return pauses.get(plan.phase, "") if plan.fault in INTERRUPTIONS else ""
