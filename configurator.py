"""Config as Python: a script's knobs are a dataclass; config files and the command line override them.

    python train.py config/train_darklyrics.py --batch_size=32 --compile=False

Defaults < config files and options, in the order in which they stand; the last one wins. A config file is Python (a few
assignments; it is run, so trust it as you would any script), or JSON or YAML (one flat mapping). Every value is checked
against the field's type; the comment behind a field is its `--help`. What a user did wrong is a `UserError`.
"""

import ast
import dataclasses
import difflib
import dis
import inspect
import json
import os
import sys
import tokenize
import types
import typing
from collections.abc import Callable, Sequence
from io import StringIO, TextIOWrapper
from typing import Any, TypeVar

T = TypeVar('T')

DATA = ('.json', '.yaml', '.yml')


class UserError(ValueError):
    """A mistake of the person at the keyboard, said in one line: what is wrong, what was expected, what to do."""


def run(main: Callable[[], Any]) -> None:
    """Call `main()` as a script: a UserError becomes one line on stderr and exit status 2, Ctrl-C exits with 130."""
    for stream in (
        sys.stdin,
        sys.stdout,
        sys.stderr,
    ):  # Windows' default encoding lacks most of what a model may write
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding='utf-8', errors='replace')
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f'{os.path.basename(sys.argv[0])}: error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (
        OSError
    ) as error:  # a full disk, a missing permission: the system's own words, without the stack
        print(
            f'{os.path.basename(sys.argv[0])}: error: {error.filename or "input or output"}: {error.strerror or error}',
            file=sys.stderr,
        )
        sys.exit(2)


def configure(knobs: type[T], argv: Sequence[str] | None = None, description: str = '') -> T:
    """Build the dataclass `knobs` from its defaults and `argv` (default: this process's arguments).

    Understands `FILE.py|.json|.yaml`, `--key=value`, `--key value`, `--key a b` (a list: all words up to the next option), `--flag` (a bool
    knob), and `--help`, which prints the knobs and exits. The names that were set stand in the result's `given`. Raises UserError for an unknown knob, a value
    of the wrong type, or whatever ValueError the dataclass's own `__post_init__` raises.
    """
    types_ = typing.get_type_hints(knobs)
    values: dict[str, Any] = {}
    words = list(sys.argv[1:] if argv is None else argv)
    while words:
        word = words.pop(0)
        if word in ('--help', '-h'):
            print(help_text(knobs, description))
            sys.exit(0)
        if not word.startswith('--'):
            values.update(read_config_file(word, knobs, values))
            continue
        key, equals, text = word[2:].partition('=')
        key = check_name(key.replace('-', '_'), types_, '--')
        if not equals:
            is_flag = bool in _members(types_[key])
            if words and (
                _fits(types_[key], words[0]) if is_flag else not words[0].startswith('--')
            ):
                text = words.pop(0)
                if any(
                    typing.get_origin(member) in (list, tuple) for member in _members(types_[key])
                ):
                    while words and not words[0].startswith('--'):
                        text += ',' + words.pop(0)
            elif is_flag:
                text = 'True'
            else:
                raise UserError(f'--{key} needs a value, as in --{key}=VALUE')
        values[key] = convert(f'--{key}', types_[key], text)
    return build(knobs, values)


def build(knobs: type[T], values: dict[str, Any], known: typing.Iterable[str] = ()) -> T:
    """The dataclass `knobs` with these values, as somebody set them in Python; paths may be `Path`s. Raises UserError as `configure` does.

    `known` are the names that may be set, if not all.
    """
    types_ = typing.get_type_hints(knobs)
    values = {
        check_name(k, known or types_, see=f'python {knobs.__module__}.py --help'): v
        for k, v in values.items()
    }
    values = {
        k: convert(k, types_[k], os.fspath(v) if isinstance(v, os.PathLike) else v)
        for k, v in values.items()
    }
    try:
        config = knobs(**values)
    except ValueError as error:
        raise UserError(str(error)) from None
    object.__setattr__(config, 'given', frozenset(values))
    return config


def given(config: Any) -> frozenset[str]:
    """The names of the knobs that somebody set: by `configure`, or, built by hand, those that differ from their defaults."""
    changed = frozenset(
        f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
    )
    return getattr(config, 'given', changed)


def read_config_file(path: str, knobs: type, so_far: dict[str, Any]) -> dict[str, Any]:
    """The knobs that the file sets, each checked against its type. A Python file sees the knobs' values so far as globals.

    Raises UserError, with the file and the knob, for anything else.
    """
    types_ = typing.get_type_hints(knobs)
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        near = difflib.get_close_matches(
            os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [], 1
        )
        hint = f'; did you mean {os.path.join(os.path.dirname(path), near[0])}?' if near else ''
        if os.path.isdir(path) and 'out_dir' in types_:
            hint = f'; did you mean --out_dir={path}?'
        raise UserError(
            f'{path}: no such config file (options begin with --, as in --batch_size=32){hint}'
        )
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
        if path.endswith(DATA):
            found = parse(path, text)
        else:
            code = compile(text, path, 'exec')
            scope = (
                {f.name: f.default for f in dataclasses.fields(knobs)}
                | so_far
                | {'__file__': path, '__name__': 'config'}
            )
            exec(code, scope)
            stored = {
                i.argval
                for i in dis.get_instructions(code)
                if i.opname in ('STORE_NAME', 'STORE_GLOBAL')
            }
            found = {
                k: v
                for k, v in scope.items()
                if k in stored
                and not k.startswith('_')
                and (k in types_ or not isinstance(v, (types.ModuleType, types.FunctionType, type)))
            }
    except Exception as error:  # whatever the person's own file raises is told as their mistake
        raise UserError(
            f'{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error}'
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f'{path}: expected one mapping of knobs to values, found {type(found).__name__}'
        )
    return {
        check_name(k, types_, '', f'{path}: '): convert(f'{path}: {k}', types_[k], v)
        for k, v in found.items()
    }


def parse(path: str, text: str) -> Any:
    """What the text of a JSON or YAML file says. Raises the errors of their readers."""
    if path.endswith('.json'):
        return json.loads(text)
    import yaml

    return yaml.safe_load(text) or {}


def check_name(
    key: str,
    known: typing.Iterable[str],
    dashes: str = '',
    where: str = '',
    kind: str = 'knob',
    see: str = '--help',
) -> str:
    """`key` itself if it is known; else UserError with the nearest known name."""
    if key in known:
        return key
    near = [k for k in known if key and k.startswith(str(key))] or difflib.get_close_matches(
        str(key), list(known), 1, cutoff=0.5
    )
    hint = f'; did you mean {dashes}{near[0]}?' if near else ''
    raise UserError(f'{where}unknown {kind} {dashes}{key}{hint} ({see} lists all)')


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value`, text from the command line or an object from a config file, as the annotated type `kind`; else UserError."""
    for member in _members(kind):
        try:
            return _convert(member, value)
        except (ValueError, TypeError, SyntaxError, OverflowError):
            continue
    raise UserError(f'{name}={value}: expected {_describe(kind)}')


def _fits(kind: Any, text: str) -> bool:
    try:
        convert('', kind, text)
        return True
    except UserError:
        return False


def _members(kind: Any) -> tuple:
    """The alternatives of a union; None first, so that the text 'None' means None even where text is allowed."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(sorted(typing.get_args(kind), key=lambda k: (k is not type(None), k is str)))
    return (kind,)


def _as_bool(text: str) -> bool | None:
    return {
        'true': True,
        '1': True,
        'yes': True,
        'on': True,
        'false': False,
        '0': False,
        'no': False,
        'off': False,
    }.get(text.lower())


def _convert(kind: Any, value: Any) -> Any:
    text = isinstance(value, str)
    if kind is type(None):
        if value is None or text and value.lower() in ('none', 'null'):
            return None
    elif kind is bool:
        value = _as_bool(value) if text else value
        if isinstance(value, bool):
            return value
    elif kind is int:
        if text:
            try:
                return int(value)
            except ValueError:
                value = float(value)  # 1e5 is a fine int
        if not isinstance(value, bool) and value == int(value):
            return int(value)
    elif kind is float:
        if not isinstance(value, bool):
            return float(value)
    elif kind is str:
        if text:
            return value
    elif typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if value == choice or text and value == str(choice):
                return choice
    elif typing.get_origin(kind) in (list, tuple):
        (item, *_) = typing.get_args(kind)
        if text:
            value = (
                ast.literal_eval(value)
                if value[:1] in '[('
                else [v.strip() for v in value.split(',') if v.strip()]
            )
        if isinstance(value, (list, tuple)):
            return [convert('item', item, v) for v in value]
    raise ValueError


def _describe(kind: Any) -> str:
    names = {
        int: 'a whole number',
        float: 'a number',
        bool: 'True or False',
        str: 'text',
        type(None): 'None',
    }
    if len(_members(kind)) > 1:
        return ' or '.join(_describe(m) for m in reversed(_members(kind)))
    if typing.get_origin(kind) is typing.Literal:
        return 'one of ' + ', '.join(str(c) for c in typing.get_args(kind))
    if typing.get_origin(kind) in (list, tuple):
        return f'a list, as in [a,b], of {_describe(typing.get_args(kind)[0])}'
    return names[kind]


def help_text(knobs: type, description: str = '') -> str:
    """What `--help` prints: each knob, its default and its comment, under the headings that stand alone as comments."""
    source = inspect.getsource(knobs)
    comments = {
        t.start[0]: t.string.lstrip('# ')
        for t in tokenize.generate_tokens(StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    lines = [description.strip(), ''] if description else []
    defaults = {f.name: f.default for f in dataclasses.fields(knobs)}
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name = typing.cast(ast.Name, node.target).id
        if (
            heading := comments.get(node.lineno - 1)
            if source.splitlines()[node.lineno - 2].lstrip().startswith('#')
            else None
        ):
            lines.append(f'{heading}:')
        comment = ' '.join(
            comments[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in comments
        )
        default = str(defaults[name]).replace('\n', '\\n')
        lines.append(f'  --{name}={default}'.ljust(36) + f'  {comment}')
    return '\n'.join(lines)
