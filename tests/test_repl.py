import dataclasses
import errno
import io
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from configurator import UserError, configure
from lyregpt.generate import LoadedModel
from lyregpt.repl import COMMANDS, FIXED, Session, Text, line_editor
from lyregpt.tokenizer import EOT, BPETokenizer, CharTokenizer
from sample import SampleConfig, load, print_samples
from tests.conftest import ROOT


@pytest.fixture(scope='module')
def model(trained):
    return load(configure(SampleConfig, [f'--out_dir={trained}', '--device=cpu']))


class Recited:
    """A model that always generates the same ids, and remembers the prompts."""

    def __init__(self, ids):
        self.ids, self.prompts = ids, []

    def generate(self, prompts, *_, **options):
        self.prompts += map(list, prompts)
        return iter(torch.tensor(self.ids)[:, None])


@pytest.fixture
def talk(model, monkeypatch, capsys, tmp_path):
    """Type lines at a session; returns it, its texts and what else it printed."""

    def talk(lines, *words, tokenizer=model.tokenizer, ids=None):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(lines) + '\n'))
        loaded = LoadedModel(model.model if ids is None else Recited(ids), tokenizer, {})
        session = Session(configure(SampleConfig, ['--max_new_tokens=30', *words]), loaded)
        session.run()
        told = capsys.readouterr()
        return session, told.out, told.err.splitlines()[1:]

    return talk


def written(model, capsys, *words):
    """What `sample.py` prints with these options."""
    print_samples(model, configure(SampleConfig, ['--num_samples=1', *words]))
    return capsys.readouterr().out


@pytest.mark.parametrize('temperature', [0, 0.8])
def test_a_seed_shown_writes_the_same_text_again(talk, model, capsys, temperature):
    knobs = [f'--temperature={temperature}', '--top_k=50']
    session, out, said = talk(['the sea', '/again', '/more', '/more'], *knobs)
    first, second = session.texts
    assert (
        '30 tokens' in said[0]
        and said[0].endswith('seed 1337')
        and '90 tokens' in said[3]
        and said[3].endswith('seed 1338')
    )
    assert (first.text != second.text[: len(first.text)]) == bool(temperature)
    for text, seed, tokens in (
        (first, 1337, 30),
        (second, 1338, 90),
    ):  # 90 tokens: the context, 32, is left and cut several times
        assert (
            written(
                model,
                capsys,
                '--start=the sea',
                f'--seed={seed}',
                f'--max_new_tokens={tokens}',
                *knobs,
            )
            == text.text + '\n'
        )
    assert out.startswith(first.text) and out.count('-' * 40) == 1


def test_going_on_under_other_knobs_reads_what_is_there(talk, model, capsys):
    session, out, said = talk(['the', '/temperature 0', '/more'])
    assert said[-1].endswith('seed 1337 + 1338')
    start = written(model, capsys, '--start=the', '--max_new_tokens=30').removesuffix('\n')
    assert session.text.text + '\n' == written(
        model, capsys, f'--start={start}', '--max_new_tokens=30', '--temperature=0'
    )


def test_a_text_stops_where_the_song_ends(talk):
    letters = CharTokenizer('ab\n')
    lines = ['', '/more', '/more', '/again']
    session, out, said = talk(
        lines, '--max_new_tokens=2', tokenizer=letters, ids=[0, 1, letters.eot, 0]
    )
    assert out == 'ab\nab\n' + '-' * 40 + '\nab\n', (
        'the end is no text; a line that goes on is shown from its start'
    )
    assert (
        'paused' in said[0]
        and said[1].startswith('the document ended; 2 tokens')
        and '/again' in said[2]
        and 'seed 1338' in said[3]
    )


def test_what_text_cannot_tell_is_kept(talk, model):
    letters = CharTokenizer('ab\n')
    session, out, said = talk(
        ['', '/temperature 0', '/more'],
        '--max_new_tokens=3',
        '--stop_at_end=False',
        tokenizer=letters,
        ids=[0, letters.eot, 1],
    )
    assert (
        session.text.text.startswith(f'a{EOT}b')
        and session.text.ids[:5] == [letters.eot, 0, letters.eot, 1, 0]
        and len(session.text.seeds) == 2
    )
    bytewise = BPETokenizer.train(['ab'], 257)
    ids = bytewise.encode('é')
    session, out, said = talk(
        ['', '/temperature 0'], '--max_new_tokens=1', tokenizer=bytewise, ids=ids
    )
    assert session.text.text == '' and session.text.ids == [bytewise.eot, *ids[:1]]
    ended, out, said = talk(
        [''], '--max_new_tokens=2', tokenizer=bytewise, ids=[ids[0], bytewise.eot]
    )
    assert ended.text.text == '\ufffd' and '\ufffd' in out, (
        'and is shown as broken if there is none'
    )
    rest = Recited(ids[1:])
    session.loaded = session.loaded._replace(model=rest)
    session.do_more('')
    assert rest.prompts == [[bytewise.eot, *ids[:1]]] and session.text.text == 'é', (
        'half a character waits for the other half'
    )
    session.do_set('avoid_copying=2')
    with pytest.raises(UserError):  # the training split is unknown
        session.do_more('')
    assert len(session.text.seeds) == 2


def test_a_document_end_in_a_text(talk, model):
    session, out, said = talk(
        ['the', '/temperature 0.7', '/more'], '--stop_at_end=False', '--seed=5'
    )
    session.text.text, session.text.ids = EOT, [model.tokenizer.eot]
    session.tokens = None
    session.do_more('')
    assert session.text.tokens == 90 and session.text.ids[0] == model.tokenizer.eot


def test_options_are_those_of_the_dataclass(talk):
    session, out, said = talk(
        [
            '/options',
            '/set top_p = 0.5',
            '/artist "The Who Knows"',
            '/top_k',
            '/set artist=',
            '/options',
            '/help',
        ]
    )
    told = '\n'.join(said)
    for field in dataclasses.fields(SampleConfig):
        assert bool(re.search(rf'^[* ] {field.name} ', told, re.MULTILINE)) == (
            field.name not in FIXED
        )
    assert "artist='The Who Knows' (was '')" in told and 'top_k=200: choose among' in told
    assert [line[:11] for line in said if line.startswith('*')] == [
        '* max_new_t',
        '* max_new_t',
        '* top_p    ',
    ]
    assert session.config.top_p == 0.5 and session.config.artist == '' and not out
    assert (
        set(COMMANDS) <= set(re.findall(r'^/(\w+)', told, re.MULTILINE))
        and max(map(len, said[-len(COMMANDS) - 1 : -1])) <= 40
    )


@pytest.mark.parametrize(
    'line, message',
    [
        ('日', "character '日'"),
        ('/agian', 'did you mean /again?'),
        ('/temp 1', 'did you mean /temperature?'),
        ('/set topk=1', 'did you mean top_k?'),
        ('/temperature hot', 'temperature=hot: expected a number'),
        ('/temperature -1', 'temperature=-1.0: expected 0'),
        ('/set top_p=7', 'top_p=7.0'),
        ('/seed 1e30', 'seed=1000'),
        ('/device cuda', 'command line'),
        ('/set num_samples=2', 'command line'),
        ('/again now', 'takes no argument'),
        ('/more', 'no text yet'),
        ('/save', 'no text yet'),
        ('/texts', 'no text yet'),
        ('FILE:nowhere.txt', 'nowhere.txt: No such file or directory'),
    ],
)
def test_mistakes_get_one_line_and_end_nothing(talk, line, message):
    session, out, said = talk([line, 'so'])
    assert (
        len(said) == 2
        and message in said[0]
        and len(session.texts) == 1
        and out == session.text.text + '\n'
    )


def test_texts_are_kept(talk, tmp_path):
    (tmp_path / 'song-1.txt').write_text('older')
    saves = ['/save', '/save', '/save song-1.txt', '/save no/where.txt', '/save ~']
    session, out, said = talk(
        ['the', *saves, '/temperature 0.5', 'sea', '/texts', '/texts 3', '/texts 1']
    )
    assert (tmp_path / 'song-1.txt').read_text() == 'older'
    assert (tmp_path / 'song-2.txt').read_text(encoding='utf-8') == session.texts[0].text.rstrip(
        '\n'
    ) + '\n'
    assert sorted(os.listdir(tmp_path)) == ['song-1.txt', 'song-2.txt', 'song-3.txt']
    told = '\n'.join(said)
    assert (
        'song-1.txt exists' in told
        and 'no/where.txt: No such file or directory' in told
        and f'{os.path.expanduser("~")} exists' in told
    )
    assert (
        '   1  the' in told
        and '*  2  sea' in told
        and '/texts 3: expected a number from 1 to 2' in told
    )
    assert (
        session.text is session.texts[0]
        and session.config.temperature == 0.8
        and session.config.seed == 1339
    )


def test_an_error_of_the_output_ends_the_session(talk, monkeypatch):
    def add(text, token):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Text, 'add', add)
    with pytest.raises(OSError, match='No space left'):
        talk(['so'])


def test_the_list_shows_no_song_headers(talk, monkeypatch):
    letters = CharTokenizer(sorted(set('Artist: Title: [x]\nOde tale')))
    monkeypatch.setattr(Session, 'width', lambda session: 15)
    lines = ['/artist Otis', '/title Ode', 'a\\', '[x]\\', 'tale a tale', '/texts']
    *_, listed = talk(lines, tokenizer=letters, ids=[0])[2]
    assert listed == '*  1  Ode / a …'


def test_a_full_disk_spares_the_prompt(tmp_path, monkeypatch):
    def store(history, line):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(FileHistory, 'store_string', store)
    monkeypatch.setenv('LYREGPT_HISTORY', str(tmp_path / 'history'))
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        history = line_editor({}, {}).history
    history.append_string('the sea')
    assert history.get_strings() == ['the sea']


def test_the_line_editor(tmp_path, monkeypatch):
    monkeypatch.setenv('LYREGPT_HISTORY', str(tmp_path / 'history'))

    def typed(*keys):
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            editor = line_editor({}, {})
            lines = []
            for key in keys:
                pipe.send_text(key)
                lines.append(editor.prompt())
            return lines

    assert typed('one\x1b\rtwo\r', 'three\\\rfour\r', '/texts\r') == [
        'one\ntwo',
        'three\\\nfour',
        '/texts',
    ]
    assert typed('\x1b[A\r', '\x1b[A\x1b[A\r') == ['/texts', 'three\\\nfour'], (
        'another start remembers'
    )
    if os.name == 'posix':
        assert (tmp_path / 'history').stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv('LYREGPT_HISTORY', str(tmp_path / 'no' / 'history'))
    assert typed('on\r', '\x1b[A\r') == ['on', 'on'], 'a history that cannot be kept is no mistake'


@pytest.mark.parametrize(
    'text, found',
    [
        ('/te', ['/temperature', '/texts']),
        ('/set te', ['/set temperature=']),
        ('/set te x', []),
        ('te', []),
        ('/', ['/temperature', '/texts', '/set temperature=']),
    ],
)
def test_completion(text, found):
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        completer = line_editor({'temperature': 'how wild', 'texts': ''}, {'temperature'}).completer
    assert [c.text for c in completer.get_completions(Document(text), CompleteEvent())] == found


def test_a_pipe_gets_plain_lines(trained):
    done = subprocess.run(
        [
            sys.executable,
            'sample.py',
            f'--out_dir={trained}',
            '--interactive',
            '--max_new_tokens=20',
            '--start=so',
        ],
        cwd=ROOT,
        input='the\\\nsea\n日\n/quit\nnever',
        capture_output=True,
        encoding='utf-8',
        timeout=60,
    )
    assert (
        done.returncode == 0
        and "character '日'" in done.stderr
        and '\x1b' not in done.stdout + done.stderr
    ), done.stderr
    first, second = done.stdout.split('\n' + '-' * 40 + '\n')
    assert first.startswith('so') and second.startswith('the\nsea') and '> ' not in done.stdout


def test_a_last_line_and_a_start_that_looks_like_a_command(talk, monkeypatch):
    session, out, said = talk([], '--start=/b', tokenizer=CharTokenizer('ab/'), ids=[0])
    assert session.texts[0].config.start == '/b'
    for typed, line in ('the\\', 'the'), ('the\\\nsea\\', 'the\nsea'):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
        assert session.ask() == line
        with pytest.raises(EOFError):
            session.ask()


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_a_terminal(trained, tmp_path):
    import pty

    words = [
        sys.executable,
        str(ROOT / 'sample.py'),
        f'--out_dir={trained}',
        '--interactive',
        '--max_new_tokens=1000000',
        '--stop_at_end=False',
    ]
    env = os.environ | {
        'LYREGPT_HISTORY': str(tmp_path / 'history'),
        'TERM': 'xterm',
        'PROMPT_TOOLKIT_NO_CPR': '1',
        'COLUMNS': '60',
    }
    ready = '[?2004h'  # what the line editor sends when it begins to read
    child, terminal = pty.fork()
    if not child:
        os.chdir(tmp_path)
        os.execve(sys.executable, words, env)
    screen = ''

    def see(what):
        nonlocal screen
        until = time.monotonic() + 60
        while what not in screen:
            assert time.monotonic() < until and select.select([terminal], [], [], 60)[0], screen[
                -2000:
            ]
            screen += os.read(terminal, 65536).decode('utf-8', 'replace')
        before, _, screen = screen.partition(what)
        return before

    try:
        see(ready)
        os.write(terminal, b'the sea\r')
        see('[?2004l')
        see('the sea')
        see('e')  # it writes …
        os.write(terminal, b'\x03')  # … and Ctrl-C stops that
        see('stopped; ')
        see('seed 1337')
        see(ready)
        os.write(terminal, b'half a line\x03')  # here it gives the line up
        see('/quit exits')
        see(ready)
        os.write(terminal, b'/max_new_tokens 20\r')
        see('(was 1000000)')
        see(ready)
        os.write(terminal, b'/more\r')
        assert '/more continues' not in see('paused, ')
        see('seed 1337')
        see(ready)
        os.write(terminal, b'/save\r')
        see('saved as song-1.txt')
        see(ready)
        os.write(terminal, b'\x04')  # Ctrl-D
        with pytest.raises(OSError):  # the other end is closed
            while os.read(terminal, 65536):
                pass
        assert os.waitpid(child, 0)[1] == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
    assert (tmp_path / 'song-1.txt').read_text(encoding='utf-8').startswith('the sea')
    assert (
        '+the sea\n' in (tmp_path / 'history').read_text()
        and '+/save\n' in (tmp_path / 'history').read_text()
    )
