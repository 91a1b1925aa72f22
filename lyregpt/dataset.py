"""Token files on disk: write `train.bin` and `val.bin` from documents, read batches from them.

A `.bin` file is raw little-endian uint16 token ids (nanoGPT's format). Shards
(`train_000001.bin …`) and llm.c's and modded-nanogpt's header of 256 int32 are read too;
vocabularies beyond 65,536 tokens are written as uint32 ids below llm.c's header. `meta.json` beside
the files holds the tokenizer and the counts.

Reading has no state: the batch of step s is a pure function of (seed, s) and the files. Each epoch
cuts the split into sequences at its own offset and visits each of them once, in an order drawn from
(seed, epoch) in O(1) memory. So a resumed run, or one on more processes, sees the same sequences.
"""

import contextlib
import glob
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from configurator import UserError
from lyregpt import ROOT
from lyregpt.text import Piece, atomic_write
from lyregpt.tokenizer import CharTokenizer, Tokenizer, from_state

HEADER_BYTES = 1024
HEADERS = {20240520: (1, 2), 20240801: (7, 4)}  # llm.c's magic numbers: version, bytes of an id
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

    Streams: memory does not grow with the corpus. Everything is written to a temporary folder and
    moved at the end, the meta last. Raises UserError if a needed split stays empty or the disk is
    full; the old files are then unchanged.
    """
    unfinished = os.path.join(folder, 'prepare.tmp')
    shutil.rmtree(unfinished, ignore_errors=True)  # of a preparation that was killed
    try:
        os.makedirs(unfinished)
        splits = _write_tokens(unfinished, pieces, tokenizer, total_bytes, need)
        for split, counts in splits.items():
            if counts['tokens'] < 2:
                raise UserError(
                    f'the {split} split came out empty: too little text in {source or "the input"}'
                    ', or the fraction kept for validation is too small or too large'
                )
        meta = {
            'tokenizer': tokenizer.state(),
            'vocab_size': tokenizer.vocab_size,
            'splits': splits,
            'source': source,
            'prepared': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        }
        described = json.dumps(meta, ensure_ascii=False).encode()
        atomic_write(os.path.join(unfinished, 'meta.json'), described)
        if isinstance(tokenizer, CharTokenizer):
            atomic_write(os.path.join(unfinished, 'meta.pkl'), _nanogpt_meta(tokenizer))
        else:  # one of an earlier preparation does not describe these files
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, 'meta.pkl'))
        for name in sorted(os.listdir(unfinished), key=lambda name: name == 'meta.json'):
            os.replace(os.path.join(unfinished, name), os.path.join(folder, name))
    except OSError as error:
        raise UserError(
            f'{error.filename or folder}: {error.strerror}; nothing was changed'
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f'{folder}: {tokenizer.kind} tokenizer, vocabulary {tokenizer.vocab_size:,}')
    for split, counts in splits.items():
        print(
            f'  {split}.bin  {counts["tokens"]:,} tokens from {counts["documents"]:,} documents, '
            f'{counts["bytes"]:,} bytes of text'
        )
    return meta


def _write_tokens(
    folder: str,
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    total_bytes: int | None,
    splits: tuple[str, ...],
) -> dict[str, dict[str, int]]:
    """Write {split}.bin; returns the numbers of documents, tokens and bytes of each split."""
    counts = {split: {'documents': 0, 'tokens': 0, 'bytes': 0} for split in splits}
    wide = tokenizer.vocab_size > 65536
    bar = tqdm(
        total=total_bytes, unit='B', unit_scale=True, desc='tokenizing', disable=None, leave=False
    )
    with bar, contextlib.ExitStack() as stack:
        files = {}
        for split in splits:
            files[split] = stack.enter_context(open(os.path.join(folder, f'{split}.bin'), 'wb'))
            if wide:
                files[split].seek(HEADER_BYTES)
        for batch in _batches(pieces):
            encoded = tokenizer.encode_batch([text for _, text, _ in batch])
            for (split, text, ends), ids in zip(batch, encoded):
                if ends and tokenizer.eot is not None:
                    ids = np.append(ids, tokenizer.eot)
                files[split].write(ids.astype('<u4' if wide else '<u2').tobytes())
                n_bytes = len(tokenizer.normalize(text).encode('utf-8', 'surrogatepass'))
                counts[split]['documents'] += int(ends)
                counts[split]['tokens'] += len(ids)
                counts[split]['bytes'] += n_bytes
                bar.update(n_bytes)
        for split, file in files.items():
            if wide:
                header = np.zeros(HEADER_BYTES // 4, dtype='<i4')
                header[:3] = 20240801, 7, counts[split]['tokens'] % 2**31
                file.seek(0)
                file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
    return counts


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces with about 4 million characters in all: enough to keep every core busy."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size > 1 << 22:
            yield batch
            batch, size = [], 0
    yield batch


def _nanogpt_meta(tokenizer: CharTokenizer) -> bytes:
    """The meta.pkl that nanoGPT's sample.py reads."""
    itos = dict(enumerate([*tokenizer.chars, *tokenizer.special]))
    stoi = {symbol: i for i, symbol in itos.items()}
    return pickle.dumps({'vocab_size': len(itos), 'itos': itos, 'stoi': stoi})


# -----------------------------------------------------------------------------
# Reading


def folder_of(dataset: str) -> str:
    """The folder of the option `dataset`: a path, or a name in data/ here or in the repository."""
    here = os.path.join('data', dataset)
    for folder in dataset, here, os.path.join(ROOT, here):
        if os.path.isdir(folder):
            return folder
    return here


def token_files(folder: str, name: str) -> list[str]:
    """The path of a split's file, or those of its shards in order. Raises UserError if none."""
    path = os.path.join(folder, f'{name}.bin')
    if os.path.exists(path):
        return [path]
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), f'*{name}_*.bin')))
    if not paths:
        raise UserError(
            f'{path}: no such file; prepare the dataset first: '
            f'python {os.path.join(folder, "prepare.py")}'
        )
    return paths


def _shards_of_group(paths: list[str], name: str, group: int, groups: int) -> list[str]:
    """Of numbered shards, those whose number modulo `groups` is `group`. Raises UserError."""
    numbers = [re.search(r'_(\d+)\.bin$', path) for path in paths]
    chosen = [path for path, n in zip(paths, numbers) if n and int(n[1]) % groups == group]
    if not chosen:
        raise UserError(
            f'{paths[0]}: shard_groups={groups} deals out numbered shards ({name}_000001.bin …), '
            f'and there is none here whose number modulo {groups} is {group}'
        )
    return chosen


class Split:
    """One split of a dataset folder: `n_sequences` sequences of `block_size` + 1 tokens each.

    With `groups`, only the numbered shards whose number modulo `groups` is `group` are read: other
    machines may hold the others. Raises UserError if there is no such file, or if it is empty, of
    odd size, or (for training) shorter than one sequence.
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
        self.paths = token_files(folder, name)
        if groups > 1:
            self.paths = _shards_of_group(self.paths, name, group, groups)
        self.shards = [TokenFile(path) for path in self.paths]
        lengths = np.array([len(shard) for shard in self.shards])
        self.n_tokens = int(lengths.sum())
        path = self.paths[0]
        expected = read_meta(folder).get('splits', {}).get(name, {}).get('tokens', self.n_tokens)
        if path == os.path.join(folder, f'{name}.bin') and expected != self.n_tokens:
            raise UserError(
                f'{path}: {self.n_tokens} tokens, but meta.json says {expected}: cut off, or of '
                'another preparation; prepare it again'
            )
        # A shard whose length is not a multiple of block_size has some slack. With one sequence
        # less, an epoch's offset can have any value below block_size, so each epoch cuts the text
        # in other places.
        complete = (lengths - 1) // block_size
        counts = np.maximum(complete - 1, np.minimum(complete, 1))
        self.slack = np.minimum(block_size, lengths - counts * block_size)
        self.first = np.append(0, np.cumsum(counts))  # the first sequence of each shard
        self.n_sequences = int(self.first[-1])
        # Evaluation reads the last, shorter sequence of each shard too.
        self.eval_first = np.append(0, np.cumsum((lengths - 2) // block_size + 1))
        usable = self.n_sequences if name == 'train' else self.eval_first[-1]
        if self.n_tokens < 2:
            raise UserError(f'{path}: a single token has nothing to predict: prepare more text')
        if not usable:
            raise UserError(
                f'{path}: {self.n_tokens} tokens are fewer than one sequence of block_size + 1 = '
                f'{block_size + 1}: use more text or a smaller --block_size'
            )

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences `first` … `first + count - 1` of the endless stream of all epochs.

        Returns inputs and targets, each (count, block_size) int64.
        """
        numbers = np.arange(first, first + count)
        epochs = numbers // self.n_sequences
        sequence, offset = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            place = numbers[here] % self.n_sequences
            sequence[here] = permute(place, self.n_sequences, self.seed, epoch)
            offset[here] = epoch_offset(self.seed, epoch)
        shard = np.searchsorted(self.first, sequence, side='right') - 1
        start = (sequence - self.first[shard]) * self.block_size + offset % self.slack[shard]
        length = self.block_size + 1
        tokens = np.stack([self.shards[i].read(at, length) for i, at in zip(shard, start)])
        self.check_ids(tokens)
        return tokens[:, :-1], tokens[:, 1:]

    def eval_sequences(self, limit: int | None = None) -> int:
        """How many sequences evaluation reads: the whole split, or at most `limit` of them."""
        total = int(self.eval_first[-1])
        return total if limit is None else min(limit, total)

    def eval_batches(
        self, batch_size: int, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The split from start to end: inputs and targets, each (≤ batch_size, block_size) int64.

        Targets beyond the end are -1. With `limit`, that many sequences are spread evenly over the
        split, the same ones every time. Each rank takes every `world_size`-th sequence. Where the
        division leaves a remainder, some ranks get a sequence without targets, so that all of them
        have the same number of batches.
        """
        n = self.eval_sequences(limit)
        numbers = np.arange(rank, n + -n % world_size, world_size)
        chosen = np.where(numbers < n, numbers * self.eval_first[-1] // n, -1)
        for at in range(0, len(chosen), batch_size):
            some = chosen[at : at + batch_size]
            x = np.zeros((len(some), self.block_size), dtype=np.int64)
            y = np.full_like(x, -1)
            for row in np.flatnonzero(some >= 0):
                shard = np.searchsorted(self.eval_first, some[row], side='right') - 1
                start = (some[row] - self.eval_first[shard]) * self.block_size
                tokens = self.shards[shard].read(start, self.block_size + 1)
                x[row, : len(tokens) - 1] = tokens[:-1]
                y[row, : len(tokens) - 1] = tokens[1:]
            self.check_ids(x, y)
            yield x, y

    def check_ids(self, *arrays: np.ndarray) -> None:
        """Raise UserError for an id beyond the vocabulary; a GPU would fail with an assertion."""
        largest = max(array.max() for array in arrays)
        if largest >= self.vocab_size:
            raise UserError(
                f'{self.paths[0]}: token id {largest} is beyond the vocabulary of '
                f'{self.vocab_size}: the file was prepared with another tokenizer; prepare it again'
            )


class TokenFile:
    """The token ids of one file: uint16, or what a header with a known magic number says.

    It is read, not mapped: the first access to a page of a 100 GB mapping costs more than a read.
    """

    def __init__(self, path: str):
        self.path, self.start, self.width = path, 0, 2
        # kept open, so that a dataset that is prepared again meanwhile does not get mixed in
        self.file = open(path, 'rb', buffering=0)
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype='<i4', count=3).tolist()
        if size >= HEADER_BYTES and header[0] in HEADERS:
            self.start = HEADER_BYTES
            version, self.width = HEADERS[header[0]]
            found = (size - HEADER_BYTES) // self.width
            if header[1:] != [version, found % 2**31]:
                raise UserError(
                    f'{path}: header version {header[1]} (expected {version}) says {header[2]} '
                    f'tokens, the file holds {found}: it is cut off or of another format'
                )
        if size == 0 or size % self.width:
            raise UserError(
                f'{path}: {size} bytes, where each token id takes {self.width}: the file is empty, '
                'cut off (an odd size) or not a token file; prepare the dataset again'
            )
        self.n_tokens = (size - self.start) // self.width

    def __len__(self) -> int:
        return self.n_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Up to `count` tokens from number `start` on, int64.

        Raises UserError if the file became shorter.
        """
        size = self.width * max(0, min(count, self.n_tokens - start))
        at = self.start + self.width * start
        self.file.seek(at)  # no two threads read the same split
        raw = self.file.read(size)
        if len(raw) < size:
            raise UserError(
                f'{self.path}: the file became shorter while it was read; prepare the dataset again'
            )
        return np.frombuffer(raw, dtype=f'<u{self.width}').astype(np.int64)


# -----------------------------------------------------------------------------
# The order of the sequences


def epoch_offset(seed: int, epoch: int) -> int:
    """Where this epoch's first sequence begins, to be taken modulo a shard's slack."""
    return int(_key(seed, epoch, 99)[0] >> U64(33))


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each `index` in [0, n) goes in the permutation of (seed, epoch): O(1) memory for any n.

    A Feistel network over the next even power of two is a bijection. Repeating it until the value
    is below n makes it one on [0, n) (cycle walking: Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002).
    """
    half = U64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = [_key(seed, epoch, round_) for round_ in range(4)]
    x = _feistel(index.astype(U64), half, keys)
    while (x >= U64(n)).any():
        out = x >= U64(n)
        x[out] = _feistel(x[out], half, keys)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: list[np.ndarray]) -> np.ndarray:
    """A permutation of the integers of 2 * `half` bits, one round per key."""
    mask = (U64(1) << half) - U64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _key(*numbers: int) -> np.ndarray:
    """A 64-bit key from integers, as a one-element array: arrays overflow without a warning."""
    key = np.zeros(1, dtype=U64)
    for number in numbers:
        key = _mix(key + U64(0x9E3779B97F4A7C15) + np.array([number % 2**64], dtype=U64))
    return key


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finalizer of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


# -----------------------------------------------------------------------------
# The folder's description


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and values; refuses those that ask for a class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f'it asks for {module}.{name}; only plain dicts, lists, text and numbers are read'
        )


def read_meta(folder: str) -> dict[str, Any]:
    """The folder's meta.json, else nanoGPT's meta.pkl, else {} (the tokens are then GPT-2's).

    Reading a meta.pkl runs no code from it. Raises UserError if the file is not a description.
    """
    path = os.path.join(folder, 'meta.json')
    older = os.path.join(folder, 'meta.pkl')
    try:
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                meta = json.load(f)
            return {
                'tokenizer': meta['tokenizer'],
                'vocab_size': meta['vocab_size'],
                'splits': meta.get('splits', {}),
            }
        if os.path.exists(older):
            path = older
            with open(path, 'rb') as pickled:
                itos = _PlainUnpickler(pickled).load()['itos']
            symbols = [itos[i] for i in range(len(itos))]
            chars = [symbol for symbol in symbols if len(symbol) == 1]
            special = symbols[len(chars) :]
            if chars + special != symbols:
                raise ValueError('special tokens stand before characters')
            tokenizer = {'kind': 'char', 'chars': ''.join(chars), 'special': special}
            return {'tokenizer': tokenizer, 'vocab_size': len(symbols), 'splits': {}}
    except Exception as error:  # a foreign file can fail anywhere in the reader
        raise UserError(
            f'{path}: not a description of a dataset ({type(error).__name__}: '
            f'{str(error)[:120]}); prepare the dataset again'
        ) from None
    return {}


def read_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer that the folder was prepared with."""
    return from_state(read_meta(folder).get('tokenizer', {'kind': 'gpt2'}))


def bytes_per_token(folder: str, split: str = 'val') -> float | None:
    """UTF-8 bytes of text per token of the split, for bits per byte; None if they are unknown."""
    counts = read_meta(folder).get('splits', {}).get(split, {})
    known = counts.get('bytes') and counts.get('tokens')
    return counts['bytes'] / counts['tokens'] if known else None
