"""Optimizers: AdamW, and Muon for the matrices of the blocks.

Both work on plain weights and on weights sharded by FSDP2. `configure_optimizers` makes them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lyregpt.device import fast_bf16, is_sharded, local
from model import GPT


def configure_optimizers(
    model: GPT,
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    optimizer: str = 'muon',
    dtype: torch.dtype | None = None,
) -> dict[str, torch.optim.Optimizer]:
    """{'adamw': …} for all parameters, or {'adamw': …, 'muon': …}, Muon for the blocks' matrices.

    Norms and biases are not decayed; with Muon, neither are the embeddings (Jordan et al. 2024
    leave them to Adam). `dtype` is the format of Muon's matrix products; None means bfloat16
    where that is fast.
    """
    config = model.config
    kv_rows = config.n_kv_head * config.head_dim
    fused: dict[str, tuple[int, ...]] = {
        'attn.c_attn.weight': (config.n_head * config.head_dim, kv_rows, kv_rows)
    }
    if config.mlp == 'swiglu':
        fused['mlp.c_fc.weight'] = (config.n_ff, config.n_ff)

    # Muon's groups by the rows that split a fused weight; AdamW's by whether they are decayed.
    matrices: dict[tuple[int, ...], list[tuple[str, torch.nn.Parameter]]] = defaultdict(list)
    others: dict[bool, list[tuple[str, torch.nn.Parameter]]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if optimizer == 'muon' and p.dim() == 2 and name.startswith('transformer.h.'):
            name_in_block = name.split('.', 3)[3]
            matrices[fused.get(name_in_block, ())].append((name, p))
        else:
            others[p.dim() >= 2 and optimizer != 'muon'].append((name, p))
    groups = [
        {'params': others[True], 'weight_decay': weight_decay},
        {'params': others[False], 'weight_decay': 0.0},
    ]
    device = next(model.parameters()).device
    optimizers: dict[str, torch.optim.Optimizer] = {
        'adamw': torch.optim.AdamW(
            [group for group in groups if group['params']],
            lr=learning_rate,
            betas=betas,
            fused=device.type in ('cpu', 'cuda'),
        )
    }
    if matrices:
        fast = torch.bfloat16 if fast_bf16(device) else torch.float32
        optimizers['muon'] = Muon(
            [{'params': params, 'rows': list(rows)} for rows, params in matrices.items()],
            lr=learning_rate,
            weight_decay=weight_decay,
            dtype=dtype or fast,
        )
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton–Schulz, for 2-D weights.

    The method is that of Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The update is
    scaled to the RMS of AdamW's, 0.2 √max(rows, columns) (Liu et al. 2025, "Muon is Scalable"), so
    that a learning rate tuned for AdamW works. A group's `rows` splits a fused weight (q, k, v)
    into matrices that are orthogonalized separately. Matrices of the same shape go through
    Newton–Schulz in one batch: a few large products instead of many small ones.

    Of weights sharded over processes (FSDP2, along dimension 0) each process gathers some whole
    matrices, orthogonalizes them, and sends every other process its rows of the result. That is
    two all-to-alls per shape, and no product is computed twice.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, rows=[]))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. `closure`, of the base class, is not called."""
        params: list[tuple[torch.Tensor, dict[str, Any]]] = []
        updates: list[torch.Tensor] = []
        for group in self.param_groups:
            trained = [p for p in group['params'] if p.grad is not None]
            for p in trained:
                if 'momentum_buffer' not in self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            grads = [local(p.grad) for p in trained]
            buffers = [local(self.state[p]['momentum_buffer']) for p in trained]
            torch._foreach_lerp_(buffers, grads, 1 - group['momentum'])
            updates += torch._foreach_lerp(grads, buffers, group['momentum'])  # Nesterov's
            params += [(p, group) for p in trained]
        if params and is_sharded(params[0][0]):
            orthogonalize_sharded(updates, params, self.dtype)
        else:
            orthogonalize_parts(updates, [group['rows'] for _, group in params], self.dtype)
        for (p, group), update in zip(params, updates):
            local(p).mul_(1 - group['lr'] * group['weight_decay']).add_(update, alpha=-group['lr'])


def orthogonalize_sharded(
    updates: list[torch.Tensor],
    params: Sequence[tuple[torch.Tensor, dict[str, Any]]],
    dtype: torch.dtype,
) -> None:
    """Replace this process's rows of each update by its rows of the orthogonalized update."""
    mesh = params[0][0].device_mesh  # type: ignore[attr-defined]
    members: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, (p, group) in enumerate(params):
        members[p.shape, tuple(group['rows'])].append(i)

    # Per shape, get whole matrices: (n, rows, columns) for the n that are this process's part.
    stacks = []
    for (shape, _), indices in members.items():
        mine = torch.stack([updates[i] for i in indices])
        stacks.append(redistribute(mine, mesh, (len(indices), *shape), source=1, target=0))
    rows = [rows for (_, rows), stack in zip(members, stacks) for _ in stack]
    orthogonalize_parts([matrix for stack in stacks for matrix in stack], rows, dtype)

    # Hand the rows back.
    for ((shape, _), indices), stack in zip(members.items(), stacks):
        mine = redistribute(stack, mesh, (len(indices), *shape), source=0, target=1)
        for i, update in zip(indices, mine):
            updates[i] = update.to(updates[i].device)  # with cpu_offload the mesh is of GPUs


def redistribute(
    mine: torch.Tensor, mesh: Any, shape: tuple[int, int, int], source: int, target: int
) -> torch.Tensor:
    """This process's part along dimension `target` of the whole, from that along `source`."""
    from torch.distributed.tensor import DTensor, Shard

    whole = DTensor.from_local(
        mine,
        mesh,
        [Shard(source)],
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1] * shape[2], shape[2], 1),
    )
    return whole.redistribute(placements=[Shard(target)]).to_local().contiguous()


def orthogonalize_parts(
    updates: Sequence[torch.Tensor], rows: Sequence[Sequence[int]], dtype: torch.dtype
) -> None:
    """Orthogonalize each update (2-D) in place and scale it to AdamW's RMS.

    It is split into parts by its `rows` (empty: one part), which are orthogonalized separately.
    """
    alike: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for update, sizes in zip(updates, rows):
        for part in update.split(sizes or update.size(0)):
            if part.size(0) > part.size(1):  # the products should be of the smaller side
                part = part.mT
            alike[part.shape].append(part)
    for shape, parts in alike.items():
        for part, result in zip(parts, orthogonalize(torch.stack(parts), dtype=dtype)):
            torch.mul(result.float(), 0.2 * shape[1] ** 0.5, out=part)


def orthogonalize(
    x: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Bring the singular values of each matrix of x (N, rows ≤ columns) near 1.

    This is Muon's Newton–Schulz iteration, a polynomial of degree 5.
    """
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


class Optimizers:
    """The optimizers of a run, stepped as one, and the scaler of float16 gradients."""

    def __init__(self, model: GPT, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        # an explicit dtype=float32 applies to Muon as well
        fast = fast_bf16(device) and config.dtype != 'float32'
        muon_dtype = torch.bfloat16 if fast else torch.float32
        betas = (config.beta1, config.beta2)
        self.by_name = configure_optimizers(
            model, config.weight_decay, config.learning_rate, betas, config.optimizer, muon_dtype
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def set_learning_rate(self, learning_rate: float, step: int) -> None:
        """Set the rate of all groups, and Muon's momentum, which starts lower.

        The first updates should follow the first gradients (Jordan et al. 2024).
        """
        for optimizer in self.by_name.values():
            for group in optimizer.param_groups:
                group['lr'] = learning_rate
                if 'momentum' in group:
                    group['momentum'] = 0.85 + 0.1 * min(1.0, step / 300)

    def clip(self, model: GPT, grad_clip: float) -> Any:
        """Unscale the gradients and clip their norm to `grad_clip` (0: no limit).

        Returns the norm before clipping, 0 where nothing needs it.
        """
        for optimizer in self.by_name.values():
            self.scaler.unscale_(optimizer)
        if not grad_clip and not self.scaler.is_enabled():
            return 0.0
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        if is_sharded(norm):
            return norm.full_tensor()  # type: ignore[attr-defined]
        return norm

    def step(self, grad_norm: Any) -> None:
        """Update the weights. In float16 all optimizers skip a step whose gradients overflow."""
        overflow = self.scaler.is_enabled() and not math.isfinite(float(grad_norm))
        if not overflow:
            for optimizer in self.by_name.values():
                self.scaler.step(optimizer)
        self.scaler.update()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Each optimizer's state, by its name."""
        return {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}
