"""Commands of this repository without their imports, which take longer than most runs.

A server process has imported JAX and this package, and forks for each command. What a
command does to its own process stays its own; its output is in files until it ends.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["minillm_jax.cli.app", "minillm_jax.training.train"])


def run(module: str, *arguments: str, given: str = "", timeout: float = 120):
    """`python -m module` with arguments, in the root: a `subprocess.CompletedProcess`.

    Args:
      given: what it finds on its stdin.
      timeout: seconds after which it is killed, and TimeoutError raised.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "stdin").write_text(given)
        command = _SERVER.Process(target=_become, args=(module, arguments, folder))
        command.start()
        command.join(timeout)
        if command.exitcode is None:
            command.kill()
            raise TimeoutError(f"{module} {arguments}: not done in {timeout} s")
        out, errors = ((folder / name).read_text() for name in ("stdout", "stderr"))
        code = command.exitcode
        command.close()
    return subprocess.CompletedProcess([module, *arguments], code, out, errors)


def _become(module, arguments, folder):
    os.chdir(ROOT)
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for number, (name, mode) in enumerate(modes.items()):
        opened = (folder / name).open(mode)
        os.dup2(opened.fileno(), number)
        setattr(sys, name, os.fdopen(number, mode, closefd=False))
    sys.argv = [module, *arguments]
    sys.path[0] = str(ROOT)
    sys.modules.pop(module, None)  # or runpy warns that it is there
    runpy.run_module(module, run_name="__main__", alter_sys=True)
