"""The report of a training run (report.html), and the comparison of two runs.

    python -m lyregpt report --out_dir=out-darklyrics    (train.py writes it when a run is done)
    python bench.py --compare out-a out-b

report.html is one file without scripts or requests, made from the template report_page.html. Its
curves are matplotlib's SVG, about 0.1 MB in all: Plotly's would add 4.8 MB of script to each
report, and the server's page (lyregpt/serve.py) has those already.
"""

import csv
import io
import json
import math
import os
import re
import shlex
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configurator import UserError, configure
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
Row = dict[str, Any]  # a row of metrics.csv: float, or None where the field is empty
Hint = tuple[str, str]  # what the figures show, what to try


@dataclass
class ReportConfig:
    """The options; the comment behind each is its help."""

    out_dir: str = 'out'  # the run; its report.html is written there


# -----------------------------------------------------------------------------
# The files of a run


@dataclass
class Run:
    """The files in an out_dir and figures computed from them; None for a figure that is missing."""

    out_dir: str
    rows: list[Row]
    config: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)  # run.json: each start of the run
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.evaluations = [row for row in self.rows if row['val_loss'] is not None]
        self.best: Row = min(self.evaluations, key=lambda row: row['val_loss'], default={})
        self.last = self.rows[-1]
        self.steps, self.tokens = int(self.last['step']), self.last['tokens'] or 0.0
        self.facts: dict[str, Any] = (self.sessions or [{}])[-1]  # of the last start of the run
        began_from = self.facts.get('began_from') or self.config.get('init_from')
        self.is_finetuned = began_from not in ('scratch', 'resume', None)

    def figure(self, part: str, name: str) -> float | None:
        """A finite number of a part of `facts`, or None."""
        return number(self.facts.get(part, {}).get(name))

    def option(self, name: str) -> float:
        """A numeric option of the run, 0 if it is not known."""
        return number(self.config.get(name)) or 0.0

    def points(self, column: str) -> list[tuple[float, float]]:
        """(step, value) of each row with a value in this column."""
        return [(row['step'], row[column]) for row in self.rows if row[column] is not None]

    def median(self, column: str) -> float | None:
        """The median of a column of metrics.csv; None if it is empty."""
        values = [value for _, value in self.points(column)]
        return statistics.median(values) if values else None

    def seconds(self) -> dict[str, float]:
        """The time spent on each activity, over all starts of the run."""
        parts = [part for session in self.sessions for part in session.get('seconds', {}).items()]
        return {
            name: sum(number(value) or 0.0 for other, value in parts if other == name)
            for name, _ in parts
        }

    def train_at(self, step: float) -> float | None:
        """The training loss around a step: the mean over the 10% of the steps up to it."""
        near = [loss for at, loss in self.points('train_loss') if 0.9 * step <= at <= step]
        return statistics.fmean(near) if near else None

    def val_at(self, position: float, axis: str = 'step') -> float | None:
        """The validation loss at a step, or after so many `tokens` or `seconds`.

        Interpolated linearly between evaluations; None outside their range.
        """
        positions = [row[axis] or 0.0 for row in self.evaluations]
        if not positions or not positions[0] <= position <= positions[-1]:
            return None
        return float(np.interp(position, positions, [row['val_loss'] for row in self.evaluations]))


def number(value: Any) -> float | None:
    """A field of metrics.csv or run.json as a finite number, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def read_rows(out_dir: str) -> list[Row]:
    """The rows of metrics.csv, without one that is only partly written. Raises OSError."""
    path = os.path.join(out_dir, 'metrics.csv')
    with open(path, encoding='utf-8', errors='replace', newline='') as f:
        # A power failure can leave a long line of zero bytes.
        lines = (line for line in f if len(line) < 10_000 and '\0' not in line)
        return [
            {key: number(row.get(key)) for key in METRICS}
            for row in csv.DictReader(lines)
            if (row.get('step') or '').isdigit() and row.get('mfu') is not None
        ]


def read_samples(out_dir: str, most_bytes: int = 1_000_000) -> list[dict[str, Any]]:
    """The samples in the last `most_bytes` of train.log: step (or None), text and remark of each.

    The remark says how original the sample is, if the run was asked for that.
    """
    try:
        with open(os.path.join(out_dir, 'train.log'), 'rb') as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - most_bytes))
            log = f.read().decode('utf-8', 'replace').replace('\r\n', '\n')
    except OSError:
        return []
    samples, end = [], 0
    for start in re.finditer(r'^--- sample(?: of (\d{1,6}) lines?)?\n', log, re.MULTILINE):
        # Older logs do not give the number of lines: up to the first that looks like the end.
        lines = f'{{{start[1]}}}' if start[1] else '+?'
        pattern = re.compile(rf'((?:.*\n){lines})---(?: (.*))?$', re.MULTILINE)
        sample = pattern.match(log, start.end())
        if sample and start.start() >= end:
            steps = re.findall(r'^step ([\d,]+)[:/]', log[end : start.start()], re.MULTILINE)
            step = int(steps[-1].replace(',', '')) if steps else None
            samples.append({'step': step, 'text': sample[1][:-1], 'remark': sample[2] or ''})
            end = sample.end()
    return samples


def read_json(out_dir: str, name: str, kind: type) -> Any:
    """The content of a JSON file in out_dir; empty if it cannot be read or is not a `kind`."""
    try:
        with open(os.path.join(out_dir, name), encoding='utf-8') as f:
            found = json.load(f)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, kind):
        return kind()
    return found


def read_sessions(out_dir: str) -> list[dict[str, Any]]:
    """run.json: one dictionary for each start of the run, without malformed ones."""
    parts = ('environment', 'model', 'data', 'seconds', 'memory')
    return [
        session
        for session in read_json(out_dir, 'run.json', list)
        if isinstance(session, dict)
        and all(isinstance(session.get(part, {}), dict) for part in parts)
    ]


def read_run(out_dir: str) -> Run:
    """The run in a folder. Raises UserError if there is none, or if it has no figures yet."""
    if not os.path.isdir(out_dir):
        raise UserError(f'{out_dir}: no such folder; expected the out_dir of a run of train.py')
    try:
        rows = read_rows(out_dir)
    except OSError as error:
        raise UserError(
            f'{out_dir}: no metrics.csv to report on ({error.strerror}); train.py writes one, '
            'nanoGPT does not'
        ) from None
    if not rows:
        raise UserError(
            f'{out_dir}/metrics.csv: no figures yet; a run writes the first after '
            '--log_interval steps'
        )
    config = read_json(out_dir, 'config.json', dict)
    if 'label_smoothing' in config:
        raise UserError(
            f'{out_dir}: a run of examples/seq2seq/train_seq2seq.py, an encoder–decoder; reports '
            'exist only for runs of train.py'
        )
    return Run(out_dir, rows, config, read_sessions(out_dir), read_samples(out_dir))


# -----------------------------------------------------------------------------
# What to try next


def advice(run: Run) -> list[Hint]:
    """What the figures show and what to try, the most important first; [] if all is well."""
    found = check_learning_rate(run)
    if not found:  # with a learning rate that is too high, the losses say nothing else
        shape, found = judge_losses(run)
        found = [*found, *check_size(run, shape)]
    return found + list(check_efficiency(run))


def command(run: Run) -> str:
    """The command that repeats the run in another folder; a hint's options are appended to it."""
    words = ['python', 'train.py', f'{run.out_dir}/config.json', f'--out_dir={run.out_dir}-next']
    if run.config.get('init_from') == 'resume':
        words.append(f'--init_from={run.facts.get("began_from", "scratch")}')
    return shlex.join(words)


def options(**values: Any) -> str:
    """Options as they are typed, marked as code."""
    words = [
        f'--{name}={value:.4g}' if isinstance(value, float) else f'--{name}={value}'
        for name, value in values.items()
    ]
    return f'`{" ".join(words)}`'


def how_to_resume(run: Run) -> str:
    """What to do with a run that is not finished; '' if it is."""
    end, max_iters = run.facts.get('end'), run.option('max_iters')
    was_killed = not end and (run.sessions or run.steps < max_iters)  # old runs have no run.json
    if not was_killed and not str(end).startswith('stopped by '):
        return ''
    resume = shlex.join(['python', 'train.py', f'--out_dir={run.out_dir}', '--init_from=resume'])
    return (
        f'The run is not finished ({run.steps:,} of at most {max_iters:,.0f} steps): let it '
        f'continue; if it was stopped: `{resume}`.'
    )


def check_learning_rate(run: Run) -> list[Hint]:
    """Is the learning rate too high? Signs: NaN, jumps of the loss, mostly clipped gradients."""
    rate, clip, warmup = map(run.option, ('learning_rate', 'grad_clip', 'warmup_iters'))
    jumps, losses = [], run.points('train_loss')
    for i, (step, loss) in enumerate(losses[1:], 1):
        usual = statistics.median(value for _, value in losses[max(0, i - 5) : i])
        if loss > max(1.15 * usual, usual + 0.3):
            jumps.append((loss - usual, step, usual, loss))
    norms = [norm for step, norm in run.points('grad_norm') if step > warmup]
    clipped = sum(norm > 3 * clip > 0 for norm in norms) / max(1, len(norms))
    shows, end = [], str(run.facts.get('end'))
    if 'NaN' in end:
        shows.append(f'The run ended because {end}.')
    if len(jumps) > 1:
        _, step, usual, loss = max(jumps)
        shows.append(
            f'The training loss jumped {len(jumps)} times; the largest jump was at step '
            f'{step:,.0f}, from {usual:.2f} to {loss:.2f}.'
        )
    if clipped > 0.5:
        shows.append(
            f'After the warm-up the gradient norm was more than 3 times grad_clip={clip:g} in '
            f'{clipped:.0%} of the log lines.'
        )
    if not shows or not rate:
        return []
    return [(' '.join(shows), f'A lower learning rate: {options(learning_rate=rate / 3)}.')]


def judge_losses(run: Run) -> tuple[str, list[Hint]]:
    """What the training and validation losses say: (shape, hints).

    The shape is 'overfitting', 'too short', 'too small' or ''. The losses are compared at the end,
    over the last third of the steps, and over the second half of the steps.
    """
    train, half = run.train_at(run.steps), run.val_at(run.steps / 2)
    if len(run.evaluations) < 3:
        interval, way = max(1, run.steps // 10), how_to_resume(run)
        if not way and interval == run.option('eval_interval'):
            return '', []
        counts = ('No evaluations', 'Only 1 evaluation', 'Only 2 evaluations')
        shows = f'{counts[len(run.evaluations)]}: too few to detect overfitting.'
        return '', [(shows, way or f'Evaluate more often: {options(eval_interval=interval)}.')]
    if train is None:
        return '', []
    first, val = run.points('train_loss')[0][1], run.evaluations[-1]['val_loss']
    shows, gain = overfitting(run, train, val), (half or 2 * val) - val
    if shows:
        return 'overfitting', [(shows, against_overfitting(run))]
    if gain > min(0.02 * val, 0.2 * (first - train)):  # the second: a slow run has not fallen far
        shows = (
            'The validation loss is still falling: the second half of the steps, to '
            f'{run.steps:,}, reduced it by {gain:.3f} ({val + gain:.3f} to {val:.3f}).'
        )
        return 'too short', train_longer(run, shows, first, train)
    if abs(val - train) >= 0.03 * val or half is None:
        return '', []
    shows = (
        'Both losses hardly change any more and are close together (training '
        f'{train:.3f}, validation {val:.3f}); the second half of the steps reduced the '
        f'validation loss by {gain:.3f}: the model has reached its capacity (it is too small).'
    )
    heads, width = int(run.option('n_head')), int(run.option('n_embd'))
    way = 'Use a larger model'
    if heads and width and not run.is_finetuned:
        way += f': {options(n_head=2 * heads, n_embd=2 * width)}'
    return 'too small', [(shows, f'{way}.')]


def overfitting(run: Run, train: float, val: float) -> str:
    """How the figures show overfitting; '' if they do not."""
    low, at, third = run.best['val_loss'], run.best['step'], 2 * run.steps / 3
    train_at_best = run.train_at(at) or 0.0
    train_fell = (run.train_at(third) or train) - train
    val_fell = (run.val_at(third) or val) - val
    if val > 1.01 * low and train < min(val, train_at_best):
        return (
            f'The validation loss was lowest at step {at:,.0f} ({low:.3f}) and rose to {val:.3f} '
            f'at step {run.steps:,}, while the training loss fell from {train_at_best:.3f} to '
            f'{train:.3f}: the model is overfitting. best.pt has the weights of step {at:,.0f}.'
        )
    if val - train > 0.05 * val and max(val_fell, 0.004 * train) < 0.2 * train_fell:
        return (
            f'Over the last third of the steps the training loss fell by {train_fell:.3f} to '
            f'{train:.3f}, the validation loss by {max(0.0, val_fell):.3f} to {val:.3f}: the model '
            'is beginning to overfit.'
        )
    return ''


def against_overfitting(run: Run) -> str:
    """What can be tried against overfitting."""
    dropout, layers = run.option('dropout'), int(run.option('n_layer'))
    ways = ['More text']
    if 'dropout' in run.config and dropout < 0.5:
        ways.append(f'dropout, {options(dropout=min(0.5, dropout + 0.1))}')
    if not 0 < run.option('patience') <= 3:
        ways.append(f'early stopping, {options(patience=3)}')
    if layers > 1 and not run.is_finetuned:
        ways.append(f'a smaller model, {options(n_layer=layers // 2)}')
    return '; or '.join(ways) + '.'


def train_longer(run: Run, shows: str, first: float, train: float) -> list[Hint]:
    """What to do about a run whose validation loss still fell at its end.

    `first` and `train` are its first and last training losses.
    """
    if str(run.facts.get('end')).startswith('stopped:'):  # it stopped as it was asked to
        return []
    way, rate, minutes = how_to_resume(run), run.option('learning_rate'), run.option('max_minutes')
    if way:
        return [(shows, way)]
    steps = 2 * run.steps
    if minutes:
        longer = options(max_minutes=2 * minutes)
    elif run.option('lr_decay_iters'):
        longer = options(max_iters=steps, lr_decay_iters=steps)
    else:
        longer = options(max_iters=steps)
    way = f'The run was too short: train longer, {longer}.'
    middle = run.train_at(run.steps / 2)
    if rate and middle and middle - train > 0.5 * (first - middle):
        shows += (
            f' The training loss fell by {first - middle:.2f} in the first half and by '
            f'{middle - train:.2f} in the second: training is slow.'
        )
        way += f' Or try a higher learning rate: {options(learning_rate=3 * rate)}.'
    return [(shows, way)]


def check_size(run: Run, shape: str) -> Iterator[Hint]:
    """Is there enough text for a model of this size?

    A compute budget is best spent on about 20 tokens per parameter (Hoffmann et al. 2022,
    arXiv:2203.15556), and up to 4 epochs are nearly as good as new text (Muennighoff et al. 2023,
    arXiv:2305.16264).
    """
    parameters, text = run.figure('model', 'parameters'), run.figure('data', 'training tokens')
    if not parameters or not text or not run.tokens or run.is_finetuned:
        return
    wanted, epochs, ratio = 20 * parameters, run.tokens / text, run.tokens / parameters
    is_done = run.facts.get('end') in ('done', None) and not how_to_resume(run)
    may_add_steps = is_done and shape != 'overfitting' and not run.option('max_minutes')
    if (epochs > 4 or wanted > 4 * text) and ratio < 20 and shape != 'too small':
        yield (
            f'The model was trained on its {text:,.0f} tokens for {epochs:.1f} epochs, '
            f'{ratio:.2g} tokens per parameter. About 20 per parameter are best (Hoffmann et al. '
            '2022), and up to 4 epochs are nearly as good as new text (Muennighoff et al. 2023).',
            f'More text: {wanted / 4:,.0f} tokens would suit {parameters:,.0f} parameters.',
        )
    elif ratio < 10 and may_add_steps:
        max_iters = math.ceil(wanted / run.tokens * run.steps)
        yield (
            f'The model was trained on {ratio:.2g} tokens per parameter; about 20 are best for a '
            'compute budget (Hoffmann et al. 2022).',
            f'More steps: {options(max_iters=max_iters)}.',
        )


def check_efficiency(run: Run) -> Iterator[Hint]:
    """Are the evaluations large enough and not too frequent, and is the machine well used?"""
    names = ('validation windows read', 'validation windows', 'validation tokens')
    read, available, tokens = (run.figure('data', name) for name in names)
    if read and available and tokens and tokens * read / available < 10_000:
        way = 'Prepare the dataset with a larger --val_fraction.'
        if read < available:
            way = f'Evaluate on the whole split: {options(eval_iters=None)}.'
        yield (
            f'The validation loss is the mean over {tokens * read / available:,.0f} tokens; below '
            '10,000, differences of a percent may be noise.',
            way,
        )
    seconds, mfu, interval = run.seconds(), run.median('mfu'), int(run.option('eval_interval'))
    total, evaluation = sum(seconds.values()), seconds.get('evaluation', 0.0)
    if total > 60 and evaluation > 0.2 * total:
        way = 'Evaluate less often'
        if interval:
            way += f': {options(eval_interval=2 * interval)}'
        yield f'Evaluations took {evaluation / total:.0%} of the time.', f'{way}.'
    # batch_size='auto' is not a number: it already processes as many sequences at once as fit
    sequences = int(run.option('batch_size') * run.option('gradient_accumulation_steps'))
    is_compiled = run.facts.get('environment', {}).get('model is') == 'compiled'
    at_once = run.figure('data', 'windows at once') or sequences
    ways = []
    if not is_compiled and run.config.get('compile') is not True:
        ways.append(options(compile=True))
    if at_once < sequences:
        ways.append(options(batch_size='auto', gradient_accumulation_steps=sequences))
    if ways and total > 60 and mfu is not None and mfu < 0.15:
        shows = f'The run used {mfu:.0%} of the measured peak throughput (large matrix products).'
        yield shows, f'Try {" or ".join(ways)}.'


# -----------------------------------------------------------------------------
# The page

# Each color that matplotlib draws with, and the CSS that replaces it, for light and dark pages
COLORS = {'#010101': 'currentColor', '#010102': 'var(--train)', '#010103': 'var(--val)'}
INK, TRAIN, VAL = COLORS
THIN: dict[str, Any] = {'color': TRAIN, 'linewidth': 1.2}
LINES = dict.fromkeys(METRICS, THIN) | {'val_loss': {'color': VAL, 'linewidth': 1.8, 'marker': 'o'}}
STYLE: dict[Any, Any] = {
    'axes.edgecolor': INK,
    'axes.facecolor': 'none',
    'axes.formatter.limits': (-5, 8),
    'axes.grid': True,
    'axes.labelcolor': INK,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'figure.facecolor': 'none',
    'figure.figsize': (4.4, 2.6),
    'axes.formatter.min_exponent': 6,
    'font.size': 9,
    'grid.alpha': 0.15,
    'grid.color': INK,
    'grid.linewidth': 0.6,
    'lines.markersize': 3.5,
    'svg.fonttype': 'none',
    'text.color': INK,
    'xtick.color': INK,
    'ytick.color': INK,
}


def charts(run: Run) -> list[tuple[str, str, str]]:
    """(title, description in words, SVG) of each curve that the run has figures for."""
    in_bits = (run.best.get('val_bpb') or 0.0) / (run.best.get('val_loss') or 1.0)
    mfu, speed = run.median('mfu') or 0.0, run.median('tokens_per_second') or 1.0
    kinds: list[tuple[str, list[str], dict[str, Any]]] = [
        ('Loss', ['train_loss', 'val_loss'], {'right': ('bits per byte', in_bits)}),
        ('Learning rate', ['lr'], {}),
        ('Gradient norm', ['grad_norm'], {'yscale': 'log', 'level': run.option('grad_clip')}),
        (
            'Tokens per second',
            ['tokens_per_second'],
            {
                'right': ('% of measured peak', 100 * mfu / speed),
                'form': '{x:,.0f}',
                'ylim': (0, None),
            },
        ),
    ]
    drawn = []
    for title, columns, look in kinds:
        lines = {name: run.points(name) for name in columns if run.points(name)}
        words = [
            f'{name.replace("_", " ")} from {points[0][1]:.4g} to {points[-1][1]:.4g}, '
            f'lowest {min(value for _, value in points):.4g}'
            for name, points in lines.items()
        ]
        if lines:
            description = f'{title} over {run.steps:,} steps: {"; ".join(words)}'
            drawn.append((title, description, draw(title, lines, **look)))
    return drawn


def draw(
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    right: tuple[str, float] = ('', 0.0),
    form: str = '',
    level: float = 0.0,
    **look: Any,
) -> str:
    """One chart as SVG, drawn without a backend; of a long run, means of several values.

    `lines` are the (step, value) of each column, `right` is the label of a second scale and what 1
    is on it, `form` formats the values, `level` is the height of a dashed line, and `look` is for
    matplotlib's Axes.set.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out, (label, scale) = io.StringIO(), right
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the report
        matplotlib.rcParams.update(STYLE | {'svg.hashsalt': title})
        figure = Figure()
        axes = figure.add_axes((0.13, 0.16, 0.74, 0.8))
        for name, points in lines.items():
            size = math.ceil(len(points) / 400)
            groups = [points[i : i + size] for i in range(0, len(points), size)]
            means = [(group[-1][0], statistics.fmean(y for _, y in group)) for group in groups]
            axes.plot(*zip(*means), markevery=math.ceil(len(means) / 60), **LINES[name])
        if level:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle='--', alpha=0.6)
        axes.set(xlabel='steps', **look)
        axes.locator_params('x', nbins=5, steps=[1, 2, 5, 10], integer=True)
        axes.xaxis.set_major_formatter('{x:,.0f}')
        if form:
            axes.yaxis.set_major_formatter(form)
        if scale:
            functions = (lambda y: y * scale, lambda y: y / scale)
            other = axes.secondary_yaxis('right', functions=functions)
            other.set_ylabel(label)
            other.spines[:].set_visible(False)
        FigureCanvasSVG(figure).print_svg(
            out, metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
        )
    svg = out.getvalue()[out.getvalue().index('<svg') :].replace("'DejaVu Sans', ", '')
    svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)
    return re.sub('|'.join(COLORS), lambda color: COLORS[color[0]], svg)


def shown(value: float | None, form: str = ',.0f') -> str:
    """A number as text; a dash for None."""
    return '–' if value is None else format(value, form)


def page(run: Run) -> str:
    """The report as HTML: report_page.html with the figures of the run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    samples = list({sample['step']: sample for sample in run.samples}.values())
    if len(samples) > 6:  # a resumed run may have taken one twice
        samples = [samples[i * (len(samples) - 1) // 5] for i in range(6)]
    every = math.ceil(len(run.evaluations) / 40) or 1
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {'shown': shown, 'exp': math.exp}
    return environment.get_template('report_page.html').render(
        run=run,
        name=os.path.basename(os.path.abspath(run.out_dir)),
        hints=advice(run),
        command=command(run),
        charts=charts(run),
        evaluations=run.evaluations[::-every][::-1],
        samples=samples,
        changed=run.facts.get('changed', list(run.config)),
        written=time.strftime('%Y-%m-%d %H:%M'),
    )


def write(out_dir: str) -> str:
    """Write out_dir/report.html atomically; returns its path.

    Raises UserError if there is no run to report on, OSError if the file cannot be written.
    """
    path = os.path.join(out_dir, 'report.html')
    try:
        atomic_write(path, page(read_run(out_dir)).encode('utf-8', 'replace'))
    except ImportError as error:
        raise UserError(
            f'{path}: {error.name} is not installed: pip install -r requirements.txt'
        ) from None
    return path


# -----------------------------------------------------------------------------
# Two runs side by side


def compare(a: Run, b: Run) -> tuple[list[tuple[str, str, str]], list[str]]:
    """([(name, value of a, value of b)], remarks on what can be compared).

    First the options that differ, then the results, then what differs between the machines.
    """
    both, (losses, bits, remark) = (a, b), what_compares(a, b)
    later = []
    for axis, form in (('tokens', ',.0f'), ('seconds', ',.1f')):
        ends = [row[axis] or 0.0 for run in both for row in run.evaluations[-1:]]
        where = min(ends, default=0.0)
        values = [run.val_at(where, axis) for run in both]
        compares = losses and None not in values
        later.append((f'validation loss after {where:{form}} {axis}', '.4f', values, compares))
    figures: list[tuple[str, str, list[float | None], bool]] = [
        ('parameters', ',.0f', [run.figure('model', 'parameters') for run in both], True),
        ('steps', ',.0f', [run.steps for run in both], True),
        ('tokens read', ',.0f', [run.tokens for run in both], True),
        ('best validation loss', '.4f', [run.best.get('val_loss') for run in both], losses),
        ('at step', ',.0f', [run.best.get('step') for run in both], losses),
        ('best bits per byte', '.4f', [run.best.get('val_bpb') for run in both], bits),
        *later,
        ('last training loss', '.4f', [run.train_at(run.steps) for run in both], losses),
        ('tokens/s (median)', ',.0f', [run.median('tokens_per_second') for run in both], True),
        ('share of measured peak', '.0%', [run.median('mfu') for run in both], True),
        ('seconds in total', ',.1f', [run.last['seconds'] for run in both], True),
        ('peak memory, MB', ',.0f', [run.figure('memory', 'peak') for run in both], True),
    ]
    remarks = [remark] if remark else []
    if losses and a.tokens != b.tokens:
        remarks.append(
            "At equal tokens or seconds the longer run's learning rate had not come down yet. The "
            'loss is interpolated linearly between evaluations.'
        )
    machines = [run.facts.get('environment', {}) for run in both]
    rows = [
        (name, str(a.config.get(name, '–')), str(b.config.get(name, '–')))
        for name in a.config | b.config
        if name not in ('out_dir', 'init_from') and a.config.get(name) != b.config.get(name)
    ]
    rows += [
        (name, shown(values[0], form), shown(values[1], form))
        for name, form, values, compares in figures
        if compares and values != [None, None]
    ]
    rows += [
        (name, str(value), str(machines[1][name]))
        for name, value in machines[0].items()
        if machines[1].get(name, value) != value
    ]
    return rows, remarks


def what_compares(a: Run, b: Run) -> tuple[bool, bool, str]:
    """Can losses per token be compared, can bits per byte, and a remark that says why not."""
    data = [run.facts.get('data', {}) for run in (a, b)]
    names = ('fingerprint', 'tokens', 'windows read', 'bytes')
    values = {name: {part.get(f'validation {name}') for part in data} for name in names}
    differ = [name for name in names if len(values[name] - {None}) == 2]
    evaluated_all = all(
        part.get('validation windows read') == part.get('validation windows') for part in data
    )
    tokenizers = [read_json(run.out_dir, 'tokenizer.json', dict) for run in (a, b)]
    same_bytes = evaluated_all and None not in values['bytes'] and 'bytes' not in differ
    cases = [
        (
            tokenizers[0] != tokenizers[1] and same_bytes,
            (False, True),
            'Their tokenizers differ, so losses per token cannot be compared; bits per byte can '
            '(their validation text has the same number of bytes).',
        ),
        (
            tokenizers[0] != tokenizers[1],
            (False, False),
            'Their tokenizers differ, so losses per token cannot be compared, and nothing shows '
            'that their validation text is the same.',
        ),
        (
            'fingerprint' in differ or 'tokens' in differ,
            (False, False),
            'Their validation data differ: no losses can be compared.',
        ),
        (
            'windows read' in differ and not evaluated_all,
            (False, False),
            'They were evaluated on different parts of the validation split (eval_iters): their '
            'losses cannot be compared.',
        ),
        (
            None in values['fingerprint'],
            (True, True),
            'At least one has no run.json: their validation data are assumed to be the same.',
        ),
        (True, (True, True), ''),
    ]
    return next((*compares, remark) for applies, compares, remark in cases if applies)


def main() -> None:
    """Write the report of a run."""
    print(write(configure(ReportConfig, description="Write a run's report.html.").out_dir))
