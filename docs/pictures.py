"""The pictures of the documentation, drawn by code: python docs/pictures.py writes docs/pictures/*.svg, byte by byte the same each time.

Two show a real run, whose figures lie beside them. To measure these anew (a minute or two), then draw:

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
METRICS, ATTENTION = (
    os.path.join(FOLDER, 'darklyrics-metrics.csv'),
    os.path.join(FOLDER, 'darklyrics-attention.json'),
)
BLUE, ORANGE, GREEN, RED, GREY, INK = (
    '#4c78a8',
    '#f58518',
    '#54a24b',
    '#e45756',
    '#9a9a9a',
    '#222222',
)
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
    measure: str = (
        ''  # first take the figures of the real run from this out_dir of config/train_darklyrics.py
    )


# -----------------------------------------------------------------------------
# Pens


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and an empty drawing area whose units are inches too."""
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
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha='center',
        va='center',
        fontsize=size,
        linespacing=1.35,
        **more,
    )


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK, **more: Any
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle='-|>',
            mutation_scale=13,
            linewidth=1.3,
            color=color,
            shrinkA=0,
            shrinkB=0,
            **more,
        )
    )


def cells(axes: Any, rows: Any, columns: Any, color: Any) -> None:
    """Squares in a grid, as one path: a small file, and no image, whose bytes would depend on other libraries."""
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
# The pictures, each a function that gives a figure


def rooms() -> Any:
    """The data's way through the scripts."""
    figure, axes = canvas(10, 4.7)
    for color, x, word in (BLUE, 6.4, 'a script'), (ORANGE, 7.6, 'what lies on disk'):
        axes.add_patch(Rectangle((x, 4.32), 0.22, 0.18, facecolor=PALE[color], edgecolor=color))
        axes.text(x + 0.3, 4.41, word, va='center', fontsize=10)
    top, low = 2.75, 0.9
    box(axes, 0.25, top, 1.75, 1.1, 'words\n.txt, .md, .jsonl,\nweb pages', ORANGE, 10)
    box(axes, 2.4, top, 2.0, 1.1, 'scrapers/\ngather and clean\n(lyrics only)', BLUE, 10)
    box(
        axes,
        4.8,
        top,
        2.2,
        1.1,
        'data/…/prepare.py\ntokenizer.py: text → ids\ndataset.py: writes',
        BLUE,
        10,
    )
    box(
        axes,
        7.4,
        top,
        2.35,
        1.1,
        'data/…/\ntrain.bin, val.bin: ids\nmeta.json: tokenizer, counts',
        ORANGE,
        10,
    )
    for x, end in (2.0, 2.4), (4.4, 4.8), (7.0, 7.4):
        arrow(axes, (x, top + 0.55), (end, top + 0.55))
    arrow(
        axes, (1.1, top + 1.1), (5.9, top + 1.1), connectionstyle='arc3,rad=-0.12'
    )  # your own words need no scraper
    axes.text(3.5, 4.27, 'your own words', ha='center', fontsize=9.5, color='#555555')
    box(
        axes,
        7.0,
        low - 0.35,
        2.75,
        1.45,
        'train.py\nbatch ← lyregpt/dataset.py\nloss ← model.py\nupdate ← lyregpt/optim.py',
        BLUE,
        10,
    )
    arrow(axes, (8.6, top), (8.6, low + 1.1))
    box(
        axes,
        3.95,
        low - 0.35,
        2.55,
        1.45,
        'out-…/\nckpt.pt: go on from here\nbest.pt: write with this\nmetrics.csv, train.log',
        ORANGE,
        10,
    )
    arrow(axes, (7.0, low + 0.55), (6.5, low + 0.55))
    arrow(axes, (6.5, low - 0.1), (7.0, low - 0.1), GREY)
    axes.text(6.75, low - 0.55, 'resume', ha='center', fontsize=9.5, color='#555555')
    for i, text in enumerate(
        (
            'sample.py: write, at a prompt',
            'lyregpt/serve.py: a page, an API',
            'lyregpt/export.py: for other tools',
        )
    ):
        y = low + 0.7 - 0.52 * i
        box(axes, 0.25, y, 3.0, 0.42, text, BLUE, 10)
        arrow(axes, (3.95, low + 0.38), (3.25, y + 0.21))
    return figure


def gpt() -> Any:
    """The model and a block of it, with shapes."""
    figure, axes = canvas(10, 7.0)
    axes.text(2.0, 6.75, 'the model', ha='center', fontsize=13, weight='bold')
    axes.text(6.75, 6.75, 'one block', ha='center', fontsize=13, weight='bold')
    rows = [
        (0.25, 'token ids', ORANGE, '(B, T)'),
        (1.2, 'wte: a row of the table for each id', BLUE, '(B, T, C)'),
        (2.15, 'block 1', GREEN, '(B, T, C)'),
        (3.1, 'block n_layer', GREEN, '(B, T, C)'),
        (4.05, 'ln_f: norm', GREY, '(B, T, C)'),
        (5.0, 'lm_head: a score for each token', BLUE, '(B, T, V)'),
        (5.95, 'softmax: probabilities → loss, or a draw', ORANGE, ''),
    ]
    for i, (y, text, color, _) in enumerate(rows):
        box(axes, 0.2, y, 3.6, 0.55, text, color, 10.5)
        if i:
            arrow(axes, (2.0, rows[i - 1][0] + 0.55), (2.0, y))
            axes.text(
                2.12,
                y - 0.2,
                rows[i - 1][3] + ('  …' if i == 3 else ''),
                va='center',
                fontsize=9.5,
                color='#555555',
            )
    axes.add_patch(
        Rectangle(
            (4.75, 0.25),
            5.0,
            6.25,
            facecolor='#f6fbf5',
            edgecolor=GREEN,
            linewidth=1.3,
            linestyle='--',
        )
    )
    for y in (2.15, 2.7):
        axes.plot(
            [3.8, 4.75],
            [y if y == 2.15 else 2.7, 0.25 if y == 2.15 else 6.5],
            color=GREEN,
            linewidth=1,
            linestyle=':',
        )
    spine, left = 5.25, 6.0
    arrow(axes, (spine, 0.4), (spine, 6.4), GREEN)
    axes.text(
        spine + 0.12,
        0.45,
        'x (B, T, C): the residual stream',
        fontsize=10,
        va='center',
        color='#3a7a33',
    )
    for low, parts in (
        (
            0.95,
            [
                'ln_1: norm',
                'c_attn: q, k, v (B, H, T, D)\nattention: shares (T, T), only backwards',
                'c_proj: the heads together',
            ],
        ),
        (
            3.7,
            [
                'ln_2: norm',
                'c_fc: widen to n_ff, bend (SwiGLU);\neach token by itself',
                'c_proj: narrow again',
            ],
        ),
    ):
        heights = (0.42, 0.72, 0.42)
        y = low
        arrow(axes, (spine, y + 0.21), (left, y + 0.21))
        for text, color, height in zip(parts, (GREY, ORANGE, BLUE), heights):
            box(axes, left, y, 3.5, height, text, color, 10)
            if height != heights[-1] or y == low:
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
    axes.text(
        left + 1.75,
        6.12,
        'B texts, T tokens each, C = n_embd,\nH heads of D, V = vocabulary',
        ha='center',
        va='center',
        fontsize=9.5,
        color='#555555',
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
    colors, level = (
        plt.get_cmap('Blues', 10),
        np.minimum(np.array(real['shares']) * 10, 9).astype(int),
    )
    for i in range(10):
        rows, columns = np.nonzero((level == i) & (np.array(real['shares']) >= 0.05))
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
    for key, color, name in ('train_loss', BLUE, 'training'), ('val_loss', ORANGE, 'validation'):
        points = [(int(row['step']), float(row[key])) for row in rows if row[key]]
        axes.plot(
            *zip(*points),
            color=color,
            linewidth=2,
            marker='o' if key == 'val_loss' else None,
            markersize=4,
            label=name,
        )
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
    knobs = configure(TrainConfig, [os.path.join(os.path.dirname(HERE), 'config', config)])
    model = knobs.model_config(vocab_size)
    names = (
        'n_layer n_head n_kv_head head_dim n_embd n_ff tie_weights block_size vocab_size'.split()
    )
    rows = int(knobs.batch_size) * knobs.gradient_accumulation_steps
    shape: dict[str, Any] = {name: getattr(model, name) for name in names}
    counted = Run(
        arch='modern',
        swiglu=True,
        optimizer='muon',
        gpus=1,
        micro_batch=int(knobs.batch_size),
        tokens_per_step=rows * knobs.block_size,
        **shape,
    )
    return counted, memory(counted)


MEMORY = [('train_darklyrics.py', 4096), ('default.py', 4096), ('large.py', 16384)]


def memory_by_part() -> Any:
    """Where the memory of a training goes, for three configs."""
    figure, axes = plt.subplots(figsize=(10, 3.9))
    colors = dict(
        zip(
            ('weights', 'gradients', 'optimizer', 'copies', 'activations', 'logits'),
            (BLUE, '#8fb3d9', GREEN, '#bab0ac', ORANGE, RED),
        )
    )
    for i, (config, vocab_size) in enumerate(MEMORY):
        _, parts = memory_of(config, vocab_size)
        total, left = sum(parts.values()), 0.0
        unit, word = (1e9, 'GB') if total > 1e9 else (1e6, 'MB')
        for name, size in parts.items():
            axes.barh(
                i,
                size / total,
                left=left,
                color=colors[name],
                edgecolor='white',
                label=name if i == 0 else None,
            )
            if size / total > 0.045:
                axes.text(
                    left + size / total / 2,
                    i,
                    f'{size / unit:.{1 if size / unit < 10 else 0}f}',
                    ha='center',
                    va='center',
                    fontsize=10,
                )
            left += size / total
        axes.text(
            1.01,
            i,
            f'{total / unit:.{1 if unit == 1e9 else 0}f} {word}',
            va='center',
            fontsize=11,
            weight='bold',
        )
    axes.set_yticks(range(len(MEMORY)), [f'config/{config}' for config, _ in MEMORY])
    axes.set(
        xlim=(0, 1),
        xlabel='share of what one GPU holds in a step: bfloat16 products, Muon and AdamW',
    )
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.invert_yaxis()
    axes.legend(
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
    for name, knobs, style in lines:
        config = TrainConfig(**base | knobs)
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


def kv_cache() -> Any:
    """How the cache fills, and two ways to put texts of different lengths side by side."""
    figure, axes = canvas(10, 4.3)
    cell = 0.36

    def row(x: float, y: float, kinds: str) -> None:
        """A letter a cell: p prompt, n new, o old, . padding or empty."""
        for i, kind in enumerate(kinds):
            color = {
                'p': PALE[BLUE],
                'n': ORANGE,
                'o': PALE[ORANGE],
                '.': '#ffffff',
                'x': '#e6e6e6',
            }[kind]
            axes.add_patch(
                Rectangle(
                    (x + i * cell, y), cell, cell, facecolor=color, edgecolor=GREY, linewidth=0.8
                )
            )

    axes.text(0.25, 4.0, 'one text: each token adds its column', fontsize=12, weight='bold')
    for i, (kinds, text) in enumerate(
        [
            ('pppp....', 'prefill: one pass'),
            ('ppppn...', 'token 1'),
            ('ppppon..', 'token 2'),
            ('ppppoon.', 'token 3'),
            ('ppppooon', 'token 4'),
        ]
    ):
        row(1.85, 3.35 - 0.52 * i, kinds)
        axes.text(1.72, 3.53 - 0.52 * i, text, ha='right', va='center', fontsize=10)
    axes.text(
        1.85,
        0.95,
        'A column: keys and values of\none token, in all layers.',
        fontsize=10,
        va='center',
        linespacing=1.35,
    )
    axes.text(5.3, 4.0, 'a batch in generate: padded on the left', fontsize=12, weight='bold')
    for i, kinds in enumerate(('ppppppoon.', 'xxxpppoon.', 'xpppppoon.')):
        row(5.3, 3.35 - 0.42 * i, kinds)
    axes.text(9.0, 3.1, 'one column\nfor all', fontsize=10, va='center')
    axes.text(5.3, 1.95, 'the engine: every row its own place', fontsize=12, weight='bold')
    for i, kinds in enumerate(('ppppppoon.', 'pppn......', 'ppppoooon.')):
        row(5.3, 1.3 - 0.42 * i, kinds)
    axes.text(9.0, 1.05, 'join, leave\nat any time', fontsize=10, va='center')
    for x, color, text in (
        (0.25, PALE[BLUE], 'prompt'),
        (1.4, PALE[ORANGE], 'written'),
        (2.55, ORANGE, 'new'),
        (3.4, '#e6e6e6', 'padding, masked'),
    ):
        axes.add_patch(
            Rectangle((x, 0.16), 0.2, 0.2, facecolor=color, edgecolor=GREY, linewidth=0.8)
        )
        axes.text(x + 0.28, 0.26, text, va='center', fontsize=10)
    return figure


def formats() -> Any:
    """The bits of the number formats."""
    figure, axes = canvas(10, 3.3)
    cell = 0.225
    for i, (name, exponent, mantissa, note) in enumerate(
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
            color = RED if bit == 0 else GREEN if bit <= exponent else BLUE
            axes.add_patch(
                Rectangle(
                    (1.35 + bit * cell, y),
                    cell,
                    0.3,
                    facecolor=PALE[color],
                    edgecolor=color,
                    linewidth=0.9,
                )
            )
        axes.text(
            1.35 + (1 + exponent + mantissa) * cell + 0.15, y + 0.15, note, va='center', fontsize=10
        )
    for x, color, text in (
        (1.35, RED, 'sign'),
        (2.3, GREEN, 'exponent: how large'),
        (4.75, BLUE, 'mantissa: the digits'),
    ):
        axes.add_patch(Rectangle((x, 2.88), 0.22, 0.2, facecolor=PALE[color], edgecolor=color))
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
    """Keep a run's metrics.csv, and the shares of one of its model's heads over two lines of a validation song."""
    path, state = checkpoint.load_from(out_dir)
    model, tokenizer = checkpoint.build_model(state, path).eval(), checkpoint.tokenizer_of(state)
    ids = tokenizer.encode(
        'The mark on the door frame where Anna was six.\nThe mark above it where Anna was seven.\n'
    )
    maps: list[torch.Tensor] = []
    plain = F.scaled_dot_product_attention

    def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        scores = (
            q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
        )  # the kernel keeps no shares, so they are computed beside it
        maps.append(
            scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(dim=-1)[
                0
            ]
        )
        return plain(q, k, v, **options)

    with mock.patch.object(F, 'scaled_dot_product_attention', watch), torch.no_grad():
        model(torch.tensor([ids]))
    shares = [[round(float(share), 3) for share in row] for row in maps[block - 1][head - 1]]
    told = {
        'run': 'config/train_darklyrics.py',
        'block': block,
        'head': head,
        'tokens': [tokenizer.decode([i]) for i in ids],
        'shares': shares,
    }
    with open(ATTENTION, 'w', encoding='utf-8', newline='\n') as f:
        f.write(json.dumps(told, ensure_ascii=False).replace('], [', '],\n[') + '\n')
    shutil.copy(os.path.join(out_dir, 'metrics.csv'), METRICS)


def draw(name: str, folder: str) -> str:
    """Draw one of PICTURES into the folder; returns the path."""
    path = os.path.join(folder, f'{name}.svg')
    with plt.rc_context(STYLE):
        figure = PICTURES[name]()
        figure.savefig(drawn := io.StringIO(), metadata={'Date': None, 'Creator': None})
        plt.close(figure)
    # two decimals of a point are plenty: a smaller file, and another processor's last digits do not show
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
