"""lyreGPT from Python, in a notebook or a script of your own:

    import lyregpt

    model = lyregpt.train(['first text …', 'second text …'], out_dir='out-mine', max_minutes=1)
    model = lyregpt.load('out-mine')
    print(model.generate('The lantern', max_new_tokens=100, temperature=0.8, seed=1))
    for piece in model.stream('The lantern'):
        print(piece, end='')

The knobs are those of train.py and sample.py, by name, and so is what they do: the same seed writes the same text.
A mistake is a `configurator.UserError`, which is a ValueError.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lyregpt import threads  # noqa: F401  before torch: it decides how torch's threads wait

# isort: split
import torch
import torch.nn.functional as F

import train as trainer
from configurator import UserError, build, read_config_file
from lyregpt import ROOT, checkpoint
from lyregpt.dataset import folder_of, read_meta, write_dataset
from lyregpt.generate import LoadedModel, encode_prompt, generate, prompt_text
from lyregpt.originality import index_of
from lyregpt.pretrained import is_pretrained
from lyregpt.text import Piece, find_files, read_documents, split_text
from lyregpt.tokenizer import Tokenizer, choose_tokenizer, of_pretrained
from model import GPT
from sample import SampleConfig
from sample import load as load_model

LOADING = ('device', 'dtype', 'threads', 'quantize', 'compile')
WRITING = tuple(
    'artist album title max_new_tokens temperature top_k top_p repetition_penalty stop_at_end seed avoid_copying dataset'.split()
)
LEAST = 200  # characters that can be cut into windows at all
TINY = 30_000  # training tokens below which config/tiny.py learns as much as config/small.py, and sooner
EPOCHS = 5  # so often a text is read: small models begin to know it by heart then


class Loss(NamedTuple):
    """How well a model foretells a text: nats per token, and bits per byte of UTF-8, which models with other tokens share."""

    nats_per_token: float
    bits_per_byte: float


@dataclass(eq=False, repr=False)
class Model:
    """A trained model that writes; `train` and `load` make it. `about` is what its checkpoint says: iter_num, best_val_loss, config …"""

    gpt: GPT
    tokenizer: Tokenizer
    about: dict[str, Any]
    config: SampleConfig = field(
        default_factory=SampleConfig
    )  # where it is from, and on what it computes

    def __repr__(self) -> str:
        shape, source = (
            self.gpt.config,
            self.config.out_dir if self.config.init_from == 'resume' else self.config.init_from,
        )
        return f'<{source}: {shape.arch}, {shape.n_layer} layers, {shape.n_embd} wide, context {shape.block_size}, {self.tokenizer.vocab_size:,} tokens>'

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens. Raises UserError for a character that a character model does not know."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Raises UserError for an id outside the vocabulary."""
        return self.tokenizer.decode(ids)

    def generate(
        self, prompt: str | list[str] = '', num_samples: int | None = None, **knobs: Any
    ) -> Any:
        """The prompt and what the model writes behind it, a str; `num_samples` of them, a list; for a list of prompts, a list with that for each.

        Sample i is drawn with `seed + i`, as by sample.py, whose knobs these are (WRITING lists them). Raises UserError for a bad one.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise UserError(f'a prompt is text, or a list of texts: got {type(prompt).__name__}')
        if not isinstance(prompt, str):
            return [self.generate(one, num_samples, **knobs) for one in prompt]
        text, ids, config = self._begin(
            prompt, knobs | {'num_samples': 1 if num_samples is None else num_samples}
        )
        rows: list[list[int]] = [[] for _ in range(config.num_samples)]
        for tokens in ids:
            for row, token in zip(rows, tokens.tolist()):
                if token >= 0 and not (config.stop_at_end and token == self.tokenizer.eot):
                    row.append(token)
        texts = [text + self.decode(row) for row in rows]
        return texts[0] if num_samples is None else texts

    def stream(self, prompt: str = '', **knobs: Any) -> Iterator[str]:
        """`generate`'s text in pieces, as it is written: first the prompt."""
        text, ids, config = self._begin(prompt, knobs | {'num_samples': 1})

        def pieces() -> Iterator[str]:
            decode = self.tokenizer.stream_decoder()
            yield text
            for tokens in ids:
                if not (config.stop_at_end and int(tokens[0]) == self.tokenizer.eot):
                    yield decode(int(tokens[0]))
            yield decode(None)

        return pieces()

    @torch.inference_mode()
    def loss(self, text: str) -> Loss:
        """How well the model foretells the text as a document of its own, in windows of its context. Raises UserError if there is nothing to foretell."""
        start, ids = [] if self.tokenizer.eot is None else [self.tokenizer.eot], self.encode(text)
        row, size = (
            torch.tensor(start + ids, device=next(self.gpt.parameters()).device),
            self.gpt.config.block_size,
        )
        if len(row) < 2:
            raise UserError('the text is too short to foretell anything of it')
        total = 0.0
        for at in range(0, len(row) - 1, size):
            x, y = row[at : at + size][: len(row) - 1 - at], row[at + 1 : at + size + 1]
            total += float(F.cross_entropy(self.gpt(x[None])[0].float(), y, reduction='sum'))
        n_bytes = len(self.decode(row[1:].tolist()).encode('utf-8'))
        return Loss(total / (len(row) - 1), total / math.log(2) / n_bytes)

    def _begin(
        self, prompt: str, options: dict[str, Any]
    ) -> tuple[str, Iterator[torch.Tensor], SampleConfig]:
        asked = build(SampleConfig, options, known=(*WRITING, 'num_samples'))
        config = dataclasses.replace(
            self.config, **{name: getattr(asked, name) for name in options}
        )
        index = None
        if config.avoid_copying:
            dataset = config.dataset or data_of(self.about, config.out_dir)
            index = index_of(self.about.get('config', {}), dataset)
        text = prompt_text(config) + prompt
        loaded = LoadedModel(self.gpt, self.tokenizer, self.about)
        ids = generate(loaded, config, text, encode_prompt(self.tokenizer, text), index)
        return text, ids, config


def load(source: str | os.PathLike[str] = 'out', **knobs: Any) -> Model:
    """The model of a folder that `train` wrote, a checkpoint file, a Hugging Face folder, or one of GPT-2's names (gpt2 … gpt2-xl).

    `knobs`: device, dtype, threads, quantize, compile, as in sample.py. Raises UserError.
    """
    asked = build(SampleConfig, knobs, known=LOADING)
    source = os.fspath(source)
    config = (
        dataclasses.replace(asked, init_from=source)
        if is_pretrained(source)
        else dataclasses.replace(asked, out_dir=source)
    )
    return Model(*load_model(config), config)


def train(
    texts: Iterable[str] | str | os.PathLike[str] | None = None,
    out_dir: str | os.PathLike[str] = 'out',
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    **knobs: Any,
) -> Model:
    """Train on texts and return the best model there was; checkpoints, metrics.csv and the token files (`data-…/`) are in `out_dir`.

    `texts` is a list of strings, each a document, or a file or folder of .txt, .md and .jsonl; or none, and the knob `dataset` names a prepared
    one. `tokenizer` is bpe (the default), char, gpt2 or a tokenizer.json. `knobs` are train.py's; what they leave open is chosen to suit the amount of text.
    `init_from='resume'` goes on, with the same texts or without any. Raises UserError. Ctrl-C, or a notebook's interrupt, saves and raises KeyboardInterrupt.
    """
    out_dir = os.fspath(out_dir)
    asked = build(trainer.TrainConfig, knobs | {'out_dir': out_dir})
    data, (auto, _, begin_from) = '', asked.init_from.partition(':')
    resumes = (
        auto == 'resume'
        or auto == 'auto'
        and os.path.isdir(out_dir)
        and bool(checkpoint.candidates(out_dir))
    )
    begin_from = (
        'resume' if resumes else (begin_from or 'scratch') if auto == 'auto' else asked.init_from
    )
    chosen: dict[str, Any] = {}
    if texts is not None:
        if 'dataset' in knobs:
            raise UserError('texts and dataset are both given: leave one out')
        if begin_from != 'scratch' and (tokenizer or vocab_size):
            raise UserError(
                f'{begin_from} brings its own tokenizer: leave tokenizer and vocab_size out'
            )
        data = prepare(
            list_of(texts),
            out_dir,
            tokenizer_of(begin_from, out_dir) or tokenizer or 'bpe',
            vocab_size,
        )
    elif 'dataset' not in knobs and not resumes:
        raise UserError(
            'nothing to train on: give a list of texts, a file or folder of them, or dataset='
        )
    elif tokenizer or vocab_size:
        raise UserError(
            'a prepared dataset brings its own tokenizer: leave tokenizer and vocab_size out'
        )
    elif 'dataset' not in knobs:
        data = data_of(checkpoint.load_from(out_dir, best=False, lazy=True)[1], out_dir)
    if data:
        chosen['dataset'] = data
    if begin_from != 'resume':
        folder = folder_of(chosen.get('dataset', asked.dataset))
        tokens = read_meta(folder).get('splits', {}).get('train', {}).get('tokens')
        chosen |= suited(tokens, knobs, begin_from)
    try:
        trainer.train(build(trainer.TrainConfig, chosen | knobs | {'out_dir': out_dir}))
    except SystemExit as error:
        if error.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt(
                f'saved; lyregpt.load({out_dir!r}) has it, and train(…, init_from="resume") goes on'
            ) from None
        raise
    return load(out_dir, device=asked.device)


# -----------------------------------------------------------------------------
# The parts of train


def list_of(texts: Iterable[str] | str | os.PathLike[str]) -> list[str]:
    """The documents that somebody gave, in files or as they are; empty ones are left out. Raises UserError for what is no text."""
    if isinstance(texts, (str, os.PathLike)):
        if not os.path.exists(texts):
            raise UserError(
                f'{os.fspath(texts)[:80]!r}: no such file or folder; a text itself is given in a list, as in [text]'
            )
        texts = (''.join(pieces) for pieces in read_documents(find_files([os.fspath(texts)])))
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f'texts[{i}] is of type {type(text).__name__}: expected str')
    return [text for text in texts if text.strip()]


def tokenizer_of(begin_from: str, out_dir: str) -> Tokenizer | None:
    """The tokenizer of the model that training begins from; None from scratch. Raises UserError if there is no such model."""
    if begin_from == 'scratch':
        return None
    if is_pretrained(begin_from):
        return of_pretrained(begin_from)
    resumes = begin_from == 'resume'
    return checkpoint.tokenizer_of(
        checkpoint.load_from(out_dir if resumes else begin_from, best=not resumes, lazy=True)[1]
    )


def data_of(about: dict[str, Any], out_dir: str) -> str:
    """The token files that `prepare` made for the run in out_dir, or in its folder `earlier`, wherever that was moved to; '' if they are not there."""
    name = os.path.basename(about.get('config', {}).get('dataset', ''))
    places = [
        os.path.join(folder, name)
        for folder in (out_dir, os.path.dirname(os.path.abspath(out_dir)))
    ]
    return next(
        (
            place
            for place in places
            if re.fullmatch('data-[0-9a-f]{12}', name) and os.path.isdir(place)
        ),
        '',
    )


def prepare(
    texts: list[str], out_dir: str, tokenizer: Tokenizer | str, vocab_size: int | None
) -> str:
    """The folder of the token files, written if need be: a tenth of the texts is for validation, or, if they are fewer than 20, the end of each.

    It is named by what is in it: other texts do not overwrite those of a run that was there before, and may be put aside. Raises UserError.
    """
    size = sum(map(len, texts))
    if size < LEAST:
        raise UserError(
            f'{size} characters in {len(texts)} texts are too little to learn from: give at least {LEAST}; 100,000 make a model that is fun to read'
        )
    if isinstance(tokenizer, str):
        # a text's different words grow about with its root (Heaps 1978)
        tokenizer = choose_tokenizer(
            tokenizer, texts, vocab_size or min(4096, max(300, 6 * math.isqrt(size)))
        )
    content = hashlib.sha256(json.dumps(tokenizer.state(), sort_keys=True).encode())
    for text in texts:
        content.update(f'{len(text)} '.encode() + text.encode('utf-8', 'surrogatepass'))
    folder = os.path.join(out_dir, f'data-{content.hexdigest()[:12]}')
    if read_meta(folder):  # it is written last
        return folder
    known = sorted(set(texts))
    kept = set(random.Random(1337).sample(known, len(known) // 10))

    def pieces() -> Iterator[Piece]:
        for text in texts:
            if len(known) < 20:
                yield from split_text([text], len(text), 0.1)
            else:
                yield 'val' if text in kept else 'train', text, True

    write_dataset(
        folder, pieces(), tokenizer, sum(len(text.encode('utf-8', 'replace')) for text in texts)
    )
    return folder


def suited(
    tokens: int | None, knobs: dict[str, Any], begin_from: str = 'scratch'
) -> dict[str, Any]:
    """Knobs for so many training tokens (None: unknown), beside those that are set: the sizes of config/, with as many steps as pay."""
    name = (
        'finetune_darklyrics'
        if begin_from != 'scratch'
        else 'tiny'
        if tokens and tokens < TINY
        else 'small'
    )
    values = read_config_file(os.path.join(ROOT, 'config', f'{name}.py'), trainer.TrainConfig, {})
    values = {
        k: v
        for k, v in values.items()
        if k not in ('out_dir', 'dataset', 'prepare', 'init_from', 'sample_interval')
    }
    if tokens:
        values['block_size'] = min(values['block_size'], 2 ** int(math.log2(max(8, tokens / 4))))
        now = values | knobs
        step = math.prod(
            int(now[k])
            for k in ('block_size', 'batch_size', 'gradient_accumulation_steps')
            if now[k] != 'auto'
        )
        values['max_iters'] = min(2000, max(40, EPOCHS * tokens // step))
    steps = int(knobs.get('max_iters', values['max_iters']))
    return values | {'eval_interval': max(1, steps // 5), 'warmup_iters': min(20, steps // 10)}
