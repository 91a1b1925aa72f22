"""What lyregpt/originality.py reports and bans, against brute force."""

import json
import os
import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch

from configurator import UserError, configure
from lyregpt import originality
from lyregpt.dataset import write_dataset
from lyregpt.originality import CopyFilter, Index, bare, find_words, fold
from lyregpt.text import song_header
from lyregpt.tokenizer import BPETokenizer, CharTokenizer
from model import GPT, GPTConfig
from sample import SampleConfig, load, print_samples
from tests.conftest import DEMO, gpt2, script, tiny
from train import generate_sample, train

LINES = [  # made up; every kind of letter, apostrophe and repetition
    "La la la, the rain don't fall on the Räuber's café",
    'over the öde Straße la la la the rain',
    "rock'n'roll ain’t nobody's 2nd rain the the the",
    '雨 the 雨が降る la été élan 雨 don’t fall',
    "İstanbul la ﬁre Ωμέγα ΣΊΣΥΦΟΣ don' t ''tis",
    'under the butter the ash the under the ash of 1999',
    'e\u0301te\u0301 la हिन्दी भाषा e\u0301lan rain\u0323 하늘 the \u1112\u1161\u11ab',
]


def split_words(text):
    """The words of a text, found in another way: line by line, letter by letter."""
    out = []
    for line in text.split('\n'):
        if line.lower().startswith(('artist:', 'album:', 'year:', 'title:')):
            continue
        line = unicodedata.normalize('NFC', unicodedata.normalize('NFD', line).casefold())
        line = ''.join(
            c
            if c.isalnum() or unicodedata.category(c) in ('Mn', 'Mc')
            else "'"
            if c in "'’"
            else ' '
            for c in line
        )
        for part in line.replace("''", ' ').split():
            part = re.sub("'+", "'", part) if "''" not in part else part
            out += [w.strip("'") for w in [part] if w.strip("'")]
    return out


def dataset(folder, songs, tokenizer):
    write_dataset(
        str(folder), [('train', song, True) for song in songs], tokenizer, need=('train',)
    )
    return Index.open(str(folder))


def runs_of(songs, n):
    """All runs of n words in the songs."""
    return {
        tuple(words[i : i + n])
        for words in map(split_words, songs)
        for i in range(len(words) - n + 1)
    }


def copied(songs, prompt, written, n):
    """The runs of n words from the songs that end in what was written behind the prompt."""
    text = prompt + written
    known = runs_of(songs, n)
    words = list(find_words(text))
    found = [
        words[i : i + n]
        for i in range(len(words) - n + 1)
        if tuple(fold(w[0]) for w in words[i : i + n]) in known
    ]
    return [[w[0] for w in run] for run in found if run[-1].end() > len(prompt)]


@pytest.mark.parametrize(
    'line',
    [
        *LINES,
        "a''b 'c' d' e'f'g’h ''",
        'x_y-z’ ’q\nArtist: nobody here\nyear:\n Title: a word',
        '',
    ],
)
def test_words(line):
    watch = CopyFilter(None, CharTokenizer('a'), 10**6, '')
    watch._read(line)
    assert [fold(m[0]) for m in find_words(line)] == watch.words == split_words(line)


def test_words_of_any_text():
    rng = random.Random(1)
    letters = ["a", "B", "é", "'", "’", ' ', '\n', '-', '_', '7', ':', 'Artist', 'title:', 'İ',
               'e\u0301', '\u0323', 'ि', '한', '\u11ab', '\u0345']  # fmt: skip
    for _ in range(3000):
        text = ''.join(rng.choices(letters, k=12))
        watch = CopyFilter(None, CharTokenizer('a'), 10**6, '')
        watch._read(text)
        words = [fold(m[0]) for m in find_words(text)]
        assert words == watch.words, text
        for form in 'NFC', 'NFD':
            assert words == [fold(m[0]) for m in find_words(unicodedata.normalize(form, text))], (
                text
            )
        for word in words:
            assert bare(word) == ''.join(map(bare, word)) == ''.join(bare(fold(c)) for c in word), (
                word
            )


def test_compare_is_brute_force(tmp_path):
    rng = random.Random(2)
    for turn in range(8):
        words = ['la', 'na', 'Hey', "don't", 'ü'][: 2 + turn % 4]
        songs = [
            song_header(f'Band {i}', title=f'Song {i}')
            + ' '.join(rng.choices(words, k=rng.randint(1, 60)))
            for i in range(rng.randint(1, 6))
        ]
        index = dataset(
            tmp_path / str(turn), songs, CharTokenizer.train(songs, special=('<|endoftext|>',))
        )
        for n in 1, 2, 5:
            text = ', '.join(rng.choices([*words, 'new'], k=rng.randint(0, 40)))
            since = rng.randint(0, len(text)) if turn % 2 else 0
            told, own = index.compare(text, n, since), split_words(text)
            ends = [m.end() > since for m in re.finditer(r"[\w']+", text)]
            assert len(ends) == len(own) and told.words == sum(ends)
            grams = {m: runs_of(songs, m) for m in range(1, 42)}
            here = [
                (i, j)
                for i in range(len(own))
                for j in range(i + 1, len(own) + 1)
                if ends[j - 1] and tuple(own[i:j]) in grams[j - i]
            ]
            longest = max((j - i for i, j in here), default=0)
            assert told.longest == longest == len(split_words(told.text))
            assert not longest or any(
                tuple(own[i:j]) == tuple(split_words(told.text)) for i, j in here
            )
            n_grams = [
                tuple(own[i : i + n]) in grams[n]
                for i in range(len(own) - n + 1)
                if ends[i + n - 1]
            ]
            assert told.share == (sum(n_grams) / len(n_grams) if n_grams else None)
            maximal = [
                (i, j)
                for i, j in here
                if j - i >= n and (i - 1, j) not in here and (i, j + 1) not in here
            ]
            assert sorted(maximal) == [
                (len(split_words(text[: r['start']])), len(split_words(text[: r['end']])))
                for r in told.runs
            ]
            for run in told.runs:
                run_words = tuple(split_words(text[run['start'] : run['end']]))
                i = next(
                    i for i, song in enumerate(songs) if run_words in runs_of([song], run['words'])
                )
                assert run['song'] == f'Band {i}: Song {i}'
            assert json.loads(json.dumps(vars(told))) == vars(told), 'nothing of numpy'


def test_compare_what_was_written(tmp_path):
    songs = ['the rain in spain falls mainly 🦉 on the plain']
    index = dataset(tmp_path, songs, tokenizer := CharTokenizer.train([*songs, 'Artist:A']))
    assert index.document_end == '<|endoftext|>' == tokenizer.decode([tokenizer.eot])

    def told(prompt, written, n=3):
        found = index.compare(prompt + written, n, since=len(prompt))
        return (
            found.words,
            found.longest,
            found.text,
            found.share,
            [(prompt + written)[run['start'] : run['end']] for run in found.runs],
        )

    assert told('the ra', 'in in spain') == (3, 4, 'the rain in spain', 1, ['the rain in spain']), (
        'a half word, and a run from the prompt'
    )
    assert told('the rain in spain', ' and more') == (2, 0, '', 0, []), (
        'what ends in the prompt does not count'
    )
    assert told('🕯🕯 the RAIN', ', in 🦉 Spain! 🕯 falls not') == (
        4,
        5,
        'the RAIN, in 🦉 Spain! 🕯 falls',
        0.75,
        ['the RAIN, in 🦉 Spain! 🕯 falls'],
    )
    assert told(
        '', 'the rain<|endoftext|>in spain falls<|endoftext|>Artist: on the plain\non the'
    ) == (7, 3, 'in spain falls', 1, ['in spain falls'])
    assert told('', 'spain falls') == (2, 2, 'spain falls', None, []) and str(
        index.compare('spain falls')
    ).endswith('("spain falls")')
    assert (
        told('the rain in', '') == (0, 0, '', None, [])
        and 'has no words' in str(index.compare('the rain', since=8))
        and 'has no words' in str(index.compare('?!'))
    )


def test_marks(tmp_path):
    songs = ['l\u2019e\u0301te\u0301 हिन्दी 하늘 Ω']
    index = dataset(tmp_path, songs, CharTokenizer.train(songs))
    for form in 'NFC', 'NFD':
        text = '🕯 ' + unicodedata.normalize(form, "L'ÉTÉ हिन्दी 하늘 \u2126") + ' new'
        told = index.compare(text)
        assert told.longest == 4 and told.words == 5 and told.text == text[2:-4], form
    assert index.compare('l’ete\u0301').longest == index.compare('हिन्').longest == 0


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    with open(DEMO, encoding='utf-8') as f:
        songs = [json.loads(line) for line in f]
    songs = [
        song_header(s['artist'], s['album'], s['year'], s['title']) + s['lyrics'] + '\n'
        for s in songs
        if s['lyrics'].strip()
    ]
    folder = tmp_path_factory.mktemp('demo')
    return (
        folder,
        songs[30:],
        songs[:30],
        dataset(folder, songs[30:], BPETokenizer.train(songs, 1024)),
    )


def test_compare_with_the_demo_songs(demo):
    _, songs, others, index = demo
    whole = '|'.join(f' {" ".join(split_words(song))} ' for song in songs)
    rng = random.Random(3)
    for song in [
        *others[:10],
        *(
            rng.choice(songs)[rng.randint(60, 200) :][:300] + rng.choice(songs)[-200:]
            for _ in range(10)
        ),
    ]:
        told, words, longest = index.compare(song), split_words(song), 0
        for i in range(len(words)):
            while i + longest < len(words) and f' {" ".join(words[i : i + longest + 1])} ' in whole:
                longest += 1
        assert told.longest == longest
        assert told.share == sum(
            f' {" ".join(words[i : i + 5])} ' in whole for i in range(len(words) - 4)
        ) / (len(words) - 4)
    told = index.compare(songs[7])
    head = dict(line.split(': ', 1) for line in songs[7].split('\n\n')[0].split('\n'))
    assert (
        told.share == 1
        and len(told.runs) == 1
        and told.song == f'{head["Artist"]}: {head["Title"]}'
    )
    assert 'has no words' in str(
        index.compare('Artist: nobody\n\n?!')
    ) and 'none of its words' in str(index.compare('xyzzy'))


def test_the_index_follows_the_dataset(tmp_path, capsys):
    songs = ['the ash in the butter', 'under the lamp']
    index = dataset(tmp_path, songs, CharTokenizer.train(songs))
    assert index.compare('Under the lamp', 2).song == 'document 2: under the lamp…'
    capsys.readouterr()
    Index.open(str(tmp_path))
    assert capsys.readouterr().err == '', 'built once'
    left, own, new = (
        tmp_path / name
        for name in ('originality.killed.tmp', 'originality-notes', 'originality.other.tmp')
    )
    for folder in left, own, new:
        folder.mkdir()
    os.utime(left, (0, 0))
    songs = ['over the hill and far']
    index = dataset(tmp_path, songs, CharTokenizer.train(songs))
    assert index.compare('over the hill').longest == 3 and index.compare('butter').longest == 0
    assert (
        not left.exists()
        and own.exists()
        and new.exists()
        and len(list(tmp_path.glob('originality-*'))) == 2
    )
    (tmp_path / 'meta.json').unlink()
    (tmp_path / 'meta.pkl').unlink()
    (tmp_path / 'train.bin').rename(tmp_path / 'my_train_000001.bin')
    write_dataset(
        str(tmp_path),
        [('train', 'a word\n' * 9, False)],
        CharTokenizer.train(['a word\n'], special=()),
        need=('train',),
    )
    assert Index.open(str(tmp_path)).compare('word a').longest == 2, (
        'without document ends it is one document'
    )


@pytest.mark.parametrize(
    'part', [lambda raw: b'', lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], None]
)
def test_torn_files(tmp_path, part, capsys):
    songs = ['the ash in the butter', 'under the lämp']
    dataset(tmp_path, songs, CharTokenizer.train(songs))
    (folder,) = tmp_path.glob('originality-*')
    assert sorted(path.name for path in folder.iterdir()) == [
        'documents.npy',
        'songs.txt',
        'starts.npy',
        'suffixes.npy',
        'vocabulary.txt',
        'words.npy',
    ]
    for path in sorted(folder.iterdir()):
        path.write_bytes(part(path.read_bytes())) if part else path.unlink()
        capsys.readouterr()
        found = Index.open(str(tmp_path)).compare('Under the LÄMP', 2)
        assert (found.longest, found.song) == (
            3,
            'document 2: under the lämp…',
        ) and 'sorting' in capsys.readouterr().err, path
        assert os.listdir(tmp_path).count(folder.name) == 1 and not list(tmp_path.glob('*.tmp'))


def test_builders_at_once(tmp_path, monkeypatch):
    songs = ['the ash in the butter']
    write_dataset(
        str(tmp_path),
        [('train', song, True) for song in songs],
        CharTokenizer.train(songs),
        need=('train',),
    )
    code = (
        'import sys; from lyregpt.originality import Index; '
        'print(Index.open(sys.argv[1]).compare("in the butter", 2).longest)'
    )
    racers = [
        subprocess.Popen(
            [sys.executable, '-c', code, tmp_path],
            stdout=-1,
            stderr=-1,
            text=True,
            cwd=DEMO.parents[2],
        )
        for _ in range(3)
    ]
    for racer in racers:
        out, err = racer.communicate(timeout=60)
        assert (racer.returncode, out) == (0, '3\n'), err
    (folder,) = tmp_path.glob('originality*')
    build = originality.build
    for torn in False, True:  # the other one is done, well or badly, while this one builds
        originality.shutil.rmtree(folder)

        def slow(files, tokenizer, path, torn=torn):
            build(files, tokenizer, path)
            originality.shutil.copytree(path, folder)
            np.save(folder / 'words.npy', np.zeros(3 + torn))
            if not torn:
                originality.shutil.copy(os.path.join(path, 'words.npy'), folder)

        monkeypatch.setattr(originality, 'build', slow)
        assert Index.open(str(tmp_path)).compare('in the butter', 2).longest == 3
        assert list(tmp_path.glob('originality*')) == [folder]

    def full(*_):
        raise OSError(28, 'No space left on device')

    originality.shutil.rmtree(folder)
    monkeypatch.setattr(originality, 'build', full)
    with pytest.raises(UserError, match='cannot be written: No space left'):
        Index.open(str(tmp_path))
    assert not list(tmp_path.glob('originality*'))


def test_song_names():
    label = originality.label
    assert label('\nArtist: A\nTitle: B\nTitle: C\n\nArtist: D\nla', 3) == 'A: B'
    assert (
        label('Title: B\n \nArtist: D\nla', 3) == 'B'
        and label('la la\n\nArtist: D\n', 3) == 'document 3: la la Artist: D…'
    )


def walk(index, tokenizer, n, songs, prompt, rng, steps, avoid=True):
    """Generate mostly what a song has next, else anything; returns the text.

    Without a model, this is the hardest test of what is banned.
    """
    joined = {
        t
        for key, ts in originality.spelling_of(tokenizer).tokens[0].items()
        if isinstance(key, str)
        for t in ts
    }
    watch, row = CopyFilter(index, tokenizer, n, prompt), []
    ids = tokenizer.encode(rng.choice(songs))
    at = 0
    for _ in range(steps):
        banned = set(watch.banned()) if avoid else set()
        if (
            watch.state == originality.INSIDE
            and not watch.unwatched
            and avoid
            and not watch.decoder.getstate()[0]
        ):
            assert banned.isdisjoint(joined), 'a word can always go on'
        at = at + 1 if at + 1 < len(ids) and rng.random() < 0.95 else 0
        if not at:
            ids = tokenizer.encode(rng.choice(songs))
            at = rng.randrange(len(ids))
        token = ids[at]
        while token in banned or token == tokenizer.eot:
            token = rng.choice(
                [*rng.choice(songs_ids(tokenizer, songs)), rng.randrange(tokenizer.vocab_size)]
            )
        watch.push(token)
        row.append(token)
    text = tokenizer.decode(row)
    assert watch.words == [fold(m[0]) for m in find_words(prompt + text)][-len(watch.words) :], (
        'it reads what is written'
    )
    return text


def songs_ids(tokenizer, songs, kept={}):  # noqa: B006
    if tokenizer not in kept:
        kept[tokenizer] = [tokenizer.encode(song) for song in songs]
    return kept[tokenizer]


@pytest.mark.parametrize('kind', ['char', 'bpe', 'bytes', 'gpt2'])
def test_no_run_whatever_is_drawn(tmp_path, kind):
    songs = ['\n'.join(LINES[i:] + LINES[: i // 2]) for i in range(len(LINES))] + [
        'İstanbul été 雨\nTitle: a lamp\nthe rain'
    ]
    tokenizer = {
        'char': lambda: CharTokenizer.train(songs),
        'bpe': lambda: BPETokenizer.train(songs, 330),
        'bytes': lambda: BPETokenizer.train(songs, 257),
        'gpt2': gpt2,
    }[kind]()
    index = dataset(tmp_path, songs, tokenizer)
    rng = random.Random(4)
    prompts = ['', 'e\u0301te', 'हि']
    prompts += [
        'la la la the r',
        'the rain don',
        "the rain don'",
        'under the',
        'the Räub',
        'Artist: la\nla la la',
        'the 雨',
        "rock'n",
        'la la la ',
    ]
    without = 0
    for turn in range(20 if kind == 'gpt2' else 60):
        n, prompt = rng.choice([2, 3, 4, 6]), rng.choice(prompts)
        text = walk(index, tokenizer, n, songs, prompt, rng, 120)
        assert not copied(songs, prompt, text, n), (n, prompt, text)
        assert all(run['end'] <= len(prompt) for run in index.compare(prompt + text, n).runs)
        without += turn % 4 == 0 and bool(
            copied(
                songs, prompt, walk(index, tokenizer, n, songs, prompt, rng, 120, avoid=False), n
            )
        )
    assert without > 4, 'and without, there are'


@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_a_model_that_knows_its_songs_by_heart(tmp_path, demo, kind):
    songs = [song.split('\n\n', 1)[1][:110] for song in demo[1][:2]]
    tokenizer = CharTokenizer.train(songs) if kind == 'char' else BPETokenizer.train(songs, 400)
    index = dataset(tmp_path, songs, tokenizer)
    torch.manual_seed(1)
    rows = [[tokenizer.eot, *tokenizer.encode(song), tokenizer.eot] for song in songs]
    model = GPT(
        GPTConfig(
            arch='modern',
            block_size=512,
            vocab_size=tokenizer.vocab_size,
            n_layer=2,
            n_head=2,
            n_embd=64,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    size = max(map(len, rows)) - 1
    x = torch.tensor([row[:-1] + [0] * (size - len(row) + 1) for row in rows])
    y = torch.tensor([row[1:] + [-1] * (size - len(row) + 1) for row in rows])
    for _ in range(60):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    without = 0
    for n, options in (
        (3, {'temperature': 1.3}),
        (4, {'temperature': 0}),
        (5, {'top_k': 20}),
        (6, {'temperature': 0.8, 'top_p': 0.9}),
    ):
        prompt = ' '.join(songs[0].split()[: n - 1])[:-1]
        for guarded in (True, False) if n != 5 else (True,):
            avoid = [CopyFilter(index, tokenizer, n, prompt) for _ in range(3)] if guarded else None
            prompts = [[tokenizer.eot, *tokenizer.encode(prompt)]] * 3
            written = torch.stack(
                list(
                    model.generate(
                        prompts, 60, avoid=avoid, vocab_size=tokenizer.vocab_size, **options
                    )
                ),
                1,
            )
            for row in written.tolist():
                text = tokenizer.decode(row)
                found = [
                    c
                    for part, p in zip(text.split('<|endoftext|>'), [prompt] + [''] * 99)
                    for c in copied(songs, p, part, n)
                ]
                assert not guarded or not found, (n, options, found, text)
                without += bool(found)
    assert without >= 3, 'and without, there are'
    with pytest.raises(ValueError, match='avoid holds 1'):
        next(model.generate(prompts, 1, avoid=[None]))
    with pytest.raises(UserError, match='avoid_copying=1'):
        CopyFilter(index, tokenizer, 1)


def test_samples_of_training_end_with_the_document(tmp_path):
    songs = ['the rain in spain falls']
    index = dataset(tmp_path, songs, tokenizer := CharTokenizer.train(songs))

    class Model:
        def generate(self, prompts, tokens, stop_tokens, **_):
            assert prompts == [[tokenizer.eot, *tokenizer.encode('the ra')]]
            for token in [
                *tokenizer.encode('in in sp'),
                tokenizer.eot,
                *tokenizer.encode('ain falls'),
            ]:
                yield torch.tensor([token])
                if token in stop_tokens:
                    break

    prompt, text = generate_sample(Model(), tokenizer, 'the r\ua000a')
    assert prompt + text == 'the rain in sp'
    assert str(index.compare(prompt + text, since=len(prompt))) == (
        'originality: 3 words in a row from "document 1: the rain in spain falls…" ("the rain in")'
    )


def test_scripts(tmp_path, chars, monkeypatch, capsys):
    out = tmp_path / 'out'
    told = train(tiny(chars, out, '--sample_interval=10', '--originality=True'))
    assert (
        told['step'] == 20
        and (out / 'train.log').read_text(encoding='utf-8').count('--- originality: ') == 2
    )
    words = [
        'sample.py',
        f'--out_dir={out}',
        '--max_new_tokens=60',
        '--num_samples=2',
        '--device=cpu',
        '--originality',
    ]
    done = script(*words, '--json', '--avoid_copying=2')
    rows = [json.loads(line)['originality'] for line in done.stdout.splitlines()]
    assert len(rows) == 2 and all(row['longest'] < 2 and row['n'] == 5 for row in rows), done.stderr
    with pytest.raises(UserError, match='nowhere/train.bin: no such file.*--dataset=FOLDER'):
        originality.index_of({'dataset': chars}, 'nowhere')
    with pytest.raises(UserError, match='avoid_copying=1: expected 0'):
        configure(SampleConfig, ['--avoid_copying=1'])
    config = configure(SampleConfig, [*words[1:], '--dataset=', '--start=The'])
    loaded = load(config)
    judged, compare = [], Index.compare
    monkeypatch.setattr(
        Index,
        'compare',
        lambda self, text, **more: judged.append((text[:3], more)) or compare(self, text, **more),
    )
    print_samples(loaded, config)
    assert (
        capsys.readouterr().out.count('\noriginality: ') == 2
        and judged == [('The', {'since': 3})] * 2
    )
    monkeypatch.undo()
    with pytest.raises(UserError, match='--dataset=FOLDER'):
        originality.index_of({})
    empty = tmp_path / 'empty.txt'
    empty.write_text('')
    monkeypatch.setattr(
        'sys.argv', ['lyregpt originality', f'--dataset={chars}', f'--file={empty}']
    )
    originality.main()
    assert capsys.readouterr().out == 'originality: the text has no words\n'
    song = tmp_path / 'song.txt'
    song.write_text('No such words', encoding='utf-8')
    done = script('-m', 'lyregpt', 'originality', f'--dataset={chars}', f'--file={song}', '--n=2')
    assert done.returncode == 0 and done.stdout.startswith('originality: '), done.stderr
    for more, message in (
        (['--dataset=nowhere'], 'nowhere/train.bin'),
        (['--n=0'], 'n=0'),
        (['--text=a', '--file=b'], 'one text'),
        (['--file=no'], 'No such file'),
    ):
        monkeypatch.setattr('sys.argv', ['lyregpt originality', f'--dataset={chars}', *more])
        with pytest.raises((UserError, OSError), match=message):
            originality.main()
