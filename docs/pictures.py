"""The documentation's pictures: python docs/pictures.py draws docs/pictures/*.svg.

Drawing gives the same bytes each time. Two pictures show a real run; their data is beside them. To
measure it anew (a minute or two), then draw:

python data/darklyrics/prepare.py
python train.py config/train_darklyrics.py --log_interval=5 --eval_interval=25
python docs/pictures.py --measure=out-darklyrics
"""

import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(HERE, 'concepts')]

import matplotlib  # noqa: E402

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle  # noqa: E402
from matplotlib.path import Path  # noqa: E402
from simulate import Run, memory  # noqa: E402

from configurator import configure, run  # noqa: E402
from lyregpt import checkpoint  # noqa: E402
from train import TrainConfig, learning_rate  # noqa: E402

FOLDER = os.path.join(HERE, 'pictures')
METRICS = os.path.join(FOLDER, 'darklyrics-metrics.csv')
ATTENTION = os.path.join(FOLDER, 'darklyrics-attention.json')
BLUE, ORANGE, GREEN, RED = '#4c78a8', '#f58518', '#54a24b', '#e45756'
GREY, DARK, INK = '#9a9a9a', '#555555', '#222222'
PALE = {BLUE: '#dbe7f3', ORANGE: '#fde5cc', GREEN: '#dcefd9', RED: '#f9dcdc', GREY: '#ececec'}
STYLE: Any = {
    'svg.hashsalt': 'lyregpt',  # ids in the file are drawn from it: the same bytes each time
    'font.family': 'DejaVu Sans',  # comes with matplotlib
    'font.size': 11,
    'text.color': INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'figure.facecolor': 'white',  # also for readers in dark mode
}


@dataclass
class PicturesConfig:
    out: str = FOLDER  # the folder to draw into
    measure: str = ''  # first measure the run of config/train_darklyrics.py in this out_dir


# -----------------------------------------------------------------------------
# Drawing


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of this size in inches, and an empty drawing area whose units are inches too."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis('off')
    return figure, axes


def box(
    axes: Any,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    color: str = GREY,
    size: float = 11,
    **more: Any,
) -> None:
    """A box with its lower left corner at (x, y), in inches, and text in its middle."""
    shape = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle='round,pad=0,rounding_size=0.08',
        facecolor=PALE[color],
        edgecolor=color,
        linewidth=1.3,
    )
    axes.add_patch(shape)
    style = dict(ha='center', va='center', fontsize=size, linespacing=1.35)
    axes.text(x + width / 2, y + height / 2, text, **style, **more)


def square(axes: Any, x: float, y: float, size: Any, fill: str, edge: str, **more: Any) -> None:
    """A rectangle of this (width, height)."""
    axes.add_patch(Rectangle((x, y), *size, facecolor=fill, edgecolor=edge, **more))


def note(axes: Any, x: float, y: float, text: str, size: float = 9.5, **more: Any) -> None:
    """A small text."""
    axes.text(x, y, text, fontsize=size, **more)


def arrow(axes: Any, start: Any, end: Any, color: str = INK, **more: Any) -> None:
    style: dict[str, Any] = dict(arrowstyle='-|>', mutation_scale=13, shrinkA=0, shrinkB=0)
    axes.add_patch(FancyArrowPatch(start, end, linewidth=1.3, color=color, **style, **more))


def cells(axes: Any, rows: Any, columns: Any, color: Any) -> None:
    """Squares in a grid, as one path; the bytes of an image would depend on other libraries."""
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    squares = np.stack((columns, rows), axis=1)[:, None] + corners
    axes.add_patch(
        PathPatch(
            Path.make_compound_path_from_polys(squares),
            facecolor=color,
            edgecolor='white',
            linewidth=0.5,
        )
    )


# -----------------------------------------------------------------------------
# The pictures: each function returns a figure


def rooms() -> Any:
    """The data's way through the scripts."""
    figure, axes = canvas(10, 4.7)
    for color, x, word in (BLUE, 6.4, 'a script'), (ORANGE, 7.6, 'what lies on disk'):
        square(axes, x, 4.32, (0.22, 0.18), PALE[color], color)
        note(axes, x + 0.3, 4.41, word, 10, va='center')
    top, low = 2.75, 0.9
    loop = 'batch ← lyregpt/dataset.py\nloss ← model.py\nupdate ← lyregpt/optim.py'
    files = 'ckpt.pt: resume from here\nbest.pt: generate with this\nmetrics.csv, train.log'
    for x, y, width, height, text, color in (
        (0.25, top, 1.75, 1.1, 'your text\n.txt, .md, .jsonl,\nweb pages', ORANGE),
        (2.4, top, 2.0, 1.1, 'scrapers/\ncollect and clean\n(lyrics only)', BLUE),
        (4.8, top, 2.2, 1.1, 'data/…/prepare.py\nlyregpt/tokenizer.py\nlyregpt/dataset.py', BLUE),
        (7.4, top, 2.35, 1.1, 'data/…/\ntrain.bin, val.bin: ids\nmeta.json: tokenizer', ORANGE),
        (7.0, low - 0.35, 2.75, 1.45, f'train.py\n{loop}', BLUE),
        (3.95, low - 0.35, 2.55, 1.45, f'out-…/\n{files}', ORANGE),
        (0.25, 1.6, 3.0, 0.42, 'sample.py: generate, at a prompt', BLUE),
        (0.25, 1.08, 3.0, 0.42, 'lyregpt/serve.py: a page, an API', BLUE),
        (0.25, 0.56, 3.0, 0.42, 'lyregpt/export.py: for other tools', BLUE),
    ):
        box(axes, x, y, width, height, text, color, 10)
    for x, end in (2.0, 2.4), (4.4, 4.8), (7.0, 7.4):
        arrow(axes, (x, top + 0.55), (end, top + 0.55))
    arrow(axes, (1.1, top + 1.1), (5.9, top + 1.1), connectionstyle='arc3,rad=-0.12')
    note(axes, 3.5, 4.27, 'without a scraper', ha='center', color=DARK)
    arrow(axes, (8.6, top), (8.6, low + 1.1))
    arrow(axes, (7.0, low + 0.55), (6.5, low + 0.55))
    arrow(axes, (6.5, low - 0.1), (7.0, low - 0.1), GREY)
    note(axes, 6.75, low - 0.55, 'resume', ha='center', color=DARK)
    for y in 1.81, 1.29, 0.77:
        arrow(axes, (3.95, low + 0.38), (3.25, y))
    return figure


def gpt() -> Any:
    """The model and a block of it, with shapes."""
    figure, axes = canvas(10, 7.0)
    axes.text(2.0, 6.75, 'the model', ha='center', fontsize=13, weight='bold')
    axes.text(6.75, 6.75, 'one block', ha='center', fontsize=13, weight='bold')
    rows = [
        (0.25, 'token ids', ORANGE, '(B, T)'),
        (1.2, 'wte: a row of the table for each id', BLUE, '(B, T, C)'),
        (2.15, 'block 1', GREEN, '(B, T, C)  …'),
        (3.1, 'block n_layer', GREEN, '(B, T, C)'),
        (4.05, 'ln_f: norm', GREY, '(B, T, C)'),
        (5.0, 'lm_head: a score for each token', BLUE, '(B, T, V)'),
        (5.95, 'softmax: probabilities → loss, or a draw', ORANGE, ''),
    ]
    for i, (y, text, color, _) in enumerate(rows):
        box(axes, 0.2, y, 3.6, 0.55, text, color, 10.5)
        if i:
            arrow(axes, (2.0, rows[i - 1][0] + 0.55), (2.0, y))
            note(axes, 2.12, y - 0.2, rows[i - 1][3], va='center', color=DARK)
    square(axes, 4.75, 0.25, (5.0, 6.25), '#f6fbf5', GREEN, linewidth=1.3, linestyle='--')
    for start, end in (2.15, 0.25), (2.7, 6.5):
        axes.plot([3.8, 4.75], [start, end], color=GREEN, linewidth=1, linestyle=':')
    spine, left = 5.25, 6.0
    arrow(axes, (spine, 0.4), (spine, 6.4), GREEN)
    note(
        axes,
        spine + 0.12,
        0.45,
        'x (B, T, C): the residual stream',
        10,
        va='center',
        color='#3a7a33',
    )
    for y, *parts in (
        (
            0.95,
            'ln_1: norm',
            'c_attn: q, k, v (B, H, T, D)\nattention: shares (T, T), only backwards',
            'c_proj: the heads together',
        ),
        (
            3.7,
            'ln_2: norm',
            'c_fc: widen to n_ff, bend (SwiGLU);\neach token by itself',
            'c_proj: narrow again',
        ),
    ):
        arrow(axes, (spine, y + 0.21), (left, y + 0.21))
        for text, color, height in zip(parts, (GREY, ORANGE, BLUE), (0.42, 0.72, 0.42)):
            box(axes, left, y, 3.5, height, text, color, 10)
            if text != parts[-1]:
                arrow(axes, (left + 1.75, y + height), (left + 1.75, y + height + 0.22))
            y += height + 0.22
        end = y - 0.22 - 0.21  # the middle of the last box
        arrow(axes, (left, end), (spine + 0.13, end))
        axes.add_patch(
            plt.Circle(
                (spine, end), 0.13, facecolor='white', edgecolor=GREEN, linewidth=1.3, zorder=3
            )
        )
        axes.text(spine, end, '+', ha='center', va='center', fontsize=12, zorder=4)
    note(
        axes,
        left + 1.75,
        6.12,
        'B texts, T tokens each, C = n_embd,\nH heads of D, V = vocabulary',
        ha='center',
        va='center',
        color=DARK,
    )
    return figure


def attention() -> Any:
    """The causal mask, and a real head's shares over a line."""
    with open(ATTENTION, encoding='utf-8') as f:
        real = json.load(f)
    figure, (mask, shares) = plt.subplots(1, 2, figsize=(10, 5.4), width_ratios=(1, 1.5))
    words = 'The sign said " No Ge ese'.split()
    n = len(words)
    cells(mask, *np.tril_indices(n), PALE[BLUE])
    cells(mask, *np.triu_indices(n, 1), '#eeeeee')
    mask.text(2, 5, 'sees', ha='center', va='center')
    mask.text(5, 2, '−∞: may not see', ha='center', va='center')
    mask.set_title('the mask', fontsize=12)
    names = [token.replace('\n', '⏎') for token in real['tokens']]
    colors, share = plt.get_cmap('Blues', 10), np.array(real['shares'])
    level = np.minimum(share * 10, 9).astype(int)
    for i in range(10):
        rows, columns = np.nonzero((level == i) & (share >= 0.05))
        cells(shares, rows, columns, colors(i))
    shares.set_title(f'block {real["block"]}, head {real["head"]} of the lyrics model', fontsize=12)
    for axes, labels in (mask, words), (shares, names):
        axes.set_xticks(np.arange(len(labels)) + 0.5, labels, rotation=90, fontsize=9)
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=9)
        axes.set(xlim=(0, len(labels)), ylim=(len(labels), 0), aspect='equal')
        axes.set_xlabel('looks at')
        axes.set_ylabel('the token')
    figure.colorbar(
        plt.cm.ScalarMappable(cmap=colors),
        ax=shares,
        label='share (below 0.05: not drawn)',
        shrink=0.8,
    )
    figure.tight_layout()
    return figure


def loss() -> Any:
    """Training and validation loss of a real run."""
    with open(METRICS, encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for key, color, name, marker in (
        ('train_loss', BLUE, 'training', None),
        ('val_loss', ORANGE, 'validation', 'o'),
    ):
        points = [(int(row['step']), float(row[key])) for row in rows if row[key]]
        axes.plot(*zip(*points), color=color, linewidth=2, marker=marker, markersize=4, label=name)
    best = min((float(row['val_loss']), int(row['step'])) for row in rows if row['val_loss'])
    axes.annotate(
        f'best.pt: {best[0]:.3f}',
        (best[1], best[0]),
        (best[1] - 15, best[0] + 1.1),
        ha='center',
        arrowprops=dict(arrowstyle='->', color=INK),
    )
    axes.set(xlabel='step (2,048 tokens each)', ylabel='loss, nats per token')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def memory_of(config: str, vocab_size: int) -> tuple[Run, dict[str, float]]:
    """A config file as simulate.py counts it, on one GPU: (the run, bytes by part)."""
    options = configure(TrainConfig, [os.path.join(os.path.dirname(HERE), 'config', config)])
    model = options.model_config(vocab_size)
    names = ('n_layer', 'n_head', 'n_kv_head', 'head_dim', 'n_embd', 'n_ff', 'tie_weights')
    shape = {name: getattr(model, name) for name in (*names, 'block_size', 'vocab_size')}
    sequences = int(options.batch_size) * options.gradient_accumulation_steps
    counted = Run(
        arch='modern',
        swiglu=True,
        optimizer='muon',
        gpus=1,
        micro_batch=int(options.batch_size),
        tokens_per_step=sequences * options.block_size,
        **shape,
    )
    return counted, memory(counted)


MEMORY = [('train_darklyrics.py', 4096), ('default.py', 4096), ('large.py', 16384)]


def memory_by_part() -> Any:
    """Where the memory of a training goes, for three configs."""
    figure, axes = plt.subplots(figsize=(10, 3.9))
    names = ('weights', 'gradients', 'optimizer', 'copies', 'activations', 'logits')
    colors = dict(zip(names, (BLUE, '#8fb3d9', GREEN, '#bab0ac', ORANGE, RED)))
    for i, (config, vocab_size) in enumerate(MEMORY):
        _, parts = memory_of(config, vocab_size)
        total, left = sum(parts.values()), 0.0
        unit, word, digits = (1e9, 'GB', 1) if total > 1e9 else (1e6, 'MB', 0)
        for name, size in parts.items():
            share = size / total
            axes.barh(i, share, left=left, color=colors[name], edgecolor='white')
            if share > 0.045:
                text = f'{size / unit:.1f}' if size < 10 * unit else f'{size / unit:.0f}'
                note(axes, left + share / 2, i, text, 10, ha='center', va='center')
            left += share
        note(axes, 1.01, i, f'{total / unit:.{digits}f} {word}', 11, va='center', weight='bold')
    axes.set_yticks(range(len(MEMORY)), [f'config/{config}' for config, _ in MEMORY])
    axes.set(
        xlim=(0, 1),
        xlabel='share of what one GPU holds in a step: bfloat16 products, Muon and AdamW',
    )
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.invert_yaxis()
    axes.legend(
        names,
        ncols=6,
        frameon=False,
        loc='lower center',
        bbox_to_anchor=(0.42, 1.0),
        columnspacing=1.2,
        handlelength=1.2,
    )
    figure.tight_layout()
    return figure


def schedules() -> Any:
    """The learning rate over 1,000 steps, by train.learning_rate itself."""
    figure, axes = plt.subplots(figsize=(8, 4))
    base: dict[str, Any] = dict(learning_rate=1.0, warmup_iters=50, max_iters=1000)
    lines: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ('cosine (the default), to a tenth', {}, dict(color=BLUE)),
        ('linear, warmdown=0.5', dict(lr_schedule='linear', min_lr=0.0), dict(color=ORANGE)),
        (
            'linear, warmdown=0.9 (the lyrics)',
            dict(lr_schedule='linear', warmdown=0.9, min_lr=0.0),
            dict(color=GREEN),
        ),
        ('decay_lr=False', dict(decay_lr=False), dict(color=GREY, linestyle='--')),
    ]
    for name, options, style in lines:
        config = TrainConfig(**base | options)
        axes.plot(
            [learning_rate(config, step) for step in range(1000)], label=name, linewidth=2, **style
        )
    axes.set(
        xlabel='step (warmup_iters=50, max_iters=1000)',
        ylabel='share of learning_rate',
        ylim=(0, 1.08),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0.08, 0.03))
    figure.tight_layout()
    return figure


CELL = 0.36  # inches
CELL_COLORS = {'p': PALE[BLUE], 'n': ORANGE, 'o': PALE[ORANGE], '.': '#ffffff', 'x': '#e6e6e6'}


def cache_row(axes: Any, x: float, y: float, kinds: str) -> None:
    """A letter per cell: p prompt, n new, o generated before, x padding, . empty."""
    for i, kind in enumerate(kinds):
        square(axes, x + i * CELL, y, (CELL, CELL), CELL_COLORS[kind], GREY, linewidth=0.8)


def kv_cache() -> Any:
    """How the cache fills, and two ways to batch texts of different lengths."""
    figure, axes = canvas(10, 4.3)
    note(axes, 0.25, 4.0, 'one text: each token adds its column', 12, weight='bold')
    for i, kinds in enumerate(('pppp....', 'ppppn...', 'ppppon..', 'ppppoon.', 'ppppooon')):
        cache_row(axes, 1.85, 3.35 - 0.52 * i, kinds)
        text = f'token {i}' if i else 'prefill: one pass'
        note(axes, 1.72, 3.53 - 0.52 * i, text, 10, ha='right', va='center')
    note(
        axes,
        1.85,
        0.95,
        'A column: keys and values of\none token, in all layers.',
        10,
        va='center',
        linespacing=1.35,
    )
    for y, title, rows, remark in (
        (
            4.0,
            'a batch in generate: padded on the left',
            ('ppppppoon.', 'xxxpppoon.', 'xpppppoon.'),
            'one column\nfor all',
        ),
        (
            1.95,
            'the engine: every row its own place',
            ('ppppppoon.', 'pppn......', 'ppppoooon.'),
            'join, leave\nat any time',
        ),
    ):
        note(axes, 5.3, y, title, 12, weight='bold')
        for i, kinds in enumerate(rows):
            cache_row(axes, 5.3, y - 0.65 - 0.42 * i, kinds)
        note(axes, 9.0, y - 0.9, remark, 10, va='center')
    for x, kind, text in (
        (0.25, 'p', 'prompt'),
        (1.4, 'o', 'written'),
        (2.55, 'n', 'new'),
        (3.4, 'x', 'padding, masked'),
    ):
        square(axes, x, 0.16, (0.2, 0.2), CELL_COLORS[kind], GREY, linewidth=0.8)
        note(axes, x + 0.28, 0.26, text, 10, va='center')
    return figure


def formats() -> Any:
    """The bits of the number formats."""
    figure, axes = canvas(10, 3.3)
    cell = 0.225
    for i, (name, exponent, mantissa, remark) in enumerate(
        [
            ('float32', 8, 23, ''),
            ('TF32', 8, 10, "float32's range, float16's digits; 13 bits unused"),
            ('bfloat16', 8, 7, "float32's range, 2 to 3 digits"),
            ('float16', 5, 10, 'up to 65,504, 3 to 4 digits'),
            ('int8', 0, 7, 'whole numbers, times a scale for each row'),
        ]
    ):
        y = 2.35 - 0.48 * i
        axes.text(1.2, y + 0.15, name, ha='right', va='center', fontsize=12, weight='bold')
        for bit in range(1 + exponent + mantissa):
            color = [RED, *[GREEN] * exponent, *[BLUE] * mantissa][bit]
            square(axes, 1.35 + bit * cell, y, (cell, 0.3), PALE[color], color, linewidth=0.9)
        axes.text(
            1.5 + (1 + exponent + mantissa) * cell, y + 0.15, remark, va='center', fontsize=10
        )
    for x, color, text in (
        (1.35, RED, 'sign'),
        (2.3, GREEN, 'exponent: how large'),
        (4.75, BLUE, 'mantissa: the digits'),
    ):
        square(axes, x, 2.88, (0.22, 0.2), PALE[color], color)
        axes.text(x + 0.32, 2.98, text, va='center', fontsize=10.5)
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    'rooms': rooms,
    'gpt': gpt,
    'attention': attention,
    'loss': loss,
    'memory': memory_by_part,
    'schedules': schedules,
    'kv-cache': kv_cache,
    'formats': formats,
}


# -----------------------------------------------------------------------------
# Measuring and drawing


def measure(out_dir: str, block: int = 4, head: int = 2) -> None:
    """Keep a run's metrics.csv, and one head's attention over two lines of a validation song."""
    path, state = checkpoint.load_from(out_dir)
    model, tokenizer = checkpoint.build_model(state, path).eval(), checkpoint.tokenizer_of(state)
    ids = tokenizer.encode(
        'The mark on the door frame where Anna was six.\nThe mark above it where Anna was seven.\n'
    )
    # the kernel does not return the shares, so they are computed from its arguments
    kernel = F.scaled_dot_product_attention
    with mock.patch.object(F, kernel.__name__, wraps=kernel) as calls, torch.no_grad():
        model(torch.tensor([ids]))
    q, k = calls.call_args_list[block - 1].args[:2]
    scores = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5)[0, head - 1]
    shares = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(dim=-1)
    result = {
        'run': 'config/train_darklyrics.py',
        'block': block,
        'head': head,
        'tokens': [tokenizer.decode([i]) for i in ids],
        'shares': [[round(share, 3) for share in row] for row in shares.tolist()],
    }
    with open(ATTENTION, 'w', encoding='utf-8', newline='\n') as f:
        f.write(json.dumps(result, ensure_ascii=False).replace('], [', '],\n[') + '\n')
    shutil.copy(os.path.join(out_dir, 'metrics.csv'), METRICS)


def draw(name: str, folder: str) -> str:
    """Draw one of PICTURES into the folder; returns the path."""
    path = os.path.join(folder, f'{name}.svg')
    drawn = io.StringIO()
    with plt.rc_context(STYLE):
        figure = PICTURES[name]()
        figure.savefig(drawn, metadata={'Date': None, 'Creator': None})
        plt.close(figure)
    # two decimals of a point are enough: a smaller file, and the last digits differ by processor
    text = re.sub(
        ' d="[^"]*"', lambda found: re.sub(r'(\.\d\d)\d+', r'\1', found[0]), drawn.getvalue()
    )
    with open(path, 'w', encoding='utf-8', newline='\n') as f:
        f.write(re.sub(r'\n +', '\n', text))
    return path


def main() -> None:
    config = configure(PicturesConfig, description=(__doc__ or '').split('\n')[0])
    if config.measure:
        measure(config.measure)
    os.makedirs(config.out, exist_ok=True)
    for name in PICTURES:
        path = draw(name, config.out)
        print(f'{os.path.relpath(path)}: {os.path.getsize(path):,} bytes')


if __name__ == '__main__':
    run(main)
