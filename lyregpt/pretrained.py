"""Weights that others trained: a GPT from Hugging Face's files of GPT-2 or Qwen3. lyregpt/export.py is the way back."""

import functools
import json
import os
from collections.abc import Callable, Sequence
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
# Our names, and Hugging Face's in Qwen3, where our fused matrices stand apart; GPT-2's are our own, its matrices transposed
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
# What config.json must say for our blocks to compute the same: the first is what it means if it says nothing
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


@torch.no_grad()
def from_pretrained(source: str, dropout: float = 0.0) -> GPT:
    """A GPT-2 or Qwen3 from a Hugging Face folder (config.json and one of WEIGHT_FILES) or one of GPT-2's names, in fp32.

    Raises ValueError if the source is neither, cannot be had, or computes something that our blocks do not.
    """
    folder = source if os.path.isdir(source) else _download_gpt2(source)
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        kind, shape = hf.get('model_type'), _shape_of(hf)
        where, weights = _open_weights(folder, kind)
        if shape['n_layer'] > len(weights):
            raise Foreign(
                f'{shape["n_layer"]} layers, but {where} holds {len(weights)} tensors only'
            )
        with torch.device('meta'):
            model = GPT(GPTConfig(dropout=dropout, **shape))
    except (Foreign, BadWeights) as error:
        raise ValueError(
            str(error) if isinstance(error, BadWeights) else f'{path}: {error}'
        ) from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise ValueError(
            f'{path}: not the description of a GPT-2 or Qwen3 ({type(error).__name__}: {str(error)[:100]})'
        ) from None
    own = model.state_dict()
    if model.config.tie_weights:  # one matrix: either name brings it
        del own['lm_head.weight']
        if head := weights.pop('lm_head.weight', None):
            weights.setdefault(hf_names('transformer.wte.weight', kind)[0], head)
    read: dict[str, list[Callable[[], torch.Tensor]]] = {}
    for name, p in own.items():  # all are checked before memory is taken
        names = hf_names(name, kind)
        for n, rows in zip(names, hf_rows(model.config, p.size(0), names)):
            if n not in weights:
                raise ValueError(f'{where}: lacks {n}')
            (found, one), wanted = weights.pop(n), (rows, *p.shape[1:])
            if found != (wanted[::-1] if kind == 'gpt2' and is_conv1d(name) else wanted):
                raise ValueError(
                    f'{where}: {n} is {found}, which does not fit the model of this config.json'
                )
            read.setdefault(name, []).append(one)
    if weights:
        raise ValueError(f'{where}: {min(weights)} has no place in the model of this config.json')
    try:
        model.materialize(torch.device('cpu'))
    except RuntimeError as error:  # a context of 10^12, which no weight's shape tells
        raise ValueError(f'{path}: the model does not fit in memory ({str(error)[:100]})') from None
    for name, p in model.state_dict().items():
        if name in read:
            value = torch.cat([one() for one in read[name]])
            p.copy_(value.t() if kind == 'gpt2' and is_conv1d(name) else value)
    return model


def is_pretrained(source: str) -> bool:
    """Is this one of GPT-2's names, or a Hugging Face folder (not a checkpoint of ours)?"""
    if source in GPT2_NAMES or any(
        os.path.exists(os.path.join(source, name)) for name in WEIGHT_FILES
    ):
        return True
    try:
        with open(os.path.join(source, 'config.json'), encoding='utf-8') as f:
            return 'model_type' in json.load(f)
    except (OSError, ValueError, TypeError):
        return False


class Foreign(ValueError):
    """A description of something that our blocks do not compute."""


class BadWeights(ValueError):
    """A folder's weights are not there, or damaged."""


def _shape_of(hf: dict[str, Any]) -> dict[str, Any]:
    """GPTConfig's arguments from a config.json. Raises Foreign, with the key's name, for what our blocks cannot compute."""
    kind = hf.get('model_type')
    if kind not in EXACTLY:
        raise Foreign(f'model_type is {kind!r}, expected gpt2 or qwen3')
    rope = dict(
        hf.get('rope_parameters') or {}
    )  # since transformers 5; before, theta stood by itself
    theta = rope.pop('rope_theta', hf.get('rope_theta', 10000.0))
    scaling = hf.get('rope_scaling') or rope
    plain = (
        scaling.get('rope_type', scaling.get('type', 'default')) == 'default'
        and scaling.get('partial_rotary_factor', 1) == 1
    )
    found = hf | {'rope_scaling': None if plain else scaling}
    for key, values in EXACTLY[kind].items():
        if found.get(key, values[0]) not in values:
            raise Foreign(
                f'{key}={found[key]} cannot be computed here, expected {" or ".join(map(str, values))}'
            )
    if kind == 'gpt2':
        shape = {key: hf[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        shape |= {'arch': 'gpt2', 'block_size': hf['n_positions'], 'n_ff': hf.get('n_inner')}
    else:
        shape = {own: hf[key] for key, own in QWEN3_SHAPE.items() if key != 'head_dim'}
        shape |= {
            'arch': 'modern',
            'vocab_size': hf['vocab_size'],
            'head_dim': hf.get('head_dim', 128),
            'rope_theta': float(theta),
        }
    return shape | {'tie_weights': bool(hf.get('tie_word_embeddings', kind == 'gpt2'))}


def hf_names(name: str, kind: str) -> list[str]:
    """What Hugging Face's model calls our weight `name`."""
    if kind == 'gpt2' or name == 'lm_head.weight':
        return [name]
    prefix, own = 'model.', name.removeprefix('transformer.').removesuffix('.weight')
    if own.startswith('h.'):
        _, i, own = own.split('.', 2)
        prefix = f'model.layers.{i}.'
    return [f'{prefix}{theirs}.weight' for theirs in QWEN3_NAMES[own]]


def hf_rows(config: GPTConfig, rows: int, names: Sequence[str]) -> list[int]:
    """How many rows of one of our matrices belong to each of Hugging Face's `names`."""
    if len(names) == 3:  # q, k, v
        return [
            heads * (config.head_dim or 0)
            for heads in (config.n_head, config.n_kv_head or 0, config.n_kv_head or 0)
        ]
    return [rows // len(names)] * len(names)


def is_conv1d(name: str) -> bool:
    """Does Hugging Face's GPT-2 keep this matrix transposed?"""
    return name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))


def _open_weights(
    folder: str, kind: str
) -> tuple[str, dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]]:
    """(path, {name: (shape, what reads it)}) of a Hugging Face folder's weights. Raises BadWeights if they are not there or damaged."""
    path = next((p for n in WEIGHT_FILES if os.path.exists(p := os.path.join(folder, n))), '')
    if not path:
        raise BadWeights(f'{folder}: none of {", ".join(WEIGHT_FILES)} is there')
    weights: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    try:
        files = [os.path.basename(path)]
        if path.endswith('.json'):
            with open(path, encoding='utf-8') as f:
                files = sorted(set(json.load(f)['weight_map'].values()))
        for name in files:
            if name.endswith('.bin'):
                found = torch.load(
                    os.path.join(folder, name), map_location='cpu', weights_only=True
                )
                if not all(isinstance(key, str) for key in found):
                    raise TypeError('its names are no text')
                weights |= {key: (tuple(w.shape), w.clone) for key, w in found.items()}
            else:
                from safetensors import safe_open

                file = safe_open(os.path.join(folder, name), 'pt')
                weights |= {
                    key: (
                        tuple(file.get_slice(key).get_shape()),
                        functools.partial(file.get_tensor, key),
                    )
                    for key in file.keys()
                }
    except Exception as error:  # a damaged file can fail anywhere in the readers
        raise BadWeights(
            f'{path}: damaged, or more than weights ({type(error).__name__}: {str(error)[:100]})'
        ) from None
    if (
        kind == 'gpt2'
    ):  # files of the bare model lack the prefix, and old ones carry the causal mask
        weights = {
            n if n == 'lm_head.weight' else 'transformer.' + n.removeprefix('transformer.'): w
            for n, w in weights.items()
        }
        weights = {
            n: w for n, w in weights.items() if not n.endswith(('.attn.bias', '.attn.masked_bias'))
        }
    return path, weights


def _download_gpt2(name: str) -> str:
    from huggingface_hub import snapshot_download

    if name not in GPT2_NAMES:
        raise ValueError(f'{name}: neither a folder nor one of {", ".join(GPT2_NAMES)}')
    try:
        return snapshot_download(
            f'openai-community/{name}', allow_patterns=['config.json', 'model.safetensors']
        )
    except (
        Exception
    ) as error:  # the hub's client raises many kinds; each means that there are no weights
        raise ValueError(
            f'{name}: the weights could not be fetched ({type(error).__name__}); connect once, or name a local folder '
            'with config.json and model.safetensors'
        ) from None
