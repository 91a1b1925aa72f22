"""Check the documentation: run its blocks, look up its links, paths, options and quotations.

    python tests/docs_check.py                                      (every page: minutes)
    python tests/docs_check.py --quick                              (without blocks marked slow)
    python tests/docs_check.py --pages=README.md --timeout=600      (one page)

Prints one line per fault, `page:line: what is wrong`, and exits with status 1 if there is one.
docs/checks.md says what is checked and what the marks above blocks mean.
"""

import ast
import collections
import difflib
import fnmatch
import functools
import importlib.util
import os
import posixpath
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from configurator import UserError, configure, run  # noqa: E402


@dataclass
class CheckConfig:
    """The options; the comment after each is its help."""

    pages: list[str] | None = None  # only these, as in README.md,docs/README.md; None: all
    quick: bool = False  # leave out the blocks that are marked slow
    timeout: float = 300  # seconds that a block may take


MARKS = ('not run', 'slow', 'needs', 'prepared by', 'checked with', 'server', 'fails', 'from')
# Options of torchrun and of other programs on the pages, and words that stand for any option.
OTHER_OPTIONS = set(
    'key option help version nnodes nproc_per_node max_restarts standalone rdzv_backend '
    'rdzv_endpoint rdzv_id signal requeue index_url extra_index_url'.split()
)
# A name in inline code that ends like this is a file of ours.
ENDINGS = ('.py', '.md', '.html', '.ini', '.toml', '.slurm', '.ipynb')
LEFT_OUT = ('…', '# …', '// …')  # in a quotation: lines are left out here

# -----------------------------------------------------------------------------
# Reading a page


@dataclass
class Block:
    """A block of code: `kind` is the word after the fence, `line` its first line of text."""

    kind: str
    text: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)


@dataclass
class Page:
    """What a page has; each list entry begins with its line."""

    path: str
    blocks: list[Block] = field(default_factory=list)
    links: list[tuple[int, str, str]] = field(default_factory=list)  # where to, inline code there
    code: list[tuple[int, str]] = field(default_factory=list)  # inline
    anchors: set[str] = field(default_factory=set)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def add_block(self, token: Token, line: int, marks: list[tuple[int, str]]) -> None:
        """Add a block with the comments above it."""
        info = token.info.split() if token.type == 'fence' else ['bash']
        block = Block(''.join(info[:1]), token.content, line + (token.type == 'fence'))
        for at, mark in marks:
            name, _, value = (part.strip() for part in mark.partition(':'))
            if name not in MARKS or (name == 'slow') == bool(value):
                expected = f'expected one of {", ".join(MARKS)}, with a value (slow has none)'
                self.faults.append((at, f'<!-- {mark} -->: {expected}'))
            block.marks[name] = value
        if block.kind in ('', 'sh', 'shell', 'console', 'py'):
            fault = f'a block of kind {block.kind!r}: write bash, python, or text if it is not run'
            self.faults.append((line, fault))
        self.blocks.append(block)

    def add_heading(self, token: Token) -> None:
        """Add the anchor that GitHub gives a heading: lower case, dashes, numbered if repeated."""
        pieces = [c.content for c in token.children or [] if c.type in ('text', 'code_inline')]
        words = ''.join(pieces).strip().lower()
        slug = anchor = re.sub(r'[^\w\- ]', '', words).replace(' ', '-')
        number = 0
        while anchor in self.anchors:
            number += 1
            anchor = f'{slug}-{number}'
        self.anchors.add(anchor)

    def add_inline(self, token: Token, line: int) -> None:
        """Add the links and the inline code of a paragraph."""
        children = token.children or []
        for n, child in enumerate(children):
            if child.type in ('softbreak', 'hardbreak'):
                line += 1
            elif child.type == 'code_inline':
                self.code.append((line, child.content))
            elif child.type == 'html_inline':
                self.add_html(child.content, line)
            elif child.type == 'link_open':
                code = children[n + 1].content if children[n + 1].type == 'code_inline' else ''
                self.links.append((line, str(child.attrs['href']), code))
            elif child.type == 'image':
                self.links.append((line, str(child.attrs['src']), ''))

    def add_html(self, text: str, line: int) -> None:
        """Add the links of a piece of HTML."""
        self.links += [(line, where, '') for where in re.findall(r'(?:href|src)="([^"]+)"', text)]


def read_page(root: Path, path: str) -> Page:
    """The page's blocks with their marks, its links, inline code and anchors."""
    page = Page(path)
    parser = MarkdownIt('commonmark').enable('table')
    tokens = parser.parse((root / path).read_text(encoding='utf-8'))
    marks: list[tuple[int, str]] = []  # comments directly above the next token
    for previous, token in zip([None, *tokens], tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type == 'html_block':
            comments = re.findall(r'<!--(.*?)-->', token.content, re.S)
            if not re.sub(r'<!--.*?-->', '', token.content, flags=re.S).strip():
                marks += [(line, ' '.join(comment.split())) for comment in comments]
                continue
            page.add_html(token.content, line)
        if token.type in ('fence', 'code_block'):
            page.add_block(token, line, marks)
        else:
            lost = [mark for mark in marks if mark[1].partition(':')[0].strip() in MARKS]
            page.faults += [(at, f'<!-- {mark} -->: stands above no block') for at, mark in lost]
        marks = []
        if token.type == 'inline':
            page.add_inline(token, line)
            if previous and previous.type == 'heading_open':
                page.add_heading(token)
    return page


# -----------------------------------------------------------------------------
# What the repository has


class Repository:
    """The files that git knows or would add, and the options of each script.

    Raises UserError without git.
    """

    def __init__(self, root: Path):
        self.root = root
        try:
            tracked = self.git('ls-files', '-z').stdout.decode().split('\0')
            new = self.git('ls-files', '-z', '-o', '--exclude-standard').stdout.decode().split('\0')
        except OSError:
            tracked, new = [], []
        if not any(tracked):
            raise UserError(f'{root}: expected a checkout of git, whose list of files is checked')
        self.files = {f for f in tracked + new if f and (root / f).is_file()}
        pages = [f for f in sorted(self.files) if f.endswith('.md')]
        self.pages = [f for f in pages if f in tracked or f.startswith('docs/')]
        self.folders = {parent.as_posix() for f in self.files for parent in Path(f).parents} - {'.'}
        self.made: set[str] = set()  # files and folders that the pages' commands make
        self.ignored = functools.cache(self._ignored)
        self.options = functools.cache(self._options)

    def git(self, *words: str) -> subprocess.CompletedProcess:
        """The finished git command."""
        command = ['git', '-c', 'safe.directory=*', *words]
        return subprocess.run(command, cwd=self.root, capture_output=True)

    def _ignored(self, path: str) -> bool:
        return self.git('check-ignore', path, path + '/').returncode == 0

    def _options(self, script: str) -> set[str]:
        """The fields of the dataclass that the script gives to `configure`, or argparse's."""
        tree = ast.parse((self.root / script).read_text(encoding='utf-8'))
        nodes = list(ast.walk(tree))
        names, found = set(), {'help', 'version'}
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'configure' and node.args:
                names.add(ast.unparse(node.args[0]))
            if isinstance(node, ast.Constant) and 'argparse' in ast.dump(tree):
                if re.fullmatch(r'--[a-z][\w-]*', str(node.value)):
                    found.add(str(node.value)[2:].replace('-', '_'))
        for node in nodes:
            if isinstance(node, ast.ClassDef) and node.name in names:
                fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
                found |= {ast.unparse(n.target) for n in fields}
                names |= {ast.unparse(base) for base in node.bases}
        return found

    def has(self, path: str, page: str) -> bool:
        """Whether it is a file or folder, seen from the root or the page, or git ignores it, or a
        command of the pages makes it."""
        path = re.sub(r'<[^>]*>', '*', path)
        ours = self.files | self.folders
        for start in ('', posixpath.dirname(page)):
            seen = posixpath.normpath(posixpath.join(start, path))
            if seen in ours or ('*' in seen and fnmatch.filter(ours, seen)):
                return True
            if any(seen == made or seen.startswith(made + '/') for made in self.made):
                return True
            if not seen.startswith('..') and self.ignored(seen):
                return True
        names = {posixpath.basename(f) for f in self.files | self.made}
        return '/' not in path and bool(fnmatch.filter(names, path))


def commands(text: str) -> Iterator[list[str]]:
    """The commands in shell text as lists of words, without lines that shlex cannot read."""
    for line in text.replace('\\\n', ' ').splitlines():
        try:
            words = shlex.split(line.replace(';', ' ; '), comments=True)
        except ValueError:
            continue
        command: list[str] = []
        for word in [*words, ';']:
            if word not in ('&&', '||', '|', ';', '&', '(', ')'):
                command.append(word)
            elif command:
                yield command
                command = []


def script_of(words: list[str], repo: Repository) -> tuple[str, list[str]]:
    """The script of ours that a command runs, and the words after it; ('', []) if it runs none."""
    script, rest = '', []
    for i, word in enumerate(words):
        name, following = os.path.basename(word), words[i + 1 :]
        if name in ('python', 'python3') and following[:1] == ['-m'] and len(following) > 1:
            script, rest = following[1].replace('.', '/') + '.py', following[2:]
            if script == 'lyregpt.py':
                name, following = 'lyregpt', rest
        if name == 'lyregpt' and following and not following[0].startswith('-'):
            from lyregpt.__main__ import COMMANDS

            module = COMMANDS.get(following[0], (following[0], ''))[0]
            script, rest = module.replace('.', '/') + '.py', following[1:]
        elif name.endswith('.py') and not script:
            # config/train_x.py --option is a command line of train.py
            script = 'train.py' if word.startswith('config/') else posixpath.normpath(word)
            rest = following
        if script:
            break
    return (script, rest) if script in repo.files else ('', [])


# -----------------------------------------------------------------------------
# What is checked without running anything


def check_options(words: list[str], script: str, repo: Repository) -> Iterator[str]:
    """Faults in the options of a command; with script '' any script's will do."""
    for word in words:
        key = word[2:].partition('=')[0].replace('-', '_')
        if not word.startswith('--') or not re.fullmatch(r'[a-z]\w*', key):
            continue
        known = repo.options(script) if script else OTHER_OPTIONS
        if not script:
            scripts = [f for f in repo.files if f.endswith('.py')]
            known = known.union(*(repo.options(f) for f in scripts))
        if key not in known:
            fault = f'--{key}: no option of {script or "any script"}'
            for near in difflib.get_close_matches(key, sorted(known), 1):
                fault += f'; did you mean --{near}?'
            yield fault


def check_paths(words: list[str], page: str, repo: Repository) -> Iterator[str]:
    """Faults in words that look like our paths: in a folder of ours, or with one of our endings."""
    tops = {folder.partition('/')[0] for folder in repo.folders}
    for word in words:
        word = re.sub(r'^--?\w+=', '', word).strip('"\'(),;:')
        if re.search(r'\.py:\d+', word):
            yield f'{word}: name the function instead of a line'
            continue
        if '/' in word:
            ours = word.partition('/')[0] in tops
        else:
            ours = word.endswith(ENDINGS) and re.fullmatch(r'[\w*-][\w.*-]*', word)
        stands_for_any = re.search(r'…|[$:{}()=]|(^|/)[A-Z_]{3,}(\.\w+)?($|/)', word)
        if ours and not stands_for_any and not repo.has(word, page):
            yield f'{word}: no such file or folder, and no command of the pages makes it'


def check_link(
    page: Page, where: str, code: str, repo: Repository, pages: dict[str, Page]
) -> Iterator[str]:
    """Faults in a link; addresses in the web are not looked up.

    The text of a link to a Python file may be a name in it, which must be there.
    """
    if re.match(r'[a-z]+:', where):
        return
    target, anchor = target_of(page, where)
    if target not in repo.files | repo.folders | {'.'}:
        yield f'{where}: no such file or folder in the repository'
    elif anchor and target in pages and anchor not in pages[target].anchors:
        yield f'{where}: {target} has no such heading'
    elif anchor and target not in pages:
        yield f'{where}: link to the file, and name the function instead of a line'
    elif target.endswith('.py') and re.fullmatch(r'[\w.]+', code) and not code.endswith('.py'):
        name = code.rpartition('.')[2]
        if not re.search(rf'\b{name}\b', (repo.root / target).read_text(encoding='utf-8')):
            yield f'{where}: {target} does not have {code}'


def target_of(page: Page, where: str) -> tuple[str, str]:
    """The path from the root, and the anchor, to which a link on the page leads."""
    path, _, anchor = urllib.parse.unquote(where).partition('#')
    here = posixpath.join(posixpath.dirname(page.path), path) if path else page.path
    return posixpath.normpath(here), anchor


def check_quotation(block: Block, repo: Repository) -> Iterator[str]:
    """Faults in a quotation: its pieces must be in the file, in order.

    All lines may be indented less than in the file by the same amount.
    """
    path = block.marks['from']
    if path not in repo.files:
        yield f'{path}: no such file to quote from'
        return
    file = (repo.root / path).read_text(encoding='utf-8').splitlines()
    pieces: list[list[str]] = [[]]
    for line in textwrap.dedent(block.text).splitlines():
        if line.strip() in LEFT_OUT:
            pieces.append([])
        else:
            pieces[-1].append(line)
    indents = {len(line) - len(line.lstrip()) for line in file}
    missing = min((missing_pieces(pieces, file, n) for n in indents), key=len)
    if missing:
        yield f'{path} does not hold these lines, from {missing[0][0].strip()!r} on'


def missing_pieces(pieces: list[list[str]], file: list[str], indent: int) -> list[list[str]]:
    """The pieces from the first one on that the file does not have at this indentation."""
    start = 0
    for n, piece in enumerate(pieces):
        wanted = [(' ' * indent + line).rstrip() for line in piece]
        while [line.rstrip() for line in file[start : start + len(wanted)]] != wanted:
            start += 1
            if start + len(wanted) > len(file):
                return pieces[n:]
        start += len(wanted)
    return []


def check_page(
    page: Page, repo: Repository, pages: dict[str, Page]
) -> Iterator[tuple[int, Iterator[str]]]:
    """All that can be checked without running a block: lines, and the faults in each."""
    for line, where, code in page.links:
        yield line, check_link(page, where, code, repo, pages)
    for line, text in page.code:
        words = text.split()
        script, rest = script_of(words, repo)
        yield line, check_paths(words, page.path, repo)
        if script or text.startswith('--'):  # else the options of another program
            yield line, check_options(rest if script else words, script, repo)
    for block in page.blocks:
        if 'from' in block.marks:
            yield block.line, check_quotation(block, repo)
        added = block.marks.get('checked with', '').split()
        yield block.line, check_options(added, 'train.py', repo)
        for words in commands(block.text) if block.kind == 'bash' else ():
            script, rest = script_of(words, repo)
            if script:
                yield block.line, check_options(rest, script, repo)
            if 'not run' in block.marks:
                yield block.line, check_paths(words, page.path, repo)


def made_by(pages: dict[str, Page]) -> set[str]:
    """The files and folders that commands of the pages make."""
    texts = [text for page in pages.values() for _, text in page.code]
    for page in pages.values():
        for block in page.blocks:
            if block.kind == 'bash':
                texts += [block.text, block.marks.get('prepared by', '')]
    made: list[str] = []
    for words in (words for text in texts for words in commands(text)):
        for word, following in zip(words, [*words[1:], '']):
            made += re.findall(r'^--(?:\w*out\w*|\w*dir)=(.+)', word)
            if word in ('>', '>>', '-o'):
                made.append(following)
        if words[0] in ('mkdir', 'touch', 'tee'):
            made += words[1:]
        elif words[0] in ('cp', 'mv'):
            made.append(words[-1])
    return {posixpath.normpath(path) for path in made}


def unreachable(pages: dict[str, Page]) -> list[str]:
    """The pages under docs/ to which no links lead from README.md or docs/README.md."""
    seen: set[str] = set()
    todo = ['README.md', 'docs/README.md']
    while todo:
        path = todo.pop()
        if path in pages and path not in seen:
            seen.add(path)
            for _, where, _ in pages[path].links:
                target, _ = target_of(pages[path], where)
                todo += [target, f'{target}/README.md', f'{target}/readme.md']
    return sorted(path for path in pages if path.startswith('docs/') and path not in seen)


# -----------------------------------------------------------------------------
# Running blocks

NOWHERE = 'http://127.0.0.1:9'  # no network: what would download fails at once
ENVIRONMENT = {
    **dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), NOWHERE),
    **dict.fromkeys(('no_proxy', 'NO_PROXY'), '127.0.0.1,localhost'),
    **dict.fromkeys(('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'), '1'),
    **dict.fromkeys(('PIP_NO_INDEX', 'PIP_DISABLE_PIP_VERSION_CHECK'), '1'),
    **dict.fromkeys(('CUDA_VISIBLE_DEVICES', 'LYREGPT_HISTORY'), ''),
    'WANDB_MODE': 'offline',
    'PYTHONIOENCODING': 'utf-8',
    'MPLBACKEND': 'agg',
}
PROGRAMS = {  # what the blocks call, and the words after Python's path
    'python': '',
    'python3': '',
    'torchrun': '-m torch.distributed.run',
    'pip': '-m pip',
    'lyregpt': '-m lyregpt',
}
# Adds the options of the mark `checked with` to train.py's.
WRAPPER = """#!{bash}
for word in "$@"; do
    case "$word" in train.py|*/train.py) set -- "$@" $CHECKED_WITH;; esac
done
export PYTHONPATH={copy}
exec {python} "$@"
"""
PYTHON = """
def main():
    import os, sys, traceback
    orders = os.fdopen(os.dup(0), encoding='utf-8')  # the blocks' standard input is empty
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    scope = sys.modules['__main__'].__dict__
    for order in orders:
        page, line, source, log, done = order.rstrip('\\n').split('\\t')
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        result = '0'
        try:
            with open(source, encoding='utf-8') as f:
                text = '\\n' * (int(line) - 1) + f.read()  # so tracebacks name the page's line
                exec(compile(text, page, 'exec'), scope)
        except SystemExit as error:
            result = str(error.code or 0)
        except BaseException as error:
            traceback.print_exc()
            result = type(error).__name__
        sys.stdout.flush(), sys.stderr.flush()
        with open(done + '.tmp', 'w', encoding='utf-8') as f:
            f.write(result)
        os.replace(done + '.tmp', done)
main()
"""


class Reader:
    """Runs the blocks of one page, in order, in a fresh copy of the repository."""

    def __init__(self, repo: Repository, timeout: float):
        self.timeout, self.count = timeout, 0
        self.started: list[subprocess.Popen] = []
        self.python: subprocess.Popen | None = None
        bash = shutil.which('bash')
        if not bash:
            raise UserError('bash is needed to run the shell blocks; on Windows it comes with Git')
        self.bash = bash
        self.home = Path(tempfile.mkdtemp(prefix='docs-check-'))
        self.copy, programs = self.home / 'copy', self.home / 'bin'
        for f in repo.files:
            (self.copy / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo.root / f, self.copy / f)
        programs.mkdir()
        for name, words in PROGRAMS.items():
            program = programs / name
            python = f'{shlex.quote(sys.executable)} {words}'
            text = WRAPPER.format(bash=bash, copy=shlex.quote(str(self.copy)), python=python)
            program.write_text(text, encoding='utf-8')
            program.chmod(0o755)
        paths = [str(programs), os.path.dirname(sys.executable), os.environ['PATH']]
        self.env = os.environ | ENVIRONMENT | {'PATH': os.pathsep.join(paths)}

    def start(self, words: list[str], **options: Any) -> subprocess.Popen:
        """A process in a group of its own, so that it can be ended with all its children."""
        process = subprocess.Popen(words, cwd=self.copy, start_new_session=True, **options)
        self.started.append(process)
        return process

    def wait(self, process: subprocess.Popen, ready: Callable[[], bool]) -> bool:
        """Until `ready()` (True), or until the process has ended or the time is up (False)."""
        end = time.monotonic() + self.timeout
        while not ready() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return ready()

    def run(self, block: Block, page: str) -> str:
        """Run the block; '' if it did what it should, else what went wrong."""
        self.count += 1
        log, marks = self.home / f'{self.count}.log', block.marks
        if 'prepared by' in marks:
            result = self.shell(marks['prepared by'], log)
            if result != '0':
                return f'what prepares it ended with {result}{last_lines(log)}'
        port = int(marks.get('server', 0))
        end = time.monotonic() + 60  # another check on this machine may have a server there
        while port and answers(port):
            if time.monotonic() > end:
                return f'port {port} is taken on this machine: end what listens there'
            time.sleep(0.5)
        if block.kind == 'python':
            result = self.interpreter(block, page, log)
        else:
            result = self.shell(block.text, log, port, CHECKED_WITH=marks.get('checked with', ''))
        expected = marks.get('fails', '0')
        if result == expected:
            return ''
        return f'expected exit status {expected}, got {result}{last_lines(log)}'

    def shell(self, text: str, log: Path, port: int = 0, **env: str) -> str:
        """The exit status. The folder and the variables pass on to the next block.

        With a port: '0' as soon as something listens there.
        """
        state, where = (shlex.quote(str(self.home / name)) for name in ('state', 'where'))
        before = f'[ -f {state} ] && . {state}; [ -f {where} ] && cd "$(cat {where})"'
        after = f"trap 'unset CHECKED_WITH; export -p >{state}; pwd >{where}' EXIT"
        text = f'set -a; {before}; set -eo pipefail\n{"" if port else after}\n{text}'
        with open(log, 'w') as out:
            process = self.start(
                [self.bash, '-c', text],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env | env,
            )
        if port and self.wait(process, lambda: answers(port)):
            return '0'
        self.wait(process, lambda: process.poll() is not None)
        if process.poll() is None:
            self.end(process)
            return f'nothing after {self.timeout:g} seconds'
        if port:
            return f'{process.returncode}, before anything listened at port {port}'
        return str(process.returncode)

    def interpreter(self, block: Block, page: str, log: Path) -> str:
        """'0', the block's exit status, or its exception. A page's blocks share an interpreter."""
        if not self.python:
            self.python = self.start(
                [sys.executable, '-c', PYTHON],
                stdin=subprocess.PIPE,
                text=True,
                encoding='utf-8',
                env=self.env,
            )
        source, done = self.home / f'{self.count}.txt', self.home / f'{self.count}.done'
        source.write_text(block.text, encoding='utf-8')
        print(page, block.line, source, log, done, sep='\t', file=self.python.stdin, flush=True)
        if self.wait(self.python, done.exists):
            return done.read_text(encoding='utf-8')
        if self.python.poll() is None:
            return f'nothing after {self.timeout:g} seconds'
        return f'the end of Python, status {self.python.returncode}'

    def end(self, process: subprocess.Popen) -> None:
        """Ask the process and its children to end; after a while, kill them."""
        for number in (signal.SIGTERM, getattr(signal, 'SIGKILL', signal.SIGTERM)):
            try:
                if hasattr(os, 'killpg'):
                    os.killpg(process.pid, number)
                else:
                    process.terminate()
                process.wait(timeout=20)  # torchrun ends its own children
            except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                pass

    def close(self) -> None:
        """End what was started and remove the copy."""
        for process in reversed(self.started):
            self.end(process)
        shutil.rmtree(self.home, ignore_errors=True)


def answers(port: int) -> bool:
    """Whether something listens at the port."""
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(('127.0.0.1', port)) == 0


def last_lines(log: Path) -> str:
    """The last ten lines of a block's output."""
    text = log.read_text(encoding='utf-8', errors='replace') if log.exists() else ''
    return ''.join(f'\n    | {line}' for line in text.splitlines()[-10:])


def why_not(block: Block, quick: bool) -> str | None:
    """Why the block is not run, or None if it is; '' for what is no command."""
    if block.kind not in ('bash', 'python') or 'from' in block.marks:
        return ''
    if 'not run' in block.marks:
        return block.marks['not run']
    if quick and 'slow' in block.marks:
        return 'slow'
    for name in block.marks.get('needs', '').split():
        if not (os.environ.get(name) or shutil.which(name) or importlib.util.find_spec(name)):
            return f'{name} is not here'
    return None


def run_blocks(page: Page, repo: Repository, config: CheckConfig) -> Iterator[tuple[int, str]]:
    """Run the page's blocks, up to the first that fails; its line and what went wrong."""
    todo = [block for block in page.blocks if why_not(block, config.quick) is None]
    if not todo:
        return
    reader = Reader(repo, config.timeout)
    try:
        for n, block in enumerate(todo, 1):
            began = time.monotonic()
            wrong = reader.run(block, page.path)
            said = f'{"failed" if wrong else "ran"}, {time.monotonic() - began:.1f} s'
            print(f'{page.path}:{block.line}: {said}', file=sys.stderr, flush=True)
            if wrong:
                if n < len(todo):
                    wrong += f'\n    {len(todo) - n} blocks after it were not tried'
                yield block.line, wrong
                break
    finally:
        reader.close()


def check(root: Path, config: CheckConfig) -> tuple[list[str], str]:
    """The faults, and a summary of what was done. Raises UserError for a page that is not there."""
    repo = Repository(root)
    pages = {path: read_page(root, path) for path in repo.pages}
    for path in config.pages or []:
        if path not in pages:
            raise UserError(f'pages={path}: no such page; expected docs/guides/use-it.md, say')
    chosen = [page for path, page in pages.items() if path in (config.pages or pages)]
    repo.made = made_by(pages)
    faults: list[tuple[str, int, str]] = []
    for page in chosen:
        found = list(page.faults)
        for line, wrong in check_page(page, repo, pages):
            found += [(line, fault) for fault in wrong]
        faults += [(page.path, *fault) for fault in sorted(found)]
    if not config.pages:
        lost = 'no link leads here from README.md or docs/README.md'
        faults += [(path, 1, lost) for path in unreachable(pages)]
    for page in chosen:
        faults += [(page.path, *fault) for fault in run_blocks(page, repo, config)]
    reasons = collections.Counter(why_not(b, config.quick) for page in chosen for b in page.blocks)
    links = sum(len(page.links) for page in chosen)
    summary = f'{len(chosen)} pages, {links} links, {reasons[None]} blocks, {len(faults)} faults'
    for reason, n in reasons.most_common():
        if reason:
            summary += f'\n  {n} not run: {reason}'
    return [f'{path}:{line}: {fault}' for path, line, fault in faults], summary


def main() -> None:
    """Check what the command line asks for."""
    config = configure(CheckConfig, description=(__doc__ or '').split('\n')[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    faults, summary = check(ROOT, config)
    print('\n'.join([*faults, summary]))
    sys.exit(1 if faults else 0)


if __name__ == '__main__':
    run(main)
