import json

import pytest

from configurator import UserError
from tests.conftest import DEMO, gpt2, script
from tokenizer import EOT, UNK, BPETokenizer, CharTokenizer, from_state, load

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


@pytest.mark.parametrize('text', UNICODE, ids=repr)
def test_bytes_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.eot not in bpe.encode(text), 'special tokens written out are plain text'


def test_round_trip_of_the_corpus(bpe):
    for line in DEMO.read_text(encoding='utf-8').splitlines():
        song = json.loads(line)['lyrics']
        assert bpe.decode(bpe.encode(song)) == song


def test_fuzzed_round_trip(bpe):
    import random

    dice = random.Random(0)
    for _ in range(300):
        text = ''.join(
            chr(dice.choice([dice.randrange(32, 127), dice.randrange(0xD800), dice.randrange(0xE000, 0x110000)]))
            for _ in range(dice.randrange(30))
        )
        assert bpe.decode(bpe.encode(text)) == text


def test_streamed_text_is_the_decoded_text(bpe):
    text = 'Ω🦇 rain — näher 日本'
    step = bpe.stream_decoder()
    pieces = [step(i) for i in bpe.encode(text)]
    assert ''.join(pieces) == text and not any('\ufffd' in p for p in pieces)


def test_bpe_training_is_repeatable_and_merges(demo_text, bpe):
    again = BPETokenizer.train([demo_text], 600)
    assert again.state() == bpe.state() and bpe.vocab_size == 600
    assert len(bpe.encode(demo_text)) < 0.6 * len(demo_text.encode())


def test_char_names_the_unknown_character():
    tokenizer = CharTokenizer.train(['abc\n'])
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) at line 2, column 3"):
        tokenizer.encode('abc\nabé')
    assert tokenizer.decode(tokenizer.encode('cab\n')) == 'cab\n' and tokenizer.eot == 4 and tokenizer.vocab_size == 5
    lenient = CharTokenizer.train(['abc'], special=(EOT, UNK))
    assert lenient.encode('aéc') == [0, lenient.unk, 2] and UNK in lenient.decode([0, lenient.unk])


def test_normalization():
    tokenizer = CharTokenizer.train(['Hail  THE\t rain \r\n\n\n\nnow'], lowercase=True, squeeze=True)
    assert tokenizer.decode(tokenizer.encode('HAIL   the\train \n\n\n\nNOW')) == 'hail the rain\n\nnow'
    assert from_state(tokenizer.state()).encode('HAIL') == tokenizer.encode('hail')


def test_gpt2_equals_tiktoken_and_needs_no_file():
    tiktoken = pytest.importorskip('tiktoken')
    ours, theirs = gpt2(), tiktoken.get_encoding('gpt2')
    text = DEMO.read_text(encoding='utf-8')
    assert ours.encode(text) == theirs.encode_ordinary(text) and ours.decode(ours.encode(text)) == text
    assert [a.tolist() for a in ours.encode_batch(UNICODE)] == [theirs.encode_ordinary(t) for t in UNICODE]
    assert ours.eot == 50256 and load('gpt2').vocab_size == 50257


def test_the_byte_table_is_gpt2s():
    """Our BPE's byte alphabet against the one inside tiktoken: every single byte is a token of both."""
    engine = gpt2()
    own = BPETokenizer.train(['aa'], 257)
    for b in range(256):
        assert own.token_bytes(own._engine.token_to_id(__import__('tokenizer').bytes_to_unicode()[b])) == bytes([b])
        assert engine._engine.encode_single_token(bytes([b])) < 256


def test_save_and_load(tmp_path, bpe):
    for tokenizer in bpe, CharTokenizer.train(['abc'], special=()):
        path = str(tmp_path / 't.json')
        tokenizer.save(path)
        assert load(path).state() == tokenizer.state() == from_state(json.loads(json.dumps(tokenizer.state()))).state()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"kind": "wordpiece"}', '{"kind": "char"}', '{"kind": "bpe", "model": {}}'])
def test_foreign_files(tmp_path, text):
    (tmp_path / 't.json').write_text(text)
    with pytest.raises(UserError, match='t.json|tokenizer'):
        load(str(tmp_path / 't.json'))


def test_bad_sizes_and_ids(bpe):
    for size in 0, 256, 70000:
        with pytest.raises(UserError, match=f'vocab_size={size}'):
            BPETokenizer.train(['abc'], size)
    with pytest.raises(UserError, match='600 is outside the vocabulary'):
        bpe.decode([600])


def test_from_the_shell(tmp_path, demo_text):
    (tmp_path / 'songs.txt').write_text(demo_text, encoding='utf-8')
    out = tmp_path / 't.json'
    assert script('tokenizer.py', 'train', tmp_path / 'songs.txt', '--vocab_size=500', f'--out={out}').returncode == 0
    ids = script('tokenizer.py', 'encode', f'--tokenizer={out}', 'Hail the näin').stdout.split()
    assert script('tokenizer.py', 'decode', f'--tokenizer={out}', *ids).stdout == 'Hail the näin'
    wrong = script('tokenizer.py', 'encode', '--tokenizer=missing.json', 'x')
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1
