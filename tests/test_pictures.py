"""The documentation's pictures are those that docs/pictures.py draws from the present code."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from model import GPT
from tests.conftest import ROOT
from train import TrainConfig

try:
    drawn_by = version('matplotlib') == '3.11.2'  # other versions draw other bytes
except PackageNotFoundError:
    drawn_by = False
pytestmark = pytest.mark.skipif(
    not drawn_by,
    reason='needs the matplotlib of requirements-dev.txt on Python 3.11 and later',
)
sys.path.insert(0, os.path.join(ROOT, 'docs'))


def test_pictures_are_as_the_code_draws_them(tmp_path):
    import pictures

    committed = {name for name in os.listdir(pictures.FOLDER) if name.endswith('.svg')}
    assert committed == {f'{name}.svg' for name in pictures.PICTURES}
    for name in pictures.PICTURES:
        with (
            open(pictures.draw(name, str(tmp_path)), encoding='utf-8') as now,
            open(os.path.join(pictures.FOLDER, f'{name}.svg'), encoding='utf-8') as then,
        ):
            assert now.read() == then.read(), (
                f'{name}.svg is not what the code draws now: python docs/pictures.py'
            )
        assert os.path.getsize(tmp_path / f'{name}.svg') < 80_000


def test_memory_is_counted_for_the_models_of_the_configs():
    import pictures

    for config, vocab_size in pictures.MEMORY:
        knobs = pictures.configure(TrainConfig, [os.path.join(ROOT, 'config', config)])
        with torch.device('meta'):
            model = GPT(knobs.model_config(vocab_size))
        parts = pictures.memory_of(config, vocab_size)[1]
        matrices = sum(
            p.numel()
            for name, p in model.named_parameters()
            if p.dim() == 2 and name.startswith('transformer.h.')
        )
        assert parts['weights'] == parts['gradients'] == 4 * model.num_params()
        assert parts['optimizer'] == 8 * model.num_params() - 4 * matrices


def test_the_pictured_shares_are_attention():
    """Each row of the measured head sums to 1, and nothing looks ahead."""
    import pictures

    with open(pictures.ATTENTION, encoding='utf-8') as f:
        told = json.load(f)
    shares = torch.tensor(told['shares'])
    assert shares.shape == (len(told['tokens']),) * 2
    assert torch.allclose(shares.sum(dim=1), torch.ones(len(shares)), atol=0.02)
    assert (shares.triu(1) == 0).all()
