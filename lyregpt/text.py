"""Documents in: files, encodings, JSON Lines, streamed datasets, downloads.

A corpus may be larger than memory. So documents come as iterators, and a long one in several
pieces. `pick_split` and `split_text` divide documents into training and validation text.
"""

import codecs
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from configurator import UserError

# (split, text, does the document end here?): a long document comes in several pieces
Piece = tuple[str, str, bool]

ENCODING_HINT = ', or tell prepare.py its encoding, as in --encoding=cp1252'

# The text of a JSON record is in the first of these fields that it has.
TEXT_FIELDS = ('text', 'lyrics', 'content')

# Seconds to wait before a broken stream is opened again. By then, the library that reads it has
# retried for minutes itself.
WAITS = (10, 60, 300)

SHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
)
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


# -----------------------------------------------------------------------------
# Files


def atomic_write(path: str, content: Any) -> None:
    """Write bytes, or those of an open file, to `path` completely or not at all, and sync it.

    Raises OSError.
    """
    with open(path + '.tmp', 'wb') as f:
        if hasattr(content, 'read'):
            shutil.copyfileobj(content, f, 1 << 24)
        else:
            f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)
    sync_folder(os.path.dirname(path) or '.')


def sync_folder(path: str) -> None:
    """Write a folder's entries to the disk, on systems that can."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def shown(path: str) -> str:
    """The path relative to the current directory; unchanged if it is on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return path


def find_files(
    paths: Iterable[str], suffixes: tuple[str, ...] = ('.txt', '.md', '.jsonl')
) -> list[str]:
    """The files among `paths`, and those with these suffixes below its folders, in a fixed order.

    Raises UserError if there are none.
    """
    found = []
    for path in paths:
        if os.path.isfile(path):
            found.append(path)
        elif os.path.isdir(path):
            below = [os.path.join(root, name) for root, _, names in os.walk(path) for name in names]
            found += sorted(file for file in below if file.lower().endswith(suffixes))
        else:
            raise UserError(f'{path}: no such file or folder')
    if not found:
        raise UserError(
            f'{", ".join(paths) or "no input"}: no {", ".join(suffixes)} file to read; '
            'name files or folders (to prepare.py with --input=a.txt,songs/)'
        )
    return found


# -----------------------------------------------------------------------------
# Documents


def read_documents(
    files: Iterable[str], encoding: str = '', text_field: str = ''
) -> Iterator[Iterator[str]]:
    """Each document's text in pieces. A file is a document; in a .jsonl, each line is one.

    The text of a line is in `text_field`, by default the first of text, lyrics and content.
    """
    for path in files:
        if path.lower().endswith('.jsonl'):
            for number, record in enumerate(read_jsonl(path, encoding), 1):
                name = text_field or next((k for k in TEXT_FIELDS if k in record), 'text')
                if not isinstance(record.get(name), str):
                    raise UserError(
                        f'{path}, record {number}: no text in the field {name!r}; put it into '
                        'one called text, or tell prepare.py another --text_field'
                    )
                yield iter([record[name]])
        else:
            yield read_pieces(path, encoding)


def read_pieces(path: str, encoding: str = '') -> Iterator[str]:
    """A text file's text in pieces of whole lines, about 64,000 characters each; newlines are \\n.

    Without an `encoding`, it is detected: UTF-8, UTF-16 with a byte order mark, else what
    charset-normalizer says. Raises UserError if the encoding is unknown or does not fit.
    """
    hint = ''
    if not encoding:
        encoding, hint = detect_encoding(path), ENCODING_HINT
    try:
        with open(path, encoding=encoding) as f:
            for lines in iter(lambda: f.readlines(1 << 16), []):
                yield ''.join(lines)
    except LookupError:
        raise UserError(f'encoding={encoding}: unknown encoding') from None
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not valid {encoding} ({error.reason}); save it as UTF-8{hint}'
        ) from None


def detect_encoding(path: str) -> str:
    """The encoding of the file's first megabyte. Raises UserError if it cannot be detected."""
    with open(path, 'rb') as f:
        sample = f.read(1 << 20)
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 'utf-16'
    try:
        codecs.getincrementaldecoder('utf-8')().decode(sample)
        return 'utf-8-sig'
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes
    best = from_bytes(sample).best()
    if best is None:
        raise UserError(
            f'{path}: its encoding could not be detected; save it as UTF-8{ENCODING_HINT}'
        )
    return best.encoding


def read_jsonl(path: str, encoding: str = '') -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. Raises UserError that names a line that is none."""
    # not splitlines(): JSON may hold U+2028 and similar characters unescaped
    lines = (
        line
        for piece in read_pieces(path, encoding)
        for line in piece.removesuffix('\n').split('\n')
    )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f'{path}, line {number}: not JSON ({error.msg})') from None
        if not isinstance(record, dict):
            raise UserError(f'{path}, line {number}: expected an object, as in {{"text": "…"}}')
        yield record


def song_header(
    artist: str = '', album: str = '', year: str | int | None = '', title: str = ''
) -> str:
    """The lines before a song's lyrics, which also begin a prompt; unknown fields are left out."""
    fields = {'Artist': artist, 'Album': album, 'Year': year, 'Title': title}
    header = ''.join(f'{name}: {value}\n' for name, value in fields.items() if value)
    if title:
        header += '\n'
    return header


# -----------------------------------------------------------------------------
# Training and validation


def check_fraction(name: str, fraction: float) -> None:
    """Raises ValueError unless 0 < fraction < 1."""
    if not 0 < fraction < 1:
        raise ValueError(f'{name}={fraction}: expected a fraction between 0 and 1, as in 0.1')


def pick_split(key: str, val_fraction: float, seed: int = 1337) -> str:
    """'train' or 'val', by a hash of the document's text.

    So no text is in both splits, and documents stay in their split when the corpus grows.
    """
    text = key.encode('utf-8', 'surrogatepass')
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    if int.from_bytes(digest, 'little') < val_fraction * 2**64:
        return 'val'
    return 'train'


def split_text(pieces: Iterable[str], total: int, val_fraction: float) -> Iterator[Piece]:
    """Split a text of `total` characters: its first part for training, the rest for validation."""
    border = int(total * (1 - val_fraction))
    seen = 0
    for text in pieces:
        cut = min(max(border - seen, 0), len(text))
        if cut:
            yield 'train', text[:cut], seen + cut == border
        seen += len(text)
        if cut < len(text):
            yield 'val', text[cut:], seen == total


# -----------------------------------------------------------------------------
# Network


def datasets_library(otherwise: str = '') -> Any:
    """The `datasets` library, which is optional. Raises UserError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'this is read by the datasets library: pip install datasets{otherwise}'
        ) from None
    return datasets


def read_stream(
    open_stream: Callable[[], Any],
    source: str,
    position: Any = None,
    waits: Sequence[float] = WAITS,
    hint: str = 'check the name, the files and the network',
    kept: str = '',
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, position after it) of a streamed dataset of the `datasets` library.

    A stream opened at that position continues with the next row. A stream that breaks after a row
    is opened again where it broke, after each of `waits` seconds. Raises UserError with the
    library's reason and a hint: `kept` if there is a position to continue at, else `hint`. A
    UserError that `open_stream` raises is passed on.
    """
    waits_left: list[float] = []  # no retries before the first row: the name may be wrong
    while True:
        try:
            stream = open_stream()
            if position:
                stream.load_state_dict(position)
            for row in stream:
                position = stream.state_dict()
                waits_left = list(waits)
                yield row, position
            return
        except UserError:
            raise
        except Exception as error:  # the libraries raise many kinds, any may mean the network
            message = ' '.join(str(error).split())[:200]
            reason = f'{source} cannot be read ({type(error).__name__}: {message})'
        if not waits_left:
            if position and kept:
                hint = kept
            raise UserError(f'{reason}; {hint}')
        wait = waits_left.pop(0)
        print(f'{reason}; trying again in {wait} s', file=sys.stderr)
        time.sleep(wait)


def download(url: str, path: str, sha256: str, offline: bool = False) -> str:
    """Download `url` to `path` unless it exists; returns `path`.

    Raises UserError, which says where to put the file by hand, if it is offline, unreachable or
    damaged; nothing is then written.
    """
    if os.path.exists(path):
        return path
    by_hand = f'get {url} by hand and put it at {path}, or name your copy with --input=FILE'
    if offline:
        raise UserError(f'{path} is not there and nothing is downloaded now: {by_hand}')
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    try:
        with requests.Session() as session:
            session.mount('https://', HTTPAdapter(max_retries=retry))
            answer = session.get(url, timeout=30)
            answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f'{url} could not be fetched ({type(error).__name__}): {by_hand}') from None
    digest = hashlib.sha256(answer.content).hexdigest()
    if digest != sha256:
        raise UserError(
            f'{url} is corrupt (sha256 {digest}, expected {sha256}): try again, or {by_hand}'
        )
    atomic_write(path, answer.content)
    return path


def tiny_shakespeare(folder: str, offline: bool = False) -> str:
    """The path of Tiny Shakespeare in `folder`, where it is downloaded to. Raises UserError."""
    path = os.path.join(folder, 'input.txt')
    return download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, offline)
