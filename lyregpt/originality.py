"""Originality: the runs of words that a text shares with the training split, found exactly.

    python -m lyregpt originality --dataset=darklyrics       # builds the index, as other uses do
    python -m lyregpt originality --dataset=darklyrics --text="the rain came down"
    python -m lyregpt originality --dataset=darklyrics --file=my_song.txt

A word is a run of letters and digits with their combining marks and inner apostrophes. Words are
compared casefolded, with ’ as ' and in one normalization form. Line breaks and punctuation do not
matter. Text without spaces between words (Chinese, Japanese, Thai) is not segmented: what stands
between two spaces or punctuation marks is one word, so only copies of whole phrases are found.
Lines that begin with `Artist:`, `Album:`, `Year:` or `Title:` are a song header and contain no
words. No run crosses the end of a document.
"""

import bisect
import codecs
import contextlib
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

from configurator import UserError, configure
from lyregpt.dataset import TokenFile, folder_of, read_tokenizer, token_files
from lyregpt.text import atomic_write, read_pieces
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
# The lookahead avoids most searches for marks.
WORD = re.compile(rf"[^\W_]+(?:['’][^\W_]+|(?=[^\0-\u02ff]){MARKS.pattern}[^\W_]*)*")
HEAD = re.compile(r'^(artist|album|year|title):(.*)', re.I | re.M)
DOCUMENT_END = b'\n\xff\n'  # UTF-8 never contains this byte
FORMAT = 2  # of the index: indexes with another number are built again


@dataclass
class OriginalityConfig:
    """The options; the comment behind each is its help. Raises ValueError for an invalid one."""

    dataset: str = 'openwebtext'  # a folder, or a name under data/
    text: str = ''  # the text to check
    file: str = ''  # … or a UTF-8 text file with it
    n: int = 5  # report runs of at least so many words

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f'n={self.n}: expected at least 1 word')
        if self.text and self.file:
            raise ValueError('text and file are both given: only one text can be checked')


@dataclass
class Originality:
    """What a text shares with the training split."""

    words: int  # how many were compared
    longest: int  # words in the longest run that is in the training split word for word
    text: str  # that run, as it is in the text
    song: str  # the first document with it: "Artist: Title", or "document 17: its first words…"
    share: float | None  # of the text's runs of n words, those in the split; None if it has none
    n: int
    # All runs of n or more words that cannot be extended: start, end (characters), words, song
    runs: list[dict[str, Any]]

    def __str__(self) -> str:
        if not self.words:
            return 'originality: the text has no words'
        if not self.longest:
            return 'originality: none of its words is in the training split'
        quote = shorten(self.text, 60)
        words = 'word' if self.longest == 1 else 'words'
        found = f'originality: {self.longest} {words} in a row from "{self.song}" ("{quote}")'
        if self.share is None:
            return found
        return f'{found}; {self.share:.0%} of its {self.n}-word runs are in the training split'


def shorten(text: str, width: int) -> str:
    """The text on one line of at most `width` characters; it need not have blanks (Japanese)."""
    line = ' '.join(text.split())
    return line if len(line) <= width else line[: width - 3] + '...'


def find_words(text: str) -> Iterator[re.Match[str]]:
    """The words of a text with their positions; header lines are skipped."""
    return WORD.finditer(HEAD.sub(lambda head: ' ' * len(head[0]), text))


def fold(text: str) -> str:
    """Words in the form in which they are compared."""
    text = unicodedata.normalize('NFD', text).casefold().replace('’', "'")
    return unicodedata.normalize('NFC', text)


# -----------------------------------------------------------------------------
# The index


class Index:
    """The words of a dataset's training split and their suffix array, memory-mapped.

    The words are 32-bit ids, with a 0 after each document. `document_end` is the text that ends a
    document for the dataset's tokenizer. Raises OSError, ValueError or EOFError if the folder does
    not hold a complete index.
    """

    def __init__(self, path: str, document_end: str = ''):
        self.document_end = document_end
        self.words, self.suffixes, self.starts, self.documents = (
            np.load(os.path.join(path, f'{name}.npy'), mmap_mode='r')
            for name in ('words', 'suffixes', 'starts', 'documents')
        )
        self.vocabulary = ['', *read_lines(os.path.join(path, 'vocabulary.txt'))]
        self.songs = read_lines(os.path.join(path, 'songs.txt'))
        sizes = (len(self.words), len(self.vocabulary) + 3, len(self.documents))
        if (len(self.suffixes), len(self.starts), len(self.songs)) != sizes:
            raise ValueError(f'{path}: the files do not belong together')
        self.ids = {word: i for i, word in enumerate(self.vocabulary)}
        # A memoryview returns a number four times as fast as numpy.
        self._bytes = memoryview(self.words.view(np.uint8))
        self._suffixes, self._starts = memoryview(self.suffixes), memoryview(self.starts)

    @classmethod
    def open(cls, folder: str) -> 'Index':
        """The index of the dataset in `folder`, built if it is missing or the dataset has changed.

        Raises UserError if there is no training split, it is too large, or the index cannot be
        written.
        """
        files, tokenizer = token_files(folder, 'train'), read_tokenizer(folder)
        stats = [(os.path.basename(file), os.stat(file)) for file in files]
        sizes = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        key = json.dumps([FORMAT, sizes, tokenizer.state()], sort_keys=True)
        name = 'originality-' + hashlib.sha256(key.encode()).hexdigest()[:12]
        path = os.path.join(folder, name)
        end = '' if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
        try:
            index = cls.load(path, end)
            if index is None:
                with tempfile.TemporaryDirectory('.tmp', 'originality.', folder) as temporary:
                    new = os.path.join(temporary, 'index')  # other users may read this folder
                    os.mkdir(new)
                    build(files, tokenizer, new)
                    try:
                        os.rename(new, path)
                    except OSError:  # another process was faster, or there is a broken index
                        index = cls.load(path, end)
                        if index is None:
                            shutil.rmtree(path, ignore_errors=True)
                            os.rename(new, path)
                remove_others(folder, name)
        except OSError as error:
            raise UserError(
                f'{error.filename or path}: the index of the training split cannot be written: '
                f'{error.strerror or error}'
            ) from None
        index = index or cls.load(path, end)
        if index is None:
            raise UserError(f'{path}: the new index of the training split cannot be read')
        return index

    @classmethod
    def load(cls, path: str, document_end: str) -> 'Index | None':
        """The index in this folder; None if there is none, or not a complete one."""
        try:
            return cls(path, document_end)
        except (OSError, ValueError, EOFError):
            return None

    def find(self, query: bytes) -> tuple[int, int]:
        """Where the suffix array has the suffixes that begin with these words: [first, last).

        `query` holds at least one word, as 32-bit big-endian ids.
        """
        first, size = int.from_bytes(query[:4], 'big'), len(query)

        def beginning(at: int) -> bytes:
            return bytes(self._bytes[4 * at : 4 * at + size])

        start, stop = self._starts[first], self._starts[first + 1]
        low = bisect.bisect_left(self._suffixes, query, start, stop, key=beginning)
        return low, bisect.bisect_right(self._suffixes, query, low, stop, key=beginning)

    def encode(self, words: Sequence[str]) -> bytes:
        """Folded words as a query for `find`; a word that the split lacks gets an unused id."""
        ids = [self.ids.get(word, len(self.vocabulary)) for word in words]
        return np.array(ids, dtype='>u4').tobytes()

    def song(self, low: int, high: int) -> str:
        """The first document that contains one of these suffixes."""
        first = self.suffixes[low:high].min()
        return self.songs[int(np.searchsorted(self.documents, first, side='right')) - 1]

    def following(self, words: Sequence[str]) -> list[str]:
        """The folded words that follow `words` anywhere in the split."""
        low, high = self.find(self.encode(words))
        after = self.words[self.suffixes[low:high].astype(np.int64) + len(words)]
        # They are sorted, as suffixes are; 0 is the end of a document.
        is_new = after != np.concatenate([[0], after[:-1]])
        return [self.vocabulary[i] for i in after[is_new].tolist()]

    def compare(self, text: str, n: int = 5, since: int = 0) -> Originality:
        """What `text` shares with the split: every maximal run of words.

        The first `since` characters are a prompt: a run counts if it ends after them, wherever it
        begins. All offsets are offsets in `text`.
        """
        spans, words, offset, judged, grams = list[tuple[int, int]](), list[str](), 0, 0, 0
        documents = text.split(self.document_end) if self.document_end else [text]
        for document in documents:
            begin = len(words)
            for match in find_words(document):
                spans.append((offset + match.start(), offset + match.end()))
                words.append(fold(match[0]))
            judged += sum(end > since for _, end in spans[begin:])
            grams += sum(end > since for _, end in spans[begin + n - 1 :])
            offset += len(document) + len(self.document_end)
            spans.append((offset, offset))
            words.append('\n')  # is not in the split: no run crosses it
        found, query = [], self.encode(words)
        known = end = 0
        for i in range(len(words)):
            before, end = max(end, i), self._run_end(query, i, max(end, i))
            # A run that ends where the run before it ends is only a part of that.
            if end > before and spans[end - 1][1] > since:
                found.append((i, end))
            known += end - i >= n and spans[i + n - 1][1] > since
        longest = max((end - i for i, end in found), default=0)
        runs: list[dict[str, Any]] = [
            {
                'start': spans[i][0],
                'end': spans[end - 1][1],
                'words': end - i,
                'song': self.song(*self.find(query[4 * i : 4 * end])),
            }
            for i, end in found
            if end - i >= min(n, longest)
        ]
        nothing: dict[str, Any] = {'start': 0, 'end': 0, 'words': 0, 'song': ''}
        best = max(runs, key=lambda run: run['words'], default=nothing)
        return Originality(
            words=judged,
            longest=best['words'],
            text=text[best['start'] : best['end']],
            song=best['song'],
            share=known / grams if grams else None,
            n=n,
            runs=[run for run in runs if run['words'] >= n],
        )

    def _run_end(self, query: bytes, first: int, end: int) -> int:
        """Where the longest run that begins at word `first` ends, at `end` or later."""
        while 4 * end < len(query):
            low, high = self.find(query[4 * first : 4 * (end + 1)])
            if low == high:
                break
            at, end = self._suffixes[low] + end - first + 1, end + 1
            # Continue at this position of the split as far as it agrees.
            while query[4 * end : 4 * end + 4] == self._bytes[4 * at : 4 * at + 4]:
                at, end = at + 1, end + 1
        return end


def read_lines(path: str) -> list[str]:
    """The lines of a file; [] if it is not complete: it must end with a line break."""
    with open(path, encoding='utf-8') as f:
        *lines, last = f.read().split('\n')
    if last:
        return []
    return lines


def remove_others(folder: str, name: str) -> None:
    """Remove a dataset's indexes except the one called `name`, as far as possible.

    Also what killed builders left more than a day ago.
    """
    yesterday = time.time() - 86400
    for other in os.listdir(folder):
        path, is_left = os.path.join(folder, other), False
        if re.fullmatch(r'originality\..*\.tmp', other):
            with contextlib.suppress(OSError):  # its builder has removed it
                is_left = os.stat(path).st_mtime < yesterday
        if is_left or other != name and re.fullmatch('originality-[0-9a-f]{12}', other):
            shutil.rmtree(path, ignore_errors=True)


def build(files: list[str], tokenizer: Tokenizer, path: str) -> None:
    """Write the index of token files into the folder `path`.

    Raises UserError if there are too many words.
    """
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
                folded = fold(' '.join(WORD.findall(HEAD.sub('', document))))
                words.extend(map(ids.__getitem__, folded.split()))
        if len(words) * word_bytes(len(ids)) >= 2**31:
            raise UserError(
                f'{files[0]}: {len(words):,} words and more are too many to index: their ids must '
                'fit into 2 GB'
            )
    words.append(0)
    print(f'sorting the suffixes of {len(words):,} words', file=sys.stderr, flush=True)
    all_words = np.frombuffer(words, dtype=np.uint32)
    starts = np.cumsum(np.bincount(all_words, minlength=len(ids) + 3))
    for name, values in (
        ('words', all_words.astype('>u4')),  # big-endian: their bytes compare as they do
        ('starts', np.concatenate([[0], starts])),
        ('documents', np.array(documents)),
        ('suffixes', sort_suffixes(all_words)),
    ):
        with open(os.path.join(path, f'{name}.npy'), 'wb') as f:
            np.save(f, values)
            f.flush()
            os.fsync(f.fileno())
    for name, lines in (('vocabulary', list(ids)), ('songs', songs)):
        content = ''.join(f'{line}\n' for line in lines).encode()
        atomic_write(os.path.join(path, f'{name}.txt'), content)


def read_text(files: list[str], pieces: list[bytes]) -> Iterator[str]:
    """The text of token files, in parts of whole documents, each ended by '\\udcff'.

    Of a long document, parts of whole lines. `pieces` are the bytes of each token. Raises UserError
    for a token id outside the vocabulary.
    """
    left, shards = b'', [TokenFile(path) for path in files]
    total = sum(map(len, shards))
    with tqdm(
        total=total, unit='token', unit_scale=True, desc='reading words', disable=None, leave=False
    ) as bar:
        for shard in shards:
            for start in range(0, len(shard), 1 << 22):
                tokens = shard.read(start, 1 << 22)
                if tokens.max() >= len(pieces):
                    raise UserError(
                        f'{shard.path}: token id {tokens.max()} is beyond the vocabulary of '
                        f'{len(pieces)}: prepare the dataset again'
                    )
                left += b''.join(map(pieces.__getitem__, tokens.tolist()))
                complete, end, rest = left.rpartition(DOCUMENT_END)
                if not end:
                    complete, end, rest = left.rpartition(b'\n')
                yield (complete + end).decode('utf-8', 'surrogateescape')
                left = rest
                bar.update(len(tokens))
    yield left.decode('utf-8', 'surrogateescape')


def label(document: str, number: int) -> str:
    """The name of a document in messages: "Artist: Title", or its number and first words."""
    header = re.split(r'\n\s*\n', document[:1000].strip())[0]
    # Reversed, because the first field of each name counts.
    fields = {key.lower(): value.strip() for key, value in reversed(HEAD.findall(header))}
    name = ': '.join(fields[key] for key in ('artist', 'title') if fields.get(key))
    name = name or f'document {number}: {" ".join(document[:200].split()[:6])}…'
    return ' '.join(name.encode('utf-8', 'replace').decode().split())


def word_bytes(ids: int) -> int:
    """The bytes that an id needs, if there are so many."""
    return max(1, (ids.bit_length() + 7) // 8)


def sort_suffixes(words: np.ndarray) -> np.ndarray:
    """The suffix array of words (n,) uint32: the start of each suffix in sorted order, (n,) int32.

    libdivsufsort sorts the suffixes of bytes: big-endian ids of equal width compare as words do,
    and only the suffixes at the start of a word are kept. 50M words take 14 s and 0.8 GB; prefix
    doubling in numpy, of tied suffixes only, took 24 s, 1.1 GB and 25 more lines.
    """
    from pydivsufsort import divsufsort

    width = word_bytes(int(words.max()))
    as_bytes = words.astype('>u4').view(np.uint8).reshape(-1, 4)[:, 4 - width :].ravel()
    parts = np.array_split(divsufsort(as_bytes), 64)
    return np.concatenate([part[part % width == 0] // width for part in parts])


def index_of(config: dict[str, Any], dataset: str = '') -> Index:
    """The index of `dataset`, or else of the dataset that a checkpoint's `config` names.

    Raises UserError.
    """
    name = dataset or config.get('dataset', '')
    if not name:
        raise UserError(
            'the model does not say what it was trained on: name the folder of its training data '
            'with --dataset=FOLDER'
        )
    try:
        return Index.open(folder_of(name))
    except UserError as error:
        raise UserError(
            f'{error}; if the training data is elsewhere, name its folder with --dataset=FOLDER'
        ) from None


# -----------------------------------------------------------------------------
# Avoiding copies

# What comes before a token's first letter: nothing, marks, one apostrophe, anything else
JOINED, MARKED, APOSTROPHE, APART = range(4)
# Where a text ends: outside words, in a word, after the apostrophe that follows a word
OUTSIDE, INSIDE, AFTER = range(3)
BEGINS = {  # the tokens that begin a word there
    OUTSIDE: (JOINED, MARKED, APOSTROPHE, APART),
    INSIDE: (APART,),
    AFTER: (MARKED, APOSTROPHE, APART),
}


def bare(folded: str) -> str:
    """A word without marks: the marks are not known before the word's end.

    The parts of a word, bare, make up the bare word.
    """
    if folded.isascii():
        return folded
    return MARKS.sub('', unicodedata.normalize('NFD', folded))


def look(raw: bytes) -> tuple[int, str, bytes, bool]:
    """How a token continues a text: (way, letters, part, odd).

    The way is JOINED, MARKED, APOSTROPHE or APART, the letters are the bare ones of its first word,
    and the part is the bytes of an incomplete character at its end. Odd tokens have letters of
    several words or lines, or more than marks before their letters; the three kinds of tokenizers
    make none, except perhaps as special tokens.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    text = decoder.decode(raw)
    words = WORD.findall(text)
    lead = WORD.split(text, maxsplit=1)[0]
    marks = MARKS.match(lead)
    way = APART
    if not lead:
        way = JOINED
    elif marks:
        way = MARKED
    elif lead in ("'", '’'):
        way = APOSTROPHE
    odd = len(words) > 1 or bool(words and ('\n' in text or marks and marks[0] != lead))
    return way, bare(fold(''.join(words[:1]))), decoder.getstate()[0], odd


class Spelling:
    """A tokenizer's tokens by how they continue a text and the bare letters of their first word."""

    def __init__(self, tokenizer: Tokenizer):
        self.bytes = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.tokens: list[dict[str, list[int]]] = [{}, {}, {}, {}]
        self.odd: list[int] = []
        self.rest: list[int] = []  # tokens that begin inside a character
        for token, raw in enumerate(self.bytes):
            way, letters, _, odd = look(raw)
            if token == tokenizer.eot:
                continue
            if odd:
                self.odd.append(token)
            else:
                self.tokens[way].setdefault(letters, []).append(token)
            if raw and 0x80 <= raw[0] < 0xC0:
                self.rest.append(token)

    def beginnings(self, way: int, words: Iterable[str]) -> Iterator[int]:
        """The tokens that, joined in this way, spell one of the bare words or its beginning."""
        table = self.tokens[way]
        for word in words:
            for i in range(1, len(word) + 1):
                yield from table.get(word[:i], ())


spelling_of = functools.lru_cache(maxsize=4)(Spelling)  # shared by all sequences


@functools.lru_cache(maxsize=256)  # many words follow a common word, and it is asked for often
def beginnings_behind(
    index: Index, spelling: Spelling, words: tuple[str, ...], ways: tuple[int, ...]
) -> frozenset[int]:
    """The tokens that, joined in these ways, spell or begin a word that follows `words`.

    It follows them somewhere in the training split; marks do not matter.
    """
    following = {bare(word) for word in index.following(words)}
    return frozenset(token for way in ways for token in spelling.beginnings(way, following))


class CopyFilter:
    """Prevents a sequence of `GPT.generate(avoid=…)` from copying `n` words in a row.

    A word that would complete a run of n words of the training split is never begun: after the
    last n - 1 words, the tokens are banned that spell the beginning, or all, of any word that
    follows them in the split. No other beginning can become such a word, so tokens that continue a
    word are allowed, and words are not broken off. (The word in which a prompt ends was not
    checked when it began: it is checked while it continues.)

    Marks may follow later, so they are ignored on both sides: where "été" would complete a run,
    "ete" is banned too. A character whose first byte was generated may turn out to be banned; then
    something else follows, possibly a broken character. Runs that begin in the prompt count, those
    that end in it do not. Raises UserError for n below 2.
    """

    def __init__(self, index: Index, tokenizer: Tokenizer, n: int, prompt_text: str = ''):
        if n < 2:
            raise UserError(f'avoid_copying={n}: expected at least 2 words')
        self.index, self.n, self.eot = index, n, tokenizer.eot
        self.spelling = spelling_of(tokenizer)
        self._begin_document()
        self._read(prompt_text)
        self.unwatched = self.state != OUTSIDE  # the word in which the prompt ends

    def _begin_document(self) -> None:
        self.words: list[str] = []  # the last ones, folded; the very last may still grow
        self.last = ''  # that one as it was generated
        self.state, self.line, self.in_head, self.unwatched = OUTSIDE, '', False, False
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def _read(self, text: str) -> None:
        for c in text:
            if c == '\n':
                self.state, self.line, self.in_head = OUTSIDE, '', False
            elif not self.in_head:
                self._read_character(c)

    def _read_character(self, c: str) -> None:
        self.line = (self.line + c)[:8]
        if c.isalnum() or self.state == INSIDE and MARKS.match(c):
            if self.state == OUTSIDE:
                self.words = [*self.words[-self.n :], '']
                self.last, self.unwatched = '', False
            elif self.state == AFTER:
                self.last += "'"
            self.last += c
            self.words[-1] = fold(self.last)
            self.state = INSIDE
        elif c in "'’" and self.state == INSIDE:
            self.state = AFTER
        else:
            self.state = OUTSIDE
            if c == ':' and HEAD.match(self.line):
                self.words.pop()  # the only word of the line so far is the name of the field
                self.in_head = True

    def push(self, token: int) -> None:
        """Take note of the token that was generated."""
        if token == self.eot:
            self._begin_document()
        else:
            self._read(self.decoder.decode(self.spelling.bytes[token]))

    def _ends(self, state: int) -> dict[int, list[str]]:
        """How the prompt's last word must not continue, for each way of continuing a text."""
        if not self.unwatched or state == OUTSIDE or len(self.words) < self.n:
            return {}
        so_far = bare(self.words[-1])
        if state == AFTER:
            so_far += "'"
        following = map(bare, self.index.following(self.words[-self.n : -1]))
        ends = [word[len(so_far) :] for word in following if word.startswith(so_far)]
        if not ends or state == AFTER:
            return {JOINED: ends}
        after_apostrophe = [end[1:] for end in ends if end.startswith("'")]
        return {JOINED: ends, MARKED: ends, APOSTROPHE: after_apostrophe}

    def banned(self) -> list[int]:
        """The token ids that must not come next.

        The document's end and tokens without letters and marks are never among them.
        """
        banned = set(self.spelling.odd)
        if self.in_head:
            return list(banned)
        part = self.decoder.getstate()[0]  # of a character
        # A token that does not complete the character follows a U+FFFD.
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
            banned.update(self._banned_rest(part, before))
        return list(banned)

    def _banned_rest(self, part: bytes, before: tuple[str, ...]) -> Iterator[int]:
        """The banned tokens among those that begin inside a character, after the bytes `part`."""
        following = [bare(word) for word in self.index.following(before)] if before else []
        forbidden = dict.fromkeys(BEGINS[self.state], following) | self._ends(self.state)
        for token in self.spelling.rest:
            way, letters, _, odd = look(part + self.spelling.bytes[token])
            has_content = letters or way == MARKED and self.state == INSIDE
            words = forbidden.get(way, ())
            if odd or has_content and any(word.startswith(letters) for word in words):
                yield token


def main() -> None:
    """Compare the text that the options name with the training split."""
    config = configure(OriginalityConfig, description=(__doc__ or '').split('\n')[0])
    text, folder = config.text, folder_of(config.dataset)
    if config.file:
        text = ''.join(read_pieces(config.file, 'utf-8-sig'))
    index = Index.open(folder)
    if config.text or config.file:
        result = index.compare(text, config.n)
        print(result)
        for found in result.runs:
            quote = shorten(text[found['start'] : found['end']], 400)
            print(f'  {found["words"]} words from "{found["song"]}": {quote}')
    else:
        print(
            f'{folder}: {len(index.words) - index.starts[1]:,} words, {len(index.ids) - 1:,} '
            f'different, in {len(index.songs):,} documents'
        )
