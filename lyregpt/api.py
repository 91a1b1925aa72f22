"""lyreGPT from Python, in a notebook or a script of your own:

    import lyregpt

    model = lyregpt.train(['first text …', 'second text …'], out_dir='out-mine', max_minutes=1)
    model = lyregpt.load('out-mine')
    print(model.generate('The lantern', max_new_tokens=100, temperature=0.8, seed=1))
    for piece in model.stream('The lantern'):
        print(piece, end='')

The options are those of train.py and sample.py, and the same seed generates the same text as there.
An error in the input is a `configurator.UserError`, which is a ValueError.
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
from itertools import chain
from typing import Any, NamedTuple

from lyregpt import threads  # noqa: F401  before torch: it decides how torch's threads wait

# isort: split
import torch
import torch.nn.functional as F

import sample
import train as trainer
from configurator import UserError, build, read_config_file
from lyregpt import ROOT, checkpoint
from lyregpt.dataset import folder_of, read_meta, write_dataset
from lyregpt.generate import LoadedModel, document_end, encode_prompt, generate, prompt_text
from lyregpt.originality import index_of
from lyregpt.pretrained import is_pretrained
from lyregpt.text import Piece, find_files, read_documents, split_text
from lyregpt.tokenizer import Tokenizer, choose_tokenizer, of_pretrained
from model import GPT

LOAD_OPTIONS = ('device', 'dtype', 'threads', 'quantize', 'compile')
GENERATE_OPTIONS = tuple(
    'artist album title max_new_tokens temperature top_k top_p repetition_penalty stop_at_end '
    'seed avoid_copying dataset'.split()
)
MIN_CHARACTERS = 200  # fewer cannot be cut into sequences
TINY = 30_000  # training tokens below which config/tiny.py learns as much as config/small.py
EPOCHS = 5  # passes over the text: small models begin to overfit then


class Loss(NamedTuple):
    """How well a model predicts a text.

    Models with different tokens can be compared by bits per byte (of UTF-8).
    """

    nats_per_token: float
    bits_per_byte: float


@dataclass(eq=False, repr=False)
class Model:
    """A trained model; `train` and `load` make it.

    `about` is what its checkpoint holds: iter_num, best_val_loss, config and more. `config` says
    where the model is from and on what it computes.
    """

    gpt: GPT
    tokenizer: Tokenizer
    about: dict[str, Any]
    config: sample.SampleConfig = field(default_factory=sample.SampleConfig)

    def __repr__(self) -> str:
        shape, config = self.gpt.config, self.config
        source = config.out_dir if config.init_from == 'resume' else config.init_from
        return (
            f'<{source}: {shape.arch}, {shape.n_layer} layers, width {shape.n_embd}, '
            f'context {shape.block_size}, {self.tokenizer.vocab_size:,} tokens>'
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's tokens.

        Raises UserError for a character that a character tokenizer does not know.
        """
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Raises UserError for an id outside the vocabulary."""
        return self.tokenizer.decode(ids)

    def generate(
        self, prompt: str | list[str] = '', num_samples: int | None = None, **options: Any
    ) -> Any:
        """Return the prompt and the text that continues it.

        With `num_samples` it is a list of such texts, and for a list of prompts a list with that
        for each. `options` are sample.py's (GENERATE_OPTIONS); sample i uses seed + i, as
        there. Raises UserError.
        """
        if isinstance(prompt, (list, tuple)):
            return [self.generate(one, num_samples, **options) for one in prompt]
        samples = 1 if num_samples is None else num_samples
        text, steps = self._start(prompt, options | {'num_samples': samples})
        columns = zip([-1] * samples, *steps)  # one for each sample, even without any step
        texts = [text + self.decode(token for token in ids if token >= 0) for ids in columns]
        return texts[0] if num_samples is None else texts

    def stream(self, prompt: str = '', **options: Any) -> Iterator[str]:
        """Yield the text of `generate` in pieces as it is generated, first the prompt."""
        text, steps = self._start(prompt, options | {'num_samples': 1})
        tokens = (ids[0] for ids in steps if ids[0] >= 0)
        # None asks the decoder for what is left of an incomplete character.
        return chain([text], map(self.tokenizer.stream_decoder(), chain(tokens, [None])))

    @torch.inference_mode()
    def loss(self, text: str) -> Loss:
        """Return how well the model predicts the text, as a document of its own.

        The text is cut into sequences of the model's context. Raises UserError if it is too short.
        """
        device = next(self.gpt.parameters()).device
        ids = torch.tensor(document_end(self.tokenizer) + self.encode(text), device=device)
        targets = len(ids) - 1
        if targets < 1:
            raise UserError('the text is too short to predict any of it')
        nats = 0.0
        size = self.gpt.config.block_size
        for x, y in zip(ids[:-1].split(size), ids[1:].split(size)):
            nats += float(F.cross_entropy(self.gpt(x[None])[0].float(), y, reduction='sum'))
        n_bytes = len(self.decode(ids[1:].tolist()).encode('utf-8'))
        return Loss(nats / targets, nats / math.log(2) / n_bytes)

    def _start(self, prompt: str, options: dict[str, Any]) -> tuple[str, Iterator[list[int]]]:
        """Return the whole prompt, and the ids that continue it as `generate` yields them."""
        if not isinstance(prompt, str):
            raise UserError(f'a prompt is text, or a list of texts: got {type(prompt).__name__}')
        asked = build(sample.SampleConfig, options, known=(*GENERATE_OPTIONS, 'num_samples'))
        changes: dict[str, Any] = {name: getattr(asked, name) for name in options}
        config = dataclasses.replace(self.config, **changes)
        index = None
        if config.avoid_copying:
            dataset = config.dataset or data_of(self.about, config.out_dir)
            index = index_of(self.about.get('config', {}), dataset)
        text = prompt_text(config) + prompt
        loaded = LoadedModel(self.gpt, self.tokenizer, self.about)
        return text, generate(loaded, config, text, encode_prompt(self.tokenizer, text), index)


def load(source: str | os.PathLike[str] = 'out', **options: Any) -> Model:
    """Load a trained model.

    `source` is a folder that `train` wrote, a checkpoint file, a Hugging Face folder, or one of
    GPT-2's names (gpt2 … gpt2-xl). `options` are sample.py's device, dtype, threads, quantize and
    compile. Raises UserError.
    """
    source = os.fspath(source)
    config = build(sample.SampleConfig, options, known=LOAD_OPTIONS)
    if is_pretrained(source):
        config.init_from = source
    else:
        config.out_dir = source
    return Model(*sample.load(config), config)


def train(
    texts: Iterable[str] | str | os.PathLike[str] | None = None,
    out_dir: str | os.PathLike[str] = 'out',
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> Model:
    """Train on texts and return the best model; checkpoints and token files go to `out_dir`.

    `texts` is a list of strings, each a document, or a file or folder of .txt, .md and .jsonl.
    Without it the option `dataset` names a prepared dataset. `tokenizer` is bpe (the default),
    char, gpt2 or a tokenizer.json. `options` are train.py's; the others are chosen to suit the
    amount of text. `init_from='resume'` continues, with the same texts or without any. Raises
    UserError. Ctrl-C, or a notebook's interrupt, saves and raises KeyboardInterrupt.
    """
    out_dir = os.fspath(out_dir)
    asked = build(trainer.TrainConfig, options | {'out_dir': out_dir})
    start = starting_point(asked.init_from, out_dir)

    # The token files
    if texts is not None and 'dataset' in options:
        raise UserError('texts and dataset are both given: leave one out')
    if texts is None and 'dataset' not in options and start != 'resume':
        raise UserError(
            'nothing to train on: give a list of texts, a file or folder of them, or dataset='
        )
    if (tokenizer or vocab_size) and (texts is None or start != 'scratch'):
        source = 'a prepared dataset' if texts is None else start
        raise UserError(f'{source} brings its own tokenizer: leave tokenizer and vocab_size out')
    if texts is not None:
        chosen_tokenizer = tokenizer_of(start, out_dir) or tokenizer or 'bpe'
        dataset = prepare(list_of(texts), out_dir, chosen_tokenizer, vocab_size)
    elif 'dataset' in options:
        dataset = asked.dataset
    else:
        dataset = data_of(checkpoint.load_from(out_dir, best=False, lazy=True)[1], out_dir)

    # The options that are still open
    chosen: dict[str, Any] = {}
    if start != 'resume':
        splits = read_meta(folder_of(dataset)).get('splits', {})
        chosen = suited(splits.get('train', {}).get('tokens'), options, start)
    if dataset:
        chosen['dataset'] = dataset
    try:
        trainer.train(build(trainer.TrainConfig, chosen | options | {'out_dir': out_dir}))
    except SystemExit as error:
        if error.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt(
                f'saved; lyregpt.load({out_dir!r}) loads it, and '
                'train(…, init_from="resume") continues'
            ) from None
        raise
    return load(out_dir, device=asked.device)


# -----------------------------------------------------------------------------
# The parts of train


def starting_point(init_from: str, out_dir: str) -> str:
    """Return what training starts from: scratch, resume, or a model; auto means any of them."""
    mode, _, source = init_from.partition(':')
    if mode != 'auto':
        return init_from
    if os.path.isdir(out_dir) and checkpoint.candidates(out_dir):
        return 'resume'
    return source or 'scratch'


def list_of(texts: Iterable[str] | str | os.PathLike[str]) -> list[str]:
    """Return the documents in files, or those given as strings, without empty ones.

    Raises UserError for anything else.
    """
    if isinstance(texts, (str, os.PathLike)):
        if not os.path.exists(texts):
            raise UserError(
                f'{os.fspath(texts)[:80]!r}: no such file or folder; '
                'a text itself is given in a list, as in [text]'
            )
        texts = (''.join(pieces) for pieces in read_documents(find_files([os.fspath(texts)])))
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f'texts[{i}] is of type {type(text).__name__}: expected str')
    return [text for text in texts if text.strip()]


def tokenizer_of(start: str, out_dir: str) -> Tokenizer | None:
    """Return the tokenizer of the model that training starts from; None from scratch.

    Raises UserError if there is no such model.
    """
    if start == 'scratch':
        return None
    if is_pretrained(start):
        return of_pretrained(start)
    if start == 'resume':
        return checkpoint.tokenizer_of(checkpoint.load_from(out_dir, best=False, lazy=True)[1])
    return checkpoint.tokenizer_of(checkpoint.load_from(start, lazy=True)[1])


def data_of(about: dict[str, Any], out_dir: str) -> str:
    """Return the token files that `prepare` made for the run in out_dir, or '' if they are gone.

    They are in out_dir or, if that is the folder `earlier` of a run, in the run's own folder,
    wherever it was moved to.
    """
    name = os.path.basename(about.get('config', {}).get('dataset', ''))
    folders = (out_dir, os.path.dirname(os.path.abspath(out_dir)))
    if re.fullmatch('data-[0-9a-f]{12}', name):
        return next(filter(os.path.isdir, (os.path.join(f, name) for f in folders)), '')
    return ''


def prepare(
    texts: list[str], out_dir: str, tokenizer: Tokenizer | str, vocab_size: int | None
) -> str:
    """Return the folder with the token files of the texts, written unless it is there already.

    Its name is a hash of its content, so other texts do not overwrite it. Raises UserError.
    """
    size = sum(map(len, texts))
    if size < MIN_CHARACTERS:
        raise UserError(
            f'{size} characters in {len(texts)} texts are too little to learn from: give at least '
            f'{MIN_CHARACTERS}; 100,000 make a model that is fun to read'
        )
    if isinstance(tokenizer, str):
        # The number of different words grows about as the square root of the text (Heaps 1978).
        vocab_size = vocab_size or min(4096, max(300, 6 * math.isqrt(size)))
        tokenizer = choose_tokenizer(tokenizer, texts, vocab_size)
    content = hashlib.sha256(json.dumps(tokenizer.state(), sort_keys=True).encode())
    for text in texts:
        content.update(f'{len(text)} '.encode() + text.encode('utf-8', 'surrogatepass'))
    folder = os.path.join(out_dir, f'data-{content.hexdigest()[:12]}')
    if not read_meta(folder):  # it is written last
        n_bytes = sum(len(text.encode('utf-8', 'replace')) for text in texts)
        write_dataset(folder, split(texts), tokenizer, n_bytes)
    return folder


def split(texts: list[str]) -> Iterator[Piece]:
    """Keep a tenth of the texts for validation; of fewer than 20 texts, the end of each."""
    distinct = sorted(set(texts))
    kept = set(random.Random(1337).sample(distinct, len(distinct) // 10))
    for text in texts:
        if len(distinct) < 20:
            yield from split_text([text], len(text), 0.1)
        else:
            yield 'val' if text in kept else 'train', text, True


def suited(tokens: int | None, options: dict[str, Any], start: str = 'scratch') -> dict[str, Any]:
    """Choose options for so many training tokens (None: unknown), to use beside those in `options`.

    They are those of a file in config/, with as many steps as pay off.
    """
    name = 'tiny' if tokens and tokens < TINY else 'small'
    if start != 'scratch':
        name = 'finetune_darklyrics'
    values = read_config_file(os.path.join(ROOT, 'config', f'{name}.py'), trainer.TrainConfig, {})
    for key in ('out_dir', 'dataset', 'prepare', 'init_from', 'sample_interval'):
        values.pop(key, None)
    if tokens:
        values['block_size'] = min(values['block_size'], 2 ** int(math.log2(max(8, tokens / 4))))
        keys = ('block_size', 'batch_size', 'gradient_accumulation_steps')
        sizes = [(values | options)[key] for key in keys]
        tokens_per_step = math.prod(int(size) for size in sizes if size != 'auto')
        values['max_iters'] = min(2000, max(40, EPOCHS * tokens // tokens_per_step))
    steps = int(options.get('max_iters', values['max_iters']))
    return values | {'eval_interval': max(1, steps // 5), 'warmup_iters': min(20, steps // 10)}
