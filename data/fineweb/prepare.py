"""FineWeb and FineWeb-Edu, trillions of tokens of web text, in GPT-2's tokens, in numbered shards. Stop it at any time: the same command goes on.

pip install datasets
python data/fineweb/prepare.py --max_tokens=1e9                    (streams the first of FineWeb-Edu's sample of 10 billion tokens)
python data/fineweb/prepare.py --part=0/4                          (the first of four machines; they train with --shard_groups=4)
python data/fineweb/prepare.py --input=pages/ --out_dir=data/mine  (your own .jsonl or .parquet, or datatrove's .ds)
"""

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.text import WAITS, atomic_write, find_files, read_jsonl, read_stream, shown  # noqa: E402
from lyregpt.tokenizer import GPT2Tokenizer  # noqa: E402

KEPT = 'the finished shards are kept, and the same command goes on behind them'
Documents = Generator[
    tuple[str, Any], None, None
]  # (text, place behind it): a stream opened at that place goes on with the next


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # What is read
    dataset: str = 'HuggingFaceFW/fineweb-edu'  # on the Hugging Face hub; HuggingFaceFW/fineweb is the one that is not chosen for teaching
    name: str = 'sample-10BT'  # its subset: sample-10BT, sample-100BT, sample-350BT, CC-MAIN-2024-10 and the like, or default (all)
    revision: str = (
        ''  # its commit; '': the newest when the preparation begins, and that one to its end
    )
    input: str = ''  # your own copy instead: a file or folder of .jsonl or .parquet with a text field, or of datatrove's .ds
    offline: bool = False  # download nothing

    # What is written
    out_dir: str = shown(HERE)  # where the shards go; data/NAME makes it --dataset=NAME
    part: str = '0/1'  # i/n: the i-th of n parts (from 0), for the machine that trains on group i of --shard_groups=n
    max_tokens: int = 0  # stop after so many training tokens, all parts together; 0: all there are
    val_tokens: int = 10_000_000  # the first so many are kept for validation, by part 0
    shard_tokens: int = 100_000_000  # a shard ends with the document that reaches this; it is held in memory, 2 bytes each

    def __post_init__(self) -> None:
        i, n = map(int, self.part.split('/')) if re.fullmatch(r'\d+/\d+', self.part) else (0, 0)
        if i >= n:
            raise ValueError(f'part={self.part}: expected i/n with i from 0 to n - 1, as in 0/4')
        if self.max_tokens < 0 or min(self.val_tokens, self.shard_tokens) < 2:
            raise ValueError(
                'expected max_tokens of at least 0, val_tokens and shard_tokens of at least 2'
            )


def main() -> None:
    """Write this machine's shards."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    known = ('.jsonl', '.parquet', '.ds')
    files = (
        [f for f in find_files([config.input], known) if os.path.getsize(f)] if config.input else []
    )
    kind, *more = sorted({os.path.splitext(f)[1].lower() for f in files}) or ['']
    if config.input and (more or kind not in known):
        raise UserError(
            f'{config.input}: expected files of one kind, .jsonl, .parquet or .ds; found {" and ".join([kind, *more]) or "none"}'
        )
    if config.offline and not config.input:
        raise UserError(
            f'{config.dataset} comes from the network, and nothing is downloaded now: name your copy with --input=FOLDER'
        )
    ledger = Ledger(config, files)
    if ledger.finished():
        print(
            f'{ledger.path}: finished already; to prepare it anew, remove this file and the shards'
        )
        return
    if kind == '.ds':
        link_token_files(ledger, files)
    else:
        write_shards(
            ledger, from_jsonl(ledger, files) if kind == '.jsonl' else from_datasets(ledger, files)
        )
    counts = ledger.splits['train']
    if not counts['tokens']:
        raise UserError(
            f'{ledger.notes["source"]}: too little text to train on in part {config.part}; make val_tokens or n smaller'
        )
    ledger.notes['ended'] = not ledger.finished()  # the input has no more
    ledger.save()
    print(f'{config.out_dir}: {counts["tokens"]:,} training tokens in {counts["shards"]:,} shards')


class Ledger:
    """What of this part is finished, and where it goes on: in progress-i-of-n.json, and for the trainer in meta.json."""

    def __init__(self, config: PrepareConfig, files: list[str]):
        self.config = config
        self.index, self.parts = map(int, config.part.split('/'))
        self.share = -(-config.max_tokens // self.parts) or float('inf')
        self.path = os.path.join(config.out_dir, f'progress-{self.index}-of-{self.parts}.json')
        source = ' '.join(filter(None, [config.dataset, config.name, config.revision]))
        if files:
            source = f'{os.path.basename(os.path.abspath(config.input))} (files: {len(files)}, bytes: {sum(map(os.path.getsize, files))})'
        knobs = {
            'source': source,
            'val_tokens': config.val_tokens,
            'shard_tokens': config.shard_tokens,
        }
        splits = {
            s: {'shards': 0, 'documents': 0, 'tokens': 0, 'bytes': 0}
            for s in (['train'] if self.index else ['val', 'train'])
        }
        self.notes: dict[str, Any] = {
            **knobs,
            'revision': config.revision,
            'splits': splits,
            'place': None,
            'ended': False,
        }
        there = os.listdir(config.out_dir) if os.path.isdir(config.out_dir) else []
        strange = [
            name for name in there if name.endswith('.bin') and not (self.index and '_val_' in name)
        ]  # part 0's val may be there
        if strange and not any(name.endswith(f'-of-{self.parts}.json') for name in there):
            raise UserError(
                f'{os.path.join(config.out_dir, min(strange))}: of another preparation; remove it, or take another --out_dir'
            )
        if os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as f:
                self.notes |= json.load(f)
        for knob, value in knobs.items():
            if self.notes.get(knob) != value:
                raise UserError(
                    f'{self.path}: begun with {knob}={self.notes.get(knob)}, not {value}; go on so, or take another --out_dir'
                )
        self.splits = self.notes['splits']

    def next_shard(self) -> tuple[str, float]:
        """Which split it belongs to and how many tokens it should have: none if there are enough."""
        if 'val' in self.splits and not self.splits['val']['shards']:
            return 'val', self.config.val_tokens
        return 'train', min(self.config.shard_tokens, self.share - self.splits['train']['tokens'])

    def finished(self) -> bool:
        """Are there enough tokens, or no more documents?"""
        return self.notes['ended'] or self.next_shard()[1] <= 0

    def add_shard(
        self, make: Callable[[str], Any], place: Any, documents: int, tokens: int, size: int
    ) -> bool:
        """Have the next shard made at its path, then note it, and that the one behind it begins at `place`; are there enough now?"""
        split = self.next_shard()[0]
        counts = self.splits[split]
        number = 0 if split == 'val' else (self.index or self.parts) + self.parts * counts['shards']
        path = os.path.join(self.config.out_dir, f'fineweb_{split}_{number:06d}.bin')
        if not os.path.exists(self.path):  # so that there is never a shard without it
            self.save()
        make(path)
        for key, more in (
            ('shards', 1),
            ('documents', documents),
            ('tokens', tokens),
            ('bytes', size),
        ):
            counts[key] += more
        self.notes['place'] = place
        self.save()
        print(f'{path}: {tokens:,} tokens from {documents:,} documents', flush=True)
        return self.finished()

    def save(self) -> None:
        """meta.json first: what is not in progress-i-of-n.json is done once more after a kill, to the same bytes."""
        if self.index == 0:
            meta = {
                'tokenizer': GPT2Tokenizer().state(),
                'vocab_size': GPT2Tokenizer.vocab_size,
                'splits': self.splits,
            }
            meta |= {
                'source': f'{self.notes["source"]}, part {self.config.part}',
                'revision': self.notes['revision'],
            }
            meta['prepared'] = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
            write_file(
                os.path.join(self.config.out_dir, 'meta.json'),
                json.dumps(meta, ensure_ascii=False).encode(),
            )
        write_file(self.path, json.dumps(self.notes).encode())


def write_shards(ledger: Ledger, documents: Documents) -> None:
    """Tokenize the documents into shards until they end or there are enough. Where a shard ends does not depend on the batches."""
    tokenizer, shard, place = GPT2Tokenizer(), bytearray(), None
    counts = np.zeros(3, dtype=int)  # the documents, tokens and bytes in `shard`

    def finish(place: Any) -> bool:
        enough = ledger.add_shard(lambda path: write_file(path, shard), place, *counts.tolist())
        shard.clear()
        counts.fill(0)
        return enough

    while batch := list(itertools.islice(documents, 512)):  # enough to keep every core busy
        for (text, place), ids in zip(batch, tokenizer.encode_batch([text for text, _ in batch])):
            shard += np.append(ids, tokenizer.eot).astype('<u2').tobytes()
            counts += (
                1,
                len(ids) + 1,
                len(tokenizer.normalize(text).encode('utf-8', 'surrogatepass')),
            )
            if counts[1] >= ledger.next_shard()[1] and finish(place):
                return documents.close()
    if shard and ledger.next_shard()[0] == 'train':  # the last one is as long as it is
        finish(place)


def from_jsonl(ledger: Ledger, files: list[str]) -> Documents:
    """Every n-th record; the place behind one is the number of the next."""
    records = (
        (path, line, record) for path in files for line, record in enumerate(read_jsonl(path), 1)
    )
    for number, (path, line, record) in enumerate(records):
        if number >= (ledger.notes['place'] or 0) and number % ledger.parts == ledger.index:
            if not isinstance(record.get('text'), str):
                raise UserError(f'{path}, record {line}: no field text in it')
            yield record['text'], number + 1


def from_datasets(ledger: Ledger, files: list[str]) -> Documents:
    """The part's documents, from the hub or .parquet; the place behind one is the stream's own state, where it is opened again if it breaks."""
    try:
        from datasets import load_dataset
        from datasets.distributed import split_dataset_by_node
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError(
            'the hub and .parquet are read by the datasets library: pip install datasets; or name .jsonl with --input'
        ) from None
    config, notes = ledger.config, ledger.notes

    def open_stream() -> Any:
        if files:
            stream = load_dataset('parquet', data_files=files, split='train', streaming=True)
        else:  # a place in one commit is none in another
            notes['revision'] = notes['revision'] or HfApi().dataset_info(config.dataset).sha
            stream = load_dataset(
                config.dataset,
                config.name or None,
                split='train',
                streaming=True,
                revision=notes['revision'],
            )
        whole = (
            stream.num_shards >= ledger.parts
        )  # files, so that only one part downloads each; else every n-th document
        return (
            stream.shard(ledger.parts, ledger.index, False)
            if whole
            else split_dataset_by_node(stream, ledger.index, ledger.parts)
        )

    for row, place in read_stream(
        open_stream, notes['source'], notes['place'], () if files else WAITS, kept=KEPT
    ):
        if not isinstance(row.get('text'), str):
            raise UserError(f'{notes["source"]}: no field text in it, but {", ".join(row)}')
        yield row['text'], place


def link_token_files(ledger: Ledger, files: list[str]) -> None:
    """datatrove's token files as shards, the first for validation: hard links, or copies where the disk is another."""
    tokenizer = GPT2Tokenizer()
    n_bytes = np.array(
        [len(tokenizer.token_bytes(i)) * (i != tokenizer.eot) for i in range(tokenizer.vocab_size)]
    )
    for path in files:
        with open(path + '.metadata', encoding='utf-8') as f:
            name, _, width = f.readline().strip().rpartition('|')
        if width != '2':
            raise UserError(
                f'{path}: {width} bytes per token, as of {name}; expected 2: make it with tokenizer_name_or_path="gpt2"'
            )
    mine = files[ledger.index :: ledger.parts]
    for place in range(ledger.notes['place'] or 0, len(mine)):
        path, seen = mine[place], np.zeros(1 << 16, dtype=int)
        with open(path, 'rb') as f:
            while len(ids := np.fromfile(f, '<u2', 1 << 22)):
                seen += np.bincount(ids, minlength=1 << 16)
        documents, size = int(seen[tokenizer.eot]), int(seen[: tokenizer.vocab_size] @ n_bytes)
        if not documents or seen[tokenizer.vocab_size :].any():
            raise UserError(
                f"{path}: not GPT-2's tokens with {tokenizer.eot} behind each document; make it with eos_token='<|endoftext|>'"
            )
        if ledger.add_shard(
            lambda shard: link(path, shard), place + 1, documents, int(seen.sum()), size
        ):
            return


def link(path: str, shard: str) -> None:
    """Make `shard` the file at `path` without copying it, or a copy where disks cannot."""
    try:
        os.link(os.path.realpath(path), shard)
    except OSError:  # another disk, or one without links; or a kill came behind this very line
        with open(path, 'rb') as f:
            write_file(shard, f)


def write_file(path: str, content: Any) -> None:
    """`atomic_write`, whose folder may be absent. Raises UserError."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; {KEPT}') from None


if __name__ == '__main__':
    run(main)
