"""The Python sources on this machine → train.bin, val.bin and meta.json: the standard library and the installed packages. Nothing is downloaded.

python data/code/prepare.py
python data/code/prepare.py --input=my_project/,lib/thing.py --out_dir=data/my_code     (other folders and files)
"""

import hashlib
import os
import re
import sys
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', '..'))
from configurator import UserError, configure, run  # noqa: E402
from lyregpt.dataset import write_dataset  # noqa: E402
from lyregpt.text import Piece, find_files, shown  # noqa: E402
from lyregpt.tokenizer import choose_tokenizer  # noqa: E402

NOT_THEIRS = {
    'site-packages',
    'dist-packages',
    '_vendor',
    'vendor',
    '_vendored',
    'vendored',
    'third_party',
    'extern',
}  # copies of other packages
SHARE = 50  # no package gives more than this part of the whole: the large ones would leave no room for the many


@dataclass
class PrepareConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    input: list[str] | None = (
        None  # folders and .py files instead, as in --input=my_project/,thing.py
    )
    out_dir: str = shown(HERE)  # where the token files go; data/NAME makes it --dataset=NAME
    max_bytes: int = 20_000_000  # take so much at most
    tokenizer: str = 'bpe'  # bpe or wordpiece (trained on these sources), char, gpt2, or a tokenizer.json or meta.json to use again
    vocab_size: int = (
        4096  # for bpe and wordpiece: enough for the common names, and small beside a small model
    )
    val_fraction: float = 0.1  # share kept for validation: whole packages, or single files if there are fewer than 20 packages
    seed: int = 1337  # of the order in which packages and files are taken
    offline: bool = False  # download nothing (this script never does, but for GPT-2's tokens)

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f'val_fraction={self.val_fraction}: expected a share between 0 and 1')
        if self.max_bytes < 1:
            raise ValueError(f'max_bytes={self.max_bytes}: expected at least 1')


def main() -> None:
    """Write the token files."""
    config = configure(PrepareConfig, description=(__doc__ or '').split('\n')[0])
    paths = sysconfig.get_paths()
    roots = config.input or list(
        dict.fromkeys(
            p for p in (paths['stdlib'], paths['purelib'], paths['platlib']) if os.path.isdir(p)
        )
    )
    files = choose_files(group_files(roots), config.max_bytes, config.seed)
    wanted = config.val_fraction * sum(size for _, sizes in files for _, size in sizes)

    def pieces() -> Iterator[Piece]:
        seen = 0  # bytes of the packages before: the first ones are kept for validation, until they are enough
        for _, sizes in files:
            for path, _ in sizes:
                yield 'val' if seen < wanted else 'train', read_source(path), True
            seen += sum(size for _, size in sizes)

    tokenizer = choose_tokenizer(
        config.tokenizer, (text for _, text, _ in pieces()), config.vocab_size
    )
    source = (
        ', '.join(config.input)
        if config.input
        else f'Python {sys.version.split()[0]} and its installed packages'
    )
    write_dataset(config.out_dir, pieces(), tokenizer, source=source)


def group_files(roots: list[str]) -> dict[str, list[tuple[str, str]]]:
    """(name within its root, path) of the .py files, by package: the first folder below a root, or the file if it stands alone there."""
    found = defaultdict(list)
    for root in roots:
        for path in find_files([root], ('.py',)):
            parts = os.path.relpath(
                path, root if os.path.isdir(root) else os.path.dirname(path)
            ).split(os.sep)
            if path.endswith('.py') and not NOT_THEIRS & set(parts[:-1]):
                found[parts[0].removesuffix('.py')].append(('/'.join(parts), path))
    if len(found) < 20:  # numbered, for files of two roots may have one name
        return {
            f'{package} {number}': [file]
            for package, files in found.items()
            for number, file in enumerate(files)
        }
    return found


def choose_files(
    groups: dict[str, list[tuple[str, str]]], max_bytes: int, seed: int
) -> list[tuple[str, list[tuple[str, int]]]]:
    """(package, [(path, bytes)]) in an order drawn by the seed, `max_bytes` at most in all; what `read_source` refuses, and copies, are left out.

    The order depends on names alone, so the same machine gives the same dataset. Raises UserError if nothing is left.
    """

    def drawn(name: str) -> bytes:
        return hashlib.blake2b(
            name.encode('utf-8', 'surrogatepass'), key=str(seed).encode()
        ).digest()

    chosen, seen, total = [], set(), 0
    for package in sorted(groups, key=drawn):
        files, room = [], max_bytes if len(groups[package]) == 1 else max_bytes // SHARE
        for _, path in sorted(groups[package], key=lambda file: drawn(file[0])):
            size = os.path.getsize(path)
            if (
                size <= min(room, max_bytes - total)
                and (text := read_source(path))
                and (digest := drawn(text)) not in seen
            ):
                seen.add(digest)
                files.append((path, size))
                room, total = room - size, total + size
        if files:
            chosen.append((package, files))
    if not chosen:
        raise UserError(
            f'no Python source of use below max_bytes={max_bytes:,}: see data/code/readme.md for what is left out'
        )
    return chosen


def read_source(path: str) -> str:
    """The text of a Python file in the encoding that it declares, line ends as \\n; '' if it cannot be read, is blank, or nobody wrote it.

    Lines of over 1,000 characters, or of over 100 on average, speak of tables and generated code (Chen et al., "Evaluating Large Language
    Models Trained on Code", 2021, section 3.1).
    """
    try:
        with tokenize.open(path) as f:
            text = f.read()
    except (
        SyntaxError,
        UnicodeDecodeError,
        OSError,
    ):  # an unknown or a wrong encoding; a file that is not ours to read
        return ''
    lengths = [len(line) for line in text.splitlines()] or [0]
    return (
        text
        if re.search(r'\S', text) and max(lengths) <= 1000 and sum(lengths) <= 100 * len(lengths)
        else ''
    )


if __name__ == '__main__':
    run(main)
