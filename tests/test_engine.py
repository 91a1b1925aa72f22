"""The engine: requests that join and leave a batch generate what they would generate alone."""

import random
import threading
import time
import tracemalloc

import pytest
import torch

from lyregpt.engine import CHUNK, Engine, EngineStoppedError, QueueFullError, Request
from lyregpt.quantize import quantize_model
from lyregpt.tokenizer import BPETokenizer, CharTokenizer
from model import GPT, GPTConfig

TOKENIZER = CharTokenizer(''.join(map(chr, range(32, 127))))


def build(arch='modern', dtype=torch.float32, quantize=None, **more):
    """A small model whose every weight says something, as a writing model is."""
    torch.manual_seed(1)
    shape = dict(n_layer=2, n_head=4, n_embd=96, block_size=100) | more
    model = GPT(GPTConfig(arch=arch, vocab_size=TOKENIZER.vocab_size, **shape))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return quantize_model(model.to(dtype=dtype).eval(), quantize)


class Running:
    """An engine at work; `texts(rows)` waits for what they write."""

    def __init__(self, model, **limits):
        self.pieces, self.changed = {}, threading.Condition()
        self.engine = Engine(model, TOKENIZER, self.deliver, **limits)
        self.thread = threading.Thread(target=self.engine.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.engine.stop()
        self.thread.join(10)
        assert not self.engine.running

    def deliver(self, events):
        with self.changed:
            for row, piece in events:
                self.pieces.setdefault(row, []).append(piece)
            self.changed.notify_all()

    def ended(self, row):
        return row in self.pieces and bool(self.pieces[row][-1].finish)

    def wait(self, rows):
        with self.changed:
            assert self.changed.wait_for(lambda: all(map(self.ended, rows)), 60)

    def texts(self, rows):
        self.wait(rows)
        return [''.join(piece.text for piece in self.pieces[row]) for row in rows]


def some_row(i):
    """A request with options of its own; some prompts are longer than the context."""
    r = random.Random(i)
    return Request(
        [TOKENIZER.eot] + [r.randrange(90) for _ in range(r.randrange(1, 150))],
        max_tokens=r.randrange(5, 130),
        temperature=r.choice([0.7, 1.0, 0.0, 1.3]),
        top_k=r.choice([None, 20]),
        top_p=r.choice([None, 0.9]),
        repetition_penalty=r.choice([1.0, 1.2]),
        seed=i,
    )


def generated(model, row):
    ids = [
        int(t)
        for t in model.generate(
            [row.prompt],
            row.max_tokens,
            temperature=row.temperature,
            top_k=row.top_k,
            top_p=row.top_p,
            repetition_penalty=row.repetition_penalty,
            seed=row.seed,
            vocab_size=TOKENIZER.vocab_size,
            stop_tokens=[TOKENIZER.eot],
        )
    ]
    return TOKENIZER.decode(ids[:-1] if ids[-1] == TOKENIZER.eot else ids)


@pytest.mark.parametrize(
    'arch, dtype, more',
    [
        ('modern', torch.float32, {}),
        ('gpt2', torch.float32, {}),
        ('modern', torch.bfloat16, {'n_kv_head': 2}),
        ('modern', torch.float32, {'quantize': 'int8'}),
        ('modern', torch.float32, {'position': 'sinusoidal', 'n_embd': 100}),
    ],
)
def test_in_company_as_alone(arch, dtype, more):
    """Requests that come and go generate, to the last character, what each generates alone."""
    model = build(arch, dtype, **more)
    dice = random.Random(5)
    with Running(model, max_batch=12) as many:
        rows = [some_row(i) for i in range(30)]
        for row in rows:
            many.engine.submit([row])
            time.sleep(dice.random() * 0.005)
        together = many.texts(rows)
        alone = [many.texts(submitted(many, [some_row(i)]))[0] for i in range(30)]
    assert together == alone
    if dtype == torch.float32 and 'quantize' not in more:  # in bf16 the two attend in another order
        assert together[:10] == [generated(model, some_row(i)) for i in range(10)]


def submitted(running, rows):
    running.engine.submit(rows)
    return rows


def test_long_prompts_are_read_in_pieces_and_shared():
    model = build(block_size=2 * CHUNK + 50)
    prompt = [random.Random(3).randrange(90) for _ in range(2 * CHUNK + 20)]
    with Running(model) as running:
        rows = submitted(running, [Request(prompt, max_tokens=20, seed=i) for i in range(3)])
        texts = running.texts(rows)
        longer = running.texts(
            submitted(running, [Request(prompt[: CHUNK + 7] + [1], max_tokens=8, seed=0)])
        )
    assert texts == [generated(model, row) for row in rows] and len(set(texts)) == 3
    assert longer == [generated(model, Request(prompt[: CHUNK + 7] + [1], max_tokens=8, seed=0))]


def test_a_long_prompt_does_not_stop_the_others():
    """Between two tokens of a running row, at most one piece of another's prompt is read."""
    with Running(build(block_size=4 * CHUNK)) as running:
        reading = []
        hidden = running.engine.model.hidden
        running.engine.model.hidden = lambda idx, cache=None: (
            reading.append(idx.shape[1]) or hidden(idx, cache)
        )
        first, second = (
            Request([1], max_tokens=200, seed=1),
            Request([2] * (4 * CHUNK), max_tokens=1),
        )
        running.engine.submit([first])
        time.sleep(0.05)
        running.engine.submit([second])
        running.wait([first, second])
    pieces = [i for i, n in enumerate(reading) if n == CHUNK]
    assert len(pieces) == 4
    assert (
        all(later - earlier > 1 for earlier, later in zip(pieces, pieces[1:]))
        or running.pieces[first][-1].finish == 'stop'
    )


def test_cancelled_rows_leave_at_once():
    with Running(build(), max_batch=2, max_queue=4) as running:
        long = submitted(running, [Request([1], max_tokens=10**6, temperature=0) for _ in range(2)])
        waiting = submitted(running, [Request([2], max_tokens=3) for _ in range(4)])
        with pytest.raises(QueueFullError):
            running.engine.submit([Request([3])])
        assert not any(map(running.ended, waiting))
        running.engine.cancel(long)
        running.wait(waiting)
        assert not running.engine.active and not any(map(running.ended, long))


def test_stop_texts():
    """They end a text wherever they begin within the tokens, and are not returned themselves."""
    model = build()
    whole = generated(model, Request([1, 2], max_tokens=80, seed=3))
    stop = whole[40:43]
    cut = whole[: whole.find(stop)]
    with Running(model) as running:
        row, other, never = rows = [
            Request([1, 2], max_tokens=80, seed=3, stop=s, logprobs=1)
            for s in ([stop], ['no such', stop + '!?'], [])
        ]
        assert running.texts(submitted(running, rows)) == [cut, whole, whole]
    assert (
        running.pieces[row][-1].finish == 'stop'
        and running.pieces[other][-1].finish == running.pieces[never][-1].finish == 'length'
    )
    told = [t for piece in running.pieces[row] for t in piece.tokens]
    assert ''.join(t['token'] for t in told) == cut and [t['offset'] for t in told] == list(
        range(len(cut))
    )


def test_a_long_stop_text_costs_little():
    """As many beginnings of it as characters are held are compared, not all 30,000."""
    with Running(build()) as running:
        rows = [Request([1, 2], max_tokens=10, stop=['x' * 30_000]), Request([1, 2], max_tokens=10)]
        tracemalloc.start()
        first, second = running.texts(submitted(running, rows))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert first == second and peak < 20e6


def test_probabilities_are_the_models():
    """Of prompt and text, they are log softmax of one pass over the whole."""
    model = build(block_size=300)
    prompt = [TOKENIZER.eot] + TOKENIZER.encode('x' * (CHUNK + 20))
    row = Request(
        prompt,
        max_tokens=10,
        logprobs=3,
        echo='x' * (CHUNK + 20),
        score=CHUNK + 20,
        seed=2,
        temperature=0.5,
    )
    with Running(model) as running:
        (text,) = running.texts(submitted(running, [row]))
    told = [t for piece in running.pieces[row] for t in piece.tokens]
    with torch.no_grad():
        expected = (
            model(torch.tensor([prompt + row.generated]))[0, :, : TOKENIZER.vocab_size]
            .float()
            .log_softmax(-1)
        )
    ids = prompt[1:] + row.generated
    assert text == ''.join(t['token'] for t in told) and [t['offset'] for t in told] == list(
        range(len(ids))
    )
    assert [t['logprob'] for t in told] == pytest.approx(
        [float(expected[i, token]) for i, token in enumerate(ids)], abs=1e-4
    )
    assert list(told[-1]['top'].values()) == pytest.approx(
        expected[len(ids) - 1].topk(3).values.tolist(), abs=1e-4
    )


def test_a_prompt_is_scored_once():
    """Also where another row fills its context in the midst of the reading, and is read first."""
    with Running(build(block_size=2 * CHUNK)) as running:
        hidden, both = running.engine.model.hidden, []

        def slowly(idx, cache=None):
            if (
                idx.shape[1] == CHUNK and not both
            ):  # the first piece of the long prompt has been asked for: the other is full now
                both.append(1)
                other.position = 2 * CHUNK
            return hidden(idx, cache)

        running.engine.model.hidden = slowly
        other, long = (
            Request([1], max_tokens=3000, seed=1),
            Request([2] * (2 * CHUNK), max_tokens=0, logprobs=0, score=2 * CHUNK),
        )
        running.engine.submit([other])
        while not other.position:
            time.sleep(0.001)
        running.engine.submit([long])
        running.wait([long])
        running.engine.cancel([other])
    assert (
        both
        and [t['token'] for piece in running.pieces[long] for t in piece.tokens]
        == ['"'] * 2 * CHUNK
    )


def test_a_failing_model_ends_what_it_wrote_and_goes_on(monkeypatch):
    with Running(build()) as running:
        step, running.engine.model.next_logits = running.engine.model.next_logits, None
        broken = submitted(running, [Request([1], max_tokens=5)])
        running.wait(broken)
        assert (
            running.pieces[broken[0]][-1].finish == 'error'
            and 'failed' in running.pieces[broken[0]][-1].error
        )
        running.engine.model.next_logits = step
        rows = [some_row(i) for i in range(6)]
        first = submitted(running, [rows[0]])
        # there is no memory for more than four
        monkeypatch.setattr(running.engine.model, 'new_cache', None)
        running.wait(submitted(running, rows[1:]) + first)
        monkeypatch.undo()
        assert 'error' in {running.pieces[row][-1].finish for row in rows}
        assert running.texts(submitted(running, [some_row(7)])) == [
            generated(running.engine.model, some_row(7))
        ]
    with pytest.raises(EngineStoppedError):
        running.engine.submit([Request([1])])


def test_a_text_that_ends_within_a_character(monkeypatch):
    bytewise = BPETokenizer.train(['ab'], 257)
    monkeypatch.setattr('tests.test_engine.TOKENIZER', bytewise)
    rows = [Request([0], max_tokens=4, temperature=2.0, seed=seed) for seed in range(60)]
    with Running(build(), max_batch=16) as running:
        running.engine.submit(rows)
        texts = running.texts(rows)
    whole = [
        bytewise.decode(row.generated[:-1] if row.generated[-1] == bytewise.eot else row.generated)
        for row in rows
    ]
    halves = [bytewise.stream_decoder() for _ in rows]
    assert texts == whole and whole != [
        ''.join(map(decode, row.generated)) for decode, row in zip(halves, rows)
    ], 'some ended so'
