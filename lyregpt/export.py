"""Write a trained model in formats that other tools load.

    lyregpt export --out_dir=out-darklyrics                 a folder for Hugging Face's transformers
    lyregpt export --out_dir=out-darklyrics --format=gguf   a file for llama.cpp, Ollama, LM Studio

A GPT-2 shape becomes GPT2LMHeadModel, a modern one Qwen3ForCausalLM, with the tokenizer and a model
card to fill in. sample.py and train.py load the folder with --init_from=export-darklyrics, and
prepare.py its tokenizer with --tokenizer=export-darklyrics/tokenizer.json.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import UserError, configure
from lyregpt import checkpoint
from lyregpt.pretrained import EXACTLY, QWEN3_SHAPE, hf_names, hf_rows, is_transposed
from lyregpt.tokenizer import EOT, Tokenizer, bytes_to_unicode
from model import PRESETS, GPTConfig

# The dtypes of torch, and GGUF's names for those of tensors and files
DTYPES = {
    'float32': (torch.float32, 'F32', 'ALL_F32'),
    'bfloat16': (torch.bfloat16, 'BF16', 'MOSTLY_BF16'),
    'float16': (torch.float16, 'F16', 'MOSTLY_F16'),
}


@dataclass
class ExportConfig:
    """The options; the comment after each one is its help."""

    # Which model
    out_dir: str = 'out'  # a folder that train.py wrote (best.pt before ckpt.pt), or a checkpoint

    # What to make of it
    format: Literal['hf', 'gguf'] = 'hf'  # hf: a folder for transformers; gguf: a llama.cpp file
    to: str = ''  # where it goes; '': export-NAME for out-NAME, and .gguf after it for a file
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of all weights; in a GGUF file
    # of its matrices only


# -----------------------------------------------------------------------------
# The weights, as transformers names them


def architecture(config: GPTConfig) -> str:
    """Return gpt2 or qwen3, whichever has the model's shape.

    Raises ValueError, with the field that differs, if neither has.
    """
    gpt2 = PRESETS['gpt2'] | {'n_kv_head': config.n_head, 'head_dim': config.n_embd / config.n_head}
    shapes: dict[str, dict[str, Any]] = {'gpt2': gpt2, 'qwen3': PRESETS['modern']}
    either = {
        'gpt2': ('tie_weights', 'bias'),
        'qwen3': ('tie_weights',),
    }  # no bias: zeros are written
    different = {
        kind: [
            key for key in shape if key not in either[kind] and getattr(config, key) != shape[key]
        ]
        for kind, shape in shapes.items()
    }
    kind = min(different, key=lambda name: len(different[name]))
    for key in different[kind]:
        raise ValueError(
            f'{key}={getattr(config, key)}: neither GPT-2 nor Qwen3 has it with the rest of this '
            f'model; {key}={shapes[kind][key]} could be exported, and so can all that arch=modern '
            'and arch=gpt2 are by themselves'
        )
    return kind


def to_hf(
    config: GPTConfig, state: dict[str, torch.Tensor], vocab_size: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (config.json, weights) of Hugging Face's GPT-2 or Qwen3 that computes the same.

    It has the first `vocab_size` tokens only; a tied head is left out. Raises ValueError, with the
    field's name, for a model that is neither.
    """
    kind = architecture(config)
    weights: dict[str, torch.Tensor] = {}
    for name, w in state.items():
        if name == 'lm_head.weight' and config.tie_weights:
            continue
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            w = w[:vocab_size]
        names = hf_names(name, kind)
        weights |= zip(names, w.split(hf_rows(config, w.size(0), names)))
        if is_transposed(name, kind):
            weights[name] = w.t()
        if kind == 'gpt2' and not config.bias and (is_transposed(name, kind) or '.ln_' in name):
            weights[name.replace('weight', 'bias')] = torch.zeros(w.size(0))
    hf: dict[str, Any] = {
        'model_type': kind,
        'vocab_size': vocab_size,
        'tie_word_embeddings': config.tie_weights,
    }
    if kind == 'gpt2':
        hf |= {'architectures': ['GPT2LMHeadModel']}
        hf |= {key: getattr(config, key) for key in ('n_layer', 'n_head', 'n_embd')}
        hf |= {'n_positions': config.block_size, 'n_inner': config.n_ff}
        hf |= dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), config.dropout)
    else:
        hf |= {'architectures': ['Qwen3ForCausalLM'], 'rope_theta': config.rope_theta}
        hf |= {key: getattr(config, own) for key, own in QWEN3_SHAPE.items()}
    defaults = {key: values[0] for key, values in EXACTLY[kind].items()}
    return hf | {key: value for key, value in defaults.items() if value is not None}, weights


# -----------------------------------------------------------------------------
# The formats


def write_hf(
    folder: str,
    hf: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    """Write a Hugging Face folder, except for the model card."""
    size = hf.get('n_positions') or hf['max_position_embeddings']
    engine = tokenizer.to_hf()
    # `eot` separates documents. Without one None is written: GPT-2's default would be 50256.
    ids = dict.fromkeys(('bos_token_id', 'eos_token_id'), tokenizer.eot)
    roles = {'bos_token': tokenizer.eot, 'eos_token': tokenizer.eot, 'unk_token': tokenizer.unk}
    special = {token['id']: token['content'] for token in engine['added_tokens']}
    contents = {
        'config.json': hf | ids | {'torch_dtype': dtype},
        'tokenizer.json': engine,
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': size,
            # transformers 4 adds token types by default, which GPT-2 would look up
            'model_input_names': ['input_ids', 'attention_mask'],
            'clean_up_tokenization_spaces': False,
            'split_special_tokens': True,  # one spelled out in a text is text
            **{role: special[i] for role, i in roles.items() if i in special},
        },
        'generation_config.json': {
            'do_sample': True,
            'temperature': 0.8,
            'top_k': 200,
            'max_length': size,
            **ids,
            'pad_token_id': tokenizer.eot,
        },
    }
    for name, content in contents.items():
        indent = None if name == 'tokenizer.json' else 2
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            json.dump(content, f, ensure_ascii=False, indent=indent)
    tensors = {name: w.to(DTYPES[dtype][0], copy=True).contiguous() for name, w in weights.items()}
    path = os.path.join(folder, 'model.safetensors')
    save_file(tensors, path, {'format': 'pt'})
    # safetensors lets only the owner read the file
    shutil.copymode(os.path.join(folder, 'config.json'), path)


def write_gguf(
    path: str,
    config: GPTConfig,
    hf: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: str,
    name: str,
) -> None:
    """Write a GGUF file of llama.cpp's architecture gpt2 or qwen3.

    Raises UserError if llama.cpp lacks the tokenizer.
    """
    import gguf

    kind, matrices = hf['model_type'], gguf.GGMLQuantizationType[DTYPES[dtype][1]]
    tokens, types, merges, eot = gguf_vocabulary(tokenizer)
    fields = {
        'name': name,
        'file_type': gguf.LlamaFileType[DTYPES[dtype][2]],
        'context_length': config.block_size,
        'embedding_length': config.n_embd,
        'block_count': config.n_layer,
        'feed_forward_length': config.n_ff,
        'head_count': config.n_head,
    }
    if kind == 'gpt2':
        fields |= {'layer_norm_eps': hf['layer_norm_epsilon']}
    else:
        fields |= {
            'head_count_kv': config.n_kv_head,
            'key_length': config.head_dim,
            'value_length': config.head_dim,
            'layer_norm_rms_eps': hf['rms_norm_eps'],
            'rope_freq_base': config.rope_theta,
        }
    fields |= {
        'tokenizer_model': 'gpt2',
        'tokenizer_pre': 'gpt-2',
        'token_list': tokens,
        'token_types': types,
        'token_merges': merges,
        'bos_token_id': eot,
        'eos_token_id': eot,
        'add_bos_token': tokenizer.eot is not None,
        'vocab_size': len(tokens),
    }
    out = gguf.GGUFWriter(path, kind)
    for field, value in fields.items():
        getattr(out, f'add_{field}')(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.n_layer)
    for name, w in weights.items():
        stem, _, suffix = name.rpartition('.')
        if len(tokens) > tokenizer.vocab_size and stem.endswith(('wte', 'embed_tokens', 'lm_head')):
            # The spare document end gets the mean of all rows, so its logit is the mean of all
            # logits and it is never the most likely token.
            w = torch.cat([w, w.mean(0, keepdim=True)])
        if is_transposed(name, kind):
            w = w.t()  # llama.cpp has no Conv1D
        torch_dtype, gguf_dtype = DTYPES[dtype][0], matrices
        if w.dim() == 1 or stem.endswith('wpe'):
            # llama.cpp needs norms, biases and positions in float32.
            torch_dtype, gguf_dtype = torch.float32, gguf.GGMLQuantizationType.F32
        data = w.to(torch_dtype).contiguous().view(torch.uint8).numpy()
        out.add_tensor(f'{names.get_name(stem)}.{suffix}', data, raw_dtype=gguf_dtype)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[Any], list[str], int]:
    """Return (tokens, their types, merges, the document end's id) of llama.cpp's byte-level BPE.

    A character tokenizer becomes a byte-level BPE that merges only the bytes of one character.
    llama.cpp always has a document end, token 11 if none is named: a tokenizer without one gets a
    spare token after its own. Raises UserError for a tokenizer that llama.cpp cannot represent.
    """
    from gguf import TokenType

    if tokenizer.kind == 'wordpiece':
        raise UserError(
            "format=gguf: llama.cpp has only BERT's WordPiece, not one of bytes; use --format=hf, "
            'or train with --tokenizer=bpe'
        )
    engine, printed = tokenizer.to_hf(), bytes_to_unicode()
    tokens = [
        ''.join(printed[b] for b in tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)
    ]
    types = [TokenType.NORMAL] * len(tokens)
    for added in engine['added_tokens']:
        tokens[added['id']] = added['content']
        types[added['id']] = TokenType.CONTROL if added['special'] else TokenType.USER_DEFINED
    if tokenizer.kind == 'char':
        characters = [token for token, t in zip(tokens, types) if t == TokenType.NORMAL]
        pairs = [f'{c[:i]} {c[i]}' for c in characters for i in range(1, len(c))]
        merges = list(dict.fromkeys(pairs))
    else:
        check_gguf_bpe(engine, tokenizer)
        merges = [' '.join(pair) for pair in engine['model']['merges']]
        # Ids that a foreign vocabulary leaves out
        tokens = [token or f'[unused{i}]' for i, token in enumerate(tokens)]
    merges = merges or ['ÿ ÿ']  # llama.cpp needs one; the byte 255 is in no text
    if tokenizer.eot is not None:
        return tokens, types, merges, tokenizer.eot
    return [*tokens, EOT], [*types, TokenType.CONTROL], merges, len(tokens)


def check_gguf_bpe(engine: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer.json `engine` does what llama.cpp's GPT-2 BPE does not."""
    splits = engine['pre_tokenizer'] or {}
    how = [splits.get(key) for key in ('type', 'add_prefix_space', 'use_regex')]
    if how != ['ByteLevel', False, True]:
        raise UserError(
            "format=gguf: this tokenizer does not split text as GPT-2's does; --format=hf keeps it "
            'as it is'
        )
    keys = 'dropout continuing_subword_prefix end_of_word_suffix byte_fallback ignore_merges'
    foreign = [key for key in keys.split() if engine['model'].get(key)]
    if engine['normalizer'] and not (tokenizer.lowercase or tokenizer.squeeze):
        foreign.append('normalizer')  # the card describes ours
    plain = [token for token in engine['added_tokens'] if not token['special']]
    foreign += [k for k in ('lstrip', 'rstrip', 'single_word') if any(t[k] for t in plain)]
    if foreign:
        raise UserError(
            f'format=gguf: cannot express what {foreign[0]} in this tokenizer does to a text; '
            '--format=hf keeps it as it is'
        )


# -----------------------------------------------------------------------------
# The model card

CARD = """---
library_name: {library}
pipeline_tag: text-generation
license: other  # FILL IN: the license of these weights, as one of \
huggingface.co/docs/hub/repositories-licenses
tags:
- lyregpt
---

# {name}

FILL IN: what it generates, in a sentence.

| | |
|---|---|
{facts}

## Data

{dataset}. FILL IN: where the text comes from.
{splits}
## License

FILL IN: the license of these weights; whose text they were trained on, and on what terms. \
Song lyrics mostly belong to somebody.

## Use

{use}

## Limits

{limits}
"""

TRANSFORMERS = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained('{name}')
    tokenizer = AutoTokenizer.from_pretrained('{name}')
    ids = model.generate(**tokenizer('The rain', return_tensors='pt'))
    print(tokenizer.decode(ids[0], skip_special_tokens=True))

lyreGPT: `python sample.py --init_from={name}`, and `python train.py --init_from={name}` to train \
it further.

For llama.cpp, Ollama and LM Studio: `lyregpt export --format=gguf` writes the file and says how."""

LLAMA_CPP = """llama.cpp (a text begins as a document does; `llama-cli` in releases before the end \
of 2025):

    llama-completion -m {name}.gguf -no-cnv --temp 0.8 --top-k 200 -n 200 -p "The rain"

Ollama, with this `Modelfile`, then `ollama create {lower_name} -f Modelfile` and \
`ollama run {lower_name} "The rain"`:

    FROM ./{name}.gguf
    TEMPLATE \"\"\"{{{{ .Prompt }}}}\"\"\"
    PARAMETER num_ctx {context}
    PARAMETER temperature 0.8
    PARAMETER top_k 200

LM Studio: `lms import {name}.gguf`, then a plain text completion without a chat template."""


FORMATS = {'hf': ('transformers', TRANSFORMERS), 'gguf': ('gguf', LLAMA_CPP)}


def number(value: Any) -> float:
    """The value, or 0 if it is not a number: a foreign checkpoint may hold anything."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return 0.0


def card(
    config: ExportConfig,
    name: str,
    best: bool,
    state: dict[str, Any],
    hf: dict[str, Any],
    n_params: int,
    tokenizer: Tokenizer,
) -> str:
    """Return the model's README.md; what only its owner knows is marked FILL IN."""
    library, use = FORMATS[config.format]
    trained, meta = state.get('config', {}), state.get('meta', {})
    start = str(meta.get('began_from') or trained.get('init_from') or '').removeprefix('auto:')
    unknown = start in ('', 'scratch', 'resume', 'auto')  # resume hides where the run began
    c, steps = GPTConfig(**state['model_args']), number(state.get('iter_num'))
    own = f', trained with lyreGPT (arch={c.arch})' if 'tokenizer' in state else ''
    facts = {
        'architecture': hf['architectures'][0] + own,  # nanoGPT's checkpoints have no tokenizer
        'parameters': f'{n_params:,}',
        'shape': f'{c.n_layer} layers, {c.n_head} heads of {c.head_dim} ({c.n_kv_head} for keys '
        f'and values), width {c.n_embd}, {c.n_ff} in the MLP',
        'context': f'{c.block_size:,} tokens',
        'vocabulary': f'{tokenizer.vocab_size:,} tokens ({tokenizer.kind})',
        'weights': config.dtype,
        'began from': '' if unknown else os.path.basename(os.path.normpath(start)),
        'steps': f'{steps:,.0f}' if steps else '',
        'validation loss': describe_loss(state, best),
    }
    dataset = os.path.basename(os.path.normpath(str(trained.get('dataset') or ''))).strip('.')
    return CARD.format(
        library=library,
        name=name,
        facts='\n'.join(f'| {key} | {value} |' for key, value in facts.items() if value),
        dataset=dataset or 'FILL IN: its name',
        splits=describe_splits(meta),
        use=use.format(name=name, lower_name=name.lower(), context=c.block_size),
        limits='\n\n'.join(limits(config.format, tokenizer, c.block_size, start == 'scratch')),
    )


def describe_loss(state: dict[str, Any], best: bool) -> str:
    """Return the validation loss in words; '' if it is unknown. `best`: these are its weights."""
    loss = number(state.get('best_val_loss'))
    bytes_per_token = number(state.get('meta', {}).get('bytes_per_token'))
    if not 0 < loss < 1000:  # nanoGPT's is a billion before it is measured
        return ''
    text = f'{loss:.4f} nats per token'
    if bytes_per_token:
        text += f', {loss / bytes_per_token / math.log(2):.3f} bits per byte'
    return text if best else f'{text} (the best of its training)'


def describe_splits(meta: dict[str, Any]) -> str:
    """Return a table of the dataset's splits; '' if their sizes are unknown."""
    rows = ['\n| split | documents | tokens | bytes of text |\n|---|---|---|---|\n']
    try:
        for split, n in meta['splits'].items():
            rows.append(f'| {split} | {n["documents"]:,} | {n["tokens"]:,} | {n["bytes"]:,} |\n')
    except (AttributeError, KeyError, TypeError, ValueError):  # a foreign checkpoint
        return ''
    return ''.join(rows) if len(rows) > 1 else ''


def limits(form: str, tokenizer: Tokenizer, context: int, from_scratch: bool) -> list[str]:
    """Return paragraphs on what the model, written as `form`, cannot do."""
    alone = 'It knows only the words and style of its data. ' if from_scratch else ''
    notes = [
        f'{alone}It sees no more than {context:,} tokens at a time. It continues texts; it does '
        'not answer questions or follow instructions. It may repeat passages of its data word for '
        'word, and what it says is not checked.',
        'FILL IN: what it was tried for, and what it must not be used for.',
    ]
    if form != 'gguf':
        return notes
    changes = {
        'in lower case': tokenizer.lowercase,
        'without runs of blanks and of empty lines': tokenizer.squeeze,
    }
    what = ' and '.join(text for text, applied in changes.items() if applied)
    if what:
        notes.append(
            f'It was trained on text {what}. GGUF cannot express that: write prompts that way '
            'yourself.'
        )
    if tokenizer.kind == 'char':
        notes.append('llama.cpp silently drops characters that it does not know from a prompt.')
    if tokenizer.eot is None:
        notes.append(
            'Its data has no document ends, but llama.cpp must have one: a spare token that was '
            'never trained; `--ignore-eos` never generates it.'
        )
    return notes


# -----------------------------------------------------------------------------


def export(config: ExportConfig) -> str:
    """Write what `config` asks for, completely or not at all; returns where. Raises UserError."""
    # Where it goes
    gguf = config.format == 'gguf'
    folder = config.out_dir
    if os.path.isfile(folder):
        folder = os.path.dirname(folder)
    name = os.path.basename(os.path.abspath(folder)).removeprefix('out-')
    suffix = '.gguf' if gguf else ''
    to = os.path.normpath(config.to or f'export-{name}{suffix}')
    stem = to.removesuffix(suffix)
    if not to.endswith(suffix):
        raise UserError(f'to={config.to}: expected the name of a file that ends in .gguf')
    readme = f'{stem}.md' if gguf else os.path.join(to, 'README.md')
    for target in (to, readme):
        free = not gguf and os.path.isdir(target) and not os.listdir(target)
        if os.path.lexists(target) and not free:
            raise UserError(f'{target} already exists; remove it, or choose another path with --to')

    # The model
    path, state = checkpoint.load_from(config.out_dir)
    model, tokenizer = checkpoint.build_model(state, path), checkpoint.tokenizer_of(state)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f'{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model '
            f'{model.config.vocab_size}: they do not belong together'
        )
    own = {key: w.detach() for key, w in model.state_dict().items()}
    try:
        hf, weights = to_hf(model.config, own, tokenizer.vocab_size)
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None

    # Everything is written to a temporary folder first.
    name, part = os.path.basename(stem), f'{to}.tmp'
    n_params = sum(w.numel() for w in weights.values())
    text = card(config, name, 'best' in os.path.basename(path), state, hf, n_params, tokenizer)
    checkpoint.remove(part)
    os.makedirs(part)
    try:
        part_readme = os.path.join(part, os.path.basename(readme))
        with open(part_readme, 'w', encoding='utf-8') as f:
            f.write(text)
        if gguf:
            file = os.path.join(part, f'{name}.gguf')
            write_gguf(file, model.config, hf, weights, tokenizer, config.dtype, name)
        else:
            write_hf(part, hf, weights, tokenizer, config.dtype)
        for written in os.scandir(part):
            with open(written.path, 'rb+') as synced:
                os.fsync(synced.fileno())
        if gguf:
            os.replace(file, to)
            try:
                os.replace(part_readme, readme)
            except OSError:
                checkpoint.remove(to)  # both or neither: the next try must not find it
                raise
        else:
            if os.path.isdir(to):  # it is empty, but Windows cannot rename a folder to it
                os.rmdir(to)
            os.rename(part, to)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error  # numpy's has no strerror
        raise UserError(f'{to}: could not be written, is the disk full? ({reason})') from None
    finally:
        checkpoint.remove(part)
    print(
        f'{path} → {to}: {hf["architectures"][0]}, {n_params:,} parameters, {config.dtype}; '
        f'now fill in {readme}'
    )
    return to


def main() -> None:
    """Export what the command line names."""
    about = 'Write a trained model in formats that other tools load.'
    export(configure(ExportConfig, description=about))
