"""The GPT: configuration, blocks, loss, and generation with a KV cache. Imports nothing but torch.

Two presets, each part of which can be overridden:
- arch='gpt2': LayerNorm, learned positions, GELU, tied head (GPT-2, Radford et al. 2019).
- arch='modern': RMSNorm, RoPE, QK-norm, grouped-query attention, SwiGLU, no biases, output
  projections that start at zero. This is Qwen3 (Qwen team 2025), so common runtimes can load it.

Shapes in comments: B sequences of T tokens, C = n_embd, H heads of D = head_dim, V = vocab_size.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PRESETS: dict[str, dict[str, Any]] = {
    'gpt2': dict(
        bias=True, position='learned', norm='layernorm', mlp='gelu', qk_norm=False, tie_weights=True
    ),
    'modern': dict(
        bias=False, position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, tie_weights=False
    ),
}
NANOGPT_KEYS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
ACTIVATIONS = {
    'gelu': lambda x: F.gelu(x, approximate='tanh'),
    'relu': F.relu,  # Vaswani et al. 2017
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021
}
CHOICES = {
    'position': ('learned', 'rope', 'sinusoidal'),
    'norm': ('layernorm', 'rmsnorm'),
    'mlp': ('swiglu', *ACTIVATIONS),
}
BY_ARCH: Any = None  # the default of fields that __post_init__ derives from the others


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def require(condition: Any, message: str) -> None:
    """Raise ValueError with the message if the condition is false."""
    if not condition:
        raise ValueError(message)


@dataclass
class GPTConfig:
    """The shape of a model. None in place of a value means "derive it from the other fields".

    Raises ValueError, with the field's name, for a bad value.
    """

    block_size: int = 1024  # tokens of context
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = BY_ARCH  # biases in linear layers and LayerNorms
    arch: str = 'gpt2'  # nanoGPT's checkpoints name none, hence this default; train.py's is modern
    n_kv_head: int = BY_ARCH  # key and value heads, each shared by n_head / n_kv_head query heads
    n_ff: int = BY_ARCH  # width of the MLP: 4 C, for swiglu 8/3 C rounded up to a multiple of 32
    position: str = BY_ARCH  # learned, rope (Su et al. 2021), sinusoidal (Vaswani et al. 2017)
    norm: str = BY_ARCH  # layernorm (Ba et al. 2016), rmsnorm (Zhang and Sennrich 2019)
    mlp: str = BY_ARCH  # gelu, swiglu (Shazeer 2020), relu, relu2 (So et al. 2021)
    qk_norm: bool = BY_ARCH  # normalize queries and keys (Henry et al. 2020): more stable training
    tie_weights: bool = BY_ARCH  # one matrix for embedding and head (Press and Wolf 2017)
    rope_theta: float = 10000.0
    head_dim: int = BY_ARCH  # width of a head; n_embd / n_head by default

    def __post_init__(self) -> None:
        require(self.arch in PRESETS, f'arch={self.arch}: expected gpt2 or modern')
        for key in 'block_size vocab_size n_layer n_head n_embd n_kv_head head_dim n_ff'.split():
            value = getattr(self, key)
            require(value is None or value >= 1, f'{key}={value}: expected at least 1')
        message = f'n_head={self.n_head} does not divide n_embd={self.n_embd}: '
        message += 'all heads have the same width'
        require(self.head_dim or self.n_embd % self.n_head == 0, message)
        defaults = PRESETS[self.arch] | {
            'n_kv_head': self.n_head,
            'head_dim': self.n_embd // self.n_head,
            'n_ff': 4 * self.n_embd,
        }
        if (self.mlp or defaults['mlp']) == 'swiglu':
            defaults['n_ff'] = 32 * ceil_div(8 * self.n_embd, 3 * 32)
        for key, value in defaults.items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            require(value in choices, f'{key}={value}: expected one of {", ".join(choices)}')
        message = f'n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}'
        require(self.n_head % self.n_kv_head == 0, message)
        require(0 <= self.dropout < 1, f'dropout={self.dropout}: expected 0 or more, and below 1')
        message = f'head_dim={self.head_dim} (n_embd / n_head, if not given): '
        message += 'RoPE rotates pairs of features, so it must be even'
        require(self.position != 'rope' or self.head_dim % 2 == 0, message)

    def to_dict(self) -> dict[str, Any]:
        """The arguments that rebuild this config; nanoGPT's seven alone where they suffice."""
        nanogpt = {key: getattr(self, key) for key in NANOGPT_KEYS}
        return nanogpt if GPTConfig(**nanogpt) == self else asdict(self)


# -----------------------------------------------------------------------------
# Blocks


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that computes in the dtype of its input, whatever that of its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, dim) → the same shape."""
        bias = None if self.bias is None else self.bias.type_as(input)
        return F.layer_norm(input, self.weight.shape, self.weight.type_as(input), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight over the last dimension, in the dtype of x; epsilon is 1e-6."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, dim) → the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), 1e-6)


def make_norm(config: GPTConfig, dim: int) -> nn.Module:
    """The norm over `dim` features that the config names."""
    return RMSNorm(dim) if config.norm == 'rmsnorm' else LayerNorm(dim, bias=config.bias)


def angles(length: int, dim: int, theta: float) -> torch.Tensor:
    """The rotation of each pair of features at each position: (length, dim / 2) radians."""
    frequencies = theta ** (-torch.arange(0, dim, 2).float() / dim)
    return torch.outer(torch.arange(length).float(), frequencies)


def sinusoids(length: int, dim: int) -> torch.Tensor:
    """Position embeddings (length, dim) of Vaswani et al. 2017: sines and cosines in turn."""
    angle = angles(length, dim, 10000.0)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(length, -1)[:, :dim]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE: rotate each pair (x_i, x_{i+D/2}) of x (B, H, T, D) by its position's angle.

    cos and sin are (T, D), or (B, 1, T, D) where rows differ in their positions.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, per layer (B, n_kv_head, capacity, D).

    With `position` None, all rows hold `length` tokens. Else it is the column of each row's next
    token: (1,), or (B, 1) where the rows differ. Then `update` returns all columns, whose shape
    never changes, so that a compiled step or a CUDA graph serves every token.
    """

    def __init__(
        self, config: GPTConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (config.n_layer, 2, batch, config.n_kv_head, capacity, config.head_dim)
        # zeros, as attention reads also the columns that are not filled yet, and masks them
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.position: torch.Tensor | None = None

    def next_positions(self, T: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The positions of the next T tokens, and the mask of the keys that they attend to.

        The positions are (T,) or (B, 1). The mask is (T, keys) or (B, 1, 1, keys), or None where
        plain causal attention does.
        """
        position, n_keys, device = self.position, self.data.size(4), self.data.device
        if position is None:
            n_keys = self.length + T
            position = torch.arange(self.length, n_keys, device=device)
            if self.length == 0 or T == 1:
                return position, None
        mask = torch.arange(n_keys, device=device) <= position[..., None]
        if position.dim() == 2:
            mask = mask[:, None]
        return position, mask

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new tokens' k and v (B, n_kv_head, T, D); returns all keys and values."""
        keys, values = self.data[layer, 0], self.data[layer, 1]
        if self.position is None:
            end = self.length + k.size(2)
            keys[:, :, self.length : end] = k
            values[:, :, self.length : end] = v
            return keys[:, :, :end], values[:, :, :end]
        rows, heads = (torch.arange(n, device=k.device) for n in k.shape[:2])
        keys[rows[:, None], heads, self.position] = k[:, :, 0].to(keys.dtype)
        values[rows[:, None], heads, self.position] = v[:, :, 0].to(values.dtype)
        return keys, values


def batch_invariant_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of q (B, H, 1, D) to k and v (B, n_kv_head, keys, D), with mask (B, 1, 1, keys).

    A row's result has the same bits whatever the rest of the batch. The fused kernel's does not:
    on CPUs the work of a row, and so the rounding, depends on the number of rows (He et al. 2025,
    "Defeating Nondeterminism in LLM Inference"; checked by tests/test_engine.py).
    """
    B, H, _, D = q.shape
    q = q.reshape(B, k.size(1), H // k.size(1), D)  # group the query heads that share keys
    scores = q @ k.transpose(-1, -2) * D**-0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v).view(B, H, 1, D)


class CastLinear(torch.autograd.Function):
    """x Wᵀ + b in autocast's dtype, without saving the cast W: the backward pass casts it again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """x (…, in), weight (out, in), bias (out,) or None → (…, out) in `dtype`."""
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and, in the weight's dtype, of weight and bias."""
        x, weight = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        dw = (dy.t() @ x.flatten(0, -2)).to(weight.dtype)
        db = dy.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return grads[0] @ weight.to(x.dtype), dw, db, None


class Linear(nn.Linear):
    """nn.Linear that keeps no bfloat16 copy of its weights when it is trained on a CPU.

    That saves 170 MB for GPT-2 and costs 1% of a training step.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input (…, in) → (…, out)."""
        if (
            input.device.type == 'cpu'
            and torch.is_autocast_enabled('cpu')
            and torch.is_grad_enabled()
        ):
            return CastLinear.apply(input, self.weight, self.bias, torch.get_autocast_dtype('cpu'))
        return super().forward(input)


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and to those before it.

    A mask, if given, says instead which keys each query attends to (True), in the shape
    (B or 1, 1, T or 1, keys), so that an encoder can use this class, too.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        # query, key and value projections of all heads in one matrix
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """x (B, T, C) → (B, T, C). `rope` holds the cosines and sines, `cache` earlier tokens."""
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            q = q.to(k.dtype)  # the cache may have a higher precision than the weights
        if cache is not None and mask is not None and mask.dim() == 4:  # rows differ in length
            y = batch_invariant_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and T == k.size(2) > 1,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.n_kv_head != self.n_head,
            )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """For each token alone: expand, apply the nonlinearity, project back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        width = 2 * config.n_ff if self.kind == 'swiglu' else config.n_ff
        self.c_fc = Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) → (B, T, C)."""
        x = self.c_fc(x)
        if self.kind == 'swiglu':
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = ACTIVATIONS[self.kind](x)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        cache: KVCache | None,
    ) -> torch.Tensor:
        """x (B, T, C) → (B, T, C); the other arguments as in CausalSelfAttention."""
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(x Wᵀ)[target], without the (tokens × vocabulary) matrix.

    The tokens are processed in chunks, and the forward pass computes each chunk's gradients while
    its logits are there (as in Liger Kernel, Hsu et al. 2024). Memory falls from N·V to chunk·V,
    and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, training: bool
    ) -> torch.Tensor:
        """x (N, C), weight (V, C), targets (N,), -1 for none → the summed loss in nats, fp32."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = weight.to(dtype)
        # fp32 logits of a chunk: 64 MB, or 512 MB on a GPU; chunks of equal size
        limit = 2 ** (24 if device == 'cpu' else 27) // weight.size(0)
        chunk = max(64, ceil_div(x.size(0), ceil_div(x.size(0), max(1, limit))))
        if training:
            dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for start in range(0, x.size(0), chunk):
                part, target = x[start : start + chunk].to(dtype), targets[start : start + chunk]
                keep = (target >= 0).float()
                log_p = F.log_softmax(part @ w.t(), dim=-1, dtype=torch.float32)
                target = target.clamp(min=0)[:, None]
                # NOTE: not in place: compiled by torch 2.11, all gradients would be zero
                loss = loss - log_p.gather(1, target)[:, 0] @ keep
                if training:
                    log_p.exp_().scatter_add_(1, target, -torch.ones_like(log_p[:, :1]))
                    grad = log_p.mul_(keep[:, None]).to(dtype)
                    del log_p  # the largest tensor here
                    dx[start : start + chunk] = grad @ w
                    # in parts, as a temporary of shape (V, C) would cost more than the product
                    for dw_part, columns in zip(dw.split(8192), grad.split(8192, dim=1)):
                        dw_part += columns.t() @ part
                    del grad
        ctx.dtype = weight.dtype
        if training:
            ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients that the forward pass computed. They are scaled in place, so only once."""
        dx, dw = ctx.saved_tensors
        return dx.mul_(grads[0].to(dx.dtype)), dw.mul_(grads[0]).to(ctx.dtype), None, None


# -----------------------------------------------------------------------------
# The model


class GPT(nn.Module):
    """A decoder-only Transformer.

    `model(idx)` returns logits (B, T, V), `model(idx, targets)` the mean loss in nats per token.
    """

    positions: torch.Tensor  # see materialize; None with learned positions

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # on the meta device, modules draw no weights that init_weight would draw again
        with torch.device('meta'):
            wte = nn.Embedding(config.vocab_size, config.n_embd)
            learned = config.position == 'learned'
            wpe = {'wpe': nn.Embedding(config.block_size, config.n_embd)} if learned else {}
            self.transformer: Any = nn.ModuleDict(
                dict(
                    wte=wte,
                    **wpe,
                    drop=nn.Dropout(config.dropout),
                    h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                    ln_f=make_norm(config, config.n_embd),
                )
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = wte.weight
        self.register_buffer('positions', None, persistent=False)
        self.remat = False  # recompute the blocks in the backward pass (Chen et al. 2016)
        self.static_cache: dict[tuple, KVCache] = {}  # the last compiled call's, by its shape
        if device.type != 'meta':
            self.materialize(device)
            for name, weight in self.named_parameters():
                self.init_weight(name, weight)

    def materialize(self, device: torch.device) -> None:
        """Allocate the weights of a model that was built under `torch.device('meta')`.

        Their values are undefined until `init_weight` sets them or they are loaded.
        """
        config = self.config
        self.to_empty(device=device)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.position == 'rope':  # cosines and sines, (2, T, D)
            angle = angles(config.block_size, config.head_dim, config.rope_theta)
            self.positions = torch.stack((angle.cos(), angle.sin())).repeat(1, 1, 2).to(device)
        elif config.position == 'sinusoidal':  # (1, T, C)
            self.positions = sinusoids(config.block_size, config.n_embd)[None].to(device)

    @torch.no_grad()
    def init_weight(self, name: str, weight: torch.Tensor) -> None:
        """Set one parameter. (For sharded ones see lyregpt.distributed.init_sharded_weights.)

        GPT-2: normal(0.02), output projections divided by √(2L). Modern: matrices scaled by their
        fan-in; output projections and head are zero, so that each block starts as the identity
        (Yang et al. 2022, Tensor Programs V). Embeddings start at 0.2, so that they outweigh the
        blocks' first updates (docs/concepts/what-we-tried.md); if tied to the head, at 0.02.
        """
        config = self.config
        if weight.dim() < 2:
            nn.init.constant_(weight, 0.0 if name.endswith('bias') else 1.0)
        elif config.arch == 'gpt2':
            depth = 2 * config.n_layer if name.endswith('c_proj.weight') else 1
            nn.init.normal_(weight, std=0.02 / math.sqrt(depth))
        elif name.endswith(('c_proj.weight', 'lm_head.weight')):
            nn.init.zeros_(weight)
        elif name.endswith(('wte.weight', 'wpe.weight')):
            nn.init.normal_(weight, std=0.02 if config.tie_weights else 0.2)
        else:
            nn.init.normal_(weight, std=0.5 * config.n_embd**-0.5)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """The normalized output (B, T, C) of the last block for token ids (B, T).

        The tokens follow those in the cache. Raises ValueError if they exceed the context.
        """
        end = idx.size(1)
        if cache is not None and cache.position is None:
            end += cache.length
        if end > self.config.block_size:
            raise ValueError(
                f'{end} tokens are more than the context of block_size={self.config.block_size}'
            )
        if cache is None:
            position, mask = torch.arange(idx.size(1), device=idx.device), None
        else:
            position, mask = cache.next_positions(idx.size(1))
        x = self.transformer.wte(idx)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            # the residual stream stays in fp32, also where FSDP2 provides weights in bfloat16
            x = x.float()
        rope = None
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(position)
        elif self.config.position == 'sinusoidal':
            x = x + self.positions[0, position].to(x.dtype)
        else:
            rope = self.positions[:, position].to(dtype).unbind()
            if position.dim() == 2:  # (B, 1, D): add a dimension for the heads
                rope = rope[0][:, None], rope[1][:, None]
        x = self.transformer.drop(x)
        remat = self.remat and self.training and torch.is_grad_enabled()
        for block in self.transformer.h:
            if remat:
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None and cache.position is None:
            cache.length = end
        return self.transformer.ln_f(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) in the weights' dtype or, given targets (B, T), the mean loss in fp32.

        Targets of -1 are ignored.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        if not isinstance(self.lm_head, nn.Linear):  # quantized: there is no plain weight matrix
            logits = self.lm_head(x).float().flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
        total = LinearCrossEntropy.apply(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled()
        )
        return total / (targets >= 0).sum().clamp(min=1)

    # -------------------------------------------------------------------------
    # Size

    def num_params(self, embeddings: bool = True) -> int:
        """The number of parameters, with or without the embeddings (a tied one always counts)."""
        skipped = {'transformer.wpe.weight'}
        if not self.config.tie_weights:
            skipped.add('transformer.wte.weight')
        named = self.named_parameters()
        return sum(p.numel() for name, p in named if embeddings or name not in skipped)

    def flops_per_token(self) -> int:
        """Training FLOPs per token, 6 N + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B)."""
        config = self.config
        attention = config.n_layer * config.n_head * config.head_dim * config.block_size
        return 6 * self.num_params(embeddings=False) + 12 * attention

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size` tokens in place.

        Raises ValueError if it is longer than now.
        """
        size = self.config.block_size
        message = f'block_size={block_size}: this model can be cropped to 1 … {size} tokens'
        require(1 <= block_size <= size, message)
        self.config.block_size = block_size
        if self.config.position == 'learned':
            weight = self.transformer.wpe.weight[:block_size].clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)
        elif self.positions is not None:
            self.positions = self.positions[:, :block_size].clone()

    # -------------------------------------------------------------------------
    # Generation

    @torch.inference_mode()
    def generate(
        self,
        prompts: torch.Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: Iterable[int] = (),
        seed: int = 1337,
        vocab_size: int | None = None,
        compile: bool = False,
        avoid: Sequence[Any] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue each prompt (token ids, of any lengths); yields the next ids (B,), step by step.

        A row that has generated a stop token yields -1 from then on; when all have, the iterator
        ends. When the context is full, its later half is read again, so texts have no limit. Row i
        draws from an RNG seeded with `seed + i`: neither the batch nor the other rows change it.
        `temperature=0` is greedy; a `top_k` or `top_p` of 0 or None is off; `repetition_penalty`
        > 1 makes tokens that the row contains less likely; ids from `vocab_size` on (padding) are
        never generated. `compile` compiles the step of one token, on CUDA as one graph; that takes
        a while, and pays for long or many texts. `avoid` has an object for each row
        (originality.CopyFilter): the ids in its `banned()` are not generated next, and `push(id)`
        tells it which one was. Raises ValueError for an empty prompt or an option out of range.
        """
        check_sampling(temperature, top_k, top_p, repetition_penalty, max_new_tokens)
        history = [torch.as_tensor(prompt, dtype=torch.long).tolist() for prompt in prompts]
        batch, device = len(history), self.transformer.wte.weight.device
        require(history and all(history), 'a prompt is empty: give at least one token')
        message = f'avoid holds {len(avoid or ())} objects for {batch} prompts: give one each'
        require(avoid is None or len(avoid) == batch, message)
        sampler = Sampler(history, self.config, device, seed, repetition_penalty, avoid)
        stop = torch.tensor(list(stop_tokens), dtype=torch.long, device=device)
        running = torch.ones(batch, dtype=torch.bool, device=device)
        cache, new = None, [torch.empty(batch, 0, dtype=torch.long, device=device)]
        was_training = self.training
        self.eval()
        try:
            for step in range(max_new_tokens):
                if cache is None or cache.length >= self.config.block_size:
                    # NOTE: reading each token as it comes would make a GPU wait
                    pairs = zip(history, torch.cat(new, dim=1).tolist())
                    history = [fit_context(a + b, self.config.block_size) for a, b in pairs]
                    new.clear()
                    cache, logits = self._prefill(history, max_new_tokens - step, compile)
                else:
                    logits = self._decode(new[-1], cache, compile)
                logits = sampler.adjust(logits.float()[:, :vocab_size])
                tokens = sample_token(logits, next(sampler.uniforms), temperature, top_k, top_p)
                sampler.push(tokens)
                new.append(tokens[:, None])
                yield torch.where(running, tokens, -1)
                if len(stop):
                    running &= ~torch.isin(tokens, stop)
                    if not running.any():
                        return
        finally:
            self.train(was_training)

    def next_logits(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Read idx (B, T), which follow what is in the cache; returns the next logits (B, V)."""
        return self.lm_head(self.hidden(idx, cache)[:, -1])

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        weight = self.transformer.wte.weight
        # CPUs compute attention several times faster in fp32 (docs/concepts/what-we-tried.md)
        dtype = torch.float32 if weight.device.type == 'cpu' else weight.dtype
        return KVCache(self.config, batch, capacity, weight.device, dtype)

    def _prefill(
        self, history: list[list[int]], n_new: int, static: bool
    ) -> tuple[KVCache, torch.Tensor]:
        """A cache that holds the rows, with capacity for `n_new` more tokens, and the next logits.

        A `static` cache, for the compiled step, has one shape for texts of any length.
        """
        batch, longest, size = len(history), max(map(len, history)), self.config.block_size
        weight = self.transformer.wte.weight
        if static:
            key = (batch, size, weight.dtype, weight.device)
            if key not in self.static_cache:
                self.static_cache = {key: self.new_cache(batch, size)}
                torch._dynamo.mark_static_address(self.static_cache[key].data)  # for CUDA graphs
            cache = self.static_cache[key]
        else:
            cache = self.new_cache(batch, min(size, longest + n_new))
        shared = all(row == history[0] for row in history)  # samples of one prompt: read it once
        logits = []
        for i, row in enumerate(history[:1] if shared else history):
            part = copy.copy(cache)
            part.data, part.length, part.position = cache.data[:, :, i : i + 1], 0, None
            logits.append(self.next_logits(torch.tensor([row], device=weight.device), part))
        if shared:
            cache.data[:, :, 1:, :, :longest] = cache.data[:, :, :1, :, :longest]
        cache.length, cache.position = longest, None
        if static and all(len(row) == longest for row in history):
            cache.position = torch.tensor([longest], device=weight.device)
        elif not shared:
            cache.position = torch.tensor([[len(row)] for row in history], device=weight.device)
        return cache, torch.cat(logits).expand(batch, -1)

    def _decode(self, tokens: torch.Tensor, cache: KVCache, compiled: bool) -> torch.Tensor:
        """Read one token of each row, (B, 1); returns the next logits (B, V)."""
        if cache.position is None:
            return self.next_logits(tokens, cache)
        step = self._compiled_step if compiled else self.next_logits
        logits = step(tokens, cache)
        cache.position += 1
        cache.length += 1
        return logits

    @cached_property
    def _compiled_step(self) -> Any:
        on_gpu = self.transformer.wte.weight.is_cuda
        return torch.compile(self.next_logits, mode='reduce-overhead' if on_gpu else 'default')


# -----------------------------------------------------------------------------
# Sampling


def fit_context(ids: list[int], block_size: int) -> list[int]:
    """The ids that the model reads: all, or the last ones, half a context, if they do not fit."""
    return ids if len(ids) <= block_size else ids[-max(1, block_size // 2) :]


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    max_new_tokens: int = 1,
) -> None:
    """Raises ValueError, with the option's name, for a value that is out of range."""
    require(temperature >= 0, f'temperature={temperature}: expected 0 (greedy) or more')
    require(not top_k or top_k > 0, f'top_k={top_k}: expected 0 (off) or more')
    require(not top_p or 0 < top_p <= 1, f'top_p={top_p}: expected a share from 0 (off) to 1')
    message = f'repetition_penalty={repetition_penalty}: expected more than 0 (1 is off)'
    require(repetition_penalty > 0, message)
    require(max_new_tokens >= 0, f'max_new_tokens={max_new_tokens}: expected 0 or more')


def uniform_numbers(seeds: Iterable[int], device: torch.device) -> Iterator[torch.Tensor]:
    """Random numbers (B,) in [0, 1), one for each token of each row, from an RNG per row."""
    rngs = [torch.Generator().manual_seed(seed % 2**64) for seed in seeds]
    while True:  # 64 at a time, as copies to a GPU are slow
        block = torch.stack([torch.rand(64, generator=rng) for rng in rngs], dim=1)
        yield from block.to(device)


class Sampler:
    """Adjusts logits and records the chosen tokens, for the rows of a batch.

    `uniforms` yields random numbers (B,), row i's from an RNG seeded with `seed + i`. Tokens that a
    row contains are less likely by `repetition_penalty` (Keskar et al. 2019; 1 is off). `avoid` is
    as in GPT.generate.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        config: GPTConfig,
        device: torch.device,
        seed: int,
        repetition_penalty: float,
        avoid: Sequence[Any] | None,
    ):
        self.uniforms = uniform_numbers(range(seed, seed + len(prompts)), device)
        self.penalty, self.avoid = repetition_penalty, avoid or ()
        if self.penalty != 1:
            shape = (len(prompts), config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
            for row, prompt in zip(self.seen, prompts):
                row[prompt] = True

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the repetition penalty to logits (B, V), and exclude banned tokens."""
        if self.penalty != 1:
            less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen[:, : logits.size(1)], less, logits)
        banned = [copy_filter.banned() for copy_filter in self.avoid]
        if any(banned):
            mask = torch.zeros(logits.shape, dtype=torch.bool)
            for row, ids in zip(mask, banned):
                row[ids] = True
            logits = logits.masked_fill(mask.to(logits.device), -math.inf)
        return logits

    def push(self, tokens: torch.Tensor) -> None:
        """Record the tokens (B,) that were chosen."""
        if self.penalty != 1:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.avoid:
            for copy_filter, token in zip(self.avoid, tokens.tolist()):
                copy_filter.push(token)


def sample_token(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> torch.Tensor:
    """One token (B,) for each row of logits (B, V).

    It is the one at which the cumulative probability exceeds `uniform` (B,), which is in [0, 1).
    """
    if temperature < 1e-5:  # 0 is greedy; values close to it would overflow
        return logits.argmax(dim=-1)
    logits = logits / temperature
    order = None
    if top_k and top_k < logits.size(-1):
        logits, order = logits.topk(top_k, dim=-1)  # sorted, as top_p needs it
    elif top_p and top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    p = logits.softmax(dim=-1)
    if top_p and top_p < 1:
        # keep the smallest set of tokens that reaches top_p (Holtzman et al. 2020)
        p = torch.where(p.cumsum(dim=-1) - p < max(top_p, 1e-6), p, 0)
    cumulative = p.cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = (uniform[:, None] * total).clamp(max=total * (1 - 1e-7))
    at = torch.searchsorted(cumulative, threshold, right=True).clamp(max=p.size(-1) - 1)
    # rounding in a GPU's cumulative sum may select a token of probability 0
    at = torch.where(p.gather(1, at) > 0, at, p.argmax(dim=-1, keepdim=True))
    if order is not None:
        at = order.gather(1, at)
    return at[:, 0]
