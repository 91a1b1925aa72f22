"""Training state on disk: written whole or not at all, read without running code, exact to resume.

`ckpt.pt` is the latest complete state, `best.pt` the weights with the lowest validation loss. Both are `torch.save` files of
plain values and tensors with nanoGPT's keys (`model`, `optimizer`, `model_args`, `iter_num`, `best_val_loss`, `config`) and ours
(`tokenizer`, `meta`, and what the loop needs to go on). nanoGPT's own checkpoints load too.
"""

import os
import pickle
import zipfile
from typing import Any

import torch

from configurator import UserError
from dataset import read_meta
from model import GPT, GPTConfig
from tokenizer import Tokenizer, from_state


def save(path: str, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that a reader, or a crash at any instant, finds the old file or the new one, never a torn one.

    Raises OSError (a full disk, say) with the old file untouched and nothing left behind.
    """
    part = path + '.tmp'
    try:
        with open(part, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        if os.name == 'posix':  # the rename itself must reach the disk
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except Exception as error:
        if os.path.exists(part):
            os.remove(part)
        reason: BaseException | None = error
        while reason and not isinstance(reason, OSError):  # torch's zip writer hides the system's reason behind its own
            reason = reason.__cause__ or reason.__context__
        if reason or isinstance(error, RuntimeError):
            raise reason or OSError(f'writing stopped half-way ({str(error).splitlines()[0][:100]})') from error
        raise


def load(path: str) -> dict[str, Any]:
    """The state in `path`, on the CPU, the weights' names clean of `_orig_mod.` and `module.`.

    Nothing in the file is run. Raises UserError if it is missing, damaged, asks for code, or is no GPT's.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such checkpoint; train one first: python train.py config/train_darklyrics.py')
    try:
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):  # every record carries a checksum
            raise ValueError(f'the checksum of {bad} is wrong')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if 'GLOBAL' in line), 'not a checkpoint').strip()
        raise UserError(f'{path}: refused, because it holds more than weights and plain values, or is damaged ({reason[:120]})') from None
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise UserError(
            f'{path}: damaged or not a checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ""})'
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get('model'), dict) or not isinstance(state.get('model_args'), dict):
        raise UserError(f'{path}: not a GPT checkpoint (no model and model_args in it)')
    state['model'] = {
        name.removeprefix('module.').removeprefix('_orig_mod.'): w for name, w in state['model'].items() if not name.endswith('.attn.bias')
    }
    return state


def build_model(state: dict[str, Any], path: str, **overrides: Any) -> GPT:
    """The model of a loaded checkpoint with its weights in. `overrides` (dropout) change the config. Raises UserError if they do not fit."""
    try:
        model = GPT(GPTConfig(**state['model_args'] | overrides))
        own, found = model.state_dict(), state['model']
        for name in sorted(set(own) ^ set(found)):
            raise ValueError(f'{name} is in the {"file" if name in found else "model"} only')
        for name, weight in found.items():
            if own[name].shape != weight.shape:
                raise ValueError(f'{name} is {tuple(weight.shape)} in the file, {tuple(own[name].shape)} in the model')
        model.load_state_dict(found)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f'{path}: its weights do not fit its model_args: {error}') from None
    return model


def find(out_dir: str, best: bool = True) -> str:
    """The checkpoint to use in a folder: best.pt if asked for and there, else ckpt.pt; a path to a file stands for itself."""
    if os.path.isfile(out_dir):
        return out_dir
    if not os.path.isdir(out_dir):
        raise UserError(f'{out_dir}: no such folder or file; train a model first: python train.py config/train_darklyrics.py')
    path = os.path.join(out_dir, 'best.pt')
    return path if best and os.path.exists(path) else os.path.join(out_dir, 'ckpt.pt')


def tokenizer_of(state: dict[str, Any], data_dir: str = 'data') -> Tokenizer:
    """The tokenizer in the checkpoint; for nanoGPT's, which hold none, that of its dataset's folder, else GPT-2's."""
    if state.get('tokenizer'):
        return from_state(state['tokenizer'])
    folder = os.path.join(data_dir, str(state.get('config', {}).get('dataset', '')))
    vocab_size = state['model_args']['vocab_size']
    found = read_meta(folder).get('tokenizer') or {'kind': 'gpt2'}
    tokenizer = from_state(found)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f'the checkpoint holds no tokenizer, and the one of {folder} ({tokenizer.vocab_size} tokens) is not its own ({vocab_size}): '
            "put its dataset's meta.pkl or meta.json there"
        )
    return tokenizer
