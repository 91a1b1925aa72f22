"""The report of a run: content, advice, and that it harms neither its reader nor the run."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser

import pytest

from configurator import configure
from lyregpt import report
from lyregpt.dataset import write_dataset
from lyregpt.logger import RUN_FILES
from lyregpt.report import METRICS, Run
from lyregpt.text import split_text
from lyregpt.tokenizer import BPETokenizer, CharTokenizer
from tests.conftest import ROOT, script, tiny
from train import TrainConfig, train

HARM = (
    '</div><script>document.title = "harmed"</script>'
    '<img src="https://example.org/x.png" onerror="alert(1)">'
)
CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)


def page_of(out):
    return (out / 'report.html').read_text(encoding='utf-8')


# -----------------------------------------------------------------------------
# The page


@pytest.fixture(scope='module')
def reported(chars, tmp_path_factory):
    """The out_dir of a run in two parts with samples, and its report."""
    out = tmp_path_factory.mktemp('reported')
    train(tiny(chars, out, '--report=True', '--sample_interval=10'))
    train(
        tiny(
            chars,
            out,
            '--report=True',
            '--sample_interval=10',
            '--max_iters=40',
            '--init_from=resume',
        )
    )
    return out


def test_a_run_ends_with_its_report(reported):
    log, page, sessions = (
        (reported / 'train.log').read_text(encoding='utf-8'),
        page_of(reported),
        json.loads((reported / 'run.json').read_text()),
    )
    assert log.splitlines()[-1].endswith(f'report: {reported / "report.html"}')
    assert [s['from_step'] for s in sessions] == [0, 20] and {s['end'] for s in sessions} == {
        'done'
    }, 'one entry for each start'
    facts = sessions[-1]
    assert facts['environment']['PyTorch'] in page and facts['environment']['commit'] in page
    assert (
        facts['memory']['peak']
        > facts['memory']['weights']
        > 0
        < facts['seconds']['evaluation']
        < 60
    )
    assert (
        f'A GPT of {facts["model"]["parameters"]:,} parameters was trained on 5,120 tokens' in page
        and 'in 40 steps' in page
    )
    assert (
        page.count('<svg') == 4
        and page.count('role=img aria-label="') == 4
        and 'Loss over 40 steps: train loss from' in page
    )
    for step in '10', '20', '30', '40':
        assert f'<td>{step}</td>' in page and f'<small>step {step}</small>' in page, (
            'evaluations and samples, of both parts'
        )
    changed, others = page[page.index('<h2>Options') :].split('<details>')
    assert (
        '>n_embd</th><td>32<' in changed
        and 'beta1' not in changed
        and '>beta1</th><td>0.9<' in others
    )
    assert len(page) < 150_000
    assert {'report.html', 'run.json'} <= set(RUN_FILES), 'a new run in this folder puts them aside'


def test_one_page_for_itself(reported, tmp_path):
    """Whatever a run's files contain, its page has no script and makes no requests.

    It fits a phone and has dark colors.
    """
    out = tmp_path / '<img src=x onerror=alert(1)>'
    shutil.copytree(reported, out, ignore=shutil.ignore_patterns('*.pt'))
    with open(out / 'train.log', 'a', encoding='utf-8') as f:
        f.write(f'step 1,234: validation loss 1\n--- sample\n{HARM}\n--- {HARM}\n')
    (out / 'config.json').write_text(
        json.dumps(json.loads((out / 'config.json').read_text()) | {'dataset': HARM, HARM: HARM})
    )
    sessions = json.loads((out / 'run.json').read_text())
    sessions[-1] |= {
        'command': HARM,
        'end': HARM,
        'began': HARM,
        'environment': {HARM: HARM},
        'data': {HARM: HARM},
        'memory': {HARM: 3},
        'seconds': {HARM: 9},
    }
    (out / 'run.json').write_text(json.dumps(sessions))
    page = open(report.write(str(out)), encoding='utf-8').read()
    tags, reader = [], HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.feed(page)
    assert (
        page.count('&lt;script&gt;') >= 9
        and 'step 1,234' in page
        and not {'script', 'img', 'link', 'iframe', 'object'} & {tag for tag, _ in tags}
    )
    assert all(
        not name.startswith('on') and (name not in ('src', 'href', 'xlink:href') or value[0] == '#')
        for _, a in tags
        for name, value in a.items()
    )
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
        assert (
            len(asked) == 1
            and not troubles
            and tab.locator('script, img').count() == 0
            and 'harmed' not in tab.title()
        )
        assert tab.evaluate('document.documentElement.scrollWidth') <= 320
        ink, paper = (
            tab.evaluate(f'getComputedStyle(document.body).{name}')
            for name in ('color', 'backgroundColor')
        )
        assert (
            sum(map(int, re.findall(r'\d+', ink))) > 600
            and sum(map(int, re.findall(r'\d+', paper))) < 120
        )
        shown = tab.evaluate('getComputedStyle(document.querySelector("svg text")).fill')
        assert shown == ink, 'the charts follow'
        browser.close()


def test_no_report_costs_no_training(chars, tmp_path, monkeypatch):
    (tmp_path / 'a' / 'report.html').mkdir(
        parents=True
    )  # a folder in its place: it cannot be written
    train(tiny(chars, tmp_path / 'a', '--report=True'))
    assert (
        'no report (' in (tmp_path / 'a' / 'train.log').read_text().splitlines()[-1]
        and (tmp_path / 'a' / 'ckpt.pt').exists()
    )
    monkeypatch.setitem(sys.modules, 'matplotlib', None)  # as if it were not installed
    train(tiny(chars, tmp_path / 'b', '--report=True'))
    last = (tmp_path / 'b' / 'train.log').read_text().splitlines()[-1]
    assert (
        'matplotlib is not installed' in last
        and f'python -m lyregpt report --out_dir={tmp_path / "b"}' in last
        and not (tmp_path / 'b' / 'report.html').exists()
    )


def test_a_signal_does_not_wait_for_a_report(chars, tmp_path):
    def stop():
        while threading.main_thread().is_alive():
            time.sleep(0.02)
            if (tmp_path / 'metrics.csv').exists() and (tmp_path / 'metrics.csv').read_text().count(
                '\n'
            ) > 2:
                return signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        train(
            tiny(chars, tmp_path, '--report=True', '--max_iters=100000', '--eval_interval=100000')
        )
    assert (
        ended.value.code == 143
        and (tmp_path / 'ckpt.pt').exists()
        and not (tmp_path / 'report.html').exists()
    )
    done = script('-m', 'lyregpt', 'report', f'--out_dir={tmp_path}')
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / 'report.html')
    assert 'The run ended early: stopped by SIGTERM.' in page_of(
        tmp_path
    ) and 'None were taken' in page_of(tmp_path)


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
    assert 'in 40 steps' in page and 'still running, or it was killed' in page


@pytest.mark.parametrize(
    'name, text, message',
    [
        ('', '', 'no such folder'),
        ('x', '', 'no metrics.csv'),
        ('metrics.csv', ','.join(METRICS), 'no figures yet'),
        (
            'metrics.csv',
            ','.join(METRICS) + '\n1,9,1.0,2.5,,,,,,\n',
            'a run of examples/seq2seq/train_seq2seq.py',
        ),
    ],
)
def test_mistakes(tmp_path, name, text, message):
    out = tmp_path / 'out'
    if name:
        out.mkdir()
        (out / name).write_text(text)
        (out / 'config.json').write_text('{"label_smoothing": 0.1}')
    done = script('-m', 'lyregpt', 'report', f'--out_dir={out}')
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1


def test_starts_quickly():
    code = (
        'import sys, bench; from lyregpt import report; '
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False).returncode == 0


# -----------------------------------------------------------------------------
# What to try next. The losses are of real runs on the embedded songs (--block_size=64
# --batch_size=16 and so on).


VALIDATION = {'validation windows': 731, 'validation windows read': 731, 'windows at once': 16}
ALL = {'training tokens': 420_867, 'validation tokens': 46_764} | VALIDATION
FEW = {'training tokens': 32_705, 'validation tokens': 8_178} | VALIDATION
RUNS: dict = {  # name: (options, facts, [(step, training loss, gradient norm, validation loss)])
    'heart': (
        dict(max_iters=400, eval_interval=40),
        dict(model={'parameters': 116_032}, data=FEW),
        [  # fmt: skip
            (10, 3.859, 1.22, None),
            (40, 2.354, 0.72, 2.252),
            (80, 2.01, 0.81, 2.005),
            (120, 1.822, 0.87, 1.926),
            (160, 1.703, 0.96, 1.9),
            (200, 1.625, 0.99, 1.898),
            (240, 1.492, 1.03, 1.906),
            (280, 1.405, 0.99, 1.927),
            (320, 1.304, 0.94, 1.917),
            (360, 1.053, 0.98, 2.022),
            (400, 0.989, 1, 2.046),
        ],
    ),
    'short': (
        dict(n_embd=48, max_iters=120, eval_interval=12),
        dict(model={'parameters': 66_768}, data=ALL),
        [  # fmt: skip
            (10, 4.596, 1.21, None),
            (12, 4.072, 1.5, 3.842),
            (20, 3.295, 0.93, None),
            (24, 2.735, 0.98, 2.738),
            (30, 2.656, 0.59, None),
            (36, 2.509, 0.63, 2.563),
            (40, 2.468, 0.6, None),
            (48, 2.43, 0.67, 2.487),
            (50, 2.39, 0.82, None),
            (60, 2.383, 0.61, 2.408),
            (70, 2.316, 0.84, None),
            (72, 2.256, 1.08, 2.337),
            (80, 2.249, 0.68, None),
            (84, 2.245, 0.84, 2.287),
            (90, 2.208, 0.81, None),
            (96, 2.202, 0.89, 2.248),
            (100, 2.165, 0.74, None),
            (108, 2.188, 0.77, 2.224),
            (110, 2.241, 0.92, None),
            (120, 2.156, 0.8, 2.214),
        ],
    ),
    'high': (
        dict(n_embd=48, max_iters=150, eval_interval=15, learning_rate=3.0),
        dict(model={'parameters': 66_768}, data=ALL),
        [  # fmt: skip
            (10, 124.001, 19.15, None),
            (15, 97.39, 16.13, 71.262),
            (20, 65.834, 82.6, None),
            (30, 50.233, 16.55, 40.466),
            (40, 43.58, 10.83, None),
            (45, 49.73, 18.99, 30.312),
            (50, 35.181, 14.01, None),
            (60, 37.955, 7.55, 25.73),
            (70, 41.807, 13.42, None),
            (75, 43.161, 12.42, 33.455),
            (80, 73.498, 24.13, None),
            (90, 47.639, 12.2, 34.248),
            (100, 59.316, 18.33, None),
            (105, 45.148, 14.13, 21.457),
            (110, 26.963, 22.79, None),
            (120, 43.262, 12.98, 33.069),
            (130, 38.682, 5.57858e07, None),
            (135, 31.638, 12.92, 27.742),
            (140, 48.383, 30.51, None),
            (150, 44.461, 13.69, 28.922),
        ],
    ),
    'low': (
        dict(n_embd=48, max_iters=150, eval_interval=15, learning_rate=1e-4),
        dict(model={'parameters': 66_768}, data=ALL),
        [  # fmt: skip
            (10, 4.751, 0.63, None),
            (15, 4.742, 0.59, 4.737),
            (20, 4.732, 0.68, None),
            (30, 4.719, 0.64, 4.711),
            (40, 4.7, 0.64, None),
            (45, 4.685, 0.66, 4.683),
            (50, 4.674, 0.67, None),
            (60, 4.66, 0.68, 4.653),
            (70, 4.639, 0.69, None),
            (75, 4.621, 0.72, 4.622),
            (80, 4.616, 0.73, None),
            (90, 4.597, 0.76, 4.592),
            (100, 4.581, 0.85, None),
            (105, 4.57, 0.76, 4.568),
            (110, 4.56, 0.79, None),
            (120, 4.552, 0.78, 4.55),
        ],
    ),
    'small': (
        dict(n_layer=1, n_embd=4, block_size=32, max_iters=1200, eval_interval=100),
        dict(model={'parameters': 1_392}, data=ALL),
        [  # fmt: skip
            (50, 3.842, 0.42, None),
            (100, 2.87, 0.5, 2.79),
            (200, 2.593, 0.6, 2.632),
            (300, 2.576, 0.51, 2.606),
            (400, 2.527, 0.44, 2.584),
            (500, 2.532, 0.46, 2.572),
            (600, 2.499, 0.81, 2.561),
            (700, 2.464, 0.68, 2.551),
            (800, 2.466, 0.58, 2.535),
            (900, 2.455, 0.49, 2.527),
            (1000, 2.46, 0.47, 2.527),
            (1100, 2.472, 0.43, 2.52),
            (1200, 2.461, 0.6, 2.511),
        ],
    ),
}


def recorded(name, changed=(), rows=slice(None), **facts):
    """A Run with the curves of RUNS[name], some rows of them, or other options and facts."""
    settings, told, losses = RUNS[name]
    config = dict(
        init_from='scratch',
        n_layer=2,
        n_head=2,
        n_embd=64,
        dropout=0.0,
        grad_clip=1.0,
        warmup_iters=10,
        batch_size=16,
        learning_rate=1e-2,
    )
    tokens = 16 * settings.get('block_size', 64)
    found = []
    for step, train_loss, norm, val_loss in losses[rows]:
        at = dict.fromkeys(METRICS) | {'step': step, 'tokens': step * tokens, 'seconds': step / 10}
        found.append(
            at
            | {'train_loss': train_loss, 'grad_norm': norm, 'mfu': 0.3, 'tokens_per_second': 9000}
        )
        found += (
            [at | {'val_loss': val_loss, 'val_bpb': val_loss / math.log(2)}] if val_loss else []
        )
    return Run(
        'out',
        found,
        config | {'gradient_accumulation_steps': 1} | settings | dict(changed),
        [{'began_from': 'scratch', 'end': 'done'} | told | facts],
    )


def said(run):
    """The advice as one text. train.py must accept each option in it beside the run's own."""
    hints = report.advice(run)
    for words in re.findall('`(--.*?)`', ' '.join(way for _, way in hints)):
        configure(
            TrainConfig,
            [*(f'--{k}={v}' for k, v in run.config.items()), '--init_from=scratch', *words.split()],
        )
    return '\n'.join(f'{shows} -> {way}' for shows, way in hints)


@pytest.mark.parametrize(
    'run, first, more',
    [
        (
            recorded('heart'),
            'The validation loss was lowest at step 200 (1.898) and rose to 2.046 at step 400, '
            'while the training loss fell from',
            [
                'overfitting',
                '--dropout=0.1',
                '--patience=3',
                '--n_layer=1',
                'trained on its 32,705 tokens for 12.5 epochs',
                '580,160 tokens would suit',
                '8,178 tokens; below 10,000',
            ],
        ),
        (
            recorded('heart', rows=slice(0, 7)),
            'Over the last third of the steps the training loss fell by',
            ['to 1.492, the validation loss by 0.000 to 1.906', 'is beginning to overfit'],
        ),
        (
            recorded('short'),
            'The validation loss is still falling: the second half of the steps, to 120, reduced '
            'it by 0.194 (2.408 to 2.214)',
            ['too short', '--max_iters=240', '1.8 tokens per parameter', '--max_iters=1305'],
        ),
        (
            recorded('short', {'max_minutes': 3.0}),
            'The validation loss is still falling',
            ['--max_minutes=6'],
        ),
        (
            recorded('low'),
            'The validation loss is still falling',
            ['training is slow', '--learning_rate=0.0003'],
        ),
        (
            recorded('high'),
            'The training loss jumped 3 times; the largest jump was at step 80, from 41.81 to '
            '73.50',
            ['3 times grad_clip=1 in 100%', '--learning_rate=1`'],
        ),
        (
            recorded('low', end='the loss became NaN or infinite at step 150'),
            'The run ended because the loss became NaN',
            ['A lower learning rate: `--learning_rate=3.333e-05`'],
        ),
        (
            recorded('small'),
            'Both losses hardly change any more and are close together (training 2.466, '
            'validation 2.511)',
            ['--n_head=4 --n_embd=8', 'too small'],
        ),
        (
            recorded('short', rows=slice(0, 3)),
            'Only 1 evaluation: too few',
            ['--eval_interval=2'],
        ),
        (
            recorded('small', seconds={'training': 70, 'evaluation': 30}),
            'Both losses',
            ['Evaluations took 30% of the time', '--eval_interval=200'],
        ),
        (
            recorded('small', data=ALL | {'validation windows read': 100}),
            'Both losses',
            ['over 6,397 tokens', '--eval_iters=None'],
        ),
    ],
    ids=lambda value: '' if isinstance(value, Run) else None,
)
def test_advice(run, first, more):
    text = said(run)
    assert text.startswith(first), text
    assert all(word in text for word in more), text


def test_advice_of_other_beginnings():
    tuned = said(recorded('heart', {'init_from': 'gpt2'}, began_from='gpt2'))
    assert 'overfitting' in tuned and 'smaller model' not in tuned and 'Hoffmann' not in tuned, (
        'its size is given, and it has read before'
    )
    resumed = recorded('heart', {'init_from': 'resume'}, began_from='scratch')
    assert (
        report.command(resumed)
        == 'python train.py out/config.json --out_dir=out-next --init_from=scratch'
    )
    slow = recorded('small', seconds={'training': 100.0})
    for row in slow.rows:
        row['mfu'] = row['mfu'] and 0.05
    assert 'The run used 5%' in said(slow) and '--compile=True' in said(slow)


def test_a_run_that_has_not_ended_is_to_go_on():
    for facts in {'end': None}, {'end': 'stopped by SIGTERM'}:
        text = said(recorded('short', {'max_iters': 5000}, **facts))
        assert (
            'still falling' in text
            and '(120 of at most 5,000 steps)' in text
            and '`python train.py --out_dir=out --init_from=resume`' in text
        )
        assert '--max_iters' not in text and 'too short' not in text
        assert 'let it continue' in said(
            recorded('short', {'max_iters': 5000}, slice(0, 3), **facts)
        )
    before = recorded('short', {'max_iters': 5000})
    before = Run('out', before.rows, before.config)  # without run.json
    assert 'let it continue' in said(before)
    assert 'still falling' not in said(
        recorded(
            'short', {'max_iters': 5000}, end='stopped: reached the target validation loss of 3'
        )
    )
    page = report.page(
        recorded('short', {'max_iters': 5000, 'eval_iters': 9}, data={}, model={}, end=None)
    )
    assert '--init_from=resume</code>' in page and 'append its options' not in page


def test_no_hint_changes_nothing_or_what_is_not_known():
    text = said(recorded('heart', {'dropout': 0.5, 'patience': 3}))
    assert (
        'overfitting' in text
        and '--dropout' not in text
        and '--patience' not in text
        and '--n_layer=1' in text
    )
    slow = recorded(
        'small',
        {'compile': True, 'batch_size': 'auto'},
        seconds={'training': 60.0, 'evaluation': 60.0},
    )
    for row in slow.rows:
        row['mfu'] = row['mfu'] and 0.05
    assert 'Both losses' in said(slow) and 'The run used' not in said(slow)
    for name in RUNS:
        bare = recorded(name, seconds={'training': 60.0, 'evaluation': 60.0})
        bare.config = {}
        for row in bare.rows:
            row['mfu'] = row['mfu'] and 0.05
        text = '\n'.join(f'{shows} -> {way}' for shows, way in report.advice(bare))
        assert 'Evaluations' in text and not re.search(
            r'=0\b(?!\.)|--(dropout|learning_rate|n_\w+|batch_size|eval_interval)=', text
        ), text


def test_samples_that_look_like_their_end(tmp_path):
    def write_log(text):
        (tmp_path / 'train.log').write_bytes(text.encode())
        return [(s['step'], s['text'], s['remark']) for s in report.read_samples(str(tmp_path))]

    new = (
        'step 10: loss 5\n--- sample of 4 lines\na\n---\n--- sample\nb\n--- new\n'
        'step 20: loss 4\n--- sample of 1 line\n\n---\n--- sample of 9 lines\nhalf'
    )
    assert (
        write_log(new)
        == write_log(new.replace('\n', '\r\n'))
        == [(10, 'a\n---\n--- sample\nb', 'new'), (20, '', '')]
    )
    old = (
        'step 10: loss 5\n--- sample\na\nb\n--- one\n'
        'step 20: loss 4\n--- sample\n\n--- two\nstep 30: loss 4\n'
    )
    assert write_log(old) == [(10, 'a\nb', 'one'), (20, '', 'two')]


def test_charts_need_no_backend():
    code = (
        'import sys; from tests.test_report import recorded; from lyregpt import report; '
        "assert len(report.charts(recorded('heart'))) == 3; import matplotlib; "
        "assert 'matplotlib.pyplot' not in sys.modules; "
        "assert matplotlib.rcParams._get('backend') == 'TkAgg'"
    )
    done = script('-c', code, MPLBACKEND='TkAgg')
    assert done.returncode == 0, done.stderr


def test_charts_of_a_loss_of_zero(monkeypatch):
    run = recorded('small')
    run.best |= {'val_loss': 0.0, 'val_bpb': 0.0}
    monkeypatch.setattr(report, 'draw', lambda title, lines, **look: look.get('right'))
    assert report.charts(run)[0][2] == ('bits per byte', 0.0)


def test_nothing_wrong_is_said():
    run = recorded('small')
    for row in run.rows:  # a gap that does not grow
        if row['train_loss']:
            row['train_loss'] -= 0.2
    assert report.advice(run) == [] and 'These figures show no problem' in report.page(run)


# -----------------------------------------------------------------------------
# Two side by side


def figures(printed):
    return {
        name.strip(): (a, b)
        for name, a, b in (
            line.rsplit(maxsplit=2) for line in printed.splitlines() if len(line.split()) > 2
        )
    }


def test_compare(chars, reported, tmp_path):
    other = tmp_path / 'other'
    train(tiny(chars, other, '--n_embd=16', '--max_iters=30'))
    done = script('bench.py', '--compare', reported, other, f'--json={tmp_path / "c.json"}')
    assert done.returncode == 0, done.stderr
    assert script('bench.py', f'--compare={reported},{other}').stdout == done.stdout
    rows = figures(done.stdout)
    assert (
        rows['n_embd'] == ('32', '16')
        and rows['steps'] == ('40', '30')
        and rows['tokens read'] == ('5,120', '3,840')
    )
    ours, theirs = (report.read_run(str(out)) for out in (reported, other))
    assert rows['best validation loss'] == tuple(
        f'{run.best["val_loss"]:.4f}' for run in (ours, theirs)
    )
    assert rows['validation loss after 3,840 tokens'] == tuple(
        f'{run.evaluations[2]["val_loss"]:.4f}' for run in (ours, theirs)
    )
    assert (
        'learning rate had not come down yet' in done.stdout
        and json.loads((tmp_path / 'c.json').read_text())['figures']
    )
    theirs.evaluations = theirs.evaluations[:2]  # 20 steps of 30 were evaluated
    rows = {name: (a, b) for name, a, b in report.compare(ours, theirs)[0]}
    assert rows['validation loss after 2,560 tokens'] == tuple(
        f'{run.evaluations[1]["val_loss"]:.4f}' for run in (ours, theirs)
    )
    for words in (
        ['--compare', reported],
        ['--compare', reported, other, other],
        ['--compare', reported, tmp_path / 'none'],
    ):
        done = script('bench.py', *words)
        assert (
            done.returncode == 2
            and done.stderr.count('\n') == 1
            and ('two folders' in done.stderr or 'no such folder' in done.stderr)
        )


def test_what_does_not_compare(chars, reported, demo_text, tmp_path):
    def run_on(name, text, tokenizer):
        write_dataset(str(tmp_path / name), split_text([text], len(text), 0.1), tokenizer)
        train(tiny(tmp_path / name, tmp_path / f'out-{name}', '--max_iters=10'))
        return report.read_run(str(tmp_path / f'out-{name}'))

    ours, tokenizer = report.read_run(str(reported)), CharTokenizer.train([demo_text])
    for other, told, bits in (
        (
            run_on('bpe', demo_text, BPETokenizer.train([demo_text], 300)),
            'tokenizers differ, so losses per token cannot be compared; bits per byte can',
            True,
        ),
        (
            run_on('bpe-half', demo_text[:20_000], BPETokenizer.train([demo_text], 300)),
            'nothing shows that their validation text is the same',
            False,
        ),
        (run_on('half', demo_text[:20_000], tokenizer), 'validation data differ', False),
    ):
        rows, remarks = report.compare(ours, other)
        names = [name for name, _, _ in rows]
        assert (
            told in remarks[0]
            and ('best bits per byte' in names) == bits
            and not any('loss' in name for name in names)
        )
