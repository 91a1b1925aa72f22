"""The page in a real browser against the real server.

The tiny model has memorized two songs; one of them is full of HTML.
"""

import json
import re
import shutil
import threading
import time
import urllib.request

import pytest

from lyregpt.dataset import write_dataset
from lyregpt.text import song_header
from lyregpt.tokenizer import CharTokenizer
from tests.conftest import ROOT, tiny
from train import train

sync_api = pytest.importorskip('playwright.sync_api')
uvicorn = pytest.importorskip('uvicorn')
serve = pytest.importorskip('lyregpt.serve')
CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
if not CHROMIUM:
    pytest.skip('no chromium on PATH', allow_module_level=True)
expect = sync_api.expect

HARM = '<script>window.harmed = 1</script>\n<img src=x onerror="window.harmed = 2; alert(2)">\n'
LONG = (
    'An owl 🦉 keeps the ledger of the rain,\n' + HARM + 'and 🕯️ the wax runs over every grain.\n\n'
) * 20  # no model can count to 20
SHORT = 'One bell, and then the door.\n'
RECORD = """window.seen = [];
new MutationObserver(() => {
  const card = document.querySelector('.card');
  seen.push([card.dataset.state, card.querySelector('.written').textContent.length]);
}).observe(document.body, {subtree: true, childList: true, characterData: true})"""
COLUMNS = 'step,tokens,seconds,train_loss,val_loss,val_bpb,lr,grad_norm,tokens_per_second,mfu\n'


def rows(*steps):
    """Lines of metrics.csv; each tenth step has a validation loss only, as train.py writes them."""
    return ''.join(
        f'{s},{s * 100},{s * 0.5},,{6 - s / 100},2.5,,,,\n'
        if s % 10 == 0
        else f'{s},{s * 100},{s * 0.5},{6 - s / 90},,,0.001,0.7,{900 + s},0.1\n'
        for s in steps
    )


def listen(app):
    """A server of `app` in a thread of this process (torch is loaded once), and its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level='warning'))
    threading.Thread(target=server.run, daemon=True).start()
    until = time.time() + 20
    while not server.started and time.time() < until:
        time.sleep(0.01)
    return server, f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The folder that Watch shows: a run in its own folder, and one with a hostile name."""
    folder = tmp_path_factory.mktemp('runs')
    for name, last in (('out-one', 30), ('more/<b>two & "three"%', 50)):
        (folder / name).mkdir(parents=True)
        (folder / name / 'metrics.csv').write_text(
            COLUMNS + rows(*range(1, last)), encoding='utf-8'
        )
        (folder / name / 'train.log').write_text(
            f'step {last}: loss 5\n--- sample\n{HARM}by the lamp\n---\n', encoding='utf-8'
        )
    return folder


@pytest.fixture(scope='module')
def site(tmp_path_factory, runs):
    """The address of lyregpt/serve.py with the tiny model."""
    data, out = tmp_path_factory.mktemp('data') / 'lyrics', tmp_path_factory.mktemp('out-tiny')
    songs = [
        song_header('Griddlemoth', '', '', 'Ledger') + LONG,
        song_header('Knell', '', '', 'Door') + SHORT,
    ]
    tokenizer = CharTokenizer.train(songs)
    write_dataset(
        str(data),
        [(split, song, True) for split in ('train', 'val') for song in songs + songs[1:] * 9],
        tokenizer,
    )
    train(
        tiny(
            data,
            out,
            '--n_embd=64',
            '--block_size=64',
            '--batch_size=16',
            '--max_iters=70',
            '--eval_interval=70',
        )
    )
    config = serve.ServeConfig(out_dir=str(out), runs_dir=str(runs))
    server, address = listen(serve.make_app(config, serve.Service(config)))
    yield address
    server.should_exit = True


@pytest.fixture(scope='module')
def chromium():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, site):
    """visit(hash, address, **context) opens the page.

    A dialog, a console error, a policy violation or a request elsewhere fails the test.
    """
    opened = []

    def go(at='', address=site, **options):
        context = chromium.new_context(**{'viewport': {'width': 1280, 'height': 900}} | options)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.faults = []
        page.on(
            'dialog',
            lambda dialog: (page.faults.append(f'dialog {dialog.message}'), dialog.dismiss()),
        )
        page.on('pageerror', lambda error: page.faults.append(f'error {error}'))
        page.on(
            'console',
            lambda said: said.type in ('error', 'warning') and page.faults.append(said.text),
        )
        page.on(
            'request',
            lambda request: (
                request.url.startswith((address, 'data:', 'blob:'))
                or page.faults.append(f'request {request.url}')
            ),
        )
        page.add_init_script(
            'addEventListener("securitypolicyviolation", '
            'e => console.error("policy: " + e.violatedDirective))'
        )
        page.goto(f'{address}/{at}')
        opened.append(page)
        return page

    yield go
    for page in opened:
        assert page.evaluate('window.harmed') is None
        assert page.faults == []
        page.context.close()


def fetch(address, **body):
    request = urllib.request.Request(
        address, json.dumps(body).encode() if body else None, {'Content-Type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def ask(page, tokens, n=1, song='Griddlemoth,Ledger', prompt=''):
    """Fill in the form for what the model has memorized; the sliders by keyboard."""
    for name, value in zip(('artist', 'title', 'prompt', 'seed'), [*song.split(','), prompt, 7]):
        page.fill(f'[name={name}]', str(value))
    page.press('[name=temperature]', 'Home')
    for name, value in (('max_tokens', tokens), ('n', n)):
        page.fill(f'[name={name}]', str(value))


def test_the_file_is_one_and_complete():
    page = (ROOT / 'lyregpt/page.html').read_text(encoding='utf-8')
    assert page.count('<script') == page.count('<script>\n') == 1
    assert not re.search(
        r'<[^>]*\son\w+\s*=|javascript:|\beval\b|innerHTML|insertAdjacentHTML|outerHTML|'
        r'document\.write',
        page,
    )
    assert set(re.findall(r'https?://[^\s\'"]+', page)) == {'http://www.w3.org/2000/svg'}


def test_writes_samples_side_by_side(visit, site):
    page = visit()
    expect(page.locator('#model')).to_contain_text('out-tiny')
    expect(page.locator('#model')).to_contain_text('context 64')
    ask(page, 150, n=3, prompt='An owl')
    assert page.locator('label:has([name=temperature]) b').text_content() == '0.00'
    page.evaluate(RECORD)
    page.press('[name=prompt]', 'Control+Enter')
    expect(page.locator('[data-state=length]')).to_have_count(3)
    lengths = [length for state, length in page.evaluate('seen') if state == 'writing']
    assert lengths == sorted(lengths) and len(set(lengths)) > 10  # it came bit by bit
    cards = page.locator('.card')
    places = [card.bounding_box() for card in cards.all()]
    assert (
        len({place['y'] for place in places[:2]}) == 1
        and places[0]['x'] + places[0]['width'] < places[1]['x']
    )
    truth = fetch(
        f'{site}/v1/completions',
        prompt='An owl',
        artist='Griddlemoth',
        title='Ledger',
        max_tokens=150,
        n=3,
        temperature=0,
        seed=7,
        truncate_prompt_tokens=-1,
    )
    assert [card.locator('.written').text_content() for card in cards.all()] == [
        choice['text'] for choice in truth['choices']
    ]
    assert [card.locator('h3').text_content() for card in cards.all()] == [
        'Griddlemoth — Ledger'
    ] * 3
    assert [card.locator('.seed').text_content() for card in cards.all()] == [
        'seed 7',
        'seed 8',
        'seed 9',
    ]
    assert cards.first.locator('.prompt').text_content() == 'An owl'
    assert re.search(
        r'full length · 1[45]\d tokens · [\d,]+ tokens/s',
        cards.first.locator('.hint').text_content(),
    )


def test_what_the_model_writes_stays_text(visit):
    page = visit()
    ask(page, 300, prompt='An owl')
    page.click('#write')
    expect(page.locator('[data-state=length]')).to_have_count(1)
    text = page.locator('.text').text_content()
    assert HARM in text and '🦉' in text
    assert page.locator('#cards script, #cards img').count() == 0


def test_an_ended_song_says_so_and_the_place_is_taken_by_another(visit):
    page = visit(permissions=['clipboard-read', 'clipboard-write'])
    ask(page, 200, song='Knell,Door')
    page.press('[name=title]', 'Enter')
    expect(page.locator('[data-state=stop] .hint')).to_contain_text('ended')
    assert page.locator('.written').text_content() == SHORT
    page.click('.copy')
    expect(page.locator('#status')).to_have_text('Copied.')
    assert page.evaluate('navigator.clipboard.readText()') == SHORT
    page.click('.seed')
    assert page.input_value('[name=seed]') == '7'
    page.click('.again')
    expect(page.locator('.seed')).not_to_have_text('seed 7')
    expect(page.locator('[data-state=stop]')).to_have_count(1)
    page.press('[name=prompt]', 'Control+Enter')  # a second writing comes above the first
    expect(page.locator('[data-state=stop]')).to_have_count(2)
    assert page.locator('.seed').first.text_content() == 'seed 7'


def test_stop_keeps_the_text_and_frees_the_place(visit, site):
    page = visit()
    ask(page, 2000, n=6)
    for way in ('Escape', 'Stop'):
        page.click('#write')
        page.locator('.batch:first-child .written:not(:empty)').first.wait_for()
        assert fetch(f'{site}/health')['writing'] == 6
        page.keyboard.press('Escape') if way == 'Escape' else page.click('#stop')
        expect(page.locator('#status')).to_have_text('Stopped.')
        expect(page.locator('[data-state=stopped]')).to_have_count(6 if way == 'Escape' else 12)
        until = time.time() + 3
        while (now := fetch(f'{site}/health'))['writing'] + now['waiting'] and time.time() < until:
            time.sleep(0.05)
        assert now['writing'] == now['waiting'] == 0
        text = page.locator('.written').first.text_content()
        assert text and len(text) < 2000 and LONG.startswith(text[:60])
    assert (
        page.evaluate('document.activeElement.id') == 'write'
    )  # Stop has gone dark: the keyboard is not lost with it


def test_copying_is_marked(visit, site):
    page = visit()
    ask(page, 200, prompt='An owl')
    page.click('#write')
    expect(page.locator('.copied')).to_be_visible()
    [choice] = fetch(
        f'{site}/v1/completions',
        prompt='An owl',
        artist='Griddlemoth',
        title='Ledger',
        max_tokens=200,
        temperature=0,
        seed=7,
        truncate_prompt_tokens=-1,
        originality=True,
    )['choices']
    found, text = (
        choice['originality'],
        choice['text'],
    )  # Python counts code points, as the server does
    assert '🦉' in text[: found['runs'][0]['end']]
    assert page.locator('mark').all_text_contents() == [
        text[run['start'] : run['end']] for run in found['runs']
    ]
    assert page.locator('.written').text_content() == text
    assert str(found['runs'][0]['words']) in page.locator('mark').first.get_attribute('title')
    expect(page.locator('.copied')).to_contain_text(
        f'{found["longest"]} words, from “{found["song"]}”'
    )


def answers(page, body, status=200):
    page.route(
        '**/v1/completions',
        lambda route: route.fulfill(status=status, body=body, content_type='text/event-stream'),
    )


def event(text, finish=None, **more):
    return (
        'data: '
        + json.dumps({'choices': [{'index': 0, 'text': text, 'finish_reason': finish} | more]})
        + '\n\n'
    )


def test_marks_count_code_points_and_overlap(visit):
    page = visit()
    ask(page, 10)
    text = '🦉🕯️ one two three four <b>'
    runs = [
        {'start': 4, 'end': 11, 'words': 2, 'song': 'A: B'},
        {'start': 8, 'end': 17, 'words': 2, 'song': ''},
    ]
    told = {'longest': 2, 'text': '', 'song': 'A: B', 'share': 0.5, 'n': 2, 'runs': runs}
    answers(
        page, event('🦉🕯️ one two') + event(text[11:], 'stop', originality=told) + 'data: [DONE]\n\n'
    )
    page.click('#write')
    expect(page.locator('mark')).to_have_count(2)
    assert page.locator('mark').all_text_contents() == [text[4:11], text[11:17]]
    assert page.locator('mark').first.get_attribute('title') == '2 words from A: B'
    assert page.locator('.written').text_content() == text
    assert '50%' in page.locator('.copied').text_content()
    page.unroute('**/v1/completions')
    answers(
        page,
        event('quite new', 'stop', originality=told | {'runs': [], 'longest': 0, 'share': 0})
        + 'data: [DONE]\n\n',
    )
    page.click('#write')
    expect(page.locator('.copied').first).to_contain_text('Original:')


def test_a_broken_stream_keeps_what_came(visit):
    page = visit()
    ask(page, 10)
    half, failed = event('half a'), page.locator('[data-state=failed] .written')
    for i, (body, message) in enumerate(
        [
            (half, 'connection'),
            (half + 'data: {"choi', 'connection'),
            (half + 'data: {"error": {"message": "no memory"}}\n\n', 'no memory'),
        ]
    ):
        answers(page, body)
        page.click('#write')
        expect(failed).to_have_count(i + 1)
        expect(page.locator('#error')).to_contain_text(message)
        assert failed.first.text_content() == 'half a'
        page.unroute('**/v1/completions')
    page.click('#write')  # and all is well again
    expect(page.locator('[data-state=length]')).to_have_count(1)
    expect(page.locator('#error')).to_have_text('')


def test_errors_are_told_and_leave_the_page_usable(visit):
    page = visit()
    ask(page, 10, prompt='☃')
    page.click('#write')
    expect(page.locator('#error')).to_contain_text('☃')
    page.route('**/v1/completions', lambda route: route.abort())
    page.fill('[name=prompt]', '')
    page.click('#write')
    expect(page.locator('#error')).to_contain_text('does not answer')
    page.unroute('**/v1/completions')
    page.fill('[name=seed]', '-1')  # told by the browser, and nothing is sent
    page.click('summary')
    page.press('[name=prompt]', 'Control+Enter')
    expect(page.locator('[name=seed]')).to_be_focused()
    page.fill('[name=seed]', '')
    page.press('[name=seed]', 'Enter')
    expect(page.locator('[data-state=length]')).to_have_count(1)
    assert (
        all('Failed to load resource' in fault for fault in page.faults) and len(page.faults) == 2
    )
    page.faults.clear()


def test_by_keyboard_alone(visit):
    page = visit()
    expect(page.locator('#song')).to_be_visible()
    order = []
    for _ in range(17):
        page.keyboard.press('Tab')
        order.append(
            page.evaluate(
                'document.activeElement.name || document.activeElement.id || '
                'document.activeElement.tagName'
            )
        )
    assert [what for what in order if what not in ('originality', 'avoid_copying')][:14] == [
        *('tab-write', 'artist', 'album', 'title', 'prompt', 'write', 'SUMMARY'),
        *('temperature', 'max_tokens', 'top_k', 'top_p', 'repetition_penalty', 'n', 'seed'),
    ]
    page.focus('#tab-write')
    page.keyboard.press('ArrowRight')
    expect(page.locator('#panel-watch')).to_be_visible()
    expect(page.locator('#tab-watch')).to_be_focused()
    assert (
        page.url.endswith('#watch') and page.get_attribute('#tab-watch', 'aria-selected') == 'true'
    )
    page.keyboard.press('Home')
    expect(page.locator('#panel-watch')).to_be_hidden()
    page.go_back()
    expect(page.locator('#panel-watch')).to_be_visible()
    for control in page.locator('button, input, textarea').all():
        assert control.evaluate(
            'e => (e.labels?.length || e.textContent.trim() || e.className === "seed") && 1'
        ), control


def test_settings_are_remembered(visit):
    page = visit()
    expect(page.locator('#song')).to_be_visible()
    ask(page, 1234, song='Griddlemoth,<i>', prompt='The\nrain')
    page.fill('[name=top_k]', '0')
    page.reload()
    expect(page.locator('[name=prompt]')).to_have_value('The\nrain')
    assert [
        page.input_value(f'[name={name}]')
        for name in ('title', 'max_tokens', 'temperature', 'seed')
    ] == ['<i>', '1234', '0', '7']
    assert page.locator('.options b').all_text_contents() == [
        '0.00',
        '1,234',
        'off',
        'off',
        'off',
        '1',
    ]


def test_watch_grows_and_keeps_the_zoom(visit, runs):
    page = visit('#watch')
    page.wait_for_selector('.js-plotly-plot .xtick')
    assert page.locator('#runs strong').all_text_contents() == ['more/<b>two & "three"%', 'out-one']
    expect(page.locator('#runs .now').first).to_have_text('training now')
    page.locator('#runs input').nth(1).focus()
    page.keyboard.press('Space')
    page.locator('#runs input').nth(0).uncheck()
    points = 'document.querySelector(".chart").data.map(trace => trace.x.length)'
    expect(page.locator('#samples h3')).to_have_text(['out-one at step 30'])
    assert HARM in page.locator('#samples .text').text_content()
    expect(page.locator('.chart').first).to_have_attribute(
        'aria-label', re.compile(r'^Loss by step\. out-one: .*val loss 5\.8000')
    )
    assert page.evaluate(points) == [27, 2]
    page.evaluate(
        'Plotly.relayout(document.querySelector(".chart"), '
        '{"xaxis.range": [5, 12], "yaxis.range": [5, 6]})'
    )
    with open(runs / 'out-one' / 'metrics.csv', 'a', encoding='utf-8') as f:
        f.write(rows(30, 31, 32) + '33,33')  # a row half-written
    expect(page.locator('#runs label').nth(1)).to_contain_text('step 32')
    expect(page.locator('.chart').first).to_have_attribute(
        'aria-label', re.compile('val loss 5.7000')
    )
    assert page.evaluate(points) == [29, 3]
    assert page.evaluate('document.querySelector(".chart").layout.xaxis.range') == [5, 12]
    page.locator('#runs input').nth(0).check()
    page.check('[name=axis][value=seconds]')
    expect(page.locator('.chart').first).to_have_attribute(
        'aria-label', re.compile('by seconds.*two')
    )
    assert len(page.evaluate(points)) == 4
    assert (
        len(
            set(
                page.evaluate(
                    'document.querySelector(".chart").data.map(trace => trace.line.color)'
                )
            )
        )
        == 2
    )
    assert [
        page.locator('.chart .scatterlayer .trace').count() > 0,
        page.locator('.chart b').count(),
    ] == [True, 0]
    polls = []
    page.click('#tab-write')
    page.on('request', lambda request: '/runs' in request.url and polls.append(request.url))
    page.wait_for_timeout(2100)
    assert polls == []  # nobody watches


def test_a_phone_never_scrolls_sideways(visit):
    page = visit(viewport={'width': 320, 'height': 640}, has_touch=True, is_mobile=True)
    ask_wide = 'document.documentElement.scrollWidth <= innerWidth'
    page.click('summary')
    ask(page, 100, n=2, prompt='An owl')
    page.fill('[name=prompt]', 'An owl' + 'rrr' * 60)
    page.click('#write')
    expect(page.locator('[data-state=length]')).to_have_count(2)
    boxes = [card.bounding_box() for card in page.locator('.card').all()]
    assert boxes[0]['x'] == boxes[1]['x']  # one column
    small = (
        '[...document.querySelectorAll("button, textarea, summary, '
        'label:has([type=checkbox], [type=radio]), input:not([type=checkbox], [type=radio])")]'
        '.filter(e => e.offsetParent && e.getBoundingClientRect().height < 40)'
        '.map(e => e.outerHTML)'
    )
    for width in (320, 390):
        page.set_viewport_size({'width': width, 'height': 640})
        page.click('#tab-write')
        assert page.evaluate(ask_wide)
        assert page.evaluate(small) == []
        expect(page.locator('#stop')).to_be_in_viewport()  # while one reads far below
        page.evaluate('scrollTo(0, 600)')
        expect(page.locator('#stop')).to_be_in_viewport()
        page.evaluate('scrollTo(0, 0)')
        page.click('#tab-watch')
        page.wait_for_selector('.js-plotly-plot .xtick')
        assert page.evaluate(ask_wide)
        assert page.evaluate(small) == []


def test_a_key_and_no_model(visit, runs, tmp_path):
    server, address = listen(
        serve.make_app(
            serve.ServeConfig(out_dir='', runs_dir=str(tmp_path), api_key='open sesame'), None
        )
    )
    page = visit(address=address)
    expect(page.locator('#error')).to_contain_text('API key')
    page.fill('#key', 'wrong')
    page.press('#key', 'Enter')
    expect(page.locator('#error')).to_contain_text('wrong')
    page.fill('#key', 'open sesame')
    page.press('#key', 'Enter')
    expect(page.locator('#ask-key')).to_be_hidden()
    expect(page.locator('#no-model')).to_be_visible()
    expect(page.locator('#error')).to_have_text('')
    assert page.locator('#write').is_disabled()
    page.reload()  # the key stays as long as the tab
    expect(page.locator('#no-model')).to_be_visible()
    page.click('#tab-watch')
    expect(page.locator('#no-runs')).to_contain_text('python train.py config/train_darklyrics.py')
    assert {'401' in fault for fault in page.faults} == {True}
    page.faults.clear()
    server.should_exit = True


def test_contrast(visit):
    """WCAG AA: 4.5 for text, 3 for the edges of controls."""

    def light(colour):
        parts = [
            int(c * 2, 16) if len(colour) == 4 else int(c, 16)
            for c in re.findall('..' if len(colour) == 7 else '.', colour[1:])
        ]
        red, green, blue = (
            v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4
            for v in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    page = visit()
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        style = page.evaluate(
            '[...document.styleSheets[0].cssRules[0].style].map(name => '
            '[name, getComputedStyle(document.documentElement).getPropertyValue(name)])'
        )
        tones = {name[2:]: light(value) for name, value in style if value.startswith('#')}
        assert (tones['ink'] > tones['paper']) == (scheme == 'dark')
        pairs = [
            (tone, ground, 4.5)
            for tone in ('ink', 'dim', 'accent', 'good', 'bad')
            for ground in ('paper', 'card')
        ]
        for one, two, least in [
            *pairs,
            ('on-accent', 'accent', 4.5),
            ('ink', 'mark', 4.5),
            ('edge', 'card', 3),
        ]:
            low, high = sorted((tones[one], tones[two]))
            assert (high + 0.05) / (low + 0.05) >= least, (scheme, one, two)
