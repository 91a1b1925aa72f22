"""When a run evaluates, saves, logs and stops. All processes of a run decide the same."""

import time
from typing import Any

from lyregpt.distributed import Distributed
from lyregpt.signals import SignalHandler

EVALUATION_SHARE = 0.1  # evaluations take at most a tenth of a time budget


class Schedule:
    """Decides what is due, from the options, the step, signals and the time.

    With `max_minutes`, `progress` is the part of the budget that is used (0 to 1), else None, and
    `evaluation_seconds` of the budget are kept for the last evaluation. The processes of a run
    agree on signals and times in `update`.
    """

    def __init__(
        self, config: Any, state: Any, distributed: Distributed, evaluation_seconds: float
    ) -> None:
        self.config = config
        self.distributed = distributed
        self.evaluation_seconds = evaluation_seconds
        self.signals = SignalHandler()
        self.stop_signal = 0  # the signal that all processes agreed to stop for
        self.save_requested = False
        self.stop_reason = ''  # why the last evaluation ends the run
        self.budget = 60.0 * (config.max_minutes or 0)  # seconds
        self.progress: float | None = None
        self.finished = state.step >= config.max_iters
        if self.budget:
            self.progress = state.seconds / self.budget
            self.finished = self.progress >= 1
        self.evaluated_at = self.progress or 0.0
        self.evaluation_started = 0.0
        if state.step == state.last_eval:  # a run that had ended stays ended when it is resumed
            self.stop_reason = self.reason_to_stop(state)

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return bool(self.stop_signal or self.stop_reason or self.finished)

    def interrupted(self, batch: Any) -> bool:
        """Whether to give up the step before this micro-batch: only a single process does."""
        if self.signals.stop and not batch.is_first and self.distributed.size == 1:
            self.stop_signal = self.signals.stop
        return self.stop_signal != 0

    def evaluation_due(self, state: Any) -> bool:
        """Whether to evaluate before the next step; with a budget, for a tenth of it at most."""
        if state.step == state.last_eval or self.stop_signal:
            return False
        due = state.step > 0 and state.step % self.config.eval_interval == 0
        if self.progress is not None:
            training = (self.progress - self.evaluated_at) * self.budget
            due = due and training >= (1 / EVALUATION_SHARE - 1) * self.evaluation_seconds
        self.evaluation_started = time.perf_counter()
        return due or self.finished

    def evaluated(self, state: Any) -> None:
        """Take note of an evaluation, and of the time that it took with saving and sampling."""
        self.stop_reason = self.reason_to_stop(state)
        if self.distributed.size == 1:
            self.evaluation_seconds = time.perf_counter() - self.evaluation_started
        self.evaluated_at = self.progress or 0.0

    def reason_to_stop(self, state: Any) -> str:
        """Why the last evaluation ends the run, '' if it does not."""
        target = self.config.target_val_loss
        if target is not None and state.best_val_loss <= target:
            return f'reached the target validation loss of {target}'
        if 0 < self.config.patience <= state.bad_evals:
            return f'no better validation loss for {state.bad_evals} evaluations (patience)'
        return ''

    def checkpoint_due(self, state: Any) -> bool:
        """Whether to save a checkpoint beside those of evaluations."""
        interval = self.config.checkpoint_interval
        regular = interval > 0 and state.step % interval == 0
        return state.step > 0 and not self.stop_signal and (self.save_requested or regular)

    def log_due(self, state: Any) -> bool:
        """Whether to read the losses of the last steps: each reading makes a GPU wait."""
        config = self.config
        regular = state.step % config.log_interval == 0 or state.step % config.eval_interval == 0
        return regular or state.step == config.max_iters or self.finished

    def update(self, state: Any, saved_when: float) -> None:
        """After a step, agree with the other processes on signals and on the time that is used.

        On a GPU they do so only when a log line is due, because each exchange makes it wait.
        """
        distributed = self.distributed
        self.save_requested = False
        cheap = distributed.size == 1 or distributed.device.type == 'cpu'
        if cheap or self.log_due(state):
            seconds = state.elapsed()
            overdue = 0 < 60 * self.config.checkpoint_minutes < time.perf_counter() - saved_when
            save = self.signals.save or overdue
            self.signals.save = False
            stop, seconds, save = distributed.all_reduce_max(self.signals.stop, seconds, save)
            self.stop_signal = int(stop)
            self.save_requested = bool(save)
            if self.budget:
                self.progress = seconds / max(1e-9, self.budget - self.evaluation_seconds)
                self.finished = self.progress >= 1
        if not self.budget:
            self.finished = state.step >= self.config.max_iters

    def seconds_left(self, state: Any, seconds_per_step: float) -> float:
        """An estimate of the time until the end of the run."""
        if self.budget:
            return max(0.0, self.budget - state.elapsed())
        return max(0.0, (self.config.max_iters - state.step) * seconds_per_step)

    def close(self) -> None:
        """Put the signal handlers back."""
        self.signals.restore()
