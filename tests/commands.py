"""Commands of this repository without the imports that take longer than most runs.

A server process has imported JAX and other libraries, nothing of this repository, and
forks for each command. Its environment is the one that the first command found. A
command ends as a child of `multiprocessing` does, without `atexit`; tests of how a
process starts and ends have one of their own.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).parents[1]
LIBRARIES = [
    *("absl.app", "flax.linen", "jax", "ml_collections.config_flags", "optax"),
    *("orbax.checkpoint", "rich.console", "safetensors.numpy", "tokenizers"),
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(LIBRARIES)


def run(
    module: str, *arguments: str, given: str = "", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """`python -m module` with arguments, in the root.

    Args:
      given: what it finds on its stdin.
      timeout: seconds after which it is killed, and TimeoutError raised.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "stdin").write_text(given)
        command = _SERVER.Process(target=_become, args=(module, arguments, folder))
        command.start()
        try:
            command.join(timeout)
            code = command.exitcode
        finally:
            command.kill()
            command.join()
        out, errors = (
            (folder / name).read_bytes().decode() for name in ("stdout", "stderr")
        )
    if code is None:
        raise TimeoutError(f"{module} {arguments}: not done in {timeout} s: {errors}")
    return subprocess.CompletedProcess([module, *arguments], code, out, errors)


def _become(module, arguments, folder):
    os.chdir(ROOT)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = "w" if number else "r"
        with (folder / name).open(mode) as opened:
            os.dup2(opened.fileno(), number)
        setattr(sys, name, os.fdopen(number, mode, buffering=1, closefd=False))
    # Another process may be writing an entry of the cache that all of them share.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    sys.argv = [module, *arguments]
    sys.path[0] = str(ROOT)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
