"""simulate.py: counts beside the model's, traffic beside a ring, tables as printed."""

import os
import sys

import pytest
import torch

from model import GPT, GPTConfig
from tests.conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'docs', 'concepts'))
import simulate  # noqa: E402
from simulate import (  # noqa: E402
    Run,
    errors,
    flops_per_token,
    memory,
    num_params,
    ring_bytes,
    step_time,
)

LLAMA = dict(
    arch='modern', n_layer=8, n_head=16, n_kv_head=4, n_embd=1024, n_ff=2816, vocab_size=32000
)


WIDE = LLAMA | dict(head_dim=96)


@pytest.mark.parametrize(
    'run, config',
    [
        (Run(), GPTConfig()),
        *(
            (Run(**shape, swiglu=True, tie_weights=False), GPTConfig(**shape))
            for shape in (LLAMA, WIDE)
        ),
    ],
)
def test_counts_are_the_models_own(run, config):
    with torch.device('meta'):
        model = GPT(config)
    assert sum(num_params(run).values()) == model.num_params()
    assert flops_per_token(run) == model.flops_per_token()
    parts = memory(run)
    assert (
        parts['weights']
        == parts['gradients']
        == sum(p.numel() * p.element_size() for p in model.parameters())
    )
    assert parts['optimizer'] == 2 * parts['weights']
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and name.startswith('transformer.h.')
    )
    assert (
        memory(Run(**vars(run) | {'optimizer': 'muon'}))['optimizer']
        == 8 * model.num_params() - 4 * matrices
    )


@pytest.mark.parametrize('n', [2, 3, 8])
def test_traffic_is_that_of_a_ring(n):
    """n processes with n pieces each: n - 1 turns to the right add up, n - 1 pass the sums on."""
    pieces, sent = [[10**p] * n for p in range(n)], [0] * n
    for turn in range(2 * (n - 1)):
        moving = [(p, (p - turn) % n, pieces[p][(p - turn) % n]) for p in range(n)]
        for p, i, value in moving:
            sent[p] += 1
            pieces[(p + 1) % n][i] = value + (pieces[(p + 1) % n][i] if turn < n - 1 else 0)
    assert all(value == sum(10**p for p in range(n)) for own in pieces for value in own)
    size = 1000.0
    assert all(count * size / n == pytest.approx(ring_bytes(n, size, 2)) for count in sent)
    assert ring_bytes(n, size, 2) == 2 * ring_bytes(n, size, 1)


@pytest.mark.parametrize('parallel', ['ddp', 'zero1', 'fsdp'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_with_more_gpus_only_communication_grows(parallel, optimizer):
    """With the same sequences per GPU, compute stays, and only communication takes longer."""
    before = None
    for gpus in (1, 2, 8, 16, 64, 512, 1024):
        t = step_time(
            Run(
                gpus=gpus,
                micro_batch=8,
                tokens_per_step=gpus * 16384,
                parallel=parallel,
                optimizer=optimizer,
            )
        )
        assert t['step'] == pytest.approx(
            t['compute'] + t['exposed'] + t['slowed'] + t['optimizer']
        )
        assert 0 <= t['exposed'] <= t['wire'] * (1 + 1e-9)
        if before:
            assert t['compute'] == pytest.approx(before['compute'])
            assert t['wire'] >= before['wire']
            if optimizer == 'adamw':
                assert t['optimizer'] <= before['optimizer'] * (1 + 1e-9)
        before = t


def test_the_document_says_what_the_code_predicts(capsys):
    with open(ROOT / 'docs' / 'concepts' / 'scaling.md', encoding='utf-8') as f:
        text = f.read()
    simulate.check()
    simulate.plan()
    for line in capsys.readouterr().out.splitlines():
        assert line in text
    assert 0.5 < min(errors()) and max(errors()) < 1.3
    assert sum(0.8 <= error <= 1.1 for error in errors()) >= 0.75 * len(errors())
