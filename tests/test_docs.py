"""The quick part of tests/docs_check.py on our pages, and what the check itself finds."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests import docs_check
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not shutil.which('bash') or not shutil.which('git'), reason='needs bash and git'
)
SCRIPT = '''"""A script."""
from dataclasses import dataclass

SIZE = 3


@dataclass
class ToyConfig:
    size: int = 1  # how large


class Toy:
    def __init__(self):
        self.parts = SIZE

    def play(self):
        # twice
        return self.parts * 2


def main():
    configure(ToyConfig)
'''


@pytest.fixture
def book(tmp_path):
    """Makes a small repository of pages and checks it.

    book(text, …) is (faults, summary) for README.md with that text.
    """
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'toy.py').write_text(SCRIPT, encoding='utf-8')
    (tmp_path / '.gitignore').write_text('/out*/\n', encoding='utf-8')
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)

    def check(text, pages=None, **knobs):
        for name, words in {'README.md': text, 'docs/README.md': 'More.', **(pages or {})}.items():
            (tmp_path / name).write_text(textwrap.dedent(words).strip() + '\n', encoding='utf-8')
        subprocess.run(['git', 'add', '-A'], cwd=tmp_path, check=True)
        return docs_check.check(tmp_path, docs_check.CheckConfig(**knobs))

    return check


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='needs a checkout of git')
def test_our_pages():
    faults, summary = docs_check.check(ROOT, docs_check.CheckConfig(quick=True, timeout=60))
    assert not faults, '\n'.join([*faults, summary])


def test_a_good_page(book):
    faults, summary = book(
        """
        # A page: of "things"

        See [there](docs/more.md#the-end-1), [this](#a-page-of-things), [`Toy.play`](toy.py) and
        `toy.py --size=3`, `--size`, `docs/`, `out-x/ckpt.pt`, `git log --oneline`, `docs/NAME.md`,
        `docs/*.md`.

        <!-- from: toy.py -->
        ```python
        def play(self):
            # …
            return self.parts * 2
        ```

        ```text
        not a command
        ```
        """,
        {'docs/more.md': '# The end\n\n# The end\n'},
    )
    assert not faults and summary.startswith('3 pages, 3 links, 0 blocks, 0 faults')


@pytest.mark.parametrize(
    'text, fault',
    [
        ('[there](docs/more.md)', '1: docs/more.md: no such file'),
        ('![a picture](docs/more.png)', '1: docs/more.png: no such file'),
        ('<img src="docs/more.png">', '1: docs/more.png: no such file'),
        ('# End\n\n[there](#start)', '3: #start: README.md has no such heading'),
        ('[out](../secret.md)', '1: ../secret.md: no such file'),
        ('one\n`docs/more.md`', '2: docs/more.md: no such file'),
        ('Read `game.py`.', '1: game.py: no such file'),
        ('`toy.py:12`', '1: toy.py:12: name the function'),
        ('`--sise=3`', '1: --sise: no option of any script; did you mean --size?'),
        ('`python toy.py --sise=3`', '1: --sise: no option of toy.py'),
        ('<!-- not run: later -->\n\n    python toy.py --sise=3', '3: --sise: no option of toy.py'),
        ('<!-- not run: later -->\n\n    python docs/run.py', '3: docs/run.py: no such file'),
        ('[`Toy.play`](toy.py#L3)', '1: toy.py#L3: link to the file'),
        ('[`Toy.plays`](toy.py)', '1: toy.py: toy.py does not have Toy.plays'),
        (
            '<!-- from: toy.py -->\n```python\nSIZE = 4\n```',
            "3: toy.py does not hold these lines, from 'SIZE = 4' on",
        ),
        (
            '<!-- from: toy.py -->\n```python\nclass Toy:\n# …\nSIZE = 3\n```',
            "3: toy.py does not hold these lines, from 'SIZE = 3' on",
        ),
        ('<!-- not run -->\n\n    true', '1: <!-- not run -->: expected one of'),
        ('<!-- slw -->\n\n    true', '1: <!-- slw -->: expected one of'),
        ('<!-- slow -->\n\nwords', '1: <!-- slow -->: stands above no block'),
        ('```\ntrue\n```', "1: a block of kind ''"),
        ('Try\n\n    true; false; true', '3: expected exit status 0, got 1'),
        (
            'Try\n\n    echo no such luck; exit 3',
            '3: expected exit status 0, got 3\n    | no such luck',
        ),
        ('<!-- fails: 2 -->\n\n    true', '3: expected exit status 2, got 0'),
        (
            '```python\nx = 1\n\nassert x == 2\n```',
            '2: expected exit status 0, got AssertionError\n    | Traceback',
        ),
        (
            '<!-- fails: KeyError -->\n```python\n[][0]\n```',
            '3: expected exit status KeyError, got IndexError',
        ),
        ('Try\n\n    sleep 60', '3: expected exit status 0, got nothing after 2 seconds'),
        (
            '```python\nwhile True: pass\n```',
            '2: expected exit status 0, got nothing after 2 seconds',
        ),
        (
            '```python\nimport os; os._exit(4)\n```',
            '2: expected exit status 0, got the end of Python, status 4',
        ),
        (
            '<!-- server: 1 -->\n\n    exit 5',
            '3: expected exit status 0, got 5, before anything listened',
        ),
    ],
)
def test_faults(book, text, fault):
    faults, _ = book(text, timeout=2)
    assert len(faults) == 1 and faults[0].startswith('README.md:' + fault), faults


def test_words_of_the_reader_are_no_pages(book, tmp_path):
    book('Nothing.')
    (tmp_path / 'song.md').write_text(
        '[gone](nowhere.md)', encoding='utf-8'
    )  # git does not know it
    repo = docs_check.Repository(tmp_path)
    assert repo.pages == ['README.md', 'docs/README.md'] and 'song.md' in repo.files
    with pytest.raises(docs_check.UserError, match='expected a checkout of git'):
        docs_check.Repository(tmp_path.parent)


def test_what_cannot_be_reached(book):
    faults, _ = book(
        '[docs](docs)', {'docs/README.md': '[a](a.md)', 'docs/a.md': 'A', 'docs/b.md': '[a](a.md)'}
    )
    assert faults == ['docs/b.md:1: no link leads here from README.md or docs/README.md']


def test_blocks_of_a_page_share_what_they_made(book, tmp_path):
    with docs_check.socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    faults, summary = book(
        f"""
        ```bash
        export WORD=one
        mkdir deep && cd deep
        echo two > word.txt
        ```

        ```python
        import os
        words = [open('deep/word.txt').read().strip()]  # the interpreter is where the page began
        ```

        <!-- prepared by: echo three > mine.txt -->

            grep two word.txt && grep three mine.txt && test "$WORD" = one && ls ../toy.py

        <!-- checked with: --size=7 -->

            printf 'import sys; print(sys.argv[1:])' > train.py
            python train.py --size=1 | grep "'--size=1', '--size=7'"

        <!-- checked with: --size=8 -->

            python train.py
            test "$(python train.py && python ../toy.py)" = "['--size=8']"

        <!-- server: {port} -->

            python -m http.server --bind 127.0.0.1 {port}

        ```python
        import urllib.request
        page = urllib.request.build_opener().open('http://127.0.0.1:{port}/').read()
        assert b'deep' in page or words == ['two']
        ```

        <!-- fails: ValueError -->
        ```python
        raise ValueError(words)
        ```
        """.replace('--size=7', '--max_iters=7').replace('--size=8', '--max_iters=8'),
        {
            'train.py': SCRIPT.replace('ToyConfig', 'TrainConfig').replace(
                'size:', 'max_iters: int = 1\n    size:'
            )
        },
    )
    assert not faults, faults
    assert '8 blocks' in summary
    assert not docs_check.answers(port), 'the server outlived the page'
    assert not (tmp_path / 'deep').exists()


def test_what_is_not_run(book, monkeypatch):
    text = """
        <!-- slow -->

            echo ${ANYTHING:-x} && test -f toy.py

        <!-- needs: NO_SUCH_THING -->

            false

        <!-- not run: needs a piano -->

            false
        """
    monkeypatch.delenv('NO_SUCH_THING', raising=False)
    faults, summary = book(text, quick=True)
    assert not faults and '0 blocks' in summary
    assert all(
        f'1 not run: {why}' in summary
        for why in ('slow', 'needs a piano', 'NO_SUCH_THING is not here')
    )
    faults, summary = book(text)
    assert not faults and '1 blocks' in summary
    monkeypatch.setenv('NO_SUCH_THING', '1')
    faults, summary = book(text)
    assert [f.split(':')[1] for f in faults] == ['7']


@pytest.mark.skipif(os.name != 'posix', reason='signals as POSIX has them')
def test_ctrl_c_ends_what_was_started(book, tmp_path):
    book('A page.')
    (tmp_path / 'README.md').write_text(
        f'    echo $$ > {tmp_path}/pid; sleep 100\n', encoding='utf-8'
    )
    (tmp_path / 'tests').mkdir()
    shutil.copy(ROOT / 'tests' / 'docs_check.py', tmp_path / 'tests')
    shutil.copy(ROOT / 'configurator.py', tmp_path)
    words = [sys.executable, str(tmp_path / 'tests' / 'docs_check.py')]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as checker:
        end = time.monotonic() + 60
        pid = ''
        while not pid and time.monotonic() < end:
            time.sleep(0.05)
            pid = (tmp_path / 'pid').read_text() if (tmp_path / 'pid').exists() else ''
        os.kill(int(pid), 0)  # it is there
        checker.send_signal(signal.SIGINT)
        assert checker.wait(30) == 130, checker.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='needs a checkout of git')
def test_command_line():
    def checker(*words):
        env = os.environ | {'PYTHONIOENCODING': 'utf-8'}
        words = [sys.executable, str(ROOT / 'tests' / 'docs_check.py'), *words]
        return subprocess.run(
            words, capture_output=True, text=True, encoding='utf-8', env=env, timeout=180
        )

    done = checker('--pages=docs/nowhere.md')
    assert (
        done.returncode == 2
        and 'pages=docs/nowhere.md: no such page' in done.stderr
        and not done.stdout
    )
    done = checker('--pages=docs/checks.md')
    assert (
        done.returncode == 0
        and done.stdout.startswith('1 pages')
        and '1 blocks, 0 faults' in done.stdout
    ), done.stdout
