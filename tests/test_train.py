import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from configurator import UserError, configure
from lyregpt import checkpoint
from lyregpt.logger import METRICS
from tests.conftest import ROOT, mistake, script, tiny
from train import TrainConfig, learning_rate, main, train


def weights(out):
    return checkpoint.load(str(out / 'ckpt.pt'))['model']


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a.keys() | b.keys())


def rows(out):
    with open(out / 'metrics.csv', newline='') as f:
        return list(csv.DictReader(f))


def command(folder, out, *more):
    given = [
        f'--{name}={value}'
        for name, value in ((k, getattr(tiny(folder, out), k)) for k in tiny(folder, out).given)
    ]
    return ['train.py', *given, *more]


def test_learns_and_leaves_its_files(chars, trained):
    found = rows(trained)
    assert list(found[0]) == list(METRICS)
    losses = [float(r['train_loss']) for r in found if r['train_loss']]
    vals = [float(r['val_loss']) for r in found if r['val_loss']]
    assert losses[-1] < losses[0] - 0.5 and vals[-1] < vals[0] and len(vals) == 6
    assert float(found[-1]['val_bpb']) == pytest.approx(vals[-1] / math.log(2), rel=0.05), (
        'a character of this text is a little over a byte'
    )
    assert {
        'ckpt.pt',
        'best.pt',
        'metrics.csv',
        'train.log',
        'config.json',
        'tokenizer.json',
    } <= set(os.listdir(trained))
    assert json.loads((trained / 'config.json').read_text())['n_layer'] == 2
    assert 'validation loss' in (trained / 'train.log').read_text(encoding='utf-8')
    assert configure(TrainConfig, [str(trained / 'config.json')]).n_embd == 32, (
        'the written config is a config file'
    )


def test_same_seed_same_numbers(chars, tmp_path):
    train(tiny(chars, tmp_path / 'a', '--dropout=0.2'))
    train(tiny(chars, tmp_path / 'b', '--dropout=0.2', '--eval_interval=7', '--sample_interval=7'))
    assert same(weights(tmp_path / 'a'), weights(tmp_path / 'b')), (
        'the cadence of evaluation and samples does not change the training'
    )
    train(tiny(chars, tmp_path / 'c', '--dropout=0.2', '--seed=2'))
    assert not same(weights(tmp_path / 'a'), weights(tmp_path / 'c'))


@pytest.mark.parametrize(
    'more',
    [
        [],
        ['--optimizer=adamw', '--arch=gpt2', '--dropout=0.2'],
        ['--gradient_accumulation_steps=3', '--dropout=0.1', '--dtype=bfloat16'],
    ],
    ids=str,
)
def test_resume_equals_the_unbroken_run(chars, tmp_path, more):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train(tiny(chars, whole, '--lr_decay_iters=20', *more))
    train(tiny(chars, parts, '--lr_decay_iters=20', '--max_iters=7', *more))
    train(tiny(chars, parts, '--lr_decay_iters=20', '--max_iters=13', '--init_from=resume', *more))
    end = train(
        configure(
            TrainConfig,
            [
                f'--out_dir={parts}',
                '--init_from=resume',
                '--max_iters=20',
                '--device=cpu',
                *[m for m in more if 'dtype' in m],
            ],
        )
    )
    assert end['step'] == 20 and same(weights(whole), weights(parts))
    a, b = (
        {k: v for k, v in checkpoint.load(str(p / 'ckpt.pt'))['optimizer'].items()}
        for p in (whole, parts)
    )
    assert all(
        torch.equal(x, y)
        for k in a
        for p in a[k]['state']
        for x, y in zip(a[k]['state'][p].values(), b[k]['state'][p].values())
    )
    steps = [(r['step'], r['val_loss'] != '') for r in rows(parts)]
    assert len(steps) == len(set(steps)), 'no row twice'


def test_kill_at_any_instant_then_resume(chars, tmp_path):
    """kill -9 while it trains and saves: the files load, and the end is the unbroken run's."""
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    settings = ['--max_iters=300', '--eval_interval=10', '--lr_decay_iters=300']
    train(tiny(chars, whole, *settings))
    for attempt in range(3):
        resume = ['--init_from=resume'] if (killed / 'ckpt.pt').exists() else []
        process = subprocess.Popen(
            [sys.executable, *command(chars, killed, *settings, *resume)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = checkpoint.load(str(killed / 'ckpt.pt'))['iter_num'] if resume else 0
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if (killed / 'ckpt.pt').exists() and checkpoint.load(str(killed / 'ckpt.pt'))[
                'iter_num'
            ] > before:
                time.sleep(0.05 * attempt)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < checkpoint.load(str(killed / 'ckpt.pt'))['iter_num'] <= 300
    train(tiny(chars, killed, *settings, '--init_from=resume'))
    assert same(weights(whole), weights(killed))
    logged = [(r['step'], r['val_loss'] != '') for r in rows(killed)]
    assert logged == [(r['step'], r['val_loss'] != '') for r in rows(whole)], (
        'no row missing, none twice'
    )


@pytest.mark.parametrize(
    'number, status',
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (getattr(signal, 'SIGHUP', None), 129)],
)
def test_a_signal_saves_and_resumes(chars, tmp_path, number, status):
    process = subprocess.Popen(
        [
            sys.executable,
            *command(chars, tmp_path, '--max_iters=1000000', '--eval_interval=100000'),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            number, signal.SIG_DFL
        ),  # under nohup SIGHUP would be ignored
    )
    for line in process.stdout:
        if line.startswith('step 10'):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == status
    assert 'saved' in rest and '--init_from=resume' in rest
    step = checkpoint.load(str(tmp_path / 'ckpt.pt'))['iter_num']
    assert (
        train(tiny(chars, tmp_path, '--init_from=resume', f'--max_iters={step + 5}'))['step']
        == step + 5
    )


def test_two_processes_follow_the_same_curve(chars, tmp_path):
    settings = [
        '--gradient_accumulation_steps=2',
        '--max_iters=30',
        '--log_interval=1',
        '--dtype=float32',
    ]
    train(tiny(chars, tmp_path / 'one', *settings))
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            *command(chars, tmp_path / 'two', *settings),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (rows(tmp_path / name) for name in ('one', 'two'))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for key in 'train_loss', 'val_loss':
            assert (a[key] == '') == (b[key] == '') and (
                a[key] == '' or abs(float(a[key]) - float(b[key])) < 1e-4 * float(a[key])
            )


def test_a_batch_that_cannot_be_shared(chars, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            *command(chars, tmp_path, '--batch_size=1'),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )
    assert (
        done.returncode
        and done.stderr.count(
            'train.py: error: batch_size × gradient_accumulation_steps = 1 sequences per step are '
            'fewer than the 2 processes'
        )
        == 1
    )


def test_fine_tuning_keeps_the_tokenizer(chars, trained, tmp_path):
    end = train(
        tiny(
            chars, tmp_path / 'f', f'--init_from={trained}', '--max_iters=5', '--learning_rate=1e-4'
        )
    )
    assert (
        end['val_loss'] < 3
        and checkpoint.load(str(tmp_path / 'f' / 'ckpt.pt'))['tokenizer']
        == checkpoint.load(str(trained / 'ckpt.pt'))['tokenizer']
    )
    other = tmp_path / 'other'
    (tmp_path / 'a.txt').write_text('abc def ghi\n' * 500)
    assert (
        script(
            'data/text/prepare.py',
            f'--input={tmp_path / "a.txt"}',
            f'--out_dir={other}',
            '--tokenizer=char',
        ).returncode
        == 0
    )
    with pytest.raises(UserError, match='another tokenizer.*--tokenizer=.*tokenizer.json'):
        train(tiny(other, tmp_path / 'g', f'--init_from={trained}'))
    assert (
        script(
            'data/text/prepare.py',
            f'--input={tmp_path / "a.txt"}',
            f'--out_dir={other}',
            f'--tokenizer={trained / "tokenizer.json"}',
        ).returncode
        == 0
    )
    train(tiny(other, tmp_path / 'g', f'--init_from={trained}', '--max_iters=2'))


def test_gpt2_weights_refuse_other_tokens(chars, tmp_path):
    with pytest.raises(UserError, match='prepare it with --tokenizer=gpt2'):
        train(tiny(chars, tmp_path, '--init_from=gpt2'))


def test_stopping(chars, tmp_path):
    end = train(tiny(chars, tmp_path, '--max_iters=200', '--target_val_loss=3.2'))
    assert end['step'] < 200 and end['val_loss'] <= 3.2
    end = train(
        tiny(
            chars,
            tmp_path,
            '--max_iters=400',
            '--learning_rate=3e-2',
            '--eval_interval=10',
            '--patience=2',
            '--batch_size=1',
            '--lr_schedule=linear',
            '--decay_lr=False',
        )
    )
    assert end['step'] < 400 and 'patience' in (tmp_path / 'train.log').read_text(encoding='utf-8')
    assert (
        checkpoint.load(str(tmp_path / 'best.pt'))['best_val_loss']
        == pytest.approx(end['best_val_loss'])
        and end['best_val_loss'] < end['val_loss']
    )


def test_nan_stops_and_keeps_the_last_good_state(chars, tmp_path):
    settings = [
        '--arch=gpt2',
        '--optimizer=adamw',
        '--grad_clip=0',
        '--warmup_iters=0',
        '--eval_interval=5',
    ]
    train(tiny(chars, tmp_path, '--max_iters=5', *settings))
    with pytest.raises(
        UserError,
        match=r'became NaN or infinite at step [67]; .*keeps the last good state, of step 5',
    ):
        train(
            tiny(
                chars,
                tmp_path,
                '--max_iters=100',
                '--init_from=resume',
                *settings,
                '--learning_rate=1e30',
                '--log_interval=1',
            )
        )
    assert all(w.isfinite().all() for w in weights(tmp_path).values())
    with pytest.raises(UserError, match='nothing was saved yet'):
        train(tiny(chars, tmp_path / 'new', *settings, '--learning_rate=1e30'))
    assert not (tmp_path / 'new' / 'ckpt.pt').exists()


def test_evaluation_is_the_whole_split_by_any_cut(chars, trained, tmp_path):
    results = {
        train(
            tiny(
                chars, tmp_path / 'e', f'--init_from={trained}', '--eval_only', f'--batch_size={b}'
            )
        )['val_loss']
        for b in (1, 3, 50)
    }
    assert max(results) - min(results) < 1e-5
    part = train(
        tiny(chars, tmp_path / 'e', f'--init_from={trained}', '--eval_only', '--eval_iters=2')
    )['val_loss']
    assert (
        part != min(results)
        and part
        == train(
            tiny(
                chars,
                tmp_path / 'e',
                f'--init_from={trained}',
                '--eval_only',
                '--eval_iters=2',
                '--seed=9',
            )
        )['val_loss']
    )


def test_crop_then_resume(chars, tmp_path):
    for arch in 'gpt2', 'modern':
        train(tiny(chars, tmp_path / arch, f'--arch={arch}', '--max_iters=5'))
        train(
            tiny(chars, tmp_path / arch, '--init_from=resume', '--block_size=16', '--max_iters=8')
        )
        assert checkpoint.load(str(tmp_path / arch / 'ckpt.pt'))['model_args']['block_size'] == 16


@pytest.mark.parametrize(
    'more, message',
    [
        (['--n_layer=3'], 'n_layer=3, but'),
        (['--n_embd=64'], 'n_embd=64, but'),
        (['--block_size=64'], 'block_size=64, but'),
        (['--optimizer=adamw'], 'leave optimizer out'),
        (['--mlp=gelu'], 'mlp=gelu, but'),
        (['--n_head=3'], 'n_head=3 does not divide'),
    ],
)
def test_resuming_as_something_else(chars, trained, tmp_path, more, message):
    shutil.copytree(trained, tmp_path / 't')
    before = (tmp_path / 't' / 'ckpt.pt').read_bytes()
    with pytest.raises(UserError, match=message):
        train(tiny(chars, tmp_path / 't', '--init_from=resume', *more))
    assert (tmp_path / 't' / 'ckpt.pt').read_bytes() == before


def test_best_weights_cannot_be_resumed(chars, trained, tmp_path):
    shutil.copy(trained / 'best.pt', tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='holds weights only'):
        train(tiny(chars, tmp_path, '--init_from=resume'))


@pytest.mark.parametrize(
    'more, message',
    [
        (['--n_head=5'], 'n_head=5 does not divide n_embd=32'),
        (['--dropout=2'], 'dropout=2.0'),
        (['--device=cuda'], 'device=cuda: this machine'),
        (['--device=tpu'], 'device=tpu'),
        (['--dataset=nowhere'], 'nowhere'),
        (['--init_from=nowhere'], 'nowhere: no such folder'),
        (['--init_from=gpt3'], 'none of scratch, resume, auto, gpt2, gpt2-medium'),
        (['--init_from=resume'], 'nothing to resume there'),
        (['--batch_size=0'], 'batch_size=0'),
        (['--block_size=100000'], 'fewer than one sequence'),
        (['--dtype=float16'], 'dtype=float16 needs a GPU'),
        (['--learning_rate=-1'], 'learning_rate=-1'),
        (['--n_ff=-1'], 'n_ff=-1'),
        (['--max_iters=inf'], 'expected a whole number'),
        (['--out_dir=/proc/x'], 'cannot be written'),
    ],
)
def test_mistakes_get_one_line(chars, tmp_path, more, message, capsys):
    if 'cuda' in str(more) and torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    assert message in mistake(capsys, main, *command(chars, tmp_path / 'out', *more)[1:])
    assert not list(tmp_path.glob('out/*.pt*'))


def test_damaged_data_gets_one_line(chars, tmp_path):
    for name, content, message in (
        ('train.bin', b'123', 'odd size'),
        ('val.bin', b'', 'is empty'),
        ('train.bin', b'\xff' * (chars / 'train.bin').stat().st_size, 'beyond the vocabulary'),
        ('train.bin', (chars / 'train.bin').read_bytes()[:5000], 'cut off'),
        ('meta.json', b'{', 'meta.json: not a description'),
    ):
        folder = tmp_path / message.replace(' ', '-').replace(':', '')
        shutil.copytree(chars, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            train(tiny(folder, tmp_path / 'out'))


def test_missing_data_is_prepared(tmp_path):
    shutil.copytree(
        ROOT / 'data',
        tmp_path / 'data',
        ignore=shutil.ignore_patterns('*.bin', 'meta.*', 'input.txt', 'lyrics.jsonl'),
    )
    for name in ROOT.glob('*.py'):
        shutil.copy(name, tmp_path)
    shutil.copytree(ROOT / 'lyregpt', tmp_path / 'lyregpt')
    done = script(
        'train.py',
        '--dataset=darklyrics',
        '--eval_only',
        '--n_layer=1',
        '--n_embd=32',
        '--n_head=1',
        '--block_size=64',
        cwd=tmp_path,
    )
    assert (
        done.returncode == 0
        and 'running python data/darklyrics/prepare.py' in done.stdout
        and 'validation loss' in done.stdout
    ), done.stderr
    done = script('train.py', '--dataset=shakespeare_char', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith(
        'prepare it first: python data/shakespeare_char/prepare.py'
    ), done.stderr


@pytest.mark.skipif(
    sys.platform != 'linux' or os.geteuid() != 0, reason='needs root on Linux to mount a small disk'
)
def test_a_full_disk_does_not_end_the_training(chars, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(disk)], capture_output=True
    ).returncode:
        pytest.skip('mounting is not allowed here (no GPU, network or data would help)')
    try:
        train(tiny(chars, disk))
        (disk / 'filler').write_bytes(
            b'x' * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 60_000)
        )
        before = (disk / 'ckpt.pt').read_bytes()
        done = script(*command(chars, disk, '--init_from=resume', '--max_iters=40'))
        assert (
            done.returncode == 2
            and 'WARNING' in done.stdout
            and 'not saved: ' in done.stderr
            and 'step 40' in done.stdout
        ), done.stdout + done.stderr
        assert (disk / 'ckpt.pt').read_bytes() == before, 'the last good one is still there'
    finally:
        subprocess.run(['umount', str(disk)])


def test_options_that_are_not_numbers_are_refused():
    for name in ('learning_rate', 'max_minutes', 'beta1', 'warmdown', 'grad_clip', 'min_lr'):
        with pytest.raises(ValueError, match=f'{name}=nan: expected'):
            TrainConfig(**{name: math.nan})
    for name in ('max_iters', 'learning_rate'):
        with pytest.raises(TypeError):
            TrainConfig(**{name: None})


def test_a_run_inside_an_exception_handler_ends_as_any_other(chars, tmp_path):
    """As after a failed resume: what is handled outside is no error of this run."""
    try:
        raise KeyError
    except KeyError:
        end = train(tiny(chars, tmp_path))
    assert json.loads((tmp_path / 'run.json').read_text())[-1]['end'] == 'done'
    assert (tmp_path / 'train.log').read_text().splitlines()[-1].startswith('done: ')
    seconds = json.loads((tmp_path / 'run.json').read_text())[-1]['seconds']
    assert end['train_seconds'] == seconds['training'] > 0


def test_learning_rate_schedule():
    config = TrainConfig(learning_rate=1.0, warmup_iters=10, max_iters=100, min_lr=0.1)
    rates = [learning_rate(config, s) for s in range(101)]
    assert (
        0 < rates[0] < rates[9] < rates[10] == 1.0
        and rates[100] == pytest.approx(0.1)
        and all(np.diff(rates[10:]) <= 0)
    )
    linear = TrainConfig(
        learning_rate=1.0,
        warmup_iters=10,
        max_iters=100,
        min_lr=0.0,
        lr_schedule='linear',
        warmdown=0.5,
    )
    assert [learning_rate(linear, s) for s in (50, 75, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert (
        learning_rate(TrainConfig(warmup_iters=100, lr_decay_iters=100, max_iters=200), 150) > 0
    ), 'no division by zero when warm-up equals decay'
    assert {learning_rate(TrainConfig(decay_lr=False), s) for s in (0, 10**6)} == {6e-4}, (
        'as nanoGPT: no warm-up either'
    )


def test_compiled_training(chars, tmp_path):
    if shutil.which('g++') is None and shutil.which('clang++') is None:
        pytest.skip('no C++ compiler (no GPU either)')
    train(tiny(chars, tmp_path / 'eager', '--max_iters=4', '--log_interval=1'))
    train(
        tiny(
            chars,
            tmp_path / 'compiled',
            '--max_iters=4',
            '--log_interval=1',
            '--compile=True',
            '--n_layer=2',
        )
    )
    assert 'compiled' in (tmp_path / 'compiled' / 'train.log').read_text(encoding='utf-8')
    a, b = (
        [float(r['train_loss']) for r in rows(tmp_path / name) if r['train_loss']]
        for name in ('eager', 'compiled')
    )
    assert a == pytest.approx(b, rel=1e-3)
    assert not any(
        k.startswith('_orig_mod')
        for k in torch.load(tmp_path / 'compiled' / 'ckpt.pt', weights_only=True)['model']
    )


@pytest.mark.parametrize('arch', ['modern', 'gpt2'])
@pytest.mark.parametrize('dropped', ['all', 'below the head'])
def test_wrong_compiled_gradients_are_noticed(chars, tmp_path, monkeypatch, arch, dropped):
    """A compiler that drops gradients, as torch 2.11 did, must not train."""

    class Wrong(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            if dropped == 'all':
                return 0 * self.model(x, y)
            return torch.nn.functional.cross_entropy(
                self.model.lm_head(self.model.hidden(x).detach()).flatten(0, 1), y.flatten()
            )

    options = ('--max_iters=4', '--log_interval=1', f'--arch={arch}', '--tie_weights=False')
    train(tiny(chars, tmp_path / 'eager', *options))
    monkeypatch.setattr(torch, 'compile', Wrong)
    monkeypatch.setattr('lyregpt.trial.can_compile', lambda device: '')
    train(tiny(chars, tmp_path / 'wrong', *options, '--compile=True'))
    assert 'eager (compiled gradients are wrong: ' in (tmp_path / 'wrong' / 'train.log').read_text(
        encoding='utf-8'
    )
    a, b = (
        [float(r['train_loss']) for r in rows(tmp_path / name) if r['train_loss']]
        for name in ('eager', 'wrong')
    )
    assert a == b


def test_right_compiled_gradients_pass_whatever_the_dropout(chars, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model, **options: model)
    monkeypatch.setattr('lyregpt.trial.can_compile', lambda device: '')
    train(
        tiny(chars, tmp_path, '--max_iters=100', '--dropout=0.5', '--batch_size=16', '--arch=gpt2')
    )
    train(tiny(chars, tmp_path, '--max_iters=102', '--init_from=resume', '--compile=True'))
    assert 'float32, compiled, 1 process' in (tmp_path / 'train.log').read_text(encoding='utf-8')


def test_no_compiler_falls_back(chars, tmp_path):
    done = script(
        *command(chars, tmp_path, '--max_iters=2', '--compile=True'),
        PATH='/nonexistent',
        CXX='/nonexistent/g++',
    )
    assert done.returncode == 0 and 'eager (no C++ compiler found)' in done.stdout, (
        done.stdout + done.stderr
    )


def test_tensorboard(chars, tmp_path):
    pytest.importorskip('tensorboard')
    train(tiny(chars, tmp_path, '--tensorboard_log', '--max_iters=5'))
    assert any(name.startswith('events.out') for name in os.listdir(tmp_path))


def test_from_python_without_the_command_line(chars, tmp_path):
    end = train(
        TrainConfig(
            dataset=str(chars),
            out_dir=str(tmp_path),
            n_layer=1,
            n_head=1,
            n_embd=16,
            block_size=16,
            batch_size=2,
            gradient_accumulation_steps=1,
            max_iters=3,
            device='cpu',
        )
    )
    assert end['step'] == 3


def test_evaluation_alone_writes_nothing(chars, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 't')
    before = {p.name: p.read_bytes() for p in (tmp_path / 't').iterdir()}
    train(tiny(chars, tmp_path / 't', f'--init_from={tmp_path / "t"}', '--eval_only'))
    assert {p.name: p.read_bytes() for p in (tmp_path / 't').iterdir()} == before


def test_a_new_run_in_an_old_folder_drops_the_old_best(chars, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 't')
    process = subprocess.Popen(
        [
            sys.executable,
            *command(chars, tmp_path / 't', '--max_iters=1000000', '--eval_interval=100000'),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    next(line for line in process.stdout if line.startswith('step 10'))
    process.terminate()
    process.communicate()
    assert not (tmp_path / 't' / 'best.pt').exists() and (tmp_path / 't' / 'ckpt.pt').exists()
    before = checkpoint.load(str(trained / 'best.pt'))['model']
    assert same(before, checkpoint.load(str(tmp_path / 't' / 'earlier' / 'best.pt'))['model']), (
        'and nothing of it is lost'
    )
    train(tiny(chars, tmp_path / 't', '--max_iters=2'))
    assert checkpoint.load(str(tmp_path / 't' / 'earlier-2' / 'ckpt.pt'))['iter_num'] >= 10


def test_resuming_a_run_that_had_ended_by_itself_ends_again(chars, tmp_path):
    ended = train(tiny(chars, tmp_path, '--target_val_loss=100', '--max_iters=50'))
    assert ended['step'] == 10 == train(tiny(chars, tmp_path, '--init_from=auto'))['step']
    assert (
        train(tiny(chars, tmp_path, '--init_from=auto', '--target_val_loss=0', '--max_iters=12'))[
            'step'
        ]
        == 12
    )


def test_a_stranger_s_checkpoint_names_no_script_to_be_run(chars, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    (tmp_path / 'prepare.py').write_text(
        f'# offline: bool\nimport os; os.mkdir({str(tmp_path / "ran")!r})', encoding='utf-8'
    )
    state = checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))
    state['config'] |= {'dataset': str(tmp_path), 'prepare': str(tmp_path / 'prepare.py')}
    checkpoint.save(str(tmp_path / 'out' / 'ckpt.pt'), state)
    with pytest.raises(UserError, match='not prepared; prepare it first'):
        train(
            configure(
                TrainConfig, ['--init_from=resume', f'--out_dir={tmp_path / "out"}', '--device=cpu']
            )
        )
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('way', ['interval', 'minutes', 'signal'])
def test_checkpoints_between_evaluations(chars, tmp_path, way):
    words = {
        'interval': ['--checkpoint_interval=7'],
        'minutes': ['--checkpoint_minutes=0.01'],
        'signal': [],
    }[way]
    process = subprocess.Popen(
        [
            sys.executable,
            *command(
                chars,
                tmp_path,
                '--max_iters=1000000',
                '--eval_interval=100000',
                '--checkpoint_minutes=0',
                *words,
            ),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        next(line for line in process.stdout if line.startswith('step 10'))
        if way == 'signal':
            process.send_signal(signal.SIGUSR1)
        deadline = time.time() + 30
        while not (tmp_path / 'ckpt.pt').exists() and time.time() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert state['iter_num'] % 7 == 0 if way == 'interval' else state['iter_num'] > 0
    assert len(state['losses']) == state['iter_num'] % 5, (
        'the losses that the next log line is the mean of'
    )


def test_a_signal_in_a_long_step_does_not_wait_for_its_end(chars, tmp_path):
    words = command(
        chars,
        tmp_path,
        '--max_iters=10',
        '--gradient_accumulation_steps=1000000',
        '--batch_size=1',
        '--eval_interval=1000',
    )
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    next(line for line in process.stdout if line.startswith('machine'))
    time.sleep(1)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143 and checkpoint.load(str(tmp_path / 'ckpt.pt'))['iter_num'] == 0


def test_resume_takes_this_runs_optimizer_knobs(chars, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 't')
    train(
        tiny(
            chars,
            tmp_path / 't',
            '--init_from=resume',
            '--max_iters=61',
            '--weight_decay=0.7',
            '--beta1=0.5',
        )
    )
    state = checkpoint.load(str(tmp_path / 't' / 'ckpt.pt'))['optimizer']
    assert {g['betas'][0] for g in state['adamw']['param_groups']} == {0.5} and {
        g['weight_decay'] for g in state['muon']['param_groups']
    } == {0.7}
    assert 'weight_decay=0.7 (was 0.1)' in (tmp_path / 't' / 'train.log').read_text(
        encoding='utf-8'
    )


def test_init_from_a_folder_of_gpt2_weights(tmp_path):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'd').mkdir()
    for split in 'train', 'val':
        np.random.default_rng(0).integers(0, 50257, 200).astype('<u2').tofile(
            tmp_path / 'd' / f'{split}.bin'
        )
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / 'hf')
    config = [
        f'--dataset={tmp_path / "d"}',
        f'--out_dir={tmp_path / "out"}',
        f'--init_from={tmp_path / "hf"}',
        '--device=cpu',
        '--max_iters=2',
        '--batch_size=1',
    ]
    train(
        configure(
            TrainConfig,
            [
                *config,
                '--gradient_accumulation_steps=1',
                '--learning_rate=1e-5',
                '--optimizer=adamw',
                '--block_size=512',
            ],
        )
    )
    state = checkpoint.load(str(tmp_path / 'out' / 'ckpt.pt'))
    assert (
        state['config']['n_layer'] == 1
        and state['config']['block_size'] == 32
        and state['tokenizer']['kind'] == 'gpt2'
    )
    (tmp_path / 'hf' / 'model.safetensors').write_bytes(
        (tmp_path / 'hf' / 'model.safetensors').read_bytes()[:1000]
    )
    with pytest.raises(UserError, match='model.safetensors: damaged'):
        train(configure(TrainConfig, config))


@pytest.mark.parametrize('whom', ['torchrun', 'all', 'one'])
def test_a_signal_to_several_processes_saves(chars, tmp_path, whom):
    words = command(
        chars,
        tmp_path,
        '--max_iters=1000000',
        '--eval_interval=100000',
        '--gradient_accumulation_steps=2',
    )
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        *words,
    ]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(
        launch,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
        start_new_session=True,
    )
    next(line for line in process.stdout if line.startswith('step 10'))
    if whom == 'torchrun':  # which passes it on
        process.send_signal(signal.SIGTERM)
    elif whom == 'all':  # so that the processes get it twice
        os.killpg(process.pid, signal.SIGTERM)
    else:
        workers = subprocess.run(
            ['pgrep', '-P', str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(workers[-1]), signal.SIGTERM)
    process.communicate(timeout=60)
    step = checkpoint.load(str(tmp_path / 'ckpt.pt'))['iter_num']
    assert (
        step > 0
        and train(tiny(chars, tmp_path, '--init_from=resume', f'--max_iters={step + 2}'))['step']
        == step + 2
    )


# -----------------------------------------------------------------------------
# The work fitted to the machine


def test_a_budget_of_minutes(chars, tmp_path):
    out = tmp_path / 'o'
    began = time.monotonic()
    end = train(
        tiny(chars, out, '--max_minutes=0.05', '--min_lr=0', '--max_iters=5', '--eval_interval=40')
    )
    took = time.monotonic() - began
    assert end['step'] > 5, 'the clock counts, not max_iters'
    assert 2 < took < 7, 'about three seconds, and what it takes to set up'
    last = [float(r['lr']) for r in rows(out) if r['lr']][-1]
    assert last < 0.1 * 1e-2, 'the schedule came down in time'
    assert rows(out)[-1]['val_loss'] and float(rows(out)[-1]['seconds']) < 4.5
    spent = train(tiny(chars, out, '--init_from=resume'))
    assert spent['step'] <= end['step'] + 3, 'the budget is spent'
    more = train(tiny(chars, out, '--init_from=resume', '--max_minutes=0.08'))
    assert more['step'] > end['step'] + 5 and float(rows(out)[-1]['seconds']) < 6.5, (
        'what is left of the larger budget, no more'
    )


def test_rate_over_a_budget():
    config = TrainConfig(
        max_minutes=10,
        learning_rate=1.0,
        min_lr=0.0,
        warmup_iters=100,
        lr_schedule='linear',
        warmdown=0.5,
    )
    assert learning_rate(config, 0, 0.0) == pytest.approx(1 / 101)
    assert learning_rate(config, 3, 0.025) == pytest.approx(0.5), (
        'a slow machine warms up by the clock'
    )
    assert learning_rate(config, 100, 0.01) == 1.0, 'a fast one by steps'
    assert learning_rate(config, 500, 0.75) == pytest.approx(0.5)
    assert learning_rate(config, 900, 1.0) == learning_rate(config, 901, 1.2) == 0.0


def test_a_validation_split_too_long_for_the_budget(tmp_path, demo_text):
    from lyregpt.dataset import write_dataset
    from lyregpt.tokenizer import CharTokenizer

    folder = tmp_path / 'd'
    write_dataset(
        str(folder),
        [('train', demo_text, True), ('val', demo_text * 40, True)],
        CharTokenizer.train([demo_text]),
    )
    train(tiny(folder, tmp_path / 'o', '--max_minutes=0.02'))
    told = (tmp_path / 'o' / 'train.log').read_text(encoding='utf-8')
    seen, whole = (
        int(n.replace(',', ''))
        for n in told.split('validation on ')[1].split(' sequences')[0].split(' of ')
    )
    assert (
        seen < whole
        and json.loads((tmp_path / 'o' / 'config.json').read_text())['eval_iters'] == seen // 4
    )


def test_batch_size_auto(chars, tmp_path):
    words = ['--gradient_accumulation_steps=6', '--max_iters=5']
    one = train(tiny(chars, tmp_path / 'one', '--batch_size=1', *words))
    auto = train(tiny(chars, tmp_path / 'auto', '--batch_size=auto', *words))
    assert auto['val_loss'] == pytest.approx(one['val_loss'], rel=1e-4), (
        'the same steps, added up in another order'
    )
    assert checkpoint.load(str(tmp_path / 'auto' / 'ckpt.pt'))['micro'] == 6
    assert 'micro-batch size 6' in (tmp_path / 'auto' / 'train.log').read_text(encoding='utf-8')
    whole = train(tiny(chars, tmp_path / 'auto', '--init_from=resume', '--max_iters=9'))
    assert whole['step'] == 9


@pytest.mark.skipif(
    os.name == 'nt' or shutil.which('g++') is None, reason='needs a compiler to break'
)
def test_a_compiler_that_fails_is_told_and_left_out(chars, tmp_path):
    compiler = tmp_path / 'c++'
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        'echo no room for the output >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    words = command(chars, tmp_path / 'o', '--compile=True', '--max_iters=3')
    done = script(*words, CXX=compiler, TORCHINDUCTOR_CACHE_DIR=tmp_path / 'cache')
    assert done.returncode == 0, done.stderr
    assert 'eager (compiling failed: ' in done.stdout and (tmp_path / 'o' / 'ckpt.pt').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='sets a limit of memory')
def test_out_of_memory_names_the_amount_and_the_knob(chars, tmp_path):
    words = command(chars, tmp_path / 'o', '--batch_size=20000', '--n_embd=512')
    limit = 'import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9,) * 2)'
    code = f'{limit}; sys.argv = {words!r}; runpy.run_path("train.py", run_name="__main__")'
    done = script('-c', code)
    assert (
        done.returncode == 2
        and 'out of memory (' in done.stderr
        and '--batch_size=auto --gradient_accumulation_steps=20000' in done.stderr
    ), done.stderr


def test_remat_is_the_same_training(chars, tmp_path):
    for name, words in (('plain', []), ('remat', ['--remat=True'])):
        train(tiny(chars, tmp_path / name, '--max_iters=6', '--dropout=0.1', *words))
    assert same(weights(tmp_path / 'plain'), weights(tmp_path / 'remat')), 'dropout included'


@pytest.mark.parametrize(
    'word', ['--max_minutes=0', '--max_minutes=-1', '--batch_size=0', '--batch_size=many']
)
def test_budgets_that_cannot_be(chars, tmp_path, word, capsys):
    assert word[2:].split('=')[0] in mistake(
        capsys, main, *command(chars, tmp_path / 'o', word)[1:]
    )
