"""The game's step in eager PyTorch, for ResNet-20 on one device: both players train.

It follows the algorithm in usual PyTorch style: parameters are tensors that require
gradients, Q has two forward passes, and each player has a backward pass.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from adadfq_jax import teacher
from adadfq_jax.training.spec import RunSpec


class _Round(torch.autograd.Function):
    """Fake quantization on [lo, hi] with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x, lo, hi, bits):
        half = 2 ** (bits - 1)
        scale = (2**bits - 1) / (hi - lo).clamp(min=1e-8)
        zero = torch.round(scale * lo) + half
        codes = torch.round(scale * x - zero).clamp_(-half, half - 1)
        return (codes + zero) / scale

    @staticmethod
    def backward(ctx, g):
        return g, None, None, None


class Student:
    """ResNet-20 from a state dict with pytorchcv's names; P where `bits` is None."""

    def __init__(self, arrays: dict[str, np.ndarray], bits: tuple[int, int] | None):
        self.bits = bits
        self.arrays = {k: torch.tensor(np.array(v)) for k, v in arrays.items()}
        self.ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.parameters = [v for k, v in self.arrays.items() if "running" not in k]
        for parameter in self.parameters:
            parameter.requires_grad_(bits is not None)
        self.moments: list[tuple[torch.Tensor, torch.Tensor, str]] = []

    def _kernel(self, name):
        w = self.arrays[name]
        if self.bits is None:
            return w
        rows = w.detach().flatten(1)
        shape = (-1,) + (1,) * (w.ndim - 1)
        lo, hi = rows.amin(1).view(shape), rows.amax(1).view(shape)
        return _Round.apply(w, lo, hi, self.bits[0])

    def _block(self, x, name, stride=1):
        kernel = self._kernel(f"{name}.conv.weight")
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2)
        mean = self.arrays[f"{name}.bn.running_mean"]
        var = self.arrays[f"{name}.bn.running_var"]
        if self.bits is None:
            self.moments.append((x.mean((0, 2, 3)), x.var((0, 2, 3), False), name))
        scale, bias = self.arrays[f"{name}.bn.weight"], self.arrays[f"{name}.bn.bias"]
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, 1e-5)

    def _active(self, x, name):
        x = F.relu(x)
        if self.bits is None:
            return x
        if name not in self.ranges:  # from the first batch, then frozen
            self.ranges[name] = (x.detach().min(), x.detach().max())
        return _Round.apply(x, *self.ranges[name], self.bits[1])

    def __call__(self, x):
        """Map images [B, channels, H, W] to logits; P keeps its `moments`."""
        self.moments = []
        x = self._active(self._block(x, "features.init_block"), "init")
        for stage in (1, 2, 3):
            for unit in (1, 2, 3):
                name = f"features.stage{stage}.unit{unit}"
                stride = 2 if stage > 1 and unit == 1 else 1
                shortcut = x
                if stride == 2:
                    shortcut = self._block(x, f"{name}.identity_conv", stride)
                y = self._block(x, f"{name}.body.conv1", stride)
                y = self._block(self._active(y, f"{name}.1"), f"{name}.body.conv2")
                x = self._active(y + shortcut, f"{name}.2")
        x = x.mean((2, 3))
        return F.linear(x, self._kernel("output.weight"), self.arrays["output.bias"])


class Generator(torch.nn.Module):
    """The generator for CIFAR-like images, whose first maps have c channels."""

    def __init__(self, classes: int, image_shape: tuple[int, ...], c: int):
        super().__init__()
        height, width, channels = image_shape
        self.maps = (c, height // 4, width // 4)
        self.embedding = torch.nn.Embedding(classes, 100)
        self.dense = torch.nn.Linear(100, math.prod(self.maps))
        self.norms = torch.nn.ModuleList(
            torch.nn.BatchNorm2d(n, eps)
            for n, eps in ((c, 1e-5), (c, 0.8), (c // 2, 0.8))
        )
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, padding=1)
            for a, b in ((c, c), (c, c // 2), (c // 2, channels))
        )
        self.image_norm = torch.nn.BatchNorm2d(channels, affine=False)

    def forward(self, z, y):
        """Map latents [B, 100] and labels [B] to images [B, channels, H, W]."""
        x = self.dense(self.embedding(y) * z).view(-1, *self.maps)
        x = self.norms[0](x)
        for conv, norm in zip(self.convs[:2], self.norms[1:], strict=True):
            x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2))), 0.2)
        return self.image_norm(torch.tanh(self.convs[2](x)))


def _entropy(logits):
    log_probs = F.log_softmax(logits, 1)
    return -(log_probs.exp() * log_probs).sum(1)


def make_torch_step(spec: RunSpec, p_variables: Any, batch_size: int):
    """Make step() -> (generator's loss, student's loss), which trains G and Q."""
    g, classes = spec.game, spec.teacher.num_classes
    arrays = teacher.to_state_dict(p_variables)
    bits = (spec.quant.weight_bits, spec.quant.act_bits)
    p, q = Student(arrays, None), Student(arrays, bits)
    generator = Generator(classes, spec.teacher.image_shape, g.generator_channels)
    g_optimizer = torch.optim.Adam(generator.parameters(), g.g_rate, (0.5, 0.999))
    q_optimizer = torch.optim.SGD(
        q.parameters, g.q_rate, 0.9, weight_decay=g.q_weight_decay, nesterov=True
    )

    def bn_stats():
        return sum(
            F.mse_loss(mean, p.arrays[f"{name}.bn.running_mean"])
            + F.mse_loss(var, p.arrays[f"{name}.bn.running_var"])
            for mean, var, name in p.moments
        ) / len(p.moments)

    def step():
        z, y = torch.randn(batch_size, 100), torch.randint(classes, (batch_size,))
        x = generator(z, y)
        p_logits, q_logits = p(x), q(x)
        h = _entropy(p_logits - q_logits)
        h = (h - h.min()) / (np.log(classes) - h.min())
        loss = F.relu(g.lambda_l - h).mean() + F.relu(h - g.lambda_u).mean()
        balance = g.alpha_ds * F.cross_entropy(p_logits - q_logits, y)
        balance = balance + g.alpha_as * F.cross_entropy(p_logits + q_logits, y)
        loss = loss + g.beta * balance + g.gamma * bn_stats()
        g_optimizer.zero_grad()
        loss.backward(inputs=list(generator.parameters()))
        g_optimizer.step()

        gap = p_logits.detach() - q(x.detach())
        q_loss = -(g.temperature**2 * _entropy(gap / g.temperature)).mean()
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()
        return loss.item(), q_loss.item()

    return step
