"""From a site to a server, with the real scripts as processes, each on what the one before it left:

scrape → build → prepare → train, killed and resumed → sample → export → serve.
"""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import requests
from gguf import GGUFReader

from lyregpt import checkpoint
from lyregpt.dataset import TokenFile, read_meta, read_tokenizer
from tests.conftest import ROOT, script
from tests.darklyrics_site import demo_songs


def ran(*words):
    """What a script printed; it must have ended well."""
    done = script(*words)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


@contextlib.contextmanager
def serving(*words):
    """A process at work, by the address that it tells in its first line."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield re.search(r'http://[\d.:]+', process.stdout.readline())[0]
    finally:
        process.kill()
        process.communicate()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_from_a_site_to_a_server(tmp_path):
    songs = [song for song in demo_songs() if song['lyrics'] != '[Instrumental]']
    crawl, lyrics, data, out = (
        tmp_path / 'crawl',
        tmp_path / 'lyrics.jsonl',
        tmp_path / 'data',
        tmp_path / 'out-metal',
    )

    # Words: all songs of the site, and then those that have words, as they were written
    with serving('-m', 'tests.darklyrics_site', '--port=0') as site:
        ran(
            'scrapers/darklyrics_scraper.py',
            f'--base_url={site}',
            '--letters=all',
            '--delay=0',
            '--local',
            f'--crawl_dir={crawl}',
        )
    assert len(lines_of(crawl / 'songs.jsonl')) == len(demo_songs())
    ran('scrapers/build_dataset.py', f'--input={crawl / "songs.jsonl"}', f'--output={lyrics}')
    assert {s['lyrics'] for s in lines_of(lyrics)} == {s['lyrics'] for s in songs} and len(
        lines_of(lyrics)
    ) == len(songs)

    # Token files: each song in one of the splits, readable again
    ran('data/darklyrics/prepare.py', f'--input={lyrics}', f'--out_dir={data}', '--vocab_size=512')
    meta, tokenizer = read_meta(str(data)), read_tokenizer(str(data))
    assert sum(split['documents'] for split in meta['splits'].values()) == len(songs)
    val = TokenFile(str(data / 'val.bin'))
    documents = tokenizer.decode(val.read(0, len(val))).split('<|endoftext|>')
    assert len(documents) == meta['splits']['val']['documents'] + 1
    assert all(
        text.startswith('Artist: ') and any(song['lyrics'].strip() in text for song in songs)
        for text in documents[:-1]
    )

    # A model: killed without a word in the midst of training, then resumed
    shape = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64', '--batch_size=8']
    shape.append('--gradient_accumulation_steps=1')
    speed = ['--learning_rate=1e-2', '--warmup_iters=2', '--lr_decay_iters=40', '--device=cpu']
    speed += ['--eval_interval=40', '--checkpoint_interval=5', '--log_interval=1']
    words = [
        'train.py',
        f'--dataset={data}',
        f'--out_dir={out}',
        *shape,
        *speed,
        '--max_iters=100000',
    ]
    training = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in training.stdout:
            if re.match('step 8[:/]', line):
                break
        assert training.poll() is None, 'it ended by itself'
    finally:
        training.kill()
        training.communicate()
    kept = checkpoint.load(str(out / 'ckpt.pt'))['iter_num']
    assert kept >= 5 and kept % 5 == 0
    end = kept + 35
    said = ran('train.py', f'--out_dir={out}', '--init_from=resume', f'--max_iters={end}')
    assert (
        f'resuming {out}/ckpt.pt at step {kept}' in said.replace(os.sep, '/')
        and f'done: {end} steps' in said
    )
    with open(out / 'metrics.csv', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    losses = {int(row['step']): float(row['train_loss']) for row in rows if row['train_loss']}
    assert (
        list(losses) == [*range(1, end + 1)] and sum(bool(row['train_loss']) for row in rows) == end
    ), 'each step once, in order'
    assert (
        losses[end] < losses[1] - 1
        and float(next(row['val_loss'] for row in reversed(rows) if row['val_loss']))
        < losses[1] - 1
    )

    # What it writes: the same from the checkpoint, from the exported folder, and over HTTP
    ask = [
        '--start=The lantern',
        '--seed=7',
        '--temperature=0.9',
        '--top_k=100',
        '--max_new_tokens=40',
        '--num_samples=2',
        '--json',
        '--device=cpu',
    ]
    with ThreadPoolExecutor(3) as pool:
        sampled = pool.submit(ran, 'sample.py', f'--out_dir={out}', *ask)
        exported = pool.submit(
            ran, '-m', 'lyregpt', 'export', f'--out_dir={out}', f'--to={tmp_path / "hf"}'
        )
        packed = pool.submit(
            ran,
            '-m',
            'lyregpt',
            'export',
            f'--out_dir={out}',
            '--format=gguf',
            f'--to={tmp_path / "metal.gguf"}',
        )
        written = [json.loads(line) for line in sampled.result().splitlines()]
        assert 'Qwen3ForCausalLM' in exported.result() and 'Qwen3ForCausalLM' in packed.result()
    texts = [sample['text'] for sample in written]
    assert len(set(texts)) == 2 and all(
        sample['prompt'] == 'The lantern' and sample['tokens'] for sample in written
    )
    again = ran('sample.py', f'--init_from={tmp_path / "hf"}', *ask)
    assert [json.loads(line)['text'] for line in again.splitlines()] == texts
    weights = {tensor.name: tensor for tensor in GGUFReader(tmp_path / 'metal.gguf').tensors}
    assert {
        'token_embd.weight',
        'blk.0.attn_q.weight',
        'blk.1.ffn_down.weight',
        'output_norm.weight',
    } <= set(weights)
    with serving(
        '-m',
        'lyregpt',
        'serve',
        f'--out_dir={out}',
        f'--runs_dir={tmp_path}',
        '--port=0',
        '--device=cpu',
    ) as address:
        fields = {
            'prompt': 'The lantern',
            'seed': 7,
            'temperature': 0.9,
            'top_k': 100,
            'max_tokens': 40,
            'n': 2,
        }
        answer = requests.post(
            f'{address}/v1/completions', json=fields | {'model': out.name}, timeout=60
        ).json()
        assert [choice['text'] for choice in answer['choices']] == texts
        assert out.name in str(requests.get(f'{address}/runs', timeout=10).json())
        assert '<html' in requests.get(address, timeout=10).text
