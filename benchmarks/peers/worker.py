"""The process of one peer: JSON lines in, JSON lines out.

    python -m benchmarks.peers.worker NAME FOLDER CONFIG.json THREADS

A request has a "call", `begin`, `prefill` or `decode`, and its arguments; a reply the
result, or an "error". Between requests it waits for its input and takes no processor.
"""

import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from benchmarks import peers
from minillm_jax.config import ModelConfig


def main(name: str, folder: str, config_file: str, threads: str) -> None:
    """Loads a peer, says so by an empty reply, and serves until its input ends."""
    replies = _own_stdout()
    config = ModelConfig.from_dict(json.loads(pathlib.Path(config_file).read_text()))
    for reply in _replies(name, pathlib.Path(folder), config, int(threads)):
        print(json.dumps(reply), file=replies, flush=True)


def answer(peer: peers.Peer, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request; `seconds` are until the tokens are on the host."""
    if request["call"] == "begin":
        peer.begin(request["batch_size"], request["context"])
        return {"step_bytes": peer.step_bytes(request["batch_size"], request["held"])}
    if request["call"] == "prefill":
        prompt = np.asarray(request["tokens"], np.int32)
        start = time.perf_counter()
        tokens = peer.prefill(prompt)
    else:
        start = time.perf_counter()
        tokens = peer.decode(request["steps"])
    return {"seconds": time.perf_counter() - start, "tokens": tokens.tolist()}


def _replies(
    name: str, folder: pathlib.Path, config: ModelConfig, threads: int
) -> Iterator[dict[str, Any]]:
    try:
        module = importlib.import_module(f"benchmarks.peers.{peers.PEERS[name].module}")
        load: peers.Loader = module.load
        peer = load(name, folder, config, threads)
        yield {}
        for line in sys.stdin:
            yield answer(peer, json.loads(line))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        yield {"error": f"{type(error).__name__}: {text}"}


def _own_stdout() -> TextIO:
    """What was stdout; what libraries print there goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main(*sys.argv[1:])
