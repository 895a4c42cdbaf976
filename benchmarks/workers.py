"""The processes of the peers, from the side of the comparison."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from benchmarks import peers

ROOT = pathlib.Path(__file__).parents[1]


class PeerError(Exception):
    """A peer that failed or ended; one line that says why."""


class Worker:
    """A process that answers requests, one at a time."""

    def __init__(self, command: list[str], log: pathlib.Path):
        """Starts a process and waits until it is ready; `log` takes its stderr."""
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            self.ready = self._reply()
        except BaseException:  # Ctrl-C too: no process is left behind
            self.stop()
            raise

    def call(self, **request: Any) -> dict[str, Any]:
        """The reply to a request; raises PeerError if there is none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            self._raise_ended()
        return self._reply()

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            self._raise_ended()
        reply = json.loads(line)
        if "error" in reply:
            self.stop()
            raise PeerError(reply["error"])
        return reply

    def _raise_ended(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # its own code, not that of the kill
        self.stop()
        said = self._log.read_text(errors="replace").strip().splitlines()
        last = f": {said[-1].strip()[:200]}" if said else ""
        code = self._process.returncode
        killed = " (killed: out of memory?)" if code == -signal.SIGKILL else ""
        raise PeerError(f"ended with code {code}{killed}{last}")


def start(name: str, folder: pathlib.Path, config_file: pathlib.Path) -> Worker:
    """The process of a peer, ready with the folder's weights.

    Raises:
      PeerError: if it cannot be made ready.
    """
    arguments = [name, str(folder), str(config_file), str(threads())]
    command = [sys.executable, "-m", f"{peers.__name__}.worker", *arguments]
    return Worker(command, folder.with_name(f"{name}.log"))


def threads() -> int:
    """Threads of every peer: the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
