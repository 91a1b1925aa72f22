"""The programs that bench.py measures beside ours: generating with nanoGPT and transformers.

    python -m lyregpt.peer_benchmarks sample_nanogpt '{"device": "cpu", …}'    (in nanoGPT's folder)

Nothing of ours is imported here: `model` is nanoGPT's, and the threads are as PyTorch sets them.
"""

import json
import sys
import time
from typing import Any

import torch

Figures = dict[str, float]


def sample_nanogpt(
    device: str, shape: dict[str, Any], prompt: list[int], batch: int, tokens: int
) -> Figures:
    """Generate as nanoGPT's sample.py does, with random weights."""
    from model import GPT, GPTConfig

    model: Any = GPT(GPTConfig(**shape)).to(device).eval()
    start = torch.tensor([prompt] * batch, device=device)
    device_type = device.split(':')[0]
    autocast = torch.autocast(device_type, torch.bfloat16, enabled=device_type == 'cuda')
    with torch.no_grad(), autocast:
        model.generate(start, 2, temperature=0.8, top_k=200)
        began = time.perf_counter()
        model.generate(start, tokens, temperature=0.8, top_k=200)[0].tolist()
    return {'tokens_per_s': batch * tokens / (time.perf_counter() - began)}


def sample_transformers(
    device: str, shape: dict[str, Any], prompt: list[int], batch: int, tokens: int
) -> Figures:
    """Generate with transformers' GPT-2 in bfloat16 and its KV cache, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: shape[name] for name in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
    model: Any = GPT2LMHeadModel(GPT2Config(n_positions=shape['block_size'], **sizes))
    model.to(device, torch.bfloat16).eval()
    start = torch.tensor([prompt] * batch, device=device)
    options = dict(do_sample=True, temperature=0.8, top_k=200, pad_token_id=0, eos_token_id=None)
    model.generate(start, max_new_tokens=8, **options)
    began = time.perf_counter()
    model.generate(start, max_new_tokens=tokens, min_new_tokens=tokens, **options)[0].tolist()
    return {'tokens_per_s': batch * tokens / (time.perf_counter() - began)}


def run_program(programs: dict[str, Any]) -> None:
    """Run the function that the command line names, and print its figures as JSON."""
    torch.manual_seed(1337)
    figures = programs[sys.argv[1]](**json.loads(sys.argv[2]))
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        figures['memory_mb'] = torch.cuda.max_memory_allocated() / 1e6
    print('\n' + json.dumps(figures))


if __name__ == '__main__':
    run_program(globals())
