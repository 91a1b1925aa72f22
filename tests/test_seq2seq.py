"""The encoder-decoder beside torch.nn.Transformer and exhaustive search; its training script."""

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from encoder_decoder import Answer, EncoderDecoder, EncoderDecoderConfig
from torch.nn.utils.rnn import pad_sequence
from train_seq2seq import (
    AnswerConfig,
    main,
    read_pairs,
    train,
    verses,
)

import lyregpt
from configurator import UserError, configure
from lyregpt import checkpoint, export
from tests.conftest import DEMO, ROOT, script
from train import TrainConfig
from train import train as train_gpt


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = EncoderDecoder(
        EncoderDecoderConfig(
            **dict(vocab_size=30, block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0)
            | options
        )
    )
    for p in model.parameters():  # norms and biases too, so that each is seen to be in its place
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model.eval()


def rows(*lengths, vocab=30, seed=1):
    """Random rows of these lengths, padded with -1."""
    rng = torch.Generator().manual_seed(seed)
    out = torch.full((len(lengths), max(lengths)), -1)
    for row, n in zip(out, lengths):
        row[:n] = torch.randint(1, vocab, (n,), generator=rng)
    return out


def theirs(model):
    """torch.nn.Transformer with the model's weights; with norms last, none follows the blocks."""
    c, nn = model.config, torch.nn
    made = nn.Transformer(
        c.n_embd,
        c.n_head,
        c.n_layer,
        c.n_layer,
        c.n_ff,
        dropout=0.0,
        batch_first=True,
        norm_first=c.norm_first,
    )
    if not c.norm_first:
        made.encoder.norm = made.decoder.norm = None
    pairs = []
    for ours, other, decoder in [(*p, False) for p in zip(model.encoder, made.encoder.layers)] + [
        (*p, True) for p in zip(model.decoder, made.decoder.layers)
    ]:
        pairs += [(ours.ln_1, other.norm1), (ours.ln_2, other.norm3 if decoder else other.norm2)]
        pairs += [
            (ours.mlp.c_fc, other.linear1),
            (ours.mlp.c_proj, other.linear2),
            (ours.attn.c_proj, other.self_attn.out_proj),
        ]
        for kind in ('weight', 'bias'):
            getattr(other.self_attn, f'in_proj_{kind}').data = getattr(
                ours.attn.c_attn, kind
            ).data.clone()
        if decoder:
            pairs += [
                (ours.ln_cross, other.norm2),
                (ours.cross.c_proj, other.multihead_attn.out_proj),
            ]
            for kind in ('weight', 'bias'):
                both = torch.cat(
                    [getattr(ours.cross.c_q, kind).data, getattr(ours.cross.c_kv, kind).data]
                )
                getattr(other.multihead_attn, f'in_proj_{kind}').data = both
    if c.norm_first:
        pairs += [(model.ln_encoder, made.encoder.norm), (model.ln_decoder, made.decoder.norm)]
    for ours, other in pairs:
        other.load_state_dict(ours.state_dict())
    return made


@pytest.mark.parametrize('norm_first', [False, True], ids=['post-norm', 'pre-norm'])
def test_equals_torch_with_its_weights(norm_first):
    model = small(norm_first=norm_first).double()
    other = theirs(model).double()
    source, targets = rows(9, 4, 7), rows(5, 8, 6, seed=2)
    idx = torch.cat((torch.zeros(3, 1, dtype=torch.long), targets[:, :-1]), 1).clamp(min=0)
    # the paper's formulas: PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos of the same
    place = torch.tensor(
        [
            [(math.sin, math.cos)[i % 2](t / 10000 ** (i // 2 * 2 / 32)) for i in range(32)]
            for t in range(16)
        ]
    ).double()
    table = torch.nn.Parameter(model.wte.weight.data.clone())

    def embed(ids):
        return table[ids.clamp(min=0)] * 32**0.5 + place[: ids.size(1)]

    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    pad = source < 0
    hidden = other(
        embed(source),
        embed(idx),
        tgt_mask=causal,
        src_key_padding_mask=pad,
        memory_key_padding_mask=pad,
        tgt_is_causal=True,
    )
    expected = hidden @ table.t()
    torch.testing.assert_close(
        model(source, idx), expected, rtol=1e-5, atol=1e-5
    )  # their table of positions is float32's

    keep = targets >= 0
    for smoothing in (0.0, 0.1):
        log_p = expected.log_softmax(-1)[keep]
        nll = -log_p.gather(1, targets[keep][:, None])[:, 0]
        loss = ((1 - smoothing) * nll - smoothing * log_p.mean(-1)).mean()
        torch.testing.assert_close(
            model(source, idx, targets, smoothing).double(), loss, rtol=1e-5, atol=1e-6
        )
    model(source, idx, targets).backward()
    torch.nn.functional.cross_entropy(expected[keep], targets[keep]).backward()
    torch.testing.assert_close(model.wte.weight.grad, table.grad, rtol=1e-4, atol=1e-7)
    for ours, layer in zip(model.encoder, other.encoder.layers):
        torch.testing.assert_close(
            ours.attn.c_attn.weight.grad, layer.self_attn.in_proj_weight.grad, rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(ours.ln_2.bias.grad, layer.norm2.bias.grad, rtol=1e-4, atol=1e-7)
    for ours, layer in zip(model.decoder, other.decoder.layers):
        both = torch.cat((ours.cross.c_q.weight.grad, ours.cross.c_kv.weight.grad))
        torch.testing.assert_close(
            both, layer.multihead_attn.in_proj_weight.grad, rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(
            ours.mlp.c_fc.weight.grad, layer.linear1.weight.grad, rtol=1e-4, atol=1e-7
        )


def test_the_answer_sees_its_past_and_all_of_the_source():
    model = small()
    source, idx = rows(6), rows(7, seed=2)
    before = model(source, idx)
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 30
    after = model(source, changed)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(
        before[:, 4], after[:, 4]
    )
    for place in range(6):
        other = source.clone()
        other[0, place] = (other[0, place] + 1) % 30
        assert (model(other, idx) - before).abs().amax(-1).min() > 1e-4, (
            f'every place of the answer sees place {place} of the source'
        )


@pytest.mark.parametrize(
    'more',
    [{}, dict(norm_first=True, mlp='swiglu', norm='rmsnorm')],
    ids=str,
)
def test_rows_of_a_batch_equal_those_alone(more):
    model = small(**more)
    source, targets = rows(9, 1, 5), rows(3, 8, 6, seed=2)
    idx = torch.cat((torch.zeros(3, 1, dtype=torch.long), targets[:, :-1]), 1).clamp(min=0)
    together = model(source, idx)
    wider = torch.cat((source, torch.full((3, 4), -1)), 1)
    torch.testing.assert_close(model(wider, idx), together)
    for i, (s, t) in enumerate(((9, 3), (1, 8), (5, 6))):
        torch.testing.assert_close(
            model(source[i : i + 1, :s], idx[i : i + 1, :t]), together[i : i + 1, :t]
        )
    whole = model(source, idx, targets)
    parts = [
        model(source[i : i + 1], idx[i : i + 1], targets[i : i + 1]) * n
        for i, n in enumerate((3, 8, 6))
    ]
    torch.testing.assert_close(whole, sum(parts) / 17)
    for write in (
        lambda s: [[a] for a in model.greedy(s, 0, 12)],
        lambda s: model.beam(s, 0, 12, width=3),
    ):
        for i, answers in enumerate(write(source)):
            (alone,) = write(source[i : i + 1, : (9, 1, 5)[i]])
            assert [a.ids for a in answers] == [a.ids for a in alone]
            assert [a.log_p for a in answers] == pytest.approx([a.log_p for a in alone], abs=1e-4)


def log_p_of(model, source, ids, eot=0):
    """The uncached model's word on an answer to one source."""
    step = model(source, torch.tensor([[eot, *ids[:-1]]])).log_softmax(-1)
    return step[0, range(len(ids)), ids].sum().item()


@pytest.mark.parametrize('more', [{}, dict(norm_first=True)], ids=str)
def test_cached_equals_uncached(more):
    model = small(**more)
    source = rows(9, 4, 7, 1)
    for i, (first, answers) in enumerate(
        zip(model.greedy(source, 0, 12), model.beam(source, 0, 12, width=5))
    ):
        one = source[i : i + 1]
        ids = [0]
        while len(ids) <= 12 and (
            len(ids) == 1 or ids[-1]
        ):  # greedy by hand: the whole answer read again for every token
            ids.append(int(model(one, torch.tensor([ids]))[0, -1].argmax()))
        assert first.ids == ids[1:]
        assert len(answers) == 5 and len({tuple(a.ids) for a in answers}) == 5
        for found in (first, *answers):
            assert found.log_p == pytest.approx(log_p_of(model, one, found.ids), abs=1e-4)
            assert 0 not in found.ids[:-1] and (found.ids[-1] == 0 or len(found.ids) == 12)
        scores = [a.score(0.6) for a in answers]
        assert scores == sorted(scores, reverse=True)


def to_reverse(n, seed, most=6):
    """n sources of up to `most` symbols and an end, the decoder's input, the reversed targets."""
    rng = torch.Generator().manual_seed(seed)
    symbols, lengths = (
        torch.randint(1, 11, (n, most), generator=rng),
        torch.randint(1, most + 1, (n, 1), generator=rng),
    )
    place = torch.arange(most + 1)
    source = torch.where(place < lengths, torch.nn.functional.pad(symbols, (0, 1)), -1).masked_fill(
        place == lengths, 0
    )
    back = symbols.gather(1, (lengths - 1 - place).clamp(min=0))
    targets = torch.where(place < lengths, back, -1).masked_fill(place == lengths, 0)
    return source, torch.nn.functional.pad(targets[:, :-1].clamp(min=0), (1, 0)), targets


@pytest.fixture(scope='module')
def reversing():
    """A model that learned to reverse, and the same as it was half-way, still unsure."""
    torch.manual_seed(1)
    model = EncoderDecoder(
        EncoderDecoderConfig(
            vocab_size=11, block_size=8, n_layer=2, n_head=4, n_embd=64, dropout=0.0
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    for step in range(300):
        if step == 80:
            half = copy.deepcopy(model).eval()
        optimizer.param_groups[0]['lr'] = 3e-3 * min((step + 1) / 50, 1 - step / 300)
        model(*to_reverse(32, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return half, model.eval()


def test_learns_a_task_that_the_source_decides(reversing):
    source, _, targets = to_reverse(500, 10**6)
    wanted = [[t for t in row if t >= 0] for row in targets.tolist()]
    for found in (
        reversing[1].greedy(source, 0, 8),
        [best for best, *_ in reversing[1].beam(source, 0, 8)],
    ):
        assert sum(a.ids == w for a, w in zip(found, wanted)) > 0.99 * 500


def test_a_beam_of_one_is_greedy_and_wider_ones_find_better(reversing):
    half, _ = reversing
    source, _, _ = to_reverse(100, 10**6)
    greedy, beam = half.greedy(source, 0, 8), half.beam(source, 0, 8, width=1)
    assert [a.ids for a in greedy] == [a.ids for (a,) in beam] and len(
        {len(a.ids) for a in greedy}
    ) > 3
    assert [a.log_p for a in greedy] == pytest.approx([a.log_p for (a,) in beam], abs=1e-4)
    wide = [answers[0] for answers in half.beam(source, 0, 8, width=6, penalty=0.0)]
    gains = [b.log_p - g.log_p for b, g in zip(wide, greedy)]
    assert sum(gains) > 1 and max(gains) > 0.1 and sum(gain > -1e-4 for gain in gains) >= 98, (
        'a beam may lose the greedy way, but seldom does'
    )


@pytest.mark.parametrize('length_penalty', [0.0, 0.6, 1.5])
def test_a_beam_wide_enough_is_exhaustive_search(length_penalty):
    model = small(vocab_size=4, seed=5)
    source = rows(5, vocab=4)
    possible = [
        [*ids, 0] for n in range(4) for ids in itertools.product((1, 2, 3), repeat=n)
    ]  # in at most four tokens
    possible += [list(ids) for ids in itertools.product((1, 2, 3), repeat=4)]
    targets = pad_sequence(list(map(torch.tensor, possible)), True, -1)
    log_p = model(
        source.expand(121, -1), torch.nn.functional.pad(targets[:, :-1].clamp(min=0), (1, 0))
    ).log_softmax(-1)
    sums = (
        torch.where(targets >= 0, log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0], 0)
        .sum(1)
        .tolist()
    )
    assert sum(map(math.exp, sums)) == pytest.approx(1, abs=1e-4), (
        'these are all the answers there are'
    )
    best = sorted(map(Answer, possible, sums), key=lambda a: a.score(length_penalty), reverse=True)
    (wide,) = model.beam(source, 0, 4, width=121, penalty=length_penalty)
    assert [a.ids for a in wide[:20]] == [a.ids for a in best[:20]] and len(wide) == 121
    assert [a.log_p for a in wide] == pytest.approx([a.log_p for a in best], abs=1e-4)


# -----------------------------------------------------------------------------
# examples/seq2seq/train_seq2seq.py


@pytest.fixture(scope='module')
def songs(tmp_path_factory):
    """The first 24 embedded songs as somebody's own."""
    path = tmp_path_factory.mktemp('songs') / 'mine.jsonl'
    with open(DEMO, encoding='utf-8') as f:
        path.write_text(''.join(line for line, _ in zip(f, range(24))), encoding='utf-8')
    return path


def words(songs, out, *more):
    """The command line of a run that takes a second or two."""
    run = f'--input={songs} --out_dir={out} --device=cpu --max_iters=20 --warmup_iters=5'
    model = '--vocab_size=300 --n_layer=1 --n_head=2 --n_embd=16 --block_size=64 --batch_size=8'
    return [*run.split(), *model.split(), '--eval_interval=10', *more]


def run_in(songs, out, *more):
    return train(configure(AnswerConfig, words(songs, out, *more)))


def same(a, b):
    """Two runs ended in the same weights, optimizer states and losses, to the bit."""
    one, two = (checkpoint.load(str(out / 'ckpt.pt'), optimizer=True) for out in (a, b))
    states = [state['optimizer']['adam']['state'] for state in (one, two)]
    assert one['model'].keys() == two['model'].keys() and states[0].keys() == states[1].keys()
    assert all(torch.equal(weight, two['model'][name]) for name, weight in one['model'].items())
    for i, state in states[0].items():
        assert all(torch.equal(state[key], states[1][i][key]) for key in state)
    for key in ('iter_num', 'best_val_loss'):
        assert one[key] == two[key]


def test_verses_and_pairs(tmp_path):
    song = 'one\n  two \n\n[Chorus]\nthree\nfour\n[x2]\nfive\n \nsix [here]\nseven'
    assert verses(song) == [['one', 'two'], ['three', 'four'], ['five'], ['six [here]', 'seven']]
    with open(DEMO, encoding='utf-8') as f:
        texts = [json.loads(line)['lyrics'] for line in f]
    pairs = read_pairs([str(DEMO)])
    split = dict.fromkeys(pairs['train'], 'train') | dict.fromkeys(pairs['val'], 'val')
    assert len(split) == len(pairs['train']) + len(pairs['val']), 'each pair is in one split, once'
    neighbours, shared = set(), 0
    for text in texts:
        found = {pair for verse in verses(text) for pair in itertools.pairwise(verse)}
        neighbours |= found
        # only by a line that another song has too
        shared += len({split[pair] for pair in found}) > 1
    assert set(split) == neighbours
    assert 0.05 < len(pairs['val']) / len(neighbours) < 0.15
    assert shared <= 2, 'a song is in one split'
    for number in range(3):  # a few text files: their verses are split
        verse = '\n\n'.join(f'a {number} {i}\nb {number} {i}\nc {number} {i}' for i in range(30))
        (tmp_path / f'{number}.txt').write_text(verse, encoding='utf-8')
    pairs = read_pairs([str(tmp_path)])
    assert len(pairs['train']) + len(pairs['val']) == 180
    assert all(a[0] != b[0] and a[1:] == b[1:] for some in pairs.values() for a, b in some)
    assert not {a[2:] for a, _ in pairs['train']} & {a[2:] for a, _ in pairs['val']}


def test_trains_answers_and_starts_anew(songs, tmp_path, capsys):
    out = tmp_path / 'out'
    end = run_in(songs, out, '--max_iters=60', '--learning_rate=1e-2')
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('step ')]
    losses = [float(line.split('training loss ')[1].split(',')[0]) for line in lines]
    vals = [float(line.split('validation loss ')[1].split(',')[0]) for line in lines]
    assert losses[-1] < losses[0] - 0.5 and len(lines) == 6
    assert end == pytest.approx(vals[-1], abs=1e-4)
    assert set(os.listdir(out)) == {'best.pt', 'ckpt.pt', 'ckpt.prev.pt'}
    done = script(
        'examples/seq2seq/train_seq2seq.py',
        f'--out_dir={out}',
        '--line=The rain came down',
        '--width=3',
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    scores = [float(line.split('score ')[1].split(',')[0]) for line in lines]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    run_in(songs, out)
    assert (out / 'earlier' / 'best.pt').exists()
    assert checkpoint.load(str(out / 'ckpt.pt'))['iter_num'] == 20


def test_resume_equals_the_unbroken_run(songs, tmp_path):
    whole, parts, other = tmp_path / 'whole', tmp_path / 'parts', tmp_path / 'other'
    run_in(songs, whole)
    run_in(songs, parts, '--max_iters=10')
    resume = [f'--out_dir={parts}', '--init_from=resume', '--max_iters=20']
    train(configure(AnswerConfig, resume))
    same(whole, parts)
    run_in(songs, other, '--seed=2')
    with pytest.raises(AssertionError):
        same(whole, other)


@pytest.mark.skipif(sys.platform == 'win32', reason='signals are POSIX')
def test_kill_and_ctrl_c_at_any_instant_then_resume(songs, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    run_in(songs, whole, '--max_iters=80')
    # as many threads as here: sums in the same order
    threads = {'OMP_NUM_THREADS': str(torch.get_num_threads())}
    for number, pause in ((signal.SIGKILL, 0.05), (signal.SIGINT, 0.0)):
        resume = ['--init_from=resume'] if (killed / 'ckpt.pt').exists() else []
        before = checkpoint.load(str(killed / 'ckpt.pt'))['iter_num'] if resume else 0
        command = words(songs, killed, '--max_iters=80', *resume)
        process = subprocess.Popen(
            [sys.executable, 'examples/seq2seq/train_seq2seq.py', *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding='utf-8',
            env=os.environ | threads,
        )
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            path = killed / 'ckpt.pt'
            if path.exists() and checkpoint.load(str(path))['iter_num'] > before:
                time.sleep(pause)
                break
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[0]
        if number == signal.SIGINT and process.returncode != 0:
            assert process.returncode == 130 and '--init_from=resume' in said
        assert before < checkpoint.load(str(killed / 'ckpt.pt'))['iter_num'] <= 80
    run_in(songs, killed, '--max_iters=80', '--init_from=resume')
    same(whole, killed)


def test_gpt_tools_say_whose_checkpoint_it_is(songs, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    run_in(songs, out, '--max_iters=1')
    files = {path: path.read_bytes() for path in out.iterdir()}
    to = tmp_path / 'to'
    resume = [f'--out_dir={out}', '--init_from=resume', '--device=cpu']
    for use in (
        lambda: lyregpt.load(out),
        lambda: train_gpt(configure(TrainConfig, resume)),
        lambda: export.export(configure(export.ExportConfig, [f'--out_dir={out}', f'--to={to}'])),
    ):
        with pytest.raises(
            UserError,
            match='is an encoder–decoder written by examples/seq2seq/train_seq2seq.py, not a GPT; '
            'run it with: python examples/seq2seq/train_seq2seq.py --out_dir=.*pt --line',
        ):
            use()
    monkeypatch.setattr(
        sys, 'argv', ['lyregpt checkpoint', 'split', str(out / 'ckpt.pt'), str(tmp_path / 'parts')]
    )
    with pytest.raises(UserError, match='is an encoder–decoder'):
        checkpoint.main()
    assert 'encoder–decoder' in checkpoint.inspect(
        str(out / 'ckpt.pt'), checkpoint.load(str(out / 'ckpt.pt'))
    )
    assert not (tmp_path / 'parts').exists()
    assert files == {path: path.read_bytes() for path in out.iterdir()}, 'nothing was touched'


def test_mistakes_are_one_line(songs, tmp_path, trained, monkeypatch):
    out = tmp_path / 'out'
    run_in(songs, out, '--max_iters=2', '--block_size=20')
    alone = tmp_path / 'alone.txt'
    alone.write_text('one line\n\nand one more', encoding='utf-8')
    for more, said in (
        (['--n_head=3'], 'n_head=3 does not divide n_embd=16'),
        (['--batch_size=0'], 'batch_size.*: at least 1'),
        ([f'--input={tmp_path / "none"}'], 'none: no such file or folder'),
        ([f'--input={alone}'], 'alone.txt: too few lines'),
        (['--block_size=2'], 'block_size=2: all pairs have a line with more tokens'),
        (['--device=abacus'], 'device=abacus: expected auto, cpu'),
        ([f'--out_dir={tmp_path / "empty"}', '--init_from=resume'], 'empty: no such folder'),
        ([f'--out_dir={trained}', '--init_from=resume'], 'is a GPT, not an encoder'),
        (['--init_from=resume', '--block_size=20', '--n_layer=2'], 'n_layer: .*ckpt.pt has 1'),
        ([f'--input={alone}', '--block_size=20', '--init_from=resume'], 'input: .*ckpt.pt has'),
    ):
        with pytest.raises(UserError, match=said) as caught:
            run_in(songs, out, *more)
        assert '\n' not in str(caught.value)
    assert checkpoint.load(str(out / 'ckpt.pt'))['iter_num'] == 2, 'nothing was touched'
    for more, said in (
        (['--line=' + 'rain ' * 50], 'line: .* tokens with its end, .* reads at most 20'),
        (['--line=rain', '--n_layer=3'], 'n_layer: .*best.pt has 1'),
    ):
        monkeypatch.setattr(sys, 'argv', ['train_seq2seq.py', f'--out_dir={out}', *more])
        with pytest.raises(UserError, match=said):
            main()
