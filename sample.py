"""Write text with a trained model.

    python sample.py --out_dir=out-darklyrics
    python sample.py --out_dir=out-darklyrics --artist="Griddlemoth" --title="Ash in the Butter"
    python sample.py --out_dir=out-darklyrics --start="The rain" --num_samples=5 --temperature=0.9
    python sample.py --out_dir=out-darklyrics --originality --avoid_copying=5
    python sample.py --out_dir=out-darklyrics --interactive

The first sample streams to the terminal while it is written; all samples are written as one batch, each with its own
dice, so that sample i is the same whatever --num_samples is.
"""

import copy
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from lyregpt import threads  # before torch: it decides how torch's threads wait

# isort: split
import torch
import torch.nn as nn

from configurator import UserError, configure, run
from lyregpt import checkpoint
from lyregpt.device import can_compile, pick_device, pick_dtype
from lyregpt.originality import CopyFilter, Index, index_of
from lyregpt.pretrained import from_pretrained, is_pretrained
from lyregpt.text import song_header
from lyregpt.tokenizer import Tokenizer, of_pretrained
from model import GPT, Int8Linear, check_sampling, packed


@dataclass
class SampleConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # Which model
    out_dir: str = 'out'  # a folder that train.py wrote (best.pt is taken before ckpt.pt), or a checkpoint file
    init_from: str = 'resume'  # resume: the model in out_dir; or gpt2 … gpt2-xl, or a Hugging Face folder (GPT-2, Qwen3; lyregpt/export.py makes them)

    # What to continue
    start: str = ''  # the text to continue, or FILE:prompt.txt; '': the beginning of a new document
    artist: str = ''  # for a model of lyrics: a song in the manner of this artist
    album: str = ''  # … from an album of this name
    title: str = ''  # … of this title

    # How to write
    num_samples: int = 3  # samples to write, as one batch
    max_new_tokens: int = 500  # tokens in each, unless the document ends before
    temperature: float = (
        0.8  # 1 as the model has it, lower is more careful, 0 always takes the likeliest
    )
    top_k: int | None = 200  # choose among the k likeliest tokens only; 0 is off
    top_p: float | None = (
        None  # choose among the likeliest tokens that together have this probability; 0 is off
    )
    repetition_penalty: float = (
        1.0  # above 1: tokens that already stand in the text become less likely
    )
    stop_at_end: bool = (
        True  # stop where the model ends the document; False: go on with another one
    )
    seed: int = 1337  # sample i is drawn with seed + i

    # Is it new
    originality: bool = False  # after each sample, how much of it stands in the training split (see lyregpt/originality.py); json: offsets into prompt + text
    avoid_copying: int | None = (
        None  # never write so many words in a row that stand in the training split; 0 is off, else at least 2
    )
    dataset: str = ''  # where that training split is: a folder, or a name under data/; '': where it was when the model was trained

    # How to show it
    json: bool = False  # one JSON object a line and sample, and nothing else
    interactive: bool = (
        False  # write at a prompt, one text after another; /help there lists what it can do
    )

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = (
        'auto'  # of the weights; auto: bfloat16 where the hardware has it and the model is large
    )
    threads: int | Literal['auto'] = (
        'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per core that affinity and container limits allow
    )
    quantize: Literal['int8'] | None = (
        None  # int8 weights: less memory, slightly lower quality; prints a note where it brings no speedup
    )
    compile: bool = False  # on CUDA: one graph a token; half a minute at first, faster ever after

    def __post_init__(self) -> None:
        check_sampling(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.max_new_tokens
        )
        if self.num_samples < 1:
            raise ValueError(f'num_samples={self.num_samples}: expected at least 1')
        threads.check_threads(self.threads)
        if abs(self.seed) >= 2**62:
            raise ValueError(f'seed={self.seed}: expected a number below 2 to the power of 62')
        if self.json and self.interactive:
            raise ValueError('json and interactive exclude each other: leave one out')
        if self.avoid_copying and self.avoid_copying < 2:
            raise ValueError(
                f'avoid_copying={self.avoid_copying}: expected 0 (off) or at least 2 words'
            )


def load_model(config: SampleConfig) -> tuple[GPT, Tokenizer]:
    """The model, ready to write, and its tokenizer. Raises UserError."""
    return load_trained(config)[:2]


def load_trained(config: SampleConfig) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model, ready to write, its tokenizer, and what else its checkpoint says ({} for GPT-2's). Raises UserError."""
    try:
        device = pick_device(config.device)
        threads.set_threads(config.threads)
        path, about = '', {}
        if config.init_from == 'resume':
            path, state = checkpoint.load_from(config.out_dir)
            model, tokenizer = (
                checkpoint.build_model(state, path, dropout=0.0),
                checkpoint.tokenizer_of(state),
            )
            about = {k: v for k, v in state.items() if k not in ('model', 'optimizer')}
            del state
        else:
            if (
                os.path.exists(config.init_from)
                and not is_pretrained(config.init_from)
                and checkpoint.candidates(config.init_from)
            ):
                raise UserError(
                    f'init_from={config.init_from}: this is a checkpoint of ours: --out_dir={config.init_from}'
                )
            model, tokenizer = from_pretrained(config.init_from), of_pretrained(config.init_from)
        # writing one token reads every weight once: half the bytes, twice the speed; int8 weights on a CPU want float32 beside them
        size = model.num_params()
        plain = {'float16': torch.float16}.get(config.dtype) or pick_dtype(
            config.dtype, device, large=size > 20_000_000
        )
        dtype = (
            torch.float32
            if config.quantize and config.dtype == 'auto' and device.type == 'cpu'
            else plain
        )
        model.to(device, dtype).eval()
        if config.quantize and not config.compile and device.type in ('cpu', 'cuda'):
            warn_if_slow(model, plain, {1, config.num_samples})
        model.quantize(config.quantize)
        if config.compile and device.type != 'cuda':
            raise ValueError('compile=True: pays on CUDA only; leave it out')
        if config.compile and (why := can_compile(device)):
            raise ValueError(f'compile=True: {why}; leave it out')
    except ValueError as error:
        raise UserError(str(error)) from None
    kind = f'{str(dtype).removeprefix("torch.")}{f", {config.quantize} weights" if config.quantize else ""}'
    print(
        f'{path or config.init_from}: {size:,} parameters, {device.type}, {kind}', file=sys.stderr
    )
    return model, tokenizer, about


@torch.inference_mode()
def int8_speedup(model: GPT, dtype: torch.dtype, rows: int) -> float:
    """The speed of the model's linear layers in int8, relative to that in `dtype`, for one token of each of `rows` texts.

    Measured on the first layers, up to about 67 million parameters: more than the caches of most machines hold.
    """
    sides: dict[str, list[tuple[nn.Module, torch.Tensor]]] = {'plain': [], 'int8': []}
    parameters = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and parameters < 2**26:
            parameters += layer.weight.numel()
            x = torch.ones(
                rows, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype
            )
            sides['int8'].append((Int8Linear(layer), x))
            sides['plain'].append((packed(copy.deepcopy(layer).to(dtype)), x.to(dtype)))
    seconds = dict.fromkeys(sides, math.inf)
    for _ in range(5):
        for side, layers in sides.items():
            started = time.perf_counter()
            for layer, x in layers:
                y = layer(x)
            float(y[0, 0])  # waits for a GPU
            seconds[side] = min(seconds[side], time.perf_counter() - started)
    return seconds['plain'] / seconds['int8']


def warn_if_slow(model: GPT, dtype: torch.dtype, batches: set[int]) -> None:
    """Say on stderr if quantize=int8 is hardly faster than `dtype`, or slower, for any of these numbers of texts at once."""
    speeds = {rows: int8_speedup(model, dtype, rows) for rows in sorted(batches)}
    slow = [
        f'{speed:.2f} times as fast for {rows} at once'
        for rows, speed in speeds.items()
        if speed < 1.1
    ]
    if slow:
        name = str(dtype).removeprefix('torch.')
        print(
            f'note: quantize=int8 saves memory, but brings little or no speedup over {name} here: {", ".join(slow)}',
            file=sys.stderr,
        )


def prompt_text(config: SampleConfig) -> str:
    """The text that the knobs ask to continue. Raises UserError if a prompt file cannot be read."""
    start = config.start
    if start.startswith('FILE:'):
        try:
            with open(start[5:], encoding='utf-8') as f:
                start = f.read()
        except OSError as error:
            raise UserError(f'{start[5:]}: {error.strerror}') from None
        except UnicodeDecodeError as error:
            raise UserError(f'{start[5:]}: cannot be read as UTF-8 text ({error})') from None
    return song_header(config.artist, config.album, '', config.title) + start


def begin(
    model: GPT,
    tokenizer: Tokenizer,
    config: SampleConfig,
    text: str | None = None,
    prompt: list[int] | None = None,
    training: Callable[[], Index] | None = None,
) -> tuple[str, list[int], Iterator[torch.Tensor]]:
    """The prompt, its ids, and the ids that continue it, (num_samples,) at a time. Raises UserError.

    The prompt is what the knobs ask for, or `text`, whose ids `prompt` may tell: a document end in it is no text. `training()` gives
    the index of the training split; `avoid_copying` needs it.
    """
    text = prompt_text(config) if text is None else text
    if prompt is None:
        prompt = ([] if tokenizer.eot is None else [tokenizer.eot]) + tokenizer.encode(
            text
        )  # a document begins behind the end of another
        prompt = prompt or tokenizer.encode('\n')
    return (
        text,
        prompt,
        model.generate(
            [prompt] * config.num_samples,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
            vocab_size=tokenizer.vocab_size,
            stop_tokens=[tokenizer.eot] if config.stop_at_end and tokenizer.eot is not None else [],
            compile=config.compile,
            avoid=[
                CopyFilter(training(), tokenizer, config.avoid_copying, text)
                for _ in range(config.num_samples)
            ]
            if training and config.avoid_copying
            else None,
        ),
    )


def write(
    model: GPT,
    tokenizer: Tokenizer,
    config: SampleConfig,
    training: Callable[[], Index] | None = None,
) -> None:
    """Print `num_samples` continuations of the prompt, the first one as it comes. `training()` is as in `begin`; `originality` needs it too."""
    index = (
        training() if training and config.originality else None
    )  # built, if need be, before the first word
    text, _, stream = begin(model, tokenizer, config, training=training)
    rows: list[list[int]] = [[] for _ in range(config.num_samples)]
    decode = tokenizer.stream_decoder()
    if not config.json:
        print(text, end='', flush=True)
    for tokens in stream:
        for row, token in zip(rows, tokens.tolist()):
            if token >= 0:
                row.append(token)
        if (
            not config.json
            and tokens[0] >= 0
            and (tokens[0] != tokenizer.eot or not config.stop_at_end)
        ):
            print(decode(int(tokens[0])), end='', flush=True)
    if not config.json:
        print(decode(None))
    for i, row in enumerate(rows):
        ended = config.stop_at_end and bool(row) and row[-1] == tokenizer.eot
        written = tokenizer.decode(row[:-1] if ended else row)
        found = index.compare(text + written, since=len(text)) if index else None
        if config.json:
            told = {
                'sample': i,
                'seed': config.seed + i,
                'prompt': text,
                'text': written,
                'tokens': len(row),
                'ended': ended,
            }
            print(
                json.dumps(
                    told | ({'originality': dataclasses.asdict(found)} if found else {}),
                    ensure_ascii=False,
                )
            )
            continue
        if i:
            print(f'{"-" * 40}\n{text}{written}')
        if found:
            print(found)


def main() -> None:
    """Write what the command line asks for."""
    config = configure(SampleConfig, description='Write text with a trained model.')
    model, tokenizer, about = load_trained(config)
    training = cache(lambda: index_of(about.get('config', {}), config.dataset))
    if not config.interactive:
        return write(model, tokenizer, config, training)
    from lyregpt import repl  # only here: its library takes a while to load

    repl.Session(
        config, tokenizer, partial(begin, model, tokenizer, training=training), training
    ).run()


if __name__ == '__main__':
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    run(main)
