"""The notebooks run to their end, and the committed outputs are those of a complete run."""

import getpass
import re
import sys

import nbformat
import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / 'notebooks'))
from run import execute  # noqa: E402

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
NAMES = ('inside_a_lyric_model', 'scaling_laws', 'transformer_sizing')


def test_all_are_here():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    """Each cell of a small run works, and has outputs wherever the committed one does."""
    monkeypatch.setenv('LYREGPT_SMALL', '1')
    before = {p.name for p in ROOT.iterdir()} | {'__pycache__'}, path.read_bytes()
    done = execute(path)
    kept = nbformat.read(path, as_version=4)
    assert [[o.output_type for o in c.get('outputs', [])] for c in done.cells] == [
        [o.output_type for o in c.get('outputs', [])] for c in kept.cells
    ]
    noise = [
        o.text
        for c in done.cells
        for o in c.get('outputs', [])
        if o.output_type == 'stream' and o.name == 'stderr'
    ]
    assert not noise  # no warnings, no progress bars
    assert (
        {p.name for p in ROOT.iterdir()} | {'__pycache__'},
        path.read_bytes(),
    ) == before  # it wrote into temporary folders alone


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_committed(path):
    """Run in order, with outputs, without errors, machine names or dates, and not too large."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == 'code']
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 3
    assert {o.output_type for o in outputs} <= {'stream', 'display_data'}
    assert not any(o.get('name') == 'stderr' for o in outputs)
    assert notebook.metadata.kernelspec.name == 'python3'
    assert not any('execution' in c.metadata for c in notebook.cells)
    said = ''.join(o.get('text', '') for o in outputs)
    assert not re.search(r'(?<![\w.])(/(home|root|tmp|usr|Users|private)/|[A-Z]:\\)', said)
    assert getpass.getuser() == 'root' or getpass.getuser() not in said
    assert path.stat().st_size < 600_000
