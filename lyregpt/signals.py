"""Signals: Ctrl-C, SIGTERM and a closed terminal stop a training, SIGUSR1 saves a checkpoint."""

import os
import signal
import time
from typing import Any

PASSED_ON_SECONDS = 5  # torchrun repeats a signal that the terminal or Slurm sent to every process


class SignalHandler:
    """Remembers the signals that arrive between `__init__` and `restore`.

    `stop` is the number of the first signal that asks for a stop, 0 before it. A second Ctrl-C or
    SIGTERM ends the process at once. `save` is True after a SIGUSR1.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self.received_at = 0.0
        self.previous: dict[int, Any] = {}
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self.hangup = []
        # Windows has no SIGHUP; `nohup` ignores it.
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self.hangup = [signal.SIGHUP]
        try:
            for number in (signal.SIGINT, signal.SIGTERM, *self.hangup):
                self.previous[number] = signal.signal(number, self.on_stop)
            if hasattr(signal, 'SIGUSR1'):
                self.previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self.on_save)
        except ValueError:  # not in the main thread (some notebooks): the signals belong to others
            self.previous.clear()

    def on_save(self, number: int, frame: Any) -> None:
        """Ask for a checkpoint."""
        self.save = True

    def on_stop(self, number: int, frame: Any) -> None:
        """Ask for a stop at the end of the step; a second signal ends the process."""
        if not self.stop:
            self.stop = number
            self.received_at = time.monotonic()
            if 'TORCHELASTIC_RUN_ID' not in os.environ:
                signal.signal(number, self.previous[number])
        elif time.monotonic() - self.received_at > PASSED_ON_SECONDS:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        if number in self.hangup:  # writing to a closed terminal would raise
            for stream in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
