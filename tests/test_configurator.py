import json
from dataclasses import dataclass
from typing import Literal

import pytest

from configurator import UserError, configure, given, help_text
from lyregpt.convert_config import AMBIGUOUS, OTHER_NAMES, convert_file
from tests.conftest import ROOT, script


@dataclass
class Options:
    # How fast
    rate: float = 1e-3  # how fast to learn
    steps: int = 10  # how often:
    # at least once,
    # and at most forever
    fast: bool = False  # hurry

    # What
    name: str = 'x'  # any text
    limit: int | None = None  # None is no limit
    kind: Literal['auto', 'a', 'b'] = 'auto'  # which
    names: list[str] | None = None  # several
    sizes: list[int] | None = None  # several numbers

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f'steps={self.steps}: expected 0 or more')


@pytest.mark.parametrize(
    'words, name, value',
    [
        (['--rate=3'], 'rate', 3.0),
        (['--rate=1e-4'], 'rate', 1e-4),
        (['--steps=1e5'], 'steps', 100_000),
        (['--steps', '7'], 'steps', 7),
        (['--steps=1_000'], 'steps', 1000),
        (['--fast'], 'fast', True),
        (['--fast', 'False'], 'fast', False),
        (['--fast=0'], 'fast', False),
        (['--name=a=b=c'], 'name', 'a=b=c'),
        (['--name='], 'name', ''),
        (['--limit=None'], 'limit', None),
        (['--limit=5'], 'limit', 5),
        (['--kind=b'], 'kind', 'b'),
        (['--names=a b,c'], 'names', ['a b', 'c']),
        (['--names=["a,b", "c"]'], 'names', ['a,b', 'c']),
        (['--sizes=[1, 2]'], 'sizes', [1, 2]),
        (['--sizes=1,2'], 'sizes', [1, 2]),
        (['--sizes', '1', '2,3'], 'sizes', [1, 2, 3]),
        (['--names', 'a', 'b.py', '--names', 'c', 'd'], 'names', ['c', 'd']),
        (['--rate=-1'], 'rate', -1.0),
        (['--rate', '-1'], 'rate', -1.0),
        (['--steps=5', '--steps=6'], 'steps', 6),
    ],
)
def test_values(words, name, value):
    config = configure(Options, words)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    assert given(config) == {name}


def test_help_has_headings_and_continued_comments():
    lines = help_text(Options, 'What it does.').splitlines()
    assert lines[:3] == ['What it does.', '', 'How fast:']
    assert [line for line in lines if line.endswith(':')] == ['How fast:', 'What:']
    [steps] = [line for line in lines if line.startswith('  --steps=10')]
    assert steps.endswith('  how often: at least once, and at most forever')
    assert len(lines) == 2 + 2 + 8 and lines[-1].endswith('  several numbers')


@pytest.mark.parametrize(
    'words, message',
    [
        (['--step=5'], 'did you mean --steps?'),
        (['--rate=fast'], '--rate=fast: expected a number'),
        (['--steps=1.5'], 'expected a whole number'),
        (['--fast=maybe'], 'expected True or False'),
        (['--kind=c'], 'one of auto, a, b'),
        (['--limit=x'], 'expected a whole number or None'),
        (['--steps'], '--steps needs a value'),
        (['--steps=-1'], 'steps=-1: expected 0 or more'),
        (['nothing.py'], 'nothing.py: no such config file'),
        (['--sizes=[1,x]'], 'expected'),
        (['--rate=True'], 'expected a number'),
        (['--zzzzzz=1'], 'unknown option --zzzzzz'),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(UserError) as error:
        configure(Options, words)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_files_and_options_in_order(tmp_path):
    py, js, yml = (tmp_path / f'c.{kind}' for kind in ('py', 'json', 'yaml'))
    py.write_text(
        'import time\nrate = 2 * 5e-4  # a comment\nsteps = steps * 2\nname = "ü"\n_helper = 3\n',
        encoding='utf-8',
    )
    js.write_text(json.dumps({'steps': 3, 'limit': None, 'names': ['a']}))
    yml.write_text('steps: 4\nfast: true\n')
    config = configure(Options, ['--steps=50', str(py)])
    assert (config.rate, config.steps, config.name) == (1e-3, 100, 'ü') and given(config) == {
        'rate',
        'steps',
        'name',
    }
    assert configure(Options, [str(py), str(js), str(yml)]).steps == 4
    assert configure(Options, [str(yml), str(js), '--steps=9']).steps == 9
    assert configure(Options, [str(js)]).names == ['a']


@pytest.mark.parametrize(
    'name, text, message',
    [
        ('c.py', 'setps = 3\n', 'unknown option setps; did you mean steps?'),
        ('c.py', 'steps = "many"\n', 'steps=many: expected a whole number'),
        ('c.py', 'steps = = 3\n', 'SyntaxError'),
        ('c.py', 'steps = 1 / 0\n', 'ZeroDivisionError'),
        ('c.json', '[1]', 'expected a mapping'),
        ('c.json', '{', 'JSONDecodeError'),
        ('c.yaml', 'steps: {}', 'expected a whole number'),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        configure(Options, [str(tmp_path / name)])
    assert message in str(error.value) and name in str(error.value)


def test_a_file_is_in_the_current_directory_or_in_the_repository(tmp_path, monkeypatch):
    from train import TrainConfig

    monkeypatch.chdir(tmp_path)
    assert configure(TrainConfig, ['config/small.py']).n_embd == 160
    with pytest.raises(UserError, match='did you mean config/small.py'):
        configure(TrainConfig, ['config/smal.py'])
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'small.py').write_text('n_embd = 48\n')
    assert configure(TrainConfig, ['config/small.py']).n_embd == 48


def test_only_assigned_names_count(tmp_path):
    (tmp_path / 'c.py').write_text(
        'from math import pi as rate\nimport os.path\n\n\n'
        'def helper(steps):\n    fast = steps\n    return fast\n\n\n'
        'class C:\n    limit = 3\n\n\n'
        'unused = 1\ndel unused\nnames = [name for name in ("a", "b")]\n'
    )
    config = configure(Options, [str(tmp_path / 'c.py')])
    assert given(config) == {'rate', 'names'} and config.names == ['a', 'b']


def test_a_misspelled_file_gets_a_hint():
    with pytest.raises(UserError, match='did you mean config/train_darklyrics.py'):
        configure(Options, ['config/train_darklyric.py'])


NANOGPT = """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_run_name = 'ft-' + str(time.time())
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 5 * 8
max_iters = 20
lr_decay_iters = 600000
weight_decay = 1e-1
beta2 = 0.99
backend = 'nccl'
device = 'cpu'
dtype = 'float16'
compile = False
min_lr = 1e-4
decay_lr = False
bias = False
"""


def test_nanogpt_names_are_known(tmp_path):
    from train import TrainConfig

    (tmp_path / 'c.py').write_text(NANOGPT)
    config = configure(TrainConfig, [str(tmp_path / 'c.py')])
    assert (
        config.gradient_accumulation_steps == 40
        and config.wandb_run_name.startswith('ft-')
        and config.eval_iters == 40
    )


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda p: p.name)
def test_our_configs_are_sound(path):
    from train import TrainConfig

    configure(TrainConfig, [str(path)])


OLD = {
    'model': {
        'hidden_size': 64,
        'num_layers': 2,
        'num_heads': 2,
        'context_length': 32,
        'resid_pdrop': 0.1,
        'attn_pdrop': 0.1,
        'vocab_size': 65,
    },
    'training': {
        'lr': '3e-3',
        'maxSteps': 12,
        'warmup-steps': 2,
        'betas': [0.8, 0.9],
        'eval_steps': 5,
        'learning_rat': 1,
        'dtype': 'fp32',
    },
    'seed': 7,
    'optimizer': 'adamw',
}
NEW = dict(
    n_layer=2,
    n_head=2,
    n_embd=64,
    block_size=32,
    dropout=0.1,
    optimizer='adamw',
    learning_rate=3e-3,
    max_iters=12,
) | dict(beta1=0.8, beta2=0.9, warmup_iters=2, dtype='float32', seed=7)


def test_each_alias_means_one_option():
    from train import TrainConfig

    ours = set(TrainConfig.__dataclass_fields__)
    aliases = ' '.join(OTHER_NAMES.values()).split()
    assert len(aliases) == len(set(aliases)), 'none is listed twice'
    assert set(OTHER_NAMES) <= ours
    assert not set(aliases) & ours and not set(AMBIGUOUS) & {*ours, *aliases}


@pytest.mark.parametrize('old', ['old.json', 'old.yaml', 'old.yml'])
@pytest.mark.parametrize('new', ['new.json', 'new.yaml', 'new.yml', 'new.py'])
def test_old_configs(tmp_path, capsys, old, new):
    import yaml

    from train import TrainConfig

    (tmp_path / old).write_text(json.dumps(OLD) if old.endswith('json') else yaml.safe_dump(OLD))
    convert_file(str(tmp_path / old), str(tmp_path / new), TrainConfig)
    config = configure(TrainConfig, [str(tmp_path / new)])
    assert given(config) == set(NEW) and {name: getattr(config, name) for name in NEW} == NEW
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(old in line for line in said), 'a line for each that is left out'
    for message in (
        'model.vocab_size has no equivalent',
        'training.eval_steps has no equivalent and is left out; it can mean eval_interval or',
        'training.learning_rat has no equivalent and is left out; did you mean learning_rate?',
    ):
        assert any(message in line for line in said)


@pytest.mark.parametrize(
    'old, text, new, message',
    [
        ('missing.json', None, 'new.yaml', 'missing.json: FileNotFoundError'),
        ('old.json', '{', 'new.yaml', 'old.json: JSONDecodeError'),
        ('old.yaml', 'a: [', 'new.yaml', 'old.yaml: ParserError'),
        (
            'old.yaml',
            '!!python/object/apply:os.system [echo]',
            'new.yaml',
            'old.yaml: ConstructorError',
        ),
        ('old.json', '[1]', 'new.yaml', 'expected a mapping'),
        (
            'old.json',
            '{"lr": 1e-3}',
            'new.toml',
            'new.toml: expected a name that ends in .json or .yaml',
        ),
        ('old.py', 'lr = 1e-3', 'new.yaml', 'old.py: expected a name that ends in .json'),
        ('old.json', '{"lr": 1e-3}', 'there.yaml', 'there.yaml: already exists'),
        ('old.json', '{"lr": "fast"}', 'new.yaml', 'old.json: lr=fast: expected a number'),
        (
            'old.json',
            '{"train": {"max_steps": -1}}',
            'new.yaml',
            'max_iters=-1: expected at least 0',
        ),
        (
            'old.json',
            '{"a": {"lr": 1e-3}, "b": {"learning_rate": 1e-4}}',
            'new.yaml',
            'a.lr and b.learning_rate both set learning_rate',
        ),
        (
            'old.json',
            '{"model": {"n_embd": 10, "n_head": 3}}',
            'new.yaml',
            'n_head=3 does not divide n_embd=10',
        ),
        ('old.json', '{"colour": "red"}', 'new.yaml', 'nothing in it is an option of train.py'),
        ('old.json', '{}', 'new.yaml', 'nothing in it is an option of train.py'),
    ],
)
def test_old_configs_with_mistakes(tmp_path, old, text, new, message):
    from train import TrainConfig

    (tmp_path / 'there.yaml').write_text('mine')
    if text is not None:
        (tmp_path / old).write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        convert_file(str(tmp_path / old), str(tmp_path / new), TrainConfig)
    assert message in str(error.value) and '\n' not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / 'there.yaml').read_text() == 'mine'


def test_an_old_config_from_the_shell(tmp_path):
    (tmp_path / 'old.json').write_text(json.dumps(OLD))
    done = script('-m', 'lyregpt', 'convert-config', tmp_path / 'old.json', tmp_path / 'new.yaml')
    assert (
        done.returncode == 0
        and f'train.py {tmp_path / "new.yaml"}' in done.stdout
        and done.stderr.count('\n') == 3
    )
    again = script('-m', 'lyregpt', 'convert-config', tmp_path / 'old.json', tmp_path / 'new.yaml')
    assert (
        again.returncode == 2 and again.stderr.count('\n') == 1 and 'already exists' in again.stderr
    )


def test_sizes():
    import torch

    from model import GPT
    from train import TrainConfig

    for name, vocab_size, params in (
        ('small', 2048, 1.6e6),
        ('default', 4096, 87e6),
        ('large', 16384, 350e6),
    ):
        with torch.device('meta'):
            n = GPT(
                configure(TrainConfig, [str(ROOT / f'config/{name}.py')]).model_config(vocab_size)
            ).num_params()
        assert abs(n / params - 1) < 0.01, (name, n)


@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'bench.py', 'data/text/prepare.py'])
def test_help_and_exit_status(name):
    shown = script(name, '--help')
    assert (
        shown.returncode == 0
        and '--out_dir=' in shown.stdout
        or name == 'bench.py'
        and '--peer=' in shown.stdout
    )
    assert all(
        '  ' in line.strip() for line in shown.stdout.splitlines() if line.startswith('  --')
    ), 'each option has its help'
    wrong = script(name, '--nonsense=1')
    assert (
        wrong.returncode == 2
        and wrong.stderr.count('\n') == 1
        and 'unknown option' in wrong.stderr
        and not wrong.stdout
    )
