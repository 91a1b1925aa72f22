"""lyreGPT as a library: `lyregpt.train` and `lyregpt.load`, and the modules that the scripts share.

`import lyregpt` imports nothing heavy: lyregpt/api.py, and PyTorch with it, is loaded on first use.
"""

import importlib
import importlib.util
import os
from typing import Any

__version__ = '0.2.0'

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def shadowing_file() -> str:
    """The path of a file that Python would import instead of one of our scripts; '' without one.

    Python looks in the current directory first, so a `model.py` or `train.py` there hides ours.
    """
    for name in ('configurator', 'model', 'train', 'sample', 'bench'):
        spec = importlib.util.find_spec(name)
        ours = os.path.join(ROOT, f'{name}.py')
        if spec and spec.origin and os.path.realpath(spec.origin) != os.path.realpath(ours):
            return spec.origin
    return ''


def __getattr__(name: str) -> Any:
    """A module of this package, or a name of lyregpt/api.py, such as `train` and `load`."""
    if name.startswith('__'):
        raise AttributeError(name)
    # `from lyregpt import threads` asks here first, and must not load all of api.py.
    if importlib.util.find_spec(f'lyregpt.{name}'):
        return importlib.import_module(f'lyregpt.{name}')
    path = shadowing_file()
    if path:
        raise ImportError(f'{path} hides the file of the same name in {ROOT}: rename it')
    return getattr(importlib.import_module('lyregpt.api'), name)
