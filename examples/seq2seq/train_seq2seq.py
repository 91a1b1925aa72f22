"""Answer a line of verse with the next one: train the original Transformer, and ask it.

    python examples/seq2seq/train_seq2seq.py                       # the embedded songs: minutes
    python examples/seq2seq/train_seq2seq.py --line="The rain came down on the harbour wall"
    python examples/seq2seq/train_seq2seq.py --input=my_songs/     # .jsonl, .txt, .md
    python examples/seq2seq/train_seq2seq.py --init_from=resume    # on a CPU bit-exact

As in train.py, a step depends only on the options, the seed and its number. Ctrl-C saves.
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
import torch
from encoder_decoder import Answer, EncoderDecoder, EncoderDecoderConfig
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError, configure, given, run
from lyregpt import checkpoint
from lyregpt.device import pick_device
from lyregpt.logger import archive_run
from lyregpt.signals import SignalHandler
from lyregpt.text import find_files, pick_split, read_documents
from lyregpt.tokenizer import BPETokenizer, Tokenizer, from_state

DEMO = os.path.join(ROOT, 'data', 'darklyrics', 'demo.jsonl')
SHAPE = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'norm_first')
FREE = {'out_dir', 'init_from', 'device', 'line', 'width', 'length_penalty', 'max_iters'}
Pair = tuple[list[int], list[int]]  # ids of a line and of the next one, each with its end


@dataclasses.dataclass
class AnswerConfig:
    """The options; the comment behind each is its help. Raises ValueError."""

    out_dir: str = 'out-answer'  # checkpoints go here
    input: list[str] | None = None  # files and folders of songs; None: the embedded songs
    init_from: Literal['scratch', 'resume'] = 'scratch'  # resume: the run in out_dir
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
        if min(self.batch_size, self.eval_interval, self.warmup_iters, self.width) < 1:
            raise ValueError('batch_size, eval_interval, warmup_iters, width: at least 1')
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


def read_pairs(paths: list[str], seed: int = 1337) -> dict[str, list[tuple[str, str]]]:
    """(line, next line of its verse), each once: a tenth of the songs (or verses) for validation.

    A pair in both splits is for training only. Raises UserError for an empty split.
    """
    songs = [verses(''.join(song)) for song in read_documents(find_files(paths))]
    if len(songs) < 20:
        songs = [[verse] for song in songs for verse in song]
    found: dict[str, dict[tuple[str, str], None]] = {'train': {}, 'val': {}}
    for song in songs:
        split = pick_split('\n\n'.join('\n'.join(verse) for verse in song), 0.1, seed)
        found[split] |= dict.fromkeys(p for verse in song for p in itertools.pairwise(verse))
    val = [pair for pair in found['val'] if pair not in found['train']]
    if not found['train'] or not val:
        raise UserError(f'{", ".join(paths)}: too few lines: give more verses')
    return {'train': list(found['train']), 'val': val}


def tokenize(pairs: list[tuple[str, str]], tokenizer: Tokenizer, block_size: int) -> list[Pair]:
    """The pairs' ids; without pairs that have a line of more than `block_size` tokens."""
    eot = tokenizer.eot or 0
    ids = [([*tokenizer.encode(a), eot], [*tokenizer.encode(b), eot]) for a, b in pairs]
    return [pair for pair in ids if max(map(len, pair)) <= block_size]


def loss_of(model: EncoderDecoder, pairs: Sequence[Pair], smoothing: float = 0.0) -> torch.Tensor:
    """The mean loss; the decoder's input is the targets shifted right, after an end of line."""
    sides = ([torch.tensor(ids) for ids in side] for side in zip(*pairs))
    padded = (pad_sequence(side, batch_first=True, padding_value=-1) for side in sides)
    source, targets = (side.to(model.wte.weight.device) for side in padded)
    start = torch.full_like(targets[:, :1], pairs[0][1][-1])
    idx = torch.cat((start, targets[:, :-1].clamp(min=0)), dim=1)
    return model(source, idx, targets, smoothing)


@torch.no_grad()
def evaluate(model: EncoderDecoder, pairs: Sequence[Pair]) -> float:
    """Mean loss in nats per token."""
    model.eval()
    total = 0.0
    for start in range(0, len(pairs), 256):
        part = pairs[start : start + 256]
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
    """Train; returns the last validation loss. Raises UserError. Ctrl-C saves, then exits."""
    state: dict[str, Any] = {}
    if config.init_from == 'resume':
        path, state = load(config, best=False)
        checkpoint.set_aside_damaged(config.out_dir, path)
        new = {name: getattr(config, name) for name in given(config)}
        config = AnswerConfig(**state['config'] | new)
    pairs = read_pairs(config.input or [DEMO], seed=config.seed)
    tokenizer = BPETokenizer.train(itertools.chain(*pairs['train']), config.vocab_size)
    train_pairs = tokenize(pairs['train'], tokenizer, config.block_size)
    val_pairs = tokenize(pairs['val'], tokenizer, config.block_size)
    if not train_pairs or not val_pairs:
        raise UserError(f'block_size={config.block_size}: all pairs have a line with more tokens')

    torch.manual_seed(config.seed)
    model = EncoderDecoder(config.model_config(tokenizer.vocab_size))
    model.to(pick_device(config.device))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    progress: dict[str, Any] = {'iter_num': 0, 'best_val_loss': math.inf}
    if state:
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer']['adam'])
        progress = {name: state[name] for name in progress}
    else:
        archive_run(config.out_dir)
        os.makedirs(config.out_dir, exist_ok=True)
    print(f'pairs: {len(train_pairs):,}, and {len(val_pairs):,} for validation')

    signals = SignalHandler()
    val_loss = math.nan
    for step in range(progress['iter_num'], config.max_iters):
        torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)  # for the pairs and dropout
        chosen = torch.randint(len(train_pairs), (config.batch_size,)).tolist()
        # linear warmup, then 1/√step (Vaswani et al. 2017, section 5.3)
        warm = (step + 1) / config.warmup_iters
        optimizer.param_groups[0]['lr'] = config.learning_rate * min(warm, warm**-0.5)
        loss = loss_of(model, [train_pairs[i] for i in chosen], config.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress['iter_num'] = step + 1

        due, best = (step + 1) % config.eval_interval == 0 or step + 1 == config.max_iters, False
        if due:
            val_loss = evaluate(model, val_pairs)
            best = val_loss < progress['best_val_loss']
            progress['best_val_loss'] = min(val_loss, progress['best_val_loss'])
            print(f'step {step + 1:,}: training loss {loss:.4f}, validation loss {val_loss:.4f}')
        if due or signals.stop:
            state = progress | {'model': model.state_dict(), 'model_args': model.config.to_dict()}
            state |= {'config': dataclasses.asdict(config), 'tokenizer': tokenizer.state()}
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
    """(text, answer) to config.line, the best first."""
    path, state = load(config, best=True)
    model = EncoderDecoder(EncoderDecoderConfig(**state['model_args'])).eval()
    model.load_state_dict(state['model'])
    tokenizer, longest = from_state(state['tokenizer']), model.config.block_size
    eot = tokenizer.eot or 0
    ids = [*tokenizer.encode(config.line.strip()), eot]
    if len(ids) > longest:
        raise UserError(f'line: {len(ids)} tokens with its end, {path} reads at most {longest}')
    beams = model.beam(torch.tensor([ids]), eot, longest, config.width, config.length_penalty)
    return [(tokenizer.decode([i for i in found.ids if i != eot]), found) for found in beams[0]]


def main() -> None:
    """Train, or answer a line, as the command line says."""
    config = configure(AnswerConfig, description='Train an encoder–decoder on lines; ask it.')
    if 'line' not in given(config):
        train(config)
        return
    for text, found in answer(config):
        print(f'score {found.score(config.length_penalty):6.2f}, log p {found.log_p:6.2f}  {text}')


if __name__ == '__main__':
    run(main)
