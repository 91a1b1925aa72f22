"""A run on one page: what it was, how it went, what to try next; and two runs side by side.

    python -m lyregpt report --out_dir=out-darklyrics         (train.py ends with this; here again, or of a run that goes on or was killed)
    python bench.py --compare out-a out-b             (asks `compare`)

report.html is one file without any script that opens, offline too, wherever it is sent. Its curves are matplotlib's SVG, about 0.1 MB in all:
Plotly's interactive ones would bring 4.8 MB of script into each report, and lyregpt/serve.py has those already.
"""

import csv
import html
import io
import json
import math
import os
import re
import shlex
import statistics
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configurator import UserError, configure, run
from lyregpt.text import atomic_write

METRICS = (
    'step',
    'tokens',
    'seconds',
    'train_loss',
    'val_loss',
    'val_bpb',
    'lr',
    'grad_norm',
    'tokens_per_second',
    'mfu',
)
Row = dict[str, float | None]  # of metrics.csv; None: a field without a figure


@dataclass
class Knobs:
    """The knobs; the comment behind each is its help."""

    out_dir: str = 'out'  # the run; its report.html is written there


# -----------------------------------------------------------------------------
# What a run left


@dataclass
class Run:
    """What lies in an out_dir, and the figures drawn from it. A figure that the run did not leave is None."""

    out_dir: str
    rows: list[Row]
    config: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)  # run.json: each start of the run
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.training = [r for r in self.rows if r['train_loss'] is not None]
        self.evaluations = [r for r in self.rows if r['val_loss'] is not None]
        self.best = min(self.evaluations, key=lambda r: r['val_loss'] or 0, default=None)
        self.last = self.rows[-1]
        self.steps = int(self.last['step'] or 0)
        self.tokens = self.last['tokens'] or 0.0

    def fact(self, part: str, name: str = '') -> Any:
        """What the last start of the run says of itself."""
        found = self.sessions[-1].get(part) if self.sessions else None
        return found.get(name) if name and isinstance(found, dict) else found

    def figure(self, part: str, name: str) -> float | None:
        """`fact` as a finite number; None if it is none."""
        return number(self.fact(part, name))

    def median(self, column: str) -> float | None:
        """The median of a column of metrics.csv; None if it is empty."""
        return (
            statistics.median(values)
            if (values := [v for r in self.rows if (v := r[column]) is not None])
            else None
        )

    def seconds(self) -> dict[str, float]:
        """Where the time went, over all starts of the run."""
        found: dict[str, float] = {}
        for session in self.sessions:
            for name, value in (session.get('seconds') or {}).items():
                found[name] = found.get(name, 0.0) + (number(value) or 0.0)
        return found

    def train_at(self, step: float) -> float | None:
        """The training loss around a step: the mean over the tenth of the steps before it."""
        near = [r['train_loss'] for r in self.training if 0.9 * step <= (r['step'] or 0) <= step]
        return statistics.fmean(v for v in near if v is not None) if near else None

    def val_at(self, where: float, axis: str = 'step') -> float | None:
        """The validation loss at a step (or at so many `tokens` or `seconds`), between two evaluations on the straight line."""
        points = [(r[axis] or 0.0, r['val_loss'] or 0.0) for r in self.evaluations]
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            if x0 <= where <= x1:
                return y0 + (y1 - y0) * (where - x0) / max(x1 - x0, 1e-9)
        return points[-1][1] if points and points[-1][0] == where else None


def number(value: Any) -> float | None:
    """A field of metrics.csv or run.json as a finite number; None if it is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def read_rows(out_dir: str) -> list[Row]:
    """The rows of metrics.csv; a row half-written is left out. Raises OSError."""
    with open(
        os.path.join(out_dir, 'metrics.csv'), encoding='utf-8', errors='replace', newline=''
    ) as f:
        lines = (
            line for line in f if len(line) < 10_000 and '\0' not in line
        )  # a power cut may leave zeros
        rows = [
            row
            for row in csv.DictReader(lines)
            if (row.get('step') or '').isdigit() and row.get('mfu') is not None
        ]
    return [{key: number(row.get(key)) for key in METRICS} for row in rows]


def read_samples(out_dir: str, most_bytes: int = 1_000_000) -> list[dict[str, Any]]:
    """The samples in the end of train.log: the step at which each was taken (or None), its text, and what it copies if that was asked for."""
    try:
        with open(os.path.join(out_dir, 'train.log'), 'rb') as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - most_bytes))
            log = f.read().decode('utf-8', 'replace')
    except OSError:
        return []
    found, seen, log = [], 0, log.replace('\r\n', '\n')
    for head in re.finditer(r'^--- sample(?: of (\d{1,6}) lines?)?\n', log, re.MULTILINE):
        lines = (
            f'{{{head[1]}}}' if head[1] else '+?'
        )  # older logs do not tell how many: up to the first line that looks like the end
        sample = re.compile(rf'((?:.*\n){lines})---(?: (.*))?$', re.MULTILINE).match(
            log, head.end()
        )
        if sample and head.start() >= seen:
            steps = re.findall(r'^step ([\d,]+)[:/]', log[seen : head.start()], re.MULTILINE)
            found.append(
                {
                    'step': int(steps[-1].replace(',', '')) if steps else None,
                    'text': sample[1][:-1],
                    'remark': sample[2] or '',
                }
            )
            seen = sample.end()
    return found


def read_sessions(out_dir: str) -> list[dict[str, Any]]:
    """run.json: what each start of the run says of itself; [] for a run that has none, or one that cannot be read."""
    try:
        with open(os.path.join(out_dir, 'run.json'), encoding='utf-8') as f:
            found = json.load(f)
    except (OSError, ValueError):
        return []
    parts = {'environment', 'model', 'data', 'seconds', 'memory'}
    whole = isinstance(found, list) and all(
        isinstance(s, dict) and all(isinstance(s.get(p, {}), dict) for p in parts) for s in found
    )
    return found if whole else []


def read_run(out_dir: str) -> Run:
    """The run in a folder. Raises UserError if there is none, or nothing has happened in it yet."""
    if not os.path.isdir(out_dir):
        raise UserError(f'{out_dir}: no such folder; expected the out_dir of a run of train.py')
    try:
        rows = read_rows(out_dir)
    except OSError as error:
        raise UserError(
            f'{out_dir}: no metrics.csv to tell of ({error.strerror}); train.py writes one, nanoGPT does not'
        ) from None
    if not rows:
        raise UserError(
            f'{out_dir}/metrics.csv: holds no figures yet; a run writes its first after --log_interval steps'
        )
    try:
        with open(os.path.join(out_dir, 'config.json'), encoding='utf-8') as f:
            config = json.load(f)
    except (OSError, ValueError):
        config = {}
    if isinstance(config, dict) and 'label_smoothing' in config:
        raise UserError(
            f'{out_dir}: a run of examples/seq2seq/train_seq2seq.py, an encoder–decoder; only runs of train.py are told of here'
        )
    return Run(
        out_dir,
        rows,
        config if isinstance(config, dict) else {},
        read_sessions(out_dir),
        read_samples(out_dir),
    )


# -----------------------------------------------------------------------------
# What to try next

Hint = tuple[str, str]  # what the figures show, what to try


def advice(run: Run) -> list[Hint]:
    """What the run's figures point to, and what to try, the weightiest first; [] if they point to nothing."""
    if found := trouble(run):  # what else its losses seem to say is worth nothing
        return found + upkeep(run)
    shape, hints = verdict(run)
    return hints + size_and_words(run, shape) + upkeep(run)


def command(run: Run) -> str:
    """What makes the same run anew in another folder; the hints' knobs go behind it."""
    words = ['python', 'train.py', f'{run.out_dir}/config.json', f'--out_dir={run.out_dir}-next']
    if run.config.get('init_from') == 'resume':
        words.append(f'--init_from={run.fact("began_from") if is_tuned(run) else "scratch"}')
    return shlex.join(words)


def knobs(**values: Any) -> str:
    """Knobs as they are typed, marked as code."""
    return (
        '`'
        + ' '.join(
            f'--{name}={value:.4g}' if isinstance(value, float) else f'--{name}={value}'
            for name, value in values.items()
        )
        + '`'
    )


def knob(run: Run, name: str, default: float = 0.0) -> float:
    """A number among the run's knobs, or `default`."""
    return default if (value := number(run.config.get(name))) is None else value


def known(run: Run, *names: str) -> bool:
    """Are these knobs told, as numbers? What is to be changed must be known."""
    return all(number(run.config.get(name)) is not None for name in names)


def goes_on(run: Run) -> str:
    """What to do with a run that has not come to its end; '' if it has."""
    end, most = run.fact('end'), knob(run, 'max_iters')
    if (
        not str(end).startswith('stopped by ') if end else not run.sessions and run.steps >= most
    ):  # a run that is killed tells no end
        return ''
    resume = shlex.join(['python', 'train.py', f'--out_dir={run.out_dir}', '--init_from=resume'])
    so_far = (
        f' ({run.steps:,} of {most:,.0f} steps)' if most and not knob(run, 'max_minutes') else ''
    )
    return f'It has not come to its end{so_far}: let it go on; if it was stopped, this resumes it: `{resume}`.'


def is_tuned(run: Run) -> bool:
    """Did it begin from weights that had been trained before?"""
    return (run.fact('began_from') or run.config.get('init_from')) not in (
        'scratch',
        'resume',
        None,
    )


def trouble(run: Run) -> list[Hint]:
    """Is the learning rate too high? NaN; jumps of the loss; gradients far longer than what is let through."""
    clip, rate, end = knob(run, 'grad_clip'), knob(run, 'learning_rate'), str(run.fact('end') or '')
    losses = [(int(r['step'] or 0), r['train_loss'] or 0.0) for r in run.training]
    before = [
        statistics.median([loss for _, loss in losses[max(0, i - 5) : i]] or [math.inf])
        for i in range(len(losses))
    ]
    jumps = [
        (step, was, loss)
        for (step, loss), was in zip(losses, before)
        if loss > max(1.15 * was, was + 0.3)
    ]
    norms = [
        n
        for r in run.training
        if (n := r['grad_norm']) is not None and (r['step'] or 0) > knob(run, 'warmup_iters')
    ]
    clipped = sum(n > 3 * clip for n in norms) / len(norms) if norms and clip else 0.0
    shows = [f'{end[0].upper()}{end[1:]}.'] if 'NaN' in end else []
    if len(jumps) > 1:
        step, was, loss = max(jumps, key=lambda jump: jump[2] - jump[1])
        shows.append(
            f'The training loss jumped {len(jumps)} times, the most at step {step:,}, from {was:.2f} to {loss:.2f}.'
        )
    if clipped > 0.5:
        shows.append(
            f'After the warm-up the gradient was more than 3 times longer than grad_clip={clip:g} in {clipped:.0%} of the log lines.'
        )
    return (
        [(' '.join(shows), f'A lower learning rate: {knobs(learning_rate=rate / 3)}.')]
        if shows and rate
        else []
    )


def verdict(run: Run) -> tuple[str, list[Hint]]:
    """What the two losses say of each other: ('by heart', 'too short', 'too small' or '', hints).

    They are looked at at the end, over the last third of the steps, and over the last doubling of the steps.
    """
    steps, val, train = (
        run.steps,
        run.evaluations[-1]['val_loss'] if run.evaluations else None,
        run.train_at(run.steps),
    )
    if len(run.evaluations) < 3:
        shows = f'{len(run.evaluations)} evaluation{"s" * (len(run.evaluations) != 1)}: too few to see whether it learns more than its text by heart.'
        often = max(1, steps // 10)
        way = goes_on(run) or (
            f'Evaluate more often: {knobs(eval_interval=often)}.'
            if often != knob(run, 'eval_interval')
            else ''
        )
        return '', [(shows, way)] if way else []
    if val is None or train is None or not run.best:
        return '', []
    at, low, third = int(run.best['step'] or 0), run.best['val_loss'] or 0.0, 2 * steps / 3
    val_fell, train_fell = (run.val_at(third) or val) - val, (run.train_at(third) or train) - train
    half = run.val_at(steps / 2)
    doubling = val if half is None else half - val
    if (
        (rose := val > 1.01 * low and val > train < (run.train_at(at) or 0))
        or val - train > 0.05 * val
        and val_fell < 0.2 * train_fell > 0.004 * train
    ):
        shows = (
            f'The validation loss was lowest at step {at:,} ({low:.3f}) and rose to {val:.3f} at step {steps:,}, while the training loss fell from '
            f'{run.train_at(at):.3f} to {train:.3f}: it learns its text by heart (overfitting). best.pt keeps the weights of step {at:,}.'
            if rose
            else f'Over the last third of the steps the training loss fell by {train_fell:.3f} to {train:.3f}, the validation loss by '
            f'{max(0.0, val_fell):.3f} to {val:.3f}: what it still learns, it learns by heart (overfitting begins).'
        )
        ways = ['More words']
        if known(run, 'dropout') and (dropout := knob(run, 'dropout')) < 0.5:
            ways.append(f'dropout, {knobs(dropout=min(0.5, dropout + 0.1))}')
        if not 0 < knob(run, 'patience') <= 3:
            ways.append(f'a stop in time, {knobs(patience=3)}')
        if not is_tuned(run) and knob(run, 'n_layer') > 1:
            ways.append(f'a smaller model, {knobs(n_layer=int(knob(run, "n_layer")) // 2)}')
        return 'by heart', [(shows, '; or '.join(ways) + '.')]
    first = run.training[0]['train_loss'] or 0.0
    if doubling > min(
        0.02 * val, 0.2 * (first - train)
    ):  # the second, because a slow run has not fallen far
        shows = f'The validation loss still falls: the last doubling of the steps, to {steps:,}, brought {doubling:.3f} ({val + doubling:.3f} to {val:.3f}).'
        if rest := goes_on(run):
            return 'too short', [(shows, rest)]
        if str(run.fact('end')).startswith(
            'stopped:'
        ):  # by what it was asked to stop at, not for want of steps
            return 'too short', []
        minutes = knob(run, 'max_minutes')
        longer = {'max_minutes': 2 * minutes} if minutes else {'max_iters': 2 * steps}
        if not minutes and run.config.get('lr_decay_iters') is not None:
            longer['lr_decay_iters'] = 2 * steps
        way = f'It was too short: train longer, {knobs(**longer)}'
        if (middle := run.train_at(steps / 2)) and middle - train > 0.5 * (first - middle):
            shows += f' The training loss fell by {first - middle:.2f} in the first half and by {middle - train:.2f} in the second: it learns slowly.'
            way += (
                f'; or faster, {knobs(learning_rate=3 * rate)}'
                if (rate := knob(run, 'learning_rate'))
                else ''
            )
        return 'too short', [(shows, way + '.')]
    if abs(val - train) < 0.03 * val and half is not None:
        shows = (
            f'Both losses hardly move any more, close together (training {train:.3f}, validation {val:.3f}); the last doubling of the steps brought '
            f'{doubling:.3f}: the model holds what it can hold (it is too small).'
        )
        wider = {
            name: 2 * int(knob(run, name))
            for name in ('n_head', 'n_embd')
            if known(run, 'n_head', 'n_embd')
        }
        return 'too small', [
            (
                shows,
                'Begin from a larger model.'
                if is_tuned(run)
                else f'A larger model{f": {knobs(**wider)}" if wider else ""}.',
            )
        ]
    return '', []


def size_and_words(run: Run, shape: str) -> list[Hint]:
    """Is there enough text for this size? About 20 tokens a parameter spend a budget of computing best (Hoffmann et al. 2022,
    arXiv:2203.15556), and up to 4 readings teach nearly as much as new words (Muennighoff et al. 2023, arXiv:2305.16264)."""
    parameters, words = run.figure('model', 'parameters'), run.figure('data', 'training tokens')
    if not parameters or not words or not run.tokens or is_tuned(run):
        return []
    wanted, epochs, each = 20 * parameters, run.tokens / words, run.tokens / parameters
    if (epochs > 4 or wanted > 4 * words) and each < 20 and shape != 'too small':
        shows = f'It read its {words:,.0f} tokens {epochs:.1f} times, {each:.2g} tokens a parameter. About 20 a parameter are best (Hoffmann et al. 2022), '
        shows += 'and up to 4 readings count nearly as new words (Muennighoff et al. 2023).'
        return [
            (
                shows,
                f'More words: {wanted / 4:,.0f} tokens would suit {parameters:,.0f} parameters.',
            )
        ]
    if (
        each < 10
        and shape != 'by heart'
        and not run.config.get('max_minutes')
        and run.fact('end') in ('done', None)
        and not goes_on(run)
    ):
        shows = f'It read {each:.2g} tokens a parameter; about 20 are best for a budget of computing (Hoffmann et al. 2022).'
        return [
            (shows, f'More steps: {knobs(max_iters=math.ceil(wanted / run.tokens * run.steps))}.')
        ]
    return []


def upkeep(run: Run) -> list[Hint]:
    """Is there enough to judge by, and is the machine put to use?"""
    found: list[Hint] = []
    read, windows, held = (
        run.figure('data', f'validation {name}') for name in ('windows read', 'windows', 'tokens')
    )
    if read and windows and held and (judged := held * read / windows) < 10_000:
        way = (
            f'Read all of it: {knobs(eval_iters=None)}.'
            if read < windows
            else 'Prepare the dataset with a larger --val_fraction.'
        )
        found.append(
            (
                f'The validation loss is the mean over {judged:,.0f} tokens; below 10,000, differences of a percent may be chance.',
                way,
            )
        )
    seconds, mfu = run.seconds(), run.median('mfu')
    total = sum(seconds.values())
    if total > 60 and seconds.get('evaluation', 0.0) > 0.2 * total:
        way = (
            f': {knobs(eval_interval=2 * int(knob(run, "eval_interval")))}'
            if known(run, 'eval_interval')
            else ''
        )
        found.append(
            (
                f'{seconds["evaluation"] / total:.0%} of the time went into evaluations.',
                f'Evaluate less often{way}.',
            )
        )
    if total > 60 and mfu is not None and mfu < 0.15:
        at_once, windows = (
            run.figure('data', 'windows at once'),
            knob(run, 'batch_size') * knob(run, 'gradient_accumulation_steps'),
        )
        ways = (
            []
            if run.fact('environment', 'model is') == 'compiled'
            or run.config.get('compile') is True
            else [knobs(compile=True)]
        )
        if (
            at_once and at_once < windows
        ):  # batch_size='auto' is no number: as many as fit are read at once already
            ways.append(knobs(batch_size='auto', gradient_accumulation_steps=int(windows)))
        if ways:
            found.append(
                (
                    f'The machine did {mfu:.0%} of what a large matrix product does on it.',
                    f'Try {" or ".join(ways)}.',
                )
            )
    return found


# -----------------------------------------------------------------------------
# The page

TONES = {
    '#010101': 'currentColor',
    '#010102': 'var(--train)',
    '#010103': 'var(--val)',
}  # drawn as: shown as, in light and dark
INK, TRAIN, VAL = TONES


def charts(run: Run) -> list[tuple[str, str, str]]:
    """(title, the same in words, SVG) of each curve that the run left figures for."""
    ratio = (
        run.best
        and run.best['val_bpb']
        and run.best['val_loss']
        and run.best['val_bpb'] / run.best['val_loss']
    )
    speed, mfu, clip = run.median('tokens_per_second'), run.median('mfu'), knob(run, 'grad_clip')
    share = 100 * mfu / speed if mfu and speed else 0.0
    found = [
        draw(
            'Loss',
            {'train_loss': TRAIN, 'val_loss': VAL},
            run,
            right=('bits per byte', ratio or 0.0),
        )
    ]
    found.append(draw('Learning rate', {'lr': TRAIN}, run))
    found.append(draw('Gradient norm', {'grad_norm': TRAIN}, run, log=True, level=clip))
    found.append(
        draw(
            'Tokens per second',
            {'tokens_per_second': TRAIN},
            run,
            right=('% of the ceiling', share),
            zero=True,
        )
    )
    return [chart for chart in found if chart[2]]


def draw(
    title: str,
    lines: dict[str, str],
    run: Run,
    right: tuple[str, float] = ('', 0.0),
    log: bool = False,
    zero: bool = False,
    level: float = 0.0,
) -> tuple[str, str, str]:
    """One chart over the steps. `right`: what the same figures are called on the other side, and how much that is of 1. `level`: a dashed line."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = {
        name: [(r['step'] or 0.0, v) for r in run.rows if (v := r[name]) is not None]
        for name in lines
    }
    points = {name: values for name, values in points.items() if values}
    if not points:
        return title, '', ''
    words = [
        f'{name.replace("_", " ")} from {v[0][1]:.4g} to {v[-1][1]:.4g}, lowest {min(y for _, y in v):.4g}'
        for name, v in points.items()
    ]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what someone's matplotlibrc says
        look: dict[Any, Any] = {
            'svg.fonttype': 'none',
            'svg.hashsalt': title,
            'font.size': 9,
            'axes.formatter.limits': (-5, 8),
        }
        matplotlib.rcParams.update(
            look
            | dict.fromkeys(
                ('axes.edgecolor', 'axes.labelcolor', 'text.color', 'xtick.color', 'ytick.color'),
                INK,
            )
        )
        figure = Figure(figsize=(4.4, 2.6))
        axes = figure.add_axes((0.13, 0.16, 0.74, 0.8))
        for name, values in points.items():
            every = -(-len(values) // 400)  # of a long run the means of a few rows each
            parts = (
                [values[i : i + every] for i in range(0, len(values), every)]
                if name == 'train_loss'
                else [[v] for v in values[::-every][::-1]]
            )
            x, y = zip(*((part[-1][0], statistics.fmean(v for _, v in part)) for part in parts))
            dots = 'o' if name == 'val_loss' and len(x) < 60 else ''
            axes.plot(
                x,
                y,
                color=lines[name],
                linewidth=1.8 if name == 'val_loss' else 1.2,
                marker=dots,
                markersize=3.5,
            )
        if level:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle='--', alpha=0.6)
        if log and all(v > 0 for _, v in points[next(iter(points))]):
            axes.set_yscale('log')
            axes.yaxis.set_major_formatter('{x:g}')
            axes.yaxis.set_minor_formatter(
                matplotlib.ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5))
            )
        if zero:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter('{x:,.0f}')
        if right[1]:
            other = axes.secondary_yaxis(
                'right',
                functions=(lambda v: np.multiply(v, right[1]), lambda v: np.divide(v, right[1])),
            )
            other.set_ylabel(right[0])
            other.spines[:].set_visible(False)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.spines[['top', 'right']].set_visible(False)
        axes.xaxis.set_major_locator(
            matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 5, 10], integer=True)
        )
        axes.xaxis.set_major_formatter('{x:,.0f}')
        axes.set_xlabel('steps')
        out = io.StringIO()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(
            out, metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
        )
    svg = re.sub(
        r' (width|height)="[\d.]+pt"', '', out.getvalue()[out.getvalue().index('<svg') :], count=2
    )
    for drawn, shown in TONES.items():
        svg = svg.replace(drawn, shown)
    return (
        title,
        f'{title} over {run.steps:,} steps: {"; ".join(words)}',
        svg.replace("'DejaVu Sans', ", ''),
    )


PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --paper: #faf7f2; --card: #fffefb; --ink: #26221d; --dim: #6a6258; --line: #ded6c9; --train: #14708f; --val: #a02c48; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17151a; --card: #201d24; --ink: #ebe6df; --dim: #aaa2a0; --line: #3a3540; --train: #62c3e6; --val: #f28a9c; }
}
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --dim: #444; --line: #ccc; --train: #14708f; --val: #a02c48; color-scheme: light; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; overflow-wrap: anywhere; }
h1, h2 { font: 600 1.2rem/1.3 "Iowan Old Style", Palatino, Charter, Georgia, "Liberation Serif", serif; margin: 1.6rem 0 .5rem; }
h1 { font-size: 1.7rem; margin-top: 0; }
p { max-width: 46rem; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); align-items: start; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; min-width: 0; break-inside: avoid; }
figcaption { font-weight: 600; }
figcaption i { display: inline-block; width: 1.2rem; height: 4px; border-radius: 2px; margin: 0 .3rem 0 .7rem; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
.figures { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin-top: .8rem; }
.figures b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
dt, small, .figures, th { color: var(--dim); font-weight: 400; }
.figures b { color: var(--ink); }
.hint { margin-bottom: .6rem; border-left: 3px solid var(--val); padding-left: .8rem; }
.hint p:last-child { color: var(--dim); }
pre { overflow-x: auto; }
code, .text { font: .86rem/1.5 ui-monospace, "Liberation Mono", monospace; }
.text { font: 1rem/1.5 "Iowan Old Style", Palatino, Charter, Georgia, "Liberation Serif", serif; white-space: pre-wrap; max-height: 24rem; overflow-y: auto; }
@media print { .text { max-height: none; } details::details-content { content-visibility: visible; } }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .12rem 1rem .12rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { overflow-wrap: normal; }
.numbers { overflow-x: auto; }
.numbers td, .numbers th { text-align: right; overflow-wrap: normal; white-space: nowrap; }
summary { cursor: pointer; line-height: 2.4rem; color: var(--dim); }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def esc(value: Any) -> str:
    """Text as HTML."""
    return html.escape(str(value))


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = (), numbers: bool = False) -> str:
    """An HTML table of what is not HTML yet; without `head` each row's first cell is its heading."""
    top = (
        f'<thead><tr>{"".join(f"<th scope=col>{esc(h)}</th>" for h in head)}</tr></thead>'
        if head
        else ''
    )
    first = 'td' if head else 'th scope=row'
    body = ''.join(
        f'<tr><{first}>{esc(row[0])}</{first[:2]}>{"".join(f"<td>{esc(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div{" class=numbers" * numbers}><table>{top}<tbody>{body}</tbody></table></div>'


def in_words(text: str) -> str:
    """A hint as HTML."""
    return re.sub(r'`([^`]*)`', r'<code>\1</code>', esc(text))


def clock(seconds: float | None) -> str:
    """Seconds as seconds, minutes or hours; a dash for none."""
    if seconds is None:
        return '–'
    return (
        f'{seconds:.1f} s'
        if seconds < 60
        else f'{seconds / 60:.1f} minutes'
        if seconds < 7200
        else f'{seconds / 3600:.1f} hours'
    )


def shown(value: float | None, form: str = ',.0f') -> str:
    """A number as text; a dash for none."""
    return '–' if value is None else format(value, form)


def summary(run: Run) -> str:
    """The run in a few sentences."""
    parameters, words, end = (
        run.figure('model', 'parameters'),
        run.figure('data', 'training tokens'),
        run.fact('end'),
    )
    text = f'A GPT of {parameters:,.0f} parameters' if parameters else 'A GPT'
    text += f' read {run.tokens:,.0f} tokens of {run.config.get("dataset", "its data")} in {run.steps:,} steps and {clock(run.last["seconds"])}'
    text += (
        f' ({run.tokens / words:.1f} times the {words:,.0f} that there are). ' if words else '. '
    )
    if run.best and run.best['val_loss'] is not None:
        loss, bits = run.best['val_loss'], run.best['val_bpb']
        text += f'Its lowest validation loss is {loss:.4f} nats a token' + (
            f', {bits:.3f} bits per byte' if bits else ''
        )
        text += f', at step {run.best["step"]:,.0f}: before each token it wavers as if among {math.exp(min(loss, 50)):,.0f} equally likely ones (perplexity). '
    if end == 'done':
        return text + 'It came to its end.'
    return text + (
        f'Its end: {end}.'
        if end
        else 'It has not come to its end: it still goes on, or was killed.'
        if run.sessions
        else ''
    )


def page(run: Run) -> str:
    """The report as HTML."""
    out, best = (
        [
            f'<h1>{esc(os.path.basename(os.path.abspath(run.out_dir)))}</h1><p>{esc(summary(run))}</p>'
        ],
        run.best or {},
    )
    memory = {name: number(value) for name, value in (run.fact('memory') or {}).items()}
    figures = [('validation loss', shown(best.get('val_loss'), '.4f')), ('bits per byte', shown(best.get('val_bpb'), '.3f')), ('steps', f'{run.steps:,}'),
               ('time', clock(run.last['seconds'])), ('tokens/s', shown(run.median('tokens_per_second')))]  # fmt: skip
    figures += [('peak memory', f'{peak:,.0f} MB')] if (peak := memory.get('peak')) else []
    out.append(
        f'<div class=figures>{"".join(f"<div><b>{esc(value)}</b>{name}</div>" for name, value in figures)}</div>'
    )

    hints = advice(run)
    out.append('<h2>What to try next</h2>')
    out += [
        f'<div class=hint><p>{in_words(shows)}</p><p>{in_words(way)}</p></div>'
        for shows, way in hints
    ]
    out.append(
        f'<p>To try one, put its knobs behind this:</p><pre><code>{esc(command(run))}</code></pre>'
        if any('`--' in way for _, way in hints)
        else ''
    )
    out.append(
        ''
        if hints
        else '<p>These figures point to no fault: it neither learns by heart nor stands still, and the machine was put to use.</p>'
    )

    out.append('<h2>Curves</h2><div class=grid>')
    for title, words, svg in charts(run):
        legend = (
            ' <i style="background: var(--train)"></i>training <i style="background: var(--val)"></i>validation'
            if title == 'Loss'
            else ''
        )
        out.append(
            f'<figure role=img aria-label="{esc(words)}"><figcaption>{title}{legend}</figcaption>{svg}</figure>'
        )
    every = -(-len(run.evaluations) // 40) or 1
    rows = [
        (
            shown(r['step']),
            shown(r['tokens']),
            clock(r['seconds']),
            shown(run.train_at(r['step'] or 0), '.4f'),
        )
        + (shown(r['val_loss'], '.4f'), shown(r['val_bpb'], '.3f'))
        for r in run.evaluations[::-every][::-1]
    ]
    head = ('step', 'tokens', 'time', 'training loss', 'validation loss', 'bits per byte')
    out.append(
        f'</div><details><summary>The evaluations in figures</summary>{table(rows, head, numbers=True)}</details>'
        if rows
        else '</div>'
    )

    out.append('<h2>Samples over time</h2>')
    last = {s['step']: s for s in run.samples}  # a resumed run may have taken one twice
    kept = (
        list(last.values())
        if len(last) <= 6
        else [list(last.values())[i * (len(last) - 1) // 5] for i in range(6)]
    )
    cards = ''
    for sample in kept:
        name = ', '.join(
            filter(None, (f'step {sample["step"]:,}' if sample['step'] else '', sample['remark']))
        )
        cards += f'<div class=card><small>{esc(name)}</small><div class=text tabindex=0>{esc(sample["text"].strip())}</div></div>'
    none = f'<p>None were taken (sample_interval is 0); <code>python sample.py --out_dir={esc(run.out_dir)}</code> writes with the model.</p>'
    out.append(f'<div class="grid three">{cards}</div>' if cards else none)

    mfu, seconds = run.median('mfu'), run.seconds()
    facts = [
        (
            'median speed',
            f'{shown(run.median("tokens_per_second"))} tokens/s'
            + (f', {mfu:.0%} of what a large matrix product does here' if mfu else ''),
        )
    ]
    facts += [
        (name, f'{clock(value)} ({value / (sum(seconds.values()) or 1):.0%})')
        for name, value in seconds.items()
        if value
    ]
    facts += [(f'memory: {name}', f'{value:,.1f} MB') for name, value in memory.items() if value]
    data = [('dataset', run.config.get('dataset', '–'))] + list((run.fact('data') or {}).items())
    words_ = run.figure('data', 'training tokens')
    data += [('times read', f'{run.tokens / words_:.2f}')] if words_ else []
    place = list((run.fact('environment') or {}).items())
    place += [('command', run.fact('command'))] if run.fact('command') else []
    place += (
        [
            (
                'begun',
                ', '.join(f'{s.get("began")} at step {s.get("from_step")}' for s in run.sessions),
            )
        ]
        if run.sessions
        else []
    )
    absent = [('', 'not recorded by this run')]
    for title, found in (
        ('Speed and memory', facts),
        ('Data', data),
        ('Environment', place or absent),
    ):
        cells = [
            (
                name,
                f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value,
            )
            for name, value in found
            if value is not None
        ]
        out.append(
            f'{"<div class=grid>" if title == "Speed and memory" else ""}<section><h2>{title}</h2>{table(cells)}</section>'
        )
    changed = run.fact('changed') if isinstance(run.fact('changed'), list) else list(run.config)
    out.append(
        f'<section><h2>Settings</h2>{table([(k, v) for k, v in run.config.items() if k in changed])}'
    )
    rest = [(k, v) for k, v in run.config.items() if k not in changed]
    out.append(
        f'<details><summary>All others, which have their defaults</summary>{table(rest)}</details>'
        if rest
        else ''
    )
    out.append(
        f"</section></div><p><small>Written {time.strftime('%Y-%m-%d %H:%M')} by lyreGPT's lyregpt/report.py.</small></p>"
    )
    return PAGE.substitute(title=esc(f'{run.out_dir}: a run'), body='\n'.join(out))


def write(out_dir: str) -> str:
    """Write out_dir/report.html, whole or not at all; returns its path. Raises UserError if there is nothing to tell, OSError if it cannot be written."""
    path = os.path.join(out_dir, 'report.html')
    try:
        atomic_write(path, page(read_run(out_dir)).encode('utf-8', 'replace'))
    except ImportError as error:
        raise UserError(
            f'{path}: {error.name} is not installed: pip install -r requirements.txt'
        ) from None
    return path


# -----------------------------------------------------------------------------
# Two side by side


def compare(a: Run, b: Run) -> tuple[list[tuple[str, str, str]], list[str]]:
    """([(figure, of a, of b)], what must be known to read them): settings that differ, then what came of them."""
    names = [
        k
        for k in a.config | b.config
        if k not in ('out_dir', 'init_from') and a.config.get(k) != b.config.get(k)
    ]
    rows = [(name, str(a.config.get(name, '–')), str(b.config.get(name, '–'))) for name in names]
    remarks, both = [], (a, b)

    def line(name: str, form: str, values: Sequence[float | None]) -> None:
        if any(v is not None for v in values):
            rows.append((name, shown(values[0], form), shown(values[1], form)))

    def same(name: str) -> bool | None:
        values = [run.fact('data', name) for run in both]
        return None if None in values else values[0] == values[1]

    tokenizers = [read_bytes(os.path.join(run.out_dir, 'tokenizer.json')) for run in both]
    losses = bits = True
    if tokenizers[0] != tokenizers[1]:
        losses, bits = False, bool(same('validation bytes') and all(map(whole_split, both)))
        then = (
            'bits per byte do (their validation texts have as many bytes).'
            if bits
            else 'and nothing tells that their validation texts are the same.'
        )
        remarks.append(f'Their tokenizers differ, so losses per token do not compare; {then}')
    elif same('validation fingerprint') is False or same('validation tokens') is False:
        losses = bits = False
        remarks.append(
            'Their validation data differ: no loss of the one compares with one of the other.'
        )
    elif same('validation windows read') is False and not all(map(whole_split, both)):
        losses = bits = False
        remarks.append(
            'They were evaluated on different parts of the validation split (eval_iters): their losses do not compare.'
        )
    elif same('validation fingerprint') is None:
        remarks.append(
            'A run of before run.json does not tell its validation data: they are taken to be the same.'
        )

    best: list[Row] = [run.best or {} for run in both]
    line('parameters', ',.0f', [run.figure('model', 'parameters') for run in both])
    line('steps', ',.0f', [run.last['step'] for run in both])
    line('tokens read', ',.0f', [run.tokens for run in both])
    if losses:
        line('best validation loss', '.4f', [row.get('val_loss') for row in best])
        line('at step', ',.0f', [row.get('step') for row in best])
    if bits:
        line('best bits per byte', '.4f', [row.get('val_bpb') for row in best])
    for axis, form in ('tokens', ',.0f'), ('seconds', ',.1f'):
        where = min(run.evaluations[-1][axis] or 0.0 if run.evaluations else 0.0 for run in both)
        values = [run.val_at(where, axis) for run in both]
        if losses and None not in values:
            line(f'validation loss after {where:{form}} {axis}', '.4f', values)
    if losses and a.tokens != b.tokens:
        remarks.append(
            "At equal tokens or seconds the longer run's learning rate had not come down yet. Between evaluations a straight line is assumed."
        )
    line('last training loss', '.4f', [run.train_at(run.steps) if losses else None for run in both])
    line('tokens/s (median)', ',.0f', [run.median('tokens_per_second') for run in both])
    line('share of the ceiling', '.0%', [run.median('mfu') for run in both])
    line('seconds in all', ',.1f', [run.last['seconds'] for run in both])
    line('peak memory, MB', ',.0f', [run.figure('memory', 'peak') for run in both])
    machines = [run.fact('environment') or {} for run in both]
    rows += [
        (name, str(ours), str(theirs))
        for name, ours in machines[0].items()
        if (theirs := machines[1].get(name, ours)) != ours
    ]
    return rows, remarks


def whole_split(run: Run) -> bool:
    """Was the whole validation split read?"""
    return run.fact('data', 'validation windows read') == run.fact('data', 'validation windows')


def read_bytes(path: str) -> bytes:
    """The bytes of a file; none if it cannot be read."""
    try:
        with open(path, 'rb') as f:
            return f.read()
    except OSError:
        return b''


def main() -> None:
    """Write the report of a run."""
    print(write(configure(Knobs, description="Write a run's report.html.").out_dir))


if __name__ == '__main__':
    run(main)
