"""Generate text with a trained model.

    python sample.py --out_dir=out-darklyrics
    python sample.py --out_dir=out-darklyrics --artist="Griddlemoth" --title="Ash in the Butter"
    python sample.py --out_dir=out-darklyrics --start="The rain" --num_samples=5 --temperature=0.9
    python sample.py --out_dir=out-darklyrics --originality --avoid_copying=5
    python sample.py --out_dir=out-darklyrics --interactive

All samples are generated as one batch, and the first one is printed as it comes.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Literal

from lyregpt import threads  # before torch: it decides how torch's threads wait

# isort: split
from configurator import configure, run
from lyregpt.generate import LoadedModel, encode_prompt, generate, load_model, prompt_text
from lyregpt.originality import index_of
from model import check_sampling


@dataclass
class SampleConfig:
    """The options; the comment after each one is its help. Raises ValueError for a bad value."""

    # Which model
    out_dir: str = 'out'  # a folder that train.py wrote (best.pt before ckpt.pt), or a checkpoint
    init_from: str = 'resume'  # resume: the model in out_dir; or gpt2 … gpt2-xl,
    # or a Hugging Face folder (GPT-2 or Qwen3, such as `lyregpt export` writes)

    # What to continue
    start: str = ''  # the text to continue, or FILE:prompt.txt; '': the start of a new document
    artist: str = ''  # for a model of lyrics: a song in the style of this artist
    album: str = ''  # … from an album of this name
    title: str = ''  # … of this title

    # How to generate
    num_samples: int = 3  # samples to generate, as one batch
    max_new_tokens: int = 500  # tokens in each, unless the document ends before
    temperature: float = 0.8  # 1: the model's own probabilities; lower: safer; 0: greedy
    top_k: int | None = 200  # choose among the k most likely tokens only; 0 is off
    top_p: float | None = None  # choose among the most likely tokens that together have this
    # probability; 0 is off
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    stop_at_end: bool = True  # stop where the model ends the document; False: start another one
    seed: int = 1337  # sample i uses seed + i, so it does not depend on num_samples

    # Originality
    originality: bool = False  # after each sample, report how much of it is in the training split
    # (see lyregpt/originality.py); with json as offsets into prompt + text
    avoid_copying: int | None = None  # never generate this many consecutive words of the training
    # split; 0 is off, else at least 2
    dataset: str = ''  # where that training split is: a folder, or a name under data/; '': where
    # it was when the model was trained

    # Output
    json: bool = False  # print one JSON object per sample and line, and nothing else
    interactive: bool = False  # generate at a prompt, one text after another; /help lists commands

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights; auto:
    # bfloat16 where the hardware has it and the model is large
    threads: int | Literal['auto'] = 'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per core
    # that affinity and container limits allow
    quantize: Literal['int8'] | None = None  # int8 weights: less memory, slightly lower quality;
    # a note says where it brings no speedup
    compile: bool = False  # on CUDA, one graph per token: half a minute to start, then faster

    def __post_init__(self) -> None:
        check_sampling(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.max_new_tokens
        )
        if self.num_samples < 1:
            raise ValueError(f'num_samples={self.num_samples}: expected at least 1')
        threads.check_threads(self.threads)
        if abs(self.seed) >= 2**62:
            raise ValueError(f'seed={self.seed}: expected a number below 2 to the power of 62')
        if self.json and self.interactive:
            raise ValueError('json and interactive exclude each other: leave one out')
        if self.avoid_copying and self.avoid_copying < 2:
            raise ValueError(
                f'avoid_copying={self.avoid_copying}: expected 0 (off) or at least 2 words'
            )


def load(config: SampleConfig) -> LoadedModel:
    """Load the model that the options name. Raises UserError."""
    return load_model(
        config.out_dir,
        config.init_from,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
        quantize=config.quantize,
        compile=config.compile,
        batch_sizes=(1, config.num_samples),
    )


def print_samples(loaded: LoadedModel, config: SampleConfig) -> None:
    """Print `num_samples` continuations of the prompt, the first one as it is generated."""
    tokenizer, index = loaded.tokenizer, None
    if config.originality or config.avoid_copying:
        index = index_of(loaded.about.get('config', {}), config.dataset)
    prompt = prompt_text(config)
    prompt_ids = encode_prompt(tokenizer, prompt)
    steps = [[-1] * config.num_samples]  # of each step, a token for each sample

    # Generate all samples at once, and print the first one meanwhile. -1: it has ended.
    decode = tokenizer.stream_decoder()
    if not config.json:
        print(prompt, end='', flush=True)
    for tokens in generate(loaded, config, prompt, prompt_ids, index):
        steps.append(tokens)
        if not config.json and tokens[0] >= 0:
            print(decode(tokens[0]), end='', flush=True)
    if not config.json:
        print(decode(None))

    # Print the others, and what was asked about each.
    for i, column in enumerate(zip(*steps)):
        ids = [token for token in column if token >= 0]
        text, ended = tokenizer.decode(ids), len(ids) < config.max_new_tokens
        found = None
        if index and config.originality:
            found = index.compare(prompt + text, since=len(prompt))
        if config.json:
            record = {
                'sample': i,
                'seed': config.seed + i,
                'prompt': prompt,
                'text': text,
                'tokens': len(ids) + ended,  # the document end counts
                'ended': ended,
            }
            if found:
                record['originality'] = dataclasses.asdict(found)
            print(json.dumps(record, ensure_ascii=False))
            continue
        if i > 0:
            print(f'{"-" * 40}\n{prompt}{text}')
        if found:
            print(found)


def main() -> None:
    """Generate what the command line asks for."""
    config = configure(SampleConfig, description='Generate text with a trained model.')
    loaded = load(config)
    if config.interactive:
        from lyregpt import repl  # only here: its library takes a while to load

        repl.Session(config, loaded).run()
    else:
        print_samples(loaded, config)


if __name__ == '__main__':
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    run(main)
