"""Text ⇄ token ids: characters, byte-level BPE or WordPiece trained on your corpus, or GPT-2's BPE, behind one interface.

    python -m lyregpt tokenizer train songs.txt more.txt --vocab_size=2048 --out=tokenizer.json
    python -m lyregpt tokenizer encode --tokenizer=tokenizer.json "Hail the rain"      (or text on stdin)
    python -m lyregpt tokenizer decode --tokenizer=tokenizer.json 523 17 902           (or ids on stdin)

A tokenizer is plain JSON (`state()`): the dataset's meta.json and the checkpoint both hold it, so a model never meets
the wrong one. `--tokenizer=gpt2` needs no file of ours. `to_hf()` and `load` speak Hugging Face's tokenizer.json too.
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

from configurator import UserError, run

EOT = '<|endoftext|>'  # stands after every document; GPT-2's spelling
UNK = '<|unk|>'


class Tokenizer:
    """What the kinds share. `vocab_size` counts special tokens; `eot`, `bos`, `pad` and `unk` are ids or None."""

    kind: str
    vocab_size: int
    eot: int | None = None  # document end
    bos: int | None = None  # document begin: these kinds use `eot` for it, as GPT-2 does
    pad: int | None = (
        None  # none of these kinds pads: batches are cut from one stream, prompts are masked
    )
    unk: int | None = None  # only a character tokenizer can meet something unknown

    def __init__(self, lowercase: bool = False, squeeze: bool = False):
        self.lowercase, self.squeeze = lowercase, squeeze

    def normalize(self, text: str) -> str:
        """The text as it is encoded: as it is, or in lower case, or with runs of blanks and empty lines squeezed."""
        if self.squeeze:
            text = re.sub(r'[^\S\n]+', ' ', text.replace('\r\n', '\n').replace('\r', '\n'))
            text = re.sub(r'\n{3,}', '\n\n', re.sub(r' ?\n ?', '\n', text)).strip(' ')
        if not text.isascii() and re.search(
            '[\ud800-\udfff]', text
        ):  # half a character, from broken input: U+FFFD
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        return text.lower() if self.lowercase else text

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens written out in it are plain text. Raises UserError for an unknown character."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int array per text, on all cores where the kind's library can."""
        return self._encode_batch([self.normalize(t) for t in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary."""
        return b''.join(map(self.token_bytes, ids)).decode('utf-8', errors='replace')

    def stream_decoder(self) -> Callable[[int | None], str]:
        """A function to feed ids one by one; it gives out text as soon as a character is whole. None at the end gives what is left of one."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda token: (
            utf8.decode(b'', final=True) if token is None else utf8.decode(self.token_bytes(token))
        )

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for (a byte-level token may be part of a character).

        Raises UserError for an id outside the vocabulary.
        """
        if not 0 <= int(token) < self.vocab_size:
            raise UserError(
                f'token id {int(token)} is outside the vocabulary (0 to {self.vocab_size - 1}): another tokenizer made it'
            )
        return self._token_bytes(int(token))

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON-able values; `from_state` is the way back."""
        return {
            'kind': self.kind,
            'vocab_size': self.vocab_size,
            'lowercase': self.lowercase,
            'squeeze': self.squeeze,
            **self._state(),
        }

    def fingerprint(self) -> str:
        """The same for two tokenizers if every id means the same text to both."""
        return hashlib.sha256(
            b''.join(
                f'{len(t)} '.encode() + t for t in map(self._token_bytes, range(self.vocab_size))
            )
        ).hexdigest()

    def to_hf(self) -> dict[str, Any]:
        """The same tokenizer as Hugging Face's tokenizer.json. Its special tokens put `eot` before a text, where a document begins."""
        from tokenizers import processors

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
        """Write `state()` as JSON, whole or not at all."""
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(self.state(), f, ensure_ascii=False)
        os.replace(path + '.tmp', path)

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _token_bytes(self, token: int) -> bytes:
        raise NotImplementedError

    def _hf_engine(self) -> Any:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        return {}


class CharTokenizer(Tokenizer):
    """One id per character, in code point order, as nanoGPT numbers them; then the special tokens."""

    kind = 'char'

    def __init__(self, chars: str, special: Sequence[str] = (EOT,), **normalization: Any):
        super().__init__(**normalization)
        self.chars, self.special = chars, list(special)
        self.vocab_size = len(chars) + len(self.special)
        self.eot, self.unk = (
            len(chars) + self.special.index(s) if s in self.special else None for s in (EOT, UNK)
        )
        self._bytes = [c.encode('utf-8', 'surrogatepass') for c in chars] + [
            s.encode() for s in self.special
        ]
        self._ids = np.full(0x110000, -1 if self.unk is None else self.unk, dtype=np.int32)
        self._ids[[ord(c) for c in chars]] = np.arange(len(chars))

    @classmethod
    def train(
        cls, texts: Iterable[str], special: Sequence[str] = (EOT,), **normalization: Any
    ) -> 'CharTokenizer':
        """Learn the set of characters from the texts (streamed: memory does not grow with them). Raises UserError if there are none."""
        normalizer, seen = Tokenizer(**normalization), set[str]()
        for text in texts:
            seen.update(normalizer.normalize(text))
        if not seen:
            raise UserError('no text to learn characters from')
        return cls(''.join(sorted(seen)), special, **normalization)

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        out = []
        for text in texts:
            ids = self._ids[np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')]
            if len(ids) and ids.min() < 0:
                at = int(np.argmin(ids))
                line = text.count('\n', 0, at) + 1
                raise UserError(
                    f'character {text[at]!r} (U+{ord(text[at]):04X}) at line {line}, column {at - text.rfind(chr(10), 0, at)} '
                    f'is not among the {len(self.chars)} that this tokenizer knows: leave it out, or prepare the data with it'
                )
            out.append(ids)
        return out

    def _token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def _hf_engine(self) -> Any:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Engine

        # an unknown character is an error if UNK is no token, as here
        engine = Engine(
            models.WordLevel(
                {s: i for i, s in enumerate([*self.chars, *self.special])}, unk_token=UNK
            )
        )
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        engine.decoder = decoders.Fuse()
        engine.add_special_tokens([AddedToken(s, normalized=False) for s in self.special])
        return engine

    def _state(self) -> dict[str, Any]:
        return {'chars': self.chars, 'special': self.special}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding trained on your own corpus, by the `tokenizers` library; any text round-trips exactly.

    Also a foreign one from a Hugging Face tokenizer.json, whose document end may have another name than ours, `eot`.
    """

    kind = 'bpe'

    def __init__(self, model: str, eot: str = EOT, **normalization: Any):
        super().__init__(**normalization)
        from tokenizers import Tokenizer as Engine

        self._engine = Engine.from_str(model)
        self._engine.encode_special_tokens = (
            True  # '<|endoftext|>' written in a song is text, not the song's end
        )
        self._eot_name, self.eot = eot, self._engine.token_to_id(eot)
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        added = {
            token.content for token in self._engine.get_added_tokens_decoder().values()
        }  # plain text, not bytes in disguise
        vocab = self._engine.get_vocab()
        self.vocab_size = max(vocab.values()) + 1  # foreign ones may leave ids out
        self._bytes = [b''] * self.vocab_size
        for token, index in vocab.items():
            if token not in added and not all(c in byte_of for c in token):
                raise UserError(
                    f'its token {token!r} is not made of bytes; only byte-level BPE is read'
                )
            self._bytes[index] = (
                token.encode() if token in added else bytes(byte_of[c] for c in token)
            )

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 2048, **normalization: Any
    ) -> 'BPETokenizer':
        """Learn merges from the texts until there are `vocab_size` tokens: 256 bytes, the document end, the merges.

        Fewer if the corpus is too small for more. Raises UserError below 257 and above 65,536 (ids are stored in 16 bits).
        """
        if not 257 <= vocab_size <= 65536:
            raise UserError(
                f'vocab_size={vocab_size}: expected 257 (the 256 bytes and the document end) to 65536 (ids are stored in 16 bits)'
            )
        from tokenizers import pre_tokenizers

        engine, trainer_of_kind = cls._untrained()
        trainer = trainer_of_kind(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            min_frequency=2,
            show_progress=sys.stderr.isatty(),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        normalizer = Tokenizer(**normalization)
        engine.train_from_iterator((normalizer.normalize(t) for t in texts), trainer)
        return cls(engine.to_str(), EOT, **normalization)

    @classmethod
    def _untrained(cls) -> tuple[Any, Callable[..., Any]]:
        """The library's tokenizer before it has learned anything, and its trainer."""
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers, trainers

        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        return engine, trainers.BpeTrainer

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(e.ids, dtype=np.int32)
            for e in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def _token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def _hf_engine(self) -> Any:
        from tokenizers import Tokenizer as Engine

        return Engine.from_str(self._engine.to_str())

    def _state(self) -> dict[str, Any]:
        return {'model': json.loads(self._engine.to_str())} | (
            {} if self._eot_name == EOT else {'eot': self._eot_name}
        )


class WordPieceTokenizer(BPETokenizer):
    """WordPiece over bytes, by the `tokenizers` library: of each word the longest token that begins it, then of the rest, and so on.

    BPE joins a word's bytes in the order in which the merges were learned; here the merges are forgotten, only their results count
    (Schuster and Nakajima, "Japanese and Korean Voice Search", 2012; Devlin et al., "BERT", 2019). Any text round-trips exactly, which BERT's
    does not: that one drops blanks, splits off punctuation, and has [UNK] for what it does not know. So three things of BERT's are not here:
    the ## before a piece that continues a word (a space before the word marks its begin, as in GPT-2's BPE, and a piece is one token wherever
    it stands), the [UNK], and its limit of 100 characters a word, behind which a longer run of bytes is cut here. The pieces are chosen as the
    library does, by how frequent a pair is, and not by the likelihood of the 2012 paper.
    """

    kind = 'wordpiece'
    longest = 100  # bytes: to look for the longest token takes the square of it

    def __init__(self, model: str, eot: str = EOT, **normalization: bool):
        state, ours = json.loads(model), json.loads(self._untrained()[0].to_str())
        if {**state['model'], 'vocab': {}} != ours['model'] or any(
            state.get(k) != ours[k] for k in ('pre_tokenizer', 'normalizer', 'decoder')
        ):
            raise UserError(
                "its WordPiece is not the byte-level one that is trained here (BERT's loses blanks and unknown characters)"
            )
        super().__init__(model, eot, **normalization)
        if missing := set(bytes_to_unicode().values()) - set(state['model']['vocab']):
            raise UserError(f'its vocabulary lacks {len(missing)} of the 256 bytes')

    @classmethod
    def _untrained(cls) -> tuple[Any, Callable[..., Any]]:
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Engine

        engine = Engine(
            models.WordPiece(
                unk_token=UNK, continuing_subword_prefix='', max_input_chars_per_word=cls.longest
            )
        )
        cut = pre_tokenizers.Split(Regex(f'.{{1,{cls.longest}}}'), 'isolated')
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.ByteLevel(add_prefix_space=False), cut]
        )
        engine.decoder = decoders.ByteLevel()
        return engine, functools.partial(trainers.WordPieceTrainer, continuing_subword_prefix='')


class GPT2Tokenizer(Tokenizer):
    """GPT-2's 50,257 tokens, by tiktoken, which downloads two files once (TIKTOKEN_CACHE_DIR says where it keeps them)."""

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
                f"GPT-2's tokenizer files could not be had ({type(error).__name__}): connect once, or point "
                'TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored them'
            ) from None

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(ids, dtype=np.int32)
            for ids in self._engine.encode_ordinary_batch(
                list(texts), num_threads=os.cpu_count() or 1
            )
        ]

    def _token_bytes(self, token: int) -> bytes:
        return self._engine.decode_single_token_bytes(token)

    def fingerprint(self) -> str:
        """What the base class would compute, known, so that its files need not be at hand."""
        return '35e8dd34a8c31284992f25ec5b1a25869cb03d8c5498c72ca14a501c2c3f794a'

    def _hf_engine(self) -> Any:
        """tiktoken keeps no merges, but the order in which they were learned: a token's is that of the two parts to which the earlier ones bring it."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Engine

        rank = {self._token_bytes(i): i for i in range(self.eot)}
        printed = bytes_to_unicode()
        text = {token: ''.join(printed[b] for b in token) for token in rank}
        merges = []
        for token in rank:
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:
                _, i = min(
                    (rank.get(a + b, self.eot), i)
                    for i, (a, b) in enumerate(itertools.pairwise(parts))
                )
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append((text[parts[0]], text[parts[1]]))
        engine = Engine(
            models.BPE({text[token]: i for token, i in rank.items()} | {EOT: self.eot}, merges)
        )
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens([AddedToken(EOT, normalized=False)])
        return engine


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where that is printable, else the next free one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def hf_normalizer(lowercase: bool, squeeze: bool) -> Any:
    """`Tokenizer.normalize` in the `tokenizers` library's terms; its regular expressions are Oniguruma's."""
    from tokenizers import Regex, normalizers

    blanks = ''.join(
        c for c in map(chr, range(0x3001)) if c.isspace() and c != '\n'
    )  # the engines' \s differ; none is higher
    steps: list[Any] = []
    if squeeze:
        for pattern, text in (
            ('\r\n?', '\n'),
            (f'[{blanks}]+', ' '),
            (' ?\n ?', '\n'),
            ('\n{3,}', '\n\n'),
            (r'\A +| +\z', ''),
        ):
            steps.append(normalizers.Replace(Regex(pattern), text))
    if lowercase:  # Python lowers a Greek word's last sigma to its final form, the library does not
        cased, between = r'[\p{Cased}&&\P{Case_Ignorable}]', r'\p{Case_Ignorable}*'
        steps.append(normalizers.Replace(Regex(f'{cased}{between}\\KΣ(?!{between}{cased})'), 'ς'))
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps)


def from_hf(state: dict[str, Any], eot: str = EOT) -> Tokenizer:
    """The tokenizer of a Hugging Face tokenizer.json: byte-level BPE, or WordPiece and characters as `to_hf` writes them.

    `eot` is its document end if it has no <|endoftext|>. Raises UserError for another kind, or the library's errors for a damaged one.
    """
    engine = state | {'post_processor': None, 'truncation': None, 'padding': None}
    normalization: dict[str, bool] = {}
    for lowercase, squeeze in (True, False), (False, True), (True, True):
        if state.get('normalizer') == json.loads(hf_normalizer(lowercase, squeeze).__getstate__()):
            engine['normalizer'], normalization = None, {'lowercase': lowercase, 'squeeze': squeeze}
    added = sorted((token['id'], token['content']) for token in state['added_tokens'])
    vocab: dict[str, int] = state['model']['vocab']
    name = EOT if EOT in vocab or EOT in [content for _, content in added] else eot
    if state['model'].get('type', 'BPE') == 'BPE':
        return BPETokenizer(json.dumps(engine), name, **normalization)
    if state['model']['type'] == 'WordPiece':
        return WordPieceTokenizer(json.dumps(engine), name, **normalization)
    if state['model']['type'] == 'WordLevel':
        symbols = sorted(vocab, key=lambda s: vocab[s])
        found = CharTokenizer(
            ''.join(symbols[: len(symbols) - len(added)]),
            [content for _, content in added],
            **normalization,
        )
        theirs = found.to_hf()
        if all(
            theirs[part] == state.get(part) for part in ('model', 'pre_tokenizer', 'normalizer')
        ):
            return found
    raise UserError(
        f'a {state["model"]["type"]} tokenizer: expected byte-level BPE, or WordPiece or characters as lyregpt/export.py writes them'
    )


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `state()` described. Raises UserError if it describes none."""
    normalization = {k: bool(state.get(k)) for k in ('lowercase', 'squeeze')}
    try:
        if state['kind'] == 'char':
            return CharTokenizer(state['chars'], state['special'], **normalization)
        for kind in BPETokenizer, WordPieceTokenizer:
            if state['kind'] == kind.kind:
                return kind(json.dumps(state['model']), state.get('eot', EOT), **normalization)
        if state['kind'] == 'gpt2':
            return GPT2Tokenizer(**normalization)
    except KeyError as error:
        raise UserError(f'this tokenizer description lacks {error}') from None
    except UserError:
        raise
    except Exception as error:  # the library behind a kind raises plain Exceptions
        raise UserError(
            f'this tokenizer description is damaged ({type(error).__name__}: {str(error)[:80]})'
        ) from None
    raise UserError(
        f'unknown tokenizer kind {state["kind"]!r}: expected bpe, wordpiece, char or gpt2'
    )


def load(path: str) -> Tokenizer:
    """Read a tokenizer that `save` wrote, the one in a dataset's meta.json, or a Hugging Face tokenizer.json, or vocab.json with merges.txt beside it.

    The word gpt2 is enough for GPT-2's. Raises UserError.
    """
    if path == 'gpt2':
        return GPT2Tokenizer()
    try:
        with open(path, encoding='utf-8') as f:
            state = json.load(f)
        older = os.path.basename(path) == 'vocab.json'
        if not older and ('kind' in state or 'tokenizer' in state or 'model' not in state):
            return from_state(state.get('tokenizer', state))
        beside: dict[str, Any] = {}
        for name in 'special_tokens_map.json', 'tokenizer_config.json':
            if os.path.exists(file := os.path.join(os.path.dirname(path), name)):
                with open(file, encoding='utf-8') as f:
                    beside |= json.load(f)
        eos = beside.get('eos_token')
        eos = (eos.get('content') if isinstance(eos, dict) else eos) or EOT
        return from_hf(
            from_vocab(path, eos, bool(beside.get('add_prefix_space'))) if older else state, eos
        )
    except FileNotFoundError:
        raise UserError(
            f'{path}: no such file; `python -m lyregpt tokenizer train FILE… --out={path}` makes one'
        ) from None
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (
        Exception
    ) as error:  # a foreign or damaged file may fail in the JSON or deep in the library
        raise UserError(
            f'{path}: not a tokenizer file ({type(error).__name__}: {str(error)[:80]})'
        ) from None


def from_vocab(path: str, eot: str, add_prefix_space: bool = False) -> dict[str, Any]:
    """The tokenizer.json of GPT-2's older two files: `path` is the vocab.json, merges.txt stands beside it."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(models.BPE.from_file(path, os.path.join(os.path.dirname(path), 'merges.txt')))
    engine.pre_tokenizer, engine.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
        decoders.ByteLevel(),
    )
    if engine.token_to_id(eot) is not None:
        engine.add_special_tokens([AddedToken(eot, normalized=False)])
    return json.loads(engine.to_str())


def file_of_pretrained(source: str) -> str:
    """The file that holds the tokenizer of a Hugging Face folder; '' if there is none."""
    paths = [os.path.join(source, name) for name in ('tokenizer.json', 'vocab.json', 'merges.txt')]
    found = next((p for p in paths if os.path.exists(p)), '')
    return paths[1] if found == paths[2] else found  # one of two: it is missed by name


def of_pretrained(source: str) -> Tokenizer:
    """The tokenizer of a Hugging Face model, a folder or one of GPT-2's names: its tokenizer.json, or vocab.json and merges.txt, else GPT-2's.

    Raises UserError if the folder's is damaged, or cannot be that of its model.
    """
    if not os.path.isdir(source):
        return GPT2Tokenizer()
    path = os.path.join(source, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            size = int(json.load(f)['vocab_size'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: not the description of a model ({type(error).__name__}: {error})'
        ) from None
    path = file_of_pretrained(source)
    if (
        not path and not GPT2Tokenizer.vocab_size <= size <= 50304
    ):  # nanoGPT pads to a multiple of 64
        raise UserError(
            f"{os.path.join(source, 'tokenizer.json')}: no such file, and {size} tokens are not GPT-2's; add the tokenizer of this model"
        )
    tokenizer = load(path) if path else GPT2Tokenizer()
    if tokenizer.vocab_size > size:
        raise UserError(
            f'{path}: has {tokenizer.vocab_size} tokens, but the model beside it {size}: it belongs to another'
        )
    return tokenizer


def train_tokenizer(
    kind: str, texts: Iterable[str], vocab_size: int = 2048, **normalization: bool
) -> Tokenizer:
    """A tokenizer of this kind (bpe, wordpiece or char, which needs no `vocab_size`), trained on the texts. Raises UserError."""
    if kind == 'char':
        return CharTokenizer.train(texts, (EOT,), **normalization)
    return (WordPieceTokenizer if kind == 'wordpiece' else BPETokenizer).train(
        texts, vocab_size, **normalization
    )


def read_lines(paths: Sequence[str]) -> Iterator[str]:
    """The lines of UTF-8 text files, their line ends kept, one at a time. Raises UserError if one cannot be read."""
    for path in paths:
        try:
            with open(path, encoding='utf-8', newline='') as f:
                yield from f
        except OSError as error:
            raise UserError(f'{path}: {error.strerror}') from None
        except UnicodeDecodeError:
            raise UserError(
                f'{path}: not UTF-8 text; data/text/prepare.py detects other encodings'
            ) from None


def main() -> None:
    """train, encode or decode, as the command line says."""
    parser = argparse.ArgumentParser(description='Train a tokenizer, or use one from the shell.')
    commands = parser.add_subparsers(dest='command', required=True)
    train = commands.add_parser('train', help='learn a tokenizer from text files')
    train.add_argument('files', nargs='+', metavar='FILE')
    train.add_argument('--kind', choices=('bpe', 'wordpiece', 'char'), default='bpe')
    train.add_argument(
        '--vocab_size',
        type=int,
        default=2048,
        help='for bpe and wordpiece: how many tokens (default 2048)',
    )
    train.add_argument('--lowercase', action='store_true', help='turn all text to lower case first')
    train.add_argument(
        '--squeeze', action='store_true', help='squeeze runs of blanks and of empty lines first'
    )
    train.add_argument(
        '--out', default='tokenizer.json', help='the file to write (default tokenizer.json)'
    )
    for name, what in ('encode', 'text'), ('decode', 'ids'):
        command = commands.add_parser(name, help=f'{name} {what} from the arguments or stdin')
        command.add_argument(
            '--tokenizer', default='tokenizer.json', help='a tokenizer file, a meta.json, or gpt2'
        )
        command.add_argument('words', nargs='*', metavar=what.upper())
    args = parser.parse_args()
    if args.command == 'train':
        options = {'lowercase': args.lowercase, 'squeeze': args.squeeze}
        texts = read_lines(args.files)
        tokenizer = train_tokenizer(args.kind, texts, args.vocab_size, **options)
        tokenizer.save(args.out)
        print(f'wrote {args.out}: {tokenizer.kind}, {tokenizer.vocab_size} tokens')
    elif args.command == 'encode':
        print(
            *load(args.tokenizer).encode(' '.join(args.words) if args.words else sys.stdin.read())
        )
    else:
        words = args.words or sys.stdin.read().split()
        if bad := [w for w in words if not w.isdigit()]:
            raise UserError(f'{bad[0]!r} is not a token id: expected whole numbers')
        sys.stdout.write(load(args.tokenizer).decode(map(int, words)))


if __name__ == '__main__':
    run(main)
