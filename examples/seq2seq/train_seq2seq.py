"""Answer a line of verse with the next: train the original Transformer (examples/seq2seq/encoder_decoder.py) on the lines of songs, and ask it.

    python examples/seq2seq/train_seq2seq.py                                              (a minute or two on 2 CPU cores, on the embedded songs)
    python examples/seq2seq/train_seq2seq.py --line="The rain came down on the harbour wall"
    python examples/seq2seq/train_seq2seq.py --input=my_songs/ --out_dir=out-mine-answer  (your own: .jsonl, .txt, .md, an empty line between verses)
    python examples/seq2seq/train_seq2seq.py --init_from=resume                           (go on where it stopped, on a CPU to the bit)

The habits are train.py's: a step depends on the knobs, the seed and its number alone; validation reads the whole split; checkpoints
are whole or absent; Ctrl-C saves. One process, float32: the data is small.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from lyregpt import threads  # noqa: E402  before torch: it decides how torch's threads wait

# isort: split
import numpy as np
import torch
from encoder_decoder import Answer, EncoderDecoder, EncoderDecoderConfig
from tqdm import tqdm

from configurator import UserError, configure, given, run
from lyregpt import checkpoint
from lyregpt.dataset import permute
from lyregpt.device import pick_device
from lyregpt.logger import Log
from lyregpt.text import find_files, pick_split, read_documents
from lyregpt.tokenizer import BPETokenizer, Tokenizer, from_state
from train import catch_signals, clock

DEMO = os.path.join(ROOT, 'data', 'darklyrics', 'demo.jsonl')
Pair = tuple[Sequence[int], Sequence[int]]  # the ids of a line and of the next, each with its end


@dataclass
class AnswerConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # Where things are
    out_dir: str = 'out-answer'  # checkpoints, metrics.csv, train.log and config.json go here
    input: list[str] | None = (
        None  # files and folders of songs, as in --input=a.jsonl,songs/; None: the embedded songs
    )
    text_field: str = ''  # for .jsonl: which field holds the words; '': the first there is of text, lyrics, content
    init_from: Literal['scratch', 'resume'] = (
        'scratch'  # begin anew, or go on where out_dir's run stopped
    )

    # Answering
    line: str = ''  # answer this line with the model in out_dir; not given: train one
    width: int = 5  # answers that beam search follows, and shows
    length_penalty: float = 0.6  # above 0: longer answers are forgiven their lower probability

    # Model (see examples/seq2seq/encoder_decoder.py)
    vocab_size: int = 1024  # of the BPE that is trained on the songs
    block_size: int = 48  # most tokens of a line; pairs with a longer one are left out
    n_layer: int = 2  # blocks of the encoder, and of the decoder
    n_head: int = 4  # attention heads a block
    n_embd: int = 128  # width
    dropout: float = 0.2  # as strong as it is because there is so little text
    norm_first: bool = False  # False: norms behind the sums, as in the paper; True: before the layers, as in the GPT

    # Training
    batch_size: int = 32  # pairs a step
    learning_rate: float = 4e-3  # the highest; Adam's betas are the paper's
    warmup_iters: int = (
        100  # steps of straight rise; from there on the rate falls as 1/√step, as in the paper
    )
    max_iters: int = 1000  # steps in all
    label_smoothing: float = (
        0.1  # share of a target's probability that is spread over the vocabulary
    )
    eval_interval: int = 100  # steps between evaluations, which are checkpoints too
    log_interval: int = 20  # steps between log lines
    eval_only: bool = False  # evaluate the model in out_dir and stop

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    threads: int | Literal['auto'] = (
        'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per core that affinity and container limits allow; resuming keeps it
    )
    seed: int = 1337  # of initialization, split, order and dropout
    wandb_log = tensorboard_log = False  # lyregpt/logger.py asks; no knobs here

    def __post_init__(self) -> None:
        threads.check_threads(self.threads)
        for names, ok, expected in (
            (
                'batch_size eval_interval log_interval warmup_iters width',
                lambda v: v >= 1,
                'at least 1',
            ),
            ('max_iters length_penalty', lambda v: v >= 0, '0 or more'),
            ('block_size', lambda v: v >= 2, 'at least 2: a token and the end'),
            ('learning_rate', lambda v: v > 0, 'more than 0'),
            ('label_smoothing', lambda v: 0 <= v < 1, 'a share from 0 to below 1'),
        ):
            for name in names.split():
                if not ok(getattr(self, name)):
                    raise ValueError(f'{name}={getattr(self, name)}: expected {expected}')
        self.model_config(vocab_size=1)

    def model_config(self, vocab_size: int) -> EncoderDecoderConfig:
        """The model that these knobs describe. Raises ValueError if they contradict one another."""
        names = ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'norm_first')
        return EncoderDecoderConfig(
            vocab_size=vocab_size, **{name: getattr(self, name) for name in names}
        )


OF_NOW = (
    'out_dir',
    'init_from',
    'line',
    'width',
    'length_penalty',
    'eval_only',
    'device',
)  # knobs that a checkpoint does not bring
OF_THE_MODEL = (
    'vocab_size',
    'block_size',
    'n_layer',
    'n_head',
    'n_embd',
    'norm_first',
    'seed',
)  # knobs that a checkpoint settles


# -----------------------------------------------------------------------------
# Data: lines and the next ones


def verses(song: str) -> list[list[str]]:
    """The song's verses, each a list of lines. An empty line ends a verse, and so does a mark like [Chorus]."""
    pieces = re.split(r'\n\s*\n|^[^\S\n]*\[[^\]\n]*\][^\S\n]*$', song, flags=re.MULTILINE)
    return [
        [line.strip() for line in piece.split('\n') if line.strip()]
        for piece in pieces
        if piece.strip()
    ]


def read_pairs(
    paths: list[str], val_fraction: float = 0.1, seed: int = 1337, text_field: str = ''
) -> dict[str, list[tuple[str, str]]]:
    """(line, the next line of its verse) by split, each pair once. Raises UserError if a split stays empty.

    Songs are split, not lines; of fewer than 20 songs, the verses. A pair that both splits have counts for training alone.
    """
    documents = [
        verses(''.join(song)) for song in read_documents(find_files(paths), text_field=text_field)
    ]
    if len(documents) < 20:
        documents = [[verse] for document in documents for verse in document]
    found: dict[str, dict[tuple[str, str], None]] = {'train': {}, 'val': {}}
    for document in documents:
        split = found[
            pick_split('\n\n'.join('\n'.join(verse) for verse in document), val_fraction, seed)
        ]
        split.update((pair, None) for verse in document for pair in itertools.pairwise(verse))
    pairs = {
        'train': list(found['train']),
        'val': [pair for pair in found['val'] if pair not in found['train']],
    }
    for name, some in pairs.items():
        if not some:
            raise UserError(
                f'{", ".join(paths)}: no line of the {name} split has a next one: give more verses, with an empty line between them'
            )
    return pairs


def tokenize(pairs: list[tuple[str, str]], tokenizer: Tokenizer, block_size: int) -> list[Pair]:
    """Their ids, each line with its end; pairs with a line of more than `block_size` tokens are left out."""
    sides = [
        [[*ids.tolist(), tokenizer.eot] for ids in tokenizer.encode_batch(lines)]
        for lines in zip(*pairs)
    ]
    return [pair for pair in zip(*sides) if max(map(len, pair)) <= block_size]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of ids as one tensor (B, length of the longest), int64, with -1 behind their ends."""
    out = torch.full((len(rows), max(map(len, rows))), -1)
    for row, ids in zip(out, rows):
        row[: len(ids)] = torch.tensor(ids)
    return out


def batch(
    pairs: Sequence[Pair], eot: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources (B, S), what the decoder reads, and its targets, (B, T) both: the targets shifted right, behind the end of another line."""
    source, targets = (padded(side).to(device) for side in zip(*pairs))
    idx = torch.cat((torch.full_like(targets[:, :1], eot), targets[:, :-1].clamp(min=0)), dim=1)
    return source, idx, targets


def of_step(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """The numbers, below n, of the pairs of a step, a pure function: every epoch visits each once, in an order drawn from (seed, epoch)."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    return np.concatenate(
        [permute(places[places // n == epoch] % n, n, seed, epoch) for epoch in epochs]
    ).tolist()


def baselines(train: Sequence[Pair], val: Sequence[Pair], vocab_size: int) -> tuple[float, float]:
    """Nats per token of the validation answers by token counts alone, and by counts of pairs of tokens mixed with those.

    The bigrams' share is the one of nine that suits the validation split best, which flatters them.
    """
    tokens, before, both = Counter[int](), Counter[int](), Counter[tuple[int, int]]()
    for _, target in train:
        tokens.update(target)
        steps = list(itertools.pairwise([target[-1], *target]))
        before.update(a for a, _ in steps)
        both.update(steps)
    steps = [step for _, target in val for step in itertools.pairwise([target[-1], *target])]
    one = np.array([(tokens[b] + 1) / (tokens.total() + vocab_size) for _, b in steps])
    two = np.array([both[a, b] / max(1, before[a]) for a, b in steps])
    return float(-np.log(one).mean()), min(
        float(-np.log(share * two + (1 - share) * one).mean()) for share in np.arange(1, 10) / 10
    )


# -----------------------------------------------------------------------------
# Training


def load(config: AnswerConfig, best: bool) -> tuple[str, dict[str, Any]]:
    """(path, state) of the checkpoint in out_dir. Raises UserError if there is none, another model's, or not what the knobs that were given say."""
    if not os.path.exists(config.out_dir) or not checkpoint.candidates(config.out_dir, best):
        raise UserError(
            f'{config.out_dir}: holds no checkpoint; train first: python examples/seq2seq/train_seq2seq.py --out_dir={config.out_dir}'
        )
    path, state = checkpoint.load_from(config.out_dir, best, optimizer=True, any_model=True)
    if 'norm_first' not in state['model_args']:
        raise UserError(
            f'{path}: is a GPT, not an encoder–decoder; examples/seq2seq/train_seq2seq.py answers with what it trained'
        )
    for name in OF_THE_MODEL:
        if name in given(config) and getattr(config, name) != state['config'].get(name):
            raise UserError(
                f'{name}={getattr(config, name)}, but {path} has {name}={state["config"].get(name)}: leave {name} out, or start anew'
            )
    return path, state


def build(state: dict[str, Any], path: str, **overrides: Any) -> EncoderDecoder:
    """The checkpoint's model with its weights in. Raises UserError if they do not fit."""
    try:
        model = EncoderDecoder(EncoderDecoderConfig(**state['model_args'] | overrides))
        model.load_state_dict(state['model'])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f'{path}: its weights do not fit its model_args: {str(error).splitlines()[-1].strip()}'
        ) from None
    return model


def learning_rate(config: AnswerConfig, step: int) -> float:
    """Up in a straight line for `warmup_iters` steps, then down as 1/√step (Vaswani et al. 2017, section 5.3)."""
    return config.learning_rate * min(
        (step + 1) / config.warmup_iters, math.sqrt(config.warmup_iters / (step + 1))
    )


@torch.no_grad()
def evaluate(model: EncoderDecoder, pairs: Sequence[Pair], eot: int, shift: int = 0) -> float:
    """Mean loss in nats per token over all pairs; with `shift`, each answer stands beside the source of the pair so many places on."""
    was_training, device = model.training, model.wte.weight.device
    model.eval()
    total, count = 0.0, 0
    mixed = [(pairs[(i + shift) % len(pairs)][0], target) for i, (_, target) in enumerate(pairs)]
    for at in range(0, len(mixed), 256):
        source, idx, targets = batch(mixed[at : at + 256], eot, device)
        n = int((targets >= 0).sum())
        total, count = total + float(model(source, idx, targets)) * n, count + n
    model.train(was_training)
    return total / count


def train(config: AnswerConfig) -> dict[str, Any]:
    """Train as `config` says; returns step, val_loss, other_loss (with other lines' sources, NaN with one validation pair), best_val_loss.

    Raises UserError for what the user can mend. Ctrl-C or SIGTERM saves a checkpoint and raises SystemExit 130 or 143.
    """
    # -------------------------------------------------------------------------
    # Where do we start, and on what
    state: dict[str, Any] = {}
    set_now = given(config)
    if config.init_from == 'resume' or config.eval_only:
        path, state = load(config, best=config.eval_only)
        if not config.eval_only:
            checkpoint.set_aside_damaged(config.out_dir, path)
        names = {f.name for f in dataclasses.fields(AnswerConfig)} - set_now - set(OF_NOW)
        config = dataclasses.replace(
            config, **{k: v for k, v in state['config'].items() if k in names}
        )
    n_threads = threads.set_threads(config.threads)
    pairs = read_pairs(config.input or [DEMO], seed=config.seed, text_field=config.text_field)
    tokenizer = (
        from_state(state['tokenizer'])
        if state
        else BPETokenizer.train(
            (line for pair in pairs['train'] for line in pair), config.vocab_size
        )
    )
    eot = tokenizer.eot or 0
    train_pairs, val_pairs = (
        tokenize(pairs[name], tokenizer, config.block_size) for name in ('train', 'val')
    )
    left_out = sum(map(len, pairs.values())) - len(train_pairs) - len(val_pairs)
    if not train_pairs or not val_pairs:
        raise UserError(
            f'block_size={config.block_size}: all pairs have a line with more tokens; give a larger one, or verses and not prose'
        )
    digest = hashlib.sha256(json.dumps([train_pairs, val_pairs]).encode()).hexdigest()
    n_bytes = sum(
        len(tokenizer.decode(target[:-1]).encode()) + 1 for _, target in val_pairs
    )  # a line's end is a byte
    ratio = n_bytes / sum(len(target) for _, target in val_pairs)

    torch.manual_seed(config.seed)
    try:
        device = pick_device(config.device)
        model_config = config.model_config(tokenizer.vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    if state:
        model = build(state, path, dropout=config.dropout)
        if digest != state['pairs']:
            raise UserError(
                f'{", ".join(config.input or [DEMO])}: not the lines that {path} was trained on; give those, or start anew'
            )
    else:
        model = EncoderDecoder(model_config)
    model.to(device)
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-9,
        fused=device.type in ('cpu', 'cuda'),
    )
    step, tokens, seconds_before, best_val_loss, last_eval = 0, 0, 0.0, math.inf, -1
    losses: list[torch.Tensor] = []  # since the last log line
    if state:
        step, tokens, seconds_before = state['iter_num'], state['tokens'], state.get('seconds', 0.0)
        best_val_loss, last_eval = state['best_val_loss'], state['last_eval']
        losses = [torch.tensor(loss, device=device) for loss in state['losses']]
        if 'optimizer' in state:
            optimizer.load_state_dict(state['optimizer']['adam'])
    del state

    # -------------------------------------------------------------------------
    # What the outside sees
    log = None if config.eval_only else Log(config, step, tokenizer)
    say = log.say if log else print
    say(
        f'model: encoder–decoder, {sum(p.numel() for p in model.parameters()):,} parameters, {config.n_layer} + {config.n_layer} layers, '
        f'{config.n_head} heads, {config.n_embd} wide, vocabulary {tokenizer.vocab_size:,}'
    )
    say(
        f'data: {len(train_pairs):,} pairs of lines for training, {len(val_pairs):,} for validation, {left_out} left out as too long; '
        f'all {config.max_iters:,} steps read them {config.max_iters * config.batch_size / len(train_pairs):.1f} times'
    )
    unigram, bigram = baselines(train_pairs, val_pairs, tokenizer.vocab_size)
    say(
        f'to beat, by counting in the training lines: {unigram:.4f} nats per token (tokens), {bigram:.4f} (tokens after tokens)'
    )

    def figures() -> tuple[float, float]:
        """Validation loss, and the same with sources from elsewhere (NaN if there is no other): what the source is worth."""
        n = len(val_pairs)
        return evaluate(model, val_pairs, eot), evaluate(
            model, val_pairs, eot, shift=max(1, n // 2)
        ) if n > 1 else math.nan

    def told(loss: float, other: float) -> str:
        bits = loss / ratio / math.log(2)
        elsewhere = '' if math.isnan(other) else f'; with other lines to answer {other:.4f}'
        return f'validation loss {loss:.4f}, perplexity {math.exp(loss):.1f}, {bits:.3f} bits per byte{elsewhere}'

    if config.eval_only:
        val_loss, other_loss = figures()
        say(told(val_loss, other_loss))
        return {
            'step': step,
            'val_loss': val_loss,
            'other_loss': other_loss,
            'best_val_loss': best_val_loss,
        }
    assert log

    def save(best: bool = False) -> None:
        """Write ckpt.pt, and with `best` best.pt. Raises OSError (a full disk), with the last good files untouched."""
        state = {
            'model': model.state_dict(),
            'model_args': model.config.to_dict(),
            'iter_num': step,
            'best_val_loss': best_val_loss,
            'config': dataclasses.asdict(config) | {'threads': n_threads},
            'tokenizer': tokenizer.state(),
            'meta': {'bytes_per_token': ratio},
            'pairs': digest,
            'tokens': tokens,
            'last_eval': last_eval,
            'losses': [float(loss) for loss in losses],
            'seconds': seconds_before + time.perf_counter() - began,
        }
        log.sync()  # its rows up to this step are on the disk before the checkpoint that counts on them
        if best:
            checkpoint.save(os.path.join(config.out_dir, 'best.pt'), state)
        checkpoint.save(
            os.path.join(config.out_dir, 'ckpt.pt'),
            state | {'optimizer': {'adam': optimizer.state_dict()}},
            keep_previous=True,
        )

    # -------------------------------------------------------------------------
    # The loop
    asked: dict[str, Any] = {'signal': 0, 'save': 0, 'at': 0}
    restore = catch_signals(asked)
    bar = tqdm(
        total=config.max_iters,
        initial=min(step, config.max_iters),
        disable=not sys.stderr.isatty(),
        unit='step',
        dynamic_ncols=True,
    )
    began = last_log = time.perf_counter()
    tokens_at_log, val_loss, other_loss = tokens, math.nan, math.nan
    model.train()
    try:
        while True:
            if step != last_eval and (
                step >= config.max_iters or step > 0 and step % config.eval_interval == 0
            ):
                (val_loss, other_loss), last_eval = figures(), step
                if not math.isfinite(val_loss):
                    raise UserError(
                        f'the loss became NaN or infinite by step {step}: begin anew with a lower learning_rate (now {config.learning_rate})'
                    )
                better = val_loss < best_val_loss
                best_val_loss = min(val_loss, best_val_loss)
                seconds = seconds_before + time.perf_counter() - began
                log.row(
                    step=step,
                    tokens=tokens,
                    seconds=seconds,
                    val_loss=val_loss,
                    val_bpb=val_loss / ratio / math.log(2),
                )
                say(
                    f'step {step:,}: {told(val_loss, other_loss)} ({"the best so far" if better else f"best {best_val_loss:.4f}"})'
                )
                save(best=better)
                last_log, tokens_at_log = time.perf_counter(), tokens
            if step >= config.max_iters:
                break
            lr = learning_rate(config, step)
            for group in optimizer.param_groups:
                group['lr'] = lr
            torch.manual_seed(
                (config.seed * 1_000_003 + step) % 2**63
            )  # dropout's dice are a function of the step, as the pairs are
            chosen = of_step(step, config.batch_size, len(train_pairs), config.seed)
            source, idx, targets = batch([train_pairs[i] for i in chosen], eot, device)
            loss = model(source, idx, targets, config.label_smoothing)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            step += 1
            tokens += sum(len(train_pairs[i][1]) for i in chosen)
            bar.update(1)
            if step % config.log_interval == 0:
                train_loss, now = float(torch.stack(losses).mean()), time.perf_counter()
                losses.clear()
                speed, last_log, tokens_at_log = (
                    (tokens - tokens_at_log) / (now - last_log),
                    now,
                    tokens,
                )
                seconds = seconds_before + now - began
                log.row(
                    step=step,
                    tokens=tokens,
                    seconds=seconds,
                    train_loss=train_loss,
                    lr=lr,
                    grad_norm=float(grad_norm),
                    tokens_per_second=round(speed),
                )
                say(
                    f'step {step:,}/{config.max_iters:,}: loss {train_loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s',
                    bar.disable,
                )
            if asked['signal'] or asked['save']:
                save()
                asked['save'] = 0
            if asked['signal']:
                say(
                    f'{signal.Signals(asked["signal"]).name}: saved {config.out_dir}/ckpt.pt at step {step:,}; go on with --init_from=resume'
                )
                sys.exit(128 + asked['signal'])
        spent = clock(seconds_before + time.perf_counter() - began)
        say(
            f'done: {step:,} steps in {spent}, best validation loss {best_val_loss:.4f}; ask it: python examples/seq2seq/train_seq2seq.py --out_dir={config.out_dir} --line="…"'
        )
    finally:
        bar.close()
        restore()
        log.close()
    return {
        'step': step,
        'val_loss': val_loss,
        'other_loss': other_loss,
        'best_val_loss': best_val_loss,
    }


# -----------------------------------------------------------------------------
# Answering


def answer(
    model: EncoderDecoder, tokenizer: Tokenizer, line: str, width: int, length_penalty: float
) -> list[tuple[str, Answer]]:
    """The greedy answer to a line, then the beam's, best first, each as text and as what the model made. Raises UserError if the line is too long."""
    eot, longest = tokenizer.eot or 0, model.config.block_size
    ids = [*tokenizer.encode(line.strip()), eot]
    if len(ids) > longest:
        raise UserError(
            f'the line has {len(ids) - 1} tokens; this model reads at most {longest - 1} (block_size, with the end)'
        )
    source = padded([ids]).to(model.wte.weight.device)
    found = (
        model.greedy(source, eot, longest)
        + model.beam(source, eot, longest, width, length_penalty)[0]
    )
    return [(tokenizer.decode(a.ids[:-1] if a.ids[-1] == eot else a.ids), a) for a in found]


def main() -> None:
    """Train, or answer a line, as the command line says."""
    config = configure(
        AnswerConfig,
        description='Train an encoder–decoder to answer a line of verse with the next; ask it with --line.',
    )
    if 'line' not in given(config):
        train(config)
        return
    if not config.line.strip():
        raise UserError(
            'line is empty: give a line to answer, as in --line="The rain came down", or leave it out to train'
        )
    if config.eval_only or config.init_from == 'resume':
        raise UserError(
            f'--line answers with the model in {config.out_dir}, so it goes with neither --eval_only nor --init_from=resume: leave one out'
        )
    threads.set_threads(config.threads)
    path, state = load(config, best=True)
    try:
        model = build(state, path, dropout=0.0).to(pick_device(config.device))
    except ValueError as error:
        raise UserError(str(error)) from None
    print(
        f'{path}: {sum(p.numel() for p in model.parameters()):,} parameters, step {state["iter_num"]:,}',
        file=sys.stderr,
    )
    for i, (text, found) in enumerate(
        answer(
            model, from_state(state['tokenizer']), config.line, config.width, config.length_penalty
        )
    ):
        score = f', score {found.score(config.length_penalty):.2f}' if i else ''
        print(f'{f"beam {i}" if i else "greedy"}  log p {found.log_p:.2f}{score}  {text}')


if __name__ == '__main__':
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    run(main)
