"""Text ⇄ token ids: characters, a byte-level BPE trained on your corpus, or GPT-2's BPE, behind one interface.

    python tokenizer.py train songs.txt more.txt --vocab_size=2048 --out=tokenizer.json
    python tokenizer.py encode --tokenizer=tokenizer.json "Hail the rain"      (or text on stdin)
    python tokenizer.py decode --tokenizer=tokenizer.json 523 17 902           (or ids on stdin)

A tokenizer is plain JSON (`state()`): the dataset's meta.json and the checkpoint both hold it, so a model never meets
the wrong one. `--tokenizer=gpt2` needs no file of ours.
"""

import argparse
import codecs
import functools
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
    """What the three kinds share. `vocab_size` counts special tokens; `eot`, `bos`, `pad` and `unk` are ids or None."""

    kind: str
    vocab_size: int
    eot: int | None = None  # document end
    bos: int | None = None  # document begin: these kinds use `eot` for it, as GPT-2 does
    pad: int | None = None  # none of these kinds pads: batches are cut from one stream, prompts are masked
    unk: int | None = None  # only a character tokenizer can meet something unknown

    def __init__(self, lowercase: bool = False, squeeze: bool = False):
        self.lowercase, self.squeeze = lowercase, squeeze

    def normalize(self, text: str) -> str:
        """The text as it is encoded: as it is, or in lower case, or with runs of blanks and empty lines squeezed."""
        if self.squeeze:
            text = re.sub(r'[^\S\n]+', ' ', text.replace('\r\n', '\n').replace('\r', '\n'))
            text = re.sub(r'\n{3,}', '\n\n', re.sub(r' ?\n ?', '\n', text)).strip(' ')
        if not text.isascii() and re.search('[\ud800-\udfff]', text):  # half a character, from broken input: U+FFFD
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

    def stream_decoder(self) -> Callable[[int], str]:
        """A function to feed ids one by one; it gives out text as soon as a character is whole."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda token: utf8.decode(self.token_bytes(token))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one id stands for (a byte-level token may be part of a character)."""
        if not 0 <= int(token) < self.vocab_size:
            raise UserError(f'token id {int(token)} is outside the vocabulary (0 to {self.vocab_size - 1}): another tokenizer made it')
        return self._token_bytes(int(token))

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON-able values; `from_state` is the way back."""
        return {'kind': self.kind, 'vocab_size': self.vocab_size, 'lowercase': self.lowercase, 'squeeze': self.squeeze, **self._state()}

    def save(self, path: str) -> None:
        """Write `state()` as JSON, whole or not at all."""
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(self.state(), f, ensure_ascii=False)
        os.replace(path + '.tmp', path)

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _token_bytes(self, token: int) -> bytes:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        return {}


class CharTokenizer(Tokenizer):
    """One id per character, in code point order, as nanoGPT numbers them; then the special tokens."""

    kind = 'char'

    def __init__(self, chars: str, special: Sequence[str] = (EOT,), **normalization: bool):
        super().__init__(**normalization)
        self.chars, self.special = chars, list(special)
        self.vocab_size = len(chars) + len(self.special)
        self.eot, self.unk = (len(chars) + self.special.index(s) if s in self.special else None for s in (EOT, UNK))
        self._bytes = [c.encode('utf-8', 'surrogatepass') for c in chars] + [s.encode() for s in self.special]
        self._ids = np.full(0x110000, -1 if self.unk is None else self.unk, dtype=np.int32)
        self._ids[[ord(c) for c in chars]] = np.arange(len(chars))

    @classmethod
    def train(cls, texts: Iterable[str], special: Sequence[str] = (EOT,), **normalization: bool) -> 'CharTokenizer':
        """Learn the set of characters from the texts (streamed: memory does not grow with them)."""
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

    def _state(self) -> dict[str, Any]:
        return {'chars': self.chars, 'special': self.special}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding trained on your own corpus, by the `tokenizers` library; any text round-trips exactly."""

    kind = 'bpe'

    def __init__(self, model: str, **normalization: bool):
        super().__init__(**normalization)
        from tokenizers import Tokenizer as Engine

        self._engine = Engine.from_str(model)
        self._engine.encode_special_tokens = True  # '<|endoftext|>' written in a song is text, not the song's end
        self.vocab_size = self._engine.get_vocab_size()
        self.eot = self._engine.token_to_id(EOT)
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._bytes = [b''] * self.vocab_size
        for token, index in self._engine.get_vocab().items():
            self._bytes[index] = token.encode() if token == EOT else bytes(byte_of[c] for c in token)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 2048, **normalization: bool) -> 'BPETokenizer':
        """Learn merges from the texts until there are `vocab_size` tokens: 256 bytes, the document end, the merges.

        Fewer if the corpus is too small for more. Raises UserError below 257 and above 65,536 (ids are stored in 16 bits).
        """
        if not 257 <= vocab_size <= 65536:
            raise UserError(
                f'vocab_size={vocab_size}: expected 257 (the 256 bytes and the document end) to 65536 (ids are stored in 16 bits)'
            )
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers, trainers

        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            min_frequency=2,
            show_progress=sys.stderr.isatty(),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        normalizer = Tokenizer(**normalization)
        engine.train_from_iterator((normalizer.normalize(t) for t in texts), trainer)
        return cls(engine.to_str(), **normalization)

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(e.ids, dtype=np.int32) for e in self._engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def _state(self) -> dict[str, Any]:
        return {'model': json.loads(self._engine.to_str())}


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
        return [np.array(ids, dtype=np.int32) for ids in self._engine.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)]

    def _token_bytes(self, token: int) -> bytes:
        return self._engine.decode_single_token_bytes(token)


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where that is printable, else the next free one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `state()` described. Raises UserError if it describes none."""
    normalization = {k: bool(state.get(k)) for k in ('lowercase', 'squeeze')}
    try:
        if state['kind'] == 'char':
            return CharTokenizer(state['chars'], state['special'], **normalization)
        if state['kind'] == 'bpe':
            return BPETokenizer(json.dumps(state['model']), **normalization)
        if state['kind'] == 'gpt2':
            return GPT2Tokenizer(**normalization)
    except KeyError as error:
        raise UserError(f'this tokenizer description lacks {error}') from None
    except UserError:
        raise
    except Exception as error:  # the library behind a kind raises plain Exceptions
        raise UserError(f'this tokenizer description is damaged ({type(error).__name__}: {str(error)[:80]})') from None
    raise UserError(f'unknown tokenizer kind {state["kind"]!r}: expected char, bpe or gpt2')


def load(path: str) -> Tokenizer:
    """Read a tokenizer that `save` wrote, or the one in a dataset's meta.json; the word gpt2 is enough for GPT-2's."""
    if path == 'gpt2':
        return GPT2Tokenizer()
    try:
        with open(path, encoding='utf-8') as f:
            state = json.load(f)
        return from_state(state.get('tokenizer', state))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file; `python tokenizer.py train FILE… --out={path}` makes one') from None
    except UserError:
        raise
    except Exception as error:  # a foreign or damaged file may fail in the JSON or deep in the library
        raise UserError(f'{path}: not a tokenizer file ({type(error).__name__}: {str(error)[:80]})') from None


def read_lines(paths: Sequence[str]) -> Iterator[str]:
    """The lines of UTF-8 text files, their line ends kept, one at a time."""
    for path in paths:
        try:
            with open(path, encoding='utf-8', newline='') as f:
                yield from f
        except OSError as error:
            raise UserError(f'{path}: {error.strerror}') from None
        except UnicodeDecodeError:
            raise UserError(f'{path}: not UTF-8 text; data/text/prepare.py detects other encodings') from None


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a tokenizer, or use one from the shell.')
    commands = parser.add_subparsers(dest='command', required=True)
    train = commands.add_parser('train', help='learn a tokenizer from text files')
    train.add_argument('files', nargs='+', metavar='FILE')
    train.add_argument('--kind', choices=('bpe', 'char'), default='bpe')
    train.add_argument('--vocab_size', type=int, default=2048, help='for bpe: how many tokens (default 2048)')
    train.add_argument('--lowercase', action='store_true', help='turn all text to lower case first')
    train.add_argument('--squeeze', action='store_true', help='squeeze runs of blanks and of empty lines first')
    train.add_argument('--out', default='tokenizer.json', help='the file to write (default tokenizer.json)')
    for name, what in ('encode', 'text'), ('decode', 'ids'):
        command = commands.add_parser(name, help=f'{name} {what} from the arguments or stdin')
        command.add_argument('--tokenizer', default='tokenizer.json', help='a tokenizer file, a meta.json, or gpt2')
        command.add_argument('words', nargs='*', metavar=what.upper())
    args = parser.parse_args()
    if args.command == 'train':
        options = {'lowercase': args.lowercase, 'squeeze': args.squeeze}
        texts = read_lines(args.files)
        tokenizer = CharTokenizer.train(texts, **options) if args.kind == 'char' else BPETokenizer.train(texts, args.vocab_size, **options)
        tokenizer.save(args.out)
        print(f'wrote {args.out}: {tokenizer.kind}, {tokenizer.vocab_size} tokens')
    elif args.command == 'encode':
        print(*load(args.tokenizer).encode(' '.join(args.words) if args.words else sys.stdin.read()))
    else:
        words = args.words or sys.stdin.read().split()
        if bad := [w for w in words if not w.isdigit()]:
            raise UserError(f'{bad[0]!r} is not a token id: expected whole numbers')
        sys.stdout.write(load(args.tokenizer).decode(map(int, words)))


if __name__ == '__main__':
    run(main)
