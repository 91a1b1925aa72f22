"""The programs that bench.py measures, each in a process of its own.

    python -m lyregpt.benchmarks ceiling '{"device": "cpu"}'

Each is a function that takes JSON's values and returns figures by name; the last line printed is
their JSON. Those of nanoGPT and transformers are in peer_benchmarks.py.
"""

import os
import statistics
import tempfile
import time
import timeit
from typing import Any

from lyregpt import threads  # noqa: F401  before torch

# isort: split
import torch

from lyregpt.dataset import Split
from lyregpt.device import (
    copy_bandwidth,
    matmul_ceiling,
    memory_by_part,
    pick_device,
    pick_dtype,
)
from lyregpt.generate import encode_prompt, load_model
from lyregpt.load_test import resident
from lyregpt.optim import configure_optimizers
from lyregpt.peer_benchmarks import Figures, run_program
from lyregpt.quantize import quantize_model
from model import GPT, GPTConfig


def memory(
    device: str, arch: str, optimizer: str, shape: dict[str, Any], batch: int, dtype: str
) -> Figures:
    """Peak memory of a training step by what holds it, in MB."""
    on = pick_device(device)
    before = 0.0 if on.type == 'cuda' else resident(os.getpid())
    model = GPT(GPTConfig(arch=arch, **shape)).to(on)
    optimizers = configure_optimizers(model, 0.1, 1e-4, (0.9, 0.95), optimizer)
    tokens = torch.randint(shape['vocab_size'], (batch, shape['block_size']), device=on)
    compute_dtype = pick_dtype(dtype, on)
    for _ in range(2):
        with torch.autocast(on.type, compute_dtype, enabled=compute_dtype != torch.float32):
            loss = model(tokens, tokens)
        loss.backward()
        for one in optimizers.values():
            one.step()
    parts = memory_by_part(model, optimizers.values(), on)
    held = parts['weights'] + parts['gradients'] + parts['optimizer states']
    return {
        'before_mb': before,
        'weights_mb': parts['weights'],
        'gradients_mb': parts['gradients'],
        'optimizer_mb': parts['optimizer states'],
        'activations_and_rest_mb': parts['peak'] - before - held,
    }


def sample(
    device: str,
    shape: dict[str, Any],
    prompt: list[int],
    batch: int,
    tokens: int,
    dtype: str,
    quantize: str | None,
    compile: bool,
) -> Figures:
    """Generate with random weights: the values change no speed."""
    on = pick_device(device)
    model = GPT(GPTConfig(**shape)).to(on, getattr(torch, dtype)).eval()
    model_bytes = 0
    for weight in model.parameters():
        one_byte = quantize and weight.dim() > 1
        model_bytes += weight.numel() * (1 if one_byte else weight.element_size())
    quantize_model(model, quantize)
    options: dict[str, Any] = dict(temperature=0.8, top_k=200, compile=compile)
    for _ in range(2):
        list(model.generate([prompt] * batch, 8, **options))
    began = time.perf_counter()
    generated = torch.stack(list(model.generate([prompt] * batch, tokens, **options))).tolist()
    steps_per_second = len(generated) / (time.perf_counter() - began)
    return {
        'tokens_per_s': batch * steps_per_second,
        'weights_read_gb_per_s': steps_per_second * model_bytes / 1e9,
        'share_of_bandwidth': steps_per_second * model_bytes / copy_bandwidth(on),
    }


def one_by_one(seconds: float, requests: list[dict[str, Any]], **loading: Any) -> Figures:
    """Answer the server's requests one after another, for `seconds`."""
    model, tokenizer, _ = load_model(**loading)
    n_tokens, answers, first_tokens = 0, 0, []
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        request = requests[answers % len(requests)]
        asked_at = time.perf_counter()
        ids = model.generate(
            [encode_prompt(tokenizer, request['prompt'])],
            request['max_tokens'],
            seed=request['seed'],
            vocab_size=tokenizer.vocab_size,
            stop_tokens=[] if tokenizer.eot is None else [tokenizer.eot],
        )
        times = [time.perf_counter() for token in ids if token.tolist()]  # waits for each
        first_tokens.append(times[0] - asked_at)
        n_tokens += len(times)
        answers += 1
    return {
        'tokens_per_s': n_tokens / (time.perf_counter() - started),
        'first_token_ms': 1e3 * statistics.median(first_tokens),
    }


def ceiling(device: str) -> Figures:
    """The speed of matrix products and of copies on this machine."""
    on = pick_device(device)
    return {
        'float32_gflop_per_s': matmul_ceiling(on, torch.float32) / 1e9,
        'bfloat16_gflop_per_s': matmul_ceiling(on, torch.bfloat16) / 1e9,
        'copy_gb_per_s': copy_bandwidth(on) / 1e9,
    }


def batches() -> Figures:
    """Time to read a batch of 12 sequences of 1,024 tokens from small and huge token files."""
    sizes = {'1_mb': 10**6, '1_gb': 10**9, '100_gb': 10**11}
    if os.name == 'nt':
        sizes['100_gb'] = 10**9  # NTFS would allocate all of it
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in sizes.items():
            with open(os.path.join(folder, 'train.bin'), 'wb') as f:
                f.truncate(size)  # sparse: allocates nothing
            split = Split(folder, 'train', 1024, 50304, 1337)
            indices = iter(range(60))
            seconds = timeit.repeat(
                lambda: split.batch(12 * next(indices), 12), number=1, repeat=60
            )
            figures[f'batch_of_12x1024_from_{name}_ms'] = 1e3 * statistics.median(seconds[10:])
    return figures


if __name__ == '__main__':
    run_program(globals())
