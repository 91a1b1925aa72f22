"""The server as its clients see it: the real program, the real openai client, hostile requests."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import requests
import torch

from lyregpt import checkpoint, originality
from lyregpt.load_test import load_test
from lyregpt.quantize import quantize_model
from lyregpt.report import METRICS
from tests.conftest import ROOT, script

openai = pytest.importorskip('openai')
pytest.importorskip('fastapi')

from lyregpt import serve  # noqa: E402


@pytest.fixture(scope='module')
def server(trained):
    """The address of a running server with room for 4 texts, and 8 that wait."""
    with serving(
        trained, '--max_batch=4', '--max_queue=8', '--max_new_tokens=3000', '--max_body=100000'
    ) as address:
        yield address


LOG = []  # what the server that was started last writes to stderr


class serving:
    """The server at work on any free port: `with serving(out_dir, …) as address`."""

    def __init__(self, out_dir, *words, **env):
        self.model = bool(out_dir)
        command = [
            sys.executable,
            '-m',
            'lyregpt',
            'serve',
            f'--out_dir={out_dir}',
            '--port=0',
            '--device=cpu',
            f'--runs_dir={out_dir or "."}',
            *words,
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env,
            cwd=ROOT,
        )

    def __enter__(self):
        line = self.process.stdout.readline()
        if 'http' not in line:
            raise AssertionError(self.process.communicate())
        LOG.clear()
        if self.model:
            self.process.stderr.readline()  # the model in a line
        threading.Thread(target=lambda: LOG.extend(self.process.stderr), daemon=True).start()
        return next(word for word in line.split() if word.startswith('http'))

    def __exit__(self, *error):
        self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture(scope='module')
def client(server):
    return openai.OpenAI(base_url=server + '/v1', api_key='any', max_retries=0)


@pytest.fixture(scope='module')
def name(client):
    return client.models.list().data[0].id


def complete(server, **fields):
    return requests.post(server + '/v1/completions', json=fields, timeout=60)


def idle(server, seconds=5):
    """Wait until the server writes nothing; False if it goes on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        told = requests.get(server + '/health', timeout=10).json()
        if told['writing'] == told['waiting'] == 0:
            return True
        time.sleep(0.05)
    return False


# -----------------------------------------------------------------------------
# With the openai client


def test_models(client, name, trained):
    assert client.models.retrieve(name).id == name == trained.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve('gpt-5')


def test_what_it_writes_is_what_generate_writes(client, name, trained):
    """Sample i of a prompt is generate's with seed + i, whether it comes at once or as a stream."""
    path, state = checkpoint.load_from(str(trained))
    model, tokenizer = (
        quantize_model(checkpoint.build_model(state, path, dropout=0.0).eval()),
        checkpoint.tokenizer_of(state),
    )
    prompt = [tokenizer.eot] + tokenizer.encode('The rain')
    rows = [[], [], []]
    for tokens in model.generate(
        [prompt] * 3,
        60,
        temperature=0.9,
        top_p=0.95,
        seed=11,
        vocab_size=tokenizer.vocab_size,
        stop_tokens=[tokenizer.eot],
    ):
        for row, token in zip(rows, tokens.tolist()):
            row.extend([token] if token >= 0 and token != tokenizer.eot else [])
    expected = [tokenizer.decode(row) for row in rows]
    options = dict(
        model=name, prompt='The rain', max_tokens=60, temperature=0.9, top_p=0.95, seed=11, n=3
    )
    answer = client.completions.create(**options)
    assert [choice.text for choice in answer.choices] == expected
    assert {choice.finish_reason for choice in answer.choices} <= {'stop', 'length'}
    assert (
        answer.usage.prompt_tokens == len(prompt)
        and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    )
    texts, ends, usage = ['', '', ''], [], None
    for chunk in client.completions.create(
        **options, stream=True, stream_options={'include_usage': True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert texts == expected and len(ends) == 3 and usage == answer.usage


def test_prompts_of_every_kind(client, name, trained):
    tokenizer = checkpoint.tokenizer_of(checkpoint.load_from(str(trained))[1])
    ids = [tokenizer.eot] + tokenizer.encode('The rain')
    options = dict(model=name, max_tokens=12, seed=5, extra_body={'top_k': 50})
    (text,) = [c.text for c in client.completions.create(prompt='The rain', **options).choices]
    (next_text,) = [
        c.text
        for c in client.completions.create(prompt='The rain', **options | {'seed': 6}).choices
    ]
    both = client.completions.create(prompt=['The rain', 'A stone'], **options).choices
    assert [c.index for c in both] == [0, 1] and both[0].text == text != both[1].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    assert [c.text for c in client.completions.create(prompt=[ids, ids], **options).choices] == [
        text,
        next_text,
    ]
    echoed = client.completions.create(prompt='The rain', echo=True, **options).choices[0].text
    assert echoed == 'The rain' + text
    begun = client.completions.create(prompt='', **options).choices[0].text
    assert client.completions.create(prompt=None, **options).choices[0].text == begun
    stop = text[4:6]
    stopped = client.completions.create(prompt='The rain', stop=[stop, 'never'], **options).choices[
        0
    ]
    assert stopped.text == text[: text.find(stop)] and stopped.finish_reason == 'stop'
    head = (
        client.completions.create(
            prompt='',
            model=name,
            max_tokens=1,
            echo=True,
            extra_body={'title': 'Rain', 'artist': 'Mud'},
        )
        .choices[0]
        .text
    )
    assert head.startswith('Artist: Mud\nTitle: Rain\n\n')


def test_logprobs_score_a_prompt(client, name, trained):
    """As evaluation harnesses ask: no new tokens, the prompt's probabilities in a forward pass."""
    path, state = checkpoint.load_from(str(trained))
    model, tokenizer = (
        checkpoint.build_model(state, path, dropout=0.0).eval(),
        checkpoint.tokenizer_of(state),
    )
    prompt = 'The rain on the stone'
    told = client.completions.create(
        model=name, prompt=prompt, max_tokens=0, echo=True, logprobs=2
    ).choices[0]
    ids = [tokenizer.eot] + tokenizer.encode(prompt)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
    assert told.text == ''.join(told.logprobs.tokens) == prompt
    assert told.logprobs.token_logprobs == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4
    )
    assert {len(top) for top in told.logprobs.top_logprobs} == {
        2,
        3,
    } and told.logprobs.text_offset == list(range(len(prompt)))
    listed = client.completions.create(
        model=name, prompt=[prompt], max_tokens=0, echo=True, logprobs=2
    ).choices[0]
    assert listed == told and all(
        token in top for token, top in zip(told.logprobs.tokens, told.logprobs.top_logprobs)
    )
    written = client.completions.create(
        model=name, prompt=prompt, max_tokens=5, logprobs=0
    ).choices[0]
    assert ''.join(written.logprobs.tokens) == written.text and written.logprobs.text_offset[0] == 0


def test_requests_share_the_model_and_seeds_hold(server):
    """Twelve clients at once, more than the places, get to the letter what each gets alone."""
    asked = [
        dict(prompt='The ' + 'rain ' * (i % 5), max_tokens=20 + 7 * i, seed=i, temperature=1.0)
        for i in range(12)
    ]
    alone = [complete(server, **ask).json()['choices'][0]['text'] for ask in asked]
    together = [''] * len(asked)

    def one(i):
        together[i] = complete(server, **asked[i]).json()['choices'][0]['text']

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_copying_is_told_and_avoided(server, client, name, chars):
    """As lyregpt/originality.py tells it of the text; and with avoid_copying, none is found."""
    index = originality.Index.open(str(chars))
    assert client.models.list().data[0].originality is True
    options = dict(model=name, prompt='The', max_tokens=200, temperature=0.3, n=3, seed=1)
    plain = client.completions.create(
        **options, echo=True, extra_body={'originality': True}
    ).choices
    for choice in plain:
        assert choice.originality == dataclasses.asdict(index.compare(choice.text, since=3))
    assert max(choice.originality['longest'] for choice in plain) >= 2
    new = client.completions.create(
        **options, extra_body={'originality': True, 'avoid_copying': 2}
    ).choices
    assert all(choice.originality['longest'] < 2 for choice in new)
    *_, last = client.completions.create(
        **options | {'n': 1}, stream=True, extra_body={'originality': True}
    )
    moved = [
        run | {k: max(0, run[k] - 3) for k in ('start', 'end')}
        for run in plain[0].originality['runs']
    ]  # without the echo
    assert last.choices[0].originality == plain[0].originality | {'runs': moved}


# -----------------------------------------------------------------------------
# Those who leave, and those who are too many


def test_who_hangs_up_frees_the_place(server, client, name):
    stream = client.completions.create(
        model=name, prompt='x', max_tokens=3000, n=4, stream=True, seed=1
    )
    next(iter(stream))
    assert not idle(server, 0.1)
    stream.close()
    assert idle(server)
    with pytest.raises(requests.Timeout):  # not streaming: the server must notice all the same
        requests.post(server + '/v1/completions', json={'max_tokens': 3000, 'n': 4}, timeout=0.5)
    assert idle(server) and not LOG  # it is no fault of the server's


def test_too_many_are_told_to_come_back(server, client, name):
    streams = [
        client.completions.create(model=name, prompt='x', max_tokens=3000, n=n, stream=True)
        for n in (4, 8)
    ]
    refused = complete(server, prompt='x', n=2)
    assert (
        refused.status_code == 503
        and refused.headers['Retry-After']
        and refused.json()['error']['code'] == 'server_overloaded'
    )
    for stream in streams:
        stream.close()
    assert idle(server) and complete(server, prompt='x').status_code == 200


@pytest.mark.long
def test_sixty_four_clients_for_a_minute(trained):
    """No error, nobody starved, every answer that of the same request alone, and no memory lost."""
    ask = [
        dict(prompt='The ' + 'rain ' * (i % 5), max_tokens=100 + i, temperature=1.0, seed=i)
        for i in range(64)
    ]
    with serving(trained) as address:
        port = int(address.rsplit(':', 1)[1])
        alone = [complete(address, **fields).json()['choices'][0]['text'] for fields in ask]
        words = ['pgrep', '-f', f'lyregpt serve --out_dir={trained}']
        pid = int(subprocess.run(words, capture_output=True, text=True).stdout.split()[0])
        asyncio.run(load_test(pid, port, ask, alone, 15))  # until every buffer has its size
        figures = asyncio.run(load_test(pid, port, ask, alone, 60))
        print(figures)
        assert figures['failed'] == figures['unlike_alone'] == 0 and figures['answers'] > 64
        assert figures['slowest_client_share'] > 0.5 and figures['server_grew_mb'] < 20


# -----------------------------------------------------------------------------
# Mistakes and malice


@pytest.mark.parametrize(
    'fields, status, says',
    [
        ({'promt': 'x'}, 400, 'promt'),
        ({'promt': None}, 400, 'promt'),
        ({'prompt': 5}, 400, 'list of texts'),
        ({'prompt': []}, 400, 'prompt'),
        ({'prompt': [[]]}, 400, 'prompt'),
        ({'prompt': [10**9]}, 400, 'vocabulary'),
        ({'prompt': [-1]}, 400, 'prompt'),
        ({'prompt': 'Ω is not known'}, 400, "'Ω'"),
        ({'prompt': 'x' * 5000}, 400, 'truncate_prompt_tokens'),
        ({'model': 'gpt-5'}, 404, 'gpt-5'),
        ({'model': '../../etc/passwd'}, 404, 'passwd'),
        ({'max_tokens': -1}, 400, 'max_tokens'),
        ({'max_tokens': 10**9}, 400, '3000'),
        ({'max_tokens': 1.5}, 400, 'max_tokens'),
        ({'temperature': 3}, 400, 'temperature'),
        ({'temperature': '1'}, 400, 'temperature'),
        ({'temperature': float('nan')}, 400, 'temperature'),
        ({'top_p': 1.1}, 400, 'top_p'),
        ({'top_k': -1}, 400, 'top_k'),
        ({'n': 0}, 400, 'n'),
        ({'n': 10**6}, 400, 'at once'),
        ({'seed': 2**70}, 400, 'seed'),
        ({'stop': ''}, 400, 'stop'),
        ({'stop': ['a'] * 17}, 400, 'stop'),
        ({'logprobs': 6}, 400, 'logprobs'),
        ({'best_of': 3}, 400, 'best_of'),
        ({'suffix': 'x'}, 400, 'suffix'),
        ({'stream_options': {'include_usage': True}}, 400, 'stream'),
        ({'presence_penalty': 1}, 400, 'not supported'),
        ({'avoid_copying': 1}, 400, 'avoid_copying'),
        ({'title': 'x' * 2000}, 400, 'title'),
        ([], 400, 'object'),
    ],
)
def test_a_mistake_is_named(server, fields, status, says):
    answer = requests.post(
        server + '/v1/completions',
        data=json.dumps(fields),
        headers={'Content-Type': 'application/json'},
        timeout=30,
    )
    assert answer.status_code == status and says in answer.json()['error']['message']
    assert set(answer.json()['error']) == {'message', 'type', 'param', 'code'}


def test_broken_requests(server):
    def post(data, **headers):
        return requests.post(
            server + '/v1/completions',
            data=data,
            headers={'Content-Type': 'application/json'} | headers,
            timeout=30,
        )

    assert (
        post('{"prompt"').status_code == 400
        and 'JSON' in post('{"prompt"').json()['error']['message']
    )
    assert post(b'\xff\xfe\x00').status_code == 400
    assert post('[' * 50000).status_code == 400
    assert post('{"prompt": "\\ud800"}').status_code in (200, 400)
    assert post('{"model": "\\ud800"}').status_code in (400, 404)
    assert (
        requests.post(server + '/v1/completions', data='{}', timeout=30).status_code == 400
    )  # no JSON by its type: other sites' forms send such
    assert post('x' * 200_000).status_code == 413
    assert (
        post(iter([b'x' * 60_000] * 4)).status_code == 413
    )  # in chunks that do not say how many there are
    assert requests.get(server + '/v1/completions', timeout=30).status_code == 405
    assert (
        requests.get(server + '/nothing', timeout=30).json()['error']['type'] == 'not_found_error'
    )
    foreign = requests.get(server + '/health', headers={'Host': 'evil.example'}, timeout=30)
    assert foreign.status_code == 400 and foreign.json()['error']['code'] == 'invalid_host'
    for items in ('{}', '[]', '1.5'):  # as many mistakes as there is room for: one is told, at once
        began = time.monotonic()
        assert (
            post(f'{{"prompt": [{",".join([items] * 24_000)}]}}').status_code == 400
            and time.monotonic() - began < 1
        )
    assert complete(server, prompt='The').status_code == 200


def through_gate(*messages, pause=0.0):
    """What Gate passes on of a request, and what it sends itself, as two lists of messages."""
    passed, sent, left = [], [], list(messages)

    async def receive():
        await asyncio.sleep(pause)
        return left.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        passed.append(await receive())

    gate = serve.Gate(app, serve.ServeConfig(out_dir=''))
    scope = {'type': 'http', 'method': 'POST', 'path': '/', 'headers': [(b'host', b'localhost')]}
    asyncio.run(gate(scope, receive, send))
    return passed, sent


def test_bodies_in_parts(monkeypatch):
    """One that breaks off is not passed on; each part has its own time."""
    parts = [{'type': 'http.request', 'body': b'{}', 'more_body': True}] * 8
    end = {'type': 'http.request', 'body': b'', 'more_body': False}
    assert through_gate(*parts, {'type': 'http.disconnect'}) == ([], [])
    monkeypatch.setattr(serve, 'BODY_TIMEOUT', 0.2)
    passed, sent = through_gate(*parts, end, pause=0.04)
    assert passed[0]['body'] == b'{}' * 8 and not sent
    passed, sent = through_gate(end, pause=0.4)
    assert not passed and sent[0]['status'] == 408


def test_a_prompt_of_many_samples_is_encoded_once():
    calls = []
    service = SimpleNamespace(
        config=serve.ServeConfig(out_dir=''),
        encode=lambda prompt, ask: calls.append(prompt) or ([1], 1, prompt),
    )
    prompts = serve.Service.prompts(service, serve.Completion(prompt=['a', 'b'], n=3))
    assert calls == ['a', 'b'] and [text for _, _, text in prompts] == list('aaabbb')


def test_no_path_reaches_the_file_system(server, trained, tmp_path):
    (tmp_path / 'metrics.csv').write_text('step\n1\n')
    for path in (
        '../../etc/passwd',
        '..%2f..%2fetc%2fpasswd',
        str(tmp_path),
        '%2e%2e',
        'metrics.csv',
        '',
        '\0',
    ):
        with socket.create_connection(
            ('127.0.0.1', int(server.rsplit(':', 1)[1])), timeout=10
        ) as raw:  # no client that tidies the path
            raw.sendall(
                f'GET /runs/{path} HTTP/1.1\r\nHost: localhost\r\n'.encode()
                + b'Connection: close\r\n\r\n'
            )
            assert raw.makefile('rb').readline().split()[1] in (b'404', b'400', b'307'), path
    secret = tmp_path / 'secret'
    secret.write_text('The rain')
    answer = complete(
        server, prompt=f'FILE:{secret}', max_tokens=1, echo=True
    ).json()  # sample.py's way to name a file
    assert (
        'character' in answer['error']['message']
        if 'error' in answer
        else answer['choices'][0]['text'].startswith('FILE:')
    )


def test_broken_runs(tmp_path):
    """Whatever lies in the folders, the others can be watched."""
    rows = ','.join(METRICS) + '\n10,100,1,4.5,,,0.1,1,99,0.1\n'
    for name, content in {
        'good': rows.encode(),
        'zeros': rows.encode() + b'\0' * 200_000,
        'latin': rows.encode() + b'\xff\xfe,\n',
        'half': rows.encode() + b'20,200,2,4.',
        'nan': rows.encode() + b'20,200,2,nan,inf,,,,,\n',
        'foreign': b'a,b\n1,2\n',
        'empty': b'',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.csv').write_bytes(content)
        (tmp_path / name / 'train.log').write_bytes(b'\xff--- sample\nhalf')
    (tmp_path / 'folder' / 'metrics.csv').mkdir(parents=True)
    os.mkdir(os.fsencode(tmp_path) + b'/\xff')
    with open(os.fsencode(tmp_path) + b'/\xff/metrics.csv', 'w', encoding='utf-8') as f:
        f.write(rows)
    with serving('', f'--runs_dir={tmp_path}') as address:
        told = {
            run['name']: run['step']
            for run in requests.get(address + '/runs', timeout=10).json()['runs']
        }
        assert {name for name, step in told.items() if step == 10} == {
            'good',
            'zeros',
            'latin',
            'half',
            '?',
        } and told['nan'] == 20
        assert [
            requests.get(f'{address}/runs/{name}', timeout=10).status_code
            for name in ('zeros', 'nan', 'folder')
        ] == [200, 200, 404]


def test_the_runs(server, trained):
    (run,) = requests.get(server + '/runs', timeout=30).json()['runs']
    assert run['name'] == trained.name and run['step'] == 60 and run['val_loss'] > 0
    assert (
        requests.get(f'{server}/runs/{trained.name}', timeout=30).json()['columns']['step'][-1]
        == 60
    )


def test_schemathesis_finds_no_500(server, tmp_path):
    """Requests made from the schema, valid and broken; more of them with `pytest -m long`."""
    fuzz(server, tmp_path, 'fuzzing', 20)


@pytest.mark.long
def test_schemathesis_finds_no_500_in_thousands(server, tmp_path):
    fuzz(server, tmp_path, 'coverage,fuzzing', 1000)


def fuzz(server, folder, phases, examples):
    pytest.importorskip('schemathesis')
    command = [
        'run',
        server + '/openapi.json',
        '--checks=not_a_server_error',
        f'--max-examples={examples}',
        '--seed=1',
        f'--phases={phases}',
    ]
    done = script('-m', 'schemathesis.cli', *command, cwd=folder, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert requests.get(server + '/health', timeout=30).json()['status'] == 'ok'


# -----------------------------------------------------------------------------
# The program


def test_key_and_end(trained):
    """Without the key only the page and /health answer; Ctrl-C ends streams and the program."""
    starting = serving(trained, LYREGPT_API_KEY='open sesame')
    with starting as address:
        assert (
            requests.get(address + '/health', timeout=10).ok
            and requests.get(address, timeout=10).ok
        )
        for path in ('/v1/models', '/runs', '/runs/x'):
            assert requests.get(address + path, timeout=10).status_code == 401
        assert (
            requests.post(address + '/v1/completions', data='{broken', timeout=10).status_code
            == 401
        )
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(
                base_url=address + '/v1', api_key='wrong', max_retries=0
            ).completions.create(model='x', prompt='x')
        friend = openai.OpenAI(base_url=address + '/v1', api_key='open sesame', max_retries=0)
        stream = friend.completions.create(
            model=trained.name, prompt='x', max_tokens=4000, n=8, stream=True
        )
        next(iter(stream))
        starting.process.send_signal(signal.SIGINT)
        assert starting.process.wait(15) in (130, -signal.SIGINT)


def test_wrong_starts(trained, tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        done = script(
            '-m', 'lyregpt', 'serve', f'--out_dir={trained}', f'--port={taken.getsockname()[1]}'
        )
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and 'cannot listen there (Address already in use); choose another --port' in done.stderr
        )
    for words, says in (
        (f'--out_dir={tmp_path}/none', 'no such folder'),
        ('--port=70000', '65535'),
    ):
        done = script('-m', 'lyregpt', 'serve', words)
        assert (
            done.returncode == 2 and len(done.stderr.splitlines()) == 1 and says in done.stderr
        ), done.stderr


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason='no IPv6 here')
def test_all_addresses():
    """--host=:: accepts IPv4, too."""
    with serving('', '--host=::') as address:
        port = address.rsplit(':', 1)[1]
        assert requests.get(f'http://127.0.0.1:{port}/health', timeout=10).status_code == 200


def test_watching_alone(tmp_path):
    """With no model there is the page, and the runs that train."""
    with serving('') as address:
        assert requests.get(address + '/v1/models', timeout=10).json()['data'] == []
        assert complete(address, prompt='x').status_code == 404
