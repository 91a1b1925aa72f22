import json
import subprocess
import sys

import pytest

import sample
from configurator import UserError, configure
from lyregpt.generate import load_model, prompt_text
from sample import SampleConfig, load, print_samples
from tests.conftest import ROOT, mistake, script


def test_samples(trained):
    words = [
        'sample.py',
        f'--out_dir={trained}',
        '--start=the ',
        '--max_new_tokens=40',
        '--device=cpu',
    ]
    first = script(*words)
    assert (
        first.returncode == 0
        and first.stdout.startswith('the ')
        and first.stdout.count('-' * 40) == 2
    ), first.stderr
    assert script(*words).stdout == first.stdout, 'same command, same words'
    told = [
        json.loads(line) for line in script(*words, '--json', '--num_samples=4').stdout.splitlines()
    ]
    assert [t['sample'] for t in told] == [0, 1, 2, 3] and all(
        t['tokens'] == 40 and t['prompt'] == 'the ' for t in told
    )
    assert first.stdout.split('\n' + '-' * 40 + '\n')[1].rstrip('\n') == (
        'the ' + told[1]['text']
    ).rstrip('\n'), 'sample 1 is the same whatever num_samples is'
    assert len({t['text'] for t in told}) == 4


def test_no_dataset_is_needed(trained, tmp_path):
    import shutil

    shutil.copy(trained / 'best.pt', tmp_path)
    done = script('sample.py', f'--out_dir={tmp_path}', '--max_new_tokens=5', '--num_samples=1')
    assert done.returncode == 0 and done.stdout


def test_prompts(tmp_path):
    (tmp_path / 'p.txt').write_text('näher\n', encoding='utf-8')
    assert prompt_text(SampleConfig(start=f'FILE:{tmp_path / "p.txt"}')) == 'näher\n'
    assert (
        prompt_text(SampleConfig(artist='A', title='T', start='Go')) == 'Artist: A\nTitle: T\n\nGo'
    )
    assert prompt_text(SampleConfig(artist='A', album='B')) == 'Artist: A\nAlbum: B\n'


@pytest.mark.parametrize(
    'more, message',
    [
        (['--top_p=1.5'], 'top_p=1.5'),
        (['--temperature=-1'], 'temperature=-1'),
        (['--num_samples=0'], 'num_samples=0'),
        (['--start=日本'], "character '日'"),
        (['--start=FILE:nowhere'], 'nowhere'),
        (['--out_dir=nowhere'], 'nowhere: no such folder'),
        (['--init_from=gpt9'], 'gpt9'),
        (['--top_k=-5'], 'top_k=-5'),
        (['--seed=1e30'], 'seed=1000'),
        (['--json', '--interactive'], 'json and interactive'),
        (['--device=cuda:77'], 'device=cuda:77'),
    ],
)
def test_mistakes_get_one_line(trained, more, message, capsys):
    assert message in mistake(capsys, sample.main, f'--out_dir={trained}', *more)


def test_a_checkpoint_is_no_pretrained_model(trained):
    with pytest.raises(UserError, match=f'a lyreGPT checkpoint; use --out_dir={trained}'):
        load_model(init_from=str(trained), device='cpu')


@pytest.mark.parametrize(
    'more',
    [
        ['--temperature=0'],
        ['--top_k=0'],
        ['--top_p=0'],
        ['--top_k=None'],
        ['--temperature=0', '--top_p=0.5'],
    ],
)
def test_zero_means_off_or_greedy(trained, more, capsys):
    config = configure(
        SampleConfig, [f'--out_dir={trained}', '--max_new_tokens=10', '--device=cpu', *more]
    )
    print_samples(load(config), config)
    assert len(capsys.readouterr().out) > 10


def test_output_may_be_cut_off(trained):
    done = subprocess.run(
        f'{sys.executable} sample.py --out_dir={trained} --max_new_tokens=400 | head -c 5',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert 'Traceback' not in done.stderr


def test_int8(trained):
    words = [
        'sample.py',
        f'--out_dir={trained}',
        '--start=the ',
        '--max_new_tokens=30',
        '--device=cpu',
        '--quantize=int8',
    ]
    done = script(*words)
    assert (
        done.returncode == 0
        and done.stdout.startswith('the ')
        and 'float32, int8 weights' in done.stderr
    )
    assert script(*words).stdout == done.stdout


@pytest.mark.parametrize(
    'word, message',
    [
        ('--quantize=int4', 'int8'),
        ('--compile=True', 'compile=True: pays off on CUDA only'),
        ('--quantize=yes', 'quantize'),
    ],
)
def test_kinds_that_cannot_be(trained, word, message, capsys):
    assert message in mistake(capsys, sample.main, f'--out_dir={trained}', '--device=cpu', word)
