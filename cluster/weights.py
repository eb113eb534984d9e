"""Owns that a model's packed weights are there before workers start, and that a person sees it.

Called by the commands after model_store has found the model. Packing runs in a process of its own:
it needs torch and transformers, and memory for the whole model, which the command gives back so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from cluster.preparation import ModelError, Progress
from kvrelay.config import Quantize
from kvrelay.engine.prepared import find


def pack_weights(
    model_path: Path, quantize: Quantize, cache_dir: Path, on_progress: Progress
) -> None:
    """Makes the packed weights if the cache has none, and reads them into memory.

    Raises:
        ModelError: the model cannot be served, or the cache cannot be written.
    """
    prepared = find(model_path, quantize, cache_dir)
    if prepared is None:
        _pack(model_path, quantize, cache_dir, on_progress)
        prepared = find(model_path, quantize, cache_dir)
    assert prepared is not None
    prepared.warm(on_progress)


def _pack(model_path: Path, quantize: Quantize, cache_dir: Path, on_progress: Progress) -> None:
    on_progress("starting to pack the weights", None)
    command = [sys.executable, "-m", "kvrelay.engine.packing"]
    command += [str(model_path), quantize, str(cache_dir)]
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    # Ctrl-C in a terminal is for us, who end the packer: it would say a traceback, at times.
    with subprocess.Popen(
        command, stdout=pipe, stdin=nothing, text=True, env=quiet, process_group=0
    ) as packer:
        try:
            _follow(packer, on_progress)
        finally:
            packer.terminate()  # it has ended already, or nobody waits for it any more


def _follow(packer: "subprocess.Popen[str]", on_progress: Progress) -> None:
    assert packer.stdout is not None
    for line in packer.stdout:
        said = json.loads(line)
        if "error" in said:
            raise ModelError(said["error"])
        on_progress(said["what"], said["fraction"])
    if (status := packer.wait()) != 0:
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise ModelError(f"the process that packs the weights {ended}: is there enough memory?")
