"""Train a GPT.

    python train.py config/train_darklyrics.py
    python train.py config/train_darklyrics.py --init_from=resume           (continue a run)
    torchrun --standalone --nproc_per_node=2 train.py config/train_gpt2.py  (several processes)

Batches and dropout masks are functions of (seed, step), so there is no data-loader or RNG state to
save, and a resumed run takes exactly the steps that an uninterrupted run takes.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from lyregpt import threads  # before torch: decides how torch's threads wait

# isort: split
import torch

from configurator import UserError, configure, run
from lyregpt import checkpoint
from lyregpt.batches import TrainingBatches
from lyregpt.dataset import Split
from lyregpt.device import keep_freed_memory, pick_dtype
from lyregpt.distributed import Distributed, gradient_sync, lost_contact
from lyregpt.generate import document_end
from lyregpt.logger import Logger, out_of_memory
from lyregpt.optim import Optimizers
from lyregpt.originality import Index
from lyregpt.saver import Saver
from lyregpt.schedule import Schedule
from lyregpt.start import Start, build_model, find_start, place, with_options
from lyregpt.tokenizer import CharTokenizer, Tokenizer
from lyregpt.trial import Compiler, seconds_per_sequence
from model import GPT, GPTConfig

EVAL_TOKENS = 16384  # tokens that an evaluation reads at once
LOWEST = {  # the lowest value that an option may have
    **dict.fromkeys(('gradient_accumulation_steps', 'eval_interval', 'log_interval'), 1),
    **dict.fromkeys(('shard_groups', 'eval_iters', 'lr_decay_iters'), 1),
    **dict.fromkeys(('max_iters', 'warmup_iters', 'sample_interval', 'patience', 'min_lr'), 0),
    **dict.fromkeys(('weight_decay', 'grad_clip', 'beta1', 'beta2', 'warmdown'), 0),
    **dict.fromkeys(('checkpoint_interval', 'checkpoint_minutes'), 0),
}
OPTIONAL = ('max_minutes', 'eval_iters', 'lr_decay_iters', 'min_lr')  # may be None


@dataclass
class TrainConfig:
    """The options; the comment after each is its help. Raises ValueError for a bad one."""

    # Files
    out_dir: str = 'out'  # checkpoints, metrics.csv, train.log, config.json and report.html go here
    dataset: str = 'openwebtext'  # a folder, or a name under data/
    prepare: str = ''  # script and options that make the dataset, if not data/<dataset>/prepare.py
    init_from: str = 'scratch'  # scratch; resume; auto: resume if possible (auto:gpt2: else gpt2);
    # or weights to fine-tune: gpt2 ... gpt2-xl, a Hugging Face folder, a checkpoint

    # Model (see model.py); None: as arch has it
    arch: Literal['modern', 'gpt2'] = 'modern'  # RoPE, RMSNorm, QK-norm, SwiGLU; or GPT-2's
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # embedding width
    block_size: int = 1024  # context length in tokens
    dropout: float = 0.0  # 0 for large data, 0.1 and more for small data that is read many times
    bias: bool = False  # biases in linear layers and LayerNorms
    n_kv_head: int | None = None  # key and value heads (grouped-query attention); None: n_head
    head_dim: int | None = None  # width of a head; None: n_embd / n_head
    n_ff: int | None = None  # width inside the MLP
    position: Literal['learned', 'rope', 'sinusoidal'] | None = None  # position encoding
    norm: Literal['layernorm', 'rmsnorm'] | None = None  # normalization layers
    mlp: Literal['gelu', 'swiglu', 'relu2'] | None = None  # nonlinearity of the MLP
    qk_norm: bool | None = None  # normalize queries and keys
    tie_weights: bool | None = None  # one matrix for embedding and head

    # Batch
    batch_size: int | Literal['auto'] = 12  # sequences that a process handles at once;
    # auto: results as with 1, but as many at once as fit into memory
    gradient_accumulation_steps: int = 5 * 8  # times batch_size: sequences per step, all processes
    shard_groups: int = 1  # divide the dataset's shards into this many groups, each the source of
    # its part of every batch: a node needs only its groups

    # Optimizer
    optimizer: Literal['muon', 'adamw'] = 'muon'  # Muon for the blocks' matrices and AdamW for the
    # rest, or AdamW for all
    learning_rate: float = 6e-4  # the highest; Muon's update has AdamW's size: one rate serves both
    max_iters: int = 600000  # total steps
    max_minutes: float | None = None  # train for this time instead: the schedule follows elapsed
    # time, and max_iters and lr_decay_iters have no effect
    weight_decay: float = 1e-1  # of matrices
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 is off

    # Learning rate schedule
    decay_lr: bool = True  # False: constant, and no warm-up
    lr_schedule: Literal['cosine', 'linear'] = 'cosine'  # cosine decay, or constant and then linear
    # decay (a warm-down)
    warmdown: float = 0.5  # for linear: the fraction of lr_decay_iters that decays
    warmup_iters: int = 2000  # steps of linear rise at the start
    lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
    min_lr: float | None = None  # the lowest; None: a tenth of learning_rate

    # Evaluation and logging
    eval_interval: int = 2000  # steps between evaluations (and checkpoints)
    eval_iters: int | None = None  # None: the whole validation split; N: about N batches of it, the
    # same ones every time
    eval_only: bool = False  # evaluate once and stop
    log_interval: int = 10  # steps between log lines
    sample_interval: int = 0  # steps between samples in the log, at evaluations only; 0 is off
    sample_start: str = ''  # text that those samples continue; '': the beginning of a document
    originality: bool = False  # with each of those samples, how much of it is copied from the
    # training split (see lyregpt/originality.py)
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = 'lyregpt'  # the project there
    wandb_run_name: str | None = None  # the run's name there; None: out_dir
    tensorboard_log: bool = False  # log to out_dir for TensorBoard (pip install tensorboard)
    report: bool = True  # write out_dir/report.html at the end: the run on one page, and what to
    # try next (see lyregpt/report.py)

    # Stopping and saving
    patience: int = 0  # stop after this many evaluations without improvement; 0 is off
    target_val_loss: float | None = None  # stop once the validation loss is this low
    always_save_checkpoint: bool = True  # False: after an evaluation save ckpt.pt only if improved
    checkpoint_interval: int = (
        0  # steps between further checkpoints; 0 is off. SIGUSR1 asks for one
    )
    checkpoint_minutes: float = 10  # save when the last checkpoint is older than this; 0 is off
    checkpoint_async: bool | Literal['auto'] = 'auto'  # write checkpoints while training continues,
    # from a copy in the host's memory; auto: on a GPU

    # Machine
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # auto: bfloat16 where it is
    # fast (on a CPU: for large models), else float16 or float32
    threads: int | Literal['auto'] = 'auto'  # CPU threads; auto: OMP_NUM_THREADS, or one per usable
    # core. A resumed run keeps its number: another one rounds differently
    compile: bool | Literal['auto'] = 'auto'  # use torch.compile; auto: on CUDA with a compiler
    remat: bool = False  # recompute blocks in the backward pass: less memory, a quarter more time
    parallel: Literal['ddp', 'fsdp'] = 'ddp'  # several processes: each has the whole model, or its
    # part of every weight (FSDP), for models that do not fit
    cpu_offload: bool = False  # with fsdp on a GPU: weights, gradients and optimizer states stay in
    # the host's memory
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torch.distributed
    timeout_minutes: float = 10  # a process that waits this long for the others gives up
    seed: int = 1337  # of initialization, data order and dropout

    def __post_init__(self) -> None:
        threads.check_threads(self.threads)
        if self.batch_size != 'auto' and self.batch_size < 1:
            raise ValueError(f'batch_size={self.batch_size}: expected auto or at least 1')
        # written so that NaN, which compares as False, is refused
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if not (value is None and name in OPTIONAL) and not value >= low:
                raise ValueError(f'{name}={value}: expected at least {low}')
        for name in ('learning_rate', 'timeout_minutes', 'max_minutes'):
            value = getattr(self, name)
            if not (value is None and name in OPTIONAL) and not value > 0:
                raise ValueError(f'{name}={value}: expected more than 0')
        for name in ('beta1', 'beta2'):
            if not getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected less than 1')
        if not self.warmdown <= 1:
            raise ValueError(f'warmdown={self.warmdown}: expected at most 1')
        if self.parallel == 'fsdp' and self.dtype == 'float16':
            raise ValueError('dtype=float16 does not work with parallel=fsdp: use bfloat16')
        if self.cpu_offload and (self.parallel != 'fsdp' or self.sample_interval):
            raise ValueError('cpu_offload=True needs parallel=fsdp, and sample_interval=0')
        if self.originality and not self.sample_interval:
            raise ValueError(
                'originality=True is about the samples in the log: set sample_interval'
            )
        self.model_config(vocab_size=1)

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model that the options describe. Raises ValueError if they contradict one another."""
        names = [f.name for f in dataclasses.fields(GPTConfig) if hasattr(self, f.name)]
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})


@dataclass
class RunState:
    """What a checkpoint stores beside weights and optimizer states."""

    step: int = 0  # optimizer steps
    best_val_loss: float = math.inf
    bad_evals: int = 0  # evaluations since the best one
    last_eval: int = -1  # step of the last evaluation
    seconds: float = 0.0  # elapsed before `started`, in earlier starts of this run
    started: float = field(default_factory=time.perf_counter)
    # losses of the steps since the last log line; read together, so that a GPU need not wait
    losses: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def at_start(cls, start: Start, optimizers: Optimizers) -> 'RunState':
        """A new state, or a resumed run's with the optimizers' states; frees the checkpoint."""
        saved, start.state = start.state, {}
        if not start.resumes:
            return cls()
        checkpoint.load_optimizers(optimizers.by_name, saved['optimizer'], start.source)
        if saved.get('scaler'):
            optimizers.scaler.load_state_dict(saved['scaler'])
        losses = torch.tensor(saved.get('losses', []), device=start.distributed.device)
        if not start.distributed.is_main:  # they are sums over the processes
            losses.zero_()
        return cls(
            int(saved['iter_num']),
            float(saved['best_val_loss']),
            saved.get('bad_evals', 0),
            saved.get('last_eval', -1),
            saved.get('seconds', 0.0),
            losses=list(losses),
        )

    def elapsed(self) -> float:
        """Seconds that the run has taken, earlier starts included."""
        return self.seconds + time.perf_counter() - self.started

    def evaluated(self, val_loss: float) -> bool:
        """Record a validation loss; True if it is the best so far."""
        improved = val_loss < self.best_val_loss
        self.best_val_loss = min(val_loss, self.best_val_loss)
        self.bad_evals = 0 if improved else self.bad_evals + 1
        self.last_eval = self.step
        return improved

    def gather_losses(self, distributed: Distributed) -> list[float]:
        """The pending losses summed over the processes; they stay pending, on the first process."""
        if not self.losses:
            return []
        summed = distributed.all_reduce_sum(torch.stack(self.losses))
        kept = summed if distributed.is_main else torch.zeros_like(summed)
        self.losses = list(kept)
        return summed.tolist()

    def take_losses(self, distributed: Distributed) -> torch.Tensor:
        """The pending losses (n,) summed over the processes; none are pending then."""
        losses = distributed.all_reduce_sum(torch.stack(self.losses))
        self.losses.clear()
        return losses


def learning_rate(config: TrainConfig, step: int, progress: float | None = None) -> float:
    """The rate of the update that follows `step` updates.

    With max_minutes, the used part of the budget, `progress`, takes the place of the steps, and the
    warm-up takes a twentieth of it at most.
    """
    if not config.decay_lr:
        return config.learning_rate
    last = max(1, config.lr_decay_iters or config.max_iters)
    warmed_up = (step + 1) / (config.warmup_iters + 1)
    done = step / last
    warmup = config.warmup_iters / last
    if progress is not None:
        warmed_up = max(warmed_up, progress / 0.05)
        done = progress
        warmup = 0.0
    if warmed_up < 1:
        return config.learning_rate * warmed_up
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    if config.lr_schedule == 'linear':
        left = (1 - done) / max(1e-9, 1 - max(1 - config.warmdown, warmup))
        return min_lr + (config.learning_rate - min_lr) * min(1.0, max(0.0, left))
    done = min(1.0, (done - warmup) / max(1e-9, 1 - warmup))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (config.learning_rate - min_lr)


class Evaluator:
    """Measures the validation loss: over the whole split, or a fixed part of it.

    With max_minutes and no eval_iters, an evaluation takes a twentieth of the time at most.
    `seconds` is how long one is expected to take, 0 without a budget.
    """

    def __init__(self, start: Start, model: GPT, batches: TrainingBatches, autocast: Any) -> None:
        config, shape = start.config, model.config
        self.model = model
        self.autocast = autocast
        self.distributed = start.distributed
        self.split = Split(start.folder, 'val', shape.block_size, shape.vocab_size)
        self.batch_size = max(batches.micro_batch_size, EVAL_TOKENS // shape.block_size)
        self.eval_iters = config.eval_iters
        self.seconds = 0.0
        per_iter = 1 if config.batch_size == 'auto' else config.batch_size
        if config.max_minutes:
            most = 0.05 * 60 * config.max_minutes * self.distributed.size
            each = seconds_per_sequence(model, self.split, self.batch_size, autocast)
            (each,) = self.distributed.all_reduce_max(each)
            if self.eval_iters is None and each * self.split.eval_sequences() > most:
                self.eval_iters = max(1, int(most / each / per_iter))
            self.seconds = each / self.distributed.size
        limit = self.eval_iters * per_iter if self.eval_iters else None
        self.n_sequences = self.split.eval_sequences(limit)
        self.seconds *= self.n_sequences

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token over the validation sequences, each read by one process."""
        distributed, device = self.distributed, self.distributed.device
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # sum of the losses, number of tokens
        batches = self.split.eval_batches(
            self.batch_size, self.n_sequences, distributed.rank, distributed.size
        )
        for x, y in batches:
            with self.autocast:
                loss = self.model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
            count = int((y >= 0).sum())
            total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        self.model.train()
        if distributed.size > 1:  # a single process may be on MPS, which has no float64
            total = distributed.all_reduce_sum(total.to(device))
        return float(total[0] / total[1])


class LogSampler:
    """Generates a sample for the log at evaluations, every `sample_interval` steps."""

    def __init__(self, start: Start, model: GPT, log: Logger) -> None:
        self.start = start
        self.model = model
        self.log = log
        self.index: Index | None = None  # of the training split, on the first process
        if start.config.originality:
            start.distributed.broadcast(self.open_index)

    def open_index(self) -> None:
        """Build or open the index that tells how original a sample is."""
        self.index = Index.open(self.start.folder)

    def sample_if_due(self, step: int) -> None:
        """Log a sample. With FSDP all processes have to take part."""
        config = self.start.config
        due = config.sample_interval and step % config.sample_interval == 0
        if not due or not (self.start.distributed.is_main or self.start.fsdp):
            return
        with self.log.timed('samples'):
            prompt, text = generate_sample(self.model, self.start.tokenizer, config.sample_start)
            originality = None
            if self.index:
                originality = self.index.compare(prompt + text, since=len(prompt))
            self.log.sample(prompt + text, originality)


def generate_sample(
    model: GPT, tokenizer: Tokenizer, prompt: str, tokens: int = 200
) -> tuple[str, str]:
    """The prompt without characters that the model does not know, and a text that continues it.

    Leaves the random state of training alone.
    """
    if isinstance(tokenizer, CharTokenizer):
        prompt = ''.join(c for c in prompt if c in tokenizer.chars)
    end = document_end(tokenizer)
    stream = model.generate(
        [end + tokenizer.encode(prompt) or [0]],
        tokens,
        temperature=0.8,
        vocab_size=tokenizer.vocab_size,
        stop_tokens=end,
    )
    ids = [int(token) for token in stream]
    return prompt, tokenizer.decode([token for token in ids if token not in end])


def pick_precision(
    config: TrainConfig, device: torch.device, model: GPT
) -> tuple[torch.dtype, contextlib.AbstractContextManager[Any]]:
    """The dtype of matrix products and its autocast context. Allows TF32 on CUDA.

    Raises UserError if the device lacks the dtype.
    """
    dtype = pick_dtype(config.dtype, device, large=model.num_params() > 1_000_000)
    if config.parallel == 'fsdp' and dtype == torch.float16:
        dtype = torch.float32  # an older GPU: the scaler does not support sharded gradients
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in fp32
    if dtype == torch.float32:
        return dtype, contextlib.nullcontext()
    return dtype, torch.autocast(device.type, dtype)


@threads.threads_restored()
def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says.

    Returns step, val_loss, best_val_loss, train_seconds (in training steps alone) and first_step_at
    (time.time() after the first step). Raises UserError for what the user can fix. Ctrl-C or
    SIGTERM saves a checkpoint and raises SystemExit 130 or 143.
    """
    # The objects of a run; each owns its own state
    fsdp = config.parallel == 'fsdp'
    distributed = Distributed(config.device, config.backend, config.timeout_minutes, alone=fsdp)
    device = distributed.device
    if device.type == 'cpu':
        keep_freed_memory()
    start = find_start(config, distributed)
    model = build_model(start)
    dtype, autocast = pick_precision(start.config, device, model)
    compiler = Compiler(start.config, device)
    place(model, start, dtype, compiler.enabled)
    batches = TrainingBatches(start, model, autocast)
    optimizers = Optimizers(model, start.config, device, dtype)
    state = RunState.at_start(start, optimizers)
    forward = compiler.wrap(model, start, batches, state.step, autocast)
    evaluator = Evaluator(start, model, batches, autocast)
    config = start.config = with_options(start.config, eval_iters=evaluator.eval_iters)
    log = Logger(config, distributed.is_main)
    distributed.broadcast(lambda: log.open(state.step, start.tokenizer))
    log.start(start, state.step, batches, evaluator, dtype, compiler)
    if config.eval_only:
        return evaluate_only(state, evaluator, batches, log)
    sampler = LogSampler(start, model, log)
    saver = Saver(config, start, state, log, model, optimizers, batches)
    schedule = Schedule(config, state, distributed, evaluator.seconds)

    # The loop
    val_loss = math.nan
    state.started = time.perf_counter()
    log.begin(state, schedule)
    model.train()
    batches.read_ahead(state.step)
    try:
        while True:
            saver.wait(0)

            # Evaluate, generate a sample and save when due
            if schedule.evaluation_due(state):
                with log.timed('evaluation'):
                    val_loss = evaluator.evaluate()
                saver.require_finite('validation loss', val_loss, state.step)
                improved = state.evaluated(val_loss)
                log.evaluation(state, val_loss, improved)
                if improved or config.always_save_checkpoint:
                    saver.save(state, best=improved)
                sampler.sample_if_due(state.step)
                schedule.evaluated(state)
                log.restart_clock()
            if schedule.checkpoint_due(state) and saver.step != state.step:
                saver.save(state)
            if schedule.stops:
                break

            # Forward and backward over the micro-batches of one step
            lr = learning_rate(config, state.step, schedule.progress)
            optimizers.set_learning_rate(lr, state.step)
            step_loss = torch.zeros((), device=device)
            for batch in batches.micro_batches(state.step):
                if schedule.interrupted(batch):
                    break
                if config.dropout:  # the masks are a function of the first sequence's number
                    torch.manual_seed((config.seed * 1_000_003 + batch.first) % 2**63)
                with gradient_sync(forward, batch.is_last):
                    with autocast:
                        loss = forward(batch.x, batch.y) * batch.weight
                    optimizers.scaler.scale(loss).backward()
                step_loss += loss.detach() / distributed.size
            if schedule.stops:  # interrupted: resuming repeats this step from its beginning
                continue

            # Update the weights
            grad_norm = optimizers.clip(model, config.grad_clip)
            saver.before_update()
            optimizers.step(grad_norm)
            optimizers.zero_grad()
            state.losses.append(step_loss)
            state.step += 1

            # Agree with the other processes on what is next, and log
            schedule.update(state, saver.time)
            if schedule.log_due(state):
                losses = state.take_losses(distributed)
                saver.require_finite('loss', losses, state.step)
                if not optimizers.scaler.is_enabled():  # it skips steps that overflow
                    saver.require_finite('gradient', grad_norm, state.step)
                log.training(state, losses, lr, grad_norm, schedule)
            log.step_done()
        if saver.step != state.step:
            saver.save(state)
        saver.wait()
    except BaseException as error:
        log.close()
        raise out_of_memory(error, config) or error from None
    finally:
        schedule.close()
        batches.close()
        log.bar.close()

    # The end
    saver.finish()
    log.end(state, schedule, saver)
    log.close()
    distributed.close()
    if schedule.stop_signal:
        sys.exit(128 + schedule.stop_signal)
    return result(state, val_loss, log)


def evaluate_only(
    state: RunState, evaluator: Evaluator, batches: TrainingBatches, log: Logger
) -> dict[str, Any]:
    """Measure the validation loss of the model as it is, and end."""
    batches.close()
    val_loss = evaluator.evaluate()
    log.say(f'validation loss in nats per token: {log.format_loss(val_loss)}')
    evaluator.distributed.close()
    state.evaluated(val_loss)
    return result(state, val_loss, log)


def result(state: RunState, val_loss: float, log: Logger) -> dict[str, Any]:
    """What `train` returns."""
    return {
        'step': state.step,
        'val_loss': val_loss,
        'best_val_loss': state.best_val_loss,
        'train_seconds': log.train_seconds,
        'first_step_at': log.first_step_at,
    }


def main() -> None:
    """Train as the command line says."""
    config = configure(TrainConfig, description='Train a GPT.')
    if hasattr(signal, 'SIGUSR1'):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    try:
        train(config)
    except RuntimeError as error:
        reason = lost_contact(error)
        if not reason:
            raise out_of_memory(error, config) or error from None
        print(
            f'train.py: process {os.environ.get("RANK")} lost the others, or waited '
            f'{config.timeout_minutes:g} minutes for them: {reason}',
            file=sys.stderr,
        )
        sys.exit(1)
    except UserError:
        # torchrun ends all processes when the first one ends: that should be the one that reports
        # the error
        if int(os.environ.get('LOCAL_RANK', 0)):
            time.sleep(10)
        raise


if __name__ == '__main__':
    run(main)
