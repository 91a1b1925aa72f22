"""Logging to Weights & Biases with the real package, offline: what it stored is read back."""

import json
import struct

from tests.conftest import ROOT, script

OPTIONS = [
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=32',
    '--batch_size=4',
    '--gradient_accumulation_steps=1',
    '--warmup_iters=2',
    '--lr_decay_iters=20',
    '--eval_interval=10',
    '--log_interval=5',
    '--device=cpu',
    '--report=False',
    '--out_dir=out',
]


BLOCK = 32768


def records(path):
    """The records in one of wandb's files: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b''
    assert data.startswith(b':W&B')
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # what is left of a block holds no header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack('<IHB', data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b''
            yield record


def stored(folder):
    """(run id, project, options, {step: figures}) of one start of a run."""
    [path] = folder.glob('run-*.wandb')
    rows = {}
    for record in records(path):
        if record.HasField('run') and record.run.project:
            run = record.run
        if record.HasField('history'):
            items = record.history.item
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            rows.setdefault(row['_step'], {}).update(row)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    return run.run_id, run.project, config, rows


def test_a_resumed_run_continues_the_same_run(tmp_path, chars):
    words = ['train.py', f'--dataset={chars}', *OPTIONS, '--wandb_log', '--wandb_project=songs']
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    for more in ['--max_iters=10'], ['--max_iters=20', '--init_from=resume']:
        done = script(ROOT / words[0], *words[1:], *more, cwd=tmp_path, timeout=300, **env)
        assert done.returncode == 0, done.stderr

    first, second = map(stored, sorted((tmp_path / 'wandb').glob('offline-run-*')))
    assert first[0] == second[0], 'one run, resumed'
    sessions = json.loads((tmp_path / 'out' / 'run.json').read_text(encoding='utf-8'))
    assert [session['wandb_id'] for session in sessions] == [first[0]] * 2
    assert first[1] == 'songs' and first[2]['n_embd'] == 32
    assert max(first[3]) == 10 and max(second[3]) == 20
    assert all(row['val_loss'] > 0 for row in (first[3][10], second[3][20]))
    assert second[3][15]['train_loss'] > 0


def test_a_new_run_gets_an_id_of_its_own(tmp_path, chars):
    words = ['train.py', f'--dataset={chars}', *OPTIONS, '--wandb_log', '--max_iters=2']
    for _ in range(2):
        done = script(
            ROOT / words[0],
            *words[1:],
            cwd=tmp_path,
            timeout=300,
            WANDB_MODE='offline',
            WANDB_SILENT='true',
        )
        assert done.returncode == 0, done.stderr
    ids = {path.stem for path in tmp_path.glob('wandb/offline-run-*/run-*.wandb')}
    assert len(ids) == 2
