"""Write text with a trained model.

    python sample.py --out_dir=out-darklyrics
    python sample.py --out_dir=out-darklyrics --artist="Griddlemoth" --title="Ash in the Butter"
    python sample.py --out_dir=out-darklyrics --start="The rain" --num_samples=5 --temperature=0.9
    python sample.py --out_dir=out-darklyrics --originality --avoid_copying=5
    python sample.py --out_dir=out-darklyrics --interactive

The first sample streams to the terminal while it is written; all samples are written as one batch, each with its own
dice, so that sample i is the same whatever --num_samples is.
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
    """The knobs; the comment behind each is its help. Raises ValueError for a bad one."""

    # Which model
    out_dir: str = 'out'  # a folder that train.py wrote (best.pt is taken before ckpt.pt), or a checkpoint file
    init_from: str = 'resume'  # resume: the model in out_dir; or gpt2 … gpt2-xl, or a Hugging Face folder (GPT-2, Qwen3; lyregpt/export.py makes them)

    # What to continue
    start: str = ''  # the text to continue, or FILE:prompt.txt; '': the beginning of a new document
    artist: str = ''  # for a model of lyrics: a song in the manner of this artist
    album: str = ''  # … from an album of this name
    title: str = ''  # … of this title

    # How to write
    num_samples: int = 3  # samples to write, as one batch
    max_new_tokens: int = 500  # tokens in each, unless the document ends before
    temperature: float = (
        0.8  # 1 as the model has it, lower is more careful, 0 always takes the likeliest
    )
    top_k: int | None = 200  # choose among the k likeliest tokens only; 0 is off
    top_p: float | None = (
        None  # choose among the likeliest tokens that together have this probability; 0 is off
    )
    repetition_penalty: float = (
        1.0  # above 1: tokens that already stand in the text become less likely
    )
    stop_at_end: bool = (
        True  # stop where the model ends the document; False: go on with another one
    )
    seed: int = 1337  # sample i is drawn with seed + i

    # Is it new
    originality: bool = False  # after each sample, how much of it stands in the training split (see lyregpt/originality.py); json: offsets into prompt + text
    avoid_copying: int | None = (
        None  # never write so many words in a row that stand in the training split; 0 is off, else at least 2
    )
    dataset: str = ''  # where that training split is: a folder, or a name under data/; '': where it was when the model was trained

    # How to show it
    json: bool = False  # one JSON object a line and sample, and nothing else
    interactive: bool = (
        False  # write at a prompt, one text after another; /help there lists what it can do
    )

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = (
        'auto'  # of the weights; auto: bfloat16 where the hardware has it and the model is large
    )
    threads: int | Literal['auto'] = (
        'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per core that affinity and container limits allow
    )
    quantize: Literal['int8'] | None = (
        None  # int8 weights: less memory, slightly lower quality; prints a note where it brings no speedup
    )
    compile: bool = False  # on CUDA: one graph a token; half a minute at first, faster ever after

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
    """The model that the options name. Raises UserError."""
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


def write(loaded: LoadedModel, config: SampleConfig) -> None:
    """Print `num_samples` continuations of the prompt, the first one as it is generated."""
    tokenizer, index = loaded.tokenizer, None
    if config.originality or config.avoid_copying:
        index = index_of(loaded.about.get('config', {}), config.dataset)
    text = prompt_text(config)
    rows: list[list[int]] = [[] for _ in range(config.num_samples)]
    decode = tokenizer.stream_decoder()
    if not config.json:
        print(text, end='', flush=True)
    for tokens in generate(loaded, config, text, encode_prompt(tokenizer, text), index):
        for row, token in zip(rows, tokens.tolist()):
            if token >= 0:
                row.append(token)
        if (
            not config.json
            and tokens[0] >= 0
            and (tokens[0] != tokenizer.eot or not config.stop_at_end)
        ):
            print(decode(int(tokens[0])), end='', flush=True)
    if not config.json:
        print(decode(None))
    for i, row in enumerate(rows):
        ended = config.stop_at_end and bool(row) and row[-1] == tokenizer.eot
        continuation = tokenizer.decode(row[:-1] if ended else row)
        found = None
        if index and config.originality:
            found = index.compare(text + continuation, since=len(text))
        if config.json:
            sample = {
                'sample': i,
                'seed': config.seed + i,
                'prompt': text,
                'text': continuation,
                'tokens': len(row),
                'ended': ended,
            }
            if found:
                sample['originality'] = dataclasses.asdict(found)
            print(json.dumps(sample, ensure_ascii=False))
            continue
        if i:
            print(f'{"-" * 40}\n{text}{continuation}')
        if found:
            print(found)


def main() -> None:
    """Generate what the command line asks for."""
    config = configure(SampleConfig, description='Write text with a trained model.')
    loaded = load(config)
    if not config.interactive:
        return write(loaded, config)
    from lyregpt import repl  # only here: its library takes a while to load

    repl.Session(config, loaded).run()


if __name__ == '__main__':
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    run(main)
