"""What a run tells the outside: the console, train.log, metrics.csv, config.json, run.json, and wandb or TensorBoard when asked for."""

import contextlib
import csv
import dataclasses
import json
import os
import sys
from typing import Any

from tqdm import tqdm

from configurator import UserError
from lyregpt import checkpoint
from lyregpt.report import METRICS, read_sessions
from lyregpt.text import atomic_write
from lyregpt.tokenizer import Tokenizer

OF_A_RUN = tuple(
    'ckpt.prev.pt ckpt.prev ckpt.pt ckpt best.pt best best.prev metrics.csv train.log config.json run.json tokenizer.json report.html'.split()
)


class Log:
    """train.log, metrics.csv, config.json and run.json in out_dir, the console, and wandb or TensorBoard when asked for.

    run.json is a list with a dictionary for each time that the run was started or resumed: what is no knob and no curve (machine, data, memory).

    On resume, rows that a killed run wrote after its last checkpoint are dropped from metrics.csv: the resumed run writes them again.
    """

    def __init__(self, config: Any, step: int, tokenizer: Tokenizer):
        self.out_dir, resuming = config.out_dir, config.init_from == 'resume'
        path = os.path.join(config.out_dir, 'metrics.csv')
        try:
            os.makedirs(config.out_dir, exist_ok=True)
            moved = '' if resuming else archive_run(config.out_dir)
            kept = []
            if resuming and os.path.exists(path):
                with open(path, encoding='utf-8', newline='') as f:
                    kept = [
                        row
                        for row in csv.DictReader(f)
                        if (row['step'] or '').isdigit()
                        and int(row['step']) <= step
                        and row['mfu'] is not None
                    ]
            with open(path + '.tmp', 'w', encoding='utf-8', newline='') as f:
                writer = csv.DictWriter(f, METRICS, extrasaction='ignore')
                writer.writeheader()
                writer.writerows(kept)
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + '.tmp', path)
            self.metrics = open(path, 'a', encoding='utf-8', newline='')
            self.text = open(
                os.path.join(config.out_dir, 'train.log'),
                'a' if resuming else 'w',
                encoding='utf-8',
            )
            atomic_write(
                os.path.join(config.out_dir, 'config.json'),
                json.dumps(dataclasses.asdict(config), indent=1).encode(),
            )
            tokenizer.save(os.path.join(config.out_dir, 'tokenizer.json'))
        except OSError as error:
            raise UserError(
                f'out_dir={config.out_dir}: cannot be written ({error.strerror})'
            ) from None
        self.writer = csv.DictWriter(self.metrics, METRICS)
        self.sessions = (read_sessions(config.out_dir) if resuming else []) + [{}]
        self.wandb = self.board = None
        try:
            if config.wandb_log:
                import wandb

                # A resumed run continues the same run in wandb.
                ids = [session['wandb_id'] for session in self.sessions if 'wandb_id' in session]
                self.wandb = wandb.init(
                    project=config.wandb_project,
                    name=config.wandb_run_name or config.out_dir,
                    config=dataclasses.asdict(config),
                    id=next(iter(ids), None),
                    resume='allow',
                )
                self.note(wandb_id=self.wandb.id)
            if config.tensorboard_log:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(config.out_dir)
        except ImportError as error:
            raise UserError(f'{error.name} is not installed: pip install {error.name}') from None

        if moved:
            self.say(f'an earlier run was in {config.out_dir}: it is in {moved} now')

    def say(self, text: str, console: bool = True) -> None:
        """One line for the console and train.log. A full disk must not end the training: the console still has it."""
        if console:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        with contextlib.suppress(
            OSError, ValueError
        ):  # ValueError: it is closed, and the last checkpoint is still being written
            self.text.write(text + '\n')
            self.text.flush()

    def row(self, **values: Any) -> None:
        """One row of metrics.csv; fields without a figure stay empty."""
        short = {
            k: f'{v:.8g}' if isinstance(v, float) else v for k, v in values.items() if v is not None
        }
        with contextlib.suppress(OSError):
            self.writer.writerow(short)
            self.metrics.flush()
        figures = {k: v for k, v in values.items() if v is not None and k != 'step'}
        if self.wandb:
            self.wandb.log(figures, step=values['step'])
        if self.board:
            for key, value in figures.items():
                self.board.add_scalar(key, value, values['step'])

    def note(self, **facts: Any) -> None:
        """Put facts about this start of the run into run.json."""
        self.sessions[-1] |= facts
        with contextlib.suppress(OSError):
            atomic_write(
                os.path.join(self.out_dir, 'run.json'), json.dumps(self.sessions, indent=1).encode()
            )

    def sync(self) -> None:
        """Have metrics.csv reach the disk."""
        with contextlib.suppress(OSError, ValueError):
            os.fsync(self.metrics.fileno())

    def close(self) -> None:
        """Close the files, and tell wandb and TensorBoard that the run is over."""
        for closing in (
            self.metrics.close,
            self.text.close,
            self.board.close if self.board else None,
            self.wandb.finish if self.wandb else None,
        ):
            if closing:
                with contextlib.suppress(OSError):
                    closing()


def archive_run(out_dir: str) -> str:
    """Move an earlier run's files to out_dir/earlier (earlier-2 …), so that starting anew by mistake loses nothing; '' if there are none.

    The spare checkpoint goes first and ckpt.pt next: killed at any instant, what is left is the whole old run, or nothing to resume.
    """
    there = [name for name in OF_A_RUN if os.path.exists(os.path.join(out_dir, name))]
    if not {name for name in there if name.startswith(('ckpt', 'best'))}:
        return ''
    number = 1
    while os.path.exists(aside := os.path.join(out_dir, 'earlier' + f'-{number}' * (number > 1))):
        number += 1
    os.makedirs(aside)
    for name in there:
        if '.prev' in name and {'ckpt.pt', 'ckpt'} & set(there):
            checkpoint.remove(os.path.join(out_dir, name))
        else:
            os.rename(os.path.join(out_dir, name), os.path.join(aside, name))
    return aside
