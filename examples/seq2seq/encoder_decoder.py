"""The original Transformer (Vaswani et al. 2017): an encoder reads a source, a decoder writes what answers it.

The parts are model.py's: attention, MLP, norms, the KV cache. New here are the cross-attention, by which every token of the answer
looks at the source, norms behind the sum (or before it, as in the GPT), and beam search. examples/seq2seq/train_seq2seq.py trains one on lines of verse.

    model = EncoderDecoder(EncoderDecoderConfig(vocab_size=100, n_layer=2, n_embd=64, n_head=4))
    loss = model(source, idx, targets)                      # mean, in nats per token
    best = model.beam(source, eot=0, max_new_tokens=20)     # per row the likeliest answers

Shapes in comments: B rows, S tokens of source, T of answer, C = n_embd, H heads of D = head_dim, V the vocabulary. Rows of a batch may
differ in length: behind their ends stands -1, in sources, where it is masked, as in targets, where it costs nothing.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (
    MLP,
    CausalSelfAttention,
    GPTConfig,
    KVCache,
    Linear,
    RMSNorm,
    make_norm,
    sinusoids,
)


@dataclass
class EncoderDecoderConfig(GPTConfig):
    """The shape; the defaults are the paper's base model. Raises ValueError, with the field's name, for a bad value."""

    block_size: int = 512  # most tokens of a source, and of an answer
    vocab_size: int = 37000  # sources and answers share it
    n_layer: int = 6  # of the encoder, and as many of the decoder
    n_head: int = 8
    n_embd: int = 512
    dropout: float = 0.1
    bias: bool = True
    position: str = 'sinusoidal'
    mlp: str = 'relu'
    norm_first: bool = False  # False: norm(x + layer(x)), the paper's; True: x + layer(norm(x)), the GPT's (Xiong et al. 2020)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position != 'sinusoidal' or not self.tie_weights:
            raise ValueError(
                "an encoder–decoder has position='sinusoidal' and tie_weights=True here, as in the paper"
            )


class CrossAttention(nn.Module):
    """Every token of the answer looks at the whole source: queries from the decoder, keys and values from the encoder's output."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.dropout, self.head_dim = config.dropout, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim, bias=config.bias)
        self.c_kv = Linear(
            config.n_embd, 2 * self.n_kv_head * self.head_dim, bias=config.bias
        )
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim) if config.qk_norm else nn.Identity() for _ in 'qk'
        )

    def keys_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, n_kv_head, S, D) of what the encoder made (B, S, C): once for a source, however long the answer grows."""
        k, v = (
            self.c_kv(source)
            .view(*source.shape[:2], 2 * self.n_kv_head, self.head_dim)
            .transpose(1, 2)
            .chunk(2, dim=1)
        )
        return self.k_norm(k), v

    def forward(
        self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """x (B, T, C), looking at the memory → (B, T, C)."""
        B, T, _ = x.shape
        q = self.q_norm(self.c_q(x).view(B, T, self.n_head, self.head_dim)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=self.n_kv_head != self.n_head
        )
        return F.dropout(
            self.c_proj(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training
        )


class Memory(NamedTuple):
    """What the decoder needs to know of the sources, computed once."""

    keys_values: list[
        tuple[torch.Tensor, torch.Tensor]
    ]  # of each decoder block, (B, n_kv_head, S, D)
    mask: torch.Tensor  # (B, 1, 1, S): True where there is a token


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention, MLP, each with a sum around it and a norm."""

    def __init__(self, config: EncoderDecoderConfig, layer: int, decoder: bool):
        super().__init__()
        self.layer, self.norm_first = layer, config.norm_first
        self.ln_1, self.attn = make_norm(config, config.n_embd), CausalSelfAttention(config, layer)
        if decoder:
            self.ln_cross, self.cross = make_norm(config, config.n_embd), CrossAttention(config)
        self.ln_2, self.mlp = make_norm(config, config.n_embd), MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        memory: Memory | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """x (B, T, C). An encoder's `mask` lets all tokens see all that are none of padding; a decoder's is None: causal."""
        first = self.norm_first
        x = (
            x + self.attn(self.ln_1(x), None, mask, cache)
            if first
            else self.ln_1(x + self.attn(x, None, mask, cache))
        )
        if memory is not None:
            k, v = memory.keys_values[self.layer]
            x = (
                x + self.cross(self.ln_cross(x), k, v, memory.mask)
                if first
                else self.ln_cross(x + self.cross(x, k, v, memory.mask))
            )
        return x + self.mlp(self.ln_2(x)) if first else self.ln_2(x + self.mlp(x))


class Answer(NamedTuple):
    """What was written to a source: its ids, with the end if it came, and the natural logarithm of its probability."""

    ids: list[int]
    log_p: float

    def score(self, length_penalty: float) -> float:
        """log_p / ((5 + length) / 6)^penalty (Wu et al. 2016, equation 14): every token costs, so without it short answers win."""
        return self.log_p / ((5 + len(self.ids)) / 6) ** length_penalty


class EncoderDecoder(nn.Module):
    """`model(source, idx)` gives logits (B, T, V); `model(source, idx, targets)` the mean loss in nats per token."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(
            config.vocab_size, config.n_embd
        )  # of sources and of answers, and the head
        self.encoder = nn.ModuleList(Block(config, i, decoder=False) for i in range(config.n_layer))
        self.decoder: Any = nn.ModuleList(
            Block(config, i, decoder=True) for i in range(config.n_layer)
        )
        # with norms first, what the blocks add up leaves them without one
        self.ln_encoder, self.ln_decoder = (
            make_norm(config, config.n_embd) if config.norm_first else nn.Identity()
            for _ in range(2)
        )
        self.positions: torch.Tensor
        self.register_buffer(
            'positions', sinusoids(config.block_size, config.n_embd), persistent=False
        )
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        nn.init.normal_(
            self.wte.weight, std=config.n_embd**-0.5
        )  # times √C it is as large as the positions

    def embed(self, idx: torch.Tensor, past: int = 0) -> torch.Tensor:
        """Token ids (B, T), the first at position `past`, as vectors (B, T, C). Raises ValueError beyond the context."""
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(
                f'{end} tokens are more than the context of block_size={self.config.block_size}'
            )
        x = self.wte(idx.clamp(min=0)) * math.sqrt(self.config.n_embd) + self.positions[past:end]
        return F.dropout(x, self.config.dropout, self.training)

    def read(self, source: torch.Tensor) -> Memory:
        """What the decoder needs of the sources (B, S); each has at least one token, then -1 up to the length of the longest."""
        mask = (source >= 0)[:, None, None]
        x = self.embed(source)
        for block in self.encoder:
            x = block(x, mask)
        x = self.ln_encoder(x)
        return Memory([block.cross.keys_values(x) for block in self.decoder], mask)

    def logits(
        self, idx: torch.Tensor, memory: Memory, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Logits (B, T, V) of what follows each of the answers' tokens idx (B, T), which stand behind what the cache holds."""
        x = self.embed(idx, cache.length if cache else 0)
        for block in self.decoder:
            x = block(x, None, memory, cache)
        if cache:
            cache.length += idx.size(1)
        return F.linear(self.ln_decoder(x), self.wte.weight)

    def forward(
        self,
        source: torch.Tensor,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Logits (B, T, V); or, given targets (B, T) with -1 for "none", the mean loss, a scalar.

        idx (B, T) are the targets shifted right, behind a token that begins them. With `label_smoothing` that share of the
        target's probability is spread over the vocabulary (Szegedy et al. 2016): no longer nats per token of the text.
        """
        logits = self.logits(idx, self.read(source))
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=-1,
            label_smoothing=label_smoothing,
        )

    # -------------------------------------------------------------------------
    # Writing

    @contextlib.contextmanager
    def writing(
        self, source: torch.Tensor, width: int, max_new_tokens: int
    ) -> Iterator[tuple[Memory, KVCache]]:
        """The sources read, `width` times each, and an empty cache, with dropout and gradients off. Raises ValueError."""
        if not 1 <= max_new_tokens <= self.config.block_size:
            raise ValueError(
                f'max_new_tokens={max_new_tokens}: expected 1 to block_size={self.config.block_size}'
            )
        if width < 1:
            raise ValueError(f'width={width}: expected at least 1')
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                read = self.read(source)
                times = [
                    (k.repeat_interleave(width, 0), v.repeat_interleave(width, 0))
                    for k, v in read.keys_values
                ]
                weight = self.wte.weight
                cache = KVCache(
                    self.config, len(source) * width, max_new_tokens, weight.device, weight.dtype
                )
                yield Memory(times, read.mask.repeat_interleave(width, 0)), cache
        finally:
            self.train(was_training)

    def greedy(self, source: torch.Tensor, eot: int, max_new_tokens: int) -> list[Answer]:
        """One answer a source (B, S): always the likeliest next token, until it is `eot`, which also stands before the first."""
        with self.writing(source, 1, max_new_tokens) as (memory, cache):
            tokens = torch.full((len(source),), eot, device=source.device)
            log_p = torch.zeros(len(source), device=source.device)
            running = torch.ones_like(tokens, dtype=torch.bool)
            written: list[torch.Tensor] = []
            while running.any() and len(written) < max_new_tokens:
                best, tokens = (
                    self.logits(tokens[:, None], memory, cache)[:, -1]
                    .float()
                    .log_softmax(dim=-1)
                    .max(dim=-1)
                )
                log_p += torch.where(running, best, 0.0)
                written.append(torch.where(running, tokens, -1))
                running &= tokens != eot
            rows = torch.stack(written, dim=1).tolist()
        return [Answer([t for t in row if t >= 0], p) for row, p in zip(rows, log_p.tolist())]

    def beam(
        self,
        source: torch.Tensor,
        eot: int,
        max_new_tokens: int,
        width: int = 4,
        length_penalty: float = 0.6,
    ) -> list[list[Answer]]:
        """The `width` best answers found to each source (B, S), by their scores; `width=1` is greedy.

        In every step each of a row's beams is continued with every token, and of these candidates the likeliest go on. Those among
        the first `width` that end are answers; when there are `width` of them, the row is done. What has not ended after
        `max_new_tokens` counts as it stands.
        """
        B, V = len(source), self.config.vocab_size
        done: list[list[Answer]] = [[] for _ in range(B)]
        with self.writing(source, width, max_new_tokens) as (memory, cache):
            written = torch.full((B, width, 1), eot, device=source.device)
            log_p = torch.full((B, width), -math.inf, device=source.device)
            log_p[:, 0] = 0  # all beams begin alike, so one begins
            for _ in range(max_new_tokens):
                step = (
                    self.logits(written[..., -1].view(-1, 1), memory, cache)[:, -1]
                    .float()
                    .log_softmax(dim=-1)
                )
                total = log_p[..., None] + step.view(B, width, V)
                # a beam ends in one way only: of twice as many candidates at least `width` go on
                chance, place = total.flatten(1).topk(min(2 * width, width * V))
                parent, token = place // V, place % V
                longer = torch.cat(
                    (
                        written.gather(1, parent[..., None].expand(-1, -1, written.size(2))),
                        token[..., None],
                    ),
                    dim=2,
                )
                ended = token == eot
                for row, i in ended[:, :width].nonzero().tolist():
                    if len(done[row]) < width and chance[row, i] > -math.inf:
                        done[row].append(Answer(longer[row, i, 1:].tolist(), float(chance[row, i])))
                if all(len(answers) == width for answers in done):
                    break
                log_p, on = chance.masked_fill(ended, -math.inf).topk(width)
                written = longer.gather(1, on[..., None].expand(-1, -1, longer.size(2)))
                parents = (
                    parent.gather(1, on) + width * torch.arange(B, device=source.device)[:, None]
                )
                cache.data = cache.data[
                    :, :, parents.flatten()
                ]  # a beam goes on with its parent's keys and values
            for answers, rows, chances in zip(done, written[..., 1:].tolist(), log_p.tolist()):
                answers += [Answer(ids, p) for ids, p in zip(rows, chances) if p > -math.inf][
                    : width - len(answers)
                ]
        return [
            sorted(answers, key=lambda answer: answer.score(length_penalty), reverse=True)
            for answers in done
        ]
