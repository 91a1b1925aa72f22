"""Does the documentation tell the truth? Runs the blocks of every Markdown page, checks its links, paths, knobs, line numbers and quotations.

    python docs/validation/check_docs.py                                     (all: minutes)
    python docs/validation/check_docs.py --quick                             (without the blocks marked slow: what the tests do)
    python docs/validation/check_docs.py --pages=README.md --timeout=600     (one page)
    python docs/validation/check_docs.py --fix                               (writes the right line numbers; runs nothing)

One line per fault, `page:line: what is wrong`; exit status 1 if there is one. What is checked, and the marks: readme.md beside this file.
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

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from configurator import UserError, configure, run  # noqa: E402


@dataclass
class CheckConfig:
    pages: list[str] | None = (
        None  # only these, as in --pages=README.md,docs/guides/use-it.md; None: every page that git knows, and new ones under docs/
    )
    quick: bool = False  # leave out the blocks that are marked slow
    fix: bool = False  # write the right line numbers into the pages, and run nothing
    timeout: float = 300  # seconds that a block may take


MARKS = ('not run', 'slow', 'needs', 'prepared by', 'checked with', 'server', 'fails', 'from')
# torchrun's options, those of other programs that pages name, and the words that stand for any knob
OTHER_OPTIONS = set(
    'key knob help nnodes nproc_per_node max_restarts standalone rdzv_backend rdzv_endpoint rdzv_id signal requeue'.split()
)
CODE = (
    '.py',
    '.md',
    '.html',
    '.ini',
    '.toml',
    '.slurm',
    '.ipynb',
)  # a name in inline code that ends so is a file of ours
LEFT_OUT = ('…', '# …', '// …')  # the line of a quotation that stands for lines left out


@dataclass
class Block:
    kind: str  # bash, python, or another word behind the fence
    text: str
    line: int  # of its first line of text
    marks: dict[str, str] = field(default_factory=dict)


@dataclass
class Page:
    """What a page holds; each list entry begins with its line."""

    path: str
    blocks: list[Block] = field(default_factory=list)
    links: list[tuple[int, str, str]] = field(
        default_factory=list
    )  # line, where to, the text if it is one piece of inline code
    code: list[tuple[int, str]] = field(default_factory=list)  # line, inline code
    anchors: set[str] = field(default_factory=set)
    faults: list[tuple[int, str]] = field(default_factory=list)


def read_page(root: Path, path: str) -> Page:
    """The page's blocks with their marks, its links, inline code and anchors (GitHub's: the heading in lower case, blanks as dashes)."""
    page = Page(path)
    tokens = (
        MarkdownIt('commonmark').enable('table').parse((root / path).read_text(encoding='utf-8'))
    )
    marks: list[tuple[int, str]] = []  # comments directly above the next token
    for i, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if token.type in ('fence', 'code_block'):
            kind = (
                'bash'
                if token.type == 'code_block'
                else token.info.split()[0]
                if token.info.strip()
                else ''
            )
            block = Block(kind, token.content, line + (token.type == 'fence'))
            for at, mark in marks:
                name, _, value = (part.strip() for part in mark.partition(':'))
                if name not in MARKS or (name == 'slow') == bool(value):
                    page.faults.append(
                        (
                            at,
                            f'<!-- {mark} -->: expected one of {", ".join(MARKS)}, with a reason or value (slow has none)',
                        )
                    )
                block.marks[name] = value
            if kind in ('', 'sh', 'shell', 'console', 'py'):
                page.faults.append(
                    (
                        line,
                        f'a block of kind {kind!r}: write bash, python, or text for what is not run',
                    )
                )
            page.blocks.append(block)
            marks = []
        elif (
            token.type == 'html_block'
            and not re.sub(r'<!--.*?-->', '', token.content, flags=re.S).strip()
        ):
            marks += [
                (line, ' '.join(mark.split()))
                for mark in re.findall(r'<!--(.*?)-->', token.content, re.S)
            ]
            continue
        if lost := [(at, mark) for at, mark in marks if mark.partition(':')[0].strip() in MARKS]:
            page.faults.append((lost[0][0], f'<!-- {lost[0][1]} -->: stands above no block'))
        marks = []
        if token.type == 'html_block':
            page.links += [
                (line, where, '') for where in re.findall(r'(?:href|src)="([^"]+)"', token.content)
            ]
        if token.type == 'inline' and tokens[i - 1].type == 'heading_open':
            words = ''.join(
                c.content for c in token.children or [] if c.type in ('text', 'code_inline')
            )
            slug = anchor = re.sub(r'[^\w\- ]', '', words.strip().lower()).replace(' ', '-')
            for again in range(1, 1000):
                if anchor not in page.anchors:
                    break
                anchor = f'{slug}-{again}'
            page.anchors.add(anchor)
        children = token.children or []
        for n, child in enumerate(children):
            line += child.type in ('softbreak', 'hardbreak')
            if child.type == 'code_inline':
                page.code.append((line, child.content))
            if child.type == 'image':
                page.links.append((line, str(child.attrs['src']), ''))
            if child.type == 'link_open':
                alone = (
                    children[n + 1].type == 'code_inline' and children[n + 2].type == 'link_close'
                )
                page.links.append(
                    (line, str(child.attrs['href']), children[n + 1].content if alone else '')
                )
            if child.type == 'html_inline':
                page.links += [
                    (line, where, '')
                    for where in re.findall(r'(?:href|src)="([^"]+)"', child.content)
                ]
    return page


# -----------------------------------------------------------------------------
# What the repository holds


class Repository:
    """The files that git knows or would add, what is defined where, and which knobs each script has. Raises UserError without git."""

    def __init__(self, root: Path):
        self.root = root
        try:
            tracked, new = (
                self.git('ls-files', '-z', *more).stdout.decode().split('\0')
                for more in ((), ('-o', '--exclude-standard'))
            )
        except OSError:
            tracked, new = [], []
        if not any(tracked):
            raise UserError(
                f'{root}: expected a checkout of git, whose list of files says what is ours'
            )
        self.files = {f for f in tracked + new if f and (root / f).is_file()}
        self.pages = [
            f
            for f in sorted(self.files)
            if f.endswith('.md') and (f in tracked or f.startswith('docs/'))
        ]
        self.folders = {
            str(folder) for f in self.files for folder in map(posixpath.normpath, Path(f).parents)
        } - {'.'}
        self.tops = {f.partition('/')[0] for f in self.folders}
        self.made: set[str] = set()  # files and folders that the pages' commands make
        self.trees = functools.cache(
            lambda path: ast.parse((root / path).read_text(encoding='utf-8'))
        )
        self.ignored = functools.cache(
            lambda path: self.git('check-ignore', path, path + '/').returncode == 0
        )
        self.knobs = functools.cache(self._knobs)

    def git(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ['git', '-c', 'safe.directory=*', *words], cwd=self.root, capture_output=True
        )

    def _knobs(self, script: str) -> set[str]:
        """The fields of the dataclass that the script gives to `configure`, or the options of its argparse."""
        tree = self.trees(script)
        calls = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == 'configure'
        ]
        names = {
            n.args[0].id for n in calls if len(n.args) == 1 and isinstance(n.args[0], ast.Name)
        }  # with a second one it reads other words
        words = {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        found = (
            {w[2:].replace('-', '_') for w in words if re.fullmatch(r'--[a-z][\w-]*', w)}
            if 'argparse' in ast.dump(tree)
            else set()
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in names:
                found |= {
                    n.target.id
                    for n in node.body
                    if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                names |= {base.id for base in node.bases if isinstance(base, ast.Name)}
        return found | {'help'}

    def line_of(self, path: str, name: str) -> int | None:
        """The line on which a class, function, method, field or top-level name is defined; in files that are not Python, `function name` and the like."""
        if not path.endswith('.py'):
            lines = (self.root / path).read_text(encoding='utf-8').splitlines()
            defined = re.compile(
                rf'\b(function|const|let|class) {re.escape(name)}\b|^{re.escape(name)}:|\bid="{re.escape(name)}"'
            )
            return next((n for n, line in enumerate(lines, 1) if defined.search(line)), None)
        scope: ast.AST = self.trees(path)
        for part in name.removesuffix('()').split('.'):
            inside = (
                []
                if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef))
                else list(ast.iter_child_nodes(scope))
            )
            inside += (
                [] if isinstance(scope, ast.Module) else list(ast.walk(scope))[1:]
            )  # also what a function defines, and self.name
            found = next((node for node in inside if part in defines(node)), None)
            if found is None:
                return None
            scope = found
        return scope.lineno  # type: ignore[attr-defined]

    def holds(self, path: str, page: str = '') -> bool:
        """Is it a file or folder of ours, seen from the root or from the page; or one that git ignores, or that a command makes?"""
        path = re.sub(r'<[^>]*>', '*', path)
        for seen in (
            posixpath.normpath(path),
            posixpath.normpath(posixpath.join(posixpath.dirname(page), path)),
        ):
            if (
                seen in self.files
                or seen in self.folders
                or '*' in seen
                and fnmatch.filter(self.files | self.folders, seen)
            ):
                return True
            if (
                any(seen == m or seen.startswith(m + '/') for m in self.made)
                or not seen.startswith('..')
                and self.ignored(seen)
            ):
                return True
        return '/' not in path and bool(
            fnmatch.filter({posixpath.basename(f) for f in self.files | self.made}, path)
        )


def defines(node: ast.AST) -> list[str]:
    """The names that a class, a function or an assignment (to a name or to self.name) defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    parts = [n for target in targets for n in ast.walk(target)]
    names = [n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return names + [
        n.attr
        for n in parts
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == 'self'
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The commands in shell text as lists of words; lines that shlex cannot read are left to bash."""
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
    """The script of ours that a command runs, and the words behind it; ('', []) if it runs none."""
    for i, word in enumerate(words):
        if (
            os.path.basename(word) in ('python', 'python3')
            and words[i + 1 : i + 2] == ['-m']
            and len(words) > i + 2
        ):
            script = words[i + 2].replace('.', '/') + '.py'
            return (script, words[i + 3 :]) if script in repo.files else ('', [])
        if word.endswith('.py'):
            script = (
                'train.py' if word.startswith('config/') else posixpath.normpath(word)
            )  # config/train_x.py --knob: of train.py
            return (script, words[i + 1 :]) if script in repo.files else ('', [])
    return '', []


# -----------------------------------------------------------------------------
# What is checked without running anything


def check_knobs(words: list[str], script: str, repo: Repository) -> Iterator[str]:
    """Faults in the options of a command; script '' means that any script's will do."""
    for word in words:
        key = word[2:].partition('=')[0].replace('-', '_')
        if word.startswith('--') and re.fullmatch(r'[a-z]\w*', key):
            known = (
                repo.knobs(script)
                if script
                else OTHER_OPTIONS.union(*(repo.knobs(f) for f in repo.files if f.endswith('.py')))
            )
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), 1)
                yield f'--{key}: no knob of {script or "any script"}' + (
                    f'; did you mean --{near[0]}?' if near else ''
                )


def check_paths(words: list[str], page: str, repo: Repository) -> Iterator[str]:
    """Faults in the words that look like paths of ours: they begin with a folder of ours, or are a name that ends as our files do."""
    for word in words:
        word = re.sub(r'^--?\w+=', '', word).strip('"\'(),;:')
        ours = (
            word.partition('/')[0] in repo.tops
            and '/' in word
            or '/' not in word
            and re.fullmatch(r'[\w*-][\w.*-]*', word)
            and word.endswith(CODE)
        )
        stands_for_any = '…' in word or re.search(r'(^|/)[A-Z_]{3,}(\.\w+)?($|/)', word)
        if re.search(r'\.py:\d+', word):
            yield f'{word}: write a link to the line whose text is the name that is defined there'
        elif (
            ours
            and not re.search(r'[$:{}()=]', word)
            and not repo.holds(word, page)
            and not stands_for_any
        ):
            yield f'{word}: no such file or folder in the repository, and no command of the pages makes it'


def check_link(
    page: Page,
    line: int,
    where: str,
    name: str,
    repo: Repository,
    pages: dict[str, Page],
    moved: list,
) -> Iterator[str]:
    """Faults in a link; a line number that is wrong is put into `moved` too, so that --fix can mend it."""
    if re.match(r'[a-z]+:', where):
        return
    path, _, anchor = urllib.parse.unquote(where).partition('#')
    target = (
        posixpath.normpath(posixpath.join(posixpath.dirname(page.path), path))
        if path
        else page.path
    )
    if target not in repo.files | repo.folders | {'.'}:
        yield f'{where}: no such file or folder in the repository'
    elif re.fullmatch(r'L\d+', anchor):
        if not name:
            yield f'{where}: the text of a link to a line must be the name that is defined there, in backticks'
        elif not (right := repo.line_of(target, name)):
            yield f'{where}: {target} defines no {name}'
        elif int(anchor[1:]) != right:
            moved.append(
                (line, f'[`{name}`]({where})', f'[`{name}`]({where.rpartition("#")[0]}#L{right})')
            )
            yield f'{where}: {name} stands in line {right} (--fix writes the right numbers)'
    elif anchor and target.endswith('.md') and target in repo.files:
        if (
            anchor
            not in (pages[target] if target in pages else read_page(repo.root, target)).anchors
        ):
            yield f'{where}: {target} has no such heading'
    elif anchor and target.endswith('.py'):
        yield f'{where}: expected #L and a number'


def check_quotation(block: Block, repo: Repository) -> Iterator[str]:
    """Faults in a quotation: its pieces must stand in the file, in order; all may be indented less than there by the same amount."""
    path = block.marks['from']
    if path not in repo.files:
        yield f'{path}: no such file to quote from'
        return
    file = (repo.root / path).read_text(encoding='utf-8').splitlines()
    quoted = textwrap.dedent(block.text).splitlines()
    best = 0
    for indent in range(0, 40):
        start, n = 0, 0
        while n < len(quoted):
            end = next(
                (i for i in range(n, len(quoted)) if quoted[i].strip() in LEFT_OUT), len(quoted)
            )
            piece = [(' ' * indent + line).rstrip() for line in quoted[n:end]]
            at = next(
                (
                    i
                    for i in range(start, len(file) - len(piece) + 1)
                    if [x.rstrip() for x in file[i : i + len(piece)]] == piece
                ),
                None,
            )
            if at is None:
                break
            start, n = at + len(piece), end + 1
        if n >= len(quoted):
            return
        best = max(best, n)
    yield f'{path} does not hold these lines, from {quoted[best].strip()!r} on'


def check_page(
    page: Page, repo: Repository, pages: dict[str, Page], moved: list
) -> Iterator[tuple[int, str]]:
    """All that can be found without running a block, as (line, what is wrong)."""
    yield from page.faults
    for line, where, name in page.links:
        yield from (
            (line, fault) for fault in check_link(page, line, where, name, repo, pages, moved)
        )
    for line, text in page.code:
        words = text.split()
        script, rest = script_of(words, repo)
        yield from ((line, fault) for fault in check_paths(words, page.path, repo))
        if script or words and words[0].startswith('--'):  # else the options of another program
            yield from (
                (line, fault) for fault in check_knobs(rest if script else words, script, repo)
            )
    for block in page.blocks:
        yield from (
            (block.line, fault)
            for fault in (check_quotation(block, repo) if 'from' in block.marks else ())
        )
        yield from (
            (block.line, fault)
            for fault in check_knobs(block.marks.get('checked with', '').split(), 'train.py', repo)
        )
        for words in commands(block.text) if block.kind == 'bash' else ():
            script, rest = script_of(words, repo)
            yield from (
                (block.line, fault) for fault in (check_knobs(rest, script, repo) if script else ())
            )
            yield from (
                (block.line, fault)
                for fault in (
                    check_paths(words, page.path, repo) if 'not run' in block.marks else ()
                )
            )


def made_by(pages: dict[str, Page]) -> set[str]:
    """The files and folders that commands of the pages make: behind an option of that kind, behind >, or named to mkdir, cp, mv, touch, tee."""
    texts = [
        f'{b.text}\n{b.marks.get("prepared by", "")}'
        for page in pages.values()
        for b in page.blocks
        if b.kind == 'bash'
    ]
    texts += [text for page in pages.values() for _, text in page.code]
    made: set[str] = set()
    for words in (words for text in texts for words in commands(text)):
        made |= {
            m[1] for word in words if (m := re.fullmatch(r'--(?:\w*out\w*|\w*dir)=(.+)', word))
        }
        made |= {after for word, after in zip(words, words[1:]) if word in ('>', '>>', '-o')}
        made |= set(
            words[1:]
            if words[0] in ('mkdir', 'touch', 'tee')
            else words[-1:]
            if words[0] in ('cp', 'mv')
            else []
        )
    return {posixpath.normpath(m) for m in made}


def unreachable(pages: dict[str, Page], repo: Repository) -> set[str]:
    """The pages under docs/ to which no way leads from README.md or docs/README.md."""
    seen: set[str] = set()
    todo = ['README.md', 'docs/README.md']
    while todo:
        if (path := todo.pop()) in pages and path not in seen:
            seen.add(path)
            targets = [
                posixpath.normpath(posixpath.join(posixpath.dirname(path), where.partition('#')[0]))
                for _, where, _ in pages[path].links
            ]
            todo += targets + [
                f'{t}/{name}' for t in targets for name in ('README.md', 'readme.md')
            ]
    return {path for path in pages if path.startswith('docs/')} - seen


# -----------------------------------------------------------------------------
# Running blocks

PYTHON = """
def main():
    import os, sys, traceback
    orders = os.fdopen(os.dup(0), encoding='utf-8')  # standard input belongs to the blocks, and is empty
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    scope = sys.modules['__main__'].__dict__
    for order in orders:
        page, line, source, log, done = order.rstrip('\\n').split('\\t')
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(out, 2)
        result = '0'
        try:
            with open(source, encoding='utf-8') as f:
                exec(compile('\\n' * (int(line) - 1) + f.read(), page, 'exec'), scope)  # tracebacks name the page's own line
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
    """A reader of one page, in a fresh copy of the repository: types its shell blocks and runs its Python blocks, in order."""

    def __init__(self, repo: Repository, timeout: float):
        self.timeout, self.count = timeout, 0
        self.started: list[subprocess.Popen] = []
        self.python: subprocess.Popen | None = None
        bash = shutil.which('bash')
        if not bash:
            raise UserError('bash is needed to run the shell blocks; on Windows it comes with Git')
        self.bash = bash
        self.home = Path(tempfile.mkdtemp(prefix='check-docs-'))
        self.copy = self.home / 'copy'
        for f in repo.files:
            (self.copy / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repo.root / f, self.copy / f)
        (self.home / 'bin').mkdir()
        for name, words in (
            ('python', ''),
            ('python3', ''),
            ('torchrun', '-m torch.distributed.run'),
            ('pip', '-m pip'),
        ):
            text = f"""#!{bash}
for word in "$@"; do case "$word" in train.py|*/train.py) set -- "$@" $CHECKED_WITH;; esac; done
exec {shlex.quote(sys.executable)} {words} "$@"
"""
            (self.home / 'bin' / name).write_text(text, encoding='utf-8')
            (self.home / 'bin' / name).chmod(0o755)
        nowhere = 'http://127.0.0.1:9'  # no network: what would download fails at once
        self.env = os.environ | {
            'PATH': os.pathsep.join([str(self.home / 'bin'), os.path.dirname(sys.executable), os.environ['PATH']]),
            **{f'{kind}_proxy': nowhere for kind in ('http', 'https', 'HTTP', 'HTTPS')},
            **{name: '127.0.0.1,localhost' for name in ('no_proxy', 'NO_PROXY')},
            **{name: '1' for name in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE', 'PIP_NO_INDEX', 'PIP_DISABLE_PIP_VERSION_CHECK')},
            **{'CUDA_VISIBLE_DEVICES': '', 'LYREGPT_HISTORY': '', 'WANDB_MODE': 'offline', 'PYTHONIOENCODING': 'utf-8', 'MPLBACKEND': 'agg'},
        }  # fmt: skip

    def start(self, words: list[str], **more) -> subprocess.Popen:
        """A process in a group of its own, so that it can be ended with all its children."""
        process = subprocess.Popen(words, cwd=self.copy, start_new_session=True, **more)
        self.started.append(process)
        return process

    def wait(self, process: subprocess.Popen, ready: Callable[[], bool]) -> bool:
        """Until `ready()` (True), or the process has ended or the time is up (False)."""
        end = time.monotonic() + self.timeout
        while not (done := ready()) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return done or ready()

    def run(self, block: Block, page: str) -> str:
        """Run the block; '' if it did what it should, else what went wrong."""
        self.count += 1
        log, expected = self.home / f'{self.count}.log', block.marks.get('fails', '0')
        if before := block.marks.get('prepared by'):
            result = self.shell(before, log, {})
            if result != '0':
                return f'what prepares it ended with {result}{last_lines(log)}'
        if port := int(block.marks.get('server', 0)):
            end = time.monotonic() + 60  # another check on this machine may have a server there
            while answers(port) and time.monotonic() < end:
                time.sleep(0.5)
            if answers(port):
                return f'port {port} is taken on this machine: end what listens there'
        env = {'CHECKED_WITH': block.marks['checked with']} if 'checked with' in block.marks else {}
        result = (
            self.interpreter(block, page, log)
            if block.kind == 'python'
            else self.shell(block.text, log, env, port)
        )
        return (
            ''
            if result == expected
            else f'expected exit status {expected}, got {result}{last_lines(log)}'
        )

    def shell(self, text: str, log: Path, env: dict[str, str], port: int = 0) -> str:
        """The exit status; the folder and the variables pass on to the next block. With a port: '0' as soon as something listens there."""
        state, where = (shlex.quote(str(self.home / name)) for name in ('state', 'where'))
        keep = '' if port else f"trap 'unset CHECKED_WITH; export -p >{state}; pwd >{where}' EXIT\n"
        text = f'set -a; [ -f {state} ] && . {state}; [ -f {where} ] && cd "$(cat {where})"; set -eo pipefail\n{keep}{text}'
        with open(log, 'w') as out:
            process = self.start(
                [self.bash, '-c', text],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env | env,
            )
        in_time = self.wait(
            process, (lambda: answers(port)) if port else (lambda: process.poll() is not None)
        )
        if port and in_time:
            return '0'
        if process.poll() is None:
            self.end(process)
            return f'nothing after {self.timeout:g} seconds'
        return (
            f'{process.returncode}, before anything listened at port {port}'
            if port
            else str(process.returncode)
        )

    def interpreter(self, block: Block, page: str, log: Path) -> str:
        """'0', the status with which the block left, or the name of its exception. All Python blocks of a page share one interpreter."""
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
        assert self.python.stdin
        print(page, block.line, source, log, done, sep='\t', file=self.python.stdin, flush=True)
        if self.wait(self.python, done.exists):
            return done.read_text(encoding='utf-8')
        return (
            f'nothing after {self.timeout:g} seconds'
            if self.python.poll() is None
            else f'the end of Python, status {self.python.returncode}'
        )

    def end(self, process: subprocess.Popen) -> None:
        """Ask the process and its children to end; after a while, make them."""
        for number in (signal.SIGTERM, getattr(signal, 'SIGKILL', signal.SIGTERM)):
            try:
                os.killpg(process.pid, number) if hasattr(os, 'killpg') else process.terminate()
                process.wait(timeout=20)  # torchrun ends its own children
            except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                pass

    def close(self) -> None:
        for process in reversed(self.started):
            self.end(process)
        shutil.rmtree(self.home, ignore_errors=True)


def answers(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(('127.0.0.1', port)) == 0


def last_lines(log: Path, n: int = 10) -> str:
    text = log.read_text(encoding='utf-8', errors='replace') if log.exists() else ''
    return ''.join(f'\n    | {line}' for line in text.splitlines()[-n:])


def why_not(block: Block, quick: bool) -> str | None:
    """Why the block is not run, or None if it is; '' for what is no command."""
    missing = [
        n
        for n in block.marks.get('needs', '').split()
        if not (os.environ.get(n) or shutil.which(n) or importlib.util.find_spec(n))
    ]
    if block.kind not in ('bash', 'python') or 'from' in block.marks:
        return ''
    return block.marks.get('not run') or (
        'slow'
        if quick and 'slow' in block.marks
        else f'{missing[0]} is not here'
        if missing
        else None
    )


def run_blocks(
    page: Page, repo: Repository, config: CheckConfig, skipped: collections.Counter
) -> Iterator[tuple[int, str]]:
    """Run the page's blocks, up to the first that fails."""
    reasons = [why_not(block, config.quick) for block in page.blocks]
    skipped.update(reason for reason in reasons if reason)
    todo = [block for block, reason in zip(page.blocks, reasons) if reason is None]
    if not todo:
        return
    reader = Reader(repo, config.timeout)
    try:
        for n, block in enumerate(todo, 1):
            skipped[''] += 1
            began = time.monotonic()
            wrong = reader.run(block, page.path)
            print(
                f'{page.path}:{block.line}: {"failed" if wrong else "ran"}, {time.monotonic() - began:.1f} s',
                file=sys.stderr,
                flush=True,
            )
            if wrong:
                yield (
                    block.line,
                    wrong
                    + (
                        f'\n    {len(todo) - n} blocks behind it were not tried'
                        if n < len(todo)
                        else ''
                    ),
                )
                break
    finally:
        reader.close()


def check(root: Path, config: CheckConfig) -> tuple[list[str], str]:
    """The faults, and a summary of what was done. Raises UserError for a page that is not there."""
    repo = Repository(root)
    pages = {path: read_page(root, path) for path in repo.pages}
    if missing := [p for p in config.pages or [] if p not in pages]:
        raise UserError(
            f'pages={missing[0]}: no such page; expected paths from the root, as in docs/guides/use-it.md'
        )
    chosen = [page for path, page in pages.items() if not config.pages or path in config.pages]
    repo.made = made_by(pages)
    faults: list[tuple[str, int, str]] = []
    done: collections.Counter = (
        collections.Counter()
    )  # blocks by why they were not run; '' those that were
    fixed = 0
    for page in chosen:
        moved: list[tuple[int, str, str]] = []
        found = sorted(check_page(page, repo, pages, moved))
        if config.fix and moved:
            lines = (root / page.path).read_text(encoding='utf-8').split('\n')
            for at, old, new in moved:
                at = next(
                    (n for n in range(at - 1, len(lines)) if old in lines[n]), at - 1
                )  # inline code with a line break counts as one line
                lines[at] = lines[at].replace(old, new)
            (root / page.path).write_text('\n'.join(lines), encoding='utf-8')
            found, fixed = (
                [(n, fault) for n, fault in found if '(--fix ' not in fault],
                fixed + len(moved),
            )
        faults += [(page.path, *fault) for fault in found]
    if not config.pages:
        faults += [
            (path, 1, 'no link leads here from README.md or docs/README.md')
            for path in sorted(unreachable(pages, repo))
        ]
    for page in () if config.fix else chosen:
        faults += [(page.path, *fault) for fault in run_blocks(page, repo, config, done)]
    ran = done.pop('', 0)
    why = ''.join(f'\n  {n} not run: {reason}' for reason, n in done.most_common())
    links = sum(len(page.links) for page in chosen)
    summary = f'{len(chosen)} pages, {links} links, {fixed} line numbers mended, {ran} blocks run, {len(faults)} faults{why}'
    return [f'{path}:{line}: {fault}' for path, line, fault in faults], summary


def main() -> None:
    config = configure(CheckConfig, description=(__doc__ or '').split('\n')[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    faults, summary = check(ROOT, config)
    for fault in faults:
        print(fault)
    print(summary)
    sys.exit(1 if faults else 0)


if __name__ == '__main__':
    run(main)
