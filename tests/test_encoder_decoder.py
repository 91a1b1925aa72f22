"""encoder_decoder.py beside torch.nn.Transformer and exhaustive search, answer.py as a user runs it."""

import itertools
import math

import pytest
import torch

from encoder_decoder import Answer, EncoderDecoder, EncoderDecoderConfig


def small(seed=0, **knobs):
    torch.manual_seed(seed)
    model = EncoderDecoder(EncoderDecoderConfig(**dict(vocab_size=30, block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0) | knobs))
    for p in model.parameters():  # norms and biases too, so that each is seen to be in its place
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model.eval()


def rows(*lengths, vocab=30, seed=1):
    """Random rows of these lengths, padded with -1."""
    dice = torch.Generator().manual_seed(seed)
    out = torch.full((len(lengths), max(lengths)), -1)
    for row, n in zip(out, lengths):
        row[:n] = torch.randint(1, vocab, (n,), generator=dice)
    return out


def theirs(model):
    """torch.nn.Transformer with the model's weights; behind the paper's blocks, which end in a norm, there is no other."""
    c, nn = model.config, torch.nn
    made = nn.Transformer(c.n_embd, c.n_head, c.n_layer, c.n_layer, c.n_ff, dropout=0.0, batch_first=True, norm_first=c.norm_first)
    if not c.norm_first:
        made.encoder.norm = made.decoder.norm = None
    pairs = []
    for ours, other, decoder in [(*p, False) for p in zip(model.encoder, made.encoder.layers)] + [
        (*p, True) for p in zip(model.decoder, made.decoder.layers)
    ]:
        pairs += [(ours.ln_1, other.norm1), (ours.ln_2, other.norm3 if decoder else other.norm2)]
        pairs += [(ours.mlp.c_fc, other.linear1), (ours.mlp.c_proj, other.linear2), (ours.attn.c_proj, other.self_attn.out_proj)]
        for kind in ('weight', 'bias'):
            getattr(other.self_attn, f'in_proj_{kind}').data = getattr(ours.attn.c_attn, kind).data.clone()
        if decoder:
            pairs += [(ours.ln_cross, other.norm2), (ours.cross.c_proj, other.multihead_attn.out_proj)]
            for kind in ('weight', 'bias'):
                both = torch.cat([getattr(ours.cross.c_q, kind).data, getattr(ours.cross.c_kv, kind).data])
                getattr(other.multihead_attn, f'in_proj_{kind}').data = both
    if c.norm_first:
        pairs += [(model.ln_encoder, made.encoder.norm), (model.ln_decoder, made.decoder.norm)]
    for ours, other in pairs:
        other.load_state_dict(ours.state_dict())
    return made


@pytest.mark.parametrize('norm_first', [False, True], ids=['post-norm', 'pre-norm'])
def test_equals_torch_with_its_weights(norm_first):
    model = small(norm_first=norm_first).double()
    other = theirs(model).double()
    source, targets = rows(9, 4, 7), rows(5, 8, 6, seed=2)
    idx = torch.cat((torch.zeros(3, 1, dtype=torch.long), targets[:, :-1]), 1).clamp(min=0)
    # the paper's formulas, position by position: PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos of the same
    place = torch.tensor([[(math.sin, math.cos)[i % 2](t / 10000 ** (i // 2 * 2 / 32)) for i in range(32)] for t in range(16)]).double()
    table = torch.nn.Parameter(model.wte.weight.data.clone())

    def embed(ids):
        return table[ids.clamp(min=0)] * 32**0.5 + place[: ids.size(1)]

    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    pad = source < 0
    hidden = other(
        embed(source), embed(idx), tgt_mask=causal, src_key_padding_mask=pad, memory_key_padding_mask=pad, tgt_is_causal=True
    )
    expected = hidden @ table.t()
    torch.testing.assert_close(model(source, idx), expected, rtol=1e-5, atol=1e-5)  # their table of positions is float32's

    keep = targets >= 0
    for smoothing in (0.0, 0.1):
        log_p = expected.log_softmax(-1)[keep]
        nll = -log_p.gather(1, targets[keep][:, None])[:, 0]
        loss = ((1 - smoothing) * nll - smoothing * log_p.mean(-1)).mean()
        torch.testing.assert_close(model(source, idx, targets, smoothing).double(), loss, rtol=1e-5, atol=1e-6)
    model(source, idx, targets).backward()
    torch.nn.functional.cross_entropy(expected[keep], targets[keep]).backward()
    torch.testing.assert_close(model.wte.weight.grad, table.grad, rtol=1e-4, atol=1e-7)
    for ours, layer in zip(model.encoder, other.encoder.layers):
        torch.testing.assert_close(ours.attn.c_attn.weight.grad, layer.self_attn.in_proj_weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours.ln_2.bias.grad, layer.norm2.bias.grad, rtol=1e-4, atol=1e-7)
    for ours, layer in zip(model.decoder, other.decoder.layers):
        both = torch.cat((ours.cross.c_q.weight.grad, ours.cross.c_kv.weight.grad))
        torch.testing.assert_close(both, layer.multihead_attn.in_proj_weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours.mlp.c_fc.weight.grad, layer.linear1.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_answer_sees_its_past_and_all_of_the_source():
    model = small()
    source, idx = rows(6), rows(7, seed=2)
    before = model(source, idx)
    changed = idx.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 30
    after = model(source, changed)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4], after[:, 4])
    for place in range(6):
        other = source.clone()
        other[0, place] = (other[0, place] + 1) % 30
        assert (model(other, idx) - before).abs().amax(-1).min() > 1e-4, f'every place of the answer sees place {place} of the source'


@pytest.mark.parametrize('more', [{}, dict(norm_first=True, n_kv_head=2, mlp='swiglu', norm='rmsnorm', qk_norm=True)], ids=str)
def test_rows_of_a_batch_equal_those_alone(more):
    model = small(**more)
    source, targets = rows(9, 1, 5), rows(3, 8, 6, seed=2)
    idx = torch.cat((torch.zeros(3, 1, dtype=torch.long), targets[:, :-1]), 1).clamp(min=0)
    together = model(source, idx)
    wider = torch.cat((source, torch.full((3, 4), -1)), 1)
    torch.testing.assert_close(model(wider, idx), together)
    for i, (s, t) in enumerate(((9, 3), (1, 8), (5, 6))):
        torch.testing.assert_close(model(source[i : i + 1, :s], idx[i : i + 1, :t]), together[i : i + 1, :t])
    whole = model(source, idx, targets)
    parts = [model(source[i : i + 1], idx[i : i + 1], targets[i : i + 1]) * n for i, n in enumerate((3, 8, 6))]
    torch.testing.assert_close(whole, sum(parts) / 17)
    for write in (lambda s: [[a] for a in model.greedy(s, 0, 12)], lambda s: model.beam(s, 0, 12, width=3)):
        for i, answers in enumerate(write(source)):
            (alone,) = write(source[i : i + 1, : (9, 1, 5)[i]])
            assert [a.ids for a in answers] == [a.ids for a in alone]
            assert [a.log_p for a in answers] == pytest.approx([a.log_p for a in alone], abs=1e-4)


def log_p_of(model, source, ids, eot=0):
    """The uncached model's word on an answer to one source."""
    step = model(source, torch.tensor([[eot, *ids[:-1]]])).log_softmax(-1)
    return step[0, range(len(ids)), ids].sum().item()


@pytest.mark.parametrize('more', [{}, dict(norm_first=True, n_kv_head=2)], ids=str)
def test_cached_equals_uncached(more):
    model = small(**more)
    source = rows(9, 4, 7, 1)
    for i, (answer, answers) in enumerate(zip(model.greedy(source, 0, 12), model.beam(source, 0, 12, width=5))):
        one = source[i : i + 1]
        ids = [0]
        while len(ids) <= 12 and (len(ids) == 1 or ids[-1]):  # greedy by hand: the whole answer read again for every token
            ids.append(int(model(one, torch.tensor([ids]))[0, -1].argmax()))
        assert answer.ids == ids[1:]
        assert len(answers) == 5 and len({tuple(a.ids) for a in answers}) == 5
        for found in (answer, *answers):
            assert found.log_p == pytest.approx(log_p_of(model, one, found.ids), abs=1e-4)
            assert 0 not in found.ids[:-1] and (found.ids[-1] == 0 or len(found.ids) == 12)
        scores = [a.score(0.6) for a in answers]
        assert scores == sorted(scores, reverse=True)


def test_a_beam_of_one_is_greedy():
    model = small(seed=3)
    source = rows(*range(1, 13))
    greedy, beam = model.greedy(source, 0, 10), model.beam(source, 0, 10, width=1)
    assert [a.ids for a in greedy] == [a.ids for (a,) in beam] and len({len(a.ids) for a in greedy}) > 1
    assert [a.log_p for a in greedy] == pytest.approx([a.log_p for (a,) in beam])


@pytest.mark.parametrize('length_penalty', [0.0, 0.6, 1.5])
def test_a_beam_wide_enough_is_exhaustive_search(length_penalty):
    model = small(vocab_size=4, seed=5)
    source = rows(5, 3, vocab=4)
    possible = [[*ids, 0] for n in range(4) for ids in itertools.product((1, 2, 3), repeat=n)] + [list(i) for i in itertools.product((1, 2, 3), repeat=4)]
    assert len(possible) == 1 + 3 + 9 + 27 + 81
    for i in range(2):
        every = [Answer(ids, log_p_of(model, source[i : i + 1], ids)) for ids in possible]
        assert sum(math.exp(a.log_p) for a in every) == pytest.approx(1, abs=1e-4), 'these are all the answers there are'
        best = sorted(every, key=lambda a: a.score(length_penalty), reverse=True)
        wide = model.beam(source[i : i + 1], 0, 4, width=121, length_penalty=length_penalty)[0]
        assert [a.ids for a in wide[:20]] == [a.ids for a in best[:20]] and len(wide) == 121
        assert [a.log_p for a in wide] == pytest.approx([a.log_p for a in best], abs=1e-4)
