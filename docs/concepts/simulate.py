"""Predict a training step of a GPT on many GPUs: its time, its memory, and what limits it.

    python docs/concepts/simulate.py --gpus=64 --n_layer=48 --n_embd=1600 --n_head=25
    python docs/concepts/simulate.py --check     # published runs, predicted and measured
    python docs/concepts/simulate.py --plan      # 8, 64 and 1,024 H100s, 124M to 70B parameters

docs/concepts/scaling.md explains the model.
"""

import itertools
import math
import os
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from configurator import UserError, configure, run  # noqa: E402

# Data sheets: dense bf16 FLOP/s, memory in GB and TB/s, NVLink in GB/s per GPU and direction,
# network in GB/s per node (1,600 and 3,200 Gb/s)
SHEET = ('peak_tflops', 'memory_gb', 'memory_tbps', 'intra_gbps', 'inter_gbps')
GPUS = {
    'A100-40GB': (312, 40, 1.555, 300, 200),
    'A100-80GB': (312, 80, 2.039, 300, 200),
    'H100': (989, 80, 3.35, 450, 400),
    'H200': (989, 141, 4.8, 450, 400),
}
# The only fitted constants: the share of the peak that matrix products reach, one per generation,
# each set by one run of llm.c on one node (the first two of PUBLISHED); all other runs test them.
SHARE = {'A': 0.72, 'H': 0.56}
# Assumptions, not fitted: the share of the memory bandwidth that streaming kernels reach, and of a
# GPU's multiprocessors that NCCL's kernels take while they run beside compute
MEMORY_SHARE, TAKEN = 0.85, 0.2
# The share of a link that NCCL's protocol leaves (github.com/NVIDIA/nccl-tests/issues/212: 370 of
# 450 GB/s)
LINK_SHARE = 0.8
# Seconds per hop over NVLink and over the network, from NCCL's own model (github.com/NVIDIA/nccl,
# src/graph/tuning.cc at 01afd20, Simple)
RING_HOP, TREE_HOP = (3.4e-6, 9.6e-6), (28e-6, 50e-6)
BYTES = {'bfloat16': 2, 'float32': 4}
# Bytes per element of the residual stream and per logit that move in fp32, by `code`
FP32_BYTES = {'fused': (8, 4), 'eager': (20, 12)}


@dataclass
class Run:
    check: bool = False  # print published runs beside their predictions
    plan: bool = False  # print predictions for 8, 64 and 1,024 H100s
    # Model
    arch: Literal['gpt2', 'modern'] = 'gpt2'  # as in model.py
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_embd: int = 768
    n_ff: int = 0  # 0: 4 n_embd
    swiglu: bool = False  # a gated MLP: its first matrix is twice as wide
    tie_weights: bool = True
    vocab_size: int = 50304
    block_size: int = 1024
    # Run
    gpus: int = 8
    tokens_per_step: int = 524288
    micro_batch: int = 16  # sequences a GPU works on at once
    # zero1: ddp whose optimizer is sharded (llm.c, nanochat)
    parallel: Literal['ddp', 'zero1', 'fsdp'] = 'ddp'
    # muon: for the blocks' matrices, and adamw for the rest
    optimizer: Literal['adamw', 'muon'] = 'adamw'
    precision: Literal['bfloat16', 'float32'] = 'bfloat16'  # float32: products in TF32
    reduce_bytes: int = 4  # a gradient's size on the wire
    remat: bool = False  # keep the blocks' inputs only
    # kernels between the products: of torch.compile or by hand, or one per operation
    code: Literal['fused', 'eager'] = 'fused'
    steps: int = 20000  # of the whole run
    # Machine; 0: what the GPU's data sheet says
    gpu: Literal['A100-40GB', 'A100-80GB', 'H100', 'H200'] = 'H100'
    gpus_per_node: int = 8
    share: float = 0  # of the peak that matrix products reach; 0: the generation's
    peak_tflops: float = 0
    memory_gb: float = 0
    memory_tbps: float = 0
    intra_gbps: float = 0  # NVLink, a GPU and direction
    inter_gbps: float = 0  # network, a node and direction

    def __post_init__(self) -> None:
        defaults = dict(zip(SHEET, GPUS[self.gpu])) | {
            'share': SHARE[self.gpu[0]],
            'n_kv_head': self.n_head,
            'head_dim': self.n_embd // self.n_head,
            'n_ff': 4 * self.n_embd,
        }
        for key, value in defaults.items():
            setattr(self, key, getattr(self, key) or value)
        most = self.tokens_per_step // self.block_size
        if self.micro_batch < 1 or not 1 <= self.gpus <= most:
            raise ValueError(
                f'tokens_per_step={self.tokens_per_step}: expected at least one sequence of '
                f'{self.block_size} for each of {self.gpus} GPUs'
            )


# -----------------------------------------------------------------------------
# Counting


def widths(r: Run) -> tuple[int, int, int]:
    """Columns of the queries, of the keys, and of queries and keys that RoPE and QK-norm change."""
    q, kv = r.n_head * r.head_dim, r.n_kv_head * r.head_dim
    return q, kv, {'gpt2': 0, 'modern': q + kv}[r.arch]


def block_matrices(r: Run) -> list[tuple[int, int]]:
    """A block's matrices as Muon sees them, (rows, columns): q, k, v and a gated MLP's halves."""
    q, kv, _ = widths(r)
    shapes = [(q, r.n_embd), (kv, r.n_embd), (kv, r.n_embd), (r.n_embd, q), (r.n_embd, r.n_ff)]
    return shapes + [(r.n_ff, r.n_embd)] * (1 + r.swiglu)


def num_params(r: Run) -> dict[str, int]:
    """Parameters as model.GPT has them.

    The blocks' matrices and small parameters, the head with its norm, and the tables that are only
    looked up.
    """
    matrices, table = block_matrices(r), r.vocab_size * r.n_embd
    small, end, positions = 2 * r.n_embd + 2 * r.head_dim, r.n_embd, 0
    if r.arch == 'gpt2':
        small = 4 * r.n_embd + sum(rows for rows, _ in matrices)
        end, positions = 2 * r.n_embd, r.block_size * r.n_embd
    return {
        'matrices': r.n_layer * sum(a * b for a, b in matrices),
        'small': r.n_layer * small,
        'head': table + end,
        'tables': positions + table * (1 - r.tie_weights),
    }


def flops_per_token(r: Run) -> int:
    """6 N + 12 L H D T, as model.GPT.flops_per_token: N without the tables that are only looked up.

    Attention counts in full: flash attention skips the masked half, at about half the speed.
    """
    params = num_params(r)
    attention = 12 * r.n_layer * r.n_head * r.head_dim * r.block_size
    return 6 * (sum(params.values()) - params['tables']) + attention


def streamed_bytes(r: Run) -> tuple[float, float]:
    """Bytes per token that the kernels between the products read and write: forward, backward.

    Counted, not fitted, for a residual stream in fp32. Fused: the residual sum with its norm reads
    the stream and a branch and writes the stream and the norm; the activation; RoPE with QK-norm;
    the logits go through fp32 once and come back as gradients. Eager: casts, sums and norms are
    kernels of their own, and softmax and loss pass over fp32 logits once more each.
    """
    b, (stream, logit) = BYTES[r.precision], FP32_BYTES[r.code]
    rotated = widths(r)[2] * b
    norms, logits = 2 * r.n_embd * (stream + 2 * b), r.vocab_size * (logit + b)
    forward = r.n_layer * (norms + (2 + r.swiglu) * r.n_ff * b + 2 * rotated) + logits
    backward = r.n_layer * (norms + (3 + 2 * r.swiglu) * r.n_ff * b + 3 * rotated) + logits
    return forward, backward


def optimizer_shards(r: Run) -> int:
    """How many GPUs share the optimizer's work."""
    return {'ddp': 1, 'zero1': r.gpus, 'fsdp': r.gpus}[r.parallel]


def newton_schulz_flops(r: Run) -> float:
    """Muon's five iterations on a matrix of every kind and layer, on the busiest GPU."""
    layers = math.ceil(r.n_layer / optimizer_shards(r))  # whole matrices are distributed
    return layers * sum(5 * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in block_matrices(r))


# -----------------------------------------------------------------------------
# Time


def ring_bytes(gpus: int, size: float, trips: int) -> float:
    """What each GPU sends for `size` bytes: `trips` is 1 for an all-gather, 2 for an all-reduce."""
    return trips * (gpus - 1) / gpus * size


def ring_seconds(r: Run, size: float, trips: int = 1, calls: int = 1) -> float:
    """The seconds for that, in `calls` pieces.

    A ring passes each node's border once, so a node's whole network carries it, and the slower link
    sets the pace.
    """
    if r.gpus == 1:
        return 0.0
    nodes = math.ceil(r.gpus / r.gpus_per_node)
    pace = min(r.intra_gbps, r.inter_gbps) if nodes > 1 else r.intra_gbps
    hops = trips * ((r.gpus - nodes) * RING_HOP[0] + (nodes - 1) * RING_HOP[1])
    if trips == 2:  # NCCL uses a tree where its fewer hops pay
        within = min(r.gpus, r.gpus_per_node) - 1
        hops = min(hops, 2 * (within * TREE_HOP[0] + math.log2(nodes) * TREE_HOP[1]))
    return ring_bytes(r.gpus, size, trips) / (LINK_SHARE * 1e9 * pace) + calls * hops


def optimizer_time(r: Run, peak: float, stream: float) -> float:
    """Seconds of the optimizer's step.

    AdamW reads weight, gradient and two moments and writes three of them, after one read for the
    norm; Muon makes about ten passes over its matrices, beside its products.
    """
    total, matrices = sum(num_params(r).values()), num_params(r)['matrices']
    owners = optimizer_shards(r)
    if r.optimizer == 'adamw':
        return 32 * total / owners / stream
    seconds = (32 * total + 8 * matrices) / owners / stream + newton_schulz_flops(r) / peak
    if r.parallel == 'fsdp' and r.gpus > 1:
        # two all-to-alls of fp32 parts; each GPU has its share of the node's network
        pace = r.intra_gbps
        if r.gpus > r.gpus_per_node:
            pace = min(pace, r.inter_gbps / r.gpus_per_node)
        seconds += 2 * ring_bytes(r.gpus, 4 * matrices / r.gpus, 1) / (LINK_SHARE * 1e9 * pace)
    return seconds


def step_time(r: Run) -> dict[str, float]:
    """Seconds of one step, by part.

    compute; exposed: communication that nothing hides; slowed: what the hidden communication takes
    from compute; optimizer.
    """
    params, b, tokens = num_params(r), BYTES[r.precision], r.tokens_per_step / r.gpus
    total = sum(params.values())
    passes = math.ceil(tokens / (r.micro_batch * r.block_size))
    peak = r.share * 1e12 * r.peak_tflops * 2 / b  # TF32: half of bf16
    stream = MEMORY_SHARE * 1e12 * r.memory_tbps
    (read, back), flops = streamed_bytes(r), flops_per_token(r)
    forward = tokens / passes * (flops / 3 / peak + read / stream)
    backward = tokens / passes * (flops * 2 / 3 / peak + back / stream)
    if r.remat:  # the blocks once more, without the head
        head = r.vocab_size * (2 * r.n_embd / peak + (4 + b) / stream)
        backward += forward - tokens / passes * head
    if r.parallel == 'fsdp':
        # per pass, two gathers of the weights and a scatter of the gradients, block by block; the
        # first gather and the last scatter have nothing to hide behind
        gather = ring_seconds(r, b * total, calls=r.n_layer + 1)
        scatter = ring_seconds(r, r.reduce_bytes * total, calls=r.n_layer + 1)
        edge = 1 / (r.n_layer + 1)
        wire = passes * (2 * gather + scatter)
        late = max(0.0, gather * (1 - edge) - forward)
        late += max(0.0, gather + scatter * (1 - edge) - backward)
        exposed = passes * (edge * (gather + scatter) + late)
    else:
        # once per step, behind the last backward pass, in DDP's buckets; a tied table's gradient is
        # ready at its very end
        trips, calls = {'ddp': 2, 'zero1': 1}[r.parallel], math.ceil(r.reduce_bytes * total / 25e6)
        wire = ring_seconds(r, r.reduce_bytes * total, trips, calls)
        outside = r.reduce_bytes * (params['head'] + params['tables'])
        last = ring_seconds(r, outside, trips) if r.tie_weights else wire / calls
        exposed = last + max(0.0, wire - last - backward)
        if r.parallel == 'zero1':  # then the new weights, which nothing hides
            collect = ring_seconds(r, b * total)
            wire, exposed = wire + collect, exposed + collect
    parts = {
        'compute': passes * (forward + backward),
        'exposed': exposed,
        'slowed': TAKEN * (wire - exposed),
        'optimizer': optimizer_time(r, peak, stream),
    }
    return parts | {'step': sum(parts.values()), 'wire': wire, 'passes': passes}


def mfu(r: Run, seconds: float) -> float:
    return flops_per_token(r) * r.tokens_per_step / seconds / (r.gpus * r.peak_tflops * 1e12)


# -----------------------------------------------------------------------------
# Memory


def memory(r: Run) -> dict[str, float]:
    """Peak bytes on each GPU, by part, as in train.py: fp32 weights, logits in chunks."""
    params, b = num_params(r), BYTES[r.precision]
    total, outside = sum(params.values()), params['head'] + params['tables']
    shards = {'ddp': 1, 'zero1': 1, 'fsdp': r.gpus}[r.parallel]
    moments = 8 * total - {'adamw': 0, 'muon': 4}[r.optimizer] * params['matrices']  # Muon has one
    if shards > 1:
        # two gathered blocks, what is outside of them, and a block's gradient on its way out
        block = (params['matrices'] + params['small']) / r.n_layer
        copies = b * (2 * block + outside) + 4 * (block + outside)
    else:  # autocast's casts of the matrices, and DDP's buckets
        casts = {2: params['matrices'] + r.vocab_size * r.n_embd, 4: 0}[b]
        copies = b * casts + (4 * total if r.gpus > 1 else 0)
    # A layer keeps for the backward pass: two fp32 residuals, two norms' outputs, q, k, v (again
    # after RoPE), attention's output, the MLP's intermediate values
    q, kv, rotated = widths(r)
    kept = 2 * r.n_embd + 2 * q + 2 * kv + rotated + (2 + r.swiglu) * r.n_ff
    layer = 2 * 4 * r.n_embd + b * kept + 4 * r.n_head
    activations = 4 * r.n_embd * r.n_layer + layer if r.remat else layer * r.n_layer
    tokens = min(r.micro_batch, math.ceil(r.tokens_per_step / r.gpus / r.block_size)) * r.block_size
    chunk = min(tokens, max(64, 2**27 // r.vocab_size))  # as in model.LinearCrossEntropy
    return {
        'weights': 4 * total / shards,
        'gradients': 4 * total / shards,
        'optimizer': moments / optimizer_shards(r),
        'copies': copies,
        'activations': tokens * (activations + (4 + b + b) * r.n_embd),
        'logits': chunk * r.vocab_size * (4 + b) + 4 * r.vocab_size * r.n_embd,
    }


# -----------------------------------------------------------------------------
# Published runs: (whose, measured seconds per step, the run); docs/concepts/scaling.md has the
# sources. The first two set SHARE.

LLM_C: dict[str, Any] = dict(gpu='A100-80GB', parallel='zero1', reduce_bytes=2)
NANOCHAT: dict[str, Any] = dict(
    arch='modern',
    tie_weights=False,
    vocab_size=65536,
    block_size=2048,
    parallel='zero1',
    optimizer='muon',
    reduce_bytes=2,
)
LLAMA: dict[str, Any] = dict(
    arch='modern', n_kv_head=8, swiglu=True, tie_weights=False, parallel='fsdp'
)
LLAMA_8B = LLAMA | dict(n_layer=32, n_embd=4096, n_head=32, n_ff=14336, vocab_size=128256)
LLAMA_34B = LLAMA | dict(
    n_layer=48,
    n_embd=8192,
    n_head=64,
    n_ff=22016,
    vocab_size=32000,
    block_size=4096,
    remat=True,
    reduce_bytes=2,
)
# H100s with 96 GB of slower memory, limited to 500 W
TITAN = LLAMA_8B | dict(block_size=8192, micro_batch=2, memory_tbps=2.4)
PUBLISHED = [
    ('llm.c 350M', 0.820, Run(n_layer=24, n_embd=1024, n_head=16, micro_batch=64, **LLM_C)),
    (
        'llm.c 1.6B',
        2.80,
        Run(n_layer=48, n_embd=1600, n_head=25, tokens_per_step=2**20, **LLM_C | dict(gpu='H100')),
    ),
    ('llm.c 124M', 0.300, Run(micro_batch=64, **LLM_C)),
    ('llm.c 774M', 1.7, Run(n_layer=36, n_embd=1280, n_head=20, micro_batch=32, **LLM_C)),
    (
        'nanoGPT 124M',
        0.562,
        Run(gpu='A100-40GB', micro_batch=12, tokens_per_step=491520, vocab_size=50257),
    ),
    (
        'nanochat d20',
        172.85 * 60 / 21400,
        Run(n_layer=20, n_embd=1280, n_head=10, micro_batch=32, **NANOCHAT),
    ),
    ('nanochat d32', 1.572, Run(n_layer=32, n_embd=2048, n_head=16, micro_batch=8, **NANOCHAT)),
    (
        'KempnerForge 8B',
        3.36,
        Run(
            **LLAMA_8B,
            block_size=4096,
            micro_batch=4,
            gpu='H200',
            gpus=4,
            gpus_per_node=4,
            tokens_per_step=131072,
            remat=True,
        ),
    ),
    ('torchtitan 8B', 16384 / 6667, Run(**TITAN, gpus=8, tokens_per_step=8 * 16384)),
    ('torchtitan 8B', 16384 / 6514, Run(**TITAN, gpus=128, tokens_per_step=128 * 16384)),
    (
        'fms-fsdp 34B',
        8192 / 700,
        Run(
            **LLAMA_34B,
            gpu='A100-80GB',
            gpus=128,
            micro_batch=2,
            tokens_per_step=128 * 8192,
            inter_gbps=50,
            code='eager',
        ),
    ),
    (
        'fms-fsdp 34B',
        8192 / 1550,
        Run(
            **LLAMA_34B,
            gpus=96,
            micro_batch=2,
            tokens_per_step=96 * 8192,
            inter_gbps=100,
            code='eager',
        ),
    ),
]
# llm-foundry at 2,048 tokens, five of its nine sizes, the fewest and the most GPUs: GPU, size,
# layers, width, GPUs, sequences at once, sequences per step, tokens/s
for gpu, size, n_layer, n_embd, gpus, micro_batch, sequences, speed in (
    ('A100-40GB', '125M', 12, 768, 8, 26, 624, 1090678),
    ('A100-40GB', '125M', 12, 768, 128, 26, 3328, 15863837),
    ('A100-40GB', '1B', 24, 2048, 8, 8, 512, 154171),
    ('A100-40GB', '1B', 24, 2048, 128, 10, 1280, 2386897),
    ('A100-40GB', '7B remat', 32, 4096, 8, 12, 384, 29436),
    ('A100-40GB', '7B remat', 32, 4096, 128, 18, 2304, 463749),
    ('A100-40GB', '13B remat', 40, 5120, 8, 4, 512, 13347),
    ('A100-40GB', '13B remat', 40, 5120, 128, 16, 2048, 252444),
    ('A100-40GB', '70B remat', 80, 8192, 64, 2, 128, 17672),
    ('A100-40GB', '70B remat', 80, 8192, 128, 4, 512, 48194),
    ('H100', '1B', 24, 2048, 8, 14, 112, 363645),
    ('H100', '1B', 24, 2048, 64, 20, 1280, 2841754),
    ('H100', '7B', 32, 4096, 8, 6, 48, 85144),
    ('H100', '13B', 40, 5120, 8, 2, 16, 38336),
    ('H100', '13B', 40, 5120, 64, 2, 128, 307209),
    ('H100', '70B remat', 80, 8192, 32, 2, 1024, 28242),
    ('H100', '70B remat', 80, 8192, 64, 8, 2048, 66523),
):
    shape: dict[str, Any] = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64)
    shape |= dict(vocab_size=50368, block_size=2048, code='eager', remat='remat' in size)
    how: dict[str, Any] = dict(gpu=gpu, gpus=gpus, micro_batch=micro_batch, parallel='fsdp')
    how |= dict(tokens_per_step=sequences * 2048, reduce_bytes={'A100-40GB': 2, 'H100': 4}[gpu])
    PUBLISHED.append((f'llm-foundry {size}', sequences * 2048 / speed, Run(**shape, **how)))


def errors() -> list[float]:
    """Predicted over measured, without the two runs that set SHARE."""
    return [step_time(r)['step'] / seconds for _, seconds, r in PUBLISHED[2:]]


def check() -> None:
    print('| run | GPUs | measured, s a step | predicted | predicted / measured | measured MFU |')
    print('|---|---|---|---|---|---|')
    for i, (name, seconds, r) in enumerate(PUBLISHED):
        step = step_time(r)['step']
        note = ' (set the share)' if i < 2 else ''
        print(
            f'| {name} | {r.gpus} × {r.gpu} | {seconds:.3f} | {step:.3f} '
            f'| {step / seconds:.2f}{note} | {mfu(r, seconds):.0%} |'
        )
    off = [abs(e - 1) for e in errors()]
    print(
        f'{len(off)} tests: median ratio {statistics.median(errors()):.2f}, '
        f'median error {statistics.median(off):.0%}, largest {max(off):.0%}'
    )
    few, many = (memory(Run(**TITAN, gpus=n, tokens_per_step=n * 16384)) for n in (8, 128))
    less = sum(few[key] - many[key] for key in ('weights', 'gradients', 'optimizer'))
    print(
        f'torchtitan 8B, 8 to 128 GPUs: {less / 2**30:.1f} GiB less on each; '
        f'measured {77.0 - 62.0:.1f}'
    )


# -----------------------------------------------------------------------------
# Predictions

# GPT-2's smallest and largest, Llama 2's 7B and 70B shapes (Touvron et al. 2023), with usual
# numbers of tokens per step
LLAMA_2 = LLAMA | dict(vocab_size=32000, block_size=4096)
PLAN = [
    ('124M', 2**19, {}),
    ('1.6B', 2**20, dict(n_layer=48, n_embd=1600, n_head=25)),
    ('7B', 2**22, LLAMA_2 | dict(n_layer=32, n_embd=4096, n_head=32, n_kv_head=32, n_ff=11008)),
    ('70B', 2**23, LLAMA_2 | dict(n_layer=80, n_embd=8192, n_head=64, n_ff=28672)),
]
PARTS = ('compute', 'exposed', 'slowed', 'optimizer')


def fastest(r: Run) -> Run | None:
    """The fastest of ddp and fsdp, with remat or without, that leaves a tenth of the memory free.

    Of equally fast ones, the one with the largest micro-batch; None if none fits.
    """
    most = r.tokens_per_step // r.gpus // r.block_size
    ways = [
        replace(r, parallel=p, micro_batch=2**i, remat=remat)
        for p in ('ddp', 'fsdp')
        for i in range(8)
        if 2**i <= most
        for remat in (False, True)
    ]
    fits = [way for way in ways if sum(memory(way).values()) < 0.9e9 * r.memory_gb]
    best = min((step_time(way)['step'] for way in fits), default=0)
    equal = [way for way in fits if step_time(way)['step'] < 1.005 * best]
    return max(equal, key=lambda way: way.micro_batch, default=None)


def plan() -> None:
    print('| model | GPUs | tokens a step | how | step, s ', end='')
    print('| compute, exposed, slowed, optimizer | GB a GPU | tokens/s | MFU | hours |')
    print('|---|---|---|---|---|---|---|---|---|---|')
    for (name, tokens, shape), gpus in itertools.product(PLAN, (8, 64, 1024)):
        tokens = max(tokens, gpus * shape.get('block_size', 1024))  # at least a sequence for each
        how: dict[str, Any] = dict(parallel='fsdp', optimizer='muon')
        r = Run(**shape | how, gpus=gpus, tokens_per_step=tokens)
        best = fastest(r)
        if best is None:
            least = sum(memory(replace(r, micro_batch=1, remat=True)).values()) / 1e9
            print(f'| {name} | {gpus} | {tokens:,} | does not fit: {least:.0f} GB |' + ' |' * 6)
            continue
        t, used = step_time(best), sum(memory(best).values())
        step, hours = t['step'], 20 * sum(num_params(r).values()) / tokens / 3600
        shares = ', '.join(f'{t[part] / step:.0%}' for part in PARTS)
        print(
            f'| {name} | {gpus:,} | {tokens:,} | {best.parallel}, {"remat, " if best.remat else ""}'
            f'micro-batch {best.micro_batch} | {step:.3f} | {shares} | {used / 1e9:.0f} '
            f'| {tokens / step:,.0f} | {mfu(best, step):.0%} | {hours * step:,.1f} |'
        )


def main() -> None:
    r = configure(Run, description=(__doc__ or '').split('\n')[0])
    if r.check:
        return check()
    if r.plan:
        return plan()
    t, parts = step_time(r), memory(r)
    step, used = t['step'], sum(parts.values())
    print(
        f'{sum(num_params(r).values()):,} parameters, {flops_per_token(r):.3g} FLOPs a token, '
        f'{t["passes"]} passes a step on each of {r.gpus} {r.gpu}'
    )
    shares = ', '.join(f'{part} {t[part]:.4f}' for part in PARTS)
    print(f'step {step:.4f} s: {shares}; on the wire {t["wire"]:.4f} s')
    print(
        f'{r.tokens_per_step / step:,.0f} tokens/s, {mfu(r, step):.1%} MFU; '
        f'{r.steps:,} steps in {r.steps * step / 3600:,.1f} hours'
    )
    sizes = ', '.join(f'{part} {size / 1e9:.1f}' for part, size in parts.items())
    print(f'{used / 1e9:.1f} of {r.memory_gb} GB: {sizes}')
    if used > 1e9 * r.memory_gb:
        raise UserError(
            'that does not fit: smaller --micro_batch, --remat, --parallel=fsdp, or more GPUs'
        )


if __name__ == '__main__':
    run(main)
