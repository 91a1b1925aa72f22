"""Documents in: files, encodings, JSON Lines, streams, downloads, and how documents are split and headed."""

import codecs
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from configurator import UserError

Piece = tuple[
    str, str, bool
]  # (split, text, does the document end here?): long documents come in several pieces
TEXT_FIELDS = (
    'text',
    'lyrics',
    'content',
)  # of a record, the first of these that is there holds its words
WAITS = (
    10,
    60,
    300,
)  # seconds before a broken stream is opened again; the libraries below have by then tried for minutes themselves


def atomic_write(path: str, content: Any) -> None:
    """Write bytes, or those of an open file, to `path`: whole or not at all, and on the disk to stay. Raises OSError."""
    with open(path + '.tmp', 'wb') as f:
        shutil.copyfileobj(content, f, 1 << 24) if hasattr(content, 'read') else f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)
    sync_folder(os.path.dirname(path) or '.')


def sync_folder(path: str) -> None:
    """Have the names in a folder reach the disk, where the system knows how."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def shown(path: str) -> str:
    """The path as seen from here, which is shorter; as it is if it lies on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return path


def find_files(
    paths: Iterable[str], suffixes: tuple[str, ...] = ('.txt', '.md', '.jsonl')
) -> list[str]:
    """The files named, and those with these suffixes in the folders named and below, in a fixed order.

    Raises UserError if there are none.
    """
    found = []
    for path in paths:
        if os.path.isfile(path):
            found.append(path)
        elif os.path.isdir(path):
            found += sorted(
                os.path.join(root, name)
                for root, _, names in os.walk(path)
                for name in names
                if name.lower().endswith(suffixes)
            )
        else:
            raise UserError(f'{path}: no such file or folder')
    if not found:
        raise UserError(
            f'{", ".join(paths) or "no input"}: no {", ".join(suffixes)} file to read; name files or folders (to prepare.py with --input=a.txt,songs/)'
        )
    return found


def read_documents(
    files: Iterable[str], encoding: str = '', text_field: str = ''
) -> Iterator[Iterator[str]]:
    """Each document's text in pieces: a file is one, but a .jsonl holds one a line, in `text_field` or the first of text, lyrics, content."""
    for path in files:
        if not path.lower().endswith('.jsonl'):
            yield read_pieces(path, encoding)
            continue
        for number, record in enumerate(read_jsonl(path, encoding), 1):
            name = text_field or next((k for k in TEXT_FIELDS if k in record), 'text')
            if not isinstance(record.get(name), str):
                raise UserError(
                    f'{path}, record {number}: no text in the field {name!r}; put it into one called text, or tell prepare.py another --text_field'
                )
            yield iter([record[name]])


def read_pieces(path: str, encoding: str = '') -> Iterator[str]:
    """A text file's text in pieces of whole lines, about 64,000 characters each; line ends become \\n.

    Without an `encoding` it is detected: UTF-8, UTF-16 with its mark, else charset-normalizer's guess.
    Raises UserError for an unknown encoding, or another one.
    """
    encoding = encoding or detect_encoding(path)
    try:
        with open(path, encoding=encoding) as text:
            while lines := text.readlines(1 << 16):
                yield ''.join(lines)
    except LookupError:
        raise UserError(f'encoding={encoding}: Python knows no such encoding') from None
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path}: is not all {encoding} ({error.reason}); save it as UTF-8, or tell prepare.py its encoding, as in --encoding=cp1252'
        ) from None


def detect_encoding(path: str) -> str:
    """The encoding that the file's first megabyte speaks for. Raises UserError if none does."""
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
            f'{path}: its encoding could not be detected; save it as UTF-8, or tell prepare.py its encoding, as in --encoding=cp1252'
        )
    return best.encoding


def read_jsonl(path: str, encoding: str = '') -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file. Raises UserError that names the line for anything else."""
    number = 0
    for piece in read_pieces(path, encoding):
        for line in piece.removesuffix('\n').split(
            '\n'
        ):  # not splitlines(): JSON may hold U+2028 and its like unescaped
            number += 1
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f'{path}, line {number}: not JSON ({error.msg})') from None
                if not isinstance(record, dict):
                    raise UserError(
                        f'{path}, line {number}: expected an object, as in {{"text": "…"}}'
                    )
                yield record


def read_stream(
    open_stream: Callable[[], Any],
    source: str,
    place: Any = None,
    waits: Sequence[float] = WAITS,
    hint: str = '',
    kept: str = '',
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, place behind it) of a streamed dataset of the `datasets` library; a stream opened at that place goes on with the next row.

    One that breaks is opened again where it broke, after each of `waits` seconds; so is none that never gave a row. Raises UserError
    that tells the library's reason, then `kept` if there was a row, else `hint`; one that `open_stream` raises is passed on.
    """
    left: Iterator[float] = iter(())
    while True:
        try:
            stream = open_stream()
            if place:
                stream.load_state_dict(place)
            for row in stream:
                place, left = stream.state_dict(), iter(waits)
                yield row, place
            return
        except UserError:
            raise
        except Exception as error:  # the libraries raise many kinds, and any can be the network's
            reason = f'{source} cannot be read ({type(error).__name__}: {" ".join(str(error).split())[:200]})'
        if not (wait := next(left, 0)):
            raise UserError(
                '; '.join(
                    filter(
                        None,
                        [
                            reason,
                            place and kept or hint or 'look to the name, the files, the network',
                        ],
                    )
                )
            )
        print(f'{reason}; trying again in {wait} s', file=sys.stderr)
        time.sleep(wait)


def download(url: str, path: str, sha256: str | None = None, offline: bool = False) -> str:
    """Fetch `url` to `path` unless it is there: resumed where it broke off, checked, and renamed when whole; returns `path`.

    Raises UserError, which says where to put the file by hand, when offline, unreachable or damaged.
    """
    by_hand = f'get {url} by hand and put it at {path}, or name your copy with --input=FILE'
    if os.path.exists(path):
        return path
    if offline:
        raise UserError(f'{path} is not there and nothing is downloaded now: {by_hand}')
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    part = path + '.part'
    try:
        with requests.Session() as session:
            session.mount(
                'https://',
                HTTPAdapter(
                    max_retries=Retry(
                        3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504)
                    )
                ),
            )
            have = os.path.getsize(part) if os.path.exists(part) else 0
            with session.get(
                url, stream=True, timeout=30, headers={'Range': f'bytes={have}-'} if have else {}
            ) as answer:
                if answer.status_code != 416:  # 416: the part was already whole
                    answer.raise_for_status()
                    have *= answer.status_code == 206  # else the server sends all of it again
                    left = int(answer.headers.get('Content-Length', 0))
                    with (
                        open(part, 'ab' if have else 'wb') as f,
                        tqdm(
                            total=have + left or None,
                            initial=have,
                            unit='B',
                            unit_scale=True,
                            desc=os.path.basename(path),
                            disable=None,
                        ) as bar,
                    ):
                        for chunk in answer.iter_content(1 << 16):
                            f.write(chunk)
                            bar.update(len(chunk))
    except requests.RequestException as error:
        raise UserError(f'{url} could not be fetched ({type(error).__name__}): {by_hand}') from None
    if sha256:
        with open(part, 'rb') as f:
            if (digest := hashlib.sha256(f.read()).hexdigest()) != sha256:
                os.remove(part)
                raise UserError(
                    f'{url} came damaged (sha256 {digest}, expected {sha256}): try again, or {by_hand}'
                )
    os.replace(part, path)
    return path


def pick_split(key: str, val_fraction: float, seed: int = 1337) -> str:
    """'train' or 'val' by a hash of the document's text: no text is in both, and a growing corpus keeps its split."""
    digest = hashlib.blake2b(
        key.encode('utf-8', 'surrogatepass'), digest_size=8, key=str(seed).encode()
    ).digest()
    return 'val' if int.from_bytes(digest, 'little') < val_fraction * 2**64 else 'train'


def split_text(pieces: Iterable[str], total: int, val_fraction: float) -> Iterator[Piece]:
    """One long text of `total` characters, given in pieces: its first part for training, its last for validation."""
    border, seen = int(total * (1 - val_fraction)), 0
    for text in pieces:
        cut = min(max(border - seen, 0), len(text))
        seen += len(text)
        if cut:
            yield 'train', text[:cut], seen - len(text) + cut == border
        if text[cut:]:
            yield 'val', text[cut:], seen == total


def song_header(
    artist: str = '', album: str = '', year: str | int | None = '', title: str = ''
) -> str:
    """The lines that stand before a song's words, and begin a prompt for one; what is not known is left out."""
    lines = [
        f'{name}: {value}\n'
        for name, value in (('Artist', artist), ('Album', album), ('Year', year), ('Title', title))
        if value
    ]
    return ''.join(lines) + ('\n' if title else '')
