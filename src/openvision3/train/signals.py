"""Signals as a wish to stop: a run ends its step, saves and comes back."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Signals:
    """SIGTERM and SIGUSR1 (which SLURM sends before the end), and with `interrupt` SIGINT too, as a wish to stop; a second Ctrl-C interrupts at once.

    Whoever sets a run up holds one, so that a signal in the meantime stops the loop at its first step. The loop's own starts from that one (`after`)
    and returns the signal that it received. Outside the main thread nothing changes.
    """

    def __init__(self, after: Signals | None = None, *, interrupt: bool = False):
        self.after, self.interrupt = after, interrupt
        self.received = ""
        """the name of the signal; "" as long as none has come"""

    def __enter__(self) -> Signals:
        self.received = self.after.received if self.after else self.received
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if self.interrupt else [])):
                self._old[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self.after:  # at once: a wait for a batch looks there
            self.after.received = self.received

    def __exit__(self, *_: object) -> None:
        if self.after:
            self.after.received = self.received
        for number, handler in self._old.items():
            signal.signal(number, handler)
