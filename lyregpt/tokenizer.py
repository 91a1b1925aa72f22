"""Text ⇄ token ids: characters, byte-level BPE or WordPiece, GPT-2's BPE, behind one interface.

    python -m lyregpt tokenizer train songs.txt more.txt --vocab_size=2048 --out=tokenizer.json
    python -m lyregpt tokenizer encode --tokenizer=tokenizer.json "Hail the rain"
    python -m lyregpt tokenizer decode --tokenizer=tokenizer.json 523 17 902

A tokenizer is plain JSON (`state()`). The dataset's meta.json and the checkpoint both hold it, so a
model always comes with its own. `to_hf()` and `load` use Hugging Face's tokenizer.json too.
"""

import argparse
import codecs
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Engine

from configurator import UserError
from lyregpt.text import atomic_write

EOT = '<|endoftext|>'  # after every document; GPT-2's spelling
UNK = '<|unk|>'


class Tokenizer:
    """What all kinds share. `vocab_size` includes special tokens."""

    kind: str
    vocab_size: int
    eot: int | None = None  # the id after every document, and before a text, as in GPT-2
    unk: int | None = None  # the id of unknown characters
    _bytes: list[bytes]  # the UTF-8 bytes of each token
    _state_names: tuple[str, ...] = ()  # the attributes of this kind that `state` includes

    def __init__(self, lowercase: bool = False, squeeze: bool = False):
        self.lowercase, self.squeeze = lowercase, squeeze

    def normalize(self, text: str) -> str:
        """The text as it is encoded: in lower case, and with blanks squeezed, if so chosen."""
        if self.squeeze:
            text = re.sub(r'[^\S\n]+', ' ', text.replace('\r\n', '\n').replace('\r', '\n'))
            text = re.sub(r'\n{3,}', '\n\n', re.sub(r' ?\n ?', '\n', text)).strip(' ')
        if not text.isascii() and re.search('[\ud800-\udfff]', text):
            # half a surrogate pair, from broken input, becomes U+FFFD
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        return text.lower() if self.lowercase else text

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens spelled out in it are plain text.

        Raises UserError for an unknown character.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int array per text, on all cores where the library of this kind can."""
        return self._encode_batch([self.normalize(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """
        return b''.join(map(self.token_bytes, ids)).decode('utf-8', errors='replace')

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function that takes ids one by one and returns the text of complete characters.

        None, at the end, returns what is left of an incomplete one.
        """
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda token: utf8.decode(
            b'' if token is None else self.token_bytes(token), final=token is None
        )

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one id; a byte-level token may be part of a character.

        Raises UserError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise UserError(
                f'token id {token} is outside the vocabulary (0 to {self.vocab_size - 1}): '
                'another tokenizer made it'
            )
        return self._token_bytes(int(token))

    def state(self) -> dict[str, Any]:
        """The whole tokenizer as values for JSON; `from_state` is the inverse."""
        names = ('kind', 'vocab_size', 'lowercase', 'squeeze', *self._state_names)
        return {name: getattr(self, name) for name in names}

    def fingerprint(self) -> str:
        """A hash that two tokenizers share if every id has the same text in both."""
        tokens = map(self._token_bytes, range(self.vocab_size))
        return hashlib.sha256(b''.join(f'{len(t)} '.encode() + t for t in tokens)).hexdigest()

    def to_hf(self) -> dict[str, Any]:
        """The same tokenizer as Hugging Face's tokenizer.json, which puts `eot` before a text."""
        engine = self._hf_engine()
        if self.lowercase or self.squeeze:
            engine.normalizer = hf_normalizer(self.lowercase, self.squeeze)
        if self.eot is not None:
            name = engine.id_to_token(self.eot)
            engine.post_processor = processors.TemplateProcessing(
                f'{name} $A', f'{name} $A {name} $B', [(name, self.eot)]
            )
        return json.loads(engine.to_str())

    def save(self, path: str) -> None:
        """Write `state()` as JSON."""
        atomic_write(path, json.dumps(self.state(), ensure_ascii=False).encode())

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def _hf_engine(self) -> Any:
        raise NotImplementedError


class CharTokenizer(Tokenizer):
    """One id per character, in code point order as in nanoGPT, followed by the special tokens."""

    kind = 'char'
    _state_names = ('chars', 'special')

    def __init__(self, chars: str, special: Sequence[str] = (EOT,), **normalization: Any):
        super().__init__(**normalization)
        self.chars, self.special = chars, list(special)
        self._bytes = [s.encode('utf-8', 'surrogatepass') for s in [*chars, *special]]
        self.vocab_size = len(self._bytes)
        ids = {token: i for i, token in enumerate(special, len(chars))}
        self.eot, self.unk = ids.get(EOT), ids.get(UNK)
        self._ids = np.full(0x110000, ids.get(UNK, -1), dtype=np.int32)
        self._ids[[ord(c) for c in chars]] = np.arange(len(chars))

    @classmethod
    def train(
        cls, texts: Iterable[str], special: Sequence[str] = (EOT,), **normalization: Any
    ) -> 'CharTokenizer':
        """Collect the characters of the texts. Raises UserError if there are none."""
        normalizer = Tokenizer(**normalization)
        chars = {char for text in texts for char in set(normalizer.normalize(text))}
        if not chars:
            raise UserError('no text to learn characters from')
        return cls(''.join(sorted(chars)), special, **normalization)

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = []
        for text in texts:
            ids = self._ids[np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')]
            if len(ids) and ids.min() < 0:
                at = int(np.argmin(ids))
                line, column = text.count('\n', 0, at) + 1, at - text.rfind('\n', 0, at)
                raise UserError(
                    f'character {text[at]!r} (U+{ord(text[at]):04X}) at line {line}, column '
                    f'{column} is not among the {len(self.chars)} that this tokenizer knows: '
                    'leave it out, or prepare the data with it'
                )
            encoded.append(ids)
        return encoded

    def _hf_engine(self) -> Any:
        # an unknown character is an error if UNK is not a token, as here
        vocab = {token: i for i, token in enumerate([*self.chars, *self.special])}
        engine = Engine(models.WordLevel(vocab, unk_token=UNK))
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        engine.decoder = decoders.Fuse()
        engine.add_special_tokens([AddedToken(s, normalized=False) for s in self.special])
        return engine


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding by the `tokenizers` library; any text round-trips exactly.

    It is trained on your corpus, or read from a Hugging Face tokenizer.json, whose token for the
    end of a document, `eot`, may have another name than ours.
    """

    kind = 'bpe'

    def __init__(self, model: str, eot: str = EOT, **normalization: Any):
        super().__init__(**normalization)
        self._engine = Engine.from_str(model)
        self._engine.encode_special_tokens = True  # '<|endoftext|>' in a song is plain text
        self._eot_name, self.eot = eot, self._engine.token_to_id(eot)
        # added tokens are plain text, the others are bytes in GPT-2's printable spelling
        added = {token.content for token in self._engine.get_added_tokens_decoder().values()}
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        vocab = self._engine.get_vocab()
        self.vocab_size = max(vocab.values()) + 1  # other projects' may leave ids out
        self._bytes = [b''] * self.vocab_size
        for token, index in vocab.items():
            if token in added:
                self._bytes[index] = token.encode()
            elif byte_of.keys() >= set(token):
                self._bytes[index] = bytes(byte_of[c] for c in token)
            else:
                raise UserError(
                    f'its token {token!r} is not made of bytes; only byte-level BPE is read'
                )

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 2048, **normalization: Any
    ) -> 'BPETokenizer':
        """Learn `vocab_size` tokens from the texts: 256 bytes, the document end, and merges.

        There are fewer if the corpus is too small. Raises UserError for a size out of range.
        """
        if not 257 <= vocab_size <= 65536:
            raise UserError(
                f'vocab_size={vocab_size}: expected 257 (the 256 bytes and the document end) '
                'to 65536 (ids are stored in 16 bits)'
            )
        engine, trainer_class = cls._untrained()
        trainer = trainer_class(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            min_frequency=2,
            show_progress=sys.stderr.isatty(),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        normalizer = Tokenizer(**normalization)
        engine.train_from_iterator(map(normalizer.normalize, texts), trainer)
        return cls(engine.to_str(), EOT, **normalization)

    @classmethod
    def _untrained(cls) -> tuple[Any, Callable[..., Any]]:
        """The library's tokenizer before it has learned anything, and the class of its trainer."""
        return byte_level(models.BPE()), trainers.BpeTrainer

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _hf_engine(self) -> Any:
        return Engine.from_str(self._engine.to_str())

    def state(self) -> dict[str, Any]:
        """The whole tokenizer as values for JSON."""
        state = super().state() | {'model': json.loads(self._engine.to_str())}
        if self._eot_name != EOT:
            state['eot'] = self._eot_name
        return state


class WordPieceTokenizer(BPETokenizer):
    """WordPiece over bytes: of each word the longest token it starts with, then of the rest.

    BPE joins a word's bytes in the order in which the merges were learned; here only the resulting
    tokens count (Schuster and Nakajima, "Japanese and Korean Voice Search", 2012; Devlin et al.,
    "BERT", 2019). Any text round-trips exactly, which it does not in BERT. So, unlike BERT's, this
    one has no ## before the continuation of a word (a space before the word marks its start, as in
    GPT-2's BPE), no [UNK], and no limit of 100 characters per word: a longer run of bytes is cut.
    The library chooses the tokens by the frequency of pairs, not by the likelihood of the 2012
    paper.
    """

    kind = 'wordpiece'
    longest = 100  # bytes; finding the longest token takes the square of it

    def __init__(self, model: str, eot: str = EOT, **normalization: bool):
        state = json.loads(model)
        ours = json.loads(self._untrained()[0].to_str())
        ours['model']['vocab'] = state['model']['vocab']
        parts = ('model', 'pre_tokenizer', 'normalizer', 'decoder')
        if any(state.get(part) != ours[part] for part in parts):
            raise UserError(
                'its WordPiece is not the byte-level one that is trained here '
                "(BERT's loses blanks and unknown characters)"
            )
        super().__init__(model, eot, **normalization)
        missing = set(bytes_to_unicode().values()) - set(state['model']['vocab'])
        if missing:
            raise UserError(f'its vocabulary lacks {len(missing)} of the 256 bytes')

    @classmethod
    def _untrained(cls) -> tuple[Any, Callable[..., Any]]:
        engine = byte_level(
            models.WordPiece(
                unk_token=UNK, continuing_subword_prefix='', max_input_chars_per_word=cls.longest
            )
        )
        cut = pre_tokenizers.Split(Regex(f'.{{1,{cls.longest}}}'), 'isolated')
        engine.pre_tokenizer = pre_tokenizers.Sequence([engine.pre_tokenizer, cut])
        return engine, functools.partial(trainers.WordPieceTrainer, continuing_subword_prefix='')


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens, by tiktoken, which downloads two files once.

    TIKTOKEN_CACHE_DIR says where it keeps them.
    """

    kind = 'gpt2'
    vocab_size, eot = 50257, 50256

    @functools.cached_property
    def _engine(self) -> Any:
        import requests
        import tiktoken

        try:
            return tiktoken.get_encoding('gpt2')
        except (requests.RequestException, OSError) as error:
            raise UserError(
                f"GPT-2's tokenizer files are not available ({type(error).__name__}): connect "
                'once, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored them'
            ) from None

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._engine.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def _token_bytes(self, token: int) -> bytes:
        return self._engine.decode_single_token_bytes(token)

    def fingerprint(self) -> str:
        """What the base class would compute; a constant, so it needs no files."""
        return '35e8dd34a8c31284992f25ec5b1a25869cb03d8c5498c72ca14a501c2c3f794a'

    def _hf_engine(self) -> Any:
        """Recover the merges, which tiktoken does not keep, from the order of the tokens.

        A token was merged from the two parts that the merges before it make of its bytes.
        """
        rank = {self._token_bytes(i): i for i in range(self.eot)}
        printed = bytes_to_unicode()
        text = {token: ''.join(printed[b] for b in token) for token in rank}
        merges = []
        for token in rank:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                ranks = [rank.get(a + b, self.eot) for a, b in itertools.pairwise(parts)]
                i = ranks.index(min(ranks))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append((text[parts[0]], text[parts[1]]))
        vocab = {text[token]: i for token, i in rank.items()} | {EOT: self.eot}
        engine = byte_level(models.BPE(vocab, merges))
        engine.add_special_tokens([AddedToken(EOT, normalized=False)])
        return engine


BYTE_LEVEL = {'bpe': BPETokenizer, 'wordpiece': WordPieceTokenizer}


def choose_tokenizer(
    name: str, texts: Iterable[str], vocab_size: int = 2048, **normalization: Any
) -> Tokenizer:
    """A bpe, wordpiece or char tokenizer trained on `texts`, else the one that `load` reads.

    Raises UserError if a file brings its own normalization.
    """
    if name == 'char':
        return CharTokenizer.train(texts, **normalization)
    if name in BYTE_LEVEL:
        return BYTE_LEVEL[name].train(texts, vocab_size, **normalization)
    if name == 'gpt2':
        return GPT2Tokenizer(**normalization)
    if any(normalization.values()):
        raise UserError(
            f'tokenizer={name} brings its own normalization: leave lowercase and squeeze out'
        )
    return load(name)


# -----------------------------------------------------------------------------
# Files of ours


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `state()` described. Raises UserError if it describes none."""
    normalization = {name: bool(state.get(name)) for name in ('lowercase', 'squeeze')}
    try:
        kind = state['kind']
        if kind == 'char':
            return CharTokenizer(state['chars'], state['special'], **normalization)
        if kind in BYTE_LEVEL:
            model = json.dumps(state['model'])
            return BYTE_LEVEL[kind](model, state.get('eot', EOT), **normalization)
        if kind == 'gpt2':
            return GPT2Tokenizer(**normalization)
    except UserError:
        raise
    except Exception as error:  # the library behind a kind raises plain Exceptions
        raise UserError(
            f'this tokenizer description is damaged ({type(error).__name__}: {str(error)[:80]})'
        ) from None
    raise UserError(f'unknown tokenizer kind {kind!r}: expected bpe, wordpiece, char or gpt2')


def load(path: str) -> Tokenizer:
    """The tokenizer in a file: of `save`, a dataset's meta.json, or a Hugging Face tokenizer.

    The last is a tokenizer.json, or a vocab.json beside its merges.txt. The path gpt2 means GPT-2's
    tokenizer. Raises UserError.
    """
    if path == 'gpt2':
        return GPT2Tokenizer()
    try:
        state = _read_json(path)
        older = os.path.basename(path) == 'vocab.json'
        if not older and ('kind' in state or 'tokenizer' in state or 'model' not in state):
            return from_state(state.get('tokenizer', state))
        beside: dict[str, Any] = {}
        for name in 'special_tokens_map.json', 'tokenizer_config.json':
            file = os.path.join(os.path.dirname(path), name)
            if os.path.exists(file):
                beside |= _read_json(file)
        eot = beside.get('eos_token')
        if isinstance(eot, dict):
            eot = eot.get('content')
        if older:
            state = from_vocab(path, eot or EOT, bool(beside.get('add_prefix_space')))
        return from_hf(state, eot or EOT)
    except FileNotFoundError:
        raise UserError(
            f'{path}: no such file; '
            f'`python -m lyregpt tokenizer train FILE… --out={path}` makes one'
        ) from None
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except Exception as error:  # a damaged file may fail in the JSON or deep in the library
        raise UserError(
            f'{path}: not a tokenizer file ({type(error).__name__}: {str(error)[:80]})'
        ) from None


def _read_json(path: str) -> Any:
    with open(path, encoding='utf-8') as f:
        return json.load(f)


# -----------------------------------------------------------------------------
# Files of Hugging Face's


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character of each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_level(model: Any, add_prefix_space: bool = False) -> Any:
    """A tokenizer of the `tokenizers` library that splits words as GPT-2 does, over bytes."""
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    engine.decoder = decoders.ByteLevel()
    return engine


def hf_normalizer(lowercase: bool, squeeze: bool) -> Any:
    """`Tokenizer.normalize` for the `tokenizers` library, with Oniguruma's regular expressions."""
    # The two engines' \s differ; no blank is above U+3000.
    blanks = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and c != '\n')
    cased, between = r'[\p{Cased}&&\P{Case_Ignorable}]', r'\p{Case_Ignorable}*'
    replacements = []
    if squeeze:
        replacements += [
            ('\r\n?', '\n'),
            (f'[{blanks}]+', ' '),
            (' ?\n ?', '\n'),
            ('\n{3,}', '\n\n'),
            (r'\A +| +\z', ''),
        ]
    if lowercase:  # Python, unlike the library, lowers a final sigma to its own form
        replacements.append((f'{cased}{between}\\KΣ(?!{between}{cased})', 'ς'))
    steps: list[Any] = [normalizers.Replace(Regex(old), new) for old, new in replacements]
    if lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps)


def from_hf(state: dict[str, Any], eot: str = EOT) -> Tokenizer:
    """The tokenizer of a tokenizer.json: byte-level BPE, or our WordPiece and characters.

    `eot` is its document end if it has no <|endoftext|>. Raises UserError for another kind, and the
    library's errors for a damaged one.
    """
    engine = state | {'post_processor': None, 'truncation': None, 'padding': None}
    normalization: dict[str, bool] = {}
    for lowercase, squeeze in (True, False), (False, True), (True, True):
        if state.get('normalizer') == json.loads(hf_normalizer(lowercase, squeeze).__getstate__()):
            engine['normalizer'] = None
            normalization = {'lowercase': lowercase, 'squeeze': squeeze}
    added = [token['content'] for token in sorted(state['added_tokens'], key=lambda t: t['id'])]
    vocab: dict[str, int] = state['model']['vocab']
    kind = state['model'].get('type', 'BPE')
    if kind.lower() in BYTE_LEVEL:
        name = EOT if EOT in vocab or EOT in added else eot
        return BYTE_LEVEL[kind.lower()](json.dumps(engine), name, **normalization)
    if kind == 'WordLevel':
        chars = sorted(vocab, key=lambda token: vocab[token])[: len(vocab) - len(added)]
        found = CharTokenizer(''.join(chars), added, **normalization)
        theirs = found.to_hf()
        parts = ('model', 'pre_tokenizer', 'normalizer')
        if all(theirs[part] == state.get(part) for part in parts):
            return found
    raise UserError(
        f'a {kind} tokenizer: expected byte-level BPE, or WordPiece or characters as '
        'lyregpt/export.py writes them'
    )


def from_vocab(path: str, eot: str, add_prefix_space: bool = False) -> dict[str, Any]:
    """The tokenizer.json of GPT-2's older two files, vocab.json and merges.txt beside it."""
    merges = os.path.join(os.path.dirname(path), 'merges.txt')
    engine = byte_level(models.BPE.from_file(path, merges), add_prefix_space)
    if engine.token_to_id(eot) is not None:
        engine.add_special_tokens([AddedToken(eot, normalized=False)])
    return json.loads(engine.to_str())


def file_of_pretrained(source: str) -> str:
    """The file that holds the tokenizer of a Hugging Face folder; '' if there is none."""
    new, old, merges = (
        os.path.join(source, name) for name in ('tokenizer.json', 'vocab.json', 'merges.txt')
    )
    if os.path.exists(new):
        return new
    # one of the two older files is enough here: reading them says that the other is missing
    return old if os.path.exists(old) or os.path.exists(merges) else ''


def of_pretrained(source: str) -> Tokenizer:
    """The tokenizer of a Hugging Face model: of a folder, or of one of GPT-2's names.

    A folder without one has GPT-2's. Raises UserError if it is damaged or cannot be the model's.
    """
    if not os.path.isdir(source):
        return GPT2Tokenizer()
    path = os.path.join(source, 'config.json')
    try:
        size = int(_read_json(path)['vocab_size'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: not the description of a model ({type(error).__name__}: {error})'
        ) from None
    path = file_of_pretrained(source)
    if not path and not GPT2Tokenizer.vocab_size <= size <= 50304:  # nanoGPT pads it
        raise UserError(
            f'{os.path.join(source, "tokenizer.json")}: no such file, and {size} tokens are not '
            "GPT-2's; add the tokenizer of this model"
        )
    tokenizer = load(path or 'gpt2')
    if tokenizer.vocab_size > size:
        raise UserError(
            f'{path}: has {tokenizer.vocab_size} tokens, but the model beside it {size}: '
            'it belongs to another'
        )
    return tokenizer


# -----------------------------------------------------------------------------
# The command


def read_lines(paths: Sequence[str]) -> Iterator[str]:
    """The lines of UTF-8 text files, with their ends. Raises UserError if one cannot be read."""
    for path in paths:
        try:
            with open(path, encoding='utf-8', newline='') as f:
                yield from f
        except UnicodeDecodeError:
            raise UserError(
                f'{path}: not UTF-8 text; data/text/prepare.py detects other encodings'
            ) from None


def main() -> None:
    """Train, encode or decode, as the command line says."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0], description='Train a tokenizer, or use one from the shell.'
    )
    commands = parser.add_subparsers(dest='command', required=True)
    train = commands.add_parser(
        'train',
        help='learn a tokenizer from text files',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train_options: dict[str, dict[str, Any]] = {
        'files': {'nargs': '+', 'metavar': 'FILE'},
        '--kind': {'choices': ('bpe', 'wordpiece', 'char'), 'default': 'bpe'},
        '--vocab_size': {'type': int, 'default': 2048, 'help': 'number of tokens, not for char'},
        '--lowercase': {'action': 'store_true', 'help': 'turn all text to lower case first'},
        '--squeeze': {'action': 'store_true', 'help': 'squeeze blanks and empty lines first'},
        '--out': {'default': 'tokenizer.json', 'help': 'the file to write'},
    }
    for name, settings in train_options.items():
        train.add_argument(name, **settings)
    for name, what in ('encode', 'text'), ('decode', 'ids'):
        command = commands.add_parser(name, help=f'{name} {what} from the arguments or stdin')
        command.add_argument(
            '--tokenizer', default='tokenizer.json', help='a tokenizer file, a meta.json, or gpt2'
        )
        command.add_argument('words', nargs='*', metavar=what.upper())
    args = parser.parse_args()
    if args.command == 'train':
        tokenizer = choose_tokenizer(
            args.kind,
            read_lines(args.files),
            args.vocab_size,
            lowercase=args.lowercase,
            squeeze=args.squeeze,
        )
        tokenizer.save(args.out)
        print(f'wrote {args.out}: {tokenizer.kind}, {tokenizer.vocab_size} tokens')
        return
    tokenizer = load(args.tokenizer)
    text = ' '.join(args.words) if args.words else sys.stdin.read()
    if args.command == 'encode':
        print(*tokenizer.encode(text))
    else:
        for word in text.split():
            if not word.isdigit():
                raise UserError(f'{word!r} is not a token id: expected whole numbers')
        sys.stdout.write(tokenizer.decode(map(int, text.split())))
