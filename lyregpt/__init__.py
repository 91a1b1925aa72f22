"""lyreGPT as a library: `lyregpt.train` and `lyregpt.load`, and the modules behind the scripts.

`import lyregpt` itself imports nothing heavy: lyregpt/api.py, and PyTorch with it, is loaded on first use.
"""

import importlib
import importlib.util
import os
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT_MODULES = ('configurator', 'model', 'train', 'sample', 'bench')


def shadowed() -> str:
    """The path of a file that Python would import instead of one of our scripts; '' if there is none.

    Python looks in the current directory first, so a `model.py` or `train.py` there hides ours.
    """
    for name in ROOT_MODULES:
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
    path = shadowed()
    if path:
        raise ImportError(f'{path} hides the file of the same name in {ROOT}: rename it')
    api = importlib.import_module('lyregpt.api')
    return getattr(api, name)
