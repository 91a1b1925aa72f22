"""FineWeb and FineWeb-Edu, trillions of tokens of web text, in GPT-2's tokens, in numbered shards.

pip install datasets
python data/fineweb/prepare.py --max_tokens=1e9        (streams the start of FineWeb-Edu's sample)
python data/fineweb/prepare.py --part=0/4              (the first of four machines)
python data/fineweb/prepare.py --input=pages/ --out_dir=data/mine              (your own files)

Stop it at any time: the same command continues after the last finished shard.
"""

import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run
from lyregpt.text import (
    WAITS,
    atomic_write,
    datasets_library,
    find_files,
    read_documents,
    read_stream,
    shown,
)
from lyregpt.tokenizer import GPT2Tokenizer

FORMATS = ('.jsonl', '.parquet', '.ds')
COUNTS = ('shards', 'documents', 'tokens', 'bytes')
KEPT = 'the finished shards are kept, and the same command continues after them'

# (text, position after it): a stream opened at that position continues with the next document
Documents = Iterator[tuple[str, Any]]


@dataclass
class PrepareConfig:
    # What is read
    dataset: str = 'HuggingFaceFW/fineweb-edu'  # on the Hugging Face hub; HuggingFaceFW/fineweb is
    # the one that is not selected for education
    name: str = 'sample-10BT'  # its subset: sample-10BT, sample-100BT, sample-350BT,
    # CC-MAIN-2024-10 and the like, or default (all)
    revision: str = ''  # its commit; '': the newest when the preparation starts
    input: str = ''  # your own copy instead: a file or folder of .jsonl or .parquet with a field
    # text, or of datatrove's .ds
    offline: bool = False  # download nothing

    # What is written
    out_dir: str = shown(HERE)  # where the shards go; data/NAME makes it --dataset=NAME
    part: str = '0/1'  # i/n: the i-th of n parts (from 0), for group i of --shard_groups=n
    max_tokens: int = 0  # stop after so many training tokens, of all parts together; 0: all
    val_tokens: int = 10_000_000  # the first so many are kept for validation, by part 0
    shard_tokens: int = 100_000_000  # a shard ends with the document that reaches this number; it
    # is held in memory, 2 bytes per token

    def __post_init__(self) -> None:
        match = re.fullmatch(r'(\d+)/(\d+)', self.part)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(f'part={self.part}: expected i/n with i from 0 to n - 1, as in 0/4')
        if self.max_tokens < 0 or min(self.val_tokens, self.shard_tokens) < 2:
            raise ValueError(
                'expected max_tokens of at least 0, val_tokens and shard_tokens of at least 2'
            )


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    files: list[str] = []
    kinds = {''}
    if config.input:
        files = [path for path in find_files([config.input], FORMATS) if os.path.getsize(path)]
        kinds = {os.path.splitext(path)[1].lower() for path in files}
        if len(kinds) != 1 or not kinds < set(FORMATS):
            raise UserError(
                f'{config.input}: expected files of one kind, .jsonl, .parquet or .ds; '
                f'found {" and ".join(sorted(kinds)) or "none"}'
            )
    elif config.offline:
        raise UserError(
            f'{config.dataset} comes from the network, and nothing is downloaded now: '
            'name your copy with --input=FOLDER'
        )
    ledger = Ledger(config, files)
    if ledger.finished():
        print(f'{ledger.path}: finished already; to start again, remove this file and the shards')
        return
    if kinds == {'.ds'}:
        link_token_files(ledger, files)
    elif kinds == {'.jsonl'}:
        write_shards(ledger, from_jsonl(ledger, files))
    else:
        write_shards(ledger, from_datasets(ledger, files))
    counts = ledger.splits['train']
    if not counts['tokens']:
        raise UserError(
            f'{ledger.notes["source"]}: too little text to train on in part {config.part}; '
            'make val_tokens or n smaller'
        )
    ledger.notes['ended'] = not ledger.finished()  # the input has no more
    ledger.save()
    print(f'{config.out_dir}: {counts["tokens"]:,} training tokens in {counts["shards"]:,} shards')


class Ledger:
    """Which shards of this part are finished, and where it continues.

    It is kept in progress-i-of-n.json, and for the trainer in meta.json.
    """

    def __init__(self, config: PrepareConfig, files: list[str]):
        self.config = config
        self.index, self.parts = map(int, config.part.split('/'))
        self.max_tokens = math.ceil(config.max_tokens / self.parts) or math.inf
        self.path = os.path.join(config.out_dir, f'progress-{self.index}-of-{self.parts}.json')
        source = ' '.join(filter(None, [config.dataset, config.name, config.revision]))
        if files:
            size = sum(map(os.path.getsize, files))
            source = os.path.basename(os.path.abspath(config.input))
            source += f' (files: {len(files)}, bytes: {size})'
        fixed = {
            'source': source,
            'val_tokens': config.val_tokens,
            'shard_tokens': config.shard_tokens,
        }
        names = ['train'] if self.index else ['val', 'train']
        splits = {name: dict.fromkeys(COUNTS, 0) for name in names}
        start = {'revision': config.revision, 'splits': splits, 'place': None, 'ended': False}
        self.notes: dict[str, Any] = fixed | start
        there = os.listdir(config.out_dir) if os.path.isdir(config.out_dir) else []
        shards = [name for name in there if name.endswith('.bin')]
        if self.index:  # part 0's validation split may be here
            shards = [name for name in shards if '_val_' not in name]
        if shards and not any(name.endswith(f'-of-{self.parts}.json') for name in there):
            raise UserError(
                f'{os.path.join(config.out_dir, min(shards))}: of another preparation; '
                'remove it, or choose another --out_dir'
            )
        if os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as f:
                self.notes |= json.load(f)
        self.splits: dict[str, dict[str, int]] = self.notes['splits']
        for name, value in fixed.items():
            if self.notes[name] != value:
                raise UserError(
                    f'{self.path}: begun with {name}={self.notes[name]}, not {value}; '
                    'continue with that, or choose another --out_dir'
                )

    def next_shard(self) -> tuple[str, float]:
        """The split of the next shard, and its number of tokens: 0 if there are enough."""
        if 'val' in self.splits and not self.splits['val']['shards']:
            return 'val', self.config.val_tokens
        left = self.max_tokens - self.splits['train']['tokens']
        return 'train', min(self.config.shard_tokens, left)

    def finished(self) -> bool:
        """Are there enough tokens, or no more documents?"""
        return self.notes['ended'] or self.next_shard()[1] <= 0

    def add_shard(self, write: Callable[[str], Any], position: Any, counts: list[int]) -> None:
        """Call `write` with the path of the next shard, then note what is finished.

        `counts` are the shard's documents, tokens and bytes. The next shard starts at `position`.
        """
        split, _ = self.next_shard()
        totals = self.splits[split]
        number = 0
        if split == 'train':
            number = (self.index or self.parts) + self.parts * totals['shards']
        path = os.path.join(self.config.out_dir, f'fineweb_{split}_{number:06d}.bin')
        if not os.path.exists(self.path):  # so that there is never a shard without it
            self.save()
        write(path)
        for key, count in zip(COUNTS, [1, *counts]):
            totals[key] += count
        self.notes['place'] = position
        self.save()
        print(f'{path}: {counts[1]:,} tokens from {counts[0]:,} documents', flush=True)

    def save(self) -> None:
        """Write the notes, after meta.json.

        What is not in the notes is done again after a kill, and gives the same bytes.
        """
        if self.index == 0:
            meta = {
                'tokenizer': GPT2Tokenizer().state(),
                'vocab_size': GPT2Tokenizer.vocab_size,
                'splits': self.splits,
                'source': f'{self.notes["source"]}, part {self.config.part}',
                'revision': self.notes['revision'],
                'prepared': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
            }
            write_file(
                os.path.join(self.config.out_dir, 'meta.json'),
                json.dumps(meta, ensure_ascii=False).encode(),
            )
        write_file(self.path, json.dumps(self.notes).encode())


def write_shards(ledger: Ledger, documents: Documents) -> None:
    """Tokenize documents into shards until they end or there are enough tokens."""
    tokenizer = GPT2Tokenizer()
    shard, counts = bytearray(), np.zeros(3, dtype=int)  # its documents, tokens and bytes
    position = None
    # 512 documents keep every core busy; where a shard ends does not depend on this number
    for batch in iter(lambda: list(itertools.islice(documents, 512)), []):
        for (text, position), ids in zip(batch, tokenizer.encode_batch([t for t, _ in batch])):
            shard += np.append(ids, tokenizer.eot).astype('<u2').tobytes()
            n_bytes = len(tokenizer.normalize(text).encode('utf-8', 'surrogatepass'))
            counts += (1, len(ids) + 1, n_bytes)
            if counts[1] >= ledger.next_shard()[1]:
                ledger.add_shard(lambda path: write_file(path, shard), position, counts.tolist())
                shard, counts = bytearray(), np.zeros(3, dtype=int)
                if ledger.finished():
                    return
    if shard and ledger.next_shard()[0] == 'train':  # the last one may be shorter
        ledger.add_shard(lambda path: write_file(path, shard), position, counts.tolist())


def from_jsonl(ledger: Ledger, files: list[str]) -> Documents:
    """Every n-th record; the position after one is the number of the next."""
    first = ledger.notes['place'] or 0
    for number, pieces in enumerate(read_documents(files, text_field='text')):
        if number >= first and number % ledger.parts == ledger.index:
            yield ''.join(pieces), number + 1


def from_datasets(ledger: Ledger, files: list[str]) -> Documents:
    """The part's documents, from the hub or .parquet; the position is the stream's own state."""
    datasets_library('; or name .jsonl files with --input')
    notes = ledger.notes
    waits = () if files else WAITS
    for row, position in read_stream(
        lambda: open_part(ledger, files), notes['source'], notes['place'], waits, kept=KEPT
    ):
        if not isinstance(row.get('text'), str):
            raise UserError(f'{notes["source"]}: no field text in it, but {", ".join(row)}')
        yield row['text'], position


def open_part(ledger: Ledger, files: list[str]) -> Any:
    """The part of the corpus as a stream of the `datasets` library."""
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from huggingface_hub import HfApi

    config, notes = ledger.config, ledger.notes
    if files:
        stream = load_dataset('parquet', data_files=files, split='train', streaming=True)
    else:  # a position in one commit is not valid in another
        notes['revision'] = notes['revision'] or HfApi().dataset_info(config.dataset).sha
        stream = load_dataset(
            config.dataset,
            config.name or None,
            split='train',
            streaming=True,
            revision=notes['revision'],
        )
    if stream.num_shards < ledger.parts:  # every n-th document
        return split_dataset_by_node(stream, ledger.index, ledger.parts)
    # whole files, so that only one part downloads each
    return stream.shard(ledger.parts, ledger.index, contiguous=False)


def link_token_files(ledger: Ledger, files: list[str]) -> None:
    """Take over datatrove's token files as shards, the first one for validation."""
    for path in files:
        with open(path + '.metadata', encoding='utf-8') as f:
            name, _, width = f.readline().strip().rpartition('|')
        if width != '2':
            raise UserError(
                f'{path}: {width} bytes per token, as of {name}; expected 2: make it with '
                'tokenizer_name_or_path="gpt2"'
            )
    tokenizer = GPT2Tokenizer()
    sizes = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]
    sizes[tokenizer.eot] = 0
    mine = files[ledger.index :: ledger.parts]
    for position in range(ledger.notes['place'] or 0, len(mine)):
        path = mine[position]
        seen = count_tokens(path)
        documents, n_bytes = int(seen[tokenizer.eot]), int(seen[: len(sizes)] @ np.array(sizes))
        if not documents or seen[len(sizes) :].any():
            raise UserError(
                f"{path}: not GPT-2's tokens with {tokenizer.eot} behind each document; "
                "make it with eos_token='<|endoftext|>'"
            )
        counts = [documents, int(seen.sum()), n_bytes]
        ledger.add_shard(lambda shard: link(path, shard), position + 1, counts)
        if ledger.finished():
            return


def count_tokens(path: str) -> np.ndarray:
    """How often each id occurs in a file of uint16."""
    counts = np.zeros(1 << 16, dtype=int)
    with open(path, 'rb') as f:
        for raw in iter(lambda: f.read(1 << 23), b''):
            whole = raw[: len(raw) // 2 * 2]  # a file that is cut off may end within an id
            counts += np.bincount(np.frombuffer(whole, '<u2'), minlength=1 << 16)
    return counts


def link(path: str, shard: str) -> None:
    """Make `shard` a hard link to the file at `path`, or a copy where that is not possible."""
    try:
        os.link(os.path.realpath(path), shard)
    except OSError:  # another disk, or one without links, or the link is there since a kill
        with open(path, 'rb') as f:
            write_file(shard, f)


def write_file(path: str, content: Any) -> None:
    """`atomic_write` into a folder that is created if missing. Raises UserError."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; {KEPT}') from None


if __name__ == '__main__':
    run(main)
