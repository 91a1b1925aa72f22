"""Load test of a completions server: many clients that stream at once (bench.py --mode=serve)."""

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from configurator import UserError
from lyregpt import ROOT


class Answer(NamedTuple):
    """A complete answer to one request."""

    text: str
    tokens: int
    first_token: float  # seconds
    longest_pause: float  # seconds


async def complete(port: int, fields: dict[str, Any]) -> Answer:
    """One streamed completion. Raises OSError or ValueError if the answer is not complete."""
    asked_at = time.perf_counter()
    streaming = {'stream': True, 'stream_options': {'include_usage': True}}
    body = json.dumps(fields | streaming).encode()
    head = (
        'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
        f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n'
    )
    text, tokens, times, line = '', 0, [], b''
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    try:
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b'data: {'):
                chunk = json.loads(line[6:])
                if 'error' in chunk:
                    raise OSError(chunk['error']['message'])
                tokens = chunk.get('usage', {}).get('completion_tokens', tokens)
                for choice in chunk['choices']:
                    text += choice['text']
                    times.append(time.perf_counter())
    finally:
        writer.close()
    if not tokens:
        raise OSError('the answer broke off')
    pauses = [later - earlier for earlier, later in zip(times, times[1:])]
    return Answer(text, tokens, times[0] - asked_at, max(pauses, default=0))


async def client(port: int, fields: dict[str, Any], seconds: float) -> list[Answer | None]:
    """Ask for the same completion again and again; None stands for an answer that failed."""
    answers: list[Answer | None] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        try:
            answers.append(await complete(port, fields))
        except (OSError, ValueError):
            answers.append(None)
            await asyncio.sleep(0.1)
    return answers


async def load_test(
    server: int, port: int, requests: list[dict[str, Any]], expected: list[str], seconds: float
) -> dict[str, float]:
    """The figures of one client for each request, which all ask for `seconds`.

    `server` is its process id. `expected` has each request's text when asked alone. Raises
    UserError if no answer is complete.
    """
    memory = resident(server)
    began = time.perf_counter()
    by_client = await asyncio.gather(*(client(port, fields, seconds) for fields in requests))
    took = time.perf_counter() - began
    complete_ones = [[a for a in answers if a] for answers in by_client]
    answers = [answer for of_client in complete_ones for answer in of_client]
    if not answers:
        raise UserError('the server gave no complete answer')
    tokens = [sum(a.tokens for a in of_client) for of_client in complete_ones]
    first_tokens = [answer.first_token for answer in answers]
    right = sum(a.text == text for of, text in zip(complete_ones, expected) for a in of)
    return {
        'tokens_per_s': sum(tokens) / took,
        'first_token_ms': 1e3 * statistics.median(first_tokens),
        'slowest_first_token_ms': 1e3 * max(first_tokens),
        'longest_pause_ms': 1e3 * max(answer.longest_pause for answer in answers),
        'answers': len(answers),
        'failed': sum(map(len, by_client)) - len(answers),
        'unlike_alone': len(answers) - right,
        'slowest_client_share': min(tokens) / statistics.median(tokens),
        'server_mb': resident(server),
        'server_grew_mb': resident(server) - memory,
    }


def resident(pid: int) -> float:
    """MB of memory that a process holds now; 0 where the system does not say."""
    try:
        with open(f'/proc/{pid}/statm', encoding='ascii') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
    except OSError:
        return 0.0


@contextlib.contextmanager
def serving(options: list[str]) -> Iterator[tuple[int, int]]:
    """Run `lyregpt serve` with the options; gives its process id and its port. Raises UserError."""
    words = [sys.executable, '-m', 'lyregpt', 'serve', *options]
    server = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        line, address = '', None
        for line in server.stdout or ():
            address = re.match(r'open http://.*?:(\d+) ', line)
            if address:
                break
        else:
            raise UserError(f'lyregpt serve did not start: {line.strip()}')
        yield server.pid, int(address[1])
    finally:
        server.terminate()
        server.wait()
