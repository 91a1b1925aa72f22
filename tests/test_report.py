"""A run's report: what it shows, what it advises, and that it can neither hurt its reader nor its run."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser

import pytest

import report
from configurator import UserError, configure
from dataset import split_text, write_dataset
from log import OF_A_RUN
from report import METRICS, Run, advice, knobs
from tests.conftest import ROOT, script, tiny
from tokenizer import BPETokenizer, CharTokenizer
from train import TrainConfig, train

HARM = '</div><script>document.title = "harmed"</script><img src="https://example.org/x.png" onerror="alert(1)">'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def page_of(out):
    return (out / 'report.html').read_text(encoding='utf-8')


# -----------------------------------------------------------------------------
# The page


@pytest.fixture(scope='module')
def reported(chars, tmp_path_factory):
    """The out_dir of a run in two parts with samples, and its report."""
    out = tmp_path_factory.mktemp('reported')
    train(tiny(chars, out, '--report=True', '--sample_interval=10'))
    train(tiny(chars, out, '--report=True', '--sample_interval=10', '--max_iters=40', '--init_from=resume'))
    return out


def test_a_run_ends_with_its_report(reported):
    log, page, sessions = (reported / 'train.log').read_text(encoding='utf-8'), page_of(reported), json.loads((reported / 'run.json').read_text())
    assert log.splitlines()[-1].endswith(f'look at: {reported / "report.html"}')
    assert [s['from_step'] for s in sessions] == [0, 20] and {s['end'] for s in sessions} == {'done'}, 'one entry for each start'
    facts = sessions[-1]
    assert facts['environment']['PyTorch'] in page and facts['environment']['commit'] in page
    assert facts['memory']['peak'] > facts['memory']['weights'] > 0 < facts['seconds']['evaluation'] < 60
    assert f'A GPT of {facts["model"]["parameters"]:,} parameters read 5,120 tokens' in page and 'in 40 steps' in page
    assert page.count('<svg') == 4 and page.count('role=img aria-label="') == 4 and 'Loss over 40 steps: train loss from' in page
    for step in '10', '20', '30', '40':
        assert f'<td>{step}</td>' in page and f'<small>step {step}</small>' in page, 'evaluations and samples, of both parts'
    settings, others = page[page.index('<h2>Settings') :].split('<details>')
    assert '>n_embd</th><td>32<' in settings and 'beta1' not in settings and '>beta1</th><td>0.9<' in others
    assert len(page) < 150_000
    assert {'report.html', 'run.json'} <= set(OF_A_RUN), 'a new run in this folder puts them aside'


def test_one_page_for_itself(reported, tmp_path):
    """Whatever stands in a run's files, its page holds no script and asks nobody for anything; it fits a phone and has a dark side."""
    out = tmp_path / '<img src=x onerror=alert(1)>'
    shutil.copytree(reported, out, ignore=shutil.ignore_patterns('*.pt'))
    with open(out / 'train.log', 'a', encoding='utf-8') as f:
        f.write(f'step 1,234: validation loss 1\n--- sample\n{HARM}\n--- {HARM}\n')
    (out / 'config.json').write_text(json.dumps(json.loads((out / 'config.json').read_text()) | {'dataset': HARM, HARM: HARM}))
    sessions = json.loads((out / 'run.json').read_text())
    sessions[-1] |= {'command': HARM, 'end': HARM, 'began': HARM, 'environment': {HARM: HARM}, 'data': {HARM: HARM}, 'memory': {HARM: 3}, 'seconds': {HARM: 9}}
    (out / 'run.json').write_text(json.dumps(sessions))
    page = open(report.write(str(out)), encoding='utf-8').read()
    tags, reader = [], HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.feed(page)
    assert page.count('&lt;script&gt;') >= 9 and 'step 1,234' in page and not {'script', 'img', 'link', 'iframe', 'object'} & {tag for tag, _ in tags}
    assert all(not name.startswith('on') and (name not in ('src', 'href', 'xlink:href') or value[0] == '#') for _, a in tags for name, value in a.items())
    assert 'url(' not in page.replace('url(#', '') and '@import' not in page
    assert "default-src 'none'" in page, 'a browser would run nothing if there were something'
    sync_api = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM:
        pytest.skip('no chromium on PATH')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        tab = browser.new_page(viewport={'width': 320, 'height': 700}, color_scheme='dark')
        asked, troubles = [], []
        tab.on('request', lambda request: asked.append(request.url))
        tab.on('console', lambda message: troubles.append(message.text))
        tab.on('dialog', lambda dialog: troubles.append(dialog.message))
        tab.goto((out / 'report.html').as_uri())
        assert len(asked) == 1 and not troubles and tab.locator('script, img').count() == 0 and 'harmed' not in tab.title()
        assert tab.evaluate('document.documentElement.scrollWidth') <= 320
        ink, paper = (tab.evaluate(f'getComputedStyle(document.body).{name}') for name in ('color', 'backgroundColor'))
        assert sum(map(int, re.findall(r'\d+', ink))) > 600 and sum(map(int, re.findall(r'\d+', paper))) < 120
        shown = tab.evaluate('getComputedStyle(document.querySelector("svg text")).fill')
        assert shown == ink, 'the charts follow'
        browser.close()


def test_no_report_costs_no_training(chars, tmp_path, monkeypatch):
    (tmp_path / 'a' / 'report.html').mkdir(parents=True)  # a folder in its place: it cannot be written
    train(tiny(chars, tmp_path / 'a', '--report=True'))
    assert 'no report (' in (tmp_path / 'a' / 'train.log').read_text().splitlines()[-1] and (tmp_path / 'a' / 'ckpt.pt').exists()
    monkeypatch.setitem(sys.modules, 'matplotlib', None)  # as if it were not installed
    train(tiny(chars, tmp_path / 'b', '--report=True'))
    last = (tmp_path / 'b' / 'train.log').read_text().splitlines()[-1]
    assert 'matplotlib is not installed' in last and f'python report.py --out_dir={tmp_path / "b"}' in last and not (tmp_path / 'b' / 'report.html').exists()


def test_a_signal_does_not_wait_for_a_report(chars, tmp_path):
    def stop():
        while threading.main_thread().is_alive():
            time.sleep(0.02)
            if (tmp_path / 'metrics.csv').exists() and (tmp_path / 'metrics.csv').read_text().count('\n') > 2:
                return signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        train(tiny(chars, tmp_path, '--report=True', '--max_iters=100000', '--eval_interval=100000'))
    assert ended.value.code == 143 and (tmp_path / 'ckpt.pt').exists() and not (tmp_path / 'report.html').exists()
    done = script('report.py', f'--out_dir={tmp_path}')
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / 'report.html')
    assert 'Its end: stopped by SIGTERM.' in page_of(tmp_path) and 'None were taken' in page_of(tmp_path)


def test_runs_of_before_and_runs_that_go_on(reported, tmp_path):
    shutil.copy(reported / 'metrics.csv', tmp_path)
    assert 'not recorded' in report.page(report.read_run(str(tmp_path)))
    for text in '', '{', '[3]', '{"a": 1}', '[{"data": 7}]':
        (tmp_path / 'run.json').write_text(text)
        (tmp_path / 'config.json').write_text(text)
        assert 'not recorded' in report.page(report.read_run(str(tmp_path)))
    with open(tmp_path / 'metrics.csv', 'a') as f:
        f.write('50,6400,9.9,1.')  # a row that is being written
    (tmp_path / 'run.json').write_text('[{"from_step": 0}]')
    page = report.page(report.read_run(str(tmp_path)))
    assert 'in 40 steps' in page and 'still goes on, or was killed' in page


@pytest.mark.parametrize('name, text, message', [('', '', 'no such folder'), ('x', '', 'no metrics.csv'), ('metrics.csv', ','.join(METRICS), 'no figures yet')])
def test_mistakes(tmp_path, name, text, message):
    out = tmp_path / 'out'
    if name:
        out.mkdir()
        (out / name).write_text(text)
    done = script('report.py', f'--out_dir={out}')
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1


def test_starts_quickly():
    code = "import sys, report, bench; assert not {'torch', 'matplotlib'} & set(sys.modules), 'half a second each or more'"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


# -----------------------------------------------------------------------------
# What to try next. The losses below are of real runs on the embedded songs (--block_size=64 --batch_size=16 and so on): step, training, validation


RUNS = {}


def made(name, **changes):
    """A Run with the curves of RUNS[name]."""
    settings, facts, losses = RUNS[name]
    config = dict(init_from='scratch', n_layer=2, n_head=2, n_embd=64, dropout=0.0, grad_clip=1.0, warmup_iters=10, eval_interval=10) | settings
    rows = [dict.fromkeys(METRICS) | {'step': s, 'tokens': s * 1024, 'seconds': s / 10, 'train_loss': t, 'grad_norm': n} for s, t, n, _ in losses]
    rows += [dict.fromkeys(METRICS) | {'step': s, 'tokens': s * 1024, 'seconds': s / 10, 'val_loss': v, 'val_bpb': v / math.log(2)} for s, _, _, v in losses if v]
    data = {'training tokens': 420867, 'validation tokens': 46764, 'validation windows': 731, 'validation windows read': 731, 'windows at once': 16}
    session = {'began_from': 'scratch', 'model': {'parameters': 114_000}, 'data': data, 'end': 'done'} | facts | changes
    return Run('out', sorted(rows, key=lambda r: (r['step'], r['train_loss'] is None)), config, [session])
