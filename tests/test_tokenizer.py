import json
import random

import pytest

from configurator import UserError
from lyregpt.tokenizer import (
    EOT,
    UNK,
    BPETokenizer,
    CharTokenizer,
    WordPieceTokenizer,
    bytes_to_unicode,
    choose_tokenizer,
    from_hf,
    from_state,
    load,
)
from tests.conftest import DEMO, gpt2, script

UNICODE = [
    '',
    ' ',
    '\n\n\t \r\n',
    'naïve Ångström ß ÿ',
    '日本語のテキスト',
    '🦇🎸 e\u0301 \u200d \ufeff',
    'x\x00y',
    f'a{EOT}b',
    '\U0010ffff',
    "don't   stop",
    'ﷺ' * 3,
]


@pytest.fixture(scope='module')
def bpe(demo_text):
    return BPETokenizer.train([demo_text], 600)


@pytest.fixture(scope='module')
def wordpiece(demo_text):
    return WordPieceTokenizer.train([demo_text], 600)


@pytest.fixture(params=['bpe', 'wordpiece'])
def of_bytes(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize('text', UNICODE, ids=repr)
def test_bytes_round_trip(of_bytes, text):
    assert of_bytes.decode(of_bytes.encode(text)) == text
    assert of_bytes.eot not in of_bytes.encode(text), 'special tokens written out are plain text'


def test_round_trip_of_the_corpus(of_bytes):
    for line in DEMO.read_text(encoding='utf-8').splitlines():
        song = json.loads(line)['lyrics']
        assert of_bytes.decode(of_bytes.encode(song)) == song


def test_fuzzed_round_trip(of_bytes):
    rng = random.Random(0)
    for _ in range(300):
        text = ''.join(
            chr(
                rng.choice(
                    [
                        rng.randrange(32, 127),
                        rng.randrange(0xD800),
                        rng.randrange(0xE000, 0x110000),
                    ]
                )
            )
            for _ in range(rng.randrange(30))
        )
        assert of_bytes.decode(of_bytes.encode(text)) == text


def test_streamed_text_is_the_decoded_text(of_bytes):
    text = 'Ω🦇 rain — näher 日本'
    step = of_bytes.stream_decoder()
    pieces = [step(i) for i in of_bytes.encode(text)]
    assert ''.join(pieces) == text and not any('\ufffd' in p for p in pieces) and step(None) == ''
    rng = random.Random(1)
    for _ in range(300):  # whatever the bytes, also when they end within a character
        cut = [of_bytes.encode(c)[: rng.randint(1, 4)] for c in rng.choices('aé日🦇', k=4)]
        ids = sum(cut, [])
        assert ''.join(map(step, [*ids, None])) == of_bytes.decode(ids)


def test_bpe_training_is_repeatable_and_merges(demo_text, bpe):
    again = BPETokenizer.train([demo_text], 600)
    assert again.state() == bpe.state() and bpe.vocab_size == 600
    assert len(bpe.encode(demo_text)) < 0.6 * len(demo_text.encode())


def test_wordpiece_takes_the_longest_token(demo_text, wordpiece):
    """Against its definition: in each of GPT-2's words, repeatedly the longest token that fits."""
    from tokenizers import pre_tokenizers

    again = WordPieceTokenizer.train([demo_text], 600)
    assert again.state() == wordpiece.state() and wordpiece.vocab_size == 600
    id_of = {wordpiece.token_bytes(i): i for i in range(600) if i != wordpiece.eot}
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    expected = []
    for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(demo_text):
        rest = bytes(byte_of[c] for c in word)
        while rest:
            size = next(n for n in range(len(rest), 0, -1) if rest[:n] in id_of)
            expected.append(id_of[rest[:size]])
            rest = rest[size:]
    assert wordpiece.encode(demo_text) == expected
    assert len(expected) < 0.6 * len(demo_text.encode())


@pytest.mark.parametrize('word', ['é', '日本語', '#', '\n', 'the'])
def test_wordpiece_has_no_limit_on_words(wordpiece, word):
    assert wordpiece.decode(wordpiece.encode(word * 5000)) == word * 5000


def test_wordpiece_is_ours_alone(tmp_path, wordpiece):
    """BERT's own kind is refused; ours comes back from Hugging Face's file, normalized."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers

    bert = Engine(models.WordPiece({'[UNK]': 0, 'rain': 1, '##s': 2}, unk_token='[UNK]'))
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.save(str(tmp_path / 'bert.json'))
    with pytest.raises(UserError, match='bert.json: its WordPiece is not the byte-level one'):
        load(str(tmp_path / 'bert.json'))
    lower = WordPieceTokenizer.train(['the rain THE RAIN'], 270, lowercase=True, squeeze=True)
    for tokenizer in wordpiece, lower:
        assert from_hf(tokenizer.to_hf()).state() == tokenizer.state()
    assert lower.decode(lower.encode('THE   Rain')) == 'the rain'
    cut = json.loads(json.dumps(wordpiece.state()))
    del cut['model']['model']['vocab']['Ġ']
    with pytest.raises(UserError, match='lacks 1 of the 256 bytes'):
        from_state(cut)


def test_char_names_the_unknown_character():
    tokenizer = CharTokenizer.train(['abc\n'])
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) at line 2, column 3"):
        tokenizer.encode('abc\nabé')
    assert (
        tokenizer.decode(tokenizer.encode('cab\n')) == 'cab\n'
        and tokenizer.eot == 4
        and tokenizer.vocab_size == 5
    )
    lenient = CharTokenizer.train(['abc'], special=(EOT, UNK))
    assert lenient.encode('aéc') == [0, lenient.unk, 2] and UNK in lenient.decode([0, lenient.unk])


def test_normalization():
    tokenizer = CharTokenizer.train(
        ['Hail  THE\t rain \r\n\n\n\nnow'], lowercase=True, squeeze=True
    )
    assert (
        tokenizer.decode(tokenizer.encode('HAIL   the\train \n\n\n\nNOW')) == 'hail the rain\n\nnow'
    )
    assert from_state(tokenizer.state()).encode('HAIL') == tokenizer.encode('hail')


def test_gpt2_equals_tiktoken_and_needs_no_file():
    tiktoken = pytest.importorskip('tiktoken')
    ours, theirs = gpt2(), tiktoken.get_encoding('gpt2')
    text = DEMO.read_text(encoding='utf-8')
    assert (
        ours.encode(text) == theirs.encode_ordinary(text) and ours.decode(ours.encode(text)) == text
    )
    assert [a.tolist() for a in ours.encode_batch(UNICODE)] == [
        theirs.encode_ordinary(t) for t in UNICODE
    ]
    assert ours.eot == 50256 and load('gpt2').vocab_size == 50257


def test_the_byte_table_is_gpt2s():
    """Our BPE's byte alphabet against tiktoken's: every single byte is a token of both."""
    engine = gpt2()
    own = BPETokenizer.train(['aa'], 257)
    for b in range(256):
        assert own.token_bytes(own._engine.token_to_id(bytes_to_unicode()[b])) == bytes([b])
        assert engine._engine.encode_single_token(bytes([b])) < 256


def test_save_and_load(tmp_path, bpe, wordpiece):
    for tokenizer in bpe, wordpiece, CharTokenizer.train(['abc'], special=()):
        path = str(tmp_path / 't.json')
        tokenizer.save(path)
        assert (
            load(path).state()
            == tokenizer.state()
            == from_state(json.loads(json.dumps(tokenizer.state()))).state()
        )


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        '{"kind": "unigram"}',
        '{"kind": "wordpiece"}',
        '{"kind": "char"}',
        '{"kind": "bpe", "model": {}}',
    ],
)
def test_foreign_files(tmp_path, text):
    (tmp_path / 't.json').write_text(text)
    with pytest.raises(UserError, match='t.json|tokenizer'):
        load(str(tmp_path / 't.json'))


def test_bad_sizes_and_ids(bpe):
    for size in 0, 256, 70000:
        for kind in 'bpe', 'wordpiece':
            with pytest.raises(UserError, match=f'vocab_size={size}'):
                choose_tokenizer(kind, ['abc'], size)
    with pytest.raises(UserError, match='600 is outside the vocabulary'):
        bpe.decode([600])


@pytest.mark.parametrize('kind', ['bpe', 'wordpiece'])
def test_from_the_shell(tmp_path, demo_text, kind):
    (tmp_path / 'songs.txt').write_text(demo_text, encoding='utf-8')
    out = tmp_path / 't.json'
    assert (
        script(
            '-m',
            'lyregpt',
            'tokenizer',
            'train',
            tmp_path / 'songs.txt',
            f'--kind={kind}',
            '--vocab_size=500',
            f'--out={out}',
        ).returncode
        == 0
    )
    ids = script(
        '-m', 'lyregpt', 'tokenizer', 'encode', f'--tokenizer={out}', 'Hail the näin'
    ).stdout.split()
    assert (
        script('-m', 'lyregpt', 'tokenizer', 'decode', f'--tokenizer={out}', *ids).stdout
        == 'Hail the näin'
    )
    wrong = script('-m', 'lyregpt', 'tokenizer', 'encode', '--tokenizer=missing.json', 'x')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1
