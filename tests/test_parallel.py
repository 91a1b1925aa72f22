"""Several processes: the same curve on any number of them, sharded weights, restarts, nodes."""

import csv
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from configurator import UserError
from lyregpt import checkpoint
from lyregpt.dataset import Split
from lyregpt.distributed import shares
from lyregpt.optim import configure_optimizers
from model import GPT, GPTConfig
from tests.conftest import ROOT, mistake, script, tiny
from train import train

OPTIONS = (
    '--n_layer=2 --n_head=2 --n_embd=48 --block_size=32 --batch_size=2 '
    '--gradient_accumulation_steps=6 --learning_rate=3e-3 --warmup_iters=5 '
    '--log_interval=1 --device=cpu --dtype=float32'
).split()


def torchrun(processes, chars, out, *more, timeout=200, launcher=('--standalone',), **env):
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        *launcher,
        f'--nproc_per_node={processes}',
        'train.py',
    ]
    if processes == 1 and launcher == ('--standalone',):
        command = [sys.executable, 'train.py']
    return subprocess.run(
        [*command, f'--dataset={chars}', f'--out_dir={out}', *OPTIONS, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {'OMP_NUM_THREADS': '1'} | env,
    )


def curve(out):
    """Training losses by step, and validation losses by step."""
    with open(out / 'metrics.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    return ({int(r['step']): float(r[k]) for r in rows if r[k]} for k in ('train_loss', 'val_loss'))


def assert_same_curve(a, b, steps):
    """Within 1e-6 at the first step, 1e-4 at all others, training and validation."""
    (train_a, val_a), (train_b, val_b) = curve(a), curve(b)
    assert (
        train_a.keys() == train_b.keys() == set(range(1, steps + 1))
        and val_a.keys() == val_b.keys()
    )
    assert abs(train_a[1] / train_b[1] - 1) < 1e-6
    assert max(abs(x / y - 1) for x, y in zip(train_a.values(), train_b.values())) < 1e-4
    assert max(abs(x / y - 1) for x, y in zip(val_a.values(), val_b.values())) < 1e-4


@pytest.mark.parametrize(
    'sequences, micro_batch_size', [(12, 2), (12, 12), (13, 3), (4, 1), (480, 7)]
)
def test_shares_are_the_whole_batch_in_order(sequences, micro_batch_size):
    for size in 1, 2, 3, 4:
        parts = [shares(sequences, rank, size, micro_batch_size) for rank in range(size)]
        assert [i for mine in parts for start, stop in mine for i in range(start, stop)] == list(
            range(sequences)
        )
        assert len({len(mine) for mine in parts}) == 1 and all(
            stop - start <= micro_batch_size for mine in parts for start, stop in mine
        )
    with pytest.raises(UserError, match='fewer than the'):
        shares(sequences, 0, sequences + 1, micro_batch_size)


@pytest.fixture(scope='module')
def alone(chars, tmp_path_factory):
    """One process's run of 30 steps, stopped at 20 for a while and compared as a whole."""
    out = tmp_path_factory.mktemp('alone')
    done = torchrun(1, chars, out, '--max_iters=30', '--eval_interval=10', '--lr_decay_iters=30')
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    'processes, more',
    [(3, ['--parallel=ddp']), (2, ['--parallel=fsdp', '--remat=True', '--sample_interval=30'])],
)
def test_the_same_curve_on_several_processes(chars, alone, tmp_path, processes, more):
    done = torchrun(processes, chars, tmp_path, '--max_iters=30', '--eval_interval=10', *more)
    assert done.returncode == 0, done.stderr
    assert_same_curve(alone, tmp_path, 30)


@pytest.mark.long
def test_the_same_curve_over_a_hundred_steps(chars, tmp_path):
    runs = {
        f'{n}-{p}': (n, p)
        for n, p in (
            (1, 'ddp'),
            (2, 'ddp'),
            (3, 'ddp'),
            (4, 'ddp'),
            (2, 'fsdp'),
            (1, 'fsdp'),
            (3, 'fsdp'),
        )
    }
    for arch in 'modern', 'gpt2':
        for name, (processes, parallel) in runs.items():
            done = torchrun(
                processes,
                chars,
                tmp_path / arch / name,
                '--max_iters=100',
                '--eval_interval=25',
                f'--parallel={parallel}',
                f'--arch={arch}',
            )
            assert done.returncode == 0, done.stderr
            (a, _), (b, _) = curve(tmp_path / arch / '1-ddp'), curve(tmp_path / arch / name)
            furthest = max(abs(x / y - 1) for x, y in zip(a.values(), b.values()))
            first = abs(a[1] / b[1] - 1)
            print(f'{arch} {name}: {first:.1e} at step 1, at most {furthest:.1e} over 100 steps')
            assert_same_curve(tmp_path / arch / '1-ddp', tmp_path / arch / name, 100)


def test_stop_on_some_processes_and_go_on_with_others(chars, alone, tmp_path):
    """4 processes (DDP) → 2 (FSDP2, from one file) → 1 (DDP, from a folder of shards)."""
    stages = ((4, 10, 'ddp', ''), (2, 20, 'fsdp', 'resume'), (1, 30, 'ddp', 'auto'))
    for processes, until, parallel, init in stages:
        more = [
            f'--max_iters={until}',
            '--eval_interval=10',
            '--lr_decay_iters=30',
            f'--parallel={parallel}',
            *([f'--init_from={init}'] if init else []),
        ]
        done = torchrun(processes, chars, tmp_path, *more)
        assert done.returncode == 0, done.stderr
        assert processes == 4 or 'resuming' in done.stdout
    assert_same_curve(alone, tmp_path, 30)


@pytest.fixture(scope='module')
def sharded(chars, tmp_path_factory):
    """The out_dir of a run of three processes with sharded weights, and tied ones."""
    out = tmp_path_factory.mktemp('sharded')
    done = torchrun(
        3, chars, out, '--max_iters=8', '--eval_interval=4', '--parallel=fsdp', '--arch=gpt2'
    )
    assert done.returncode == 0, done.stderr
    return out


def test_merge_and_split_lose_nothing(sharded, tmp_path):
    for args in (
        ['merge', sharded / 'ckpt', tmp_path / 'm.pt'],
        ['split', tmp_path / 'm.pt', tmp_path / 's'],
        ['merge', tmp_path / 's', tmp_path / 'n.pt'],
    ):
        done = script('-m', 'lyregpt', 'checkpoint', *args)
        assert done.returncode == 0 and done.stdout.endswith('written\n'), done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('m.pt', 'n.pt'))
    a, b = checkpoint.flatten_state(one), checkpoint.flatten_state(two)
    assert (
        a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        and a[1] == b[1]
    )
    assert (
        any('exp_avg_sq' in name for name in a[0])
        and any('momentum_buffer' in name for name in a[0])
        and one['iter_num'] == 8
    )
    # torch's own optimizers take the merged states
    model = checkpoint.build_model(checkpoint.load(str(tmp_path / 'm.pt')), 'm.pt')
    for kind, optimizer in configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95)).items():
        optimizer.load_state_dict(one['optimizer'][kind])


def test_a_folder_is_sampled_inspected_and_verified(sharded, tmp_path):
    done = script(
        'sample.py',
        f'--out_dir={sharded}',
        '--max_new_tokens=20',
        '--num_samples=1',
        '--device=cpu',
    )
    assert done.returncode == 0 and len(done.stdout) > 20, done.stderr
    done = script('-m', 'lyregpt', 'checkpoint', 'inspect', sharded)
    assert (
        done.returncode == 0 and 'files: 5' in done.stdout and 'with adamw and muon' in done.stdout
    ), done.stdout
    shutil.copytree(sharded, tmp_path / 'out')
    shard = next((tmp_path / 'out' / 'ckpt').glob('*.safetensors'))
    shard.write_bytes(shard.read_bytes()[:-1] + b'\x00\x00')
    done = script('-m', 'lyregpt', 'checkpoint', 'verify', tmp_path / 'out')
    assert (
        done.returncode == 2
        and f'the checksum of {shard.name} is wrong' in done.stderr
        and done.stdout.count(': OK') == 2
    )
    if os.name == 'posix':
        check = subprocess.run(
            ['sha256sum', '--check', 'SHA256SUMS'],
            cwd=sharded / 'ckpt',
            capture_output=True,
            text=True,
        )
        assert check.returncode == 0 and check.stdout.count(': OK') == 4, (
            'the sums are those of the standard tool'
        )


def test_mistakes_with_checkpoints(sharded, trained, tmp_path, capsys):
    for args, message in (
        (['merge', trained / 'ckpt.pt', tmp_path / 'x.pt'], 'merge reads a folder'),
        (['split', sharded / 'ckpt', tmp_path / 'x'], 'split reads a file'),
        (['split', trained / 'ckpt.pt', sharded], 'already exists'),
        (['verify', tmp_path / 'nothing'], 'no such folder or file'),
        (['verify', tmp_path], 'holds no checkpoint'),
    ):
        assert message in mistake(capsys, checkpoint.main, *args)


@pytest.mark.parametrize(
    'more, message',
    [
        (['--parallel=fsdp', '--dtype=float16'], 'does not work with parallel=fsdp'),
        (['--cpu_offload=True'], 'needs parallel=fsdp'),
        (['--shard_groups=2'], 'deals out numbered shards'),
        (['--shard_groups=5'], 'cannot be divided equally among shard_groups=5'),
        (['--timeout_minutes=0'], 'timeout_minutes=0.0: expected more than 0'),
        (['--init_from=auto:nowhere'], 'nowhere: no such folder'),
    ],
)
def test_mistakes_get_one_line(chars, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        train(tiny(chars, tmp_path / 'out', *more))
    assert not (tmp_path / 'out').exists()


def test_init_from_auto(chars, tmp_path):
    assert train(tiny(chars, tmp_path, '--init_from=auto', '--max_iters=4'))['step'] == 4
    again = train(tiny(chars, tmp_path, '--init_from=auto', '--max_iters=6'))
    assert again['step'] == 6 and 'resuming' in (tmp_path / 'train.log').read_text(encoding='utf-8')
    other = train(tiny(chars, tmp_path / 'other', f'--init_from=auto:{tmp_path}', '--max_iters=2'))
    assert other['step'] == 2, 'nothing to resume: it fine-tunes what was named'


def test_a_restarted_process_resumes_whatever_it_was_told_at_first(
    chars, trained, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path / 'out')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert train(tiny(chars, tmp_path / 'out', '--max_iters=62'))['step'] == 62
    assert 'resuming' in (tmp_path / 'out' / 'train.log').read_text(encoding='utf-8')


def shards(folder, count=4, tokens=1500):
    """A dataset of numbered shards whose token ids tell which shard they are from."""
    folder.mkdir()
    for number in range(count):
        np.full(tokens, number, dtype='<u2').tofile(folder / f'words_train_{number:06d}.bin')
    np.zeros(300, dtype='<u2').tofile(folder / 'words_val_000000.bin')
    return folder


def test_a_node_needs_only_its_own_shards(tmp_path):
    whole = Split(str(shards(tmp_path / 'all')), 'train', 16, 50257, 1337, 1, 2)
    mine = tmp_path / 'mine'
    mine.mkdir()
    for number in 1, 3:
        shutil.copy(tmp_path / 'all' / f'words_train_{number:06d}.bin', mine)
    part = Split(str(mine), 'train', 16, 50257, 1337, 1, 2)
    assert part.n_sequences == whole.n_sequences
    for step in 0, 7, 400:
        a, b = whole.batch(step, 5)[0], part.batch(step, 5)[0]
        assert np.array_equal(a, b) and set(np.unique(a)) <= {1, 3}
    with pytest.raises(UserError, match='whose number modulo 2 is 0'):
        Split(str(mine), 'train', 16, 50257, 1337, 0, 2)


def test_two_nodes_with_their_own_shards(tmp_path):
    """Two torchrun agents on loopback, each with its half of the training shards.

    The curve is that of one machine.
    """
    everything = shards(tmp_path / 'all')
    nodes = [tmp_path / 'node0', tmp_path / 'node1']
    for i, node in enumerate(nodes):
        node.mkdir()
        for path in everything.glob('*.bin'):
            if 'val' in path.name or int(path.stem[-6:]) % 2 == i:
                shutil.copy(path, node)
    words = [
        '--shard_groups=2',
        '--max_iters=6',
        '--eval_interval=3',
        '--n_embd=16',
        '--init_from=auto',
    ]
    port = 29000 + os.getpid() % 1000
    agents = [
        subprocess.Popen(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--nnodes=2',
                '--nproc_per_node=1',
                '--rdzv_backend=c10d',
                f'--rdzv_endpoint=localhost:{port}',
            ]
            + [
                '--rdzv_id=words',
                '--max_restarts=3',
                'train.py',
                f'--dataset={node}',
                f'--out_dir={tmp_path / "out"}',
                *OPTIONS,
                *words,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        )
        for node in nodes
    ]
    for agent in agents:
        _, err = agent.communicate(timeout=200)
        assert agent.returncode == 0, err
    done = torchrun(1, everything, tmp_path / 'one', *words)
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path / 'one', tmp_path / 'out', 6)


def test_a_large_model_is_made_without_its_memory():
    """On the meta device; sharding and filling it is what the runs above do."""
    with torch.device('meta'):
        model = GPT(
            GPTConfig(n_layer=32, n_head=32, n_embd=4096, vocab_size=32000, block_size=4096)
        )
    assert model.num_params() > 6_500_000_000 and all(p.is_meta for p in model.parameters())
