"""The real nccl4py and libnccl, as far as they go without a GPU: version, ids, errors, and that
there is one NCCL in the process."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvrelay.transport import nccl_install
from kvrelay.transport.errors import LinkError
from kvrelay.transport.nccl_errors import NcclError, NcclUnavailableError, error_of
from kvrelay.transport.nccl_install import loaded_nccls, package_of, refuse_two_nccls
from kvrelay.transport.nccl_library import UNIQUE_ID_BYTES, NvidiaNccl

ROOT = Path(__file__).parents[2]
PACKAGES = [name for name in nccl_install._PACKAGES if nccl_install._version(name)]
needs_nccl = pytest.mark.skipif(
    importlib.util.find_spec("nccl") is None or len(PACKAGES) != 1,
    reason=f"needs nccl4py (extra nccl) and one libnccl, not {PACKAGES}",
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="these calls work on a GPU")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def nccl():
    return NvidiaNccl.load()


# Importing the real one takes seconds, and none of these needs it.
NO_TORCH = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"


def run(code, *args):
    """What a fresh Python prints; its standard error when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH + code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- errors


def test_every_result_has_a_meaning_and_an_unknown_one_its_number():
    texts = {str(error_of("send", result)) for result in range(1, 9)}
    assert len(texts) == 8
    assert not [text for text in texts if "unknown" in text]
    assert str(error_of("send", 77)) == "NCCL send: an unknown result (result 77)"
    assert str(error_of("send", 6, "socket closed")) == (
        "NCCL send: the peer is gone, or the network to it (result 6): socket closed"
    )


def test_an_nccl_error_is_a_link_error():
    assert issubclass(NcclUnavailableError, NcclError)
    assert issubclass(NcclError, LinkError)


@needs_nccl
def test_the_results_are_those_of_the_library():
    from nccl.bindings import nccl as bindings

    known = {int(r) for r in bindings.Result} - {0, int(bindings.Result.NumResults)}
    assert known == set(range(1, 9))


@needs_nccl
@needs_no_gpu
def test_a_call_that_the_library_refuses_says_what_it_refused(nccl):
    with pytest.raises(NcclError, match="Send : comm argument is NULL") as caught:
        nccl.call("send", 0, 1, 1, 1, nccl.null_communicator(), 0)
    assert caught.value.result == 4
    assert "an argument is not valid" in str(caught.value)


@needs_nccl
@needs_no_gpu
def test_a_communicator_without_a_driver_is_a_cuda_error(nccl):
    from nccl.bindings import nccl as bindings

    unique_id, config = bindings.UniqueId.from_buffer(nccl.unique_id()), bindings.Config()
    with pytest.raises(NcclError, match=r"a CUDA call failed .*: Cuda failure") as caught:
        nccl.call("comm_init_rank_config", 2, unique_id.ptr, 0, config.ptr)
    assert caught.value.result == 1


@needs_nccl
@needs_no_gpu
def test_a_communicator_without_a_gpu_is_refused(nccl):
    with pytest.raises(NcclError, match="no CUDA device 0: there are 0"):
        nccl.communicator(nccl.unique_id(), 0, 0)


@needs_nccl
def test_an_id_of_the_wrong_size_never_reaches_the_library(nccl):
    with pytest.raises(NcclError, match="a unique id of 3 bytes, not 128"):
        nccl.communicator(b"abc", 0, 0)


# ---- version and ids


@needs_nccl
def test_the_version_is_that_of_the_file_that_was_loaded(nccl):
    (path,) = loaded_nccls(Path("/proc/self/maps").read_text().splitlines())
    number = ctypes.c_int()
    assert ctypes.CDLL(str(path)).ncclGetVersion(ctypes.byref(number)) == 0
    major, minor, patch = map(int, nccl.version().split("."))
    assert number.value == major * 10_000 + minor * 100 + patch
    assert "nvidia-nccl-cu" in package_of(path)


EXCHANGE = """
from kvrelay.transport.nccl_library import NvidiaNccl
nccl = NvidiaNccl.load()
sys.stdout.write(nccl.unique_id().hex() + "\\n"); sys.stdout.flush()
theirs = bytes.fromhex(sys.stdin.readline())
from nccl.bindings import nccl as bindings
print(bytes(bindings.UniqueId.from_buffer(theirs)) == theirs, len(theirs))
"""


@needs_nccl
def test_ids_of_two_processes_are_exchanged_and_differ(nccl):
    with subprocess.Popen(
        [sys.executable, "-c", NO_TORCH + EXCHANGE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as peer:
        theirs = bytes.fromhex(peer.stdout.readline())
        ours = nccl.unique_id()
        answer, _ = peer.communicate(ours.hex() + "\n", timeout=60)
    assert len(ours) == len(theirs) == UNIQUE_ID_BYTES
    assert len({ours, theirs, nccl.unique_id()}) == 3
    assert answer.split() == ["True", str(UNIQUE_ID_BYTES)]


# ---- what is installed


def test_the_module_imports_without_nccl_and_torch_and_says_what_to_install():
    run(
        """
sys.modules["nccl"] = sys.modules["torch"] = None
from kvrelay.transport import nccl_library, nccl_pairs
sys.modules["torch"] = types.ModuleType("torch")
try:
    nccl_library.NvidiaNccl.load()
except nccl_library.NcclUnavailableError as error:
    assert "pip install 'kvrelay[cuda]'" in str(error), error
else:
    raise AssertionError("loaded")
"""
    )


@needs_nccl
def test_nccl4py_without_the_library_says_what_to_install():
    run(
        """
from cuda import pathfinder
def nothing(name):
    raise pathfinder.DynamicLibNotFoundError("no libnccl.so.2")
pathfinder.load_nvidia_dynamic_lib = nothing
from kvrelay.transport import nccl_library
try:
    nccl_library.NvidiaNccl.load()
except nccl_library.NcclUnavailableError as error:
    assert "no libnccl.so.2" in str(error) and "kvrelay[cuda]" in str(error), error
else:
    raise AssertionError("loaded")
"""
    )


@needs_nccl
def test_a_real_second_copy_of_the_library_is_refused(tmp_path):
    (path,) = loaded_nccls(Path("/proc/self/maps").read_text().splitlines())
    copy = tmp_path / "other nccl" / "libnccl.so.2.99"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    try:
        said = run(
            """
import ctypes
from kvrelay.transport.nccl_library import NcclUnavailableError, NvidiaNccl
NvidiaNccl.load()
other = ctypes.CDLL(sys.argv[1])
other.ncclGetVersion(ctypes.byref(ctypes.c_int()))
try:
    NvidiaNccl.load()
except NcclUnavailableError as error:
    print(error)
""",
            copy,
        )
    finally:
        copy.unlink()  # half a gigabyte
    assert "two NCCLs are loaded in this process" in said
    assert f"{copy} (of no Python package)" in said
    assert f"{path} (of nvidia-nccl-cu" in said
    assert "with nvidia-nccl-cu12 goes a torch built for CUDA 12" in said


MAPPING = "7f0000000000-7f0000001000 r-xp 00000000 00:2a {inode}                {path}\n"


def mappings(*paths):
    return "".join(
        MAPPING.format(inode=number, path=path) for number, path in enumerate(paths)
    ).splitlines()


def test_a_file_mapped_in_pieces_is_one_and_others_are_not_nccl():
    lines = mappings("/a/libnccl.so.2", "/a/libnccl.so.2", "/a/libnccl-net.so", "/a/nccl.py")
    lines += ["7f00-7f01 rw-p 00000000 00:00 0", "7f02-7f03 rw-p 00000000 00:00 0     [heap]"]
    assert loaded_nccls(lines) == [Path("/a/libnccl.so.2")]


def test_a_file_that_was_replaced_on_disk_is_still_seen():
    assert loaded_nccls(mappings("/a/libnccl.so.2 (deleted)")) == [Path("/a/libnccl.so.2")]


def test_two_packages_that_wrote_the_same_file_are_refused(monkeypatch, tmp_path):
    versions = {"nvidia-nccl-cu12": "2.29.3", "nvidia-nccl-cu13": "2.29.7"}
    monkeypatch.setattr(nccl_install, "_version", versions.get)
    nothing = tmp_path / "maps"
    nothing.write_text("")
    with pytest.raises(NcclUnavailableError, match=r"cu12 2.29.3 and nvidia-nccl-cu13 2.29.7 are"):
        refuse_two_nccls(nothing)
    del versions["nvidia-nccl-cu13"]
    refuse_two_nccls(nothing)


# ---- the calls that need a GPU, as they reach a library of our own in NCCL's place


STUB = r"""
#include <stdio.h>
#include <unistd.h>
typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking, cga, least, most; } Config;
static int asked, sent;
#define SAY(...) do { printf(__VA_ARGS__); printf("\n"); fflush(stdout); } while (0)
int ncclGetVersion(int *version) { *version = 23203; return 0; }
int ncclCommInitRankConfig(void **comm, int ranks, Id id, int rank, Config *config) {
    *comm = (void *)0xc0;
    SAY("init of %d id %c%c rank %d blocking %d ctas %d", ranks, id.internal[0], id.internal[127],
        rank, config->blocking, config->most);
    return 7;
}
int ncclCommGetAsyncError(void *comm, int *state) {
    *state = asked++ ? 0 : 7;
    SAY("async error of %p", comm);
    return 0;
}
int ncclGroupStart(void) { SAY("group start"); return 0; }
int ncclGroupEnd(void) { SAY("group end"); return 7; }
int ncclSend(const void *p, size_t n, int type, int peer, void *comm, void *stream) {
    SAY("send %p %zu type %d to %d on %p stream %p", p, n, type, peer, comm, stream);
    return sent++ < 2 ? 0 : 5;
}
int ncclRecv(void *p, size_t n, int type, int peer, void *comm, void *stream) {
    SAY("recv %p %zu type %d from %d on %p stream %p", p, n, type, peer, comm, stream);
    return 0;
}
int ncclCommFinalize(void *comm) { SAY("finalize %p", comm); return 7; }
int ncclCommDestroy(void *comm) { SAY("destroy %p", comm); return 0; }
int ncclCommAbort(void *comm) { SAY("abort %p", comm); for (;;) pause(); }
const char *ncclGetErrorString(int result) { return "stub"; }
const char *ncclGetLastError(void *comm) { return "stub says no"; }
"""
LOAD_STUB = """
import ctypes, threading
ctypes.CDLL(sys.argv[1])  # nccl4py takes what is loaded already
from kvrelay.transport.nccl_library import Direction, NcclError, NvidiaNccl, Region
nccl = NvidiaNccl.load()
from nccl.bindings import nccl as bindings
assert bindings.get_library_path() == sys.argv[1], bindings.get_library_path()
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text(STUB)
    path = folder / "libnccl.so.2"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", path, "stub.c"]
    subprocess.run(command, cwd=folder, check=True)
    return path


@needs_nccl
@needs_compiler
def test_a_hung_abort_in_the_library_does_not_stop_python(stub):
    """nccl4py gives up the interpreter lock around a call: all of nccl_pair.py stands on that."""
    said = run(
        LOAD_STUB
        + """
abort = threading.Thread(target=bindings.comm_abort, args=(bindings.Comm(0xc0),), daemon=True)
abort.start()
abort.join(0.3)
print("alive" if abort.is_alive() else "not hung", flush=True)
""",
        stub,
    )
    assert said.splitlines() == ["abort 0xc0", "alive"]


@needs_nccl
@needs_compiler
def test_a_communicator_makes_the_calls_it_should_with_the_arguments_it_should(stub):
    """Through the real nccl4py; torch's stream is a stand-in."""
    said = run(
        LOAD_STUB
        + """
stream = types.SimpleNamespace(cuda_stream=0x5, query=lambda: True)
cuda = types.SimpleNamespace(device_count=lambda: 2, Stream=lambda device: stream,
                             set_device=lambda device: print("device", device, flush=True))
nccl = NvidiaNccl(bindings, types.SimpleNamespace(cuda=cuda))
communicator = nccl.communicator(b"a" * 127 + b"z", 0, 1)
assert [communicator.ready() for _ in range(2)] == [False, True]
communicator.post(Direction.SEND, [Region(0x1000, 5 << 30), Region(0x2000, 7)])
communicator.post(Direction.RECEIVE, [Region(0x3000, 9)])
assert communicator.idle()
try:
    communicator.post(Direction.SEND, [Region(0x4000, 1)])
except NcclError as error:
    print(error, flush=True)
communicator.finalize()
communicator.destroy()
""",
        stub,
    )
    assert said.splitlines() == [
        "device 1",
        "init of 2 id az rank 0 blocking 0 ctas 4",
        "async error of 0xc0",
        "async error of 0xc0",
        "group start",
        "send 0x1000 5368709120 type 1 to 1 on 0xc0 stream 0x5",
        "send 0x2000 7 type 1 to 1 on 0xc0 stream 0x5",
        "group end",
        "group start",
        "recv 0x3000 9 type 1 from 1 on 0xc0 stream 0x5",
        "group end",
        "group start",
        "send 0x4000 1 type 1 to 1 on 0xc0 stream 0x5",
        "group end",
        "NCCL send: NCCL was used in a way that it forbids (result 5): stub says no",
        "finalize 0xc0",
        "destroy 0xc0",
    ]
