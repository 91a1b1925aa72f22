"""Generate at a prompt: type the start of a text, read on, change an option, generate again.

    python sample.py --out_dir=out-darklyrics --interactive

Texts go to stdout and everything else to stderr, so that a pipe or a file gets texts alone. A
terminal gets line editing, completion (Tab) and a history in ~/.lyregpt_history, or in the file
that LYREGPT_HISTORY names (none if that is empty); anything else gets plain lines.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.utils import is_dumb_terminal

from configurator import UserError, check_name, convert, help_text
from lyregpt.generate import LoadedModel, encode_prompt, generate, prompt_text
from lyregpt.originality import Index, index_of
from lyregpt.text import atomic_write

# What /texts leaves out of song headers
HEADER_LINES = r'^(Artist|Album|Year): .*\n|\[.*\]\n|^Title: '
# Options that a running session cannot change: the model, the machine, and what the prompt replaces
FIXED = set(
    'out_dir init_from device dtype threads quantize compile json interactive num_samples start '
    'dataset'.split()
)
# Options that do not change how the current text continues
NEUTRAL = {'artist', 'album', 'title', 'seed', 'max_new_tokens'}


@dataclass
class Text:
    """A generated text and how it came to be."""

    config: Any  # all options when it began
    text: str  # the prompt and what was generated
    ids: list[int]  # of all that; text cannot express half a character or a document end
    prompt_length: int  # characters
    decode: Callable[[int | None], str]
    seeds: list[int]  # one, and another for each continuation under changed options
    tokens: int = 0  # generated so far
    ended: bool = False  # by the model, not by max_new_tokens or Ctrl-C

    def add(self, token: int | None) -> None:
        """Append and print a token's text, or with None what an incomplete character left."""
        piece = self.decode(token)
        self.text += piece
        print(piece, end='', flush=True)


class Session:
    """Reads lines and executes them. `config` is a SampleConfig (sample.py)."""

    def __init__(self, config: Any, loaded: LoadedModel):
        self.config = replace(config, num_samples=1)
        self.loaded = loaded
        types = typing.get_type_hints(type(config))
        self.types = {name: kind for name, kind in types.items() if name not in FIXED}
        help_lines = re.findall(r'^  --(\w+)=.*?  +(.*)$', help_text(type(config)), re.MULTILINE)
        self.help = dict(help_lines)
        self.texts: list[Text] = []
        self.text: Text | None = None  # the current one: for /more, /again and /save
        self.tokens: Iterator[int] | None = None  # the rest of it; None: read it again first
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not is_dumb_terminal()
        commands = {name: meaning for name, (_, meaning) in COMMANDS.items()}
        self.editor = None
        if self.on_terminal:
            self.editor = line_editor(commands | self.help, self.types)

    def run(self) -> None:
        """Read and execute lines until there are no more."""
        self.say(
            'Type the start of a text, or nothing, then Enter. '
            'Ctrl-C stops a text, Ctrl-D exits, /help lists the commands.'
        )
        start = self.config.start
        while True:
            try:
                if start:
                    self.begin(start)
                else:
                    self.execute(self.ask())
            except EOFError:
                return
            except KeyboardInterrupt:
                if not sys.stdin.isatty():  # nobody is there to type on
                    raise
                self.say('Ctrl-D or /quit exits')
            except ValueError as error:  # a UserError
                self.say(str(error), '')
            start = ''

    def ask(self) -> str:
        """Return the next line; one that ends in a backslash continues. Raises EOFError."""
        if self.editor:
            return self.editor.prompt().replace('\\\n', '\n')
        if sys.stdin.isatty():
            print('> ', end='', file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        while line.endswith('\\\n'):
            line = line.removesuffix('\\\n') + '\n' + sys.stdin.readline()
        return line.removesuffix('\n').removesuffix('\\')

    def say(self, message: str, style: str = 'dim') -> None:
        """Print a message, broken between words on a terminal."""
        if self.on_terminal:
            lines = textwrap.fill(message, self.width(), break_on_hyphens=False)
            print_formatted_text(FormattedText([(style, lines)]), file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def width(self) -> int:
        """Columns of the terminal; practically unlimited without one."""
        return shutil.get_terminal_size().columns if self.on_terminal else sys.maxsize

    def execute(self, line: str) -> None:
        """Run a command, or generate the text that the line starts.

        Raises ValueError for an error in the line, EOFError to exit.
        """
        if line.strip() in ('quit', 'exit'):
            raise UserError('/quit exits; to start a text with that word, add another one')
        if not line.startswith('/'):
            return self.begin(line)
        name, rest = re.findall(r'^/(\w*)(.*)$', line.rstrip(), re.DOTALL)[0]
        if name not in FIXED:
            check_name(name, [*COMMANDS, *self.types], '/', kind='command', see='/help')
        if name not in COMMANDS:
            return self.do_set(name + rest)
        if rest and not COMMANDS[name][0]:
            raise UserError(f'/{name} takes no argument: leave out {rest.strip()}')
        getattr(self, f'do_{name}')(rest.strip())

    # -------------------------------------------------------------------------
    # Generating

    @functools.cached_property
    def index(self) -> Index:
        """The index of the training split. Raises UserError."""
        return index_of(self.loaded.about.get('config', {}), self.config.dataset)

    def begin(self, start: str) -> None:
        """Generate a new text. Raises UserError."""
        config = replace(self.config, start=start)
        try:
            prompt = prompt_text(config)
        except OSError as error:
            raise UserError(f'{error.filename}: {error.strerror}') from None
        ids = encode_prompt(self.loaded.tokenizer, prompt)
        self.tokens = self.stream(prompt, ids)
        decode = self.loaded.tokenizer.stream_decoder()
        self.text = Text(config, prompt, ids, len(prompt), decode, [config.seed])
        if self.texts and not self.on_terminal:
            print('-' * 40)
        self.texts.append(self.text)
        print(prompt, end='', flush=True)
        self.resume(self.text)

    def stream(self, prompt: str, ids: list[int]) -> Iterator[int]:
        """The ids that continue the prompt until the model ends the document; advances the seed."""
        # There max_new_tokens is only a pause: a text that was resumed equals one without a pause.
        config = replace(self.config, max_new_tokens=sys.maxsize)
        index = None
        if config.avoid_copying:
            index = self.index
        steps = generate(self.loaded, config, prompt, ids, index)
        self.config = replace(self.config, seed=config.seed + 1)
        return itertools.takewhile(lambda token: token >= 0, (tokens[0] for tokens in steps))

    def resume(self, text: Text) -> None:
        """Print the current text's next max_new_tokens tokens; stops at its end or at Ctrl-C."""
        # A flag instead of KeyboardInterrupt, which would break off a token's computation
        interrupted: list[int] = []
        handler = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
        started, tokens_before, limit = time.perf_counter(), text.tokens, self.config.max_new_tokens
        try:
            with silent_keys(self.on_terminal):
                for token in itertools.islice(self.tokens or (), limit):
                    text.ids.append(token)
                    text.tokens += 1
                    text.add(token)
                    if interrupted:
                        break
        finally:
            signal.signal(signal.SIGINT, handler)
        count = text.tokens - tokens_before
        rate = count / (time.perf_counter() - started)
        text.ended = count < limit and not interrupted
        how = 'stopped' if interrupted else 'paused, /more continues'
        if text.ended:
            text.add(None)  # after a pause within a character, /more completes it
            how = 'the document ended'
        line_ends = self.on_terminal + (not text.text.endswith('\n'))
        print('\n' * line_ends, end='', flush=True)
        seeds = ' + '.join(map(str, text.seeds))
        self.say(f'{how}; {text.tokens:,} tokens, {rate:,.0f} tokens/s, seed {seeds}')
        if self.config.originality:
            self.say(str(self.index.compare(text.text, since=text.prompt_length)))

    def current(self) -> Text:
        """The text that commands are about. Raises UserError if there is none."""
        if self.text is None:
            raise UserError('there is no text yet: type the start of one')
        return self.text

    # -------------------------------------------------------------------------
    # The commands. Their docstrings are their help: the argument, if any, and the meaning,
    # short enough for 40 columns.

    def do_again(self, _: str) -> None:
        """same start, next seed"""
        self.begin(self.current().config.start)

    def do_more(self, _: str) -> None:
        """continue where it stopped"""
        text = self.current()
        if text.ended and self.config.stop_at_end:
            raise UserError(
                'the document ended: /again generates another '
                '(or /set stop_at_end=False, then /more)'
            )
        if self.tokens is None:  # the options have changed: read what is there, under these
            seed = self.config.seed
            self.tokens = self.stream(text.text, text.ids)
            text.seeds.append(seed)
        print(text.text.rpartition('\n')[2], end='', flush=True)  # the line that it continues
        self.resume(text)

    def do_texts(self, number: str) -> None:
        """[N] list all; go back to N"""
        self.current()
        if not number:
            for n, text in enumerate(self.texts, 1):
                words = re.sub(HEADER_LINES, '', text.text, flags=re.MULTILINE)
                line = re.sub(r'\n+', ' / ', words)
                mark = '*' if text is self.text else ' '
                line = f'{mark} {n:2}  {line}'
                if len(line) > self.width():
                    line = line[: self.width() - 1] + '…'
                self.say(line, '')
            return
        if not number.isdecimal() or not 1 <= int(number) <= len(self.texts):
            raise UserError(
                f'/texts {number}: expected a number from 1 to {len(self.texts)}; /texts lists them'
            )
        text = self.texts[int(number) - 1]
        if text is not self.text:
            self.text, self.tokens = text, None
            self.config = replace(text.config, seed=self.config.seed)
        print(text.text.rstrip('\n'), flush=True)
        self.say(f'text {number} of {len(self.texts)} and its options, for /more, /again and /save')

    def do_save(self, path: str) -> None:
        """[FILE] save it: song-1.txt, …"""
        text = self.current()
        names = (f'song-{n}.txt' for n in itertools.count(1))
        free = next(name for name in names if not os.path.exists(name))
        path = os.path.expanduser(path) or free
        if os.path.exists(path):
            raise UserError(f'{path} exists: name another file, or /save alone for {free}')
        try:
            atomic_write(path, (text.text.rstrip('\n') + '\n').encode('utf-8', 'replace'))
        except OSError as error:
            raise UserError(f'{path}: {error.strerror}') from None
        self.say(f'saved as {path}')

    def do_options(self, _: str) -> None:
        """show the options"""
        for field in dataclasses.fields(self.config):
            if field.name in self.types:
                value = getattr(self.config, field.name)
                note = '' if value == field.default else f' (default {field.default!r})'
                line = f'{"*" if note else " "} {field.name:<18} {value!r}{note}'
                self.say(f'{line:<41}  {self.help[field.name]}'[: self.width()], '')

    def do_set(self, words: str) -> None:
        """OPTION=… change it; /OPTION … too"""
        pattern = r'^(\w*)\s*(=?)\s*(["\']?)(.*)\3$'  # the value may be quoted, as in a shell
        name, equals, quote, value = re.findall(pattern, words, re.DOTALL)[0]
        if name in FIXED:
            raise UserError(f'{name} can only be set on the command line, as in --{name}=…')
        check_name(name, self.types, see='/options')
        before = getattr(self.config, name)
        if not (equals or quote or value):
            return self.say(f'{name}={before!r}: {self.help[name]}', '')
        self.config = replace(self.config, **{name: convert(name, self.types[name], value)})
        after = getattr(self.config, name)
        if name not in NEUTRAL and after != before:
            self.tokens = None
        self.say(f'{name}={after!r} (was {before!r})')

    def do_help(self, _: str) -> None:
        """this list"""
        for name, (argument, meaning) in COMMANDS.items():
            self.say(f'/{name} {argument}'.ljust(14) + meaning, '')
        self.say(
            'A backslash at the end, or Alt+Enter, adds another line. FILE:prompt.txt starts with '
            "that file's text. Tab completes."
        )

    def do_quit(self, _: str) -> None:
        """exit, as Ctrl-D does"""
        raise EOFError


COMMANDS = {  # name: (argument, meaning), from the docstrings
    name.removeprefix('do_'): re.findall(r'^(\[.*\]|\S+=…|) ?(.*)$', method.__doc__ or '')[0]
    for name, method in vars(Session).items()
    if name.startswith('do_')
}


@contextlib.contextmanager
def silent_keys(on_terminal: bool) -> Iterator[None]:
    """Keep keys typed meanwhile off the screen; they wait for the next prompt."""
    if not on_terminal or sys.platform == 'win32':  # Windows shows nothing anyway
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class LenientHistory(FileHistory):
    """A history file that a full disk does not turn into an error for every line."""

    def store_string(self, string: str) -> None:
        """Append a line to the file, if that is possible."""
        with contextlib.suppress(OSError):
            super().store_string(string)


def line_editor(names: dict[str, str], options: Collection[str]) -> PromptSession:
    """Return an editor for lines on a terminal, with history and completion of `names`.

    `names` has the meaning of each command and option; `options` can also follow /set.
    """
    words = {f'/{name}': meaning for name, meaning in names.items()}
    words |= {f'/set {name}=': names[name] for name in options}
    keys = KeyBindings()

    @keys.add('escape', 'enter')
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    history: History = InMemoryHistory()
    default = os.path.join('~', '.lyregpt_history')
    path = os.path.expanduser(os.environ.get('LYREGPT_HISTORY', default))
    with contextlib.suppress(OSError):
        if path:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # only for its owner
            history = LenientHistory(path)
    return PromptSession(
        [('bold', '> ')],
        history=history,
        completer=WordCompleter(list(words), meta_dict=words, sentence=True),
        key_bindings=keys,
        multiline=Condition(  # Enter adds a line, and removes the backslash
            lambda: get_app().current_buffer.document.text_before_cursor.endswith('\\')
        ),
        prompt_continuation='  ',
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith('/')),
    )
