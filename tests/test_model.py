import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from lyregpt.optim import Muon, configure_optimizers, orthogonalize
from lyregpt.pretrained import from_pretrained
from lyregpt.quantize import quantize_model
from model import GPT, GPTConfig, LinearCrossEntropy, sample_token

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=50)
VARIANTS = [
    dict(arch='gpt2'),
    dict(arch='gpt2', bias=False),
    dict(arch='modern'),
    dict(arch='modern', n_kv_head=2, head_dim=12),
    dict(arch='modern', n_kv_head=1, tie_weights=True),
    dict(arch='modern', mlp='relu2', norm='layernorm'),
    dict(arch='modern', position='sinusoidal', qk_norm=False),
    dict(arch='gpt2', position='rope'),
]


def random_model(**changes):
    """A model whose every weight is random, also those that start at zero or one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(
            p, mean=1.0, std=0.2
        )
    return model


# -----------------------------------------------------------------------------
# Against what nobody here wrote


def test_gpt2_logits_equal_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=24, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(50, (3, 24))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (ours(idx) - expected).abs().max() < 1e-4
        loss = theirs(idx, labels=idx).loss
        targets = torch.cat([idx[:, 1:], torch.full((3, 1), -1)], dim=1)
        assert abs(ours(idx, targets) - loss) < 1e-4
    greedy = theirs.generate(idx[:1, :5], max_new_tokens=15, do_sample=False, pad_token_id=0)[
        0, 5:
    ].tolist()
    assert [int(t) for t in ours.generate(idx[:1, :5], 15, temperature=0)] == greedy


@pytest.mark.parametrize('changes', [dict(), dict(n_kv_head=2), dict(tie_weights=True)])
def test_modern_logits_equal_transformers_qwen3(changes):
    transformers = pytest.importorskip('transformers')
    ours = random_model(arch='modern', **changes)
    c = ours.config
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=c.n_ff,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=c.n_kv_head,
            head_dim=8,
            rms_norm_eps=1e-6,
            max_position_embeddings=24,
            rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta},
            tie_word_embeddings=c.tie_weights,
            attention_bias=False,
        )
    ).eval()
    own = ours.state_dict()
    names = {
        'model.embed_tokens.weight': own['transformer.wte.weight'],
        'model.norm.weight': own['transformer.ln_f.weight'],
        'lm_head.weight': own['lm_head.weight'],
    }
    for i in range(2):
        h, t = f'transformer.h.{i}.', f'model.layers.{i}.'
        q, k, v = own[h + 'attn.c_attn.weight'].split([32, 8 * c.n_kv_head, 8 * c.n_kv_head])
        gate, up = own[h + 'mlp.c_fc.weight'].chunk(2)
        names |= {
            t + 'self_attn.q_proj.weight': q,
            t + 'self_attn.k_proj.weight': k,
            t + 'self_attn.v_proj.weight': v,
            t + 'self_attn.o_proj.weight': own[h + 'attn.c_proj.weight'],
            t + 'self_attn.q_norm.weight': own[h + 'attn.q_norm.weight'],
            t + 'self_attn.k_norm.weight': own[h + 'attn.k_norm.weight'],
            t + 'mlp.gate_proj.weight': gate,
            t + 'mlp.up_proj.weight': up,
            t + 'mlp.down_proj.weight': own[h + 'mlp.c_proj.weight'],
            t + 'input_layernorm.weight': own[h + 'ln_1.weight'],
            t + 'post_attention_layernorm.weight': own[h + 'ln_2.weight'],
        }
    theirs.load_state_dict(names)
    idx = torch.randint(50, (3, 24))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4


# -----------------------------------------------------------------------------
# First principles


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_causality(changes):
    model = random_model(**changes)
    a = torch.randint(50, (2, 24))
    b = a.clone()
    b[:, 15:] = torch.randint(50, (2, 9))
    with torch.no_grad():
        one, two = model(a), model(b)
    assert (one[:, :15] - two[:, :15]).abs().max() < 1e-5 and (
        one[:, 15:] - two[:, 15:]
    ).abs().max() > 1e-3


@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_every_parameter_learns(changes):
    model = random_model(**changes)
    model(torch.randint(50, (4, 24)), torch.randint(50, (4, 24))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gradients_by_finite_differences():
    model = random_model(arch='modern').double()
    idx, targets = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))

    def loss():
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())

    loss().backward()
    for name in (
        'transformer.wte.weight',
        'transformer.h.0.attn.c_attn.weight',
        'transformer.h.1.mlp.c_fc.weight',
        'transformer.h.0.attn.q_norm.weight',
    ):
        p = dict(model.named_parameters())[name]
        flat, grad = p.data.view(-1), p.grad.view(-1)
        at = int(grad.abs().argmax())
        with torch.no_grad():
            flat[at] += 1e-5
            up = loss()
            flat[at] -= 2e-5
            down = loss()
            flat[at] += 1e-5
        assert abs((up - down) / 2e-5 - grad[at]) < 1e-6 * max(1, abs(grad[at])), name


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_chunked_loss_equals_cross_entropy(dtype, tolerance):
    torch.manual_seed(0)
    vocab = 70_000  # many chunks
    x, w = torch.randn(300, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True)
    targets = torch.randint(vocab, (300,))
    targets[::7] = -1
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = LinearCrossEntropy.apply(x, w, targets, True)
        (loss / 100).backward()
        got = loss.item(), x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    expected = F.cross_entropy(x @ w.t(), targets, ignore_index=-1, reduction='sum')
    (expected / 100).backward()
    assert abs(got[0] / expected.item() - 1) < tolerance
    for a, b in zip(got[1:], (x.grad, w.grad)):
        assert (a - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_overfits_one_batch(arch, optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, **SMALL))
    idx = torch.randint(50, (4, 25))
    optimizers = configure_optimizers(model, 0.0, 1e-2, (0.9, 0.95), optimizer)
    assert set(optimizers) == ({'adamw', 'muon'} if optimizer == 'muon' else {'adamw'})
    first = model(idx[:, :-1], idx[:, 1:]).item()
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        for o in optimizers.values():
            o.step()
            o.zero_grad()
    assert abs(first - math.log(50)) < 0.3 and loss.item() < 0.1


def test_every_parameter_has_one_optimizer():
    model = GPT(GPTConfig(arch='modern', **SMALL))
    held = [
        p
        for o in configure_optimizers(model, 0.1, 1e-3, (0.9, 0.95)).values()
        for g in o.param_groups
        for p in g['params']
    ]
    assert len(held) == len(set(map(id, held))) == len(list(model.parameters()))


def test_muon_orthogonalizes_each_part():
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 16, 40)).float())
    assert singular.min() > 0.5 and singular.max() < 1.3
    fused = torch.nn.Parameter(torch.zeros(48, 16))
    fused.grad = (
        torch.randn(48, 16) * torch.tensor([100.0, 1.0, 0.01]).repeat_interleave(16)[:, None]
    )
    Muon([{'params': [fused], 'rows': [16, 16, 16]}], lr=1.0).step()
    sizes = [part.norm().item() for part in fused.data.split(16)]
    assert max(sizes) / min(sizes) < 1.2, 'q, k and v move alike, however different their gradients'
    rms = fused.data.square().mean().sqrt().item()
    assert 0.14 < rms < 0.26, 'the size of an AdamW update: 0.2 of the learning rate'


def test_counts_and_crop():
    model = random_model(arch='gpt2')
    n = 50 * 32 + 24 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert (
        model.num_params() == n == sum(p.numel() for p in model.parameters())
        and model.num_params(embeddings=False) == n - 24 * 32
    )
    idx = torch.randint(50, (1, 10))
    for changes in VARIANTS:
        model = random_model(**changes)
        with torch.no_grad():
            before = model(idx)
            model.crop_block_size(10)
            assert torch.equal(model(idx), before) and model.config.block_size == 10
        with pytest.raises(ValueError, match='block_size=11'):
            model.crop_block_size(11)


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(
        GPTConfig(arch='modern', n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=256)
    )
    idx = torch.randint(256, (2, 64))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    assert abs(counter.get_total_flops() / (model.flops_per_token() * 128) - 1) < 0.01


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(n_head=5), 'n_head=5 does not divide n_embd=32'),
        (dict(dropout=2), 'dropout=2'),
        (dict(arch='gpt3'), 'arch=gpt3'),
        (dict(n_kv_head=3), 'n_kv_head=3'),
        (dict(n_layer=0), 'n_layer=0'),
        (dict(n_embd=-5), 'n_embd=-5: expected at least 1'),
        (dict(mlp='tanh'), 'mlp=tanh'),
        (dict(arch='modern', n_head=32), 'even'),
    ],
)
def test_bad_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | changes)


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('config.json', '{"model_type": "llama"}', 'expected gpt2'),
        ('config.json', '{', 'config.json'),
        ('x', '', 'config.json'),
    ],
)
def test_foreign_folders(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match='neither a folder nor one of'):
        from_pretrained('gpt2-huge')


# -----------------------------------------------------------------------------
# Writing


def naive(model, prompt, n, **options):
    """Generation without a cache, one row at a time: what the cached generation must equal."""
    row, out, dice = list(prompt), [], torch.Generator().manual_seed(options.pop('seed', 1337))
    chances = torch.rand(64, generator=dice)
    size = model.config.block_size
    for i in range(n):
        if i and i % 64 == 0:
            chances = torch.rand(64, generator=dice)
        if len(row) > size:
            row = row[-(size // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([row]))[:, -1]
        token = int(
            sample_token(
                logits,
                chances[i % 64 : i % 64 + 1],
                options.get('temperature', 1.0),
                options.get('top_k'),
                options.get('top_p'),
            )
        )
        row.append(token)
        out.append(token)
    return out


@pytest.mark.parametrize(
    'options',
    [
        dict(temperature=0),
        dict(temperature=0.9),
        dict(top_k=5),
        dict(top_p=0.7),
        dict(top_k=20, top_p=0.8, temperature=1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize('changes', VARIANTS, ids=str)
def test_cached_equals_uncached_batched_equals_unbatched(changes, options):
    model = random_model(**changes)
    prompts = [
        [1, 2, 3],
        [7],
        list(range(20)),
        list(range(40)),
    ]  # the last is longer than the context
    together = torch.stack(list(model.generate(prompts, 70, seed=5, **options)), dim=1).tolist()
    for i, prompt in enumerate(prompts):
        alone = [int(t) for t in model.generate([prompt], 70, seed=5 + i, **options)]
        assert together[i] == alone
        assert alone == naive(model, prompt, 70, seed=5 + i, **options)


def test_stop_tokens_and_iteration():
    model = random_model(arch='modern')
    free = torch.stack(list(model.generate([[1], [2]], 40)), dim=1)
    stop = int(free[0, 10])
    first = free[0].tolist().index(stop) + 1
    bound = torch.stack(list(model.generate([[1], [2]], 40, stop_tokens=[stop])), dim=1)
    for row in range(2):
        at = free[row].tolist().index(stop) if stop in free[row].tolist() else 39
        assert (
            bound[row, : at + 1].tolist() == free[row, : at + 1].tolist()
            and (bound[row, at + 1 :] == -1).all()
        )
    assert (
        len(list(model.generate([[1]], 40, stop_tokens=[stop]))) == first
        and list(model.generate([[1]], 0)) == []
    )


def test_sampling_options():
    model = random_model(arch='modern')
    assert [int(t) for t in model.generate([[1]], 30, top_k=1)] == [
        int(t) for t in model.generate([[1]], 30, temperature=0)
    ]
    assert [int(t) for t in model.generate([[1]], 30, top_k=0, top_p=0.0)] == [
        int(t) for t in model.generate([[1]], 30)
    ]
    assert max(int(t) for t in model.generate([[1]], 60, temperature=5.0, vocab_size=10)) < 10
    seen = [int(t) for t in model.generate([[1]], 23, temperature=0, repetition_penalty=1e9)]
    assert len(set(seen)) == len(seen)
    assert [int(t) for t in model.generate([[1]], 9, seed=1)] != [
        int(t) for t in model.generate([[1]], 9, seed=2)
    ]


def test_draw_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    n = 40_000
    chance = (torch.arange(n) + 0.5) / n
    for top_k, top_p, keep in (
        (None, None, [0, 1, 2, 3]),
        (2, None, [1, 2]),
        (None, 0.85, [1, 2]),
        (3, 0.99, [0, 1, 2]),
    ):
        counts = (
            torch.bincount(
                sample_token(logits.expand(n, 4), chance, 0.7, top_k, top_p), minlength=4
            )
            / n
        )
        expected = torch.zeros(4)
        expected[keep] = (logits[0, keep] / 0.7).softmax(0)
        assert (counts - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(temperature=-1), 'temperature=-1'),
        (dict(top_p=1.5), 'top_p=1.5'),
        (dict(top_k=-1), 'top_k=-1'),
        (dict(repetition_penalty=0), 'repetition_penalty=0'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        next(random_model().generate([[1]], 5, **options))
    with pytest.raises(ValueError, match='prompt is empty'):
        next(random_model().generate([[]], 5))


def test_generation_leaves_training_dice_alone():
    model = random_model()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    list(model.generate([[1]], 5))
    assert torch.equal(torch.rand(3), expected)


# -----------------------------------------------------------------------------
# Writing fast


@pytest.mark.parametrize('changes', VARIANTS[:4])
def test_packed_and_int8_layers_say_the_same(changes):
    prompt = [[1, 2, 3], [7] * 9]
    model = random_model(**changes)
    with torch.inference_mode():
        expected = model(torch.tensor([[4, 8, 15, 16, 23]]))
    words = torch.stack(list(model.generate(prompt, 40, temperature=0)))
    with torch.inference_mode():
        torch.testing.assert_close(
            quantize_model(model)(torch.tensor([[4, 8, 15, 16, 23]])),
            expected,
            atol=1e-4,
            rtol=1e-4,
        )
    assert torch.equal(torch.stack(list(model.generate(prompt, 40, temperature=0))), words)
    model = quantize_model(random_model(**changes), 'int8')
    with torch.inference_mode():
        error = (model(torch.tensor([[4, 8, 15, 16, 23]])) - expected).std() / expected.std()
    assert 0 < error < 0.1, 'int8 rounds, a little'
    assert all(not isinstance(m, torch.nn.Linear) for m in model.modules()), 'every matrix'
    list(model.generate(prompt, 5))


@pytest.mark.parametrize('kind', [None, 'int8'])
def test_the_loss_of_a_model_that_only_writes(kind):
    model = random_model().eval()
    idx, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    targets[0, :5] = -1
    with torch.no_grad():
        whole = model(idx, targets)
        assert quantize_model(model, kind)(idx, targets) == pytest.approx(
            whole.item(), abs=0.05 if kind else 1e-5
        )


def test_quantize_kinds_that_cannot_be():
    with pytest.raises(ValueError, match='int4'):
        quantize_model(random_model(), 'int4')
    with pytest.raises(ValueError, match='works on cpu and cuda, not on meta'):
        quantize_model(random_model().to('meta'), 'int8')


@pytest.mark.parametrize('changes', [dict(arch='modern', n_kv_head=2), dict(arch='gpt2')])
def test_compiled_step_writes_the_same(changes, monkeypatch):
    """The static cache through torch.compile's tracing; a long test adds its code generation."""
    compile, graphs = torch.compile, []
    monkeypatch.setattr(
        torch,
        'compile',
        lambda f, mode: compile(
            f, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True
        ),
    )
    for prompts in ([[1, 2, 3]] * 3, [[1], [2, 3, 4, 5]]):
        kwargs = dict(
            max_new_tokens=40, temperature=0.9, top_k=20
        )  # longer than the context: it slides
        model = random_model(**changes)
        graphs.clear()
        plain = torch.stack(list(model.generate(prompts, **kwargs)))
        assert torch.equal(
            torch.stack(list(model.generate(prompts, compile=True, **kwargs))), plain
        )
        assert len(graphs) == 1


@pytest.mark.long
def test_compiled_step_for_real():
    model = random_model(arch='modern')
    plain = torch.stack(list(model.generate([[1, 2, 3]] * 2, 40, temperature=0)))
    assert torch.equal(
        torch.stack(list(model.generate([[1, 2, 3]] * 2, 40, temperature=0, compile=True))), plain
    )


@pytest.mark.parametrize('changes', [dict(arch='gpt2'), dict(arch='modern')])
def test_bfloat16_training_on_a_cpu_has_autocasts_gradients(changes, monkeypatch):
    """The gradients of our linear layer, which casts its weights again, are nn.Linear's."""

    def gradients():
        model = random_model(**changes)
        idx = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    ours = gradients()
    monkeypatch.setattr(model_module.Linear, 'forward', torch.nn.Linear.forward)
    for name, theirs in gradients().items():
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(
            ours[name], theirs, atol=2e-2 * theirs.abs().max().item(), rtol=2e-2, msg=name
        )
