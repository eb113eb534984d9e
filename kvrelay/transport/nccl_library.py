"""NCCL as the nccl link uses it: a two-rank communicator that never blocks its caller by design.

Two implementations: `NvidiaNccl` here, over nccl4py and torch's streams, and the double of the
tests. nccl_pair.py is the only caller, from the pair's own thread. Neither nccl4py nor torch is
imported before `NvidiaNccl.load`, so this module imports anywhere.
"""

import enum
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from kvrelay.transport.nccl_errors import NcclError, NcclUnavailableError, error_of
from kvrelay.transport.nccl_install import refuse_two_nccls

UNIQUE_ID_BYTES = 128
RANKS = 2

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1  # ncclUint8: a block is bytes to NCCL
# CUDA thread blocks of one pair. A kernel that waits for its peer keeps them: few, so that the
# kernels of all pairs fit beside each other and the engine's, and none waits for another pair's.
_CTAS_MAX = 4


class Direction(enum.Enum):
    SEND = enum.auto()
    RECEIVE = enum.auto()


class Region(NamedTuple):
    """A piece of pool memory, on the communicator's device. Keeps no memory alive: whoever names it
    keeps the pool until the pair is `memory_safe`."""

    address: int
    size_bytes: int


class Communicator(Protocol):
    """One end of a two-rank communicator, and its stream. All calls from the thread that made it.

    Until `ready` has said True after it was made, after `post` and after `finalize`, only `ready`
    and `abort` may be called. Any call may in practice never return: whoever calls must be one who
    can be left behind.
    """

    def ready(self) -> bool:
        """Whether NCCL has finished what it was asked on the host; NcclError when that failed."""
        ...

    def post(self, direction: Direction, regions: Sequence[Region]) -> None:
        """Begins to send to the peer, or to receive from it, all regions as one group."""
        ...

    def idle(self) -> bool:
        """Whether the device is done with all that was posted. May be asked after abort, too."""
        ...

    def finalize(self) -> None:
        """Begins to flush what was posted, so that `destroy` need not wait."""
        ...

    def destroy(self) -> None: ...

    def abort(self) -> None:
        """Stops what is under way and frees the communicator."""
        ...


class NcclLibrary(Protocol):
    def version(self) -> str: ...

    def unique_id(self) -> bytes:
        """A new id of `UNIQUE_ID_BYTES`. Its maker must outlive the making of the communicator."""
        ...

    def communicator(self, unique_id: bytes, rank: int, device: int) -> Communicator:
        """Begins to make one end, which is `ready` when both ends have come."""
        ...


class NvidiaNccl:
    """The library itself, of which a process has one."""

    def __init__(self, bindings: types.ModuleType, torch: types.ModuleType) -> None:
        self._bindings = bindings
        self._torch = torch

    @classmethod
    def load(cls) -> "NvidiaNccl":
        """NcclUnavailableError, saying what to install, when there is none or more than one."""
        # torch first: where it brings an NCCL of its own, that is the one to share.
        import torch

        try:
            from nccl.bindings import nccl as bindings

            bindings.get_version()  # loads libnccl
        except (ImportError, RuntimeError) as error:
            raise NcclUnavailableError(
                f"NCCL cannot be loaded ({error}): pip install 'kvrelay[cuda]'"
            ) from error
        refuse_two_nccls()
        return cls(bindings, torch)

    def version(self) -> str:
        number = self._bindings.get_version()
        return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"

    def unique_id(self) -> bytes:
        return bytes(self.call("get_unique_id"))

    def communicator(self, unique_id: bytes, rank: int, device: int) -> Communicator:
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise NcclError(f"a unique id of {len(unique_id)} bytes, not {UNIQUE_ID_BYTES}")
        cuda = self._torch.cuda
        if device >= cuda.device_count():
            raise NcclError(f"no CUDA device {device}: there are {cuda.device_count()}")
        try:
            cuda.set_device(device)  # for this thread, which makes all calls
            stream = cuda.Stream(device)
        except RuntimeError as error:
            raise NcclError(f"no CUDA stream on device {device}: {error}") from error
        config = self._bindings.Config()
        config.blocking = 0
        config.max_ctas = _CTAS_MAX
        id_struct = self._bindings.UniqueId.from_buffer(unique_id)
        handle = self.call("comm_init_rank_config", RANKS, id_struct.ptr, rank, config.ptr)
        return _CudaCommunicator(self, handle, stream, peer=1 - rank)

    def call(self, name: str, *args: Any) -> Any:
        """Calls the C function of nccl4py's name; NcclError when it says anything but success or
        in progress."""
        try:
            return getattr(self._bindings, name)(*args)
        except self._bindings.NCCLError as error:
            raise self._error(name, error.status) from error
        except RuntimeError as error:  # a function that this libnccl does not have
            raise NcclError(f"NCCL {name}: {error}") from error

    def check(self, name: str, result: int) -> bool:
        """Whether `result` is success rather than in progress; NcclError when it is neither."""
        if result not in (_SUCCESS, _IN_PROGRESS):
            raise self._error(name, result)
        return result == _SUCCESS

    def null_communicator(self) -> Any:
        return self._bindings.Comm()

    def _error(self, name: str, result: int) -> NcclError:
        # NCCL keeps its last message for the process, so no communicator is named.
        return error_of(name, result, self._bindings.get_last_error(self.null_communicator()))


class _CudaCommunicator:
    """Implements Communicator. `handle` is nccl4py's own."""

    def __init__(self, library: NvidiaNccl, handle: Any, stream: Any, peer: int) -> None:
        self._library = library
        self._handle = handle
        self._stream = stream
        self._peer = peer

    def ready(self) -> bool:
        result = int(self._library.call("comm_get_async_error", self._handle))
        return self._library.check("async error", result)

    def post(self, direction: Direction, regions: Sequence[Region]) -> None:
        name = "send" if direction is Direction.SEND else "recv"
        stream = self._stream.cuda_stream
        self._library.call("group_start")
        try:
            for address, size_bytes in regions:
                self._library.call(
                    name, address, size_bytes, _UINT8, self._peer, self._handle, stream
                )
        finally:
            self._library.call("group_end")

    def idle(self) -> bool:
        # Nothing but NCCL's work is ever put on this stream.
        try:
            return bool(self._stream.query())
        except RuntimeError as error:
            raise NcclError(f"the CUDA stream of the pair failed: {error}") from error

    def finalize(self) -> None:
        self._library.call("comm_finalize", self._handle)

    def destroy(self) -> None:
        self._library.call("comm_destroy", self._handle)

    def abort(self) -> None:
        self._library.call("comm_abort", self._handle)
