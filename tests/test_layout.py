"""Limits that keep the code as readable as it is: sizes, density, and the direction of imports.

A limit may be lowered, never raised. Each failure names the worst offenders.
"""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = {'train.py', 'model.py', 'sample.py', 'bench.py', 'configurator.py'}
SCRIPT_LINES = 2200
STATEMENTS = 9900  # outside tests; goal: 7,797
LOOP_LINES = 75  # train.py's training loop
FUNCTION_LINES = 120
COLUMNS = 100
LONG_LINES = 0
WALRUSES = 15
CONDITIONALS = 20  # a if c else b, per 1,000 lines
# The modules of lyregpt that use the root scripts train, sample and bench.
ON_TOP = {'lyregpt.api', 'lyregpt.__main__'}


@pytest.fixture(scope='module')
def sources():
    """{path: text} of the Python files that git knows, and of new ones."""
    words = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py']
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]
    return {path: (ROOT / path).read_text(encoding='utf-8') for path in sorted(paths)}


@pytest.fixture(scope='module')
def trees(sources):
    """{path: syntax tree} of the files outside tests."""
    return {p: ast.parse(text) for p, text in sources.items() if not p.startswith('tests/')}


def count(tree, kind):
    """How many nodes of a kind a tree has."""
    return sum(isinstance(node, kind) for node in ast.walk(tree))


def worst(found, n=5):
    """The n largest of (size, name) pairs, as text."""
    return ', '.join(f'{name}: {size}' for size, name in sorted(found, reverse=True)[:n])


def test_five_scripts_at_the_root(sources):
    scripts = {path: text for path, text in sources.items() if '/' not in path}
    assert set(scripts) == SCRIPTS
    lines = [(text.count('\n'), path) for path, text in scripts.items()]
    total = sum(n for n, _ in lines)
    assert total <= SCRIPT_LINES, f'{total:,} lines: {worst(lines)}'


def test_statements(trees):
    found = [(count(tree, ast.stmt), path) for path, tree in trees.items()]
    total = sum(n for n, _ in found)
    assert total <= STATEMENTS, f'{total:,} statements: {worst(found, 10)}'


def test_the_training_loop_is_short(trees):
    [train] = [
        node
        for node in trees['train.py'].body
        if isinstance(node, ast.FunctionDef) and node.name == 'train'
    ]
    loops = [node for node in ast.walk(train) if isinstance(node, (ast.While, ast.For))]
    lines = max(node.end_lineno - node.lineno + 1 for node in loops)
    assert lines <= LOOP_LINES, f'the training loop has {lines} lines'


def test_functions_are_short(trees):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (node.end_lineno - node.lineno + 1, f'{path} {node.name}')
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]
    long = [item for item in found if item[0] > FUNCTION_LINES]
    assert not long, f'over {FUNCTION_LINES} lines: {worst(long, 20)}'


def test_lines_are_short(sources):
    found = []
    for path, text in sources.items():
        long = [line for line in text.splitlines() if len(line) > COLUMNS]
        if long:
            found.append((len(long), path))
    total = sum(n for n, _ in found)
    assert total <= LONG_LINES, f'{total} lines over {COLUMNS} columns: {worst(found, 20)}'


def test_assignment_expressions_are_rare(trees):
    found = [(count(tree, ast.NamedExpr), path) for path, tree in trees.items()]
    total = sum(n for n, _ in found)
    assert total <= WALRUSES, f'{total} assignment expressions: {worst(found, 10)}'


def test_conditional_expressions_are_rare(sources, trees):
    found = [(count(tree, ast.IfExp), path) for path, tree in trees.items()]
    lines = sum(sources[path].count('\n') for path in trees)
    rate = 1000 * sum(n for n, _ in found) / lines
    assert rate <= CONDITIONALS, f'{rate:.1f} per 1,000 lines: {worst(found, 10)}'


def module_name(path):
    """lyregpt/serve.py is lyregpt.serve, train.py is train."""
    return '.'.join(Path(path).with_suffix('').parts).removesuffix('.__init__')


def imports(trees):
    """{module: the modules of ours that it imports anywhere} for the root and the package."""
    ours = {
        module_name(path): tree
        for path, tree in trees.items()
        if path in SCRIPTS or path.startswith('lyregpt/')
    }
    found = {}
    for name, tree in ours.items():
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                used.add(node.module)
                used |= {f'{node.module}.{alias.name}' for alias in node.names}
        found[name] = used & ours.keys() - {name, 'lyregpt'}
    return found


def test_imports_point_one_way(trees):
    uses = imports(trees)
    assert not uses['model'] and not uses['configurator'], 'these import nothing of ours'
    for name, used in uses.items():
        if name.startswith('lyregpt') and name not in ON_TOP:
            assert not used & {'train', 'sample', 'bench', *ON_TOP}, f'{name} imports {used}'
        if name in ('train', 'sample', 'bench'):
            assert not used & ON_TOP, f'{name} imports {used}'


def test_model_imports_only_torch(trees):
    import sys

    names = set()
    for node in ast.walk(trees['model.py']):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition('.')[0])
    assert names - set(sys.stdlib_module_names) == {'torch'}


def test_imports_have_no_cycles(trees):
    uses = imports(trees)
    while uses:
        leaves = {name for name, used in uses.items() if not used & uses.keys()}
        assert leaves, f'these import each other: {sorted(uses)}'
        uses = {name: used for name, used in uses.items() if name not in leaves}
