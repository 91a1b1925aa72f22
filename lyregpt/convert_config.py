"""Convert another project's JSON or YAML config, nested and with its own names, for train.py.

python -m lyregpt convert-config old.json new.yaml
"""

import argparse
import json
import os
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

from configurator import DATA_FORMATS, UserError, build, convert, did_you_mean, parse
from lyregpt.text import atomic_write

# Our name of each option, and what other projects call it.
OTHER_NAMES = {
    'out_dir': 'output_dir',
    'n_layer': 'n_layers num_layers num_hidden_layers',
    'n_head': 'n_heads num_heads num_attention_heads',
    'n_embd': 'n_embed d_model hidden_size embed_dim embedding_dim',
    'block_size': 'n_positions n_ctx max_position_embeddings context_length context_size'
    ' seq_len seq_length sequence_length max_seq_len max_seq_length',
    'dropout': 'dropout_rate embd_pdrop attn_pdrop resid_pdrop',
    'bias': 'use_bias',
    'n_kv_head': 'n_kv_heads num_kv_heads num_key_value_heads',
    'n_ff': 'n_inner d_ff ffn_dim intermediate_size',
    'tie_weights': 'tie_word_embeddings tie_embeddings',
    'batch_size': 'micro_batch_size device_batch_size per_device_train_batch_size',
    'gradient_accumulation_steps': 'grad_accum_steps grad_accumulation_steps'
    ' accumulate_grad_batches',
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
}
ALIASES = {alias: ours for ours, names in OTHER_NAMES.items() for alias in names.split()}
# Names that mean one thing in one project and another elsewhere.
AMBIGUOUS = {
    'eval_steps': 'eval_interval or eval_iters',
    'hidden_dim': 'n_embd or n_ff',
    'train_batch_size': 'batch_size, or that times gradient_accumulation_steps',
    'lr_scheduler_type': 'lr_schedule, whose linear stays constant until warmdown',
}
DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16', 'fp32': 'float32'}


def flatten(values: dict[Any, Any], section: str = '') -> list[tuple[str, str, Any]]:
    """Every value in nested mappings, as (name with its sections, our spelling, value).

    `betas` becomes two values.
    """
    found = []
    for key, value in values.items():
        name = f'{section}{key}'
        # maxSteps and max-steps become max_steps
        plain = re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', str(key)).lower().replace('-', '_')
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        if isinstance(value, dict):
            found += flatten(value, f'{name}.')
        elif plain in ('betas', 'adam_betas') and is_pair:
            found += [(f'{name}[{i}]', f'beta{i + 1}', v) for i, v in enumerate(value)]
        else:
            found.append((name, ALIASES.get(plain, plain), value))
    return found


def read_old(path: str, options: type) -> dict[str, Any]:
    """The options that another project's config sets, under our names and checked.

    What has no equivalent is left out, with a line on stderr. Raises UserError if the file cannot
    be read, a value is wrong, or two values contradict each other.
    """
    try:
        with open(path, encoding='utf-8') as f:
            found = parse(path, f.read())
    except Exception as error:  # missing, of another encoding, or not JSON or YAML
        message = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise UserError(f'{path}: {message}') from None
    kinds = typing.get_type_hints(options)
    values: dict[str, tuple[str, Any]] = {}  # option: (the name in the file, the value)
    for name, ours, value in flatten(found):
        if ours in kinds:
            if ours == 'dtype':
                value = DTYPES.get(str(value), value)
            value = convert(f'{path}: {name}', kinds[ours], value)
            earlier, before = values.setdefault(ours, (name, value))
            if before != value:
                raise UserError(
                    f'{path}: {earlier} and {name} both set {ours}, but differ: '
                    f'{before} and {value}; remove one'
                )
        else:
            hint = did_you_mean(ours, kinds)
            if ours in AMBIGUOUS:
                hint = f'; it can mean {AMBIGUOUS[ours]}'
            print(f'{path}: {name} has no equivalent and is left out{hint}', file=sys.stderr)
    return {name: values[name][1] for name in kinds if name in values}


def convert_file(old: str, new: str, options: type) -> dict[str, Any]:
    """Write the JSON or YAML config `old`, of any project, as `new` (.json, .yaml or .py).

    Returns the values, which `options` accepts. Raises UserError, and writes nothing, if a file
    or a value is not as it should be.
    """
    for path, formats in (old, DATA_FORMATS), (new, (*DATA_FORMATS, '.py')):
        if not path.endswith(formats):
            raise UserError(f'{path}: expected a name that ends in {" or ".join(formats)}')
    if os.path.exists(new):
        raise UserError(f'{new}: already exists; remove it, or name another file')
    values = read_old(old, options)
    if not values:
        raise UserError(f'{old}: nothing in it is an option of train.py (see train.py --help)')
    try:
        build(options, values)  # checks them together
    except UserError as error:
        raise UserError(f'{old}: {error}') from None

    text = f'# {os.path.basename(old)}, converted\n'
    if new.endswith('.json'):
        text = json.dumps(values, indent=2, ensure_ascii=False) + '\n'
    elif new.endswith('.py'):
        text += ''.join(f'{name} = {value!r}\n' for name, value in values.items())
    else:
        import yaml

        text += yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    atomic_write(new, text.encode())
    return values


def main(load_options: Callable[[], type]) -> None:
    """Run the command `convert-config`; `load_options` imports the dataclass of train.py."""
    parser = argparse.ArgumentParser(
        prog=sys.argv[0], description="Convert another project's config to one for train.py."
    )
    parser.add_argument('old', help='a .json, .yaml or .yml file, nested or flat')
    parser.add_argument('new', help='the file to write: .json, .yaml, .yml or .py')
    args = parser.parse_args()
    values = convert_file(args.old, args.new, load_options())
    print(f'wrote {args.new}: {len(values)} options; to use it: python train.py {args.new}')
