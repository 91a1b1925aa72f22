"""Load a trained model and generate with it: what sample.py, the server and the Python API share."""

import copy
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

from lyregpt import threads as cpu_threads  # before torch: it decides how torch's threads wait

# isort: split
import torch
import torch.nn as nn

from configurator import UserError
from lyregpt import checkpoint
from lyregpt.device import can_compile, pick_device, pick_dtype
from lyregpt.originality import CopyFilter, Index
from lyregpt.pretrained import from_pretrained, is_pretrained
from lyregpt.quantize import Int8Linear, packed, quantize_model
from lyregpt.text import song_header
from lyregpt.tokenizer import Tokenizer, of_pretrained
from model import GPT

LARGE = 20_000_000  # parameters from which dtype=auto considers bfloat16 on a CPU


class LoadedModel(NamedTuple):
    """A model that is ready to generate, its tokenizer, and what else its checkpoint holds.

    `about` has iter_num, best_val_loss, config and so on; it is empty for pretrained weights.
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

    The arguments are sample.py's options. `batch_sizes` are the numbers of sequences that are
    likely to be generated at once: a note on stderr says where int8 brings no speedup for them.
    Raises UserError.
    """
    try:
        target = pick_device(device)
        cpu_threads.set_threads(threads)
        check_compile(compile, target)
        source, loaded = read_model(out_dir, init_from)
        model, size = loaded.model, loaded.model.num_params()
        # Generating a token reads every weight once: half the bytes, twice the speed.
        if dtype == 'float16':
            unquantized = torch.float16
        else:
            unquantized = pick_dtype(dtype, target, large=size > LARGE)
        chosen = unquantized
        if quantize and dtype == 'auto' and target.type == 'cpu':
            chosen = torch.float32  # the fastest companion of int8 weights there
        model.to(target, chosen).eval()
        if quantize and not compile and target.type in ('cpu', 'cuda'):
            warn_if_slow(model, unquantized, batch_sizes)
        quantize_model(model, quantize)
    except ValueError as error:
        raise UserError(str(error)) from None
    kind = dtype_name(chosen)
    if quantize:
        kind += f', {quantize} weights'
    print(f'{source}: {size:,} parameters, {target.type}, {kind}', file=sys.stderr)
    return loaded


def read_model(out_dir: str, init_from: str) -> tuple[str, LoadedModel]:
    """Where the model was found, and the model in float32 on the CPU. Raises ValueError."""
    if init_from == 'resume':
        path, state = checkpoint.load_from(out_dir)
        model = checkpoint.build_model(state, path, dropout=0.0)
        tokenizer = checkpoint.tokenizer_of(state)
        about = {key: value for key, value in state.items() if key not in ('model', 'optimizer')}
        return path, LoadedModel(model, tokenizer, about)
    if os.path.exists(init_from) and not is_pretrained(init_from):
        if checkpoint.candidates(init_from):
            raise UserError(
                f'init_from={init_from}: this is a checkpoint of ours: --out_dir={init_from}'
            )
    return init_from, LoadedModel(from_pretrained(init_from), of_pretrained(init_from), {})


def check_compile(compile: bool, device: torch.device) -> None:
    """Raises ValueError if `compile` is set and cannot work, or does not pay, on the device."""
    if not compile:
        return
    if device.type != 'cuda':
        raise ValueError('compile=True: pays on CUDA only; leave it out')
    problem = can_compile(device)
    if problem:
        raise ValueError(f'compile=True: {problem}; leave it out')


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16 or float16."""
    return str(dtype).removeprefix('torch.')


# -----------------------------------------------------------------------------
# Is int8 faster here?


def warn_if_slow(model: GPT, dtype: torch.dtype, batch_sizes: Collection[int]) -> None:
    """Print a note if int8 weights are hardly faster than `dtype` for any of the batch sizes."""
    slow = []
    for size in sorted(set(batch_sizes)):
        speedup = int8_speedup(model, dtype, size)
        if speedup < 1.1:
            slow.append(f'{speedup:.2f} times as fast for {size} at once')
    if slow:
        print(
            'note: quantize=int8 saves memory, but brings little or no speedup over '
            f'{dtype_name(dtype)} here: {", ".join(slow)}',
            file=sys.stderr,
        )


@torch.inference_mode()
def int8_speedup(model: GPT, dtype: torch.dtype, batch_size: int) -> float:
    """The speed of the model's linear layers in int8, relative to `dtype`, for one token a sequence.

    Measured on the first layers, up to about 67 million parameters: more than the caches of most
    machines hold.
    """
    plain: list[Callable[[], torch.Tensor]] = []
    int8: list[Callable[[], torch.Tensor]] = []
    parameters = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and parameters < 2**26:
            parameters += layer.weight.numel()
            x = layer.weight.new_ones(batch_size, layer.in_features)
            plain.append(partial(packed(copy.deepcopy(layer).to(dtype)), x.to(dtype)))
            int8.append(partial(Int8Linear(layer), x))
    seconds = [(run_seconds(plain), run_seconds(int8)) for _ in range(5)]
    return min(pair[0] for pair in seconds) / min(pair[1] for pair in seconds)


def run_seconds(calls: list[Callable[[], torch.Tensor]]) -> float:
    """Seconds that all the calls take, one after another."""
    started = time.perf_counter()
    for call in calls:
        y = call()
    float(y[0, 0])  # waits for a GPU
    return time.perf_counter() - started


# -----------------------------------------------------------------------------
# From a prompt to the tokens that continue it


def read_prompt(start: str) -> str:
    """The text to continue: `start`, or the content of the file that FILE:path names.

    Raises UserError if the file cannot be read.
    """
    if not start.startswith('FILE:'):
        return start
    path = start.removeprefix('FILE:')
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: cannot be read as UTF-8 text ({error})') from None


def prompt_text(config: Any) -> str:
    """The prompt that sample.py's options ask for: a song header, then `start`. Raises UserError."""
    header = song_header(config.artist, config.album, '', config.title)
    return header + read_prompt(config.start)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt, never none. A document begins after the end of another."""
    ids = tokenizer.encode(text)
    if tokenizer.eot is not None:
        return [tokenizer.eot, *ids]
    return ids or tokenizer.encode('\n')


def generate(
    loaded: LoadedModel, config: Any, text: str, ids: list[int], index: Index | None = None
) -> Iterator[torch.Tensor]:
    """The token ids that continue a prompt under sample.py's options, (num_samples,) at a time.

    `ids` are those of the prompt `text`: text alone cannot express a document end. The option
    avoid_copying needs `index`, that of the training split.
    """
    model, tokenizer, _ = loaded
    stop_tokens = []
    if config.stop_at_end and tokenizer.eot is not None:
        stop_tokens = [tokenizer.eot]
    avoid = None
    if config.avoid_copying and index is not None:
        avoid = [
            CopyFilter(index, tokenizer, config.avoid_copying, text)
            for _ in range(config.num_samples)
        ]
    return model.generate(
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
        avoid=avoid,
    )
