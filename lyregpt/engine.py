"""Continuous batching: requests join and leave the batch between tokens (Orca, Yu et al. 2022).

    engine = Engine(model, tokenizer, deliver)    # run() calls deliver(events) once a step
    threading.Thread(target=engine.run).start()
    engine.submit([Request(prompt, max_tokens=100, seed=7)])

On a CPU, the tokens of a request have the same bits whatever else is in the batch: prompts are read
one at a time, in chunks cut at fixed positions; a batch has at least two rows, as products of one
row round differently; attention covers a multiple of 64 keys (model.batch_invariant_attention).
"""

import contextlib
import copy
import threading
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lyregpt.tokenizer import Tokenizer
from model import GPT, Sampler, ceil_div, fit_context, sample_token

CHUNK = 256  # prompt tokens read between two steps: a long prompt must not block the others
KEYS = 64


@dataclass
class Delta:
    """What one step added to a request: text, its tokens, and how the request ended, if it did."""

    text: str = ''
    tokens: list[dict[str, Any]] = field(default_factory=list)  # token, logprob, top, offset
    finish: str = ''  # stop (the document's end, or a stop text), length, or error
    error: str = ''


@dataclass(eq=False)
class Request:
    """A prompt and the options of its continuation; the engine's own state is below them."""

    prompt: list[int]  # token ids; the last block_size of them are read
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 1337
    stop: Sequence[str] = ()  # texts that end it; they are not part of the result
    logprobs: int | None = None  # report log probabilities, and those of so many likely tokens
    echo: str = ''  # the prompt as text, if the result is to begin with it
    score: int = 0  # with logprobs: report this many prompt tokens, too, the last ones
    avoid: Any = None  # an originality.CopyFilter
    tag: Any = None  # for the caller's own use

    generated: list[int] = field(default_factory=list)
    sampler: Any = None  # a Sampler, once the prompt has been read
    decode: Any = None  # the tokenizer's stream decoder
    position: int = 0  # of the next token
    held: str = ''  # text that may be the beginning of a stop text
    n_emitted: int = 0  # characters
    reports: list[dict[str, Any]] = field(default_factory=list)  # of tokens whose text is held


class QueueFullError(Exception):
    """Too many requests are waiting already."""


class EngineStoppedError(Exception):
    """`run()` has ended."""


class Engine:
    """Processes all submitted requests in `run()`, in one thread; other methods are thread-safe.

    At most `max_batch` requests are generated at once, `max_queue` wait. `deliver` gets a list of
    (request, Delta) after each step.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        deliver: Callable[[list[tuple[Request, Delta]]], Any],
        max_batch: int = 64,
        max_queue: int = 256,
    ):
        self.model, self.tokenizer, self.deliver = model, tokenizer, deliver
        self.max_batch, self.max_queue = max_batch, max_queue
        self.requests: set[Request] = set()  # all that wait or are active
        self.queue: deque[Request] = deque()
        self.active: list[Request] = []  # request i has row i of the cache
        self.changed = threading.Condition()
        self.running, self.stopping = True, False  # not running: the engine has ended
        self.events: list[tuple[Request, Delta]] = []
        self.device = model.transformer.wte.weight.device
        self.capacity = ceil_div(model.config.block_size, KEYS) * KEYS
        # prompts are read into a cache of their own; samples of one prompt read it once
        self.reader = model.new_cache(1, self.capacity)
        self.read_ids: list[int] = []  # the reader's content
        self.logits = torch.empty(0)  # those of the token after it
        self.reading: Request | None = None  # the request whose prompt is not read completely
        # on a CPU the cache grows when more are active at once
        batch = max(2, max_batch) if self.device.type == 'cuda' else 4
        self.cache = model.new_cache(batch, self.capacity)

    def submit(self, requests: Sequence[Request]) -> None:
        """Append the requests to the queue.

        Raises QueueFullError if more than `max_queue` would wait, EngineStoppedError after `run()`.
        """
        with self.changed:
            if not self.running:
                raise EngineStoppedError
            if len(self.requests) + len(requests) > self.max_batch + self.max_queue:
                raise QueueFullError
            self.requests.update(requests)
            self.queue.extend(requests)
            self.changed.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Forget these requests; their rows are free before the next token."""
        with self.changed:
            self.requests.difference_update(requests)
            self.changed.notify()

    def stop(self) -> None:
        """End `run()` after the current step."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    @torch.inference_mode()
    def run(self) -> None:
        """Process requests until `stop()`."""
        try:
            while not self.stopping:
                self.work()
        finally:
            with self.changed:
                self.running = False
            self.fail('the server is stopping')
            self.flush()

    def fail(self, error: str) -> None:
        """End all requests with an error."""
        with self.changed:
            requests = list(self.requests)
            for collection in (self.requests, self.active, self.queue):
                collection.clear()
        self.events += [(request, Delta(finish='error', error=error)) for request in requests]

    def flush(self) -> None:
        """Deliver the events of this step."""
        events, self.events = self.events, []
        self.deliver(events)

    def work(self) -> None:
        """Wait for requests, then read prompts, generate a token for each, and deliver."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.active or self.stopping)
            if self.stopping:
                return
            self.queue = deque(request for request in self.queue if request in self.requests)
        try:
            self.admit()
            for request in self.active.copy():
                if request not in self.requests:  # cancelled
                    self.leave(request)
                elif request.position >= self.model.config.block_size:  # read its later half again
                    self.leave(request)
                    self.queue.appendleft(request)
            if self.active:
                self.step()
        except Exception as error:  # such as out of memory: answer all, and begin anew
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                traceback.print_exc()
            self.read_ids = []
            self.fail(f'the model failed: {type(error).__name__}')
        self.flush()

    # -------------------------------------------------------------------------
    # Joining and leaving the batch

    def admit(self) -> None:
        """Read prompts from the head of the queue, at most CHUNK tokens, and activate them."""
        budget = CHUNK
        while self.queue and budget > 0 and len(self.active) < self.max_batch:
            request = self.queue[0]
            ids = fit_context(request.prompt + request.generated, self.model.config.block_size)
            scored = request.logprobs is not None and request.score > 0 and not request.generated
            n_read = len(self.read_ids)
            # continue what the reader holds if its chunks are those of this prompt
            at_chunk = n_read % CHUNK == 0 or n_read == len(ids)
            usable = at_chunk and self.read_ids == ids[:n_read]
            if not usable or scored and self.reading is not request:
                self.read_ids, n_read = [], 0
                if scored:
                    request.reports = []
            self.reading = request
            chunk = ids[n_read : n_read + CHUNK]
            if chunk:
                self.reader.length = n_read
                x = self.model.hidden(torch.tensor([chunk], device=self.device), self.reader)
                self.logits = self.limit(self.model.lm_head(x[:, -1]))
                if scored:
                    self.report_prompt(request, ids, n_read, x)
                self.read_ids = self.read_ids + chunk
                budget -= len(chunk)
            if len(self.read_ids) == len(ids):
                self.reading = None
                self.enter(request, len(ids))
                self.queue.popleft()

    def enter(self, request: Request, length: int) -> None:
        """Copy what the reader holds to the batch's next row, and choose the first token."""
        if request.sampler is None:
            request.decode = self.tokenizer.stream_decoder()
            request.sampler = Sampler(
                [request.prompt],
                self.model.config,
                self.device,
                request.seed,
                request.repetition_penalty,
                [request.avoid] if request.avoid else None,
            )
            if request.echo or request.reports:
                self.events.append((request, Delta(request.echo, request.reports)))
                request.n_emitted, request.reports = len(request.echo), []
        n = len(self.active)
        if max(2, n + 1) > self.cache.data.size(2):
            cache = self.model.new_cache(min(2 * n, max(2, self.max_batch)), self.capacity)
            cache.data[:, :, :n] = self.cache.data
            self.cache = cache
        self.cache.data[:, :, n, :, :length] = self.reader.data[:, :, 0, :, :length]
        request.position = length
        self.active.append(request)
        if request.max_tokens == 0:
            self.emit(request, '', finish='length')
        else:
            self.choose([request], self.logits)

    def leave(self, request: Request) -> None:
        """Free the request's row; the last row moves there."""
        row, last = self.active.index(request), self.active.pop()
        if last is not request:
            moved = self.cache.data[:, :, len(self.active), :, : last.position]
            self.cache.data[:, :, row, :, : last.position] = moved
            self.active[row] = last

    # -------------------------------------------------------------------------
    # A token for each request

    def step(self) -> None:
        """Read the last token of each active request, and choose the next one."""
        n = len(self.active)
        # on a GPU all rows are computed: it takes no longer, and rounding depends on their number
        size = self.cache.data.size(2) if self.device.type == 'cuda' else max(2, n)
        n_keys = KEYS * ceil_div(max(request.position for request in self.active) + 1, KEYS)
        cache, idle = copy.copy(self.cache), [[0]] * (size - n)
        cache.data = self.cache.data[:, :, :size, :, :n_keys]
        positions = [[request.position] for request in self.active] + idle
        cache.position = torch.tensor(positions, device=self.device)
        last = [[request.generated[-1]] for request in self.active] + idle
        logits = self.model.next_logits(torch.tensor(last, device=self.device), cache)
        for request in self.active:
            request.position += 1
        self.choose(self.active.copy(), self.limit(logits[:n]))

    def limit(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) in fp32, without the padding of the vocabulary: (B, vocab_size)."""
        return logits.float()[:, : self.tokenizer.vocab_size]

    def choose(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Choose the next token of each request from logits (B, V), and emit its text."""
        groups = defaultdict(list)  # rows that share their options are sampled together
        for i, request in enumerate(requests):
            groups[request.temperature, request.top_k, request.top_p].append(i)
        for options, rows in groups.items():
            samplers = [requests[i].sampler for i in rows]
            adjusted = [s.adjust(logits[i : i + 1]) for s, i in zip(samplers, rows)]
            uniform = torch.cat([next(sampler.uniforms) for sampler in samplers])
            tokens = sample_token(torch.cat(adjusted), uniform, *options)
            for i, token, token_id in zip(rows, tokens.split(1), tokens.tolist()):
                requests[i].sampler.push(token)
                self.append(requests[i], token_id, logits[i])

    def append(self, request: Request, token: int, logits: torch.Tensor) -> None:
        """Add a token, chosen from logits (V,), to the request's text."""
        request.generated.append(token)
        if token == self.tokenizer.eot:
            return self.emit(request, request.decode(None), finish='stop')
        text, finish = request.decode(token), ''
        if len(request.generated) >= request.max_tokens:
            text, finish = text + request.decode(None), 'length'
        if request.logprobs is not None:
            offset = request.n_emitted + len(request.held)
            request.reports.append(self.report(request, token, offset, logits.log_softmax(dim=-1)))
        self.emit(request, text, finish)

    def emit(self, request: Request, text: str, finish: str) -> None:
        """Add what is final to the events: no stop text, nor what may be the start of one."""
        request.held += text
        found = [request.held.find(stop) for stop in request.stop if stop in request.held]
        if found:
            request.held, finish = request.held[: min(found)], 'stop'
        n_held = 0
        if finish:
            self.requests.discard(request)
            self.leave(request)
        else:
            for stop in request.stop:
                for k in range(1, min(len(stop), len(request.held) + 1)):
                    if request.held.endswith(stop[:k]):
                        n_held = max(n_held, k)
        delta = Delta(request.held[: len(request.held) - n_held], finish=finish)
        request.held = request.held[len(delta.text) :]
        request.n_emitted += len(delta.text)
        ready = [r for r in request.reports if not n_held or r['offset'] < request.n_emitted]
        request.reports = request.reports[len(ready) :]
        delta.tokens = [r for r in ready if not found or r['offset'] < request.n_emitted]
        self.events.append((request, delta))

    # -------------------------------------------------------------------------
    # Probabilities

    def report(
        self, request: Request, token: int, offset: int, logprobs: torch.Tensor | None
    ) -> dict[str, Any]:
        """A token's log probability, before temperature and so on, and the likeliest tokens'."""
        text = self.token_text(token)
        report: dict[str, Any] = {'token': text, 'offset': offset, 'logprob': None, 'top': None}
        if logprobs is not None:
            report['logprob'] = float(logprobs[token])
            if request.logprobs:
                top = logprobs.topk(min(request.logprobs, len(logprobs)))
                pairs = zip(top.indices.tolist(), top.values.tolist())
                report['top'] = {self.token_text(i): value for i, value in pairs}
                report['top'][text] = report['logprob']
        return report

    def token_text(self, token: int) -> str:
        """A token as text; incomplete characters as in OpenAI's API: bytes:\\xe2\\x80."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode('utf-8')
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{b:02x}' for b in raw)

    def report_prompt(self, request: Request, ids: list[int], start: int, x: torch.Tensor) -> None:
        """Report which of the last `score` tokens x (1, T, C), from `start` on, predicts."""
        logprobs = self.limit(self.model.lm_head(x[0])).log_softmax(dim=-1)
        first = max(len(ids) - request.score, start + 1 if start else 0)
        offset = len(request.echo) - len(self.tokenizer.decode(ids[first:]))
        decode = self.tokenizer.stream_decoder()
        for i in range(first, min(len(ids), start + x.size(1) + 1)):
            predicted = logprobs[i - start - 1] if i else None  # nothing predicts the first token
            request.reports.append(self.report(request, ids[i], max(0, offset), predicted))
            offset += len(decode(ids[i]))
