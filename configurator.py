"""Options: defaults, then config files and the command line, in the order given; the last wins.

    python train.py config/train_darklyrics.py --batch_size=32 --compile=False

A script's options are the fields of a dataclass, which give the types. The comment behind a field
is its help; comment lines right below continue it. A comment line after a blank line, or before the
first field, is a heading. A config file is Python (assignments; it is executed, so trust it), or
JSON or YAML (one flat mapping), in the current directory or else beside this file.
"""

import ast
import dataclasses
import difflib
import dis
import glob
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from types import FunctionType, ModuleType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar('T')

ROOT = os.path.dirname(os.path.abspath(__file__))
DATA_FORMATS = ('.json', '.yaml', '.yml')
# What the words for None, True and False stand for, by type.
WORDS: dict[Any, dict[str, Any]] = {
    NoneType: {'none': None, 'null': None},
    bool: dict.fromkeys(('true', '1', 'yes', 'on'), True)
    | dict.fromkeys(('false', '0', 'no', 'off'), False),
}
TYPE_NAMES = {
    int: 'a whole number',
    float: 'a number',
    bool: 'True or False',
    str: 'text',
    NoneType: 'None',
}


class UserError(ValueError):
    """An error in the user's input, in one line: what is wrong, what was expected, what to do."""


def run(main: Callable[[], Any]) -> None:
    """Call `main()` as a script.

    A UserError becomes one line on stderr and exit status 2; so does an OSError, such as a full
    disk. Ctrl-C exits with status 130.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # The default encoding on Windows lacks most of the characters a model may generate.
            stream.reconfigure(encoding='utf-8', errors='replace')
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f'{error.filename or "input or output"}: {error.strerror or error}'
        print(f'{os.path.basename(sys.argv[0])}: error: {message}', file=sys.stderr)
        sys.exit(2)


def configure(options: type[T], argv: Sequence[str] | None = None, description: str = '') -> T:
    """Build the dataclass `options` from its defaults and `argv` (default: `sys.argv[1:]`).

    Understands `FILE.py|.json|.yaml`, `--key=value`, `--key value`, `--key a b` (a list: every
    word up to the next option), `--flag` (a bool), and `--help`, which prints the options and
    exits. `given(config)` has the names that were set. Raises UserError for an unknown option, a
    value of the wrong type, and whatever ValueError the dataclass's `__post_init__` raises.
    """
    kinds = get_type_hints(options)
    values: dict[str, Any] = {}
    words = list(sys.argv[1:] if argv is None else argv)
    while words:
        word = words.pop(0)
        if word in ('--help', '-h'):
            print(help_text(options, description))
            sys.exit(0)
        elif word.startswith('--'):
            name, equals, text = word[2:].partition('=')
            name = check_name(name.replace('-', '_'), kinds, '--')
            if not equals:
                text = _pop_value(name, kinds[name], words)
            values[name] = convert(f'--{name}', kinds[name], text)
        else:
            values |= read_config_file(word, options, values)
    return build(options, values)


# Remove the value of an option from the words that follow its name. A bool needs none.
def _pop_value(name: str, kind: Any, words: list[str]) -> str:
    members = _members(kind)
    if bool in members and (not words or words[0].lower() not in (*WORDS[bool], 'none', 'auto')):
        return 'True'
    if not words or words[0].startswith('--'):
        raise UserError(f'--{name} needs a value, as in --{name}=VALUE')
    text = words.pop(0)
    is_list = any(get_origin(member) is list for member in members)
    while is_list and words and not words[0].startswith('--'):
        text += ',' + words.pop(0)
    return text


def build(options: type[T], values: dict[str, Any], known: Iterable[str] = ()) -> T:
    """Build the dataclass `options` with values set in Python; a path may be a `Path`.

    `known` are the names that may be set (default: all). Raises UserError as `configure` does.
    """
    checked = _check(options, values, known, see=f'python {options.__module__}.py --help')
    try:
        config = options(**checked)
    except ValueError as error:
        raise UserError(str(error)) from None
    object.__setattr__(config, 'given', frozenset(checked))
    return config


def given(config: Any) -> frozenset[str]:
    """The names of the options that were set, or else those that differ from their defaults."""
    changed = (f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default)
    return getattr(config, 'given', frozenset(changed))


def read_config_file(path: str, options: type, so_far: dict[str, Any]) -> dict[str, Any]:
    """The options that the file sets, each checked against its type.

    A Python file sees the values so far as globals. Raises UserError, with the file and the
    option, for anything else.
    """
    file = find_file(path)
    try:
        with open(file, encoding='utf-8') as f:
            text = f.read()
        if path.endswith(DATA_FORMATS):
            found = parse(path, text)
        else:
            code = compile(text, file, 'exec')
            defaults = {f.name: f.default for f in dataclasses.fields(options)}
            scope = defaults | so_far | {'__file__': file, '__name__': 'config'}
            exec(code, scope)
            # What the file assigned, but for its imports, functions, classes and _names.
            stores = ('STORE_NAME', 'STORE_GLOBAL')
            assigned = [i.argval for i in dis.get_instructions(code) if i.opname in stores]
            found = {
                name: value
                for name, value in scope.items()
                if name in assigned
                and not name.startswith('_')
                and (name in defaults or not isinstance(value, (ModuleType, FunctionType, type)))
            }
    except Exception as error:  # whatever the user's own file raises
        raise UserError(f'{path}: {type(error).__name__}: {error}'.split('\n')[0]) from None
    return _check(options, found, where=f'{path}: ')


def find_file(path: str) -> str:
    """The config file `path`, in the current directory or else in the repository.

    Raises UserError, with the nearest name, if it is in neither.
    """
    for place in (path, os.path.join(ROOT, path)):
        if os.path.isfile(place):
            return place
    near = ''
    if os.path.isdir(path):
        near = f'; did you mean --out_dir={path}?'
    elif os.path.dirname(path):  # not the scripts beside this one
        siblings = os.path.join(os.path.dirname(path), '*')
        found = glob.glob(siblings) + glob.glob(siblings, root_dir=ROOT)
        similar = difflib.get_close_matches(path, found, 1, cutoff=0.8)
        near = ''.join(f'; did you mean {name}?' for name in similar)
    raise UserError(
        f'{path}: no such config file (options begin with --, as in --batch_size=32){near}'
    )


def parse(path: str, text: str) -> dict[Any, Any]:
    """The mapping in a JSON or YAML file. Raises the errors of their parsers."""
    if path.endswith('.json'):
        found = json.loads(text)
    else:
        import yaml

        found = yaml.safe_load(text) or {}
    if not isinstance(found, dict):
        raise TypeError(f'expected a mapping of names to values, found {type(found).__name__}')
    return found


def did_you_mean(name: str, known: Iterable[str], dashes: str = '') -> str:
    """The hint to the known name that begins with `name` or is nearest to it; '' without one."""
    begun = [k for k in known if name and k.startswith(name)]
    near = begun or difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f'; did you mean {dashes}{near[0]}?' if near else ''


def check_name(
    key: str,
    known: Iterable[str],
    dashes: str = '',
    where: str = '',
    kind: str = 'option',
    see: str = '--help',
) -> str:
    """`key` itself if it is known. Raises UserError, with the nearest known name, if not."""
    if key in known:
        return key
    raise UserError(
        f'{where}unknown {kind} {dashes}{key}{did_you_mean(str(key), known, dashes)}'
        f' ({see} lists all)'
    )


# Check names and types; `where` begins the messages.
def _check(
    options: type, values: dict[str, Any], known: Iterable[str] = (), where='', see='--help'
) -> dict[str, Any]:
    kinds = get_type_hints(options)
    for name in values:
        check_name(name, known or kinds, where=where, see=see)
    return {name: convert(where + name, kinds[name], values[name]) for name in values}


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value`, text or an object from a config file, as the annotated type `kind`.

    `name` is for the message of the UserError if it does not fit.
    """
    for member in _members(kind):
        try:
            return _convert(member, value)
        except (ValueError, TypeError, KeyError, SyntaxError, OverflowError):
            continue
    raise UserError(f'{name}={value}: expected {_describe(kind)}')


# The alternatives of a union: None first, so that the text 'None' means None, and text last.
def _members(kind: Any) -> list[Any]:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return sorted(members, key=lambda member: (member is not NoneType, member is str))


# Convert to a type that is no union. Raises ValueError or another error if the value does not fit.
def _convert(kind: Any, value: Any) -> Any:
    if kind in WORDS:
        return WORDS[kind][str(value).lower()]
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[str(value)]
    if kind is str:
        return os.fspath(value)  # a string or a Path
    if get_origin(kind) is list and not isinstance(value, dict):
        if isinstance(value, str) and value.startswith(('[', '(')):
            value = ast.literal_eval(value)
        elif isinstance(value, str):
            value = [word.strip() for word in value.split(',') if word.strip()]
        return [convert('item', get_args(kind)[0], item) for item in value]
    if kind is int and str(value).isdecimal():
        return int(value)  # exact, however large
    number = float(str(value))  # str: True and False are no numbers
    if kind is int and not number.is_integer():
        raise ValueError
    return kind(number)  # 1e5 is a whole number, too


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return 'one of ' + ', '.join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f'a list, as in [a,b], of {_describe(get_args(kind)[0])}'
    if kind not in TYPE_NAMES:
        return ' or '.join(map(_describe, reversed(_members(kind))))
    return TYPE_NAMES[kind]


def help_text(options: type, description: str = '') -> str:
    """What `--help` prints: the headings, and each option, its default and its help."""
    defaults = {f.name: str(f.default).replace('\n', '\\n') for f in dataclasses.fields(options)}
    lines = [description.strip(), '']
    in_field = False
    for line in inspect.getsource(options).partition('\n    def ')[0].splitlines():
        name = line.partition(':')[0].strip()
        if name in defaults:
            lines.append(f'  --{name}={defaults[name]}'.ljust(36) + ' ')
        in_field = name in defaults or in_field and line != ''
        comment = line.partition('  # ')[2]
        if comment and in_field:
            lines[-1] += ' ' + comment
        elif comment:
            lines.append(f'{comment}:')
    return '\n'.join(lines).strip('\n')
