"""One training step of a GPT on many GPUs, counted on paper: its time, its memory, and what limits it (docs/concepts/scaling.md).

python docs/concepts/simulate.py --gpus=64 --n_layer=32 --n_embd=4096 --n_head=32 --n_ff=11008 --parallel=fsdp
python docs/concepts/simulate.py --check     (published runs, predicted and measured)
python docs/concepts/simulate.py --plan      (8, 64 and 1,024 H100s for 124M to 70B parameters)
"""

import math
import os
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..'))
from configurator import UserError, configure, run  # noqa: E402

# Data sheets: dense bf16 FLOP/s, memory in GB and TB/s, NVLink in GB/s a GPU and direction, network in GB/s a node (1,600 and 3,200 Gb/s)
GPUS = {
    'A100-40GB': dict(
        peak_tflops=312, memory_gb=40, memory_tbps=1.555, intra_gbps=300, inter_gbps=200
    ),
    'A100-80GB': dict(
        peak_tflops=312, memory_gb=80, memory_tbps=2.039, intra_gbps=300, inter_gbps=200
    ),
    'H100': dict(peak_tflops=989, memory_gb=80, memory_tbps=3.35, intra_gbps=450, inter_gbps=400),
    'H200': dict(peak_tflops=989, memory_gb=141, memory_tbps=4.8, intra_gbps=450, inter_gbps=400),
}
# The only fitted constants: the share of the peak that matrix products reach, one per generation, each set by one run of llm.c on
# one node (the first two of PUBLISHED); every other run tests them.
SHARE = {'A': 0.72, 'H': 0.56}
MEMORY_SHARE = 0.85  # of the memory bandwidth, by kernels that stream: an assumption, not fitted
TAKEN = 0.2  # of a GPU's multiprocessors, by NCCL's kernels while they run beside compute: an assumption, not fitted
LINK_SHARE = 0.8  # of a link: NCCL's protocol takes about 20% (github.com/NVIDIA/nccl-tests/issues/212: 370 of 450 GB/s)
# Seconds a hop, ring and tree, over NVLink and over the network: NCCL's own model (github.com/NVIDIA/nccl, src/graph/tuning.cc at 01afd20, Simple)
RING_HOP, TREE_HOP = (3.4e-6, 9.6e-6), (28e-6, 50e-6)


@dataclass
class Run:
    check: bool = False  # print published runs beside their predictions
    plan: bool = False  # print predictions for 8, 64 and 1,024 H100s
    # Model
    arch: Literal['gpt2', 'modern'] = (
        'gpt2'  # as in model.py: biases, LayerNorm and learned positions, or RMSNorm, QK-norm and RoPE
    )
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
    micro_batch: int = 16  # windows a GPU works on at once
    parallel: Literal['ddp', 'zero1', 'fsdp'] = (
        'ddp'  # zero1: ddp whose optimizer is shared (llm.c, nanochat)
    )
    optimizer: Literal['adamw', 'muon'] = (
        'adamw'  # muon: for the blocks' matrices, and adamw for the rest
    )
    precision: Literal['bfloat16', 'float32'] = 'bfloat16'  # float32: products in TF32
    reduce_bytes: int = 4  # a gradient's size on the wire
    remat: bool = False  # keep the blocks' inputs only
    code: Literal['fused', 'eager'] = (
        'fused'  # kernels between the products: as of torch.compile or by hand, or one for each operation
    )
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
        shape = {
            'n_kv_head': self.n_head,
            'head_dim': self.n_embd // self.n_head,
            'n_ff': 4 * self.n_embd,
        }
        for key, value in {**GPUS[self.gpu], 'share': SHARE[self.gpu[0]], **shape}.items():
            setattr(self, key, getattr(self, key) or value)
        if (
            self.gpus < 1
            or self.micro_batch < 1
            or self.tokens_per_step < self.gpus * self.block_size
        ):
            raise ValueError(
                f'tokens_per_step={self.tokens_per_step}: expected at least one window of {self.block_size} for each of {self.gpus} GPUs'
            )


# -----------------------------------------------------------------------------
# Counting


def block_matrices(r: Run) -> list[tuple[int, int]]:
    """The matrices of a block as Muon sees them, (rows, columns): q, k and v, and the two halves of a gated MLP, each by itself."""
    q, kv = r.n_head * r.head_dim, r.n_kv_head * r.head_dim
    return [
        (q, r.n_embd),
        (kv, r.n_embd),
        (kv, r.n_embd),
        (r.n_embd, q),
        *[(r.n_ff, r.n_embd)] * (1 + r.swiglu),
        (r.n_embd, r.n_ff),
    ]


def num_params(r: Run) -> dict[str, int]:
    """Parameters of all blocks' matrices, of the rest of the blocks, and outside them: as model.GPT has them."""
    matrices = block_matrices(r)
    small = (
        2 * r.n_embd + 2 * r.head_dim
        if r.arch == 'modern'
        else 4 * r.n_embd + sum(rows for rows, _ in matrices)
    )
    table, end = r.vocab_size * r.n_embd, r.n_embd * (1 if r.arch == 'modern' else 2)
    return {
        'matrices': r.n_layer * sum(a * b for a, b in matrices),
        'small': r.n_layer * small,
        'outside': table * (1 if r.tie_weights else 2)
        + end
        + (0 if r.arch == 'modern' else r.block_size * r.n_embd),
    }


def flops_per_token(r: Run) -> int:
    """6 N + 12 L H D T, as model.GPT.flops_per_token: N without the tables that are only looked up.

    Attention counts in full: flash attention skips the masked half and reaches about half the speed of a plain product.
    """
    looked_up = (0 if r.arch == 'modern' else r.block_size * r.n_embd) + (
        0 if r.tie_weights else r.vocab_size * r.n_embd
    )
    return (
        6 * (sum(num_params(r).values()) - looked_up)
        + 12 * r.n_layer * r.n_head * r.head_dim * r.block_size
    )


def streamed_bytes(r: Run) -> tuple[float, float]:
    """Bytes a token that the kernels between the products read and write: forward, backward.

    Counted, not fitted, for a residual stream in fp32. Fused: the residual sum with its norm reads the stream and a branch and
    writes the stream and the norm; the activation; RoPE with QK-norm; the logits go through fp32 once and come back as gradients.
    Eager: casts, sums and norms are kernels of their own, and softmax and loss pass over fp32 logits once more each.
    """
    b, q, kv = (
        (2 if r.precision == 'bfloat16' else 4),
        r.n_head * r.head_dim,
        r.n_kv_head * r.head_dim,
    )
    norms = 2 * r.n_embd * (8 + 2 * b) if r.code == 'fused' else 2 * r.n_embd * (20 + 2 * b)
    logits = r.vocab_size * (4 + b) if r.code == 'fused' else r.vocab_size * (12 + b)
    turned = (q + kv) * b if r.arch == 'modern' else 0
    forward = r.n_layer * (norms + (3 if r.swiglu else 2) * r.n_ff * b + 2 * turned) + logits
    backward = r.n_layer * (norms + (5 if r.swiglu else 3) * r.n_ff * b + 3 * turned) + logits
    return forward, backward


def newton_schulz_flops(r: Run) -> float:
    """Of Muon's five iterations on one matrix of every kind and layer, by the busiest process."""
    layers = (
        r.n_layer if r.parallel == 'ddp' else math.ceil(r.n_layer / r.gpus)
    )  # whole matrices are dealt out
    return layers * sum(5 * (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3) for m in block_matrices(r))


# -----------------------------------------------------------------------------
# Time


def ring_bytes(gpus: int, size: float, trips: int) -> float:
    """What each GPU sends in an all-gather or reduce-scatter (`trips` 1) or an all-reduce (2) of `size` bytes."""
    return trips * (gpus - 1) / gpus * size


def ring_seconds(r: Run, size: float, trips: int = 1, calls: int = 1) -> float:
    """That traffic, in `calls` pieces. A ring passes each node's border once, so all of a node's network carries it: the slower link sets the pace."""
    if r.gpus == 1:
        return 0.0
    nodes = math.ceil(r.gpus / r.gpus_per_node)
    pace = LINK_SHARE * 1e9 * (min(r.intra_gbps, r.inter_gbps) if nodes > 1 else r.intra_gbps)
    hops = trips * ((r.gpus - nodes) * RING_HOP[0] + (nodes - 1) * RING_HOP[1])
    if trips == 2:  # NCCL takes a tree where its fewer hops pay
        hops = min(
            hops,
            2 * ((min(r.gpus, r.gpus_per_node) - 1) * TREE_HOP[0] + math.log2(nodes) * TREE_HOP[1]),
        )
    return ring_bytes(r.gpus, size, trips) / pace + calls * hops


def step_time(r: Run) -> dict[str, float]:
    """Seconds of one step: compute; exposed: communication that nothing hides; slowed: what the hidden part takes from compute; optimizer."""
    params = num_params(r)
    total, b = sum(params.values()), 2 if r.precision == 'bfloat16' else 4
    tokens = r.tokens_per_step / r.gpus
    passes = math.ceil(tokens / (r.micro_batch * r.block_size))
    peak = r.share * 1e12 * r.peak_tflops * (1 if b == 2 else 0.5)  # TF32: half of bf16
    stream = MEMORY_SHARE * 1e12 * r.memory_tbps
    (read, back), flops = streamed_bytes(r), flops_per_token(r)
    forward = tokens / passes * (flops / 3 / peak + read / stream)
    backward = tokens / passes * (flops * 2 / 3 / peak + back / stream)
    if r.remat:  # the blocks once more, without the head
        backward += forward - tokens / passes * r.vocab_size * (
            2 * r.n_embd / peak + (4 + b) / stream
        )
    if (
        r.parallel == 'fsdp'
    ):  # in every pass two gathers of the weights and a scatter of the gradients, a block at a time
        gather, scatter = (
            ring_seconds(r, size * total, calls=r.n_layer + 1) for size in (b, r.reduce_bytes)
        )
        edge = 1 / (
            r.n_layer + 1
        )  # the first gather and the last scatter have nothing to hide behind
        wire = passes * (2 * gather + scatter)
        late = max(0.0, gather * (1 - edge) - forward) + max(
            0.0, gather + scatter * (1 - edge) - backward
        )
        exposed = passes * (edge * (gather + scatter) + late)
    else:  # once a step, behind the last pass's backward; a tied table's gradient is ready at its very end
        trips, calls = (
            (2 if r.parallel == 'ddp' else 1),
            math.ceil(r.reduce_bytes * total / 25e6),
        )  # DDP's buckets
        wire = ring_seconds(r, r.reduce_bytes * total, trips, calls)
        last = (
            ring_seconds(r, r.reduce_bytes * params['outside'], trips)
            if r.tie_weights
            else wire / calls
        )
        exposed = last + max(0.0, wire - last - backward)
        if r.parallel == 'zero1':  # then the new weights, which nothing hides
            collect = ring_seconds(r, b * total)
            wire, exposed = wire + collect, exposed + collect
    # AdamW reads weight, gradient and two moments and writes three of them, after one read for the norm; Muon makes about ten passes
    owners, muon = (
        (1 if r.parallel == 'ddp' else r.gpus),
        params['matrices'] if r.optimizer == 'muon' else 0,
    )
    optimizer = (32 * (total - muon) + 40 * muon) / owners / stream + (
        newton_schulz_flops(r) / peak if muon else 0
    )
    if (
        muon and r.parallel == 'fsdp' and r.gpus > 1
    ):  # two all-to-alls of fp32 parts; each GPU has its share of the node's network
        alone = (
            r.intra_gbps
            if r.gpus <= r.gpus_per_node
            else min(r.intra_gbps, r.inter_gbps / r.gpus_per_node)
        )
        optimizer += 2 * ring_bytes(r.gpus, 4 * muon / r.gpus, 1) / (LINK_SHARE * 1e9 * alone)
    parts = {
        'compute': passes * (forward + backward),
        'exposed': exposed,
        'slowed': TAKEN * (wire - exposed),
        'optimizer': optimizer,
    }
    return parts | {'step': sum(parts.values()), 'wire': wire, 'passes': passes}


def mfu(r: Run, seconds: float) -> float:
    return flops_per_token(r) * r.tokens_per_step / seconds / (r.gpus * r.peak_tflops * 1e12)


# -----------------------------------------------------------------------------
# Memory


def memory(r: Run) -> dict[str, float]:
    """Bytes on each GPU at the peak, by part, for train.py's way: fp32 weights, AdamW's two moments, logits in chunks."""
    params = num_params(r)
    total, b = sum(params.values()), 2 if r.precision == 'bfloat16' else 4
    shards, owners = (r.gpus if r.parallel == 'fsdp' else 1), (1 if r.parallel == 'ddp' else r.gpus)
    states = 8 * total - (
        4 * params['matrices'] if r.optimizer == 'muon' else 0
    )  # Muon has one momentum
    block = (params['matrices'] + params['small']) / r.n_layer
    if (
        r.parallel == 'fsdp' and r.gpus > 1
    ):  # two gathered blocks, what is outside them, and a block's gradient on its way out
        copies = b * (2 * block + params['outside']) + 4 * (block + params['outside'])
    else:  # autocast's casts of the matrices, and DDP's buckets
        copies = (b * (params['matrices'] + r.vocab_size * r.n_embd) if b == 2 else 0) + (
            4 * total if r.gpus > 1 else 0
        )
    q, kv = r.n_head * r.head_dim, r.n_kv_head * r.head_dim
    # A layer keeps for the backward pass: two fp32 residuals, two norms' outputs, q, k, v (again turned), attention's output, the MLP's insides
    turned = q + kv if r.arch == 'modern' else 0
    layer = (
        2 * 4 * r.n_embd
        + b * (2 * r.n_embd + q + 2 * kv + turned + q + (3 if r.swiglu else 2) * r.n_ff)
        + 4 * r.n_head
    )
    tokens = min(r.micro_batch, math.ceil(r.tokens_per_step / r.gpus / r.block_size)) * r.block_size
    kept = 4 * r.n_embd * r.n_layer + layer if r.remat else layer * r.n_layer
    chunk = min(tokens, max(64, 2**27 // r.vocab_size))  # as in model.LinearCrossEntropy
    return {
        'weights': 4 * total / shards,
        'gradients': 4 * total / shards,
        'optimizer': states / owners,
        'copies': copies,
        'activations': tokens * (kept + (4 + b + b) * r.n_embd),
        'logits': chunk * r.vocab_size * (4 + b) + 4 * r.vocab_size * r.n_embd,
    }


# -----------------------------------------------------------------------------
# Published runs: (whose, measured seconds a step, the run); the pages stand in docs/concepts/scaling.md. The first two set SHARE.

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
TITAN = LLAMA_8B | dict(
    block_size=8192, micro_batch=2, memory_tbps=2.4
)  # H100s with 96 GB of slower memory, held to 500 W
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
# llm-foundry at 2,048 tokens, five of its nine sizes, the fewest and the most GPUs: GPU, size, layers, width, GPUs, windows at once, windows a step, tokens/s
for gpu, size, n_layer, n_embd, gpus, micro_batch, windows, speed in (
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
    shape: dict[str, Any] = dict(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_embd // 64,
        vocab_size=50368,
        block_size=2048,
        code='eager',
    )
    how: dict[str, Any] = dict(
        gpu=gpu, gpus=gpus, micro_batch=micro_batch, tokens_per_step=windows * 2048, parallel='fsdp'
    )
    how |= dict(remat='remat' in size, reduce_bytes=2 if gpu == 'A100-40GB' else 4)
    PUBLISHED.append((f'llm-foundry {size}', windows * 2048 / speed, Run(**shape, **how)))


def errors() -> list[float]:
    """Predicted over measured, without the two runs that set SHARE."""
    return [step_time(r)['step'] / seconds for _, seconds, r in PUBLISHED[2:]]


def check() -> None:
    print(
        '| run | GPUs | measured, s a step | predicted | predicted / measured | measured MFU |\n|---|---|---|---|---|---|'
    )
    for i, (name, seconds, r) in enumerate(PUBLISHED):
        step = step_time(r)['step']
        ratio = f'{step / seconds:.2f}{" (set the share)" if i < 2 else ""}'
        print(
            f'| {name} | {r.gpus} × {r.gpu} | {seconds:.3f} | {step:.3f} | {ratio} | {mfu(r, seconds):.0%} |'
        )
    off = [abs(e - 1) for e in errors()]
    print(
        f'{len(off)} tests: median ratio {statistics.median(errors()):.2f}, median error {statistics.median(off):.0%}, largest {max(off):.0%}'
    )
    few, many = (
        sum(
            memory(Run(**TITAN, gpus=n, tokens_per_step=n * 16384))[k]
            for k in ('weights', 'gradients', 'optimizer')
        )
        for n in (8, 128)
    )
    print(
        f'torchtitan 8B, 8 to 128 GPUs: {(few - many) / 2**30:.1f} GiB less on each; measured {77.0 - 62.0:.1f}'
    )


# -----------------------------------------------------------------------------
# Predictions

PLAN = [  # GPT-2's smallest and largest, Llama 2's 7B and 70B shapes (Touvron et al. 2023); tokens a step as people take
    ('124M', dict(tokens_per_step=2**19)),
    ('1.6B', dict(n_layer=48, n_embd=1600, n_head=25, tokens_per_step=2**20)),
    (
        '7B',
        LLAMA
        | dict(
            n_layer=32,
            n_embd=4096,
            n_head=32,
            n_kv_head=32,
            n_ff=11008,
            vocab_size=32000,
            block_size=4096,
            tokens_per_step=2**22,
        ),
    ),
    (
        '70B',
        LLAMA
        | dict(
            n_layer=80,
            n_embd=8192,
            n_head=64,
            n_ff=28672,
            vocab_size=32000,
            block_size=4096,
            tokens_per_step=2**23,
        ),
    ),
]


def fastest(r: Run) -> Run | None:
    """The quickest of ddp and fsdp, with remat or without, that leaves a tenth of the memory free; of equals the largest micro-batch. None: none fits."""
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
    return max(
        (way for way in fits if step_time(way)['step'] < 1.005 * best),
        key=lambda way: way.micro_batch,
        default=None,
    )


def plan() -> None:
    print(
        '| model | GPUs | tokens a step | how | step, s | compute, exposed, slowed, optimizer | GB a GPU | tokens/s | MFU | hours |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    for name, shape in PLAN:
        for gpus in (8, 64, 1024):
            tokens = max(
                shape['tokens_per_step'], gpus * shape.get('block_size', 1024)
            )  # at least a window for each
            r = Run(
                **shape | dict(parallel='fsdp', gpus=gpus, tokens_per_step=tokens, optimizer='muon')
            )
            best = fastest(r)
            if best is None:
                least = sum(memory(replace(r, micro_batch=1, remat=True)).values())
                print(
                    f'| {name} | {gpus} | {tokens:,} | does not fit: {least / 1e9:.0f} GB |'
                    + ' |' * 6
                )
                continue
            t, used, hours = (
                step_time(best),
                sum(memory(best).values()),
                20 * sum(num_params(r).values()) / tokens / 3600,
            )
            shares = ', '.join(
                f'{t[k] / t["step"]:.0%}' for k in ('compute', 'exposed', 'slowed', 'optimizer')
            )
            how = (
                f'{best.parallel}{", remat" if best.remat else ""}, micro-batch {best.micro_batch}'
            )
            print(
                f'| {name} | {gpus:,} | {tokens:,} | {how} | {t["step"]:.3f} | {shares} | {used / 1e9:.0f} ',
                end='',
            )
            print(
                f'| {tokens / t["step"]:,.0f} | {mfu(best, t["step"]):.0%} | {hours * t["step"]:,.1f} |'
            )


def main() -> None:
    r = configure(Run, description=(__doc__ or '').split('\n')[0])
    if r.check or r.plan:
        return (check if r.check else plan)()
    t, parts = step_time(r), memory(r)
    print(
        f'{sum(num_params(r).values()):,} parameters, {flops_per_token(r):.3g} FLOPs a token, {t["passes"]} passes a step on each of {r.gpus} {r.gpu}'
    )
    shares = ', '.join(f'{k} {t[k]:.4f}' for k in ('compute', 'exposed', 'slowed', 'optimizer'))
    print(f'step {t["step"]:.4f} s: {shares}; on the wire {t["wire"]:.4f} s')
    print(
        f'{r.tokens_per_step / t["step"]:,.0f} tokens/s, {mfu(r, t["step"]):.1%} MFU; {r.steps:,} steps in {r.steps * t["step"] / 3600:,.1f} hours'
    )
    print(
        f'{sum(parts.values()) / 1e9:.1f} of {r.memory_gb} GB: '
        + ', '.join(f'{k} {v / 1e9:.1f}' for k, v in parts.items())
    )
    if sum(parts.values()) > 1e9 * r.memory_gb:
        raise UserError(
            'that does not fit: smaller --micro_batch, --remat, --parallel=fsdp, or more GPUs'
        )


if __name__ == '__main__':
    run(main)
