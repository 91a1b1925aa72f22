"""Answer a line of verse with the next one: train the original Transformer, and ask it.

    python examples/seq2seq/train_seq2seq.py                       # the embedded songs: minutes
    python examples/seq2seq/train_seq2seq.py --line="The rain came down on the harbour wall"
    python examples/seq2seq/train_seq2seq.py --input=my_songs/     # .jsonl, .txt, .md
    python examples/seq2seq/train_seq2seq.py --init_from=resume    # on a CPU bit-exact

As in train.py, a step depends only on the options, the seed and its number, and validation reads
the whole split. Ctrl-C saves a checkpoint. One process, float32.
"""

import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
import lyregpt.threads  # noqa: F401  before torch: it decides how torch's threads wait

# isort: split
import numpy as np
import torch
from encoder_decoder import Answer, EncoderDecoder, EncoderDecoderConfig
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError, configure, given, run
from lyregpt import checkpoint
from lyregpt.dataset import permute
from lyregpt.device import pick_device
from lyregpt.logger import archive_run
from lyregpt.signals import SignalHandler
from lyregpt.text import find_files, pick_split, read_documents
from lyregpt.tokenizer import BPETokenizer, Tokenizer, from_state

DEMO = os.path.join(ROOT, 'data', 'darklyrics', 'demo.jsonl')
SHAPE = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'norm_first')
FREE = {'out_dir', 'init_from', 'device', 'line', 'width', 'length_penalty', 'max_iters'}
Pair = tuple[list[int], list[int]]  # the ids of a line and of the next one, each with its end


@dataclasses.dataclass
class AnswerConfig:
    """The options; the comment behind each is its help. Raises ValueError for an invalid value."""

    out_dir: str = 'out-answer'  # checkpoints, metrics.csv and config.json go here
    input: list[str] | None = None  # files and folders of songs; None: the embedded songs
    init_from: Literal['scratch', 'resume'] = 'scratch'  # or resume the run in out_dir
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    seed: int = 1337  # of initialization, split, order and dropout

    # Answering
    line: str = ''  # answer this line with the model in out_dir instead of training one
    width: int = 5  # answers that beam search keeps, and shows
    length_penalty: float = 0.6  # above 0: favors longer answers

    # Model (see encoder_decoder.py)
    vocab_size: int = 1024  # of the BPE that is trained on the songs
    block_size: int = 48  # the most tokens of a line; pairs with a longer one are left out
    n_layer: int = 2  # blocks of the encoder, and of the decoder
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # width
    dropout: float = 0.2  # high, because there is so little text
    norm_first: bool = False  # norms before the layers, as in the GPT

    # Training
    batch_size: int = 32  # pairs per step
    learning_rate: float = 4e-3  # the highest; Adam's betas are the paper's
    warmup_iters: int = 100  # steps of linear warmup; then the rate falls as 1/√step
    max_iters: int = 1000  # steps in all
    label_smoothing: float = 0.1  # part of a target's probability spread over the vocabulary
    eval_interval: int = 100  # steps between evaluations, each of which saves a checkpoint

    def __post_init__(self) -> None:
        least = min(self.batch_size, self.eval_interval, self.warmup_iters, self.width)
        if least < 1 or self.block_size < 2:
            raise ValueError(
                'batch_size, eval_interval, warmup_iters and width: expected at least 1; '
                'block_size: at least 2'
            )
        self.model_config(vocab_size=1)

    def model_config(self, vocab_size: int) -> EncoderDecoderConfig:
        """The model that these options describe. Raises ValueError if they are inconsistent."""
        shape: dict[str, Any] = {name: getattr(self, name) for name in SHAPE}
        return EncoderDecoderConfig(vocab_size=vocab_size, **shape)


def verses(song: str) -> list[list[str]]:
    """The song's verses, as lists of lines; an empty line, or a mark like [Chorus], ends one."""
    pieces = re.split(r'\n\s*\n|^[^\S\n]*\[[^\]\n]*\][^\S\n]*$', song, flags=re.MULTILINE)
    lines = [[line.strip() for line in piece.split('\n') if line.strip()] for piece in pieces]
    return [verse for verse in lines if verse]


def read_pairs(
    paths: list[str], val_fraction: float = 0.1, seed: int = 1337
) -> dict[str, list[tuple[str, str]]]:
    """(line, next line of its verse) by split, each pair once. Raises UserError for an empty split.

    Songs are split, or, if there are fewer than 20, verses. A pair in both is for training only.
    """
    songs = [verses(''.join(song)) for song in read_documents(find_files(paths))]
    if len(songs) < 20:
        songs = [[verse] for song in songs for verse in song]
    found: dict[str, dict[tuple[str, str], None]] = {'train': {}, 'val': {}}
    for song in songs:
        split = pick_split('\n\n'.join('\n'.join(verse) for verse in song), val_fraction, seed)
        found[split] |= dict.fromkeys(p for verse in song for p in itertools.pairwise(verse))
    val = [pair for pair in found['val'] if pair not in found['train']]
    if not found['train'] or not val:
        raise UserError(
            f'{", ".join(paths)}: too few lines that have a next one for a training and a '
            'validation split: give more verses, with an empty line between them'
        )
    return {'train': list(found['train']), 'val': val}


def tokenize(pairs: list[tuple[str, str]], tokenizer: Tokenizer, block_size: int) -> list[Pair]:
    """The pairs' ids; without pairs that have a line of more than `block_size` tokens."""
    eot = tokenizer.eot or 0
    ids = [([*tokenizer.encode(a), eot], [*tokenizer.encode(b), eot]) for a, b in pairs]
    return [pair for pair in ids if max(map(len, pair)) <= block_size]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of ids as an int64 tensor (B, length of the longest), padded with -1."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)


def loss_of(model: EncoderDecoder, pairs: Sequence[Pair], smoothing: float = 0.0) -> torch.Tensor:
    """The mean loss; the decoder's input is the targets shifted right, after an end of line."""
    source, targets = (padded(side).to(model.wte.weight.device) for side in zip(*pairs))
    start = torch.full_like(targets[:, :1], pairs[0][1][-1])
    idx = torch.cat((start, targets[:, :-1].clamp(min=0)), dim=1)
    return model(source, idx, targets, smoothing)


def pairs_of_step(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """The indices of a step's pairs: every epoch has each once, in an order of (seed, epoch)."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    parts = [permute(places[places // n == epoch] % n, n, seed, epoch) for epoch in epochs]
    return np.concatenate(parts).tolist()


def learning_rate(config: AnswerConfig, step: int) -> float:
    """Linear warmup, then 1/√step (Vaswani et al. 2017, section 5.3)."""
    progress = (step + 1) / config.warmup_iters
    return config.learning_rate * min(progress, progress**-0.5)


@torch.no_grad()
def evaluate(model: EncoderDecoder, pairs: Sequence[Pair], shift: int = 0) -> float:
    """Mean loss in nats per token; with `shift`, each answer has the source of another pair."""
    model.eval()
    sources = [source for source, _ in pairs]
    mixed = list(zip(sources[shift:] + sources[:shift], (target for _, target in pairs)))
    total = 0.0
    for start in range(0, len(mixed), 256):
        part = mixed[start : start + 256]
        total += float(loss_of(model, part)) * sum(len(target) for _, target in part)
    model.train()
    return total / sum(len(target) for _, target in pairs)


def load(config: AnswerConfig, best: bool) -> tuple[str, dict[str, Any]]:
    """(path, state) of the checkpoint in out_dir. Raises UserError if the options contradict it."""
    path, state = checkpoint.load_from(config.out_dir, best, optimizer=True, any_model=True)
    if 'norm_first' not in state['model_args']:
        raise UserError(f'{path}: is a GPT, not an encoder–decoder')
    for name in given(config) - FREE:
        if getattr(config, name) != state['config'][name]:
            raise UserError(f'{name}: {path} has {state["config"][name]!r}; leave {name} out')
    return path, state


def train(config: AnswerConfig) -> float:
    """Train as `config` says; returns the last validation loss.

    Raises UserError. Ctrl-C or SIGTERM saves a checkpoint and raises SystemExit.
    """
    state: dict[str, Any] = {}
    if config.init_from == 'resume':
        path, state = load(config, best=False)
        checkpoint.set_aside_damaged(config.out_dir, path)
        new = {name: getattr(config, name) for name in given(config)}
        config = AnswerConfig(**state['config'] | new)
    pairs = read_pairs(config.input or [DEMO], seed=config.seed)
    tokenizer = BPETokenizer.train(itertools.chain(*pairs['train']), config.vocab_size)
    train_pairs, val_pairs = (
        tokenize(pairs[name], tokenizer, config.block_size) for name in ('train', 'val')
    )
    if not train_pairs or not val_pairs:
        raise UserError(f'block_size={config.block_size}: all pairs have a line with more tokens')

    torch.manual_seed(config.seed)
    model = EncoderDecoder(config.model_config(tokenizer.vocab_size))
    model.to(pick_device(config.device))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    progress: dict[str, Any] = {'iter_num': 0, 'best_val_loss': math.inf, 'losses': []}
    if state:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer']['adam'])
        progress = {name: state[name] for name in progress}
    else:
        archive_run(config.out_dir)
        os.makedirs(config.out_dir, exist_ok=True)
    print(
        f'{sum(p.numel() for p in model.parameters()):,} parameters; '
        f'pairs: {len(train_pairs):,} + {len(val_pairs):,} for validation'
    )

    signals = SignalHandler()
    val_loss = math.nan
    for step in range(progress['iter_num'], config.max_iters):
        torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)  # for dropout
        optimizer.param_groups[0]['lr'] = learning_rate(config, step)
        chosen = pairs_of_step(step, config.batch_size, len(train_pairs), config.seed)
        loss = loss_of(model, [train_pairs[i] for i in chosen], config.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress['losses'].append(float(loss.detach()))
        progress['iter_num'] = step + 1

        due, best = (step + 1) % config.eval_interval == 0 or step + 1 == config.max_iters, False
        if due:
            val_loss = evaluate(model, val_pairs)
            best = val_loss < progress['best_val_loss']
            progress['best_val_loss'] = min(val_loss, progress['best_val_loss'])
            other = evaluate(model, val_pairs, shift=len(val_pairs) // 2)
            train_loss = sum(progress['losses']) / len(progress['losses'])
            print(
                f'step {step + 1:,}: training loss {train_loss:.4f}, validation loss '
                f'{val_loss:.4f}, with the sources of other lines {other:.4f}'
            )
            progress['losses'] = []
        if due or signals.stop:
            state = progress | {
                'model': model.state_dict(),
                'model_args': model.config.to_dict(),
                'config': dataclasses.asdict(config),
                'tokenizer': tokenizer.state(),
            }
            if best:
                checkpoint.save(os.path.join(config.out_dir, 'best.pt'), state)
            state['optimizer'] = {'adam': optimizer.state_dict()}
            checkpoint.save(os.path.join(config.out_dir, 'ckpt.pt'), state, keep_previous=True)
        if signals.stop:
            print(f'saved {config.out_dir}/ckpt.pt; continue with --init_from=resume')
            sys.exit(128 + signals.stop)
    signals.restore()
    return val_loss


def answer(config: AnswerConfig) -> list[tuple[str, Answer]]:
    """(text, answer) to config.line: the greedy one, then the beam's, best first."""
    path, state = load(config, best=True)
    model = EncoderDecoder(EncoderDecoderConfig(**state['model_args'])).eval()
    model.load_state_dict(state['model'])
    tokenizer, longest = from_state(state['tokenizer']), model.config.block_size
    eot = tokenizer.eot or 0
    ids = [*tokenizer.encode(config.line.strip()), eot]
    if len(ids) > longest:
        raise UserError(f'line: {len(ids)} tokens with its end, {path} reads at most {longest}')
    source = torch.tensor([ids])
    answers = model.greedy(source, eot, longest)
    answers += model.beam(source, eot, longest, config.width, config.length_penalty)[0]
    return [(tokenizer.decode([i for i in found.ids if i != eot]), found) for found in answers]


def main() -> None:
    """Train, or answer a line, as the command line says."""
    config = configure(AnswerConfig, description='Train an encoder–decoder on lines; ask it.')
    if 'line' not in given(config):
        train(config)
        return
    for number, (text, found) in enumerate(answer(config)):
        name, score = 'greedy', ''
        if number:
            name, score = f'beam {number}', f', score {found.score(config.length_penalty):.2f}'
        print(f'{name}  log p {found.log_p:.2f}{score}  {text}')


if __name__ == '__main__':
    run(main)
