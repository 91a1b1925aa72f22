"""Write at a prompt with a trained model: type a start, read on, change a knob, write again. `sample.py --interactive` begins it.

stdout gets the texts and stderr everything else, so that a pipe or a file holds texts alone. On a terminal there are line
editing, completion (Tab) and a history that outlives the program, in ~/.lyregpt_history or the file that LYREGPT_HISTORY
names (none if that is empty); anywhere else there are plain lines.
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
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.utils import is_dumb_terminal

from configurator import UserError, check_name, convert, help_text
from lyregpt.generate import LoadedModel, encode_prompt, generate, prompt_text
from lyregpt.originality import Index, index_of
from lyregpt.text import atomic_write

# what a running program no longer asks for: the model, the machine, and what the prompt itself replaces
FIXED = {
    'out_dir',
    'init_from',
    'device',
    'dtype',
    'threads',
    'quantize',
    'compile',
    'json',
    'interactive',
    'num_samples',
    'start',
    'dataset',
}
HARMLESS = {
    'artist',
    'album',
    'title',
    'seed',
    'max_new_tokens',
}  # what they change is not how the present text goes on


@dataclass
class Text:
    """A text and how it came to be."""

    config: Any  # every knob, as it began
    prompt: str
    ids: list[
        int
    ]  # of prompt and text: what text cannot tell, half a character or a document end, is in them
    decode: Callable[[int | None], str]
    seeds: list[int]  # one, and one more for each time that it went on under other knobs
    written: str = ''
    tokens: int = 0
    ended: bool = False  # by the model, not by max_new_tokens or Ctrl-C

    @property
    def whole(self) -> str:
        """The prompt and what was written."""
        return self.prompt + self.written


class Session:
    """What is typed, one line after another."""

    def __init__(self, config: Any, loaded: LoadedModel):
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.config = replace(config, num_samples=1)
        self.kinds = {
            name: kind
            for name, kind in typing.get_type_hints(type(config)).items()
            if name not in FIXED
        }
        self.comments = dict(
            re.findall(r'^  --(\w+)=.*?  +(.*)$', help_text(type(config)), re.MULTILINE)
        )
        self.texts: list[Text] = []
        self.text: Text | None = None  # the one that /more, /again and /save are about
        self.tokens: Iterator[int] | None = (
            None  # the rest of it, still to be written; None: to be begun anew from what it says
        )
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty() and not is_dumb_terminal()
        self.editor = (
            line_editor({c: what for c, (_, what) in COMMANDS.items()} | self.comments, self.kinds)
            if self.terminal
            else None
        )

    def run(self) -> None:
        """Ask for lines until there are no more."""
        self.say(
            'Type the start of a text, or nothing, then Enter. Ctrl-C stops a text, Ctrl-D ends, /help tells more.',
            'dim',
        )
        first = [self.config.start] if self.config.start else []
        while True:
            try:
                self.write(first.pop()) if first else self.obey(self.ask())
            except EOFError:
                return
            except KeyboardInterrupt:
                if not sys.stdin.isatty():  # nobody is there to type on
                    raise
                self.say('Ctrl-D or /quit ends', 'dim')
            except ValueError as error:  # a UserError, too: said, and on it goes
                self.say(str(error))

    @functools.cached_property
    def index(self) -> Index:
        """The index of the training split. Raises UserError."""
        return index_of(self.loaded.about.get('config', {}), self.config.dataset)

    def ask(self) -> str:
        """The next line; of several lines, if a backslash stands at the end. Raises EOFError where there is none."""
        if self.editor:
            return self.editor.prompt()
        print('> ' if sys.stdin.isatty() else '', end='', file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            raise EOFError
        line = line.removesuffix('\n')
        if not line.endswith('\\'):
            return line
        try:
            return line[:-1] + '\n' + self.ask()
        except EOFError:
            return line[:-1]

    def say(self, text: str, style: str = '') -> None:
        """Tell something that is not a text, broken between words where the terminal is narrow."""
        if not self.terminal:
            return print(text, file=sys.stderr, flush=True)
        print_formatted_text(
            FormattedText([(style, textwrap.fill(text, self.width(), break_on_hyphens=False))]),
            file=sys.stderr,
        )

    def width(self) -> int:
        """Columns of the terminal; as good as without end where there is none."""
        return shutil.get_terminal_size().columns if self.terminal else sys.maxsize

    def obey(self, line: str) -> None:
        """Do what a line says: a command, or write the text that begins with it. Raises ValueError, and EOFError to end."""
        if line.strip() in ('quit', 'exit'):
            raise UserError('/quit ends; a text that begins so: give it one more word')
        if not line.startswith('/'):
            return self.write(line)
        name, rest = re.findall(r'^/(\w*)(.*)$', line.rstrip(), re.DOTALL)[0]
        if name not in FIXED:
            check_name(name, [*COMMANDS, *self.kinds], '/', kind='command', see='/help')
        if name not in COMMANDS:
            return self.do_set(name + rest)
        if rest and not COMMANDS[name][0]:
            raise UserError(f'/{name} stands alone, without {rest.strip()}')
        getattr(self, f'do_{name}')(rest.strip())

    def write(self, start: str) -> None:
        """A new text."""
        config = replace(self.config, start=start)
        prompt = prompt_text(config)
        ids = encode_prompt(self.tokenizer, prompt)
        self.tokens = self.stream(config, prompt, ids)
        self.text = Text(config, prompt, ids, self.tokenizer.stream_decoder(), [config.seed])
        if self.texts and not self.terminal:
            print('-' * 40)
        self.texts.append(self.text)
        print(prompt, end='', flush=True)
        self.go_on(self.text)

    def stream(self, config: Any, prompt: str, ids: list[int]) -> Iterator[int]:
        """The ids that continue the prompt, until the model ends the document. Uses the seed up."""
        # Without a limit, max_new_tokens is a pause: a continued text equals a longer run's.
        index = self.index if config.avoid_copying else None
        rows = generate(
            self.loaded, replace(config, max_new_tokens=sys.maxsize), prompt, ids, index
        )
        self.config = replace(self.config, seed=config.seed + 1)
        tokens: Iterator[int] = (int(row[0]) for row in rows)
        if config.stop_at_end:
            tokens = itertools.takewhile(lambda token: token != self.tokenizer.eot, tokens)
        return tokens

    def go_on(self, text: Text) -> None:
        """Write the present text's next max_new_tokens tokens, fewer if it ends before or Ctrl-C comes."""
        stops: list[bool] = []
        # a note instead of KeyboardInterrupt: between two tokens nothing is torn, and /more goes on exactly
        before = signal.signal(signal.SIGINT, lambda *_: stops.append(True))
        began, count = time.perf_counter(), 0
        try:
            with silent_keys() if self.terminal else contextlib.nullcontext():
                for token in itertools.islice(
                    typing.cast(Iterator[int], self.tokens), self.config.max_new_tokens
                ):
                    piece = text.decode(token)
                    text.ids.append(token)
                    print(piece, end='', flush=True)
                    text.written, text.tokens, count = (
                        text.written + piece,
                        text.tokens + 1,
                        count + 1,
                    )
                    if stops:
                        break
        finally:
            signal.signal(signal.SIGINT, before)
        rate = count / (time.perf_counter() - began)
        text.ended = not stops and count < self.config.max_new_tokens
        if (
            text.ended
        ):  # within a character, perhaps; one that pauses there gets the rest of it by /more
            print(piece := text.decode(None), end='', flush=True)
            text.written += piece
        how = 'the song ended' if text.ended else 'stopped' if stops else 'paused, /more goes on'
        print(
            '' if text.whole.endswith('\n') else '\n', end='\n' if self.terminal else '', flush=True
        )
        self.say(
            f'{how}; {text.tokens:,} tokens, {rate:,.0f} tokens/s, seed {" + ".join(map(str, text.seeds))}',
            'dim',
        )
        if self.config.originality:
            self.say(str(self.index.compare(text.whole, since=len(text.prompt))), 'dim')

    def present(self) -> Text:
        """The text that commands are about. Raises UserError if there is none."""
        if self.text is None:
            raise UserError('there is no text yet: type the start of one')
        return self.text

    # -------------------------------------------------------------------------
    # The commands, each given what stands behind its name. Their docstrings are what /help says: short enough for 40 columns.

    def do_again(self, _: str) -> None:
        """same start, next seed"""
        self.write(self.present().config.start)

    def do_more(self, _: str) -> None:
        """go on where it stopped"""
        text = self.present()
        if text.ended and self.config.stop_at_end:
            raise UserError(
                'the song has ended: /again writes another (or /set stop_at_end=False, then /more)'
            )
        if self.tokens is None:  # written under other knobs: these read what it says so far
            seed = self.config.seed
            self.tokens = self.stream(self.config, text.whole, list(text.ids))
            text.seeds.append(seed)
        print(text.whole.rpartition('\n')[2], end='', flush=True)  # the line in which it goes on
        self.go_on(text)

    def do_texts(self, number: str) -> None:
        """[N] all so far; back to the Nth"""
        self.present()
        if not number:
            for n, text in enumerate(self.texts, 1):
                words = re.sub(
                    r'^(Artist|Album|Year): .*\n|\[.*\]\n|^Title: ',
                    '',
                    text.whole,
                    flags=re.MULTILINE,
                )
                line = f'{"*" if text is self.text else " "} {n:2}  {re.sub(chr(10) + "+", " / ", words)}'
                self.say(cut(line, self.width()))
            return
        if not number.isdecimal() or not 1 <= int(number) <= len(self.texts):
            raise UserError(
                f'/texts {number}: expected a number from 1 to {len(self.texts)}; /texts lists them'
            )
        if self.text is not self.texts[int(number) - 1]:
            self.text, self.tokens = self.texts[int(number) - 1], None
            self.config = replace(self.text.config, seed=self.config.seed)
        print(self.text.whole.rstrip('\n'), flush=True)
        self.say(
            f'text {number} of {len(self.texts)}, and its knobs, for /more, /again and /save', 'dim'
        )

    def do_save(self, path: str) -> None:
        """[FILE] keep it: song-1.txt, …"""
        text = self.present()
        free = next(name for n in itertools.count(1) if not os.path.exists(name := f'song-{n}.txt'))
        path = os.path.expanduser(path) or free
        if os.path.exists(path):
            raise UserError(
                f'{path} exists and stays as it is: name another, or /save alone for {free}'
            )
        try:
            atomic_write(path, (text.whole.rstrip('\n') + '\n').encode('utf-8', 'replace'))
        except OSError as error:
            raise UserError(f'{path}: cannot be written: {error.strerror}') from None
        self.say(f'saved as {path}', 'dim')

    def do_knobs(self, _: str) -> None:
        """how it writes now"""
        for field in dataclasses.fields(self.config):
            if field.name in self.kinds:
                value = getattr(self.config, field.name)
                star, usual = (
                    ('*', f' (default {field.default!r})') if value != field.default else (' ', '')
                )
                line = f'{star} {field.name:<18} {value!r}{usual}'
                self.say(
                    cut(f'{line:<41}  {self.comments[field.name]}', self.width())
                    if self.width() >= 80
                    else line
                )

    def do_set(self, words: str) -> None:
        """KNOB=… change one; also /KNOB …"""
        name, equals, value = re.findall(r'^(\w*)\s*(=?)\s*(.*)$', words, re.DOTALL)[0]
        if name in FIXED:
            raise UserError(f'{name} is for the command line, as in --{name}=…')
        check_name(name, self.kinds, see='/knobs')
        before = getattr(self.config, name)
        if not equals and not value:
            return self.say(f'{name}={before!r}: {self.comments[name]}')
        if value[:1] in ('"', "'") and value[1:].endswith(
            value[0]
        ):  # as one would write it in a shell
            value = value[1:-1]
        self.config = replace(self.config, **{name: convert(name, self.kinds[name], value)})
        self.tokens = (
            self.tokens if name in HARMLESS or getattr(self.config, name) == before else None
        )
        self.say(f'{name}={getattr(self.config, name)!r} (was {before!r})', 'dim')

    def do_help(self, _: str) -> None:
        """this list"""
        for name, (more, what) in COMMANDS.items():
            self.say(f'/{name} {more}'.ljust(13) + what)
        self.say(
            'A backslash at the end, or Alt+Enter: another line. FILE:prompt.txt begins with what is in that file. Tab completes.',
            'dim',
        )

    def do_quit(self, _: str) -> None:
        """the end, as Ctrl-D"""
        raise EOFError


COMMANDS = {  # name: what may follow it, what it does
    name[3:]: re.findall(r'^(\[.*\]|\S+=…|) ?(.*)$', method.__doc__ or '')[0]
    for name, method in vars(Session).items()
    if name.startswith('do_')
}


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """What is typed meanwhile does not show: it would stand in the midst of the text. It waits for the next prompt."""
    try:
        import termios
    except ImportError:  # Windows shows nothing anyway
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def cut(line: str, width: int) -> str:
    """The line, or as much of it as fits."""
    return line if len(line) <= width else line[: width - 1] + '…'


def line_editor(names: dict[str, str], knobs: Container[str]) -> PromptSession:
    """What reads a line on a terminal: history, completion of `names` (with what each means), several lines."""

    class Names(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
            if found := re.fullmatch(r'/(set +)?(\w*)', document.text_before_cursor):
                for name, meaning in names.items():
                    if name.startswith(found[2]) and (not found[1] or name in knobs):
                        yield Completion(
                            name + '=' * bool(found[1]),
                            -len(found[2]),
                            display=name,
                            display_meta=meaning,
                        )

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is no reason to stop
                super().store_string(string)

    keys = KeyBindings()

    @keys.add('enter', filter=has_focus(DEFAULT_BUFFER))
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith('\\'):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add('escape', 'enter', filter=has_focus(DEFAULT_BUFFER))
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    history: InMemoryHistory | History = InMemoryHistory()
    path = os.path.expanduser(
        os.environ.get('LYREGPT_HISTORY', os.path.join('~', '.lyregpt_history'))
    )
    with contextlib.suppress(OSError):
        if path:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what one types is one's own
            history = History(path)
    return PromptSession(
        [('bold', '> ')],
        history=history,
        completer=Names(),
        key_bindings=keys,
        multiline=True,
        prompt_continuation='  ',
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith('/')),
    )
