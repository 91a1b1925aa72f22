"""Many texts written by one model at once: a batch that rows join and leave between tokens (continuous batching).

    engine = Engine(model, tokenizer, deliver)    # deliver(events) is called by run(), once a step
    threading.Thread(target=engine.run).start()
    engine.submit([Request(prompt, max_tokens=100, seed=7)])

Orca (Yu et al. 2022) showed the idea. What a row writes depends on its own prompt, options and seed alone, to the last bit on a
CPU, whoever else is in the batch: rows are read one at a time, in pieces cut at fixed places; a batch has at least two rows, as
products of one row round in their own way; attention goes over a multiple of 64 keys (model.attend_alike); each row has its dice.
"""

import contextlib
import copy
import itertools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lyregpt.tokenizer import Tokenizer
from model import GPT, KVCache, sample_token

CHUNK = 256  # prompt tokens read between two steps: a long prompt must not make the others wait
KEYS = 64


@dataclass
class Delta:
    """What became certain of a row in one step: text, the tokens behind it, and how the row ended, if it did."""

    text: str = ''
    tokens: list[dict[str, Any]] = field(
        default_factory=list
    )  # with logprobs: token, logprob, top, offset
    finish: str = ''  # stop (the document's end, or a stop text), length, or error
    error: str = ''


@dataclass(eq=False)
class Request:
    """One text to write, with its options; the engine's notes on it below."""

    prompt: list[int]  # token ids; the last block_size of them are read
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 1337
    stop: Sequence[str] = ()  # texts that end it; they are not given out
    logprobs: int | None = (
        None  # how many of the likeliest tokens to tell the probabilities of; None: no probabilities at all
    )
    echo: str = ''  # the prompt as text, to be given out before what is written
    score: int = 0  # with logprobs: tell those of so many prompt tokens too, the last ones
    avoid: Any = None  # an originality.CopyFilter: what must not be copied
    tag: Any = None  # the caller's own

    generated: list[int] = field(default_factory=list)
    cancelled: bool = False
    dice: torch.Generator | None = None
    chances: Iterator[float] = iter(())
    seen: torch.Tensor | None = None  # for the repetition penalty: is the token in the text?
    place: int = 0  # of the next token
    decode: Callable[[int | None], str] | None = None
    held: str = ''  # text that may be the beginning of a stop text
    given: int = 0  # characters given out
    waiting: list[dict[str, Any]] = field(
        default_factory=list
    )  # token reports of text that is held


class QueueFullError(Exception):
    """There are too many waiting rows already."""


class EngineStoppedError(Exception):
    """Nobody writes any more."""


class Engine:
    """Writes all submitted rows in `run()`, which is for a thread of its own; the other methods are for any.

    At most `max_batch` rows write at once, `max_queue` wait for a place. `deliver` gets a list of (row, Delta) after each step.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        deliver: Callable[[list[tuple[Request, Delta]]], Any],
        max_batch: int = 64,
        max_queue: int = 256,
    ):
        self.model, self.tokenizer, self.deliver, self.max_batch, self.max_queue = (
            model,
            tokenizer,
            deliver,
            max_batch,
            max_queue,
        )
        self.rows: set[Request] = set()  # all that are here: those that write and those that wait
        self.queue: deque[Request] = deque()
        self.active: list[Request] = []  # row i has place i in the cache
        self.changed = threading.Condition()
        self.running, self.stopping = True, False  # not running: it has ended, and takes no more
        self.events: list[tuple[Request, Delta]] = []
        self.read_ids: list[
            int
        ] = []  # what `reader` has read, and the logits behind it: n samples of one prompt read it once
        self.reading: Request | None = None  # for whom, if there is more to read
        self.logits: torch.Tensor | None = None
        weight = model.transformer.wte.weight
        self.device, self.dtype = (
            weight.device,
            torch.float32 if weight.device.type == 'cpu' else weight.dtype,
        )
        self.room = -(-model.config.block_size // KEYS) * KEYS
        self.reader = KVCache(model.config, 1, self.room, self.device, self.dtype)
        first = max(2, max_batch) if self.device.type == 'cuda' else 4
        self.cache = KVCache(
            model.config, first, self.room, self.device, self.dtype
        )  # on a CPU it grows when more write at once

    def submit(self, rows: Sequence[Request]) -> None:
        """Have the rows written, in order of arrival.

        Raises QueueFullError if they would be more than `max_queue` waiting ones, EngineStoppedError after `run()`.
        """
        with self.changed:
            if not self.running:
                raise EngineStoppedError
            if len(self.rows) + len(rows) > self.max_batch + self.max_queue:
                raise QueueFullError
            self.rows.update(rows)
            self.queue.extend(rows)
            self.changed.notify()

    def cancel(self, rows: Sequence[Request]) -> None:
        """Forget these rows; their places are free before the next token."""
        with self.changed:
            for row in rows:
                row.cancelled = True
            self.rows.difference_update(rows)
            self.changed.notify()

    def stop(self) -> None:
        """End `run()` after the step under way."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    @torch.inference_mode()
    def run(self) -> None:
        """Write until `stop()`."""
        try:
            while not self.stopping:
                self.work()
        finally:
            with self.changed:
                self.running = False
            self.fail('the server is stopping')
            self.tell()

    def fail(self, why: str) -> None:
        """End all rows with an error."""
        with self.changed:
            rows = list(self.rows)
            for here in (self.rows, self.active, self.queue):
                here.clear()
        self.events += [(row, Delta(finish='error', error=why)) for row in rows]

    def tell(self) -> None:
        """Deliver what has come together."""
        events, self.events = self.events, []
        if events:
            self.deliver(events)

    def work(self) -> None:
        """Wait for rows, then read prompts, draw a token for every row, and tell."""
        with self.changed:
            while not (self.queue or self.active or self.stopping):
                self.changed.wait()
            if self.stopping:
                return
            self.queue = deque(row for row in self.queue if not row.cancelled)
        for row in [row for row in self.active if row.cancelled]:
            self.leave(row)
        try:
            self.admit()
            if self.active:
                self.step()
        except Exception as error:  # out of memory, say: those who wait for an answer get one, and the next ones a fresh start
            with contextlib.suppress(OSError, ValueError):  # a log that is closed
                traceback.print_exc()
            self.read_ids = []
            self.fail(f'the model failed: {type(error).__name__}')
        self.tell()

    # -------------------------------------------------------------------------
    # Joining and leaving

    def admit(self) -> None:
        """Read prompts from the head of the queue, CHUNK tokens at most, and give those that are read a place."""
        budget = CHUNK
        while self.queue and budget > 0 and len(self.active) < self.max_batch:
            row = self.queue[0]
            ids, size = row.prompt + row.generated, self.model.config.block_size
            ids = (
                ids[-size:] if len(ids) <= size else ids[-max(1, size // 2) :]
            )  # a full context keeps its later half, as in generate
            wants = row.logprobs is not None and row.score > 0 and not row.generated
            done = len(self.read_ids)
            if (
                self.read_ids != ids[:done]
                or 0 < done < len(ids)
                and done % CHUNK
                or wants
                and self.reading is not row
            ):
                self.read_ids, done = [], 0
                row.waiting = (
                    [] if wants else row.waiting
                )  # somebody came between: it is read, and told, from the start again
            self.reading = row
            if done < len(ids):  # else somebody with the same prompt came before
                piece, self.reader.length = ids[done : done + CHUNK], done
                x = self.model.hidden(torch.tensor([piece], device=self.device), self.reader)
                self.logits = self.limit(self.model.lm_head(x[:, -1]))
                if wants:
                    self.report_prompt(row, ids, done, x)
                self.read_ids = self.read_ids + piece
                budget -= len(piece)
                if len(self.read_ids) < len(ids):
                    continue
            self.reading = None
            self.enter(row, len(ids))
            self.queue.popleft()

    def enter(self, row: Request, length: int) -> None:
        """Give the row the next place in the batch, with what was read, and its first token."""
        if row.dice is None:
            row.dice, row.decode = (
                torch.Generator().manual_seed(row.seed % 2**64),
                self.tokenizer.stream_decoder(),
            )
            row.chances = (
                c for _ in itertools.count() for c in torch.rand(64, generator=row.dice).tolist()
            )  # as generate draws them
            if row.repetition_penalty != 1:
                row.seen = torch.zeros(
                    self.tokenizer.vocab_size, dtype=torch.bool, device=self.device
                )
                row.seen[[i for i in row.prompt if i < self.tokenizer.vocab_size]] = True
            if row.echo or row.waiting:
                self.events.append((row, Delta(row.echo, row.waiting)))
                row.given, row.waiting = len(row.echo), []
        n = len(self.active)
        if max(2, n + 1) > self.cache.data.size(2):
            old, self.cache = (
                self.cache,
                KVCache(
                    self.model.config,
                    min(2 * n, max(2, self.max_batch)),
                    self.room,
                    self.device,
                    self.dtype,
                ),
            )
            self.cache.data[:, :, :n] = old.data
        self.cache.data[:, :, n, :, :length] = self.reader.data[:, :, 0, :, :length]
        row.place = length
        self.active.append(row)
        if row.max_tokens == 0:
            self.give(row, '', finish='length')
            return self.leave(row)
        assert self.logits is not None
        self.choose([row], self.logits)

    def leave(self, row: Request) -> None:
        """Free the row's place; the last row moves into it."""
        at, last = self.active.index(row), self.active.pop()
        if last is not row:
            self.cache.data[:, :, at, :, : last.place] = self.cache.data[
                :, :, len(self.active), :, : last.place
            ]
            self.active[at] = last

    # -------------------------------------------------------------------------
    # A token for each row

    def step(self) -> None:
        """Read the last token of every row, and draw its next."""
        for row in [
            row for row in self.active if row.place >= self.model.config.block_size
        ]:  # full: read its later half again
            self.leave(row)
            self.queue.appendleft(row)
        n = len(self.active)
        if not n:
            return
        # on a GPU all places are computed, always: they cost no more there, and its products depend on the number of rows
        size = self.cache.data.size(2) if self.device.type == 'cuda' else max(2, n)
        spare = size - n
        now = copy.copy(self.cache)
        now.data = self.cache.data[
            :, :, :size, :, : -(-(max(row.place for row in self.active) + 1) // KEYS) * KEYS
        ]
        now.place = torch.tensor(
            [[row.place] for row in self.active] + [[0]] * spare, device=self.device
        )
        last = torch.tensor(
            [[row.generated[-1]] for row in self.active] + [[0]] * spare, device=self.device
        )
        logits = self.limit(self.model.next_logits(last, now)[:n])
        for row in self.active:
            row.place += 1
        self.choose(list(self.active), logits)

    def limit(self, logits: torch.Tensor) -> torch.Tensor:
        """In fp32, without the padding behind the tokenizer's vocabulary. (rows, V) → (rows, vocab_size)."""
        return logits.float()[:, : self.tokenizer.vocab_size]

    def choose(self, rows: list[Request], logits: torch.Tensor) -> None:
        """Draw the next token of each row from logits (rows, V), and give out the text that it completes."""
        own = [logits[i : i + 1] for i in range(len(rows))]
        for i, row in enumerate(rows):
            if row.seen is not None:
                own[i] = torch.where(
                    row.seen,
                    torch.where(
                        own[i] > 0, own[i] / row.repetition_penalty, own[i] * row.repetition_penalty
                    ),
                    own[i],
                )
            if row.avoid and (banned := row.avoid.banned()):
                own[i] = own[i].clone()
                own[i][0, banned] = -torch.inf
        tokens = [0] * len(rows)
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((row.temperature, row.top_k, row.top_p), []).append(i)
        for options, members in groups.items():
            chance = torch.tensor([next(rows[i].chances) for i in members], device=self.device)
            for i, token in zip(
                members,
                sample_token(torch.cat([own[i] for i in members]), chance, *options).tolist(),
            ):
                tokens[i] = token
        for i, (row, token) in enumerate(zip(rows, tokens)):
            row.generated.append(token)
            if row.seen is not None:
                row.seen[token] = True
            if row.avoid:
                row.avoid.push(token)
            assert row.decode is not None
            if token == self.tokenizer.eot:
                self.give(row, row.decode(None), finish='stop')
                self.leave(row)
                continue
            ends = len(row.generated) >= row.max_tokens
            text = row.decode(token) + (row.decode(None) if ends else '')
            if row.logprobs is not None:
                row.waiting.append(
                    self.report(
                        row, token, row.given + len(row.held), logits[i].log_softmax(dim=-1)
                    )
                )
            self.give(row, text, finish='length' if ends else '')
            if self.events[-1][0] is row and self.events[-1][1].finish:
                self.leave(row)

    def give(self, row: Request, text: str, finish: str = '') -> None:
        """Put what is certain now among the step's events: all but a beginning of a stop text, nothing from a whole one on."""
        row.held += text
        found = [at for s in row.stop if (at := row.held.find(s)) >= 0]
        if found:
            row.held, finish = row.held[: min(found)], 'stop'
        keep = 0
        if not finish:
            keep = max(
                (
                    k
                    for s in row.stop
                    for k in range(1, min(len(s), len(row.held) + 1))
                    if row.held.endswith(s[:k])
                ),
                default=0,
            )
        if finish:
            self.rows.discard(row)
        piece = Delta(row.held[: len(row.held) - keep], finish=finish)
        row.held = row.held[len(row.held) - keep :]
        row.given += len(piece.text)
        while row.waiting and (finish or row.waiting[0]['offset'] < row.given or not keep):
            report = row.waiting.pop(0)
            if not (found and report['offset'] >= row.given):
                piece.tokens.append(report)
        self.events.append((row, piece))

    # -------------------------------------------------------------------------
    # Probabilities

    def report(
        self, row: Request, token: int, offset: int, logprob: torch.Tensor | None
    ) -> dict[str, Any]:
        """A token's own log probability, as the model has it before temperature and its like, and those of the likeliest."""
        told: dict[str, Any] = {
            'token': self.shown(token),
            'offset': offset,
            'logprob': None,
            'top': None,
        }
        if logprob is not None:
            told['logprob'] = float(logprob[token])
            if row.logprobs:
                values, ids = logprob.topk(min(row.logprobs, len(logprob)))
                told['top'] = {self.shown(i): v for i, v in zip(ids.tolist(), values.tolist())} | {
                    told['token']: told['logprob']
                }
        return told

    def shown(self, token: int) -> str:
        """A token as text; one that is no whole character as OpenAI's API shows such: bytes:\\xe2\\x80."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode('utf-8')
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{b:02x}' for b in raw)

    def report_prompt(self, row: Request, ids: list[int], start: int, x: torch.Tensor) -> None:
        """Report those of the row's last `score` prompt tokens that the piece x (1, T, C), from token `start` on, foretells."""
        logprobs = self.limit(self.model.lm_head(x[0])).log_softmax(dim=-1)
        first, end = max(0, len(ids) - row.score), min(len(ids), start + x.size(1) + 1)
        offset = len(row.echo) - len(self.tokenizer.decode(ids[max(first, start + (start > 0)) :]))
        decode = self.tokenizer.stream_decoder()
        for i in range(max(first, start + (start > 0)), end):
            row.waiting.append(
                self.report(row, ids[i], max(0, offset), logprobs[i - start - 1] if i else None)
            )  # nothing stands before the first
            offset += len(decode(ids[i]))
