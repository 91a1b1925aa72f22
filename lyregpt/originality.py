"""Is a generated line new? Every run of words that a text shares with the training split, found exactly.

    python -m lyregpt originality --dataset=darklyrics                               (builds the index; the others do so when they need it)
    python -m lyregpt originality --dataset=darklyrics --text="the rain came down"
    python -m lyregpt originality --dataset=darklyrics --file=my_song.txt

A word is a run of letters and digits with the marks on them and inner apostrophes, casefolded, ’ taken as ', é the same in one
character or two. Line breaks and punctuation do not matter. Scripts without blanks between words (Chinese, Japanese, Thai) are not
cut: what stands between two blanks or stops there is one word, so that copying is found in whole phrases only. Lines that begin
`Artist:`, `Album:`, `Year:` or `Title:` are a song's head and hold no words. No run crosses documents.
"""

import bisect
import codecs
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure, run
from lyregpt.dataset import TokenFile, folder_of, read_tokenizer, token_files
from lyregpt.tokenizer import Tokenizer

MARKS = re.compile(
    '['
    + ''.join(
        chr(i)
        for i in [*range(0x300, 0x20000), *range(0xE0100, 0xE01F0)]
        if unicodedata.category(chr(i)) in ('Mn', 'Mc')
    )
    + ']+'
)
WORD = re.compile(
    rf"[^\W_]+(?:['’][^\W_]+|(?=[^\0-\u02ff]){MARKS.pattern}[^\W_]*)*"
)  # the glance ahead spares looking most marks up
HEAD = re.compile(r'^(artist|album|year|title):(.*)', re.I | re.M)
DOCUMENT_END = b'\n\xff\n'  # a byte that UTF-8 never holds
FORMAT = 2  # of the index; another number, and it is built again


@dataclass
class OriginalityConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    dataset: str = 'openwebtext'  # a folder, or a name under data/
    text: str = ''  # the words to check
    file: str = ''  # … or a UTF-8 text file of them
    n: int = 5  # report runs of at least so many words

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f'n={self.n}: expected at least 1 word')
        if self.text and self.file:
            raise ValueError('text and file are both given: one text is checked at a time')


@dataclass
class Originality:
    """What a text shares with the training split."""

    words: int  # how many were judged
    longest: int  # words of the longest run that stands there word for word
    text: str  # that run, as it stands in the text
    song: (
        str  # the first document that holds it: "Artist: Title", or "document 17: its first words…"
    )
    share: (
        float | None
    )  # of the text's runs of n words, those that stand there; None: it has no run of n words
    n: int
    runs: list[
        dict[str, Any]
    ]  # all runs of n words and more that cannot be made longer: start, end (characters), words, song

    def __str__(self) -> str:
        if not self.words:
            return 'originality: there are no words in it'
        if not self.longest:
            return 'originality: not one of its words is in the training split'
        return (
            f'originality: {self.longest} word{"s" * (self.longest > 1)} in a row from "{self.song}" ("{brief(self.text, 60)}")'
            + (
                ''
                if self.share is None
                else f'; {self.share:.0%} of its {self.n}-word runs are in the training split'
            )
        )


def brief(text: str, most: int) -> str:
    """The text on one line of `most` characters at most."""
    words = ' '.join(text.split())
    return words if len(words) <= most else words[: most - 3] + '...'


def find_words(text: str) -> Iterator[re.Match[str]]:
    """The words of a text with their places; the lines of its head are passed over."""
    return WORD.finditer(HEAD.sub(lambda head: ' ' * len(head[0]), text))


def fold(text: str) -> str:
    """Words as they are compared: equal for all ways to write the same letters."""
    return unicodedata.normalize(
        'NFC', unicodedata.normalize('NFD', text).casefold().replace('’', "'")
    )


# -----------------------------------------------------------------------------
# The index


class Index:
    """The words of a dataset's training split, as 32-bit ids with a 0 behind each document, and their suffix array, memory-mapped.

    `document_end` is what a document's end is in a text that the dataset's tokenizer wrote. Raises OSError, ValueError or EOFError if the
    folder does not hold a whole index.
    """

    def __init__(self, path: str, document_end: str = ''):
        self.document_end = document_end
        self.words, self.suffixes, self.starts, self.documents = (
            np.load(os.path.join(path, f'{name}.npy'), mmap_mode='r')
            for name in ('words', 'suffixes', 'starts', 'documents')
        )
        texts = []
        for name in 'vocabulary', 'songs':
            with open(os.path.join(path, f'{name}.txt'), encoding='utf-8') as f:
                *lines, last = f.read().split('\n')
                texts.append(lines if not last else [])
        self.vocabulary, self.songs = ['', *texts[0]], texts[1]
        if (len(self.suffixes), len(self.starts), len(self.songs)) != (
            len(self.words),
            len(self.vocabulary) + 3,
            len(self.documents),
        ):
            raise ValueError(f'{path}: the files do not belong together')
        self.ids = {word: i for i, word in enumerate(self.vocabulary)}
        # memoryviews: a number of theirs costs a quarter of numpy's
        self._bytes, self._suffixes, self._starts = (
            memoryview(self.words.view(np.uint8)),
            memoryview(self.suffixes),
            memoryview(self.starts),
        )

    @classmethod
    def open(cls, folder: str) -> 'Index':
        """The index of the dataset in `folder`, built first if it is not there or the dataset is another one since.

        Raises UserError if there is no training split, it is too large, or the index cannot be written.
        """
        files, tokenizer = token_files(folder, 'train'), read_tokenizer(folder)
        stats = [(os.path.basename(file), os.stat(file)) for file in files]
        key = [
            FORMAT,
            [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            tokenizer.state(),
        ]
        path = os.path.join(
            folder,
            'originality-'
            + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12],
        )

        def opened() -> Index | None:
            try:
                return cls(path, '' if tokenizer.eot is None else tokenizer.decode([tokenizer.eot]))
            except (OSError, ValueError, EOFError):  # none, or not whole
                return None

        if index := opened():
            return index
        part = ''
        try:
            part = tempfile.mkdtemp(prefix='originality.', suffix='.tmp', dir=folder)
            new = os.path.join(part, 'index')  # mkdtemp's own folder is closed to others
            os.mkdir(new)
            build(files, tokenizer, new)
            try:
                os.rename(new, path)
            except OSError:  # there is one: by somebody who was faster, or not whole
                if index := opened():
                    return index
                shutil.rmtree(path, ignore_errors=True)
                os.rename(new, path)
        except OSError as error:
            raise UserError(
                f'{error.filename or path}: the index of the training split cannot be written: {error.strerror or error}'
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        remove_others(folder, os.path.basename(path))
        if index := opened():
            return index
        raise UserError(f'{path}: the index of the training split, just written, cannot be read')

    def find(self, query: bytes) -> tuple[int, int]:
        """The places in the suffix array at which the words (32-bit ids, big-endian, not empty) stand: the first and the one behind the last."""
        first = int.from_bytes(query[:4], 'big')

        def begin(at: int) -> bytes:
            return bytes(self._bytes[4 * at : 4 * at + len(query)])

        low = bisect.bisect_left(
            self._suffixes, query, self._starts[first], self._starts[first + 1], key=begin
        )
        return low, bisect.bisect_right(
            self._suffixes, query, low, self._starts[first + 1], key=begin
        )

    def encode(self, words: Sequence[str]) -> bytes:
        """Folded words as `find` wants them; one that the split lacks gets an id that stands nowhere."""
        return np.array(
            [self.ids.get(word, len(self.vocabulary)) for word in words], dtype='>u4'
        ).tobytes()

    def song(self, low: int, high: int) -> str:
        """The first document among those that these places of the suffix array lie in."""
        return self.songs[
            int(np.searchsorted(self.documents, self.suffixes[low:high].min(), side='right')) - 1
        ]

    def following(self, words: Sequence[str]) -> list[str]:
        """The folded words that stand behind `words` anywhere in the split."""
        low, high = self.find(self.encode(words))
        after = self.words[self.suffixes[low:high].astype(np.int64) + len(words)]
        new = after != np.concatenate(
            [[0], after[:-1]]
        )  # sorted, as suffixes are; 0 is a document's end
        return [self.vocabulary[i] for i in after[new].tolist()]

    def compare(self, text: str, n: int = 5, since: int = 0) -> Originality:
        """What `text` shares with the split: each run of words is found where it is longest, and none is missed.

        Behind a prompt of `since` characters, what ends in the prompt does not count; what begins there and ends in what was written does.
        All offsets are those of `text`.
        """
        spans, words, offset, judged, grams = list[tuple[int, int]](), list[str](), 0, 0, 0
        for document in text.split(self.document_end) if self.document_end else [text]:
            begin = len(words)
            for match in find_words(document):
                spans.append((offset + match.start(), offset + match.end()))
                words.append(fold(match[0]))
            judged += sum(end > since for _, end in spans[begin:])
            grams += sum(end > since for _, end in spans[begin + n - 1 :])
            offset += len(document) + len(self.document_end)
            spans.append((offset, offset))
            words.append('\n')  # stands nowhere
        query, end, found, known = self.encode(words), 0, [], 0
        for i in range(len(words)):
            before = end = max(end, i)
            while end < len(words):
                low, high = self.find(query[4 * i : 4 * (end + 1)])
                if low == high:
                    break
                at, end = self._suffixes[low] + end - i + 1, end + 1
                while (
                    end < len(words)
                    and self._bytes[4 * at : 4 * at + 4] == query[4 * end : 4 * end + 4]
                ):  # on along this place
                    at, end = at + 1, end + 1
            if (
                end > before and spans[end - 1][1] > since
            ):  # else what begins here is the end of an earlier run
                found.append((i, end))
            known += end - i >= n and spans[i + n - 1][1] > since
        most = max(found, key=lambda run: run[1] - run[0], default=None)

        def described(i: int, end: int) -> dict[str, Any]:
            song = self.song(*self.find(query[4 * i : 4 * end]))
            return {'start': spans[i][0], 'end': spans[end - 1][1], 'words': end - i, 'song': song}

        best: dict[str, Any] = (
            described(*most) if most else {'start': 0, 'end': 0, 'words': 0, 'song': ''}
        )
        runs = [described(i, end) for i, end in found if end - i >= n]
        return Originality(
            judged,
            best['words'],
            text[best['start'] : best['end']],
            best['song'],
            known / grams if grams else None,
            n,
            runs,
        )


def remove_others(folder: str, name: str) -> None:
    """Remove a dataset's indexes but the one called `name`, and what builders that were killed left more than a day ago, as far as possible."""
    for other in os.listdir(folder):
        path = os.path.join(folder, other)
        try:
            left = (
                re.fullmatch(r'originality\..*\.tmp', other)
                and os.stat(path).st_mtime < time.time() - 86400
            )
        except OSError:  # gone
            continue
        if left or other != name and re.fullmatch('originality-[0-9a-f]{12}', other):
            shutil.rmtree(path, ignore_errors=True)


def build(files: list[str], tokenizer: Tokenizer, path: str) -> None:
    """Write the index of token files into the folder `path`. Raises UserError if there are too many words."""
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    if tokenizer.eot is not None:
        pieces[tokenizer.eot] = DOCUMENT_END
    ids: dict[str, int] = defaultdict(count(1).__next__)
    words, documents, songs, ended = array('I'), array('q'), list[str](), True
    for text in read_text(files, pieces):
        for i, document in enumerate(text.split('\udcff')):
            if i and not ended:
                words.append(0)
                ended = True
            if document.strip():
                if ended:
                    documents.append(len(words))
                    songs.append(label(document, len(songs) + 1))
                    ended = False
                words.extend(
                    map(
                        ids.__getitem__,
                        fold(' '.join(WORD.findall(HEAD.sub('', document)))).split(),
                    )
                )
        if len(words) * word_bytes(len(ids)) >= 2**31:
            raise UserError(
                f'{files[0]}: {len(words):,} words and more are too many to index: their ids must fit 2 GB'
            )
    words.append(0)
    array_ = np.frombuffer(words, dtype=np.uint32)
    print(f'sorting the places of {len(words):,} words', file=sys.stderr, flush=True)
    made: dict[str, np.ndarray | bytes] = {
        'words.npy': array_.astype('>u4'),  # big-endian: their bytes compare as they do
        'starts.npy': np.concatenate([[0], np.cumsum(np.bincount(array_, minlength=len(ids) + 3))]),
        'documents.npy': np.array(documents),
        'suffixes.npy': sort_suffixes(array_),
        'vocabulary.txt': ''.join(f'{word}\n' for word in ids).encode(),
        'songs.txt': ''.join(f'{song}\n' for song in songs).encode(),
    }
    for name, content in made.items():
        with open(os.path.join(path, name), 'wb') as f:
            f.write(content) if isinstance(content, bytes) else np.save(f, content)
            f.flush()
            os.fsync(f.fileno())


def read_text(files: list[str], pieces: list[bytes]) -> Iterator[str]:
    """The text of token files in pieces of whole documents, or of whole lines where a document is long; '\\udcff' ends a document.

    Raises UserError for a token id outside the vocabulary.
    """
    left = b''
    shards = [TokenFile(path) for path in files]
    with tqdm(
        total=sum(map(len, shards)),
        unit='token',
        unit_scale=True,
        desc='reading words',
        disable=None,
        leave=False,
    ) as bar:
        for shard in shards:
            for start in range(0, len(shard), 1 << 22):
                tokens = shard.read(start, 1 << 22)
                if tokens.max() >= len(pieces):
                    raise UserError(
                        f'{shard.path}: token id {tokens.max()} is beyond the vocabulary of {len(pieces)}: prepare the dataset again'
                    )
                left += b''.join(map(pieces.__getitem__, tokens.tolist()))
                cut = left.rfind(DOCUMENT_END) + len(DOCUMENT_END)
                cut = cut if cut >= len(DOCUMENT_END) else left.rfind(b'\n') + 1
                yield left[:cut].decode('utf-8', 'surrogateescape')
                left = left[cut:]
                bar.update(len(tokens))
    yield left.decode('utf-8', 'surrogateescape')


def label(document: str, number: int) -> str:
    """A document's name for people, on one line: "Artist: Title" from its head, else its number and first words."""
    fields = HEAD.findall(re.split(r'\n\s*\n', document[:1000].strip())[0])
    head = {
        key.lower(): value.strip() for key, value in reversed(fields)
    }  # the first of each counts
    name = (
        ': '.join(head[key] for key in ('artist', 'title') if head.get(key))
        or f'document {number}: {" ".join(document[:200].split()[:6])}…'
    )
    return ' '.join(name.encode('utf-8', 'replace').decode().split())


def word_bytes(ids: int) -> int:
    """Bytes that the numbers of `ids` words need."""
    return max(1, (ids.bit_length() + 7) // 8)


def sort_suffixes(words: np.ndarray) -> np.ndarray:
    """The suffix array of words (n,) uint32: where each suffix begins, (n,) int32, in the order of the suffixes.

    libdivsufsort sorts bytes: big-endian ids of equal width compare as words do, and of its suffixes those count that begin
    with a word. 50M words: 14 s and 0.8 GB; prefix doubling in numpy, tied suffixes alone, took 24 s, 1.1 GB and 25 lines more.
    """
    from pydivsufsort import divsufsort

    width = word_bytes(int(words.max()))
    places = divsufsort(words.astype('>u4').view(np.uint8).reshape(-1, 4)[:, 4 - width :].ravel())
    return np.concatenate([part[part % width == 0] // width for part in np.array_split(places, 64)])


def index_of(knobs: dict[str, Any], dataset: str = '') -> Index:
    """The index of what a checkpoint with these knobs (its `config`) was trained on, or of `dataset` if that is given. Raises UserError."""
    name = dataset or knobs.get('dataset', '')
    if not name:
        raise UserError(
            'the model does not say what it was trained on: name the folder of its training data with --dataset=FOLDER'
        )
    try:
        return Index.open(folder_of(name))
    except UserError as error:
        raise UserError(
            f'{error}; if the training data is elsewhere, name its folder with --dataset=FOLDER'
        ) from None


# -----------------------------------------------------------------------------
# Writing nothing that is already there

JOINED, MARKED, APOSTROPHE, APART = range(
    4
)  # what stands before a token's first letter: nothing, marks, one apostrophe, anything else
OUTSIDE, INSIDE, AFTER = range(
    3
)  # where a text ends: in no word, in a word, behind the apostrophe behind one
BEGINS = {
    OUTSIDE: (JOINED, MARKED, APOSTROPHE, APART),
    INSIDE: (APART,),
    AFTER: (MARKED, APOSTROPHE, APART),
}  # which tokens begin a word there


def bare(folded: str) -> str:
    """Without marks: what they will be is not known before a word's end. The parts of a word give those of the bare word."""
    return folded if folded.isascii() else MARKS.sub('', unicodedata.normalize('NFD', folded))


def look(raw: bytes) -> tuple[int, str, bytes, bool]:
    """How a token's bytes join a text, the bare letters of their first word, the bytes of a character that is not whole, and: is it odd?

    Odd are tokens with letters of several words or lines, or behind a mark on what stands before and more; the three kinds of tokenizers
    make none (special tokens may be).
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    text = decoder.decode(raw)
    words = list(WORD.finditer(text))
    lead = text[: words[0].start()] if words else text
    marks = MARKS.match(lead)
    way = JOINED if not lead else MARKED if marks else APOSTROPHE if lead in ("'", '’') else APART
    odd = len(words) > 1 or bool(words and ('\n' in text or marks and marks[0] != lead))
    return way, bare(fold(words[0][0])) if words else '', decoder.getstate()[0], odd


class Spelling:
    """A tokenizer's tokens by how they join a text and the bare letters of the word that they begin."""

    def __init__(self, tokenizer: Tokenizer):
        self.bytes = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.tokens: list[dict[str, list[int]]] = [{}, {}, {}, {}]
        self.odd: list[int] = []
        self.rest: list[int] = []  # tokens that begin inside a character
        for token, raw in enumerate(self.bytes):
            if token != tokenizer.eot:
                way, letters, _, odd = look(raw)
                if odd:
                    self.odd.append(token)
                else:
                    self.tokens[way].setdefault(letters, []).append(token)
                if raw and 0x80 <= raw[0] < 0xC0:
                    self.rest.append(token)

    def beginnings(self, way: int, words: Iterable[str]) -> Iterator[int]:
        """The tokens that, joined in this way, spell one of the bare words or begin to."""
        table = self.tokens[way]
        for word in words:
            for i in range(1, len(word) + 1):
                yield from table.get(word[:i], ())


spelling_of = functools.lru_cache(maxsize=4)(Spelling)  # shared by all rows


@functools.lru_cache(
    maxsize=256
)  # what follows a common word is long: it is asked for again and again
def beginnings_behind(
    index: Index, spelling: Spelling, words: tuple[str, ...], ways: tuple[int, ...]
) -> frozenset[int]:
    """The tokens that, joined in these ways, spell or begin to spell a word that follows `words` in the training split, but for its marks."""
    following = {bare(word) for word in index.following(words)}
    return frozenset(token for way in ways for token in spelling.beginnings(way, following))


class CopyFilter:
    """Keeps one row of `GPT.generate(avoid=…)` from ever writing `n` words in a row that stand so in the training split.

    A word that would complete such a run is not begun: behind the last n - 1 words, tokens are banned that spell the beginning, or
    all, of any word that follows them anywhere in the split. What does not begin so cannot become it, so tokens that go on with a
    word are free, and words are never broken off. (The word that a prompt ends in has not been watched: it is, as it goes on.)
    Marks may still come, so they are left out on both sides: where "été" would complete a run, "ete" is not written either. A character
    whose first byte is written may turn out to be banned: something else, be it a broken character, stands there then.
    Runs that begin in the prompt count, those that end in it do not. Raises UserError for n below 2.
    """

    def __init__(self, index: Index, tokenizer: Tokenizer, n: int, prompt_text: str = ''):
        if n < 2:
            raise UserError(
                f"avoid_copying={n}: expected at least 2 words (a single word is nobody's)"
            )
        self.index, self.n, self.eot, self.spelling = (
            index,
            n,
            tokenizer.eot,
            spelling_of(tokenizer),
        )
        self._begin_document()
        self._read(prompt_text)
        self.unwatched = self.state != OUTSIDE  # the word that the prompt ends in

    def _begin_document(self) -> None:
        self.words: list[str] = []  # the last ones, folded; the very last may still grow
        self.last = ''  # that one as it is written
        self.state, self.line, self.in_head, self.unwatched = OUTSIDE, '', False, False
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def _read(self, text: str) -> None:
        for c in text:
            if c == '\n':
                self.state, self.line, self.in_head = OUTSIDE, '', False
            elif not self.in_head:
                self.line = (self.line + c)[:8]
                if c.isalnum() or self.state == INSIDE and MARKS.match(c):
                    if self.state == OUTSIDE:
                        self.words, self.last, self.unwatched = (
                            [*self.words[-self.n :], ''],
                            '',
                            False,
                        )
                    self.last += "'" * (self.state == AFTER) + c
                    self.words[-1] = fold(self.last)
                    self.state = INSIDE
                else:
                    self.state = AFTER if c in "'’" and self.state == INSIDE else OUTSIDE
                    if c == ':' and HEAD.match(self.line):
                        self.words.pop()  # the line's only word so far is the head's name
                        self.in_head = True

    def push(self, token: int) -> None:
        """The token that was written."""
        if token == self.eot:
            self._begin_document()
        else:
            self._read(self.decoder.decode(self.spelling.bytes[token]))

    def _ends(self, state: int) -> dict[int, list[str]]:
        """How the prompt's last word must not go on, for each way of joining a text that ends so."""
        if not self.unwatched or state == OUTSIDE or len(self.words) < self.n:
            return {}
        so_far = bare(self.words[-1]) + "'" * (state == AFTER)
        following = map(bare, self.index.following(self.words[-self.n : -1]))
        ends = [word[len(so_far) :] for word in following if word.startswith(so_far)]
        if not ends or state == AFTER:
            return {JOINED: ends}
        return {
            JOINED: ends,
            MARKED: ends,
            APOSTROPHE: [end[1:] for end in ends if end.startswith("'")],
        }

    def banned(self) -> list[int]:
        """The token ids that must not come next. Tokens without letters and marks, and the document's end, are never among them."""
        banned = set(self.spelling.odd)
        if self.in_head:
            return list(banned)
        part = self.decoder.getstate()[
            0
        ]  # of a character: what does not complete it stands behind a U+FFFD
        state = OUTSIDE if part else self.state
        before = tuple(self.words[1 - self.n :]) if len(self.words) >= self.n - 1 else ()
        if before:
            banned |= beginnings_behind(self.index, self.spelling, before, BEGINS[state])
        for way, ends in self._ends(state).items():
            banned.update(self.spelling.beginnings(way, ends))
            if way == MARKED:  # a mark alone may complete the word
                banned.update(self.spelling.tokens[MARKED].get('', ()))
        if part:
            banned.difference_update(self.spelling.rest)
            following = [bare(word) for word in self.index.following(before)] if before else []
            forbidden = dict.fromkeys(BEGINS[self.state], following) | self._ends(self.state)
            for token in self.spelling.rest:
                way, letters, _, odd = look(part + self.spelling.bytes[token])
                if (
                    odd
                    or (letters or way == MARKED and self.state == INSIDE)
                    and any(word.startswith(letters) for word in forbidden.get(way, ()))
                ):
                    banned.add(token)
        return list(banned)


def main() -> None:
    """Check the text that the command line names."""
    config = configure(OriginalityConfig, description=(__doc__ or '').split('\n')[0])
    text = config.text
    if config.file:
        try:
            with open(config.file, encoding='utf-8-sig') as f:
                text = f.read()
        except OSError as error:
            raise UserError(f'file={config.file}: {error.strerror}') from None
        except UnicodeDecodeError as error:
            raise UserError(f'file={config.file}: cannot be read as UTF-8 text ({error})') from None
    folder = folder_of(config.dataset)
    index = Index.open(folder)
    if not config.text and not config.file:
        print(
            f'{folder}: {len(index.words) - index.starts[1]:,} words, {len(index.ids) - 1:,} different, in {len(index.songs):,} documents'
        )
        return
    result = index.compare(text, config.n)
    print(result)
    for found in result.runs:
        print(
            f'  {found["words"]} words from "{found["song"]}": {brief(text[found["start"] : found["end"]], 400)}'
        )


if __name__ == '__main__':
    run(main)
