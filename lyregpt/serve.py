"""A trained model over HTTP, as OpenAI's completions API has it, and in a web page on the same port.

    python -m lyregpt serve --out_dir=out-darklyrics              then open http://127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The rain", "max_tokens": 60}'

Requests in flight share one batch (lyregpt/engine.py). Nothing in a request reaches the file system, and the server talks to nobody
else: no telemetry, no fonts or scripts from other hosts. The page's Watch tab shows every training run under --runs_dir.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from lyregpt import threads  # before torch: it decides how torch's threads wait

# isort: split
import plotly
import torch
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from configurator import UserError, configure, run
from lyregpt import originality, report
from lyregpt.dataset import folder_of, token_files
from lyregpt.engine import Delta, Engine, EngineStoppedError, QueueFullError, Request
from lyregpt.generate import load_model
from lyregpt.text import song_header
from model import GPT

HERE = os.path.dirname(os.path.abspath(__file__))
LOCAL = ('127.0.0.1', 'localhost', '::1')
GONE = 'the client has gone'
PATIENCE = 30  # seconds for a request to come to its end
CURVES = (
    'step',
    'tokens',
    'seconds',
    'train_loss',
    'val_loss',
    'lr',
    'grad_norm',
    'tokens_per_second',
)


@dataclass
class ServeConfig:
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # What to serve
    out_dir: str = 'out'  # a folder that train.py wrote, or a checkpoint file; '': no model, only the page's Watch tab
    init_from: str = (
        'resume'  # resume: the model in out_dir; or gpt2 … gpt2-xl, or a folder with such weights
    )
    dataset: str = (
        ''  # its training split tells what is copied; '': the one that the model was trained on
    )
    runs_dir: str = '.'  # the page shows every run (a folder with metrics.csv) in here

    # Where, and for whom
    host: str = (
        '127.0.0.1'  # this machine only; 0.0.0.0: everyone who can reach it (then set api_key)
    )
    port: int = 8000  # 0: any free one
    api_key: str = ''  # what clients must send as "Authorization: Bearer …"; '': what LYREGPT_API_KEY holds, or nothing

    # Limits
    max_batch: int = 64  # texts written at once
    max_queue: int = 256  # texts that wait for a place; more are told to come back (503)
    max_new_tokens: int = 4096  # most tokens of one text
    max_body: int = 1_000_000  # bytes of a request

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = (
        'auto'  # of the weights, as in sample.py
    )
    threads: int | Literal['auto'] = (
        'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per core that affinity and container limits allow
    )
    quantize: Literal['int8'] | None = None  # int8 weights, as in sample.py

    def __post_init__(self) -> None:
        threads.check_threads(self.threads)
        for key, least, most in (
            ('port', 0, 65535),
            ('max_batch', 1, 4096),
            ('max_queue', 0, 10**6),
            ('max_new_tokens', 1, 10**6),
            ('max_body', 1000, 10**9),
        ):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f'{key}={getattr(self, key)}: expected {least} to {most}')
        self.api_key = self.api_key or os.environ.get('LYREGPT_API_KEY', '')
        if not self.api_key.isascii():
            raise ValueError('api_key: expected ASCII characters alone, as it travels in a header')


# -----------------------------------------------------------------------------
# What clients send

Text = Annotated[str, Field(max_length=1000)]
T = TypeVar('T')
Many = Annotated[
    list[T], Field(min_length=1, fail_fast=True)
]  # an error for each of a million would take gigabytes
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class Completion(BaseModel):
    """A request to /v1/completions: OpenAI's fields, and after them ours."""

    model_config = ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)
    model: str | None = None
    prompt: str | Many[str] | Tokens | Many[Tokens] | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16, fail_fast=True)]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    stream: bool | None = None
    stream_options: dict[Literal['include_usage', 'include_obfuscation'], bool] | None = None
    user: str | None = None
    # OpenAI's, in their neutral values only
    best_of: int | None = None
    suffix: Literal[''] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Ours
    top_k: int | None = Field(
        None, ge=0, description='choose among the k likeliest tokens only; 0 is off'
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=10,
        description='above 1: tokens that stand in the text become less likely',
    )
    artist: Text = Field(
        '', description='for a model of lyrics: the head of the song, before the prompt'
    )
    album: Text = ''
    title: Text = ''
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description='keep the last so many tokens of the prompt; -1: as many as the context holds',
    )
    originality: bool = Field(False, description='tell what is copied from the training split')
    avoid_copying: int | None = Field(
        None,
        ge=0,
        le=1000,
        description='never write so many words in a row from the training split; 0 is off',
    )


EXPECTED = {  # of fields that may be several things, whose own errors speak of the first
    'prompt': 'expected text, a list of texts, a list of token ids, or a list of such lists',
    'stop': 'expected a text or a list of at most 16, none of them empty',
    'suffix': 'is not supported: leave it out',
    **{
        k: 'is not supported: leave it out'
        for k in ('presence_penalty', 'frequency_penalty', 'logit_bias')
    },
}


class ApiError(Exception):
    """An error for the client, as OpenAI's API words it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        kind = {
            401: 'authentication_error',
            404: 'not_found_error',
            500: 'server_error',
            503: 'server_error',
        }.get(status, 'invalid_request_error')
        self.status, self.body = (
            status,
            {'error': {'message': message, 'type': kind, 'param': param, 'code': code}},
        )

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """It as an answer."""
        own = {503: {'Retry-After': '1'}, 401: {'WWW-Authenticate': 'Bearer'}}.get(self.status, {})
        return JSONResponse(self.body, self.status, own | (headers or {}))


def failure(error: Exception) -> ApiError:
    """What a client hears of a fault of ours."""
    return ApiError(500, f'the server failed: {type(error).__name__}')


class Gate:
    """Refuses what need not be read: foreign host names, those without the key, and bodies that are too large or do not come to an end."""

    def __init__(self, app: ASGIApp, config: ServeConfig):
        self.app, self.most, self.key = app, config.max_body, config.api_key
        # a web page elsewhere whose name was made to point to this machine must not read along
        self.hosts = LOCAL if config.host in LOCAL else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        headers = dict(scope['headers'])
        host = re.sub(r':\d*$', '', headers.get(b'host', b'').decode('latin-1').lower()).strip('[]')
        told = headers.get(b'content-length', b'0')
        refusal = None
        size = int(told) if told.isdigit() else 0
        if self.hosts and host not in self.hosts:
            refusal = ApiError(400, f'the host {host!r} is not this machine', code='invalid_host')
        elif self.key and scope['path'].startswith(('/v1', '/runs')):
            given = headers.get(b'authorization', b'').removeprefix(b'Bearer ')
            if not secrets.compare_digest(given, self.key.encode()):
                refusal = ApiError(
                    401,
                    'the API key is missing or wrong: send it as "Authorization: Bearer KEY"',
                    code='invalid_api_key',
                )
        if size > self.most:
            refusal = refusal or self.too_large()
        size, whole = 0, False

        async def counted() -> Any:
            nonlocal refusal, size, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else PATIENCE)
            except asyncio.TimeoutError:
                refusal = ApiError(408, f'the request did not come to an end within {PATIENCE} s')
                raise
            size, whole = size + len(message.get('body', b'')), not message.get('more_body')
            if size > self.most:
                refusal = self.too_large()
                raise ValueError  # no reading on
            return message

        async def unless_refused(message: Any) -> None:
            if not refusal:  # else what the application makes of it is not sent
                await send(message)

        if not refusal:
            await self.app(scope, counted, unless_refused)
        if refusal:
            await refusal.response({'Connection': 'close'})(scope, receive, send)

    def too_large(self) -> ApiError:
        """The answer to a body of more than `max_body` bytes: status 413."""
        return ApiError(
            413, f'the request is larger than {self.most} bytes', code='request_too_large'
        )


# -----------------------------------------------------------------------------
# The model's side


class Writer:
    """The model with what is known of it; turns requests into rows of the engine, and pieces into answers."""

    def __init__(self, config: ServeConfig):
        same = ('out_dir', 'init_from', 'device', 'dtype', 'threads', 'quantize')
        options = {name: getattr(config, name) for name in same}
        self.config = config
        # Whatever computes does so in one thread: the OpenMP threads of a second one would outnumber the cores, and where they do each
        # wait ends in sleep (one client got 205 tokens/s instead of 331)
        self.thread = ThreadPoolExecutor(1, 'engine')
        self.model, self.tokenizer, about = self.thread.submit(
            load_model, **options, batch_sizes=(1, min(16, config.max_batch))
        ).result()
        try:
            self.engine = self.thread.submit(
                Engine, self.model, self.tokenizer, self.deliver, config.max_batch, config.max_queue
            ).result()
        except torch.OutOfMemoryError:
            raise UserError(
                f'max_batch={config.max_batch}: the keys and values of so many texts do not fit this GPU; lower --max_batch'
            ) from None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.name = os.path.basename(
            os.path.abspath(config.out_dir if config.init_from == 'resume' else config.init_from)
        )
        self.dataset = config.dataset or str(about.get('config', {}).get('dataset', ''))
        self.index: Future[originality.Index] | None = None
        with torch.device('meta'):
            size = GPT(
                self.model.config
            ).num_params()  # some of the writing model's are packed, and no parameters any more
        self.described = {
            'id': self.name,
            'object': 'model',
            'created': int(time.time()),
            'owned_by': 'lyregpt',
            'parameters': size,
            'context': self.model.config.block_size,
            'max_tokens': config.max_new_tokens,
            'step': about.get('iter_num'),
            'val_loss': report.number(about.get('best_val_loss')),
            'songs': 'lyrics' in self.dataset,
            'originality': has_training_split(self.dataset),
        }

    def deliver(self, events: list[tuple[Request, Delta]]) -> None:
        """Hand a step's pieces to those who wait for them, in the server's thread."""
        assert self.loop is not None

        def put() -> None:
            for row, piece in events:
                row.tag.put_nowait((row, piece))

        with contextlib.suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(put)

    def training_words(self) -> 'Future[originality.Index]':
        """The index of the training split, to be waited for: built, when it is first asked for, in a thread that ends with the program.

        Raises ApiError.
        """
        if not self.described['originality']:
            raise ApiError(
                400,
                'the training split of this model is not at hand, so copying cannot be told',
                'originality',
            )
        if self.index is None:
            self.index = future = Future[originality.Index]()
            future.set_running_or_notify_cancel()  # a client that goes does not end it for the others

            def build() -> None:
                try:
                    future.set_result(originality.index_of({}, self.dataset))
                except Exception as error:
                    future.set_exception(
                        ApiError(400, str(error), 'originality')
                        if isinstance(error, UserError)
                        else error
                    )

            threading.Thread(target=build, daemon=True).start()
        return self.index

    def rows(
        self,
        ask: Completion,
        prompts: list[tuple[list[int], int, str]],
        index: Any,
        to: asyncio.Queue,
    ) -> list[Request]:
        """A row for each sample of each prompt; sample i is drawn with seed + i, as in sample.py."""
        seed = random.getrandbits(63) if ask.seed is None else ask.seed
        n = ask.n or 1
        return [
            Request(
                ids,
                max_tokens=min(16, self.config.max_new_tokens)
                if ask.max_tokens is None
                else ask.max_tokens,
                temperature=1.0 if ask.temperature is None else ask.temperature,
                top_k=ask.top_k,
                top_p=ask.top_p,
                repetition_penalty=ask.repetition_penalty or 1.0,
                seed=seed + i,
                stop=[ask.stop] if isinstance(ask.stop, str) else ask.stop or [],
                logprobs=ask.logprobs,
                echo=text if ask.echo else '',
                score=own if ask.echo and ask.logprobs is not None else 0,
                avoid=originality.CopyFilter(index, self.tokenizer, ask.avoid_copying, text)
                if ask.avoid_copying
                else None,
                tag=to,
            )
            for i, (ids, own, text) in enumerate(prompt for prompt in prompts for _ in range(n))
        ]

    def prompts(self, ask: Completion) -> list[tuple[list[int], int, str]]:
        """Of each prompt the token ids, how many of them (the last ones) were asked for, and those as text. Raises ApiError."""
        head = song_header(ask.artist, ask.album, '', ask.title)
        asked: list[Any] = (
            [ask.prompt or ''] if isinstance(ask.prompt or '', str) else list(ask.prompt or [])
        )
        if isinstance(asked[0], int):
            asked = [asked]
        if len(asked) * (ask.n or 1) > max(self.config.max_batch, self.config.max_queue):
            raise ApiError(
                400,
                f'{len(asked)} prompts × n={ask.n or 1}: more texts than this server takes at once',
                'n',
            )
        begin = (
            [] if self.tokenizer.eot is None else [self.tokenizer.eot]
        )  # a document begins behind the end of another, as in sample.py
        size = self.model.config.block_size
        found = []
        for prompt in asked:
            try:
                own = (
                    self.tokenizer.encode(head + prompt)
                    if isinstance(prompt, str)
                    else self.tokenizer.encode(head) + prompt
                )
                ids = (
                    begin if isinstance(prompt, str) or head else []
                ) + own or self.tokenizer.encode('\n')
                if ask.truncate_prompt_tokens is not None:
                    ids = ids[
                        -(
                            min(size, ask.truncate_prompt_tokens)
                            if ask.truncate_prompt_tokens > 0
                            else size
                        ) :
                    ]
                if len(ids) > size:
                    raise ApiError(
                        400,
                        f'the prompt has {len(ids)} tokens, the context {size}: shorten it, or send truncate_prompt_tokens=-1 to keep its end',
                        'prompt',
                        'context_length_exceeded',
                    )
                asked_for = min(len(own), len(ids))
                found.append((ids, asked_for, self.tokenizer.decode(ids[len(ids) - asked_for :])))
            except UserError as error:
                raise ApiError(400, str(error), 'prompt') from None
        return found

    def check(self, ask: Completion) -> None:
        """What a look at the fields alone cannot tell. Raises ApiError."""
        if ask.model not in (None, self.name):
            raise ApiError(
                404,
                f'the model {ask.model!r} is not here; there is {self.name!r}',
                'model',
                'model_not_found',
            )
        most = self.config.max_new_tokens
        if (ask.max_tokens or 0) > most:
            raise ApiError(
                400, f'max_tokens={ask.max_tokens}: expected {most} at most', 'max_tokens'
            )
        if ask.best_of not in (None, ask.n or 1):
            raise ApiError(400, 'best_of is not supported: leave it out, or let it be n', 'best_of')
        if ask.stream_options is not None and not ask.stream:
            raise ApiError(400, 'stream_options: expected with stream=true only', 'stream_options')
        if ask.avoid_copying == 1:
            raise ApiError(
                400, 'avoid_copying=1: expected 2 or more words, or 0 for off', 'avoid_copying'
            )


def has_training_split(dataset: str) -> bool:
    """Is the training split of the dataset here?"""
    try:
        return bool(dataset) and bool(token_files(folder_of(dataset), 'train'))
    except UserError:
        return False


def judge(index: originality.Index, prompt: str, written: str, echo: str) -> dict[str, Any]:
    """How new `written` is, with places in the text as the client has it; a run that began in the prompt counts from where that shows."""
    found = dataclasses.asdict(index.compare(prompt + written, since=len(prompt)))
    for run_ in found['runs']:
        run_['start'], run_['end'] = (
            max(0, place - len(prompt) + len(echo)) for place in (run_['start'], run_['end'])
        )
    return found


async def pieces(
    writer: Writer, rows: list[Request], prompts: list[str], index: originality.Index | None
) -> AsyncIterator[dict[str, Any]]:
    """Elements of an answer's `choices` as they become certain, until all rows have ended. Raises ApiError if the model fails."""
    number = {row: i for i, row in enumerate(rows)}
    texts = [''] * len(rows)
    left = len(rows)
    try:
        while left:
            row, piece = await rows[0].tag.get()
            i, told = number[row], None
            if piece.finish == 'error':
                raise ApiError(499 if piece.error == GONE else 500, piece.error)
            if piece.tokens:
                told = {
                    'tokens': [t['token'] for t in piece.tokens],
                    'token_logprobs': [t['logprob'] for t in piece.tokens],
                    'top_logprobs': [t['top'] for t in piece.tokens],
                    'text_offset': [t['offset'] for t in piece.tokens],
                }
            choice = {
                'text': piece.text,
                'index': i,
                'logprobs': told,
                'finish_reason': piece.finish or None,
            }
            texts[i] += piece.text
            if piece.finish:
                left -= 1
                if index:
                    choice['originality'] = await asyncio.to_thread(
                        judge, index, prompts[i], texts[i][len(row.echo) :], row.echo
                    )
            yield choice
    finally:  # the client has gone, or the model failed
        writer.engine.cancel(rows)


def describe_usage(rows: list[Request], n: int) -> dict[str, int]:
    """Tokens read and written; a prompt counts once, however many samples it has."""
    read, written = (
        sum(len(row.prompt) for row in rows[::n]),
        sum(len(row.generated) for row in rows),
    )
    return {'prompt_tokens': read, 'completion_tokens': written, 'total_tokens': read + written}


# -----------------------------------------------------------------------------
# The runs


def find_runs(folder: str) -> dict[str, str]:
    """Folders with a metrics.csv, up to two levels below `folder`, by their names in there."""
    found = [
        path
        for pattern in ('', '*', '*/*')
        for path in glob.glob(os.path.join(glob.escape(folder), pattern, 'metrics.csv'))
    ]
    names = {
        printable(
            os.path.relpath(os.path.dirname(path), folder).replace(os.sep, '/')
        ): os.path.dirname(path)
        for path in sorted(found)
    }
    return {
        printable(os.path.basename(os.path.abspath(folder))) if name == '.' else name: path
        for name, path in names.items()
    }  # no URL can end in a dot


def printable(name: str) -> str:
    """The name of a file, also where it is no UTF-8."""
    return name.encode('utf-8', 'replace').decode()


def read_curves(folder: str) -> dict[str, list[float | None]]:
    """The columns of metrics.csv; of a long run every k-th row, and all with a validation loss. A row half-written is left out.

    Raises OSError.
    """
    path = os.path.join(folder, 'metrics.csv')
    stat = os.stat(path)
    return curves_of(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(64)  # the page asks again and again
def curves_of(
    path: str, changed: int, size: int, most: int = 2000
) -> dict[str, list[float | None]]:
    """The columns of a metrics.csv, its rows thinned to `most` or so; `changed` and `size` tell when to read it anew."""
    rows = report.read_rows(os.path.dirname(path))
    every = -(-len(rows) // most)
    rows = [
        row
        for i, row in enumerate(rows)
        if i % max(1, every) == 0 or row['val_loss'] is not None or i == len(rows) - 1
    ]
    return {key: [row[key] for row in rows] for key in CURVES}


def describe_run(name: str, folder: str) -> dict[str, Any]:
    """A run in one line: its last figures, and whether it trains now."""
    curves = read_curves(folder)
    last = {
        key: next((v for v in reversed(values) if v is not None), None)
        for key, values in curves.items()
    }
    sessions = report.read_sessions(folder)
    ended = bool(sessions and sessions[-1].get('end'))
    active = not ended and time.time() - os.path.getmtime(os.path.join(folder, 'metrics.csv')) < 60
    return {'name': name, 'active': active, 'step': int(last['step'] or 0)} | {
        key: last[key] for key in ('train_loss', 'val_loss', 'tokens_per_second')
    }


# -----------------------------------------------------------------------------
# HTTP


def make_app(config: ServeConfig, writer: Writer | None) -> FastAPI:
    """The application: /v1/completions, /v1/models, /health, /runs and the page. `writer` None: no model."""
    with open(os.path.join(HERE, 'page.html'), encoding='utf-8') as f:
        page = f.read()
    script = base64.b64encode(
        hashlib.sha256(re.findall(r'<script>(.*?)</script>', page, re.DOTALL)[0].encode()).digest()
    ).decode()
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'self' 'sha256-{script}'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        if writer:
            writer.loop = asyncio.get_running_loop()
            writer.thread.submit(writer.engine.run)
        yield
        if writer:
            writer.engine.stop()

    app = FastAPI(
        title='lyreGPT', version='1', lifespan=life, docs_url=None, redoc_url=None
    )  # their pages would load scripts from elsewhere
    app.add_middleware(Gate, config=config)

    def refuse(request: HttpRequest, refusal: Any) -> JSONResponse:
        return refusal.response()

    def invalid(request: HttpRequest, error: Any) -> JSONResponse:
        first = error.errors()[0]
        if first['type'] == 'json_invalid':
            return refuse(request, ApiError(400, f'the body is not JSON: {first["ctx"]["error"]}'))
        where = [str(part) for part in first['loc'] if part != 'body']
        name = where[0] if where else None
        if first['type'] == 'extra_forbidden':
            return refuse(
                request, ApiError(400, f'unknown field {name!r}', name, 'unknown_parameter')
            )
        text = (
            f'{name}: {EXPECTED.get(name, first["msg"])}'
            if name
            else 'the body: expected a JSON object, sent as application/json'
        )
        return refuse(request, ApiError(400, text, name))

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, lambda request, error: refuse(request, failure(error)))
    app.add_exception_handler(
        HTTPException,
        lambda request, error: refuse(
            request, ApiError(error.status_code, f'{request.url.path}: {error.detail}')
        ),
    )

    def model() -> Writer:
        if writer is None:
            raise ApiError(
                404, 'no model is served here, only the runs', 'model', 'model_not_found'
            )
        return writer

    errors: Any = {
        status: {'description': 'an error', 'content': {'application/json': {}}}
        for status in (400, 401, 404, 408, 413, 500, 503)
    }

    @app.post('/v1/completions', responses=errors)
    async def completions(ask: Completion, request: HttpRequest) -> Response:
        writer = model()
        writer.check(ask)
        prompts = await asyncio.to_thread(writer.prompts, ask)
        index: Any = (
            await asyncio.wrap_future(writer.training_words())
            if ask.originality or ask.avoid_copying
            else None
        )
        rows = await asyncio.to_thread(writer.rows, ask, prompts, index, asyncio.Queue())
        try:
            writer.engine.submit(rows)
        except QueueFullError:
            raise ApiError(
                503,
                f'{config.max_queue} texts are waiting already: try again in a moment',
                code='server_overloaded',
            ) from None
        except EngineStoppedError:
            raise ApiError(503, 'the server is stopping') from None
        starts = [text for _, _, text in prompts for _ in range(ask.n or 1)]
        coming = pieces(writer, rows, starts, index if ask.originality else None)
        head = {
            'id': f'cmpl-{secrets.token_hex(12)}',
            'object': 'text_completion',
            'created': int(time.time()),
            'model': writer.name,
        }
        if not ask.stream:
            choices = [
                {'text': '', 'index': i, 'logprobs': None, 'finish_reason': None}
                for i in range(len(rows))
            ]
            watching = asyncio.create_task(watch(request, rows[0]))
            try:
                async for choice in coming:
                    whole = choices[choice['index']]
                    text, told = whole['text'] + choice['text'], whole['logprobs'] or {}
                    told = (
                        {k: told.get(k, []) + v for k, v in choice['logprobs'].items()}
                        if choice['logprobs']
                        else told or None
                    )
                    whole.update(choice | {'text': text, 'logprobs': told})
            finally:
                watching.cancel()
            return JSONResponse(
                head | {'choices': choices, 'usage': describe_usage(rows, ask.n or 1)}
            )

        async def events() -> AsyncIterator[str]:
            try:
                async for choice in coming:
                    yield f'data: {json.dumps(head | {"choices": [choice]})}\n\n'
                if (ask.stream_options or {}).get('include_usage'):
                    yield f'data: {json.dumps(head | {"choices": [], "usage": describe_usage(rows, ask.n or 1)})}\n\n'
                yield 'data: [DONE]\n\n'
            except ApiError as refusal:
                yield f'data: {json.dumps(refusal.body)}\n\n'
            except Exception as error:  # the client is told before the server's log has the rest
                yield f'data: {json.dumps(failure(error).body)}\n\n'
                raise
            finally:
                writer.engine.cancel(rows)

        return StreamingResponse(
            events(),
            media_type='text/event-stream',
            headers={'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'},
        )

    @app.get('/v1/models')
    async def models() -> dict[str, Any]:
        return {'object': 'list', 'data': [writer.described] if writer else []}

    @app.get('/v1/models/{name}', responses=errors)
    async def one_model(name: str) -> dict[str, Any]:
        if name != model().name:
            raise ApiError(404, f'the model {name!r} is not here', 'model', 'model_not_found')
        return model().described

    @app.get('/health', responses=errors)
    async def health() -> dict[str, Any]:
        if writer and not writer.engine.running:
            raise ApiError(503, 'the model has stopped')
        writing, here = (len(writer.engine.active), len(writer.engine.requests)) if writer else (0, 0)
        return {'status': 'ok', 'writing': writing, 'waiting': max(0, here - writing)}

    @app.get('/runs')
    def runs() -> dict[str, Any]:
        told = []
        for name, folder in find_runs(config.runs_dir).items():
            with contextlib.suppress(OSError):  # moved away meanwhile
                told.append(describe_run(name, folder))
        return {'runs': told}

    @app.get('/runs/{name:path}', responses=errors)
    def one_run(name: str) -> dict[str, Any]:
        folder = find_runs(config.runs_dir).get(name)  # looked up, never joined to a path
        with contextlib.suppress(OSError):  # moved away meanwhile
            if folder:
                return {
                    'name': name,
                    'columns': read_curves(folder),
                    'samples': report.read_samples(folder, 100_000)[-3:],
                }
        raise ApiError(404, f'there is no run {name!r} here')

    @app.get('/', include_in_schema=False)
    async def index() -> Response:
        return Response(
            page,
            media_type='text/html; charset=utf-8',
            headers={'Content-Security-Policy': policy, 'X-Content-Type-Options': 'nosniff'},
        )

    @app.get('/plotly.min.js', include_in_schema=False)
    async def plotting() -> Response:
        return FileResponse(
            os.path.join(os.path.dirname(plotly.__file__), 'package_data', 'plotly.min.js'),
            headers={'Cache-Control': 'max-age=86400'},
        )

    return app


async def watch(request: HttpRequest, row: Request) -> None:
    """End the request of `row` when its client closes the connection: nobody waits for the answer."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    row.tag.put_nowait((row, Delta(finish='error', error=GONE)))


def main() -> None:
    """Serve until Ctrl-C."""
    config = configure(
        ServeConfig, description="Serve a trained model: an API like OpenAI's, and a web page."
    )
    if not os.path.isdir(config.runs_dir):
        raise UserError(f'runs_dir={config.runs_dir}: no such folder')
    family = socket.AF_INET6 if ':' in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        try:
            if os.name == 'posix':  # elsewhere it would let two servers share a port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((config.host, config.port))
            listening.listen(2048)  # from now on clients wait, and are not refused
        except OSError as error:
            where = f'host={config.host} port={config.port}'
            raise UserError(
                f'{where}: cannot listen there ({error.strerror or error}); choose another --port or --host'
            ) from None
        writer = Writer(config) if config.out_dir else None
        app = make_app(config, writer)
        port = listening.getsockname()[1]
        at = f'http://{"127.0.0.1" if config.host == "0.0.0.0" else f"[{config.host}]" if family == socket.AF_INET6 else config.host}:{port}'
        print(f'open {at} for the page; the API is at {at}/v1; Ctrl-C ends', flush=True)
        if config.host not in LOCAL and not config.api_key:
            print(
                'WARNING: everyone who can reach this machine can use the model and read the runs: set --api_key',
                file=sys.stderr,
                flush=True,
            )
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level='warning', timeout_graceful_shutdown=2, limit_concurrency=1000
            )
        )
        try:
            server.run(sockets=[listening])
        finally:
            if writer:
                writer.engine.stop()
                writer.thread.shutdown()  # a thread in the midst of a product would take the interpreter down with it


if __name__ == '__main__':
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    run(main)
