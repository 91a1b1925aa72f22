"""Saves a run's training state while it trains: ckpt.pt, the one before, and best.pt."""

import dataclasses
import os
import time
from typing import Any

import torch
import torch.distributed as dist

from lyregpt import checkpoint
from lyregpt.batches import TrainingBatches
from lyregpt.dataset import bytes_per_token, read_meta
from lyregpt.device import local
from lyregpt.distributed import job_name
from lyregpt.logger import Logger
from lyregpt.optim import Optimizers
from lyregpt.start import Start
from model import GPT

BEST_KEYS = ('model', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer', 'meta')


class Saver:
    """Writes checkpoints and remembers what is on disk.

    A full disk does not end a long run: the last good files stay, and the next `save` tries again.
    With FSDP the checkpoints are folders, to which every process writes its part.
    """

    def __init__(
        self,
        config: Any,
        start: Start,
        state: Any,
        log: Logger,
        model: GPT,
        optimizers: Optimizers,
        batches: TrainingBatches,
    ) -> None:
        distributed = start.distributed
        self.config = config
        self.distributed = distributed
        self.log = log
        self.model = model
        self.optimizers = optimizers
        self.facts = checkpoint_facts(start, config, model, batches)
        self.fsdp = start.fsdp
        self.suffix = '' if self.fsdp else '.pt'
        background = config.checkpoint_async
        if background == 'auto':
            background = distributed.device.type == 'cuda'
        self.writer = checkpoint.Writer(background, distributed.device, distributed.cpu_mesh)
        self.step = -1  # of the last state that was handed to the writer
        self.time = time.perf_counter()
        self.on_disk: dict[str, int] = {}  # file name: the step that it holds
        if start.resumes:
            self.step = state.step
            self.on_disk['ckpt' + self.suffix] = state.step
        self.unsaved: dict[str, str] = {}  # file name: why it could not be written

    @property
    def latest(self) -> str:
        """The path of the latest training state."""
        return os.path.join(self.config.out_dir, 'ckpt' + self.suffix)

    def save(self, state: Any, best: bool = False) -> None:
        """Save ckpt.pt, and with `best` the weights as best.pt. All processes call this."""
        with self.log.timed('saving'):
            self.wait()
            losses = state.gather_losses(self.distributed)
            self.step = state.step
            self.time = time.perf_counter()
            if not self.distributed.is_main and not self.fsdp:
                return
            self.log.costs(self.model, self.optimizers, state.step)
            content = {
                'model': self.model.state_dict(),
                'optimizer': self.optimizers.state_dict(),
                'scaler': self.optimizers.scaler.state_dict(),
                'iter_num': state.step,
                'best_val_loss': state.best_val_loss,
                'bad_evals': state.bad_evals,
                'last_eval': state.last_eval,
                'losses': losses,
                'seconds': state.elapsed(),
            }
            self.writer.submit(content | self.facts, lambda copy: self.write(copy, best))

    def write(self, content: dict[str, Any], best: bool) -> None:
        """Write the files. This part may run in a thread, beside the training."""
        finite = all(bool(local(w).isfinite().all()) for w in content['model'].values())
        if self.fsdp:  # each process looks at its parts
            agreed = torch.tensor(finite, dtype=torch.int32)
            dist.all_reduce(agreed, dist.ReduceOp.MIN, self.distributed.files)
            finite = bool(agreed)
        if not finite:
            raise FloatingPointError('weights')
        self.log.sync()  # the rows of metrics.csv reach the disk before the checkpoint does
        if best:
            self.write_file('best' + self.suffix, {k: content[k] for k in BEST_KEYS}, False)
        self.write_file('ckpt' + self.suffix, content, True)

    def write_file(self, name: str, content: dict[str, Any], keep_previous: bool) -> None:
        """Write one file, or with FSDP one folder."""
        path = os.path.join(self.config.out_dir, name)
        try:
            if self.fsdp:
                checkpoint.save_folder(path, content, keep_previous, self.distributed.files)
            else:
                checkpoint.save(path, content, keep_previous)
        except OSError as error:
            self.unsaved[name] = str(error.strerror or error)
            self.log.not_saved(path, content['iter_num'], self.unsaved[name])
        else:
            self.unsaved.pop(name, None)
            self.on_disk[name] = content['iter_num']

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the last checkpoint is written; with `seconds=0` only see whether it is.

        Raises UserError if its weights are not finite.
        """
        try:
            self.writer.wait(seconds)
        except FloatingPointError as error:
            self.fail(str(error), self.step)

    def before_update(self) -> None:
        """Wait until the writer has copied the tensors that are about to change."""
        self.writer.before_update()

    def require_finite(self, what: str, values: Any, step: int) -> None:
        """Raises UserError if a value of the steps up to `step` is NaN or infinite."""
        values = torch.as_tensor(values).reshape(-1)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            self.fail(what, step - len(values) + int(bad[0]) + 1)

    def fail(self, what: str, step: int) -> None:
        """Raise UserError because of a NaN or an infinity."""
        kept = self.on_disk.get('ckpt' + self.suffix)
        self.distributed.fail(self.log.not_finite(what, step, self.latest, kept))

    def finish(self) -> None:
        """Raise UserError if a file could not be written until the end."""
        if self.distributed.all_reduce_max(bool(self.unsaved))[0]:
            self.log.close()
            out_dir = self.config.out_dir
            missing = [f'{out_dir}/{name} ({why})' for name, why in self.unsaved.items()]
            self.distributed.fail(f'not saved: {", ".join(missing)}: free some space and resume')


def checkpoint_facts(
    start: Start, config: Any, model: GPT, batches: TrainingBatches
) -> dict[str, Any]:
    """What a checkpoint holds that does not change during a run."""
    return {
        'model_args': model.config.to_dict(),
        'config': dataclasses.asdict(config) | {'threads': start.n_threads},
        'tokenizer': start.tokenizer.state(),
        'meta': {
            'bytes_per_token': bytes_per_token(start.folder),
            'splits': read_meta(start.folder).get('splits', {}),
            'began_from': start.began_from,
        },
        'job': job_name(),
        'processes': start.distributed.size,
        'micro': batches.micro_batch_size if config.batch_size == 'auto' else None,
    }
