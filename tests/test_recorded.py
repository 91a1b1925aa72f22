"""What must not change: losses, weights, texts, answers and files, recorded from tiny models.

    python tests/test_recorded.py --write             (record everything anew)
    python tests/test_recorded.py --write texts       (… a section alone)

Each test measures one section in a process of its own, with one thread, and compares it with
`recorded/recorded.json`. The last bits of a float depend on the processor. So the figures carry
the machine that they are from: on one like it everything must be equal. On another one losses may
differ by a thousandth, and what stands under a key `exact` is not compared.

`recorded/fe7c499` holds files that commit fe7c499 wrote. They must be readable everywhere.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / 'tests' / 'recorded' / 'recorded.json'
FIXTURES = ROOT / 'tests' / 'recorded' / 'fe7c499'

# -----------------------------------------------------------------------------
# The project's layout: all that this file knows of it

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
TRAIN = ['train.py']
SAMPLE = [*PYTHON, 'sample.py']
SERVE = [*PYTHON, '-m', 'lyregpt', 'serve']
EXPORT = [*PYTHON, '-m', 'lyregpt', 'export']
CHECKPOINT = [*PYTHON, '-m', 'lyregpt', 'checkpoint']
PREPARE = [*PYTHON, 'data/text/prepare.py']


def train_module():
    """Has TrainConfig and train."""
    return importlib.import_module('train')


def configurator_module():
    """Has configure."""
    return importlib.import_module('configurator')


def checkpoint_module():
    """Has load, build_model and tokenizer_of."""
    return importlib.import_module('lyregpt.checkpoint')


def model_module():
    """Has GPT and GPTConfig."""
    return importlib.import_module('model')


def dataset_module():
    """Has read_tokenizer and Split."""
    return importlib.import_module('lyregpt.dataset')


# -----------------------------------------------------------------------------
# The machine, hashes, commands


def machine():
    """What the last bits of a float depend on."""
    import torch

    wanted = ('model name', 'cpu family', 'model', 'stepping', 'cache size', 'flags')
    about = dict.fromkeys(wanted, '')
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as f:
        for line in f.read().split('\n\n')[0].splitlines():
            key, _, value = line.partition(':')
            if key.strip() in about:
                about[key.strip()] = value.strip()
    about['flags'] = hashlib.sha256(about['flags'].encode()).hexdigest()[:16]
    capability = torch.backends.cpu.get_cpu_capability()
    return about | {'torch': torch.__version__, 'capability': capability}


def digest(value):
    """SHA-256 of nested dictionaries, lists, tensors and plain values, in an order of its own."""
    import torch

    found = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            value = value.detach().cpu().contiguous()
            found.update(f'{value.dtype} {tuple(value.shape)}'.encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(f'{key}:'.encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            found.update(f'[{len(value)}]'.encode())
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())
        found.update(b';')

    add(value)
    return found.hexdigest()


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run(command, **more):
    """Run a command in the project's folder, and expect it to succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200, **more
    )
    assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


# -----------------------------------------------------------------------------
# Small data, small models


def words(seed, songs, lines):
    """A made-up text of random words: `songs` parts of so many lines."""
    dice = random.Random(seed)
    known = [''.join(dice.choices('abdeilmnorstu', k=dice.randint(2, 7))) for _ in range(60)]

    def line():
        return ' '.join(dice.choice(known) for _ in range(dice.randint(3, 6))).capitalize()

    parts = ['\n'.join(line() for _ in range(lines)) for _ in range(songs)]
    return '\n\n'.join(
        f'Artist: {name}\nTitle: {line()}\n\n{part}'
        for name, part in zip(map(str.title, dice.choices(known, k=songs)), parts)
    )


def prepared(folder):
    """A dataset of characters in `folder`/words."""
    (folder / 'words.txt').write_text(words(5, 12, 12) + '\n', encoding='utf-8')
    run(
        [
            *PREPARE,
            f'--input={folder / "words.txt"}',
            f'--out_dir={folder / "words"}',
            '--tokenizer=char',
        ]
    )
    return folder / 'words'


KNOBS = (
    '--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --learning_rate=1e-2 '
    '--gradient_accumulation_steps=1 --max_iters=12 --lr_decay_iters=12 --warmup_iters=2 '
    '--eval_interval=6 --log_interval=1 --checkpoint_minutes=0'
).split()
MACHINE = ('--device=cpu', '--dtype=float32', '--compile=False', '--report=False')
GPT2 = ('--arch=gpt2', '--optimizer=adamw', '--bias=True')


def trained(dataset, out, *more, knobs=KNOBS):
    """Train in this process; returns `out`."""
    knobs = [f'--dataset={dataset}', f'--out_dir={out}', '--threads=1', *MACHINE, *knobs, *more]
    train = train_module()
    train.train(configurator_module().configure(train.TrainConfig, knobs))
    return out


def described(out):
    """The curve of a run, and a digest of its last checkpoint's content."""
    path = out / ('ckpt.pt' if (out / 'ckpt.pt').exists() else 'ckpt')
    state = checkpoint_module().load(str(path), optimizer=True)
    content = (
        'model',
        'optimizer',
        'iter_num',
        'best_val_loss',
        'bad_evals',
        'last_eval',
        'losses',
    )
    with open(out / 'metrics.csv', encoding='utf-8', newline='') as f:
        reader = csv.DictReader(f)
        rows = list(reader)
    curves = {
        name: [[int(row['step']), float(row[name])] for row in rows if row[name]]
        for name in ('train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm')
    }
    return {
        'columns': reader.fieldnames,
        'step': state['iter_num'],
        'keys': sorted(state),
        'model_args': sorted(state['model_args']),
        'weights': {name: list(weight.shape) for name, weight in state['model'].items()},
        'curves': curves,
        'exact': {'content': digest({key: state[key] for key in content})},
    }


@contextlib.contextmanager
def on_every_pass(call):
    """Within this, `call(number)` is called at every forward pass of a model, counted from 1."""
    import torch

    count = 0

    def hook(module, *_):
        nonlocal count
        if isinstance(module, torch.nn.Embedding):
            count += 1
            call(count)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def fake_clock():
    """Within this, time is what is computed: 50 ms a forward pass, and 10 ms a large product."""
    import time

    import torch

    now, product = 1000.0, torch.Tensor.__matmul__

    def tick(seconds):
        nonlocal now
        now += seconds

    def timed_product(a, b):  # by such the training measures what the machine can do
        if min(a.shape) >= 256:
            tick(0.01)
        return product(a, b)

    with pytest.MonkeyPatch.context() as patch, on_every_pass(lambda number: tick(0.05)):
        patch.setattr(torch.Tensor, '__matmul__', timed_product)
        for name in 'perf_counter', 'monotonic', 'time':
            patch.setattr(time, name, lambda: now)
        yield


# -----------------------------------------------------------------------------
# What is measured: a function for each section, called in a process of its own


def training(folder):
    """Runs of one process."""
    data = prepared(folder)
    found = {'data': {'exact': {n: file_digest(data / n) for n in ('train.bin', 'val.bin')}}}
    parts = (
        '--n_kv_head=1 --mlp=relu2 --position=sinusoidal --tie_weights=True --qk_norm=False '
        '--lr_schedule=linear --remat=True --batch_size=auto --gradient_accumulation_steps=5'
    )
    for name, more in {
        'plain': (),
        'accumulation': ('--gradient_accumulation_steps=3',),
        'dropout': ('--dropout=0.2',),
        'gpt2 adamw': GPT2,
        'other parts': parts.split(),
        'unbroken': ('--gradient_accumulation_steps=3', '--dropout=0.1'),
    }.items():
        found[name] = described(trained(data, folder / name, *more))

    more = ('--gradient_accumulation_steps=3', '--dropout=0.1')

    def stop(number):
        if number == 3 * 4 + 2:  # the second of the three passes of the fifth step
            signal.raise_signal(signal.SIGTERM)

    with on_every_pass(stop):
        try:
            trained(data, folder / 'resumed', *more)
        except SystemExit as left:
            status = left.code
    stopped = described(folder / 'resumed')
    found['stopped'] = {'status': status} | stopped
    found['resumed'] = described(trained(data, folder / 'resumed', '--init_from=resume', knobs=()))
    assert found['resumed'] == found['unbroken'], 'a resumed run is the unbroken one'

    with fake_clock():
        budget = ('--max_minutes=0.05', '--max_iters=5', '--eval_interval=8')
        found['budget'] = described(trained(data, folder / 'budget', *budget))
    return found


def processes(folder, name, *more):
    """A run of two processes."""
    data = prepared(folder)
    command = [
        *TORCHRUN,
        *TRAIN,
        f'--dataset={data}',
        f'--out_dir={folder / name}',
        *KNOBS,
        *MACHINE,
    ]
    run([*command, '--gradient_accumulation_steps=3', '--dropout=0.1', *more])
    return described(folder / name)


def ddp(folder):
    """Two processes with the whole model each."""
    return processes(folder, 'ddp', '--parallel=ddp')


def fsdp(folder):
    """Two processes with their parts of every weight."""
    return processes(folder, 'fsdp', '--parallel=fsdp')


def initialization(folder):
    """Fresh weights by seed, and the loss that they begin with."""
    import torch

    model = model_module()
    small = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=65)
    found = {}
    for name, changes in {
        'modern': dict(arch='modern'),
        'modern tied': dict(arch='modern', n_kv_head=2, head_dim=16, n_ff=40, tie_weights=True),
        'modern learned': dict(arch='modern', position='learned', norm='layernorm', mlp='gelu'),
        'gpt2': dict(arch='gpt2'),
        'gpt2 without biases': dict(arch='gpt2', bias=False, tie_weights=False),
        'gpt2 sinusoidal': dict(arch='gpt2', position='sinusoidal', mlp='relu2', qk_norm=True),
    }.items():
        for seed in 1337, 2:
            torch.manual_seed(seed)
            gpt = model.GPT(model.GPTConfig(**small | changes))
            state = gpt.state_dict()
            ids = torch.arange(64).view(2, 32) % 65
            with torch.no_grad():
                loss = float(gpt(ids, ids.roll(-1, 1)))
            found[f'{name}, seed {seed}'] = {
                'weights': {key: list(weight.shape) for key, weight in state.items()},
                'loss': loss,
                'exact': {'values': digest(state), 'config': gpt.config.to_dict()},
            }
    return found


def two_models(folder):
    """The dataset, and the out_dirs of a trained model of each architecture."""
    data = prepared(folder)
    knobs = ('--max_iters=240', '--lr_decay_iters=240', '--eval_interval=120')
    (folder / 'runs').mkdir()
    return data, {
        'modern': trained(data, folder / 'runs' / 'out-modern', *knobs),
        'gpt2': trained(data, folder / 'runs' / 'out-gpt2', *GPT2, *knobs),
    }


def loaded(out):
    """The model in `out`, ready to write, and its tokenizer."""
    checkpoint = checkpoint_module()
    path, state = checkpoint.load_from(str(out))
    model = checkpoint.build_model(state, path, dropout=0.0).eval()
    return model, checkpoint.tokenizer_of(state)


def sampled(out, *more):
    """What sample.py writes, one dictionary a sample."""
    same = ('--json', '--device=cpu', '--dtype=float32', '--threads=1', f'--out_dir={out}')
    return [json.loads(line) for line in run([*SAMPLE, *same, *more]).splitlines()]


def generated(model, tokenizer, prompts, *more, **options):
    """The ids that `model.generate` writes, a list for each prompt."""
    rows = [[] for _ in prompts]
    for tokens in model.generate(prompts, *more, vocab_size=tokenizer.vocab_size, **options):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
    return rows


def texts(folder):
    """Greedy and sampled texts of both architectures."""
    options = '--num_samples=3 --seed=7 --temperature=0.9 --top_k=20 --top_p=0.95'.split()
    options += ['--repetition_penalty=1.2', '--max_new_tokens=50', '--start=Mod']
    _, models = two_models(folder)
    found = {}
    for arch, out in models.items():
        model, tokenizer = loaded(out)
        short, start = tokenizer.encode('A'), tokenizer.encode('Mode ')
        long = tokenizer.encode((out.parent.parent / 'words.txt').read_text('utf-8')[:80])
        stop = tokenizer.encode('e\n')
        rows = {
            'greedy': generated(model, tokenizer, [start], 50, temperature=0),
            'sampled': generated(model, tokenizer, [start] * 2, 50, seed=3),
            'penalty': generated(
                model, tokenizer, [start], 50, temperature=0, repetition_penalty=1.5
            ),
            'top_k': generated(model, tokenizer, [start], 50, top_k=5, seed=4),
            'top_p': generated(model, tokenizer, [start], 50, top_p=0.7, temperature=1.3, seed=5),
            'stop': generated(model, tokenizer, [start, short], 50, stop_tokens=stop, seed=6),
            'long': generated(model, tokenizer, [long], 40, temperature=0),
            'lengths': generated(model, tokenizer, [short, long, start], 40, top_k=9, seed=8),
        }
        written = {
            name: [tokenizer.decode([i for i in row if i >= 0]) for row in many]
            for name, many in rows.items()
        }
        found[arch] = {
            'vocabulary': tokenizer.vocab_size,
            'exact': {
                'ids': {name: digest(many) for name, many in rows.items()},
                'texts': written,
                'script': sampled(out, *options),
            },
        }
    return found


REQUESTS = {
    'greedy': {'prompt': 'Mode ', 'max_tokens': 40, 'temperature': 0},
    'temperature': {'prompt': 'Mode ', 'max_tokens': 40, 'temperature': 0.8, 'seed': 1},
    'top_k': {'prompt': 'Mode ', 'max_tokens': 40, 'top_k': 5, 'seed': 2},
    'top_p': {'prompt': 'Mode ', 'max_tokens': 40, 'top_p': 0.8, 'seed': 3},
    'penalty': {'prompt': 'M', 'max_tokens': 40, 'temperature': 0, 'repetition_penalty': 1.5},
    'stop': {'prompt': 'Mode ', 'max_tokens': 60, 'stop': ['e', '\n'], 'seed': 4},
    'n': {'prompt': 'Mode ', 'max_tokens': 30, 'n': 3, 'seed': 5},
    'prompts': {'prompt': ['Mode ', 'A', 'Title: '], 'max_tokens': 20, 'seed': 6},
    'token ids': {'prompt': [[3, 4, 5], [6]], 'max_tokens': 20, 'seed': 7},
    'no prompt': {'max_tokens': 20, 'seed': 8},
    'logprobs': {'prompt': 'Mode ', 'max_tokens': 5, 'logprobs': 3, 'temperature': 0},
    'score': {'prompt': 'Mode sola', 'max_tokens': 0, 'echo': True, 'logprobs': 2},
    'echo': {'prompt': 'Mode ', 'max_tokens': 10, 'echo': True, 'seed': 9},
    'song': {'title': 'Mode', 'artist': 'Mola', 'max_tokens': 20, 'echo': True, 'seed': 10},
    'album': {'album': 'Tin', 'prompt': 'Mode ', 'truncate_prompt_tokens': -1, 'seed': 11},
    'long': {'prompt': 'mode ' * 20, 'truncate_prompt_tokens': 20, 'max_tokens': 40, 'seed': 12},
    'stream': {'prompt': 'Mode ', 'max_tokens': 40, 'n': 2, 'seed': 13, 'stream': True}
    | {'stream_options': {'include_usage': True}},
    'original': {'prompt': 'Mode ', 'max_tokens': 60, 'originality': True, 'seed': 14},
    'avoid copying': {'prompt': 'Mode ', 'max_tokens': 60, 'avoid_copying': 2, 'temperature': 0},
    'too long': {'prompt': 'mode ' * 20, 'max_tokens': 5},
    'unknown field': {'prompt': 'Mode ', 'colour': 'blue'},
    'unknown character': {'prompt': '\u2603'},
    'unknown model': {'model': 'another', 'prompt': 'Mode '},
    'too hot': {'prompt': 'Mode ', 'temperature': 3},
    'wrong type': {'prompt': 7},
    'too many tokens': {'prompt': 'Mode ', 'max_tokens': 1_000_000},
    'not supported': {'prompt': 'Mode ', 'presence_penalty': 1},
    'no JSON': '{"prompt": ',
}


def answer(address, body):
    """The answer to one request, without what differs from time to time."""
    import requests

    headers = {'Content-Type': 'application/json'}
    text = body if isinstance(body, str) else json.dumps(body)
    got = requests.post(f'{address}/v1/completions', data=text, headers=headers, timeout=60)
    if isinstance(body, str) or not body.get('stream'):
        told = got.json()
    else:
        lines = [line.removeprefix('data: ') for line in got.text.split('\n\n') if line]
        events = [json.loads(line) for line in lines[:-1]]
        told = {'last': lines[-1], 'texts': {}, 'ends': {}, 'usage': events[-1].get('usage')}
        for choice in [choice for event in events for choice in event['choices']]:
            i = str(choice['index'])
            told['texts'][i] = told['texts'].get(i, '') + choice['text']
            told['ends'][i] = choice['finish_reason'] or told['ends'].get(i)
    told = {k: v for k, v in told.items() if k not in ('id', 'created')}
    found = {'status': got.status_code, 'keys': sorted(told)}
    return found | ({'told': told} if 'error' in told else {'exact': told})


def server(folder):
    """The server's answers."""
    import requests

    _, models = two_models(folder)
    found = {}
    for arch, out in models.items():
        command = [
            *SERVE,
            f'--out_dir={out}',
            '--port=0',
            f'--runs_dir={out.parent}',
            '--threads=1',
        ]
        command += ['--device=cpu', '--dtype=float32', '--max_new_tokens=100']
        with open(folder / f'{arch}.log', 'w', encoding='utf-8') as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            line = process.stdout.readline()
            assert 'http' in line, (folder / f'{arch}.log').read_text()
            address = next(word for word in line.split() if word.startswith('http'))
            chosen = REQUESTS if arch == 'modern' else ('greedy', 'n', 'score', 'stream', 'long')
            found[arch] = {name: answer(address, REQUESTS[name]) for name in chosen}
            (about,) = requests.get(f'{address}/v1/models', timeout=60).json()['data']
            found[arch]['/v1/models'] = {
                'keys': sorted(about),
                'exact': {k: v for k, v in about.items() if k != 'created'},
            }
            told = requests.get(f'{address}/runs/{out.name}', timeout=60).json()
            curves = ('step', 'tokens', 'train_loss', 'val_loss', 'lr')
            found[arch]['/runs'] = {
                'keys': sorted(told),
                'columns': sorted(told['columns']),
                'exact': {k: digest(told['columns'][k]) for k in curves},
            }
        finally:
            process.terminate()
            process.wait(20)
            process.stdout.close()
    return found


def exports(folder):
    """An export of each kind of each architecture; the card is words for people, not compared."""
    from safetensors.torch import load_file

    _, models = two_models(folder)
    found = {}
    for arch, out in models.items():
        hf, gguf = folder / f'export-{arch}', folder / f'export-{arch}.gguf'
        run([*EXPORT, f'--out_dir={out}', f'--to={hf}'])
        run([*EXPORT, f'--out_dir={out}', '--format=gguf', f'--to={gguf}', '--dtype=bfloat16'])
        weights = load_file(hf / 'model.safetensors')
        found[arch] = {
            'files': sorted(os.listdir(hf)),
            'config': json.loads((hf / 'config.json').read_text('utf-8')),
            'tokenizer': file_digest(hf / 'tokenizer.json'),
            'tokenizer config': json.loads((hf / 'tokenizer_config.json').read_text('utf-8')),
            'generation': json.loads((hf / 'generation_config.json').read_text('utf-8')),
            'weights': {name: [str(w.dtype), *w.shape] for name, w in weights.items()},
            'card': gguf.with_suffix('.md').exists(),
            'bytes': gguf.stat().st_size,
            'exact': {'weights': digest(weights), 'gguf': file_digest(gguf)},
        }
    return found


def fixtures(folder):
    """What commit fe7c499 wrote: it loads, is whole, goes on by a step, and writes a text."""
    train, dataset = train_module(), dataset_module()
    shutil.copytree(FIXTURES, folder / 'old')
    old, found = folder / 'old', {}
    for name in 'modern', 'gpt2', 'sharded':
        told = run([*CHECKPOINT, 'verify', old / name])
        found[name] = {'whole': told.count(': OK'), 'before': described(old / name)}
        found[name]['before']['content'] = found[name]['before'].pop('exact')  # bytes, not figures
        step = found[name]['before']['step']
        more = ('--init_from=resume', f'--max_iters={step + 1}')
        trained(old / 'chars', old / name, *more, knobs=())
        found[name]['after'] = described(old / name)
        model, tokenizer = loaded(FIXTURES / name)
        rows = generated(model, tokenizer, [tokenizer.encode('Mod')] * 2, 40, seed=3)
        found[name]['exact'] = {'texts': [tokenizer.decode(row) for row in rows]}
        sessions = json.loads((old / name / 'run.json').read_text('utf-8'))
        found[name]['sessions'] = [session['from_step'] for session in sessions]
        config = configurator_module().configure(
            train.TrainConfig, [str(FIXTURES / name / 'config.json')]
        )
        found[name]['config'] = [config.arch, config.optimizer, config.n_embd, config.learning_rate]
    config = configurator_module().configure(train.TrainConfig, [str(FIXTURES / 'config.py')])
    found['config.py'] = [config.n_layer, config.n_head, config.n_embd, config.dropout]
    for name in 'chars', 'bpe':
        tokenizer = dataset.read_tokenizer(str(FIXTURES / name))
        split = dataset.Split(str(FIXTURES / name), 'train', 16, tokenizer.vocab_size, 1337)
        x, _ = split.batch(0, 2)
        found[f'data of {name}'] = {
            'vocabulary': tokenizer.vocab_size,
            'windows': split.n_sequences,
            'tokens': x.tolist(),
            'text': [tokenizer.decode(row) for row in x.tolist()],
            'encoded': tokenizer.encode('Mode solar\n'),
        }
    with open(FIXTURES / 'chars' / 'meta.pkl', 'rb') as f:
        found['meta.pkl'] = pickle.load(f)['vocab_size']
    found['of pairs'] = described(
        trained(FIXTURES / 'bpe', folder / 'bpe', str(FIXTURES / 'config.py'), '--max_iters=3')
    )
    return found


SECTIONS = {
    f.__name__: f for f in (training, ddp, fsdp, initialization, texts, server, exports, fixtures)
}

# -----------------------------------------------------------------------------
# The comparison


def measure(section):
    """What a section gives in a process of its own, with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / 'found.json'
        run([*PYTHON, __file__, f'--measure={section}', f'--to={to}'], env=environment())
        return json.loads(to.read_text('utf-8'))


def environment():
    """The caller's, with one thread, and without what torchrun may have set around it."""
    unwanted = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_RUN_ID', 'LYREGPT_API_KEY')
    kept = {k: v for k, v in os.environ.items() if k not in unwanted}
    return kept | {'OMP_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'}


def differences(found, expected, alike, where=''):
    """Where two nested values differ, as lines; `alike` is whether they are of one machine."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [
            f'{where}: {key} on one side only' for key in sorted(found.keys() ^ expected.keys())
        ]
        for key in found.keys() & expected.keys():
            if alike or key != 'exact':
                lines += differences(found[key], expected[key], alike, f'{where}/{key}')
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(found, expected))
        return [s for i, (a, b) in pairs for s in differences(a, b, alike, f'{where}/{i}')]
    if isinstance(expected, float) and isinstance(found, float) and not alike:
        same = math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-6)
    else:
        same = found == expected
    return [] if same else [f'{where}: {found!r}, recorded {expected!r}']


@pytest.mark.parametrize('section', SECTIONS)
def test_as_recorded(section):
    recorded = json.loads(RECORDED.read_text('utf-8'))
    found = measure(section)
    different = differences(found, recorded[section], recorded['machine'] == machine())
    assert not different, '\n'.join(sorted(different)[:20])


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in FIXTURES.rglob('*') if path.is_file()) <= 200_000


def as_json(found):
    """The figures as JSON, with a line for each of a section's parts."""
    sections = []
    for section, parts in found.items():
        lines = [f'  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}' for k, v in parts.items()]
        sections.append(f' {json.dumps(section)}: {{\n' + ',\n'.join(lines) + '\n }')
    return '{\n' + ',\n'.join(sections) + '\n}\n'


def main():
    parser = argparse.ArgumentParser(description='Record what must not change.')
    parser.add_argument('--write', nargs='*', metavar='SECTION', help='these sections, or all')
    parser.add_argument('--measure', choices=SECTIONS, help='measure one section, here')
    parser.add_argument('--to', help='the file for what was measured')
    args = parser.parse_args()
    if args.measure:
        with tempfile.TemporaryDirectory() as folder:
            found = SECTIONS[args.measure](Path(folder))
        Path(args.to).write_text(json.dumps(found), 'utf-8')
    elif args.write is not None:
        before = json.loads(RECORDED.read_text('utf-8')) if RECORDED.exists() else {}
        chosen = args.write or SECTIONS
        assert len(chosen) == len(SECTIONS) or before.get('machine') == machine(), 'record all here'
        found = before | {'machine': machine()} | {section: measure(section) for section in chosen}
        RECORDED.write_text(as_json(found), 'utf-8')
        print(f'{RECORDED}: {", ".join(chosen)}')
    else:
        parser.print_help()


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main()
