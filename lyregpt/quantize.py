"""Linear layers for generation: int8 weights, or on CPUs oneDNN's packed ones.

quantize_model(model, 'int8')
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from lyregpt.device import fast_int8
from model import GPT, require


class PackedLinear(nn.Module):
    """A linear layer on a CPU with weights in oneDNN's blocked layout.

    For one token, that layout reaches twice the memory bandwidth of plain rows.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def packed(linear: nn.Linear) -> nn.Module:
    """The layer as PackedLinear where oneDNN supports its device and dtype, else unchanged."""
    dtype = linear.weight.dtype
    if linear.weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return linear
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return PackedLinear(linear) if bf16 or dtype == torch.float32 else linear


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale per output: a quarter of fp32's memory.

    On CPUs with fast int8 products, each token's activations are rounded to int8, too, with one
    scale per token (the vector-wise scheme of LLM.int8, Dettmers et al. 2022, without its
    outliers). On other CPUs weights are converted to bfloat16 within the product, on GPUs before.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        weight = (weight / scale[:, None]).round().to(torch.int8)
        self.round_activations = weight.device.type == 'cpu' and fast_int8()
        self.padding = 0
        if not weight.is_cuda and not self.round_activations:
            self.padding = -weight.size(1) % 32  # _weight_int8pack_mm reads rows in whole vectors
        self.weight = nn.Buffer(F.pad(weight, (0, self.padding)), persistent=False)  # (out, in)
        self.scale = nn.Buffer(scale, persistent=False)  # (out,)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out) in x's dtype."""
        rows = x.flatten(0, -2)
        if x.is_cuda:
            y = F.linear(rows, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None])
        elif self.round_activations:
            rows = rows.float()
            scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
            y = torch._int_mm((rows / scale).round().to(torch.int8), self.weight.t())
            y = y * scale * self.scale
        else:
            rows = F.pad(rows.to(torch.bfloat16), (0, self.padding))
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale.to(torch.bfloat16))
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def quantize_model(model: GPT, kind: str | None = None) -> GPT:
    """Replace the model's linear layers, in place, by ones that can generate but not train.

    kind='int8' takes int8 weights, None packed ones where that is possible. Raises ValueError if
    the device does not support `kind`.
    """
    device = model.transformer.wte.weight.device.type
    require(kind in (None, 'int8'), f'quantize={kind}: expected None or int8')
    message = f'quantize={kind}: works on cpu and cuda, not on {device}; use dtype=float16 there'
    require(kind is None or device in ('cpu', 'cuda'), message)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child) if kind else packed(child))
    return model
