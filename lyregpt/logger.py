"""Logging of a training run: console, files in out_dir, wandb and TensorBoard.

The messages of the training loop are formatted here.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from configurator import UserError
from lyregpt import checkpoint, report, threads
from lyregpt.dataset import Split, bytes_per_token, read_meta
from lyregpt.device import environment, matmul_ceiling, memory_by_part
from lyregpt.report import METRICS, read_sessions
from lyregpt.text import atomic_write
from lyregpt.tokenizer import Tokenizer
from model import GPT

RUN_FILES = (
    *('ckpt.prev.pt', 'ckpt.prev', 'ckpt.pt', 'ckpt', 'best.pt', 'best', 'best.prev'),
    *('metrics.csv', 'train.log', 'config.json', 'run.json', 'tokenizer.json', 'report.html'),
)
COMMANDS = {'train.py': ['python', 'train.py'], 'lyregpt train': ['lyregpt', 'train']}
FINGERPRINT_TOKENS = 1 << 16  # of each validation shard: runs on the same data can be compared
OVERFITTING_EVALS = 3  # evaluations without improvement after which overfitting is pointed out


class Logger:
    """The console and the files of a run, written by the first process; the others log nothing.

    With eval_only, only the console is written. run.json is a list with a dictionary for each time
    that the run was started or resumed: machine, data, memory, and how it ended.
    """

    def __init__(self, config: Any, is_main: bool = True) -> None:
        self.config = config
        self.is_main = is_main
        self.is_open = False
        self.seconds = {'evaluation': 0.0, 'saving': 0.0, 'samples': 0.0}
        self.began = time.perf_counter()
        self.train_seconds = 0.0
        self.first_step_at = 0.0  # when the first step was complete (time.time)
        self.last_log = self.began  # the last evaluation or log line
        self.train_loss = math.nan
        self.pointed_out_overfitting = False
        self.bytes_per_token: float | None = None
        self.tokens_per_step = 0
        self.flops_per_step = 0.0  # of each process
        self.peak_flops = math.inf  # measured peak throughput, FLOP/s
        self.device = torch.device('cpu')
        self.bar = tqdm(disable=True)
        self.wandb: Any = None
        self.board: Any = None

    def open(self, step: int, tokenizer: Tokenizer) -> None:
        """Create the files, or continue them at `step` if the run is resumed.

        Rows that a killed run wrote after its last checkpoint are dropped from metrics.csv: the
        resumed run writes them again. The files of another run are moved to out_dir/earlier. An
        evaluation alone writes no files.
        """
        if self.config.eval_only:
            return
        config, out_dir = self.config, self.config.out_dir
        resumes = config.init_from == 'resume'
        moved = ''
        try:
            os.makedirs(out_dir, exist_ok=True)
            if not resumes:
                moved = archive_run(out_dir)
            path = os.path.join(out_dir, 'metrics.csv')
            start_metrics(path, step if resumes else -1)
            self.metrics = open(path, 'a', encoding='utf-8', newline='')
            mode = 'a' if resumes else 'w'
            self.text = open(os.path.join(out_dir, 'train.log'), mode, encoding='utf-8')
            options = json.dumps(dataclasses.asdict(config), indent=1)
            atomic_write(os.path.join(out_dir, 'config.json'), options.encode())
            tokenizer.save(os.path.join(out_dir, 'tokenizer.json'))
        except OSError as error:
            raise UserError(f'out_dir={out_dir}: cannot be written ({error.strerror})') from None
        self.writer = csv.DictWriter(self.metrics, METRICS)
        self.sessions: list[dict[str, Any]] = [{}]
        if resumes:
            self.sessions = [*read_sessions(out_dir), {}]
        self.is_open = True
        self.start_trackers()
        if moved:
            self.say(f'an earlier run was in {out_dir}: it is in {moved} now')

    def start_trackers(self) -> None:
        """Start wandb and TensorBoard, if they are asked for."""
        config = self.config
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

    # ---------------------------------------------------------------------------------------------
    # The three ways to log: a line, a row of figures, facts about this start

    def say(self, text: str, console: bool = True) -> None:
        """Write a line to the console and train.log. A full disk must not end the training."""
        if not self.is_main:
            return
        if console:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        if self.is_open:
            # ValueError: another thread has just closed the file
            with contextlib.suppress(OSError, ValueError):
                self.text.write(text + '\n')
                self.text.flush()

    def row(self, step: int, **values: Any) -> None:
        """Write a row of metrics.csv; fields without a figure stay empty."""
        if not self.is_open:
            return
        values = {k: v for k, v in values.items() if v is not None}
        short: dict[str, Any] = {'step': step}
        for key, value in values.items():
            short[key] = f'{value:.8g}' if isinstance(value, float) else value
        with contextlib.suppress(OSError):
            self.writer.writerow(short)
            self.metrics.flush()
        if self.wandb:
            self.wandb.log(values, step=step)
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)

    def note(self, **facts: Any) -> None:
        """Put facts about this start of the run into run.json."""
        if not self.is_open:
            return
        self.sessions[-1] |= facts
        content = json.dumps(self.sessions, indent=1).encode()
        with contextlib.suppress(OSError):
            atomic_write(os.path.join(self.config.out_dir, 'run.json'), content)

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Add the time spent in the block to `seconds[activity]`."""
        started = time.perf_counter()
        yield
        self.seconds[activity] += time.perf_counter() - started

    def sync(self) -> None:
        """Have metrics.csv reach the disk."""
        if self.is_open:
            with contextlib.suppress(OSError, ValueError):
                os.fsync(self.metrics.fileno())

    def close(self) -> None:
        """Close the files, and finish the runs of wandb and TensorBoard."""
        self.bar.close()
        if not self.is_open:
            return
        self.is_open = False
        for file in (self.metrics, self.text, self.board):
            if file:
                with contextlib.suppress(OSError):
                    file.close()
        if self.wandb:
            with contextlib.suppress(OSError):
                self.wandb.finish()

    # ---------------------------------------------------------------------------------------------
    # The beginning of a run

    def start(
        self,
        start: Any,
        step: int,
        batches: Any,
        evaluator: Any,
        dtype: torch.dtype,
        compiler: Any,
    ) -> None:
        """Log what is trained, on which data and machine, and where it starts."""
        config, model, val_split = self.config, evaluator.model, evaluator.split
        shape = model.config
        arch = config.arch if config.init_from == 'scratch' else shape.arch
        folder = start.folder
        self.device = start.distributed.device
        self.bytes_per_token = bytes_per_token(folder)
        self.tokens_per_step = batches.tokens_per_step
        self.flops_per_step = (
            batches.tokens_per_step * model.flops_per_token() / start.distributed.size
        )
        self.say(
            f'model: {arch}, {model.num_params():,} parameters, {shape.n_layer} layers, '
            f'{shape.n_head} heads, {shape.n_embd} wide, context {shape.block_size}, '
            f'vocabulary {shape.vocab_size:,}'
        )
        epochs = config.max_iters * self.tokens_per_step / batches.n_tokens
        length = f'all {config.max_iters:,} steps read it {epochs:.1f} times'
        if config.max_minutes:
            length = f'for {config.max_minutes:g} minutes'
        self.say(
            f'data: {folder}, {batches.n_tokens:,} training tokens; a step reads '
            f'{self.tokens_per_step:,}, {length}; validation on {evaluator.n_sequences:,} of '
            f'{val_split.eval_sequences():,} sequences'
        )
        numbers = str(dtype).removeprefix('torch.')
        self.say(f'machine: {self.machine(start, numbers, batches, compiler)}')
        if start.resumes:
            self.resuming(start, step)
        self.peak_flops = matmul_ceiling(self.device, dtype)
        if not self.is_open:
            return
        program = COMMANDS.get(os.path.basename(sys.argv[0]))
        command = shlex.join([*program, *sys.argv[1:]]) if program else ''
        fields = dataclasses.fields(config)
        splits = read_meta(folder).get('splits', {})
        self.note(
            began=time.strftime('%Y-%m-%d %H:%M:%S'),
            command=command,
            from_step=step,
            began_from=start.began_from,
            changed=[f.name for f in fields if getattr(config, f.name) != f.default],
            environment={
                **environment(start.distributed.device),
                'numbers': numbers,
                'model is': 'compiled' if compiler.enabled else 'eager',
                'processes': start.distributed.size,
            },
            model={
                'parameters': model.num_params(),
                'vocabulary': shape.vocab_size,
                'arch': shape.arch,
            },
            data={
                'folder': folder,
                'tokenizer': start.tokenizer.kind,
                'training tokens': batches.n_tokens,
                'tokens a step': self.tokens_per_step,
                'windows at once': batches.micro_batch_size,
                'validation tokens': val_split.n_tokens,
                'validation windows read': evaluator.n_sequences,
                'validation windows': val_split.eval_sequences(),
                'training bytes': splits.get('train', {}).get('bytes'),
                'validation bytes': splits.get('val', {}).get('bytes'),
                'validation fingerprint': fingerprint(val_split),
            },
        )

    def machine(self, start: Any, numbers: str, batches: Any, compiler: Any) -> str:
        """Device, number format, compiler and processes, as one line."""
        device, size = start.distributed.device, start.distributed.size
        parts = [device.type]
        if device.type == 'cuda':
            parts[0] += f' ({torch.cuda.get_device_name(device)})'
        else:
            parts.append(threads.describe_threads())
        parts.append(numbers)
        parts.append('compiled' if compiler.enabled else 'eager')
        if compiler.problem:
            parts[-1] += f' ({compiler.problem})'
        parts.append('1 process' if size == 1 else f'{size} processes')
        if start.fsdp:
            parts[-1] += ' (fsdp)'
        if self.config.batch_size == 'auto':
            parts.append(f'micro-batch size {batches.micro_batch_size}')
        return ', '.join(parts)

    def resuming(self, start: Any, step: int) -> None:
        """Log from where a resumed run continues, and whether there is anything left to do."""
        config = self.config
        line = f'resuming {start.source} at step {step:,}'
        if start.changes:
            line += f', with {start.changes}'
        if not config.max_minutes and step >= config.max_iters:
            line += f'; it has reached max_iters={config.max_iters}: set a larger one to continue'
        self.say(line)

    def begin(self, state: Any, schedule: Any) -> None:
        """Start the progress bar and the clocks."""
        minutes = self.config.max_minutes
        if minutes and schedule.finished:
            self.say(f'the {minutes:g} minutes are used up: set a larger max_minutes to continue')
        self.bar = tqdm(
            total=None if minutes else self.config.max_iters,
            initial=state.step,
            disable=not self.is_main or not sys.stderr.isatty(),
            unit='step',
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self.began = self.last_log = time.perf_counter()

    # ---------------------------------------------------------------------------------------------
    # During the run

    def bits_per_byte(self, loss: float) -> float | None:
        """The loss in bits per byte of text; None if the dataset has no counts of bytes."""
        if not self.bytes_per_token:
            return None
        return loss / self.bytes_per_token / math.log(2)

    def format_loss(self, loss: float) -> str:
        """A validation loss, in both units."""
        bits = self.bits_per_byte(loss)
        return f'{loss:.4f}' if bits is None else f'{loss:.4f}, {bits:.3f} bits per byte'

    def evaluation(self, state: Any, val_loss: float, improved: bool) -> None:
        """Log an evaluation."""
        self.row(
            state.step,
            tokens=state.step * self.tokens_per_step,
            seconds=state.elapsed(),
            val_loss=val_loss,
            val_bpb=self.bits_per_byte(val_loss),
        )
        remark = 'the best so far' if improved else f'best {state.best_val_loss:.4f}'
        self.say(f'step {state.step:,}: validation loss {self.format_loss(val_loss)} ({remark})')
        overfits = state.bad_evals >= OVERFITTING_EVALS and self.train_loss < state.best_val_loss
        if overfits and not self.pointed_out_overfitting:
            self.say(
                f'The validation loss has not improved for {state.bad_evals} evaluations while the '
                f'training loss fell to {self.train_loss:.3f}: the model is overfitting. best.pt '
                'keeps the best weights; more text, more dropout or a smaller model would help.'
            )
            self.pointed_out_overfitting = True

    def sample(self, text: str, originality: Any = None) -> None:
        """Log a sample. The number of lines is given because the text may contain a line '---'."""
        lines = text.count('\n') + 1
        count = '1 line' if lines == 1 else f'{lines} lines'
        remark = f' {originality}' if originality else ''
        self.say(f'--- sample of {count}\n{text}\n---{remark}')

    def step_done(self) -> None:
        """Count a step; `train_seconds` is the time in training steps alone."""
        others = sum(self.seconds.values())
        self.train_seconds = time.perf_counter() - self.began - others
        if not self.first_step_at:
            self.first_step_at = time.time()
        self.bar.update(1)

    def restart_clock(self) -> None:
        """Leave the time until now out of the next line's tokens per second."""
        self.last_log = time.perf_counter()

    def training(
        self, state: Any, losses: torch.Tensor, lr: float, grad_norm: Any, schedule: Any
    ) -> None:
        """Log the mean of the losses (n,) of the last n steps, and the speed since then."""
        now = time.perf_counter()
        seconds = now - self.last_log
        self.last_log = now
        self.train_loss = float(losses.mean())
        if not self.is_main:
            return
        config = self.config
        tokens_per_second = len(losses) * self.tokens_per_step / seconds
        mfu = len(losses) * self.flops_per_step / seconds / self.peak_flops
        self.row(
            state.step,
            tokens=state.step * self.tokens_per_step,
            seconds=state.elapsed(),
            train_loss=self.train_loss,
            lr=lr,
            grad_norm=float(grad_norm) if config.grad_clip else None,
            tokens_per_second=round(tokens_per_second),
            mfu=mfu,
        )
        speed = f'{tokens_per_second:,.0f} tokens/s'
        line = f'loss {self.train_loss:.4f}, lr {lr:.2e}, {speed}'
        if not self.bar.disable:
            self.bar.set_postfix_str(f'loss {self.train_loss:.3f}, {speed}')
            self.say(f'step {state.step:,}: {line}', console=False)
        elif state.step % (10 * config.log_interval) == 0 or state.step <= 10 * config.log_interval:
            total = '' if config.max_minutes else f'/{config.max_iters:,}'
            left = clock(schedule.seconds_left(state, seconds / len(losses)))
            line += f', {100 * mfu:.0f}% of measured peak, {left} left'
            self.say(f'step {state.step:,}{total}: {line}')

    def costs(self, model: GPT, optimizers: Any, step: int, **facts: Any) -> None:
        """Put time and memory into run.json, and other facts with them."""
        if self.is_open:
            memory = memory_by_part(model, optimizers.by_name.values(), self.device)
            seconds = {'training': self.train_seconds, **self.seconds}
            self.note(step=step, seconds=seconds, memory=memory, **facts)

    # ---------------------------------------------------------------------------------------------
    # Trouble, and the end

    def not_saved(self, path: str, step: int, why: str) -> None:
        """Warn that a checkpoint could not be written."""
        self.say(
            f'WARNING: {path} could not be saved at step {step} ({why}); the last good one is '
            'kept. Free some space: saving is tried again.'
        )

    def not_finite(self, what: str, step: int, path: str, kept: int | None) -> str:
        """The message of a run that ends because of a NaN or an infinity at `step`."""
        self.note(end=f'the {what} became NaN or infinite at step {step}')
        last = 'nothing was saved yet'
        if kept is not None:
            last = f'{path} keeps the last good state, of step {kept}'
        return (
            f'the {what} became NaN or infinite at step {step}; {last}. Try a lower learning_rate '
            f'(now {self.config.learning_rate}), more warmup_iters, or dtype=float32'
        )

    def end(self, state: Any, schedule: Any, saver: Any) -> None:
        """Log how the run ended, and write its report."""
        if schedule.stop_reason:
            self.say(f'stopped at step {state.step:,}: {schedule.stop_reason}')
        if schedule.stop_signal:  # and no report: who stops a run may not wait for one
            name = signal.Signals(schedule.stop_signal).name
            self.note(end=f'stopped by {name}')
            self.say(
                f'{name}: saved {saver.latest} at step {state.step:,}; continue with '
                '--init_from=resume'
            )
            return
        end = f'stopped: {schedule.stop_reason}' if schedule.stop_reason else 'done'
        self.costs(saver.model, saver.optimizers, state.step, end=end)
        out_dir = self.config.out_dir
        line = (
            f'done: {state.step:,} steps in {clock(state.elapsed())}, best validation loss '
            f'{state.best_val_loss:.4f}; generate text with: python sample.py --out_dir={out_dir}'
        )
        if self.config.report and self.is_open:
            line += f'; {write_report(out_dir)}'
        self.say(line)


def start_metrics(path: str, step: int) -> None:
    """Write metrics.csv with the rows up to `step` that it holds, complete ones only."""
    kept = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', newline='') as f:
            for row in csv.DictReader(f):
                number = row['step'] or ''
                if number.isdigit() and int(number) <= step and row['mfu'] is not None:
                    kept.append(row)
    with open(path + '.tmp', 'w', encoding='utf-8', newline='') as f:
        writer = csv.DictWriter(f, METRICS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(kept)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def fingerprint(split: Split) -> str:
    """A hash of the beginning of each shard: have two runs the same validation data?"""
    digest = hashlib.sha256()
    for shard in split.shards:
        digest.update(shard.read(0, min(len(shard), FINGERPRINT_TOKENS)).tobytes())
    return digest.hexdigest()[:16]


def write_report(out_dir: str) -> str:
    """Write report.html; returns where it is, or why there is none: a run must not fail by it."""
    try:
        return f'report: {report.write(out_dir)}'
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        return f'no report ({why}); write it with: python -m lyregpt report --out_dir={out_dir}'


def clock(seconds: float) -> str:
    """1:02:03, or 02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours}:{minutes:02d}:{seconds:02d}'
    return f'{minutes:02d}:{seconds:02d}'


def archive_run(out_dir: str) -> str:
    """Move an earlier run's files to out_dir/earlier, or earlier-2 ...; '' if there are none.

    So starting anew by mistake loses nothing. The previous checkpoint goes first and ckpt.pt next:
    killed at any instant, what is left is the complete old run, or nothing to resume.
    """
    existing = [name for name in RUN_FILES if os.path.exists(os.path.join(out_dir, name))]
    if not any(name.startswith(('ckpt', 'best')) for name in existing):
        return ''
    archive = os.path.join(out_dir, 'earlier')
    number = 1
    while os.path.exists(archive):
        number += 1
        archive = os.path.join(out_dir, f'earlier-{number}')
    os.makedirs(archive)
    has_latest = 'ckpt.pt' in existing or 'ckpt' in existing
    for name in existing:
        if '.prev' in name and has_latest:
            checkpoint.remove(os.path.join(out_dir, name))
        else:
            os.rename(os.path.join(out_dir, name), os.path.join(archive, name))
    return archive


def out_of_memory(error: BaseException, config: Any) -> UserError | None:
    """What to do about an error of memory; None if it is another error.

    The CPU's allocator raises a RuntimeError, which only its text tells from others.
    """
    text = str(error)
    phrases = ('not enough memory', 'allocate memory')
    of_memory = isinstance(error, torch.OutOfMemoryError) or any(p in text for p in phrases)
    if not isinstance(error, RuntimeError) or not of_memory:
        return None
    wanted = re.search(r'ried to allocate ([\d.]+ [KMG]?i?B|\d+ bytes)', text)
    line = f'out of memory ({wanted[1]} more wanted): ' if wanted else 'out of memory: '
    if config.batch_size not in ('auto', 1):
        sequences = config.gradient_accumulation_steps * config.batch_size
        line += (
            f'batch_size is {config.batch_size}; --batch_size=auto '
            f'--gradient_accumulation_steps={sequences} takes the same steps with as many '
            'sequences at once as fit; '
        )
    if not config.remat:
        line += '--remat=True needs less for a quarter more time; '
    return UserError(line + 'or use a shorter block_size or a smaller model')
