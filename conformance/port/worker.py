"""A process of its own for the adapter, so that one that hangs or dies takes only its case with it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conformance.adapters import AdapterError, Capabilities, checked_claims, find, use_device
from conformance.port.execute import Outcome, execute
from conformance.vectors import Case

START_SECONDS = 180.0


class LostError(RuntimeError):
    """The process hung or died; the message says how."""


class Worker:
    """Runs cases in another process, one at a time, and starts it anew when it is lost.

    Args:
        adapter: "package.module:object" or a registered name.
        timeout: seconds that a case may take.
        device: "cpu" or "cuda", for adapters that can be told.
    """

    def __init__(self, adapter: str, timeout: float, device: str = "cpu") -> None:
        self.adapter, self.timeout, self.device = adapter, timeout, device
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None

    def run(self, case: Case, dtype: str) -> Outcome:
        """The outcome of a case of L0 to L2; a process that hangs or dies is an outcome too."""
        try:
            outcome: Outcome = self.ask(execute, case, dtype, seconds=self.timeout)
        except AdapterError as error:
            return Outcome(raised=str(error), phase="importing the adapter")
        except LostError as error:
            return Outcome(raised=str(error), phase="the adapter")
        return outcome

    def ask(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """What `function(adapter, *arguments)` returns in the process, which is started if need be.

        Raises:
            AdapterError: see `start`.
            LostError: the process hung or died.
        """
        if self._process is None:
            self.start()
        assert self._channel is not None
        try:
            self._channel.send_bytes(pickle.dumps((function, arguments)))
            if not self._channel.poll(seconds):
                self.close()
                raise LostError(f"TimeoutError: no answer within {seconds:g} s")
            return pickle.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            raise LostError(self._ending()) from None

    def start(self, seconds: float = START_SECONDS) -> Capabilities:
        """Starts the process; returns what the adapter in it claims.

        Raises:
            AdapterError: it cannot be found or asked, ends the process, or takes longer.
        """
        _check_folder()
        ours, theirs = socket.socketpair()
        code = "from conformance.port.worker import serve; serve()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-c", code, str(theirs.fileno()), self.adapter, self.device]
        printed = sys.stderr.fileno() if _real(sys.stderr) else None  # what the adapter prints is no result
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdout=printed)
        theirs.close()
        self._channel = Connection(ours.detach())
        said: Capabilities | AdapterError
        try:
            if not self._channel.poll(seconds):
                self.close()
                raise AdapterError(
                    f"{self.adapter!r}: TimeoutError: not imported in {seconds:g} s; see --timeout"
                )
            said = pickle.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            raise AdapterError(f"{self.adapter!r}: importing it, {self._ending()}") from None
        if isinstance(said, AdapterError):
            self.close()
            raise said
        return said

    def _ending(self) -> str:
        """How the process ended, in words."""
        assert self._process is not None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code is not None and code < 0:
            return f"ProcessDied: killed by {signal.Signals(-code).name}"
        return f"ProcessDied: ended with exit code {code}"

    def close(self) -> None:
        """Ends the process."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = self._channel = None


def _check_folder() -> None:
    """Refuses a file of the user's that the process would import for this package.

    Raises:
        AdapterError: names it.
    """
    for found in (Path("conformance.py"), Path("conformance", "__init__.py")):
        if found.exists() and not found.resolve().is_relative_to(Path(__file__).parents[1]):
            raise AdapterError(
                f"{found.resolve()} hides the package 'conformance' from this folder; rename it"
            )


def _real(stream: Any) -> bool:
    try:
        return bool(stream.fileno() >= 0)
    except (OSError, ValueError, AttributeError):
        return False


def serve() -> None:
    """Body of the process: `argv` holds a file descriptor, the adapter's path and the device."""
    channel = Connection(int(sys.argv[1]))
    try:
        adapter = find(sys.argv[2])
        use_device(adapter, sys.argv[3], sys.argv[2])
        said: Capabilities | AdapterError = checked_claims(adapter, sys.argv[2])
    except AdapterError as error:
        said = error
    channel.send_bytes(pickle.dumps(said))
    if isinstance(said, AdapterError):
        return
    while True:
        try:
            function, arguments = pickle.loads(channel.recv_bytes())
        except (EOFError, OSError):
            return
        channel.send_bytes(pickle.dumps(function(adapter, *arguments)))
