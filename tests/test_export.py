"""Exports against the libraries that load them (transformers, gguf, llama.cpp), and ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configurator import UserError, configure
from lyregpt import checkpoint
from lyregpt.export import ExportConfig, export, gguf_vocabulary
from lyregpt.generate import load_model
from lyregpt.pretrained import from_pretrained, is_pretrained
from lyregpt.tokenizer import (
    EOT,
    UNK,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    from_hf,
    load,
    of_pretrained,
)
from model import GPT, GPTConfig
from tests.conftest import ROOT, gpt2, script, tiny
from train import train

SHAPES = {
    'gpt2': dict(arch='gpt2'),
    'gpt2 without biases': dict(arch='gpt2', bias=False, tie_weights=False, n_ff=40),
    'modern': dict(arch='modern', n_kv_head=2),
    'modern tied': dict(arch='modern', tie_weights=True, head_dim=16, rope_theta=500.0, n_ff=40),
}
NASTY = [
    '',
    ' ',
    'The rain',
    "don't   stop\n\n\n now ",
    '\t a\r\nb',
    f'a{EOT}b',
    'naïve Ångström',
    '日本 🦇🎸 e\u0301\u200d',
    'ΌΣΟΣ ΣΑΣ\x1c\xa0x',
    'ﷺ\x00',
]
KNOWN = "a bcdefghijklmnopqrstuvwxyzTR\n\t'.<|>äöüéς日🦇"


def random_checkpoint(folder, tokenizer, **changes):
    """A small random model with a padded vocabulary; returns (out_dir, model)."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size + 7)
    model = GPT(GPTConfig(**shape | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(
            p, mean=1.0, std=0.2
        )
    state = {
        'model': model.state_dict(),
        'model_args': model.config.to_dict(),
        'tokenizer': tokenizer.state(),
        'iter_num': 7,
    }
    checkpoint.save(
        str(folder / 'best.pt'),
        state
        | {
            'best_val_loss': 2.0,
            'config': {'dataset': 'nowhere'},
            'meta': {'bytes_per_token': 4.0},
        },
    )
    return str(folder), model


def exported(folder, tokenizer, *more, **changes):
    """(where the export is, the model) of a random model."""
    out_dir, model = random_checkpoint(folder, tokenizer, **changes)
    to = f'--to={folder / ("x.gguf" if "--format=gguf" in more else "x")}'
    return export(configure(ExportConfig, [f'--out_dir={out_dir}', to, *more])), model


@pytest.fixture(scope='module')
def tokenizers(demo_text):
    class Kinds(dict):
        def __missing__(self, kind):
            return gpt2()  # skips where its files are not

    return Kinds(
        bpe=BPETokenizer.train([demo_text], 400),
        wordpiece=WordPieceTokenizer.train([demo_text], 400, lowercase=True, squeeze=True),
        lower=BPETokenizer.train([demo_text], 400, lowercase=True, squeeze=True),
        char=CharTokenizer.train([KNOWN]),
        no_end=CharTokenizer.train([KNOWN], special=(), lowercase=True, squeeze=True),
        lenient=CharTokenizer.train(['abc '], special=(EOT, UNK)),
    )


def texts_for(tokenizer):
    known = set(tokenizer.chars) if tokenizer.kind == 'char' and tokenizer.unk is None else None
    return [
        ''.join(c for c in t if known is None or set(tokenizer.normalize(c)) <= known)
        for t in NASTY
    ]


def greedy(model, tokenizer, prompt, n=30):
    ids = ([] if tokenizer.eot is None else [tokenizer.eot]) + tokenizer.encode(prompt)
    stop = [] if tokenizer.eot is None else [tokenizer.eot]
    return [
        int(t)
        for t in model.generate(
            [ids], n, temperature=0, vocab_size=tokenizer.vocab_size, stop_tokens=stop
        )
    ]


# -----------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize(
    'shape, kind',
    [
        ('gpt2', 'gpt2'),
        ('gpt2 without biases', 'no_end'),
        ('modern', 'bpe'),
        ('modern tied', 'char'),
    ],
)
def test_transformers_computes_the_same(tmp_path, tokenizers, shape, kind):
    transformers = pytest.importorskip('transformers')
    tokenizer = tokenizers[kind]
    folder, model = exported(tmp_path, tokenizer, **SHAPES[shape])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == ('GPT2LMHeadModel' if 'gpt2' in shape else 'Qwen3ForCausalLM')
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    idx = torch.randint(tokenizer.vocab_size, (3, 64))
    with torch.no_grad():
        error = (model(idx)[..., : tokenizer.vocab_size] - theirs(idx).logits).abs().max()
    print(f'{shape}: logits differ by {error:.1e} at most')
    assert error < 1e-4
    prompt = reader('the rain', return_tensors='pt')
    with torch.no_grad():
        words = theirs.generate(**prompt, do_sample=False, max_new_tokens=30)[
            0, prompt.input_ids.size(1) :
        ].tolist()
    assert words == greedy(model, tokenizer, 'the rain')


@pytest.mark.parametrize('kind', ['bpe', 'lower', 'wordpiece', 'gpt2', 'char', 'no_end', 'lenient'])
def test_transformers_reads_the_same_tokens(tmp_path, tokenizers, kind):
    transformers = pytest.importorskip('transformers')
    tokenizer = tokenizers[kind]
    folder, _ = exported(tmp_path, tokenizer, n_layer=1, n_embd=4, n_head=1)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    assert (
        len(reader) == tokenizer.vocab_size
        and reader.eos_token_id == reader.bos_token_id == tokenizer.eot
    )
    for text in texts_for(tokenizer):
        ids = tokenizer.encode(text)
        assert reader(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert reader(text).input_ids == [tokenizer.eot][tokenizer.eot is None :] + ids
        assert reader.decode(ids) == tokenizer.decode(ids)
    if tokenizer.kind == 'char' and tokenizer.unk is None:
        with pytest.raises(Exception, match='UNK'):
            reader('Ω')


def test_the_tokenizer_comes_back(tmp_path, tokenizers):
    for kind in 'bpe', 'lower', 'wordpiece', 'char', 'no_end', 'lenient', 'gpt2':
        (tmp_path / kind).mkdir()
        (tmp_path / kind / 'tokenizer.json').write_text(json.dumps(tokenizers[kind].to_hf()))
        back = load(str(tmp_path / kind / 'tokenizer.json'))
        assert (
            back.fingerprint() == tokenizers[kind].fingerprint()
            and back.eot == tokenizers[kind].eot
        )
        assert back.state() == tokenizers[kind].state() or kind == 'gpt2'
        assert all(back.encode(t) == tokenizers[kind].encode(t) for t in texts_for(back))


def test_gpt2s_merges_give_tiktokens_tokens(demo_text):
    from tokenizers import Tokenizer as Engine

    tokenizer = gpt2()
    assert tokenizer.fingerprint() == Tokenizer.fingerprint(tokenizer)
    engine = Engine.from_str(json.dumps(tokenizer.to_hf()))
    assert engine.encode(demo_text, add_special_tokens=False).ids == tokenizer.encode(demo_text)


def test_foreign_tokenizers(tmp_path):
    """Like Qwen's: other splitting, NFC, added tokens after the rest, another document end."""
    from tokenizers import (
        AddedToken,
        Regex,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers import Tokenizer as Engine

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE({c: i for i, c in enumerate(letters)} | {'ab': 256}, [('a', 'b')]))
    engine.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r'\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+'), 'isolated')
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder, engine.post_processor = (
        decoders.ByteLevel(),
        processors.ByteLevel(trim_offsets=False),
    )
    engine.add_special_tokens([AddedToken('<|im_end|>', normalized=False)])
    engine.add_tokens([AddedToken('<töol>', normalized=False)])
    engine.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = load(str(tmp_path / 'tokenizer.json'))
    assert (tokenizer.vocab_size, tokenizer.eot) == (259, 257)
    assert (
        tokenizer.encode('ab <töol>') == [256, letters.index('Ġ'), 258]
        and tokenizer.decode([258, 257]) == '<töol><|im_end|>'
    )
    assert (
        257 not in tokenizer.encode('<|im_end|>')
        and tokenizer.decode(tokenizer.encode('e\u0301 12')) == 'é 12'
    )
    tokenizer.save(str(tmp_path / 'ours.json'))
    assert load(str(tmp_path / 'ours.json')).eot == 257
    state = json.loads(engine.to_str())
    plain = {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': True,
        'use_regex': True,
    }
    for message, changes in {
        'split': {},
        'normalizer': {'pre_tokenizer': plain},
        'ignore_merges': {
            'pre_tokenizer': plain,
            'normalizer': None,
            'model': state['model'] | {'ignore_merges': True},
        },
    }.items():
        with pytest.raises(UserError, match=f'format=gguf: .*{message}'):
            gguf_vocabulary(from_hf(state | changes, '<|im_end|>'))
    Engine(models.BPE({'▁日': 0, '本': 1}, [])).save(str(tmp_path / 'other.json'))
    Engine(models.Unigram([('a', 0.0)])).save(str(tmp_path / 'unigram.json'))
    for name, message in ('other', 'only byte-level BPE'), ('unigram', 'Unigram'):
        with pytest.raises(UserError, match=f'{name}.json: .*{message}'):
            load(str(tmp_path / f'{name}.json'))


def test_llama_cpp_has_no_wordpiece_of_bytes(tmp_path, tokenizers):
    with pytest.raises(UserError, match='format=gguf: .*WordPiece.*--format=hf'):
        exported(tmp_path, tokenizers['wordpiece'], '--format=gguf', n_layer=1, n_embd=4, n_head=1)
    assert not list(tmp_path.glob('x.gguf*'))


def test_gpt2s_older_two_files(tmp_path, demo_text):
    ours = BPETokenizer.train([demo_text], 400)
    model = ours.state()['model']['model']
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "vocab_size": 50257}')
    (tmp_path / 'merges.txt').write_text(
        '#version: 0.2\n' + '\n'.join(' '.join(m) for m in model['merges'])
    )
    with pytest.raises(UserError, match='vocab.json: no such file'):
        of_pretrained(str(tmp_path))
    (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
    found = of_pretrained(str(tmp_path))
    assert found.fingerprint() == ours.fingerprint() and found.to_hf() == ours.to_hf()
    assert all(found.encode(t) == ours.encode(t) for t in NASTY)
    (tmp_path / 'merges.txt').unlink()
    with pytest.raises(UserError, match='vocab.json: not a tokenizer file'):
        of_pretrained(str(tmp_path))


# -----------------------------------------------------------------------------
# The way back


@pytest.mark.parametrize('shape', SHAPES)
def test_export_and_back(tmp_path, tokenizers, shape):
    folder, model = exported(tmp_path, tokenizers['bpe'], **SHAPES[shape])
    assert is_pretrained(folder)
    again, tokenizer, _ = load_model(init_from=folder, device='cpu')
    assert (
        tokenizer.state() == tokenizers['bpe'].state()
        and again.config.vocab_size == tokenizer.vocab_size
    )
    again = from_pretrained(folder).eval()
    idx = torch.randint(tokenizer.vocab_size, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(
            again(idx), model(idx)[..., : tokenizer.vocab_size], atol=1e-5, rtol=1e-5
        )
    assert greedy(again, tokenizer, 'the rain') == greedy(model, tokenizer, 'the rain')


def test_fine_tuning_an_exported_model(tmp_path, trained, chars):
    folder = export(ExportConfig(out_dir=str(trained), to=str(tmp_path / 'x')))
    train(
        tiny(chars, tmp_path / 'out', f'--init_from={folder}', '--max_iters=1', '--eval_interval=1')
    )
    _, state = checkpoint.load_from(str(tmp_path / 'out'), best=False)
    assert state['tokenizer'] == checkpoint.load_from(str(trained))[1]['tokenizer']
    before, after = checkpoint.load_from(str(trained))[1]['best_val_loss'], state['best_val_loss']
    assert abs(after - before) < 0.2, 'it goes on where the other stopped'
    (tmp_path / 'wide').mkdir()
    folder, _ = exported(tmp_path / 'wide', load(str(chars / 'meta.json')), **SHAPES['modern tied'])
    train(
        tiny(
            chars,
            tmp_path / 'out',
            f'--init_from={folder}',
            '--max_iters=1',
            '--eval_interval=1',
            '--n_head=4',
        )
    )
    _, state = checkpoint.load_from(str(tmp_path / 'out'), best=False)
    assert (state['model_args']['head_dim'], state['model_args']['rope_theta']) == (16, 500.0)
    train(tiny(chars, tmp_path / 'out', '--init_from=resume', '--max_iters=2', '--n_head=4'))


def test_a_dataset_of_other_tokens_is_refused(tmp_path, chars, tokenizers):
    folder, _ = exported(tmp_path, tokenizers['bpe'], **SHAPES['modern'])
    with pytest.raises(
        UserError,
        match='char tokens, which are not those of .*x: '
        'prepare it with --tokenizer=.*x/tokenizer.json',
    ):
        train(tiny(chars, tmp_path / 'out', f'--init_from={folder}', '--n_layer=2'))


def test_a_qwen3_as_it_is_handed_out(tmp_path):
    """bfloat16, in shards, its heads wider than its width allows, a theta of a million."""
    transformers = pytest.importorskip('transformers')
    shape = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    rope = {'rope_type': 'default', 'rope_theta': 1e6}
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **shape, max_position_embeddings=64, rope_parameters=rope, tie_word_embeddings=True
        )
    )
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=0.2, std=0.3)
    theirs.bfloat16().save_pretrained(tmp_path, max_shard_size='20KB')
    assert (tmp_path / 'model.safetensors.index.json').exists()
    ours = from_pretrained(str(tmp_path)).eval()
    assert (ours.config.head_dim, ours.config.rope_theta, ours.config.tie_weights) == (
        16,
        1e6,
        True,
    )
    idx = torch.randint(300, (2, 64))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
    with pytest.raises(
        UserError, match="tokenizer.json: no such file, and 300 tokens are not GPT-2's"
    ):
        of_pretrained(str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    for key, value in {
        'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 1e6},
        'rope_scaling': {'type': 'linear', 'factor': 2},
        'use_sliding_window': True,
        'attention_bias': True,
        'hidden_act': 'gelu',
        'rms_norm_eps': 1e-5,
        'quantization_config': {'bits': 4},
    }.items():
        (tmp_path / 'config.json').write_text(json.dumps(config | {key: value}))
        with pytest.raises(
            ValueError,
            match=f'config.json: {key.replace("parameters", "scaling")}=.* cannot be computed here',
        ):
            from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    next(tmp_path.glob('model-00002*')).unlink()
    with pytest.raises(ValueError, match='index.json: damaged'):
        from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    'key, value',
    [
        ('activation_function', 'relu'),
        ('layer_norm_epsilon', 1e-6),
        ('scale_attn_by_inverse_layer_idx', True),
        ('scale_attn_weights', False),
    ],
)
def test_gpt2s_that_differ_are_refused(tmp_path, key, value):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2', key: value}))
    with pytest.raises(
        ValueError, match=f'config.json: {key}={value} cannot be computed here, expected'
    ):
        from_pretrained(str(tmp_path))


def test_folders_that_do_not_fit(tmp_path, tokenizers):
    from safetensors.torch import load_file, save_file

    folder, model = exported(tmp_path, tokenizers['bpe'], **SHAPES['modern'])
    config, path = (
        json.loads((tmp_path / 'x' / 'config.json').read_text()),
        tmp_path / 'x' / 'model.safetensors',
    )
    for key in (
        'hidden_size',
        'num_hidden_layers',
        'vocab_size',
        'max_position_embeddings',
        'intermediate_size',
        'head_dim',
    ):
        (tmp_path / 'x' / 'config.json').write_text(json.dumps(config | {key: 10**12}))
        with pytest.raises(ValueError, match='config.json|model.safetensors') as found:
            from_pretrained(folder)
        assert '\n' not in str(found.value), key
    (tmp_path / 'x' / 'config.json').write_text(json.dumps(config))
    weights = load_file(path)
    for name, other in (
        ('model.layers.0.self_attn.k_proj.weight', torch.ones(16, 40)),
        ('model.norm.weight', torch.tensor(1.0)),
    ):
        save_file(weights | {name: other}, path)
        with pytest.raises(
            ValueError, match=f'model.safetensors: {name} is .*, which does not fit'
        ):
            from_pretrained(folder)
    path.unlink()
    assert is_pretrained(folder)
    with pytest.raises(
        ValueError, match='none of model.safetensors, .*pytorch_model.bin.index.json is there'
    ):
        from_pretrained(folder)
    names = sorted(weights)
    for i in range(2):
        torch.save({name: weights[name] for name in names[i::2]}, tmp_path / 'x' / f'{i}.bin')
    (tmp_path / 'x' / 'pytorch_model.bin.index.json').write_text(
        json.dumps({'weight_map': {name: f'{i % 2}.bin' for i, name in enumerate(names)}})
    )
    assert torch.equal(
        from_pretrained(folder).state_dict()['lm_head.weight'], weights['lm_head.weight']
    )
    torch.save({1: torch.ones(1)}, tmp_path / 'x' / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='pytorch_model.bin: damaged'):
        from_pretrained(folder)


# -----------------------------------------------------------------------------
# GGUF


@pytest.mark.parametrize(
    'shape, kind', [('gpt2 without biases', 'bpe'), ('modern', 'char'), ('modern tied', 'no_end')]
)
def test_gguf_holds_the_model(tmp_path, tokenizers, shape, kind):
    gguf = pytest.importorskip('gguf')
    tokenizer = tokenizers[kind]
    path, model = exported(tmp_path, tokenizer, '--format=gguf', **SHAPES[shape])
    file = gguf.GGUFReader(path)
    field = {name: f.contents() for name, f in file.fields.items()}
    arch, spare = field['general.architecture'], tokenizer.eot is None
    assert (
        arch == ('gpt2' if 'gpt2' in shape else 'qwen3')
        and field[f'{arch}.block_count'] == 2
        and field[f'{arch}.context_length'] == 64
    )
    tokens, eot = field['tokenizer.ggml.tokens'], field['tokenizer.ggml.eos_token_id']
    assert len(tokens) == len(set(tokens)) == tokenizer.vocab_size + spare and tokens[eot] == EOT
    assert (
        field['tokenizer.ggml.token_type'][eot] == gguf.TokenType.CONTROL
        and field['tokenizer.ggml.add_bos_token'] is not spare
    )
    tensors = {t.name: torch.tensor(t.data) for t in file.tensors}
    own = model.state_dict()
    assert torch.equal(
        tensors['token_embd.weight'][: tokenizer.vocab_size],
        own['transformer.wte.weight'][: tokenizer.vocab_size],
    )
    assert ('output.weight' in tensors) is not model.config.tie_weights and len(
        tensors['token_embd.weight']
    ) == len(tokens)
    assert torch.equal(tensors['blk.1.ffn_down.weight'], own['transformer.h.1.mlp.c_proj.weight'])
    q = tensors['blk.0.attn_qkv.weight' if arch == 'gpt2' else 'blk.0.attn_q.weight']
    assert torch.equal(q, own['transformer.h.0.attn.c_attn.weight'][: len(q)])


def test_gguf_spells_characters_in_bytes(tmp_path, tokenizers):
    gguf = pytest.importorskip('gguf')
    path, _ = exported(tmp_path, tokenizers['char'], '--format=gguf', n_layer=1)
    field = gguf.GGUFReader(path).fields
    rank = {tuple(m.split(' ')): i for i, m in enumerate(field['tokenizer.ggml.merges'].contents())}
    ids = {token: i for i, token in enumerate(field['tokenizer.ggml.tokens'].contents())}
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers

    parts = {
        part for a, b in rank for part in (a, b, a + b)
    } - ids.keys()  # of characters: this library wants ids for them, llama.cpp does not
    engine = Engine(
        models.BPE(ids | {part: len(ids) + i for i, part in enumerate(sorted(parts))}, list(rank))
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert engine.encode(KNOWN * 3).ids == tokenizers['char'].encode(KNOWN * 3)


@pytest.mark.parametrize('dtype, size', [('bfloat16', 2), ('float16', 2)])
def test_half_as_large(tmp_path, tokenizers, dtype, size):
    gguf = pytest.importorskip('gguf')
    folder, model = exported(tmp_path, tokenizers['bpe'], f'--dtype={dtype}', **SHAPES['modern'])
    again = from_pretrained(folder)
    for name, w in model.state_dict().items():
        torch.testing.assert_close(
            again.state_dict()[name],
            w[: len(again.state_dict()[name])].to(getattr(torch, dtype)).float(),
            atol=0,
            rtol=0,
        )
    path = export(
        ExportConfig(out_dir=str(tmp_path), format='gguf', to=str(tmp_path / 'y.gguf'), dtype=dtype)
    )
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert found['output.weight'].tensor_type.name == {'bfloat16': 'BF16', 'float16': 'F16'}[dtype]
    assert found['output.weight'].n_bytes == size * found['output.weight'].n_elements
    assert found['output_norm.weight'].tensor_type.name == 'F32'


@pytest.mark.long
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kind', ['bpe', 'gpt2', 'char', 'no_end'])
def test_llama_cpp_writes_the_same(tmp_path, tokenizers, shape, kind):
    """Run with LLAMA_PYTHON=…/bin/python, a Python that has llama-cpp-python."""
    python = os.environ.get('LLAMA_PYTHON', sys.executable)
    if subprocess.run([python, '-c', 'import llama_cpp'], capture_output=True).returncode:
        pytest.skip(
            'llama-cpp-python is not installed here; name a Python that has it in LLAMA_PYTHON'
        )
    tokenizer = tokenizers[kind]
    path, model = exported(tmp_path, tokenizer, '--format=gguf', **SHAPES[shape])
    texts = 'the rain', "don't stop\n\nnow", ' äöü 日🦇 ...'
    prompts = [tokenizer.normalize(text) for text in texts]
    done = subprocess.run(
        [python, str(ROOT / 'tests' / 'llama_check.py'), path, '30', *prompts],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for prompt, line in zip(prompts, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        ids = [tokenizer.eot][tokenizer.eot is None :] + tokenizer.encode(prompt)
        assert found['prompt'] == ids
        with torch.no_grad():
            error = (
                (
                    model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
                    - torch.tensor(found['logits'])[: tokenizer.vocab_size]
                )
                .abs()
                .max()
            )
        print(f'{shape}, {kind}: logits differ by {error:.1e} at most')
        assert found['written'] == greedy(model, tokenizer, prompt)
        assert error < (2e-2 if 'gpt2' in shape else 1e-4)  # its GELU is a table in float16


# -----------------------------------------------------------------------------
# What else is written, and mistakes


def test_the_card(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for form, path in ('hf', 'README.md'), ('gguf', '.md'):
        to = export(configure(ExportConfig, [f'--out_dir={trained}', f'--format={form}']))
        assert to == f'export-{trained.name}' + '.gguf' * (form == 'gguf')
        text = (
            tmp_path / to / path if form == 'hf' else tmp_path / to.replace('.gguf', path)
        ).read_text(encoding='utf-8')
        assert (
            text.startswith('---\nlibrary_name: ')
            and 'license: other' in text
            and text.count('FILL IN') >= 4
        )
        assert (
            'nats per token' in text
            and 'bits per byte' in text
            and '| train |' in text
            and '32 tokens' in text
        )
        assert ('FROM ./' in text) is (form == 'gguf') and to.removesuffix('.gguf') in text
    assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            dict(arch='modern', position='sinusoidal'),
            'position=sinusoidal: .*position=rope could be exported',
        ),
        (dict(arch='modern', mlp='relu2'), 'mlp=relu2: .*mlp=swiglu'),
        (dict(arch='modern', bias=True), 'bias=True'),
        (dict(arch='modern', qk_norm=False), 'qk_norm=False'),
        (dict(arch='gpt2', n_kv_head=2), 'n_kv_head=2'),
        (dict(arch='gpt2', head_dim=16), 'head_dim=16'),
    ],
)
def test_shapes_that_nobody_loads(tmp_path, tokenizers, changes, message):
    with pytest.raises(UserError, match=message):
        exported(tmp_path, tokenizers['char'], **changes)
    assert not (tmp_path / 'x').exists() and not (tmp_path / 'x.tmp').exists()


def test_what_is_there_stays(tmp_path, trained):
    (tmp_path / 'empty').mkdir()
    export(ExportConfig(out_dir=str(trained), to=str(tmp_path / 'empty')))
    assert (tmp_path / 'empty' / 'config.json').exists()
    for form, name in (
        ('hf', 'empty'),
        ('hf', 'd.gguf'),
        ('gguf', 'a.gguf'),
        ('gguf', 'b.gguf'),
        ('gguf', 'c.gguf'),
        ('gguf', 'd.gguf'),
    ):
        (tmp_path / 'd.gguf').touch()
        (tmp_path / 'a.gguf').write_text('mine')
        (tmp_path / 'b.md').write_text('mine')
        (tmp_path / 'c.gguf').mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f'{name[0]}.* already exists'):
            export(ExportConfig(out_dir=str(trained), to=str(tmp_path / name), format=form))
    assert (tmp_path / 'a.gguf').read_text() == (tmp_path / 'b.md').read_text() == 'mine' and not (
        tmp_path / 'b.gguf'
    ).exists()


def test_nothing_half_written(tmp_path, trained, monkeypatch):
    def fails(*args):
        raise OSError(28, 'No space left on device')

    for form, name, to in (
        ('hf', 'lyregpt.export.save_file', 'x'),
        ('gguf', 'gguf.GGUFWriter.write_tensors_to_file', 'x.gguf'),
        ('gguf', 'os.replace', 'x.gguf'),
    ):
        if name == 'os.replace':  # of the two files the second one
            monkeypatch.undo()
            replace = os.replace
            monkeypatch.setattr(name, lambda a, b: fails() if b.endswith('.md') else replace(a, b))
        else:
            monkeypatch.setattr(name, fails)
        with pytest.raises(UserError, match='x.*: could not be written, .*No space left'):
            export(ExportConfig(out_dir=str(trained), to=str(tmp_path / to), format=form))
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_is_known(tmp_path, chars, trained):
    text = Path(
        export(ExportConfig(out_dir=str(trained), to=str(tmp_path / 'a'))), 'README.md'
    ).read_text()
    assert 'only the words' in text and 'began from' not in text and 'trained with lyreGPT' in text
    out = tmp_path / 'out'
    train(tiny(chars, out, f'--init_from={trained}', '--max_iters=1', '--eval_interval=1'))
    train(tiny(chars, out, '--init_from=resume', '--max_iters=2', '--eval_interval=1'))
    text = Path(
        export(ExportConfig(out_dir=str(out), to=str(tmp_path / 'b'))), 'README.md'
    ).read_text()
    splits = json.loads((chars / 'meta.json').read_text())['splits']
    assert (
        'only the words' not in text
        and f'| began from | {trained.name} |' in text
        and f'| train | {splits["train"]["documents"]:,} |' in text
    )


def test_foreign_checkpoints(tmp_path, trained):
    whole = checkpoint.load(str(trained / 'best.pt'))
    path = str(tmp_path / 'best.pt')
    strange = {
        'config': {'init_from': None, 'dataset': None},
        'meta': {'splits': 5, 'bytes_per_token': 'x'},
    }
    for i, changes in enumerate(({'best_val_loss': None, 'iter_num': None}, strange)):
        checkpoint.save(path, whole | changes)
        assert (
            'None'
            not in Path(
                export(ExportConfig(out_dir=path, to=str(tmp_path / f'x{i}'))), 'README.md'
            ).read_text()
        )
    for changes in {'config': None}, {'meta': 5}, {'tokenizer': 5}:
        checkpoint.save(path, whole | changes)
        with pytest.raises(UserError, match=f'best.pt: its {min(changes)} is not a dictionary'):
            export(ExportConfig(out_dir=path, to=str(tmp_path / 'y')))


def test_mistakes_get_one_line(tmp_path, trained):
    for words, message in (
        ([f'--out_dir={tmp_path}/nowhere'], 'no such folder'),
        ([f'--out_dir={trained}', '--format=onnx'], 'expected one of hf, gguf'),
        ([f'--out_dir={trained}', '--format=gguf', f'--to={tmp_path}/x'], 'ends in .gguf'),
    ):
        with pytest.raises(UserError, match=message):
            export(configure(ExportConfig, words))
    (tmp_path / 'best.pt').write_bytes(b'PK no checkpoint')
    done = script('-m', 'lyregpt', 'export', f'--out_dir={tmp_path}', f'--to={tmp_path}/x')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'damaged' in done.stderr, (
        done.stderr
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['best.pt']


def test_damaged_folders(tmp_path, trained):
    folder = tmp_path / 'x'
    export(ExportConfig(out_dir=str(trained), to=str(folder)))
    whole = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(whole[:-100])
    with pytest.raises(UserError, match='model.safetensors: damaged'):
        load_model(init_from=str(folder), device='cpu')
    (folder / 'model.safetensors').write_bytes(whole)
    for name, text, message in (
        ('tokenizer.json', '{"model": {"type": "BPE"', 'tokenizer.json: not a tokenizer file'),
        ('config.json', '{"model_type": "llama"}', 'expected gpt2 or qwen3'),
    ):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            load_model(init_from=str(folder), device='cpu')
