"""Write a trained model in the formats that other people's tools load.

    python -m lyregpt export --out_dir=out-darklyrics                    a folder for Hugging Face's transformers: export-darklyrics/
    python -m lyregpt export --out_dir=out-darklyrics --format=gguf      a file for llama.cpp, Ollama and LM Studio: export-darklyrics.gguf

GPT-2's shape becomes GPT2LMHeadModel, the modern one Qwen3ForCausalLM, with the tokenizer and a model card to fill in. The
folder comes back with --init_from=export-darklyrics (sample.py, train.py) and --tokenizer=export-darklyrics/tokenizer.json.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import UserError, configure, run
from lyregpt import checkpoint
from lyregpt.pretrained import EXACTLY, QWEN3_SHAPE, hf_names, hf_rows, is_transposed
from lyregpt.tokenizer import EOT, Tokenizer, bytes_to_unicode
from model import PRESETS, GPTConfig

DTYPES = {
    'float32': (torch.float32, 'F32'),
    'bfloat16': (torch.bfloat16, 'BF16'),
    'float16': (torch.float16, 'F16'),
}  # torch's, and GGUF's name


@dataclass
class ExportConfig:
    """The knobs; the comment behind each is its help."""

    # Which model
    out_dir: str = 'out'  # a folder that train.py wrote (best.pt is taken before ckpt.pt), or a checkpoint file

    # What to make of it
    format: Literal['hf', 'gguf'] = (
        'hf'  # hf: a folder for transformers; gguf: a file for llama.cpp
    )
    to: str = ''  # where it goes; '': export-NAME for out-NAME, .gguf behind it for a file
    dtype: Literal['float32', 'bfloat16', 'float16'] = (
        'float32'  # of all weights; in a GGUF of its matrices alone
    )


# -----------------------------------------------------------------------------
# The weights, as transformers names them


def architecture(config: GPTConfig) -> str:
    """gpt2 or qwen3, whichever has the model's shape. Raises ValueError that names the field in the way."""
    wanted: dict[str, dict[str, Any]] = {
        'gpt2': dict(PRESETS['gpt2']),
        'qwen3': dict(PRESETS['modern']),
    }
    del wanted['gpt2']['bias']  # where there are none, zeros are written
    wanted['gpt2'] |= {'n_kv_head': config.n_head, 'head_dim': config.n_embd / config.n_head}
    wrong = {
        k: [key for key, v in want.items() if key != 'tie_weights' and getattr(config, key) != v]
        for k, want in wanted.items()
    }
    kind = min(wrong, key=lambda k: len(wrong[k]))
    for key in wrong[kind]:
        raise ValueError(
            f'{key}={getattr(config, key)}: neither GPT-2 nor Qwen3 has it with the rest of this model; {key}={wanted[kind][key]} could be '
            'exported, and so can all that arch=modern and arch=gpt2 are by themselves'
        )
    return kind


def to_hf(
    config: GPTConfig, state: dict[str, torch.Tensor], vocab_size: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config.json, weights) of Hugging Face's GPT-2 or Qwen3 that computes the same, with the first `vocab_size` tokens alone.

    A tied head is left out. Raises ValueError, with the field's name, for a model that is neither.
    """
    c, kind = config, architecture(config)
    weights: dict[str, torch.Tensor] = {}
    for name, w in state.items():
        names = hf_names(name, kind)
        if name == 'lm_head.weight' and c.tie_weights:
            continue
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            w = w[:vocab_size]
        weights |= zip(names, w.split(hf_rows(c, w.size(0), names)))
        if is_transposed(name, kind):
            weights[name] = w.t()
        if kind == 'gpt2' and not c.bias and (is_transposed(name, kind) or '.ln_' in name):
            weights[name.replace('weight', 'bias')] = torch.zeros(w.size(0))
    hf: dict[str, Any] = {
        'model_type': kind,
        'vocab_size': vocab_size,
        'tie_word_embeddings': c.tie_weights,
    }
    if kind == 'gpt2':
        hf |= {
            'architectures': ['GPT2LMHeadModel'],
            'n_layer': c.n_layer,
            'n_head': c.n_head,
            'n_embd': c.n_embd,
        }
        hf |= {
            'n_positions': c.block_size,
            'n_inner': c.n_ff,
            **dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout),
        }
    else:
        hf |= {'architectures': ['Qwen3ForCausalLM'], 'rope_theta': c.rope_theta}
        hf |= {key: getattr(c, own) for key, own in QWEN3_SHAPE.items()}
    return hf | {
        key: values[0] for key, values in EXACTLY[kind].items() if values[0] is not None
    }, weights


# -----------------------------------------------------------------------------
# The formats


def write_hf(
    folder: str,
    hf: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    """All of a Hugging Face folder but the model card."""
    size = hf.get('n_positions') or hf['max_position_embeddings']
    engine = tokenizer.to_hf()
    ids = dict.fromkeys(
        ('bos_token_id', 'eos_token_id'), tokenizer.eot
    )  # both stand between documents; None must be said: GPT-2's default is 50256
    roles = {'bos_token': tokenizer.eot, 'eos_token': tokenizer.eot, 'unk_token': tokenizer.unk}
    for name, content in {
        'config.json': hf | ids | {'torch_dtype': dtype},
        'tokenizer.json': engine,
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': size,
            'model_input_names': [
                'input_ids',
                'attention_mask',
            ],  # transformers 4 adds token types by itself, which GPT-2 would look up
            'clean_up_tokenization_spaces': False,
            'split_special_tokens': True,  # one written out in a text is text
            **{
                role: t['content']
                for role, i in roles.items()
                for t in engine['added_tokens']
                if t['id'] == i
            },
        },
        'generation_config.json': {
            'do_sample': True,
            'temperature': 0.8,
            'top_k': 200,
            'max_length': size,
            **ids,
            'pad_token_id': tokenizer.eot,
        },
    }.items():
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
            json.dump(
                content, f, ensure_ascii=False, indent=None if name == 'tokenizer.json' else 2
            )
    tensors = {name: w.to(DTYPES[dtype][0], copy=True).contiguous() for name, w in weights.items()}
    save_file(tensors, path := os.path.join(folder, 'model.safetensors'), {'format': 'pt'})
    shutil.copymode(
        os.path.join(folder, 'config.json'), path
    )  # safetensors lets nobody but the owner read it


def write_gguf(
    path: str,
    config: GPTConfig,
    hf: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    dtype: str,
    name: str,
) -> None:
    """A GGUF file of llama.cpp's architecture gpt2 or qwen3. Raises UserError if llama.cpp lacks the tokenizer."""
    import gguf

    kind, dense = hf['model_type'], gguf.GGMLQuantizationType[DTYPES[dtype][1]]
    out = gguf.GGUFWriter(path, kind)
    out.add_name(name)
    out.add_file_type(
        gguf.LlamaFileType['ALL_F32' if dense.name == 'F32' else f'MOSTLY_{dense.name}']
    )
    out.add_context_length(config.block_size)
    out.add_embedding_length(config.n_embd)
    out.add_block_count(config.n_layer)
    out.add_feed_forward_length(config.n_ff or 0)
    out.add_head_count(config.n_head)
    if kind == 'gpt2':
        out.add_layer_norm_eps(hf['layer_norm_epsilon'])
    else:
        out.add_head_count_kv(config.n_kv_head or config.n_head)
        out.add_key_length(config.head_dim or 0)
        out.add_value_length(config.head_dim or 0)
        out.add_layer_norm_rms_eps(hf['rms_norm_eps'])
        out.add_rope_freq_base(config.rope_theta)
    tokens, types, merges, eot = gguf_vocabulary(tokenizer)
    out.add_tokenizer_model('gpt2')
    out.add_tokenizer_pre('gpt-2')
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_token_merges(merges)
    out.add_bos_token_id(eot)
    out.add_eos_token_id(eot)
    out.add_add_bos_token(tokenizer.eot is not None)
    out.add_vocab_size(len(tokens))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.n_layer)
    for name, w in weights.items():
        stem, _, suffix = name.rpartition('.')
        if len(tokens) > tokenizer.vocab_size and stem.endswith(('wte', 'embed_tokens', 'lm_head')):
            # the spare document end: the mean of all rows has the mean of all logits, so it is never the likeliest token
            w = torch.cat([w, w.mean(0, keepdim=True)])
        w = w.t() if is_transposed(name, kind) else w  # llama.cpp has no Conv1D
        whole = w.dim() == 1 or stem.endswith(
            'wpe'
        )  # norms, biases and positions: llama.cpp wants them in full
        w = w.to(torch.float32 if whole else DTYPES[dtype][0]).contiguous().view(torch.uint8)
        out.add_tensor(
            f'{names.get_name(stem)}.{suffix}',
            w.numpy(),
            raw_dtype=gguf.GGMLQuantizationType.F32 if whole else dense,
        )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[Any], list[str], int]:
    """(tokens, their types, merges, the document end's id) of llama.cpp's byte-level BPE.

    Characters become byte-level BPE whose merges put the bytes of one character together and nothing else. llama.cpp always has
    a document end, token 11 if none is named: a tokenizer without one gets a spare token behind its own.
    Raises UserError for a tokenizer that llama.cpp cannot have.
    """
    from gguf import TokenType

    if tokenizer.kind == 'wordpiece':
        raise UserError(
            "format=gguf: llama.cpp knows BERT's WordPiece alone, not one of bytes; use --format=hf, or train with --tokenizer=bpe"
        )
    engine, printed = tokenizer.to_hf(), bytes_to_unicode()
    tokens = [
        ''.join(printed[b] for b in tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)
    ]
    types = [TokenType.NORMAL] * len(tokens)
    for added in engine['added_tokens']:
        tokens[added['id']], types[added['id']] = (
            added['content'],
            TokenType.CONTROL if added['special'] else TokenType.USER_DEFINED,
        )
    if tokenizer.kind == 'char':
        pairs = {
            (token[:i], token[i]): None
            for token, t in zip(tokens, types)
            if t == TokenType.NORMAL
            for i in range(1, len(token))
        }
        merges = [' '.join(pair) for pair in pairs]
    else:
        splits = engine['pre_tokenizer'] or {}
        if (splits.get('type'), splits.get('add_prefix_space'), splits.get('use_regex')) != (
            'ByteLevel',
            False,
            True,
        ):
            raise UserError(
                "format=gguf: this tokenizer does not split text as GPT-2's does; --format=hf keeps it as it is"
            )
        foreign = [
            key
            for key in (
                'dropout',
                'continuing_subword_prefix',
                'end_of_word_suffix',
                'byte_fallback',
                'ignore_merges',
            )
            if engine['model'].get(key)
        ]
        foreign += ['normalizer'] * bool(
            engine['normalizer'] and not (tokenizer.lowercase or tokenizer.squeeze)
        )  # of ours the card tells
        foreign += [
            key
            for key in ('lstrip', 'rstrip', 'single_word')
            if any(t[key] for t in engine['added_tokens'] if not t['special'])
        ]
        if foreign:
            raise UserError(
                f'format=gguf: cannot say what {foreign[0]} in this tokenizer does to a text; --format=hf keeps it as it is'
            )
        merges = [' '.join(pair) for pair in engine['model']['merges']]
        tokens = [
            token or f'[unused{i}]' for i, token in enumerate(tokens)
        ]  # ids that a foreign vocabulary leaves out
    merges = merges or ['ÿ ÿ']  # llama.cpp wants one; the byte 255 is in no text
    if tokenizer.eot is not None:
        return tokens, types, merges, tokenizer.eot
    return [*tokens, EOT], [*types, TokenType.CONTROL], merges, len(tokens)


# -----------------------------------------------------------------------------
# The model card


def number(value: Any) -> float:
    """The value, or 0 if it is none: a foreign checkpoint may hold anything."""
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
    """The model's README.md: what is known is in it, what only its owner knows is marked FILL IN."""
    c, trained, meta = (
        GPTConfig(**state['model_args']),
        state.get('config', {}),
        state.get('meta', {}),
    )
    gguf, dataset = config.format == 'gguf', str(trained.get('dataset') or '')
    start = str(meta.get('began_from') or trained.get('init_from') or '').removeprefix(
        'auto:'
    )  # resume: nobody knows any more
    rows = {
        'architecture': f'{hf["architectures"][0]}'
        + f', trained with lyreGPT (arch={c.arch})' * ('tokenizer' in state),  # nanoGPT's have none
        'parameters': f'{n_params:,}',
        'shape': f'{c.n_layer} layers, {c.n_head} heads of {c.head_dim} ({c.n_kv_head} for keys and values), {c.n_embd} wide, {c.n_ff} in the MLP',
        'context': f'{c.block_size:,} tokens',
        'vocabulary': f'{tokenizer.vocab_size:,} tokens ({tokenizer.kind})',
        'weights': config.dtype,
        'began from': os.path.basename(os.path.normpath(start))
        if start not in ('', 'scratch', 'resume', 'auto')
        else '',
        'steps': f'{steps:,.0f}' if (steps := number(state.get('iter_num'))) else '',
    }
    loss, bytes_per_token = number(state.get('best_val_loss')), number(meta.get('bytes_per_token'))
    if 0 < loss < 1000:  # nanoGPT's is a billion before it is measured
        rows['validation loss'] = f'{loss:.4f} nats per token' + (
            f', {loss / bytes_per_token / math.log(2):.3f} bits per byte' if bytes_per_token else ''
        )
        rows['validation loss'] += ' (the best of its training)' * (not best)
    counts: list[str] = []
    with contextlib.suppress(
        AttributeError, KeyError, TypeError, ValueError
    ):  # none, or others, in a checkpoint that is not ours
        counts = [
            f'| {s} | {n["documents"]:,} | {n["tokens"]:,} | {n["bytes"]:,} |\n'
            for s, n in meta['splits'].items()
        ]
    table_of_data = (
        ''.join(['\n| split | documents | tokens | bytes of text |\n|---|---|---|---|\n', *counts])
        if counts
        else ''
    )
    alone = 'It knows the words and the manner of its data alone. ' * (start == 'scratch')
    notes = [
        f'{alone}It sees no more than {c.block_size:,} tokens at a time. It continues texts; it does not '
        'answer questions or follow instructions. It may repeat passages of its data word for word, and what it says is not checked.',
        'FILL IN: what it was tried for, and what it must not be used for.',
    ]
    if gguf and (tokenizer.lowercase or tokenizer.squeeze):
        what = ['in lower case'] * tokenizer.lowercase + [
            'without runs of blanks and of empty lines'
        ] * tokenizer.squeeze
        notes.append(
            f'It was trained on text {" and ".join(what)}. GGUF cannot say so: write prompts that way yourself.'
        )
    if gguf and tokenizer.kind == 'char':
        notes.append(
            "Characters that it does not know are dropped from a prompt without a word: llama.cpp's way."
        )
    if gguf and tokenizer.eot is None:
        notes.append(
            'Its data has no document ends, but llama.cpp must have one: a spare token that no training has seen; `--ignore-eos` never draws it.'
        )
    file = f'{name}.gguf'
    llama = f'''llama.cpp (a text begins as a document does; `llama-cli` in releases before the end of 2025):

    llama-completion -m {file} -no-cnv --temp 0.8 --top-k 200 -n 200 -p "The rain"

Ollama, with this `Modelfile`, then `ollama create {name.lower()} -f Modelfile` and `ollama run {name.lower()} "The rain"`:

    FROM ./{file}
    TEMPLATE """{{{{ .Prompt }}}}"""
    PARAMETER num_ctx {c.block_size}
    PARAMETER temperature 0.8
    PARAMETER top_k 200

LM Studio: `lms import {file}`, then a plain text completion without a chat template.'''
    transformers = f"""    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained('{name}'), AutoTokenizer.from_pretrained('{name}')
    words = model.generate(**tokenizer('The rain', return_tensors='pt'))
    print(tokenizer.decode(words[0], skip_special_tokens=True))

lyreGPT: `python sample.py --init_from={name}`, and `python train.py --init_from={name}` to train it further.

For llama.cpp, Ollama and LM Studio: `python -m lyregpt export --format=gguf` makes the file and says how."""
    table = '\n'.join(f'| {key} | {value} |' for key, value in rows.items() if value)
    return f"""---
library_name: {'gguf' if gguf else 'transformers'}
pipeline_tag: text-generation
license: other  # FILL IN: the licence of these weights, as one of huggingface.co/docs/hub/repositories-licenses
tags:
- lyregpt
---

# {name}

FILL IN: what it writes, in a sentence.

| | |
|---|---|
{table}

## Data

{os.path.basename(os.path.normpath(dataset)).strip('.') or 'FILL IN: its name'}. FILL IN: where the words come from.
{table_of_data}
## Licence

FILL IN: the licence of these weights; whose words they learned, and on what terms. Song lyrics mostly belong to somebody.

## Use

{llama if gguf else transformers}

## Limits

{(chr(10) * 2).join(notes)}
"""


# -----------------------------------------------------------------------------


def export(config: ExportConfig) -> str:
    """Write what `config` asks for, whole or not at all; returns where. Raises UserError."""
    gguf = config.format == 'gguf'
    folder = os.path.dirname(config.out_dir) if os.path.isfile(config.out_dir) else config.out_dir
    name = os.path.basename(os.path.abspath(folder)).removeprefix('out-')
    to = os.path.normpath(config.to or f'export-{name}' + '.gguf' * gguf)
    stem, suffix = os.path.splitext(to)
    if gguf and suffix != '.gguf':
        raise UserError(f'to={config.to}: expected the name of a file that ends in .gguf')
    targets = [to, f'{stem}.md'] if gguf else [to]
    for target in targets:
        if os.path.lexists(target) and (gguf or not os.path.isdir(target) or os.listdir(target)):
            raise UserError(
                f'{target}: is there already; remove it, or name another place with --to'
            )
    path, state = checkpoint.load_from(config.out_dir)
    model, tokenizer = checkpoint.build_model(state, path), checkpoint.tokenizer_of(state)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f'{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model {model.config.vocab_size}: they do not belong together'
        )
    try:
        hf, weights = to_hf(
            model.config,
            {k: w.detach() for k, w in model.state_dict().items()},
            tokenizer.vocab_size,
        )
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None
    name, part = os.path.basename(stem if gguf else to), to + '.tmp'
    n_params = sum(w.numel() for w in weights.values())
    checkpoint.remove(part)
    os.makedirs(part)
    try:
        text = card(config, name, 'best' in os.path.basename(path), state, hf, n_params, tokenizer)
        with open(
            os.path.join(part, f'{name}.md' if gguf else 'README.md'), 'w', encoding='utf-8'
        ) as f:
            f.write(text)
        if gguf:
            write_gguf(
                os.path.join(part, f'{name}.gguf'),
                model.config,
                hf,
                weights,
                tokenizer,
                config.dtype,
                name,
            )
        else:
            write_hf(part, hf, weights, tokenizer, config.dtype)
        for file in os.listdir(part):
            with open(os.path.join(part, file), 'rb+') as f:
                os.fsync(f.fileno())
        if gguf:
            os.replace(os.path.join(part, f'{name}.gguf'), to)
            try:
                os.replace(os.path.join(part, f'{name}.md'), f'{stem}.md')
            except OSError:
                checkpoint.remove(to)  # both or neither: the next try must not find it
                raise
        else:
            if os.path.isdir(to):  # empty, and Windows renames nothing onto it
                os.rmdir(to)
            os.rename(part, to)
    except (
        OSError,
        SafetensorError,
    ) as error:  # numpy tells of a full disk by the bytes it could write
        raise UserError(
            f'{to}: could not be written, is the disk full? ({getattr(error, "strerror", None) or error})'
        ) from None
    finally:
        checkpoint.remove(part)
    print(
        f'{path} → {to}: {hf["architectures"][0]}, {n_params:,} parameters, {config.dtype}; now fill in {f"{stem}.md" if gguf else f"{to}/README.md"}'
    )
    return to


def main() -> None:
    """Export what the command line names."""
    export(
        configure(
            ExportConfig,
            description="Write a trained model in the formats that other people's tools load.",
        )
    )


if __name__ == '__main__':
    run(main)
