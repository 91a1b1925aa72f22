"""Convert another project's JSON or YAML config, nested and with its own names, to one for train.py.

python -m lyregpt convert-config old.json new.yaml
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
import typing
from typing import Any

from configurator import DATA, UserError, convert, parse

# What other projects call the knobs of train.py. A word that means one thing here and another there stands in AMBIGUOUS instead.
ALIASES = {
    alias: knob
    for knob, aliases in {
        'out_dir': 'output_dir',
        'n_layer': 'n_layers num_layers num_hidden_layers',
        'n_head': 'n_heads num_heads num_attention_heads',
        'n_embd': 'n_embed d_model hidden_size embed_dim embedding_dim',
        'block_size': 'n_positions n_ctx max_position_embeddings context_length context_size seq_len seq_length sequence_length max_seq_len max_seq_length',
        'dropout': 'dropout_rate embd_pdrop attn_pdrop resid_pdrop',
        'bias': 'use_bias',
        'n_kv_head': 'n_kv_heads num_kv_heads num_key_value_heads',
        'n_ff': 'n_inner d_ff ffn_dim intermediate_size',
        'tie_weights': 'tie_word_embeddings tie_embeddings',
        'batch_size': 'micro_batch_size device_batch_size per_device_train_batch_size',
        'gradient_accumulation_steps': 'grad_accum_steps grad_accumulation_steps accumulate_grad_batches',
        'learning_rate': 'lr max_lr peak_lr',
        'max_iters': 'max_steps num_steps total_steps train_steps train_iters num_iters num_iterations',
        'weight_decay': 'wd',
        'beta1': 'adam_beta1',
        'beta2': 'adam_beta2',
        'grad_clip': 'clip_grad max_grad_norm gradient_clip_val',
        'warmup_iters': 'warmup_steps num_warmup_steps lr_warmup_steps',
        'lr_decay_iters': 'lr_decay_steps',
        'min_lr': 'min_learning_rate lr_min',
        'eval_interval': 'eval_every',
        'eval_iters': 'eval_batches',
        'log_interval': 'log_every logging_steps log_every_n_steps',
        'checkpoint_interval': 'save_steps save_every save_interval checkpoint_every',
        'wandb_log': 'use_wandb',
        'wandb_run_name': 'wandb_name',
        'dtype': 'torch_dtype',
        'seed': 'random_seed',
    }.items()
    for alias in aliases.split()
}
AMBIGUOUS = {
    'eval_steps': 'eval_interval or eval_iters',
    'hidden_dim': 'n_embd or n_ff',
    'train_batch_size': 'batch_size, or that times gradient_accumulation_steps',
    'lr_scheduler_type': 'lr_schedule, whose linear stays constant until warmdown',
}


def flatten(values: dict[Any, Any], section: str = '') -> list[tuple[str, str, Any]]:
    """(name with its sections, our spelling of the last part, value) of everything in nested mappings; `betas` is two values."""
    found = []
    for key, value in values.items():
        name = f'{section}{key}'
        plain = (
            re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', str(key)).lower().replace('-', '_')
        )  # maxSteps, max-steps
        if isinstance(value, dict):
            found += flatten(value, f'{name}.')
        elif (
            plain in ('betas', 'adam_betas')
            and isinstance(value, (list, tuple))
            and len(value) == 2
        ):
            found += [(f'{name}[{i}]', f'beta{i + 1}', v) for i, v in enumerate(value)]
        else:
            found.append((name, plain, value))
    return found


def convert_file(old: str, new: str, knobs: type) -> dict[str, Any]:
    """Write the JSON or YAML config `old`, of any project, as the flat one `new` (.json, .yaml or .py) for `knobs`; returns what is in it.

    Sections are dissolved, other projects' names become ours (ALIASES), every value is checked. What has no place here is left out, each
    with a line on stderr. Raises UserError, and writes nothing, if a file is not what it should be, a value is wrong, or two contradict.
    """
    for path, endings in (old, DATA), (new, (*DATA, '.py')):
        if not path.endswith(endings):
            raise UserError(f'{path}: expected a name that ends in {" or ".join(endings)}')
    if os.path.exists(new):
        raise UserError(f'{new}: is there already; remove it, or name another')
    try:
        with open(old, encoding='utf-8') as f:
            found = parse(old, f.read())
    except Exception as error:  # missing, of another encoding, or whatever the readers say of it
        raise UserError(
            f'{old}: {type(error).__name__}: {" ".join(str(error).split())[:200]}'
        ) from None
    if not isinstance(found, dict):
        raise UserError(
            f'{old}: expected a mapping of names to values, found {type(found).__name__}'
        )
    types_ = typing.get_type_hints(knobs)
    values: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for name, plain, value in flatten(found):
        knob = ALIASES.get(plain, plain)
        if knob not in types_:
            near = difflib.get_close_matches(plain, [*types_, *ALIASES], 1)
            hint = (
                f'it can mean {AMBIGUOUS[plain]}'
                if plain in AMBIGUOUS
                else f'did you mean {ALIASES.get(near[0], near[0])}?'
                if near
                else ''
            )
            print(
                f'{old}: {name} has no place here and is left out' + f'; {hint}' * bool(hint),
                file=sys.stderr,
            )
            continue
        if knob == 'dtype' and isinstance(value, str):
            value = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}.get(value, value)
        checked = convert(f'{old}: {name}', types_[knob], value)
        if values.setdefault(knob, checked) != checked:
            raise UserError(
                f'{old}: {said_by[knob]} and {name} both are {knob}, but differ: {values[knob]} and {checked}; remove one'
            )
        said_by.setdefault(knob, name)
    if not values:
        raise UserError(
            f'{old}: nothing in it has a place here (python train.py --help lists the knobs)'
        )
    try:
        knobs(**values)
    except ValueError as error:
        raise UserError(f'{old}: {error}') from None
    values = {f.name: values[f.name] for f in dataclasses.fields(knobs) if f.name in values}
    heading = f'# {os.path.basename(old)}, converted\n'
    if new.endswith('.json'):
        text = json.dumps(values, indent=2, ensure_ascii=False) + '\n'
    elif new.endswith('.py'):
        text = heading + ''.join(f'{k} = {v!r}\n' for k, v in values.items())
    else:
        import yaml

        text = heading + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with open(new + '.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
    os.replace(new + '.tmp', new)
    return values


def main() -> None:
    """Convert an old config, as the command line says."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0], description="Convert another project's config to one for train.py."
    )
    parser.add_argument('old', help='a .json, .yaml or .yml file, nested or flat')
    parser.add_argument('new', help='the file to write: .json, .yaml, .yml or .py')
    args = parser.parse_args()
    from train import TrainConfig

    values = convert_file(args.old, args.new, TrainConfig)
    print(f'wrote {args.new}: {len(values)} knobs; train with it: python train.py {args.new}')
