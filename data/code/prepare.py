"""The Python sources on this machine → a dataset: the standard library and installed packages.

python data/code/prepare.py                                       (nothing is downloaded)
python data/code/prepare.py --input=my_project/,lib/thing.py --out_dir=data/my_code
"""

import hashlib
import os
import sys
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run
from lyregpt.dataset import write_dataset
from lyregpt.text import Piece, check_fraction, find_files, shown
from lyregpt.tokenizer import choose_tokenizer

# folders with copies of other packages
COPIES = set(
    'site-packages dist-packages _vendor vendor _vendored vendored third_party extern'.split()
)
# No package gives more than this part of the whole: a few large ones would leave no room.
LARGEST_PART = 50

Groups = dict[str, list[tuple[str, str]]]  # package: (name below its root, path) of its files
Package = list[tuple[str, int]]  # path and bytes of its files


@dataclass
class PrepareConfig:
    input: list[str] | None = None  # other folders and .py files, as in --input=my_project/,a.py
    out_dir: str = shown(HERE)  # where the token files go; data/NAME makes it --dataset=NAME
    max_bytes: int = 20_000_000  # at most so much source
    tokenizer: str = 'bpe'  # bpe or wordpiece (trained on these sources), char or gpt2,
    # or a tokenizer.json or meta.json
    vocab_size: int = 4096  # for bpe and wordpiece: enough for common names in a small model
    val_fraction: float = 0.1  # fraction kept for validation: whole packages, or single files if
    # there are fewer than 20 packages
    seed: int = 1337  # of the order in which packages and files are taken
    offline: bool = False  # download nothing (this script never does, except for GPT-2's tokens)

    def __post_init__(self) -> None:
        check_fraction('val_fraction', self.val_fraction)
        if self.max_bytes < 1:
            raise ValueError(f'max_bytes={self.max_bytes}: expected at least 1')


def main() -> None:
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    roots = config.input
    described = ', '.join(roots or [])
    if not roots:
        paths = [sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')]
        roots = list(dict.fromkeys(path for path in paths if os.path.isdir(path)))
        described = f'Python {sys.version.split()[0]} and its installed packages'
    packages = choose_files(group_files(roots), config.max_bytes, config.seed)
    tokenizer = choose_tokenizer(
        config.tokenizer,
        (text for _, text, _ in pieces(packages, config.val_fraction)),
        config.vocab_size,
    )
    sources = pieces(packages, config.val_fraction)
    write_dataset(config.out_dir, sources, tokenizer, source=described)


def pieces(packages: list[Package], val_fraction: float) -> Iterator[Piece]:
    """The sources; the first packages are for validation, until they are enough."""
    total = sum(size for files in packages for _, size in files)
    seen = 0
    for files in packages:
        split = 'val' if seen < val_fraction * total else 'train'
        for path, size in files:
            yield split, read_source(path), True
            seen += size


def group_files(roots: list[str]) -> Groups:
    """The .py files by package: the first folder below a root, or a file that is alone there.

    If there are fewer than 20 packages, each file is one.
    """
    found: Groups = defaultdict(list)
    for root in roots:
        base = root if os.path.isdir(root) else os.path.dirname(root)
        for path in find_files([root], ('.py',)):
            parts = os.path.relpath(path, base).split(os.sep)
            if path.endswith('.py') and not COPIES & set(parts[:-1]):
                found[parts[0].removesuffix('.py')].append(('/'.join(parts), path))
    if len(found) >= 20:
        return found
    return {  # numbered, for files of two roots may have the same name
        f'{package} {number}': [file]
        for package, files in found.items()
        for number, file in enumerate(files)
    }


def choose_files(groups: Groups, max_bytes: int, seed: int) -> list[Package]:
    """The files to take, in an order drawn from the seed, at most `max_bytes` in all.

    Copies, and what `read_source` refuses, are left out. The order depends on names alone, so the
    same machine gives the same dataset. Raises UserError if nothing is left.
    """
    chosen: list[Package] = []
    seen, total = {keyed_hash('', seed)}, 0
    for package in sorted(groups, key=lambda name: keyed_hash(name, seed)):
        files: Package = []
        left = max_bytes if len(groups[package]) == 1 else max_bytes // LARGEST_PART
        for _, path in sorted(groups[package], key=lambda file: keyed_hash(file[0], seed)):
            size = os.path.getsize(path)
            if size <= min(left, max_bytes - total):
                text = read_source(path)
                digest = keyed_hash(text, seed)
                if digest not in seen:
                    seen.add(digest)
                    files.append((path, size))
                    left -= size
                    total += size
        if files:
            chosen.append(files)
    if not chosen:
        raise UserError(
            f'no Python source of use below max_bytes={max_bytes:,}: see data/code/readme.md for '
            'what is left out'
        )
    return chosen


def keyed_hash(text: str, seed: int) -> bytes:
    """A hash of the text and the seed."""
    return hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), key=str(seed).encode()).digest()


def read_source(path: str) -> str:
    r"""The text of a Python file, in the encoding that it declares, with \n as newlines.

    '' if it cannot be read, is blank, or was probably not written by a person: lines of over 1,000
    characters, or of over 100 on average, indicate tables and generated code (Chen et al.,
    "Evaluating Large Language Models Trained on Code", 2021, section 3.1).
    """
    try:
        with tokenize.open(path) as f:
            text = f.read()
    except (SyntaxError, UnicodeDecodeError, OSError):  # an unknown or wrong encoding, no access
        return ''
    lengths = [len(line) for line in text.splitlines()]
    written = text.strip() and max(lengths) <= 1000 and sum(lengths) <= 100 * len(lengths)
    return text if written else ''


if __name__ == '__main__':
    run(main)
