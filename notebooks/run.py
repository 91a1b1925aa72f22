"""Run notebooks from the first cell to the last and keep their outputs, without dates or names.

    python notebooks/run.py                                  (all of them, in full)
    python notebooks/run.py notebooks/transformer_sizing.ipynb

LYREGPT_SMALL=1 makes each take seconds, to see whether it runs; do not commit the result.
"""

import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lyregpt.text import atomic_write  # noqa: E402


def execute(path: Path) -> nbformat.NotebookNode:
    """Run the notebook in a kernel of this Python, without saving. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name='python3',
        resources={'metadata': {'path': str(HERE)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=['--log-level=ERROR'],
    )
    client.execute()
    notebook.metadata = {  # only what is the same on every machine
        'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
        'language_info': {'name': 'python'},
    }
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(map(str, HERE.glob('*.ipynb')))):
        text = io.StringIO()
        nbformat.write(execute(path), text)
        atomic_write(str(path), text.getvalue().encode())
        print(f'{os.path.relpath(path)}: {path.stat().st_size:,} bytes', flush=True)


if __name__ == '__main__':
    main()
