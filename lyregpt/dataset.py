"""Token files: write `train.bin` and `val.bin` from documents, read batches from them.

A `.bin` file is raw little-endian uint16 token ids, nothing else (nanoGPT's format); shards (`train_000001.bin …`) and the
256-int32 header of llm.c and modded-nanogpt are read too. Vocabularies beyond 65,536 tokens get llm.c's header for uint32 ids.
`meta.json` beside them holds the tokenizer and the counts.

Reading has no state. The batch of step s is a pure function of (seed, s) and the files: each epoch cuts the split into
windows at its own offset and visits every window once, in an order drawn from (seed, epoch) by a keyed permutation that
needs no memory. So a resumed run, or one on more processes, sees the very same windows.
"""

import glob
import json
import os
import pickle
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from configurator import UserError
from lyregpt import ROOT
from lyregpt.text import Piece
from lyregpt.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, from_state, train_tokenizer
from lyregpt.tokenizer import load as load_tokenizer

HEADERS, HEADER_BYTES = (
    {20240520: (1, 2), 20240801: (7, 4)},
    1024,
)  # llm.c's magic numbers, versions, and bytes of an id
U64 = np.uint64


# -----------------------------------------------------------------------------
# Writing


def write_dataset(
    folder: str,
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    total_bytes: int | None = None,
    source: str = '',
    need: tuple[str, ...] = ('train', 'val'),
) -> dict[str, Any]:
    """Tokenize `pieces` into `folder`/{split}.bin and meta.json; returns the meta.

    Streams: memory does not grow with the corpus. The library behind the tokenizer uses all cores. Everything is written
    under temporary names and renamed at the end, the meta last. Raises UserError if a needed split stays empty, or the
    disk is full; the old files are then untouched.
    """
    wide = tokenizer.vocab_size > 65536
    os.makedirs(folder, exist_ok=True)
    splits = {s: {'documents': 0, 'tokens': 0, 'bytes': 0} for s in need}
    files = {s: open(os.path.join(folder, f'{s}.bin.tmp'), 'wb') for s in need}
    if wide:
        for f in files.values():
            f.seek(HEADER_BYTES)
    separator = [] if tokenizer.eot is None else [tokenizer.eot]
    bar = tqdm(
        total=total_bytes, unit='B', unit_scale=True, desc='tokenizing', disable=None, leave=False
    )

    def flush(batch: list[Piece]) -> None:
        for (split, text, ends), ids in zip(batch, tokenizer.encode_batch([p[1] for p in batch])):
            array = np.concatenate([ids, separator if ends else []]).astype(
                '<u4' if wide else '<u2'
            )
            files[split].write(array.tobytes())
            size = len(tokenizer.normalize(text).encode('utf-8', 'surrogatepass'))
            splits[split]['documents'] += ends
            splits[split]['tokens'] += len(array)
            splits[split]['bytes'] += size
            bar.update(size)

    try:
        batch: list[Piece] = []
        waiting = 0
        for piece in pieces:
            batch.append(piece)
            waiting += len(piece[1])
            if waiting > 1 << 22:  # 4M characters: enough to keep every core busy
                flush(batch)
                batch, waiting = [], 0
        flush(batch)
        for split, f in files.items():
            if wide:
                f.seek(0)
                f.write(
                    np.array(
                        [20240801, 7, splits[split]['tokens'] % 2**31] + [0] * 253, dtype='<i4'
                    ).tobytes()
                )
            f.flush()
            os.fsync(f.fileno())
            f.close()
        for split in need:
            if splits[split]['tokens'] < 2:
                raise UserError(
                    f'the {split} split came out empty: too little text in {source or "the input"}, or the share kept for validation is too small or too large'
                )
        meta = {
            'tokenizer': tokenizer.state(),
            'vocab_size': tokenizer.vocab_size,
            'splits': splits,
            'source': source,
            'prepared': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        }
        if isinstance(tokenizer, CharTokenizer):  # nanoGPT's sample.py reads this one
            itos = dict(enumerate([*tokenizer.chars, *tokenizer.special]))
            with open(os.path.join(folder, 'meta.pkl.tmp'), 'wb') as pickled:
                pickle.dump(
                    {
                        'vocab_size': len(itos),
                        'itos': itos,
                        'stoi': {c: i for i, c in itos.items()},
                    },
                    pickled,
                )
        with open(os.path.join(folder, 'meta.json.tmp'), 'w', encoding='utf-8') as described:
            json.dump(meta, described, ensure_ascii=False)
        for name in [f'{s}.bin' for s in need] + ['meta.pkl', 'meta.json']:
            if os.path.exists(os.path.join(folder, f'{name}.tmp')):
                os.replace(os.path.join(folder, f'{name}.tmp'), os.path.join(folder, name))
            elif name == 'meta.pkl' and os.path.exists(os.path.join(folder, name)):
                os.remove(
                    os.path.join(folder, name)
                )  # an older preparation's characters would mislead
    except OSError as error:
        raise UserError(
            f'{error.filename or folder}: {error.strerror}; nothing was changed'
        ) from None
    finally:
        bar.close()
        for f in files.values():
            f.close()
        for name in [f'{s}.bin' for s in need] + ['meta.pkl', 'meta.json']:
            if os.path.exists(left := os.path.join(folder, f'{name}.tmp')):
                os.remove(left)
    print(f'{folder}: {tokenizer.kind} tokenizer, vocabulary {tokenizer.vocab_size:,}')
    for split in need:
        print(
            f'  {split}.bin  {splits[split]["tokens"]:,} tokens from {splits[split]["documents"]:,} documents, {splits[split]["bytes"]:,} bytes of text'
        )
    return meta


# -----------------------------------------------------------------------------
# Reading


def folder_of(dataset: str) -> str:
    """The folder that a `dataset` knob names: the path of one, or a name under data/, here or beside this file."""
    here = os.path.join('data', dataset)
    beside = os.path.join(ROOT, here)
    return next((folder for folder in (dataset, here, beside) if os.path.isdir(folder)), here)


def token_files(folder: str, name: str) -> list[str]:
    """The paths of a split's one file, or of its shards in order. Raises UserError if there is neither."""
    single = os.path.join(folder, f'{name}.bin')
    paths = (
        [single]
        if os.path.exists(single)
        else sorted(glob.glob(os.path.join(glob.escape(folder), f'*{name}_*.bin')))
    )
    if not paths:
        raise UserError(
            f'{single}: no such file; prepare the dataset first: python {os.path.join(folder, "prepare.py")}'
        )
    return paths


class Split:
    """One split of a dataset folder: `n_sequences` windows of `block_size` + 1 tokens each.

    Of numbered shards, those alone whose number modulo `groups` is `group`: other machines may hold the others.
    Raises UserError if there is no such file, or it is empty, of odd size, or (for training) shorter than one window.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        block_size: int,
        vocab_size: int = 65536,
        seed: int = 1337,
        group: int = 0,
        groups: int = 1,
    ):
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        paths = token_files(folder, name)
        if groups > 1:
            numbers = [
                int(n[1]) if (n := re.search(r'_(\d+)\.bin$', path)) else None for path in paths
            ]
            if None in numbers:
                raise UserError(
                    f'{paths[0]}: shard_groups={groups} deals out numbered shards ({name}_000001.bin …), and this is one file'
                )
            paths = [
                path
                for path, number in zip(paths, numbers)
                if number is not None and number % groups == group
            ]
            if not paths:
                raise UserError(
                    f'{folder}: shard_groups={groups}, but no {name} shard whose number leaves {group} when divided by it is here'
                )
        self.shards = [TokenFile(path) for path in paths]
        self.paths, self.n_tokens = paths, sum(map(len, self.shards))
        told = read_meta(folder).get('splits', {}).get(name, {}).get('tokens', self.n_tokens)
        if paths == [os.path.join(folder, f'{name}.bin')] and told != self.n_tokens:
            raise UserError(
                f'{paths[0]}: {self.n_tokens} tokens, but meta.json says {told}: cut off, or of another preparation; prepare it again'
            )
        # A shard whose length is no multiple of block_size has some slack; giving up one window more lets the epochs'
        # offsets take any value below block_size, so that each epoch sees the text cut in other places.
        counts = [
            max((len(s) - 1) // block_size - 1, min((len(s) - 1) // block_size, 1))
            for s in self.shards
        ]
        self.first = np.cumsum([0, *counts])  # window numbers at which the shards begin
        self.n_sequences = int(self.first[-1])
        if self.n_tokens < 2:
            raise UserError(
                f'{paths[0]}: a single token has nothing to predict; prepare the dataset with more text'
            )
        if self.n_sequences == 0 and name == 'train':
            raise UserError(
                f'{paths[0]}: {self.n_tokens} tokens are fewer than one window of block_size + 1 = {block_size + 1}: '
                'use more text or a smaller --block_size'
            )

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `first` … `first + count - 1` of the endless stream of windows: inputs and targets, (count, block_size) int64 each."""
        rows = np.arange(first, first + count)
        window = np.empty(count, dtype=np.int64)
        offset = np.empty(count, dtype=np.int64)
        for epoch in range(first // self.n_sequences, (first + count - 1) // self.n_sequences + 1):
            here = rows // self.n_sequences == epoch
            window[here] = permute(
                rows[here] % self.n_sequences, self.n_sequences, self.seed, epoch
            )
            offset[here] = epoch_offset(self.seed, epoch)
        shard = np.searchsorted(self.first, window, side='right') - 1
        tokens = np.empty((count, self.block_size + 1), dtype=np.int64)
        for i in range(count):
            data = self.shards[shard[i]]
            slack = min(
                self.block_size,
                len(data) - int(self.first[shard[i] + 1] - self.first[shard[i]]) * self.block_size,
            )
            start = int(window[i] - self.first[shard[i]]) * self.block_size + int(offset[i]) % slack
            tokens[i] = data.read(start, self.block_size + 1)
        self.check_ids(tokens)
        return tokens[:, :-1], tokens[:, 1:]

    def eval_sequences(self, limit: int | None = None) -> int:
        """How many windows evaluation reads: the whole split, or `limit` of them."""
        whole = int(self._eval_first()[-1])
        return whole if limit is None else min(limit, whole)

    def _eval_first(self) -> np.ndarray:
        return np.cumsum([0, *(-(-(len(s) - 1) // self.block_size) for s in self.shards)])

    def eval_batches(
        self, batch_size: int, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The split from end to end in fixed windows, (≤ batch_size, block_size) a batch; targets past the end are -1.

        With `limit`, that many windows evenly spread over the split, the same ones every time. Ranks take every
        world_size-th window, so that together they read each one once; where they do not come out even, some get one
        without any target, so that all have as many batches.
        """
        first = self._eval_first()
        n = self.eval_sequences(limit)
        places = np.arange(rank, -(-n // world_size) * world_size, world_size)
        chosen = np.where(places < n, places * first[-1] // n, -1)
        for at in range(0, len(chosen), batch_size):
            x = np.zeros((len(chosen[at : at + batch_size]), self.block_size), dtype=np.int64)
            y = np.full_like(x, -1)
            for row, window in enumerate(chosen[at : at + batch_size]):
                if window < 0:
                    continue
                shard = int(np.searchsorted(first, window, side='right')) - 1
                start = int(window - first[shard]) * self.block_size
                piece = self.shards[shard].read(start, self.block_size + 1)
                x[row, : len(piece) - 1], y[row, : len(piece) - 1] = piece[:-1], piece[1:]
            self.check_ids(x, y)
            yield x, y

    def check_ids(self, *arrays: np.ndarray) -> None:
        """Raises UserError if an id lies beyond the vocabulary (a GPU would only say 'device-side assert')."""
        if (top := max(int(a.max()) for a in arrays)) >= self.vocab_size:
            raise UserError(
                f'{self.paths[0]}: token id {top} is beyond the vocabulary of {self.vocab_size}: '
                'the file was prepared with another tokenizer; prepare it again'
            )


class TokenFile:
    """The ids of one file, read where they are asked for: uint16, or what a 256-int32 header with a known magic says.

    Reads, and does not map: a page of a 100 GB mapping that is touched for the first time costs more than the reading of it.
    """

    def __init__(self, path: str):
        size = os.path.getsize(path)
        if size == 0:
            raise UserError(f'{path}: the file is empty; prepare the dataset again')
        self.path, self.before, self.width = path, 0, 2
        self.file = open(
            path, 'rb', buffering=0
        )  # kept open: a dataset prepared anew meanwhile does not get mixed in
        header = (
            np.frombuffer(self.file.read(12), dtype='<i4').tolist() if size >= HEADER_BYTES else [0]
        )
        if header[0] in HEADERS:
            version, self.width = HEADERS[header[0]]
            self.before = HEADER_BYTES
            if header[1] != version:
                raise UserError(
                    f'{path}: header version {header[1]} is not the uint{8 * self.width} one (version {version})'
                )
            if header[2] != (n := (size - self.before) // self.width) % 2**31:
                raise UserError(
                    f'{path}: the header says {header[2]} tokens, the file holds {n}: it is cut off'
                )
        if size % self.width:
            raise UserError(
                f'{path}: {size} bytes is an odd size, but token ids take {self.width} bytes each: the file is cut off or not a token file'
            )
        self.n_tokens = (size - self.before) // self.width

    def __len__(self) -> int:
        return self.n_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens from number `start` on, int64: `count` of them, or as many as there are. Raises UserError if the file became shorter."""
        at, size = (
            self.before + self.width * start,
            self.width * max(0, min(count, self.n_tokens - start)),
        )
        if hasattr(os, 'pread'):
            raw = os.pread(self.file.fileno(), size, at)
        else:  # Windows; no two threads read the same split
            self.file.seek(at)
            raw = self.file.read(size)
        if len(raw) < size:
            raise UserError(
                f'{self.path}: the file became shorter while it was read; prepare the dataset again'
            )
        return np.frombuffer(raw, dtype=f'<u{self.width}').astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def _key(*numbers: int) -> np.ndarray:
    """One 64-bit key from several integers, as a one-element array (numpy wraps arrays without a warning)."""
    key = np.zeros(1, dtype=U64)
    for number in numbers:
        key = _mix(key + U64(0x9E3779B97F4A7C15) + np.array([number % 2**64], dtype=U64))
    return key


def epoch_offset(seed: int, epoch: int) -> int:
    """Where this epoch's first window begins, before the reader reduces it modulo what fits."""
    return int(_key(seed, epoch, 99)[0] >> U64(33))


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each `index` in [0, n) goes in the permutation of (seed, epoch): O(1) memory whatever n is.

    A Feistel network over the next even power of two is a bijection; walking on until the value falls below n keeps it
    one on [0, n) (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = U64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (U64(1) << half) - U64(1)
    keys = [_key(seed, epoch, turn) for turn in range(4)]

    def shuffle(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << half | right

    x = shuffle(index.astype(U64))
    while (out := x >= U64(n)).any():
        x[out] = shuffle(x[out])
    return x.astype(np.int64)


# -----------------------------------------------------------------------------
# The folder's description


class _NoCode(pickle.Unpickler):
    """Reads pickles of plain containers and values; any that wants a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f'the pickle asks for {module}.{name}; only plain dicts, lists, text and numbers are read'
        )


def read_meta(folder: str) -> dict[str, Any]:
    """The folder's meta.json, or what nanoGPT's meta.pkl tells, or {} if there is neither (then GPT-2's tokens are meant).

    Reading a meta.pkl runs no code from it. Raises UserError if the file is not what it should be.
    """
    path = os.path.join(folder, 'meta.json')
    try:
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            return {
                'tokenizer': meta['tokenizer'],
                'vocab_size': meta['vocab_size'],
                'splits': meta.get('splits', {}),
            }
        path = os.path.join(folder, 'meta.pkl')
        if os.path.exists(path):
            with open(path, 'rb') as f:
                itos = _NoCode(f).load()['itos']
            symbols = [itos[i] for i in range(len(itos))]
            chars = ''.join(s for s in symbols if len(s) == 1)
            special = symbols[len(chars) :]
            if list(chars) + special != symbols:
                raise UserError('special tokens stand before characters')
            return {
                'tokenizer': {'kind': 'char', 'chars': chars, 'special': special},
                'vocab_size': len(symbols),
                'splits': {},
            }
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except Exception as error:  # a foreign file can fail anywhere in the reader
        raise UserError(
            f'{path}: not a description of a dataset ({type(error).__name__}: {str(error)[:80]}); prepare the dataset again'
        ) from None
    return {}


def read_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer that the folder was prepared with."""
    return from_state(read_meta(folder).get('tokenizer', {'kind': 'gpt2'}))


def bytes_per_token(folder: str, split: str = 'val') -> float | None:
    """UTF-8 bytes of text per token of the split, for bits per byte; None if the folder does not tell."""
    counts = read_meta(folder).get('splits', {}).get(split, {})
    return (
        counts['bytes'] / counts['tokens'] if counts.get('bytes') and counts.get('tokens') else None
    )


# -----------------------------------------------------------------------------
# What several prepare.py share


def choose_tokenizer(
    name: str, texts: Callable[[], Iterable[str]], vocab_size: int = 2048, **normalization: Any
) -> Tokenizer:
    """A bpe, wordpiece or char tokenizer trained on `texts()`, GPT-2's, or the one stored in the file `name` (a tokenizer.json or meta.json).

    Raises UserError if that file brings its own normalization.
    """
    if name == 'gpt2':
        return GPT2Tokenizer(**normalization)
    if name in ('bpe', 'wordpiece', 'char'):
        return train_tokenizer(name, texts(), vocab_size, **normalization)
    if any(normalization.values()):
        raise UserError(
            f'tokenizer={name} brings its own normalization: leave lowercase and squeeze out'
        )
    return load_tokenizer(name)
