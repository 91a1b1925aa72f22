"""Pretrained weights: a GPT from Hugging Face's files of GPT-2 or Qwen3.

lyregpt/export.py writes such files.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from model import GPT, GPTConfig

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
WEIGHT_FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
# Our names, and those of Hugging Face's Qwen3, which splits our fused matrices. GPT-2's names are
# our own, but its matrices are transposed.
QWEN3_NAMES = {
    'wte': ('embed_tokens',),
    'ln_f': ('norm',),
    'ln_1': ('input_layernorm',),
    'attn.c_attn': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
    'attn.q_norm': ('self_attn.q_norm',),
    'attn.k_norm': ('self_attn.k_norm',),
    'attn.c_proj': ('self_attn.o_proj',),
    'ln_2': ('post_attention_layernorm',),
    'mlp.c_fc': ('mlp.gate_proj', 'mlp.up_proj'),
    'mlp.c_proj': ('mlp.down_proj',),
}
QWEN3_SHAPE = {
    'max_position_embeddings': 'block_size',
    'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head',
    'num_key_value_heads': 'n_kv_head',
    'head_dim': 'head_dim',
    'hidden_size': 'n_embd',
    'intermediate_size': 'n_ff',
}
# The values in config.json with which our blocks compute the same; the first one is the default.
EXACTLY: dict[str, dict[str, tuple[Any, ...]]] = {
    'gpt2': {
        'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
        'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'add_cross_attention': (False,),
        'quantization_config': (None,),
    },
    'qwen3': {
        'hidden_act': ('silu',),
        'rms_norm_eps': (1e-6,),
        'attention_bias': (False,),
        'use_sliding_window': (False,),
        'rope_scaling': (None,),
        'quantization_config': (None,),
    },
}


class UnsupportedError(ValueError):
    """A model that our blocks do not compute, or weights that cannot be read."""


@torch.no_grad()
def from_pretrained(source: str, dropout: float = 0.0) -> GPT:
    """Return a GPT-2 or Qwen3 in float32.

    `source` is one of GPT-2's names or a Hugging Face folder: config.json and one of WEIGHT_FILES.
    Raises ValueError if it is neither, cannot be read, or needs what our blocks do not compute.
    """
    folder = source if os.path.isdir(source) else _download_gpt2(source)
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        kind, shape = hf.get('model_type'), _shape_of(hf, path)
        where, weights = _open_weights(folder, kind)
        if shape['n_layer'] > len(weights):
            raise UnsupportedError(
                f'{path}: {shape["n_layer"]} layers, but {where} holds {len(weights)} tensors only'
            )
        with torch.device('meta'):
            model = GPT(GPTConfig(dropout=dropout, **shape))
    except UnsupportedError:
        raise
    except Exception as error:  # a foreign description can fail anywhere
        raise ValueError(
            f'{path}: not the description of a GPT-2 or Qwen3 '
            f'({type(error).__name__}: {str(error)[:100]})'
        ) from None

    # Match names and shapes before taking any memory.
    own = model.state_dict()
    if model.config.tie_weights:  # one matrix, under either name
        del own['lm_head.weight']
        head = weights.pop('lm_head.weight', None)
        if head:
            weights.setdefault(hf_names('transformer.wte.weight', kind)[0], head)
    readers: dict[str, list[Callable[[], torch.Tensor]]] = {}
    for name, p in own.items():
        names = hf_names(name, kind)
        for hf_name, rows in zip(names, hf_rows(model.config, p.size(0), names)):
            if hf_name not in weights:
                raise ValueError(f'{where}: lacks {hf_name}')
            found, read = weights.pop(hf_name)
            expected = (rows, *p.shape[1:])
            if is_transposed(name, kind):
                expected = expected[::-1]
            if found != expected:
                raise ValueError(
                    f'{where}: {hf_name} is {found}, which does not fit the model of this '
                    'config.json'
                )
            readers.setdefault(name, []).append(read)
    if weights:
        raise ValueError(f'{where}: {min(weights)} has no place in the model of this config.json')

    try:
        model.materialize(torch.device('cpu'))
    except RuntimeError as error:  # a context of 10^12, which no weight's shape contradicts
        raise ValueError(f'{path}: the model does not fit in memory ({str(error)[:100]})') from None
    state = model.state_dict()
    for name, parts in readers.items():
        value = torch.cat([read() for read in parts])
        if is_transposed(name, kind):
            value = value.t()
        state[name].copy_(value)
    return model


def is_pretrained(source: str) -> bool:
    """Is this one of GPT-2's names, or a Hugging Face folder rather than a lyreGPT checkpoint?"""
    if source in GPT2_NAMES or _weight_file(source):
        return True
    try:
        with open(os.path.join(source, 'config.json'), encoding='utf-8') as f:
            return 'model_type' in json.load(f)
    except (OSError, ValueError, TypeError):
        return False


def _shape_of(hf: dict[str, Any], path: str) -> dict[str, Any]:
    """GPTConfig's arguments from config.json.

    Raises UnsupportedError, with the key's name, for what our blocks cannot compute.
    """
    kind = hf.get('model_type')
    if kind not in EXACTLY:
        raise UnsupportedError(f'{path}: model_type is {kind!r}, expected gpt2 or qwen3')
    rope = dict(hf.get('rope_parameters') or {})  # since transformers 5; before, two keys
    theta = rope.pop('rope_theta', hf.get('rope_theta', 10000.0))
    scaling = hf.get('rope_scaling') or rope
    rope_type = scaling.get('rope_type', scaling.get('type', 'default'))
    plain = (rope_type, scaling.get('partial_rotary_factor', 1)) == ('default', 1)
    found = hf | {'rope_scaling': None if plain else scaling}
    for key, values in EXACTLY[kind].items():
        if found.get(key, values[0]) not in values:
            raise UnsupportedError(
                f'{path}: {key}={found[key]} cannot be computed here, '
                f'expected {" or ".join(map(str, values))}'
            )
    if kind == 'gpt2':
        shape = {key: hf[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        shape |= {'arch': 'gpt2', 'block_size': hf['n_positions'], 'n_ff': hf.get('n_inner')}
    else:
        full = {'head_dim': 128} | hf
        shape = {own: full[key] for key, own in QWEN3_SHAPE.items()}
        shape |= {'arch': 'modern', 'vocab_size': hf['vocab_size'], 'rope_theta': float(theta)}
    return shape | {'tie_weights': bool(hf.get('tie_word_embeddings', kind == 'gpt2'))}


def hf_names(name: str, kind: str) -> list[str]:
    """What Hugging Face's model calls our weight `name`."""
    if kind == 'gpt2' or name == 'lm_head.weight':
        return [name]
    prefix, own = 'model.', name.removeprefix('transformer.').removesuffix('.weight')
    if own.startswith('h.'):
        _, i, own = own.split('.', 2)
        prefix = f'model.layers.{i}.'
    return [f'{prefix}{part}.weight' for part in QWEN3_NAMES[own]]


def hf_rows(config: GPTConfig, rows: int, names: Sequence[str]) -> list[int]:
    """How many rows of one of our matrices belong to each of Hugging Face's `names`."""
    if len(names) == 3:  # q, k, v
        return [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    return [rows // len(names)] * len(names)


def is_transposed(name: str, kind: str) -> bool:
    """Does Hugging Face keep our matrix `name` transposed, as a Conv1D?"""
    return kind == 'gpt2' and name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))


def _weight_file(folder: str) -> str:
    """The path of a folder's weights, or of their index; '' if there are none."""
    paths = [os.path.join(folder, name) for name in WEIGHT_FILES]
    return next(filter(os.path.exists, paths), '')


def _open_weights(
    folder: str, kind: str
) -> tuple[str, dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]]:
    """(path, {name: (shape, what reads it)}) of a Hugging Face folder's weights.

    Raises UnsupportedError if they are missing or damaged.
    """
    path = _weight_file(folder)
    if not path:
        raise UnsupportedError(f'{folder}: none of {", ".join(WEIGHT_FILES)} is there')
    weights: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    try:
        files = [os.path.basename(path)]
        if path.endswith('.json'):
            with open(path, encoding='utf-8') as f:
                files = sorted(set(json.load(f)['weight_map'].values()))
        for name in files:
            part = os.path.join(folder, name)
            if name.endswith('.bin'):
                tensors = torch.load(part, map_location='cpu', weights_only=True)
                weights |= {key: (tuple(w.shape), w.clone) for key, w in tensors.items()}
            else:
                from safetensors import safe_open

                file = safe_open(part, 'pt')
                weights |= {
                    key: (tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key))
                    for key in file.keys()
                }
        # GPT-2's files of the bare model lack the prefix, and old ones hold the causal mask.
        prefix = 'transformer.' if kind == 'gpt2' else ''
        weights = {
            name if name == 'lm_head.weight' else prefix + name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if not name.endswith(('.attn.bias', '.attn.masked_bias'))
        }
    except Exception as error:  # a damaged file can fail anywhere in the readers
        raise UnsupportedError(
            f'{path}: damaged, or more than weights ({type(error).__name__}: {str(error)[:100]})'
        ) from None
    return path, weights


def _download_gpt2(name: str) -> str:
    from huggingface_hub import snapshot_download

    if name not in GPT2_NAMES:
        raise ValueError(f'{name}: neither a folder nor one of {", ".join(GPT2_NAMES)}')
    try:
        return snapshot_download(
            f'openai-community/{name}', allow_patterns=['config.json', 'model.safetensors']
        )
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(
            f'{name}: the weights could not be fetched ({type(error).__name__}); connect once, '
            'or name a local folder with config.json and model.safetensors'
        ) from None
