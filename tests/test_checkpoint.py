import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
import torch

from configurator import UserError, configure
from lyregpt import checkpoint
from lyregpt.generate import load_model
from model import GPT, GPTConfig
from tests.conftest import tiny
from train import train


def test_round_trip(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=9))
    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(
        path, {'model': model.state_dict(), 'model_args': model.config.to_dict(), 'iter_num': 3}
    )
    state = checkpoint.load(path)
    assert state['iter_num'] == 3 and os.listdir(tmp_path) == ['ckpt.pt']
    again = checkpoint.build_model(state, path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.'])
def test_prefixes_are_removed(tmp_path, prefix):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=9))
    torch.save(
        {
            'model': {prefix + k: v for k, v in model.state_dict().items()},
            'model_args': model.config.to_dict(),
        },
        tmp_path / 'c.pt',
    )
    checkpoint.build_model(checkpoint.load(str(tmp_path / 'c.pt')), 'c.pt')


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'pwned'),))

    for zipped in True, False:
        torch.save(
            {'model': {}, 'model_args': {}, 'x': Evil()},
            tmp_path / 'c.pt',
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(UserError, match='c.pt: refused'):
            checkpoint.load(str(tmp_path / 'c.pt'))
        assert not (tmp_path / 'pwned').exists()


def test_damaged_and_foreign_files(trained, tmp_path):
    whole = (trained / 'ckpt.pt').read_bytes()
    path = tmp_path / 'c.pt'
    for content in (
        b'',
        b'hello',
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-10],
        b'PK\x03\x04' + whole[400:],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match='c.pt: '):
            checkpoint.load(str(path))
    for foreign in [1, 2], {'weights': 1}, {'model': {}, 'model_args': None}:
        torch.save(foreign, path)
        with pytest.raises(UserError, match='not a GPT checkpoint'):
            checkpoint.load(str(path))
    with pytest.raises(UserError, match='no such checkpoint'):
        checkpoint.load(str(tmp_path / 'none.pt'))
    state = checkpoint.load(str(trained / 'ckpt.pt'))
    for change in (
        {'n_embd': 64},
        {'n_layer': 3},
        {'n_layer': 1},
        {'n_head': 5},
        {'colour': 'red'},
        {'vocab_size': 7},
    ):
        with pytest.raises(UserError, match='do not fit'):
            checkpoint.build_model(state | {'model_args': state['model_args'] | change}, 'c.pt')


@pytest.mark.skipif(
    sys.platform != 'linux' or os.geteuid() != 0, reason='needs root on Linux to mount a small disk'
)
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', str(disk)], capture_output=True
    ).returncode:
        pytest.skip('mounting is not allowed here (no GPU, network or data would help)')
    try:
        path = str(disk / 'ckpt.pt')
        checkpoint.save(path, {'model': {'w': torch.zeros(1000)}, 'model_args': {}})
        with pytest.raises(OSError):
            checkpoint.save(path, {'model': {'w': torch.zeros(100_000)}, 'model_args': {}})
        assert os.listdir(disk) == ['ckpt.pt'] and checkpoint.load(path)['model']['w'].shape == (
            1000,
        )
    finally:
        subprocess.run(['umount', str(disk)])


def test_a_flipped_bit_is_noticed(trained, tmp_path):
    whole = bytearray((trained / 'ckpt.pt').read_bytes())
    for at in range(3000, len(whole) - 3000, len(whole) // 7):
        damaged = whole.copy()
        damaged[at] ^= 1
        (tmp_path / 'c.pt').write_bytes(damaged)
        try:
            state = checkpoint.load(str(tmp_path / 'c.pt'))
        except UserError:
            continue
        pristine = checkpoint.load(str(trained / 'ckpt.pt'))  # it hit padding between records
        assert all(
            torch.equal(a, b)
            for a, b in zip(state['model'].values(), pristine['model'].values(), strict=True)
        )


def test_out_dir_prefers_the_best(trained, tmp_path):
    def names(where, best):
        return [os.path.basename(p) for p in checkpoint.candidates(str(where), best)]

    assert names(trained, True)[:2] == ['best.pt', 'ckpt.pt'] and names(trained, False) == [
        'ckpt.pt',
        'ckpt.prev.pt',
    ]
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    assert names(tmp_path, True) == names(tmp_path / 'ckpt.pt', True) == ['ckpt.pt']
    with pytest.raises(UserError, match='no such folder'):
        checkpoint.load_from(str(tmp_path / 'none'))


def test_the_one_before_stays_and_is_gone_back_to(tmp_path, capsys):
    path = str(tmp_path / 'ckpt.pt')
    for step in 1, 2, 3:
        checkpoint.save(
            path,
            {'model': {'w': torch.full((9,), float(step))}, 'model_args': {}, 'iter_num': step},
            keep_previous=True,
        )
    assert sorted(os.listdir(tmp_path)) == ['ckpt.prev.pt', 'ckpt.pt']
    assert checkpoint.load_from(str(tmp_path))[1]['iter_num'] == 3
    os.truncate(path, 300)
    used, state = checkpoint.load_from(str(tmp_path))
    assert state['iter_num'] == 2 and used.endswith('ckpt.prev.pt')
    err = capsys.readouterr().err
    assert 'WARNING' in err and err.count('\n') == 1 and 'going back to' in err
    checkpoint.set_aside_damaged(str(tmp_path), used)
    assert sorted(os.listdir(tmp_path)) == ['ckpt.prev.pt', 'ckpt.pt.damaged'], (
        'the next save cannot put it in the place of the good one'
    )


@pytest.mark.parametrize('background', [True, False])
def test_a_writer_copies_first_and_tells_of_failures_later(background):
    writer, written, w = checkpoint.Writer(background), [], torch.zeros(1_000_000)
    writer.submit(
        {'w': w, 'tied': w, 'betas': (0.9, 0.95)},
        lambda state: written.append(
            (state['w'].clone(), state['w'] is state['tied'], state['betas'])
        ),
    )
    writer.before_update()
    w += 1
    writer.wait()
    assert written[0][0].sum() == 0 and written[0][1:] == (True, (0.9, 0.95)), (
        'as it was, and what was one tensor is one'
    )

    def fail(state):
        raise FloatingPointError('weights')

    writer.submit({'w': w}, fail)
    with pytest.raises(FloatingPointError):
        writer.wait()
    writer.wait()


def test_a_slow_writer_does_not_let_the_next_copy_be_overtaken():
    """The end of one write must not say that the next one has copied its tensors."""
    writer, written, w = checkpoint.Writer(), [], torch.zeros(8)
    set_result = Future.set_result

    class SlowFuture(Future):
        def set_result(self, result):
            set_result(self, result)
            time.sleep(0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, 'Future', SlowFuture)
        copy = writer.copy
        patch.setattr(writer, 'copy', lambda *values: time.sleep(0.3) or copy(*values))
        for _ in range(3):
            writer.submit({'w': w}, lambda state: written.append(float(state['w'][0])))
            writer.before_update()
            w += 1
        writer.wait()
    assert written == [0, 1, 2]


def test_damage_in_the_last_record_falls_back(trained, tmp_path, capsys):
    """Each bit of the records at the end of the zip file, in which readers look first."""
    for name in ('ckpt.pt', 'ckpt.prev.pt'):
        shutil.copy(trained / name, tmp_path)
    good = (tmp_path / 'ckpt.pt').read_bytes()
    for at in range(len(good) - 200, len(good) - 71, 3):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        (tmp_path / 'ckpt.pt').write_bytes(bad)
        path, _ = checkpoint.load_from(str(tmp_path), best=False)
        assert path.endswith('ckpt.prev.pt'), at


def test_where_else_a_checkpoint_may_be(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out-songs')
    with pytest.raises(UserError, match='did you mean .*out-songs'):
        checkpoint.load_from(str(tmp_path / 'out-song'))
    (tmp_path / 'new' / 'earlier').mkdir(parents=True)
    with pytest.raises(UserError, match='the run before it is in .*earlier'):
        checkpoint.load_from(str(tmp_path / 'new'))


def test_gpt2_checkpoints_have_nanogpts_form(chars, tmp_path):
    train(tiny(chars, tmp_path, '--arch=gpt2', '--max_iters=2', '--bias=True'))
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert set(state['model_args']) == {
        'n_layer',
        'n_head',
        'n_embd',
        'block_size',
        'bias',
        'vocab_size',
        'dropout',
    }
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(state)
    assert {
        'transformer.wte.weight',
        'transformer.wpe.weight',
        'transformer.h.0.attn.c_attn.weight',
        'transformer.h.1.mlp.c_proj.bias',
        'lm_head.weight',
    } <= set(state['model'])


def nanogpt_checkpoint(path, chars, compiled=False, steps=3):
    """What nanoGPT's train.py writes: its seven model_args, one AdamW with two groups."""
    from lyregpt.dataset import Split, read_tokenizer

    torch.manual_seed(0)
    vocab_size = read_tokenizer(str(chars)).vocab_size
    args = dict(
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=32,
        bias=False,
        vocab_size=vocab_size,
        dropout=0.0,
    )
    model = GPT(GPTConfig(**args))
    params = dict(model.named_parameters())
    adamw = torch.optim.AdamW(
        [
            {'params': [p for p in params.values() if p.dim() >= 2], 'weight_decay': 0.1},
            {'params': [p for p in params.values() if p.dim() < 2], 'weight_decay': 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    split = Split(str(chars), 'train', 32)
    for step in range(steps):
        x, y = map(torch.from_numpy, split.batch(step * 4, 4))
        model(x, y).backward()
        adamw.step()
        adamw.zero_grad()
    torch.save(
        {
            'model': {
                ('_orig_mod.' if compiled else '') + k: v for k, v in model.state_dict().items()
            },
            'optimizer': adamw.state_dict(),
            'model_args': args,
            'iter_num': steps,
            'best_val_loss': torch.tensor(3.5),
            'config': {
                'dataset': str(chars),
                'batch_size': 4,
                'gradient_accumulation_steps': 1,
                'learning_rate': 1e-3,
                'max_iters': 6,
                'device': 'cuda',
                'compile': True,
                'n_layer': 2,
                'backend': 'nccl',
                'weight_decay': 0.1,
            },
        },
        path,
    )


@pytest.mark.parametrize('compiled', [False, True])
def test_nanogpt_checkpoints_are_sampled_and_resumed(chars, tmp_path, compiled):
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', chars, compiled)
    model, tokenizer, _ = load_model(str(tmp_path))
    assert tokenizer.decode(
        int(t)
        for t in model.generate([tokenizer.encode('the')], 5, vocab_size=tokenizer.vocab_size)
    )
    end = train(
        configure(
            __import__('train').TrainConfig,
            [
                f'--out_dir={tmp_path}',
                '--init_from=resume',
                '--max_iters=6',
                '--device=cpu',
                '--warmup_iters=0',
            ],
        )
    )
    state = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert (
        end['step'] == 6
        and state['config']['optimizer'] == 'adamw'
        and state['config']['batch_size'] == 4
    )
    assert int(next(iter(state['optimizer']['adamw']['state'].values()))['step']) == 6, (
        'its AdamW went on, it did not begin anew'
    )


def test_a_nanogpt_checkpoint_takes_the_tokenizer_of_the_dataset_named(chars, tmp_path):
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', chars)
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    state['config']['dataset'] = 'nowhere'
    torch.save(state, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='not its own'):
        load_model(str(tmp_path))
    words = [
        f'--out_dir={tmp_path}',
        '--init_from=resume',
        f'--dataset={chars}',
        '--max_iters=4',
        '--device=cpu',
        '--warmup_iters=0',
    ]
    assert train(configure(__import__('train').TrainConfig, words))['step'] == 4
