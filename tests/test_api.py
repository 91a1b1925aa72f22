"""The Python API: in this process, in a fresh one elsewhere, and beside sample.py."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F

import lyregpt
from configurator import UserError
from lyregpt import checkpoint
from lyregpt.dataset import folder_of, read_meta
from lyregpt.export import ExportConfig, export
from lyregpt.originality import index_of
from tests.conftest import DEMO, ROOT, script

SONGS = [json.loads(line)['lyrics'] for line, _ in zip(DEMO.open(encoding='utf-8'), range(30))]
QUICK = dict(
    n_layer=1,
    n_head=2,
    n_embd=32,
    block_size=32,
    batch_size=4,
    eval_interval=10,
    warmup_iters=2,
    lr_decay_iters=20,
    device='cpu',
)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return lyregpt.train(SONGS, tmp_path_factory.mktemp('mine') / 'out-mine', max_iters=20, **QUICK)


@pytest.fixture(scope='module')
def out(model):
    return model.config.out_dir


def data_in(out):
    """The token files in out_dir, which holds those of one preparation."""
    [folder] = out.glob('data-*')
    return folder


TEN_LINES = f"""
import json
import lyregpt
texts = [json.loads(line)['lyrics'] for line in open({str(DEMO)!r}, encoding='utf-8')][:20]
lyregpt.train(texts, out_dir='out-mine', max_iters=10, n_layer=1)
model = lyregpt.load('out-mine')
assert model.decode(model.encode('The lantern')) == 'The lantern'
one = model.generate('The lantern', max_new_tokens=30, temperature=0.9, top_k=50, seed=5)
options = dict(max_new_tokens=30, temperature=0.9, top_k=50, seed=5)
two = model.generate('The lantern', num_samples=2, **options)
assert one == two[0] == ''.join(model.stream('The lantern', **options))
json.dump(two, open('two.json', 'w', encoding='utf-8'))
"""


def test_ten_lines_in_a_fresh_process_elsewhere(tmp_path):
    """They run anywhere, leave only out_dir there, and generate what sample.py generates."""
    done = script('-c', TEN_LINES, cwd=tmp_path, PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ['out-mine', 'two.json']
    assert {'best.pt', 'ckpt.pt', 'metrics.csv'} <= set(
        os.listdir(tmp_path / 'out-mine')
    ) and data_in(tmp_path / 'out-mine').is_dir()
    words = [
        '--start=The lantern',
        '--num_samples=2',
        '--max_new_tokens=30',
        '--temperature=0.9',
        '--top_k=50',
        '--seed=5',
        '--json',
    ]
    told = script(
        ROOT / 'sample.py', '--out_dir=out-mine', *words, cwd=tmp_path
    ).stdout.splitlines()
    assert ['The lantern' + json.loads(line)['text'] for line in told] == json.loads(
        (tmp_path / 'two.json').read_text(encoding='utf-8')
    )


def test_what_it_returns(model, out):
    ids = model.encode('The lantern, näher\n')
    assert (
        isinstance(ids, list)
        and all(isinstance(i, int) for i in ids)
        and model.decode(ids) == 'The lantern, näher\n'
    )
    knobs = dict(max_new_tokens=15, seed=3)
    a, b = (model.generate(p, **knobs) for p in ('The ', 'A bell'))
    assert (
        a.startswith('The ')
        and len(a) > 4
        and a
        == model.generate('The ', **knobs)
        != model.generate('The ', max_new_tokens=15, seed=4)
    )
    assert model.generate(['The ', 'A bell'], **knobs) == [a, b], 'each as if it were alone'
    assert model.generate('The ', num_samples=1, **knobs) == [a]
    assert model.generate('x', artist='Griddlemoth', title='Ash', max_new_tokens=1).startswith(
        'Artist: Griddlemoth\nTitle: Ash\n\nx'
    )
    assert model.generate('FILE:/etc/passwd', max_new_tokens=1).startswith('FILE:'), (
        'a prompt is no path'
    )
    assert model.about['iter_num'] == 20 and math.isfinite(model.about['best_val_loss'])
    assert out in repr(model) and 'context 32' in repr(model) and len(repr(model)) < 300


def test_avoid_copying(model):
    from lyregpt.originality import Index

    text = model.generate('', max_new_tokens=120, avoid_copying=2, seed=2)
    index = Index.open(model.about['config']['dataset'])
    assert index.compare(text).longest < 2 <= index.compare(SONGS[0]).longest


def test_loss(model, out):
    """Against the plain model's logits; in windows where the text is longer than the context."""
    path, state = checkpoint.load_from(out)
    plain = checkpoint.build_model(state, path).eval()
    for text in 'The lantern is low', SONGS[0][:400]:
        ids = torch.tensor([model.tokenizer.eot, *model.encode(text)])
        x, y = ids[:-1], ids[1:]
        with torch.no_grad():
            nats = sum(
                float(
                    F.cross_entropy(plain(x[None, i : i + 32])[0], y[i : i + 32], reduction='sum')
                )
                for i in range(0, len(x), 32)
            )
        found = model.loss(text)
        assert found.nats_per_token == pytest.approx(nats / len(y), rel=1e-4)
        assert found.bits_per_byte == pytest.approx(
            nats / math.log(2) / len(text.encode()), rel=1e-4
        )
    assert model.loss(SONGS[1]).bits_per_byte < model.loss('Zq!~ 0x7f {};').bits_per_byte


def test_twice_in_one_process_and_resume(tmp_path, model):
    """Resuming gives the same weights; a new run moves the old one aside."""
    whole = checkpoint.load(os.path.join(model.config.out_dir, 'ckpt.pt'))['model']
    lyregpt.train(SONGS, tmp_path / 'a', max_iters=5, seed=7, **QUICK)
    lyregpt.train(SONGS, tmp_path / 'a', max_iters=10, **QUICK)
    assert checkpoint.load(str(tmp_path / 'a' / 'earlier' / 'ckpt.pt'))['iter_num'] == 5
    moved = tmp_path / 'b'
    (tmp_path / 'a').rename(moved)
    resumed = lyregpt.train(out_dir=moved, init_from='auto', max_iters=15)
    assert resumed.about['iter_num'] == 15 and resumed.about['config']['dataset'] == str(
        data_in(moved)
    )
    lyregpt.train(SONGS, moved, init_from='resume', max_iters=20)
    parts = checkpoint.load(str(moved / 'ckpt.pt'))['model']
    # the evaluations at 15 and at 20 instead of 10 and 20 change nothing: they draw no dice
    assert whole.keys() == parts.keys() and all(
        torch.equal(whole[name], parts[name]) for name in whole
    )


def test_an_earlier_run_keeps_its_words(tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    lyregpt.train(SONGS[:12], a, max_iters=4, **QUICK)
    lyregpt.train(SONGS[12:], a, max_iters=4, **QUICK)
    a.rename(b)
    indexes = [
        index_of(
            lyregpt.load(out, device='cpu').about['config'],
            lyregpt.data_of(lyregpt.load(out).about, str(out)),
        )
        for out in (b / 'earlier', b)
    ]
    for index, own, other in zip(indexes, (SONGS[0], SONGS[20]), (SONGS[20], SONGS[0])):
        assert index.compare(own).longest > 20 > index.compare(other).longest
    assert lyregpt.load(b / 'earlier', device='cpu').generate(max_new_tokens=5, avoid_copying=2)
    again = lyregpt.train(out_dir=b / 'earlier', init_from='resume', max_iters=6)
    assert again.about['iter_num'] == 6 and again.about['config']['dataset'] == lyregpt.data_of(
        again.about, str(b / 'earlier')
    )
    written = sorted(b.rglob('*.bin'))
    lyregpt.train(SONGS[:12], b, max_iters=2, **QUICK)
    assert sorted(b.rglob('*.bin')) == written and len(written) == 4, (
        'the same texts are there already'
    )


def test_a_stream_that_ends_within_a_character(model):
    knobs = dict(max_new_tokens=3, temperature=3.0, top_k=0)
    broken = [
        (i, text)
        for i, text in enumerate(model.generate('é', num_samples=200, seed=0, **knobs))
        if text.endswith('\ufffd')
    ]
    streams = [list(model.stream('é', seed=i, **knobs)) for i, _ in broken]
    assert [''.join(pieces) for pieces in streams] == [text for _, text in broken]
    assert any(pieces[-1] for pieces in streams), 'one had to be told that there is no more'


def test_an_interrupt_keeps_the_checkpoint(tmp_path):
    """SIGINT, a notebook's interrupt, raises KeyboardInterrupt, and the state is saved."""

    def interrupt():
        metrics = tmp_path / 'out' / 'metrics.csv'
        for _ in range(3000):
            if metrics.exists() and metrics.read_text(encoding='utf-8').count('\n') > 3:
                signal.raise_signal(signal.SIGINT)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match='lyregpt.load'):
        lyregpt.train(
            SONGS,
            tmp_path / 'out',
            max_iters=10**6,
            log_interval=1,
            **QUICK | {'eval_interval': 10**6},
        )
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert 3 <= lyregpt.load(tmp_path / 'out', device='cpu').about['iter_num'] < 10**6


def test_little_text_gets_a_little_model(tmp_path):
    """Twenty short lines are enough for something; nothing but the texts is given."""
    lines = [
        f'{number} lanterns on the hill'
        for number in 'one two three four five six seven eight nine ten'.split()
    ]
    little = lyregpt.train(
        lines + [line.replace('hill', 'shore') for line in lines], tmp_path / 'out', device='cpu'
    )
    meta = read_meta(str(data_in(tmp_path / 'out')))
    assert meta['splits']['train']['documents'] == 18 and meta['splits']['val']['documents'] == 2
    assert (
        little.gpt.config.block_size <= meta['splits']['train']['tokens'] / 4
        and little.loss('two lanterns on the hill').bits_per_byte < 3
    )


def test_sizes_grow_with_the_text():
    chosen = [lyregpt.suited(tokens, {}) for tokens in (100, 10_000, 200_000, 10**9, None)]
    assert [c['n_layer'] for c in chosen] == [2, 2, 4, 4, 4] and [
        c['block_size'] for c in chosen
    ] == [16, 128, 256, 256, 256]
    steps = [c['max_iters'] for c in chosen[:4]]
    assert steps == sorted(steps) and steps[-1] == 2000
    assert all(
        0 < c['eval_interval'] <= c['max_iters'] and c['warmup_iters'] < c['max_iters']
        for c in chosen
    )
    assert lyregpt.suited(10_000, {'max_iters': 7})['eval_interval'] == 1


def test_texts_from_files_and_tuning(tmp_path, model, out):
    """A model trained further on a folder of files keeps its tokenizer."""
    (tmp_path / 'words').mkdir()
    (tmp_path / 'words' / 'a.txt').write_text(SONGS[3], encoding='utf-8')
    (tmp_path / 'words' / 'b.jsonl').write_text(
        json.dumps({'lyrics': SONGS[4]}) + '\n{"lyrics": " "}\n', encoding='utf-8'
    )
    (tmp_path / 'words' / 'empty.txt').write_text('\n')
    assert lyregpt.list_of(tmp_path / 'words') == [SONGS[3], SONGS[4]]
    tuned = lyregpt.train(
        tmp_path / 'words', tmp_path / 'tuned', init_from=out, max_iters=2, device='cpu'
    )
    assert (
        tuned.tokenizer.fingerprint() == model.tokenizer.fingerprint()
        and tuned.gpt.config == model.gpt.config
    )
    assert (
        sum(s['documents'] for s in read_meta(str(data_in(tmp_path / 'tuned')))['splits'].values())
        == 4
    )  # each in two parts
    assert tuned.loss(SONGS[3]).nats_per_token < math.log(tuned.tokenizer.vocab_size) - 0.5


def test_other_sources(model, out, tmp_path):
    """A checkpoint file, and a Hugging Face folder: the same model, the same text."""
    text = model.generate('The ', max_new_tokens=20, seed=9)
    export(ExportConfig(out_dir=out, to=str(tmp_path / 'hf')))
    for source in os.path.join(out, 'best.pt'), tmp_path / 'hf':
        assert (
            lyregpt.load(source, device='cpu').generate('The ', max_new_tokens=20, seed=9) == text
        )


def test_a_dataset_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of('darklyrics') == str(ROOT / 'data' / 'darklyrics')
    (tmp_path / 'data' / 'darklyrics').mkdir(parents=True)
    assert folder_of('darklyrics') == os.path.join('data', 'darklyrics'), (
        'one that is here comes first'
    )


@pytest.mark.parametrize(
    'mistake, message',
    [
        (
            lambda m, d: lyregpt.train(['The rain', 'the sea'], d),
            '15 characters in 2 texts are too little to learn from: give at least 200',
        ),
        (lambda m, d: lyregpt.train([], d), '0 characters in 0 texts'),
        (lambda m, d: m.generate(5), 'a prompt is text, or a list of texts: got int'),
        (lambda m, d: lyregpt.train(['one', 2], d), r'texts\[1\] is of type int: expected str'),
        (
            lambda m, d: lyregpt.train('The lantern', d),
            'no such file or folder; a text itself is given in a list',
        ),
        (lambda m, d: lyregpt.train(out_dir=d), 'nothing to train on'),
        (lambda m, d: lyregpt.train(out_dir=d, tokenizer='char'), 'nothing to train on'),
        (lambda m, d: lyregpt.train(SONGS, d, dataset='x'), 'leave one out'),
        (
            lambda m, d: lyregpt.train(out_dir=d, dataset='x', vocab_size=300),
            'leave tokenizer and vocab_size out',
        ),
        (
            lambda m, d: lyregpt.train(SONGS, d, max_itres=5),
            'unknown option max_itres; did you mean max_iters',
        ),
        (lambda m, d: lyregpt.train(SONGS, d, batch_size='many'), 'batch_size=many: expected'),
        (
            lambda m, d: lyregpt.train(SONGS, d, n_head=7, n_embd=32),
            'n_head=7 does not divide n_embd=32',
        ),
        (lambda m, d: lyregpt.train(SONGS, d, init_from='resume'), 'no such folder'),
        (lambda m, d: lyregpt.train(SONGS, d, init_from='nowhere'), 'nowhere: no such folder'),
        (
            lambda m, d: lyregpt.train(SONGS, d, init_from=m.config.out_dir, tokenizer='char'),
            'brings its own tokenizer',
        ),
        (lambda m, d: lyregpt.load('nowhere'), 'nowhere: no such folder'),
        (lambda m, d: lyregpt.load(m.config.out_dir, temperature=1), 'unknown option temperature'),
        (lambda m, d: lyregpt.load(m.config.out_dir, device='cuda:77'), 'device=cuda:77'),
        (
            lambda m, d: m.generate('x', temprature=1),
            'unknown option temprature; did you mean temperature',
        ),
        (lambda m, d: m.generate('x', temperature=-1), 'temperature=-1'),
        (lambda m, d: m.stream('x', top_p=2), 'top_p=2'),
        (lambda m, d: m.generate('x', device='cpu'), 'unknown option device'),
        (lambda m, d: m.decode([10**6]), 'token id 1000000'),
        (lambda m, d: m.loss(''), 'too short'),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(model, tmp_path, mistake, message):
    with pytest.raises(UserError, match=message) as error:
        mistake(model, tmp_path / 'new')
    assert '\n' not in str(error.value) and not (tmp_path / 'new').exists()
