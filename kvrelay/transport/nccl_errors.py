"""What NCCL's results mean for a link. Used by every file of the nccl link."""

from kvrelay.transport.errors import LinkError

# By ncclResult_t. Codes of a newer NCCL are named by their number.
_MEANINGS = {
    1: "a CUDA call failed",
    2: "a system call or the network failed",
    3: "NCCL found an error of its own, or memory that was overwritten",
    4: "an argument is not valid",
    5: "NCCL was used in a way that it forbids",
    6: "the peer is gone, or the network to it",
    7: "the call is still in progress",
    8: "NCCL timed out",
}


class NcclError(LinkError):
    """An NCCL call, or a pair, failed. `result` is the ncclResult_t, 0 when it is not NCCL's."""

    def __init__(self, text: str, result: int = 0) -> None:
        super().__init__(text)
        self.result = result


class NcclUnavailableError(NcclError):
    """NCCL cannot be used in this process, whatever the peer; the text says what to install."""


def error_of(call: str, result: int, detail: str = "") -> NcclError:
    """What a result code of `call` means; `detail` is NCCL's own last message."""
    text = f"NCCL {call}: {_MEANINGS.get(result, 'an unknown result')} (result {result})"
    return NcclError(f"{text}: {detail}" if detail else text, result)
