"""What the tests share: a small dataset, a small trained model, and ways to run the scripts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'examples' / 'seq2seq')]
DEMO = ROOT / 'data' / 'darklyrics' / 'demo.jsonl'

from lyregpt import threads  # noqa: E402  before torch

# isort: split
from configurator import configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import split_text  # noqa: E402
from lyregpt.tokenizer import CharTokenizer, GPT2Tokenizer  # noqa: E402
from train import TrainConfig, train  # noqa: E402

threads.set_threads(2)


def script(*words, cwd=ROOT, timeout=120, **env):
    """Run one of our scripts as a user would; returns the finished process with its text output."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {k: str(v) for k, v in env.items()},
    )


def mistake(capsys, main, *words):
    """The line on stderr with which a script's `main` rejects these words, with exit status 2.

    In this process, which takes 2 s less than one of its own.
    """
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, 'argv', ['script.py', *map(str, words)])
        run(main)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if 'parameters, cpu' not in line]  # sample.py: which model
    assert left.value.code == 2 and len(said) == 1, said
    return said[0]


def tiny(folder, out_dir, *more):
    """A TrainConfig for a model that trains in a second or two."""
    return configure(
        TrainConfig,
        [
            f'--dataset={folder}',
            f'--out_dir={out_dir}',
            '--n_layer=2',
            '--n_head=2',
            '--n_embd=32',
            '--block_size=32',
            '--batch_size=4',
            '--gradient_accumulation_steps=1',
            '--learning_rate=1e-2',
            '--max_iters=20',
            '--warmup_iters=2',
            '--eval_interval=10',
            '--log_interval=5',
            '--device=cpu',
            '--report=False',  # half a second, and a test of its own
            *map(str, more),
        ],
    )


def gpt2():
    """GPT-2's tokenizer, from files at hand; a test that wants it is skipped where they are not."""
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or str(ROOT.parent / 'shared' / 'tiktoken_cache')
    if not os.path.isdir(cache):
        pytest.skip('missing data: tiktoken has no cached files here, and tests use no network')
    os.environ['TIKTOKEN_CACHE_DIR'] = cache
    return GPT2Tokenizer()


@pytest.fixture(scope='session')
def demo_text():
    """The words of the first fifty embedded songs."""
    with open(DEMO, encoding='utf-8') as f:
        return '\n\n'.join(json.loads(line)['lyrics'] for line, _ in zip(f, range(50)))


@pytest.fixture(scope='session')
def chars(tmp_path_factory, demo_text):
    """A prepared character dataset of real verse."""
    folder = tmp_path_factory.mktemp('chars')
    tokenizer = CharTokenizer.train([demo_text])
    write_dataset(str(folder), split_text([demo_text], len(demo_text), 0.1), tokenizer)
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory, chars):
    """The out_dir of a model trained for a few steps on `chars`."""
    out = tmp_path_factory.mktemp('trained')
    train(tiny(chars, out, '--max_iters=60'))
    return out


def load_script(monkeypatch, path):
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(f'{path.parent.name}_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
