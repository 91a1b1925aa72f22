"""Load a trained model and generate with it: what sample.py, the server and the Python API share.

model, tokenizer, about = load_model('out-darklyrics', dtype='bfloat16')
"""

import copy
import itertools
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from lyregpt import threads as cpu_threads  # before torch: it decides how torch's threads wait

# isort: split
import torch
import torch.nn as nn

from configurator import UserError
from lyregpt import checkpoint
from lyregpt.device import best_seconds, can_compile, pick_device, pick_dtype
from lyregpt.originality import CopyFilter, Index
from lyregpt.pretrained import from_pretrained, is_pretrained
from lyregpt.quantize import Int8Linear, packed, quantize_model
from lyregpt.text import read_pieces, song_header
from lyregpt.tokenizer import Tokenizer, of_pretrained
from model import GPT


class LoadedModel(NamedTuple):
    """A model that is ready to generate, its tokenizer, and what else its checkpoint holds.

    `about` has iter_num, best_val_loss, config and more; it is empty for pretrained weights.
    """

    model: GPT
    tokenizer: Tokenizer
    about: dict[str, Any]


def load_model(
    out_dir: str = 'out',
    init_from: str = 'resume',
    *,
    device: str = 'auto',
    dtype: str = 'auto',
    threads: int | str = 'auto',
    quantize: str | None = None,
    compile: bool = False,
    batch_sizes: Collection[int] = (1,),
) -> LoadedModel:
    """Load the model in `out_dir`, or the pretrained one that `init_from` names, for generating.

    The arguments are sample.py's options. With `quantize`, a note on stderr says for which of
    `batch_sizes`, sequences generated at once, int8 brings no speedup. Raises UserError.
    """
    try:
        target = pick_device(device)
        cpu_threads.set_threads(threads)
        if compile:
            problem = can_compile(target) if target.type == 'cuda' else 'pays off on CUDA only'
            if problem:
                raise ValueError(f'compile=True: {problem}; leave it out')
        source, loaded = read_model(out_dir, init_from)
        model, size = loaded.model, loaded.model.num_params()
        if dtype == 'auto':
            plain_dtype = pick_dtype('auto', target, large=size > 20_000_000)
        else:
            plain_dtype = getattr(torch, dtype)
        # With int8 weights a CPU is fastest if all else is float32.
        float_on_cpu = quantize and dtype == 'auto' and target.type == 'cpu'
        chosen = torch.float32 if float_on_cpu else plain_dtype
        model.to(target, chosen).eval()
        if quantize and not compile and target.type in ('cpu', 'cuda'):
            warn_if_slow(model, plain_dtype, batch_sizes)
        quantize_model(model, quantize)
    except ValueError as error:
        raise UserError(str(error)) from None
    weights = f', {quantize} weights' if quantize else ''
    summary = f'{size:,} parameters, {target.type}, {str(chosen).removeprefix("torch.")}{weights}'
    print(f'{source}: {summary}', file=sys.stderr)
    return loaded


def read_model(out_dir: str, init_from: str) -> tuple[str, LoadedModel]:
    """Return the model's file or name, and the model in float32 on the CPU. Raises ValueError."""
    if init_from == 'resume':
        path, state = checkpoint.load_from(out_dir)
        model = checkpoint.build_model(state, path, dropout=0.0)
        tokenizer = checkpoint.tokenizer_of(state)
        about = {key: value for key, value in state.items() if key not in ('model', 'optimizer')}
        return path, LoadedModel(model, tokenizer, about)
    is_folder = os.path.exists(init_from) and not is_pretrained(init_from)
    if is_folder and checkpoint.candidates(init_from):
        raise ValueError(f'init_from={init_from}: a lyreGPT checkpoint; use --out_dir={init_from}')
    return init_from, LoadedModel(from_pretrained(init_from), of_pretrained(init_from), {})


# -----------------------------------------------------------------------------
# The speed of int8


def warn_if_slow(model: GPT, dtype: torch.dtype, batch_sizes: Collection[int]) -> None:
    """Print a note if int8 weights are hardly faster than `dtype` for any of the batch sizes."""
    speedups = {size: int8_speedup(model, dtype, size) for size in sorted(set(batch_sizes))}
    slow = [f'{x:.2f} times as fast for {n} at once' for n, x in speedups.items() if x < 1.1]
    if slow:
        note = 'note: quantize=int8 saves memory, but brings little or no speedup over'
        plain = str(dtype).removeprefix('torch.')
        print(f'{note} {plain} here: {", ".join(slow)}', file=sys.stderr)


@torch.inference_mode()
def int8_speedup(model: GPT, dtype: torch.dtype, batch_size: int) -> float:
    """Return the speed of the linear layers in int8 relative to `dtype`, for one token a sequence.

    Measured on the first layers, up to about 67 million parameters: more than the caches of most
    machines hold.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    before = itertools.accumulate((layer.weight.numel() for layer in linear), initial=0)
    first = [layer for layer, parameters in zip(linear, before) if parameters < 2**26]
    inputs = [layer.weight.new_ones(batch_size, layer.in_features) for layer in first]
    plain = [packed(copy.deepcopy(layer).to(dtype)) for layer in first]
    int8 = [Int8Linear(layer) for layer in first]
    return pass_seconds(plain, [x.to(dtype) for x in inputs]) / pass_seconds(int8, inputs)


def pass_seconds(layers: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> float:
    """Return the seconds that the layers take, one after another, each with its input."""

    def run() -> torch.Tensor:
        return [layer(x) for layer, x in zip(layers, inputs)][-1]

    return best_seconds(run, enough=0)


# -----------------------------------------------------------------------------
# From a prompt to the tokens that continue it


def prompt_text(config: Any) -> str:
    """Return the prompt that sample.py's options ask for: a song header, then `start`.

    `start` is text, or FILE:path. Raises UserError or OSError if that file cannot be read.
    """
    start = config.start
    if start.startswith('FILE:'):
        start = ''.join(read_pieces(start.removeprefix('FILE:'), 'utf-8'))
    return song_header(config.artist, config.album, '', config.title) + start


def document_end(tokenizer: Tokenizer) -> list[int]:
    """Return [the id of the document end], or [] if the tokenizer has none."""
    return [] if tokenizer.eot is None else [tokenizer.eot]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a prompt's ids, at least one: a document begins after the end of another."""
    return document_end(tokenizer) + tokenizer.encode(text) or tokenizer.encode('\n')


def generate(
    loaded: LoadedModel, config: Any, text: str, ids: list[int], index: Index | None = None
) -> Iterator[list[int]]:
    """Continue a prompt under sample.py's options: one id for each of `num_samples` at a time.

    An id of -1 says that the sample has ended. `ids` are the prompt's, `text` is what it says;
    the option avoid_copying needs `index`, the index of the training split.
    """
    model, tokenizer, _ = loaded
    stop_tokens = document_end(tokenizer) if config.stop_at_end else []
    filters = None
    if config.avoid_copying and index:
        new_filter = partial(CopyFilter, index, tokenizer, config.avoid_copying, text)
        filters = [new_filter() for _ in range(config.num_samples)]
    stream = model.generate(
        [ids] * config.num_samples,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        vocab_size=tokenizer.vocab_size,
        stop_tokens=stop_tokens,
        compile=config.compile,
        avoid=filters,
    )
    for tokens in stream:
        yield [-1 if token in stop_tokens else token for token in tokens.tolist()]
