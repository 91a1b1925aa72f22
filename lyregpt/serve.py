"""The server: a trained model behind an HTTP API like OpenAI's, and a web page on the same port.

    python -m lyregpt serve --out_dir=out-darklyrics           # then open http://127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "The rain", "max_tokens": 60}'

Concurrent requests share one batch (lyregpt/engine.py). The page's Watch tab shows every training
run under --runs_dir. Nothing in a request reaches the file system, and the server makes no
requests of its own: no telemetry, no fonts or scripts from other hosts.
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
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

from lyregpt import threads  # before torch: it decides how torch's threads wait

# isort: split
import plotly
import torch
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configurator import UserError, configure
from lyregpt import originality, report
from lyregpt.dataset import folder_of, token_files
from lyregpt.engine import Delta, Engine, EngineStoppedError, QueueFullError, Request
from lyregpt.generate import load_model
from lyregpt.text import song_header
from model import GPT

LOCAL = ('127.0.0.1', 'localhost', '::1')
DISCONNECTED = 'the client has disconnected'
ERROR_STATUS = {DISCONNECTED: 499}  # 500: other errors of a generation
BODY_TIMEOUT = 30  # seconds in which the next part of a request's body must arrive
MAX_ROWS = 2000  # about how many rows of metrics.csv the page gets
LOGPROBS = {  # OpenAI's names: ours
    'tokens': 'token',
    'token_logprobs': 'logprob',
    'top_logprobs': 'top',
    'text_offset': 'offset',
}
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


@dataclasses.dataclass
class ServeConfig:
    """The options; the comment behind each is its help. Raises ValueError for an invalid one."""

    # What to serve
    out_dir: str = 'out'  # a folder that train.py wrote, or a checkpoint file; '': no model,
    # only the page's Watch tab
    init_from: str = 'resume'  # resume: the model in out_dir; or gpt2 … gpt2-xl, or a folder with
    # such weights
    dataset: str = ''  # originality is measured against its training split; '': the dataset that
    # the model was trained on
    runs_dir: str = '.'  # the page shows every run (a folder with metrics.csv) in here

    # Where, and for whom
    host: str = '127.0.0.1'  # this machine only; 0.0.0.0: everyone who can reach it (then set
    # api_key)
    port: int = 8000  # 0: any free one
    api_key: str = ''  # what clients must send as "Authorization: Bearer …"; '': the value of
    # LYREGPT_API_KEY, or none

    # Limits
    max_batch: int = 64  # sequences generated at once
    max_queue: int = 256  # sequences that may wait; requests beyond that get status 503
    max_new_tokens: int = 4096  # maximum tokens per sequence
    max_body: int = 1_000_000  # bytes of a request

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights
    threads: int | Literal['auto'] = 'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per core
    # that affinity and container limits allow
    quantize: Literal['int8'] | None = None  # int8 weights

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
            raise ValueError('api_key: expected ASCII characters, as it is sent in a header')


# -----------------------------------------------------------------------------
# Requests and errors

T = TypeVar('T')
# fail_fast: an error for each of a million items would take gigabytes
Many = Annotated[list[T], Field(min_length=1, fail_fast=True)]
Tokens = Many[Annotated[int, Field(ge=0)]]
Text = Annotated[str, Field(max_length=1000)]
Stop = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Completion(BaseModel):
    """A request to /v1/completions: OpenAI's fields, and after them ours."""

    model_config = ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)
    model: str | None = None
    prompt: str | Many[str] | Tokens | Many[Tokens] = ''
    max_tokens: int | None = Field(None, ge=0, description='16 by default')
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] = []
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=-(2**63), lt=2**63)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    stream: bool = False
    stream_options: dict[Literal['include_usage', 'include_obfuscation'], bool] | None = None
    user: str | None = None
    # OpenAI's, only with their neutral values
    best_of: int | None = None
    suffix: Literal[''] = ''
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    # Ours
    top_k: int | None = Field(None, ge=0, description='the k most likely tokens only; 0 is off')
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=10, description='above 1: tokens already in the text become less likely'
    )
    artist: Text = Field('', description='for a model of lyrics: song header before the prompt')
    album: Text = ''
    title: Text = ''
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description='keep the last tokens of the prompt; -1: what the context holds'
    )
    originality: bool = Field(False, description='report what is copied from the training split')
    avoid_copying: int = Field(
        0, ge=0, le=1000, description='never copy so many words of training text; 0 is off'
    )

    @model_validator(mode='before')
    @classmethod
    def null_is_default(cls, fields: Any) -> Any:
        """Leave out our fields that are null, as OpenAI's API does."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name not in cls.model_fields
        }


EXPECTED = {  # of fields with several types, whose own errors describe the first type only
    'prompt': 'expected text, a list of texts, a list of token ids, or a list of such lists',
    'stop': 'expected a text or a list of at most 16, none of them empty',
} | dict.fromkeys(
    ('suffix', 'presence_penalty', 'frequency_penalty', 'logit_bias'),
    'is not supported: leave it out',
)
ERROR_TYPES = {
    401: 'authentication_error',
    404: 'not_found_error',
    500: 'server_error',
    503: 'server_error',
}
ERROR_HEADERS = {401: {'WWW-Authenticate': 'Bearer'}, 503: {'Retry-After': '1'}}
ERRORS: Any = {  # for the schema
    status: {'description': 'an error', 'content': {'application/json': {}}}
    for status in (400, 401, 404, 408, 413, 500, 503)
}


class ApiError(Exception):
    """An error for the client, in the format of OpenAI's API."""

    def __init__(self, status: int, message: str, param: str = '', code: str = ''):
        super().__init__(message)
        error = {
            'message': message,
            'type': ERROR_TYPES.get(status, 'invalid_request_error'),
            'param': param or None,
            'code': code or None,
        }
        self.status, self.body = status, {'error': error}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The error as a response."""
        headers = ERROR_HEADERS.get(self.status, {}) | (headers or {})
        return JSONResponse(self.body, self.status, headers)


def as_api_error(error: Exception, path: str = '') -> ApiError:
    """What the client is told about an error."""
    if isinstance(error, RequestValidationError):
        return invalid(error.errors()[0])
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f'{path}: {error.detail}')
    if isinstance(error, asyncio.TimeoutError):
        return ApiError(408, f'the request did not arrive within {BODY_TIMEOUT} s')
    if isinstance(error, ApiError):
        return error
    return ApiError(500, f'the server failed: {type(error).__name__}')


def invalid(error: dict[str, Any]) -> ApiError:
    """What the client is told about one of pydantic's errors."""
    name = next((str(part) for part in error['loc'] if part != 'body'), '')
    if error['type'] == 'json_invalid':
        return ApiError(400, f'the body is not JSON: {error["ctx"]["error"]}')
    if error['type'] == 'extra_forbidden':
        return ApiError(400, f'unknown field {name!r}', name, 'unknown_parameter')
    if not name:
        return ApiError(400, 'the body: expected a JSON object, sent as application/json')
    return ApiError(400, f'{name}: {EXPECTED.get(name, error["msg"])}', name)


async def refuse(request: HttpRequest, error: Any) -> Response:
    """The response to an error."""
    return as_api_error(error, request.url.path).response()


class Gate:
    """Middleware that checks host name, API key, size and timely arrival before the app is called.

    A web page elsewhere whose name was made to point to this machine must not be able to read.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig):
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        try:
            self.check(scope['path'], dict(scope['headers']))
            message = await self.read(receive)
        except (ApiError, asyncio.TimeoutError) as error:
            response = as_api_error(error).response({'Connection': 'close'})
            return await response(scope, receive, send)
        if message['type'] != 'http.disconnect':  # else nobody waits for the answer
            await self.app(scope, functools.partial(replay, [message], receive), send)

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError for a request that need not be read."""
        host = headers.get(b'host', b'').decode('latin-1').lower()
        host = re.sub(r':\d*$', '', host).strip('[]')
        if self.config.host in LOCAL and host not in LOCAL:
            raise ApiError(400, f'the host {host!r} is not this machine', code='invalid_host')
        key = headers.get(b'authorization', b'').removeprefix(b'Bearer ')
        is_right = secrets.compare_digest(key, self.config.api_key.encode())
        if self.config.api_key and path.startswith(('/v1', '/runs')) and not is_right:
            raise ApiError(
                401,
                'the API key is missing or wrong: send it as "Authorization: Bearer KEY"',
                code='invalid_api_key',
            )
        length = headers.get(b'content-length', b'')
        if length.isdigit():
            self.check_size(int(length))

    def check_size(self, size: int) -> None:
        """Raise ApiError for a body of more than max_body bytes."""
        if size > self.config.max_body:
            message = f'the request is larger than {self.config.max_body} bytes'
            raise ApiError(413, message, code='request_too_large')

    async def read(self, receive: Receive) -> Message:
        """The whole body in one message, or the message that the client has disconnected."""
        body, message = bytearray(), dict[str, Any](more_body=True)
        while message.get('more_body'):
            message = dict(await asyncio.wait_for(receive(), BODY_TIMEOUT))
            if message['type'] == 'http.disconnect':
                return message
            body += message.get('body', b'')
            self.check_size(len(body))
        return {'type': 'http.request', 'body': bytes(body)}


async def replay(messages: list[Message], receive: Receive) -> Message:
    """The next of `messages`, then what the client sends later."""
    if messages:
        return messages.pop()
    return await receive()


# -----------------------------------------------------------------------------
# The model


Prompt = tuple[list[int], int, str]  # ids, how many (the last) the client sent, those as text


class Service:
    """The model and what is known about it; turns HTTP requests into requests to the engine."""

    def __init__(self, config: ServeConfig):
        names = ('out_dir', 'init_from', 'device', 'dtype', 'threads', 'quantize')
        options = {name: getattr(config, name) for name in names}
        self.config = config
        options['batch_sizes'] = (1, min(16, config.max_batch))
        # All computing is done in one thread: a second one would have its own OpenMP threads, which
        # would outnumber the cores, and each wait would end in sleep (one client got 205 tokens/s
        # instead of 331).
        self.thread = ThreadPoolExecutor(1, 'engine')
        self.model, self.tokenizer, about = self.thread.submit(load_model, **options).result()
        try:
            self.engine = self.thread.submit(
                Engine, self.model, self.tokenizer, self.deliver, config.max_batch, config.max_queue
            ).result()
        except torch.OutOfMemoryError:
            raise UserError(
                f'max_batch={config.max_batch}: the keys and values of so many sequences do not '
                'fit into the memory of this GPU; lower --max_batch'
            ) from None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.index: Future[originality.Index] | None = None
        self.dataset = config.dataset or str(about.get('config', {}).get('dataset', ''))
        source = config.out_dir if config.init_from == 'resume' else config.init_from
        self.name = os.path.basename(os.path.abspath(source))
        with torch.device('meta'):  # quantized and packed weights are not parameters any more
            size = GPT(self.model.config).num_params()
        self.about = {
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
        """Hand the deltas of a step to those who wait for them, in the server's thread."""
        assert self.loop is not None
        with contextlib.suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(distribute, events)

    def training_index(self) -> 'Future[originality.Index]':
        """The index of the training split. Raises ApiError if the split is not available.

        It is built on first use, in a thread that ends with the program.
        """
        if not self.about['originality']:
            message = 'the training split of this model is not on this machine'
            message += ', so copying cannot be detected'
            raise ApiError(400, message, 'originality')
        if self.index is None:
            self.index = Future()
            self.index.set_running_or_notify_cancel()  # a client that leaves must not cancel it
            threading.Thread(target=self.build_index, args=[self.index], daemon=True).start()
        return self.index

    def build_index(self, index: 'Future[originality.Index]') -> None:
        """Build the index of the training split, or record why that failed."""
        try:
            index.set_result(originality.index_of({}, self.dataset))
        except UserError as error:
            index.set_exception(ApiError(400, str(error), 'originality'))
        except Exception as error:
            index.set_exception(error)

    def check(self, ask: Completion) -> None:
        """Check what the fields' types do not express. Raises ApiError."""
        most = self.config.max_new_tokens
        if ask.model not in (None, self.name):
            message = f'the model {ask.model!r} is not here; there is {self.name!r}'
            raise ApiError(404, message, 'model', 'model_not_found')
        if ask.max_tokens is not None and ask.max_tokens > most:
            message = f'max_tokens={ask.max_tokens}: expected at most {most}'
            raise ApiError(400, message, 'max_tokens')
        if ask.best_of not in (None, ask.n):
            message = f'best_of={ask.best_of} is not supported: leave it out, or set it to n'
            raise ApiError(400, message, 'best_of')
        if ask.stream_options and not ask.stream:
            raise ApiError(400, 'stream_options needs stream=true', 'stream_options')
        if ask.avoid_copying == 1:
            message = 'avoid_copying=1: expected 2 or more words, or 0 for off'
            raise ApiError(400, message, 'avoid_copying')

    def prompts(self, ask: Completion) -> list[Prompt]:
        """The prompt of each sample. Raises ApiError."""
        asked: Any = ask.prompt
        if isinstance(asked, str) or isinstance(asked[0], int):
            asked = [asked]
        if len(asked) * ask.n > max(self.config.max_batch, self.config.max_queue):
            message = f'{len(asked)} prompts × n={ask.n}: more sequences than this server accepts'
            raise ApiError(400, f'{message} at once', 'n')
        try:
            encoded = [self.encode(prompt, ask) for prompt in asked]
        except UserError as error:
            raise ApiError(400, str(error), 'prompt') from None
        return [prompt for prompt in encoded for _ in range(ask.n)]

    def encode(self, prompt: str | list[int], ask: Completion) -> Prompt:
        """A prompt after its song header. Raises ApiError if it is too long, UserError."""
        header = song_header(ask.artist, ask.album, '', ask.title)
        size, eot = self.model.config.block_size, self.tokenizer.eot
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(header + prompt)
        else:
            ids = self.tokenizer.encode(header) + prompt
        own = len(ids)
        if eot is not None and (header or isinstance(prompt, str)):
            ids = [eot, *ids]  # a document begins after the end of another, as in sample.py
        ids = ids or self.tokenizer.encode('\n')
        if ask.truncate_prompt_tokens is not None:
            keep = max(0, ask.truncate_prompt_tokens) or size
            ids = ids[-min(size, keep) :]
        if len(ids) > size:
            message = (
                f'the prompt has {len(ids)} tokens, the context {size}: shorten it, or send '
                'truncate_prompt_tokens=-1 to keep its end'
            )
            raise ApiError(400, message, 'prompt', 'context_length_exceeded')
        own = min(own, len(ids))
        return ids, own, self.tokenizer.decode(ids[len(ids) - own :])

    def requests(self, ask: Completion, prompts: list[Prompt], index: Any) -> list[Request]:
        """A request to the engine for each prompt; number i uses seed + i, as in sample.py."""
        deltas: asyncio.Queue[tuple[Request, Delta]] = asyncio.Queue()
        max_tokens = 16 if ask.max_tokens is None else ask.max_tokens
        return [
            Request(
                ids,
                max_tokens=min(max_tokens, self.config.max_new_tokens),
                temperature=ask.temperature,
                top_k=ask.top_k,
                top_p=ask.top_p,
                repetition_penalty=ask.repetition_penalty,
                seed=ask.seed + i,
                stop=[ask.stop] if isinstance(ask.stop, str) else ask.stop,
                logprobs=ask.logprobs,
                echo=text if ask.echo else '',
                score=own if ask.echo and ask.logprobs is not None else 0,
                avoid=originality.CopyFilter(index, self.tokenizer, ask.avoid_copying, text)
                if ask.avoid_copying
                else None,
                tag=deltas,
            )
            for i, (ids, own, text) in enumerate(prompts)
        ]


def has_training_split(dataset: str) -> bool:
    """Is the training split of the dataset on this machine?"""
    try:
        return bool(dataset) and bool(token_files(folder_of(dataset), 'train'))
    except UserError:
        return False


def distribute(events: list[tuple[Request, Delta]]) -> None:
    """Put deltas into the queues of those who wait for them."""
    for request, delta in events:
        request.tag.put_nowait((request, delta))


# -----------------------------------------------------------------------------
# Answers


@dataclasses.dataclass
class Answer:
    """The answer to a completion request, while the engine generates it."""

    service: Service
    ask: Completion
    prompts: list[Prompt]  # one for each of the requests
    requests: list[Request]
    index: originality.Index | None  # None: originality is not measured
    head: dict[str, Any]  # the fields that all parts of the answer have

    async def choices(self) -> AsyncIterator[dict[str, Any]]:
        """Parts of the answer's `choices`, until all requests are finished.

        Raises ApiError if the model fails or the client disconnects.
        """
        number = {request: i for i, request in enumerate(self.requests)}
        texts, left = [''] * len(self.requests), len(self.requests)
        try:
            while left:
                request, delta = await self.requests[0].tag.get()
                i = number[request]
                texts[i] += delta.text
                if delta.finish == 'error':
                    raise ApiError(ERROR_STATUS.get(delta.error, 500), delta.error)
                choice: dict[str, Any] = {
                    'text': delta.text,
                    'index': i,
                    'logprobs': logprobs_of(delta),
                    'finish_reason': delta.finish or None,
                }
                if delta.finish:
                    left -= 1
                if delta.finish and self.index:
                    choice['originality'] = await asyncio.to_thread(
                        measure, self.index, self.prompts[i][2], texts[i], request.echo
                    )
                yield choice
        finally:  # also when the client has disconnected, or the model failed
            self.service.engine.cancel(self.requests)

    def usage(self) -> dict[str, int]:
        """Tokens read and generated; a prompt counts once, however many samples it has."""
        read = sum(len(request.prompt) for request in self.requests[:: self.ask.n])
        generated = sum(len(request.generated) for request in self.requests)
        return {
            'prompt_tokens': read,
            'completion_tokens': generated,
            'total_tokens': read + generated,
        }

    async def complete(self, http: HttpRequest) -> JSONResponse:
        """The whole answer in one response."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self.requests]
        watching = asyncio.create_task(watch(http, self.requests[0]))
        try:
            async for choice in self.choices():
                parts[choice['index']].append(choice)
        finally:
            watching.cancel()
        choices = [join(of_one) for of_one in parts]
        return JSONResponse(self.head | {'choices': choices, 'usage': self.usage()})

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            async for choice in self.choices():
                yield event(self.head | {'choices': [choice]})
            if (self.ask.stream_options or {}).get('include_usage'):
                yield event(self.head | {'choices': [], 'usage': self.usage()})
            yield 'data: [DONE]\n\n'
        except Exception as error:
            yield event(as_api_error(error).body)
            if not isinstance(error, ApiError):
                raise  # into the server's log
        finally:
            self.service.engine.cancel(self.requests)


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f'data: {json.dumps(data)}\n\n'


def logprobs_of(delta: Delta) -> dict[str, list[Any]] | None:
    """The log probabilities in OpenAI's format; None if there are none."""
    if not delta.tokens:
        return None
    return {name: [token[key] for token in delta.tokens] for name, key in LOGPROBS.items()}


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of one choice as a single one."""
    logprobs = [part['logprobs'] for part in parts if part['logprobs']]
    joined = {name: [x for lists in logprobs for x in lists[name]] for name in LOGPROBS}
    text = ''.join(part['text'] for part in parts)
    return parts[-1] | {'text': text, 'logprobs': joined if logprobs else None}


def measure(index: originality.Index, prompt: str, text: str, echo: str) -> dict[str, Any]:
    """The originality of what was generated; `text` is what the client gets, after the echo.

    The offsets are in `text`; a run that begins in a prompt that is not echoed starts at 0.
    """
    generated = text[len(echo) :]
    found = dataclasses.asdict(index.compare(prompt + generated, since=len(prompt)))
    for copied in found['runs']:
        for key in ('start', 'end'):
            copied[key] = max(0, copied[key] - len(prompt) + len(echo))
    return found


async def watch(http: HttpRequest, request: Request) -> None:
    """End the request when its client disconnects: nobody waits for the answer."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.1)
    request.tag.put_nowait((request, Delta(finish='error', error=DISCONNECTED)))


# -----------------------------------------------------------------------------
# Training runs


def find_runs(folder: str) -> dict[str, str]:
    """Folders with a metrics.csv, up to two levels below `folder`: {name in a URL: path}."""
    paths = [
        os.path.dirname(path)
        for pattern in ('', '*', '*/*')
        for path in glob.glob(os.path.join(glob.escape(folder), pattern, 'metrics.csv'))
    ]
    names = {os.path.relpath(path, folder).replace(os.sep, '/'): path for path in sorted(paths)}
    if '.' in names:  # a URL cannot end in a dot
        names = {os.path.basename(os.path.abspath(folder)): names.pop('.')} | names
    return {name.encode('utf-8', 'replace').decode(): path for name, path in names.items()}


def read_curves(folder: str) -> dict[str, list[float | None]]:
    """The columns of metrics.csv, without a row that is only partly written. Raises OSError.

    Of a long run every k-th row, and all rows with a validation loss.
    """
    stat = os.stat(os.path.join(folder, 'metrics.csv'))
    return curves_of(folder, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(64)  # the page asks every two seconds
def curves_of(folder: str, changed: int, size: int) -> dict[str, list[float | None]]:
    """The curves of a run whose metrics.csv changed at `changed` and has `size` bytes."""
    rows = report.read_rows(folder)
    every = len(rows) // MAX_ROWS + 1
    kept = [
        row
        for i, row in enumerate(rows)
        if i % every == 0 or row['val_loss'] is not None or i == len(rows) - 1
    ]
    return {key: [row[key] for row in kept] for key in CURVES}


def describe_run(name: str, folder: str) -> dict[str, Any]:
    """The latest figures of a run, and whether it is training now. Raises OSError."""
    last = {
        key: next((value for value in reversed(values) if value is not None), None)
        for key, values in read_curves(folder).items()
    }
    is_recent = time.time() - os.path.getmtime(os.path.join(folder, 'metrics.csv')) < 60
    ended = any(session.get('end') for session in report.read_sessions(folder)[-1:])
    return {
        'name': name,
        'active': is_recent and not ended,
        'step': int(last['step'] or 0),
        'train_loss': last['train_loss'],
        'val_loss': last['val_loss'],
        'tokens_per_second': last['tokens_per_second'],
    }


# -----------------------------------------------------------------------------
# HTTP


def make_app(config: ServeConfig, service: Service | None) -> FastAPI:
    """The application: the API, the runs and the page. `service` None: no model."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service:
            service.loop = asyncio.get_running_loop()
            service.thread.submit(service.engine.run)
        yield
        if service:
            service.engine.stop()

    app = FastAPI(
        title='lyreGPT',
        version='1',
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages would load scripts from elsewhere
        redoc_url=None,
        exception_handlers=dict.fromkeys(
            (ApiError, RequestValidationError, HTTPException, Exception), refuse
        ),
    )
    app.add_middleware(Gate, config=config)
    for router in (model_routes(service), run_routes(config.runs_dir), page_routes()):
        app.include_router(router)
    return app


def model_routes(service: Service | None) -> APIRouter:
    """The routes /v1/completions, /v1/models and /health."""
    router = APIRouter()

    @router.post('/v1/completions', responses=ERRORS)
    async def completions(ask: Completion, http: HttpRequest) -> Response:
        answer = await begin(service, ask)
        if not ask.stream:
            return await answer.complete(http)
        headers = {'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'}
        return StreamingResponse(answer.events(), headers=headers, media_type='text/event-stream')

    @router.get('/v1/models')
    async def models() -> dict[str, Any]:
        return {'object': 'list', 'data': [service.about] if service else []}

    @router.get('/v1/models/{name}', responses=ERRORS)
    async def one_model(name: str) -> dict[str, Any]:
        if service is None or name != service.name:
            raise ApiError(404, f'the model {name!r} is not here', 'model', 'model_not_found')
        return service.about

    @router.get('/health', responses=ERRORS)
    async def health() -> dict[str, Any]:
        if service is None:
            return {'status': 'ok', 'writing': 0, 'waiting': 0}
        if not service.engine.running:
            raise ApiError(503, 'the model has stopped')
        active, total = len(service.engine.active), len(service.engine.requests)
        return {'status': 'ok', 'writing': active, 'waiting': max(0, total - active)}

    return router


async def begin(service: Service | None, ask: Completion) -> Answer:
    """Submit what a client asks for to the engine. Raises ApiError."""
    if service is None:
        message = 'no model is served here, only the runs'
        raise ApiError(404, message, 'model', 'model_not_found')
    service.check(ask)
    prompts, index = await asyncio.to_thread(service.prompts, ask), None
    if ask.originality or ask.avoid_copying:
        index = await asyncio.wrap_future(service.training_index())
    requests = await asyncio.to_thread(service.requests, ask, prompts, index)
    try:
        service.engine.submit(requests)
    except QueueFullError:
        message = f'{service.config.max_queue} sequences are waiting already: try again in a moment'
        raise ApiError(503, message, code='server_overloaded') from None
    except EngineStoppedError:
        raise ApiError(503, 'the server is stopping') from None
    head = {
        'id': f'cmpl-{secrets.token_hex(12)}',
        'object': 'text_completion',
        'created': int(time.time()),
        'model': service.name,
    }
    return Answer(service, ask, prompts, requests, index if ask.originality else None, head)


def run_routes(folder: str) -> APIRouter:
    """The routes /runs and /runs/NAME."""
    router = APIRouter()

    @router.get('/runs')
    def runs() -> dict[str, Any]:
        found = []
        for name, path in find_runs(folder).items():
            with contextlib.suppress(OSError):  # it was moved in the meantime
                found.append(describe_run(name, path))
        return {'runs': found}

    @router.get('/runs/{name:path}', responses=ERRORS)
    def one_run(name: str) -> dict[str, Any]:
        try:
            path = find_runs(folder)[name]  # looked up, never joined to a path
            samples = report.read_samples(path, 100_000)[-3:]
            return {'name': name, 'columns': read_curves(path), 'samples': samples}
        except (KeyError, OSError):
            raise ApiError(404, f'there is no run {name!r} here') from None

    return router


def page_routes() -> APIRouter:
    """The page and the plotting library that it loads."""
    router = APIRouter(include_in_schema=False)
    with open(os.path.join(os.path.dirname(__file__), 'page.html'), encoding='utf-8') as f:
        page = f.read()
    script = re.findall(r'<script>(.*?)</script>', page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    headers = {
        'Content-Security-Policy': "default-src 'none'; connect-src 'self'; "
        "img-src 'self' data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'self' 'sha256-{digest}'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        'X-Content-Type-Options': 'nosniff',
    }
    plotly_file = os.path.join(os.path.dirname(plotly.__file__), 'package_data', 'plotly.min.js')

    @router.get('/')
    async def index() -> Response:
        return Response(page, media_type='text/html; charset=utf-8', headers=headers)

    @router.get('/plotly.min.js')
    async def plotting() -> Response:
        return FileResponse(plotly_file, headers={'Cache-Control': 'max-age=86400'})

    return router


def main() -> None:
    """Serve until Ctrl-C."""
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    config = configure(
        ServeConfig, description="Serve a trained model: an API like OpenAI's, and a web page."
    )
    if not os.path.isdir(config.runs_dir):
        raise UserError(f'runs_dir={config.runs_dir}: no such folder')
    family, host = socket.AF_INET, config.host.replace('0.0.0.0', '127.0.0.1')
    if ':' in host:
        family, host = socket.AF_INET6, f'[{host}]'
    try:  # from now on clients wait instead of being refused
        listening = socket.create_server(
            (config.host, config.port),
            family=family,
            backlog=2048,
            dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        where = f'host={config.host} port={config.port}'
        reason = str(error.strerror or error).split(' (while')[0]  # create_server adds the address
        raise UserError(
            f'{where}: cannot listen there ({reason}); choose another --port or --host'
        ) from None
    with listening:
        service = Service(config) if config.out_dir else None
        app = make_app(config, service)
        address = f'http://{host}:{listening.getsockname()[1]}'
        print(f'open {address} for the page; the API is at {address}/v1; Ctrl-C ends', flush=True)
        if config.host not in LOCAL and not config.api_key:
            print(
                'WARNING: everyone who can reach this machine can use the model and read the runs: '
                'set --api_key',
                file=sys.stderr,
                flush=True,
            )
        options = uvicorn.Config(
            app, log_level='warning', timeout_graceful_shutdown=2, limit_concurrency=1000
        )
        try:
            uvicorn.Server(options).run(sockets=[listening])
        finally:
            if service:
                service.engine.stop()
                service.thread.shutdown()  # ending during a computation would crash the interpreter
