"""A model's rotation of keys as two short tables, so that keys can be turned back without the model.

Channel i of a key at position p is a_i (cos(w_i p) x_i + sin(w_i p) x_j), j its partner: halves or neighbours, partial
rotation and YaRN's scaling are all of this form. The tables are read off the model's own rotation (longwave/rotary/)
at positions that are powers of two, where a float32 angle is exact, so that w comes out to its last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.rotary import Rotary
from longwave.shape import context_limit

DOUBLINGS = 16  # w is found from its angle at 1, 2, 4 ... 2^16
FAR = 1e-3  # relative error at which keys are not what the tables say: the model's angles, in float32, differ by less


@dataclass(frozen=True, eq=False)
class Rotation:
    """How L layers turn keys of D channels.

    partner int64 [D]. frequency float32 [L, D], radians a position, of opposite sign for two partners, 0 where a
    channel is not turned. scale float32 [L, D], the attention scaling (YaRN's), 1 for most models.
    """

    partner: Tensor
    frequency: Tensor
    scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, layers: Sequence[int]) -> Rotation:
        """The rotation of a model's layers, by their indices. NotImplementedError, with the reason, where keys cannot
        be turned back."""
        rotary = Rotary.of(model)
        limit = context_limit(model) or 2**DOUBLINGS
        found: dict[int, Any] = {int(getattr(module, "layer_idx", -1)): module for module in rotary.turns}
        tables = [_read(rotary, found[layer], limit) for layer in layers]
        partners = [partner for partner, frequency, _ in tables if bool(frequency.any())]
        partner = partners[0] if partners else torch.arange(len(tables[0][1]))
        if any(not torch.equal(partner, other) for other in partners):
            raise NotImplementedError("the layers of this model pair the channels of their keys differently")
        made = cls(partner, torch.stack([t[1] for t in tables]), torch.stack([t[2] for t in tables]))
        made._prove(rotary, [found[layer] for layer in layers], limit)
        return made

    def _prove(self, rotary: Rotary, modules: list[Any], limit: int) -> None:
        draw = torch.Generator().manual_seed(0)
        positions = torch.cat([torch.arange(4), torch.randint(0, limit, (28,), generator=draw)])
        x = torch.randn(len(modules), len(positions), 1, len(self.partner), generator=draw)
        ours = self.rotate(x, positions)
        for layer, module in enumerate(modules):
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            theirs = rotary.rotate(module, x[layer].transpose(0, 1)[None].to(device), positions[None].to(device))
            error = float((ours[layer] - theirs[0].transpose(0, 1).cpu()).abs().max())
            if error > FAR:
                raise NotImplementedError(
                    f"the keys of layer {module.layer_idx} are not turned by one angle a position and channel "
                    f"(error {error:.1e}, at most {FAR:g} of a unit), so they cannot be coded without their model"
                )

    def to(self, device: torch.device | str) -> Rotation:
        return Rotation(self.partner.to(device), self.frequency.to(device), self.scale.to(device))

    def layers(self, chosen: slice | list[int]) -> Rotation:
        """Of some of the layers."""
        return Rotation(self.partner, self.frequency[chosen], self.scale[chosen])

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys [L, n, H, D] as cached at int positions [n]; float32, float64 of float64."""
        cos, sin = (turn[:, :, None] for turn in self.turns(positions, x.dtype))
        return torch.addcmul(x * cos, x[..., self.partner], sin)

    def turns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a rotated key has of a channel and of its partner, at int positions [n]: [L, n, D] each."""
        scale = self.scale[:, None].to(dtype)
        cos, sin = (turn[:, :, 0] for turn in self._angles(positions, dtype))
        return cos * scale, sin * scale

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        cos, sin = self._angles(positions, x.dtype)
        return (x * cos - x[..., self.partner] * sin) / self.scale[:, None, None].to(x.dtype)

    def gradient(self, x: Tensor, positions: Tensor) -> Tensor:
        """What a gradient at `rotate`'s answer is at its input: the transpose of `rotate`."""
        return self.unrotate(x, positions) * self.scale[:, None, None].square().to(x.dtype)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [L, n, 1, D]: the product in float32, as models form it."""
        angle = (self.frequency[:, None] * positions.to(self.frequency)[:, None]).to(dtype)
        return angle.cos()[:, :, None], angle.sin()[:, :, None]


def _read(rotary: Rotary, module: Any, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """(partner, frequency, scale) [D] of an attention module."""
    turn = rotary.turns[module]
    if turn is None:  # of any width: it turns nothing
        size = module.head_dim
        return torch.arange(size), torch.zeros(size), torch.ones(size)
    size, device = turn.channels, next((p.device for p in module.parameters()), torch.device("cpu"))
    powers = [2**k for k in range(DOUBLINGS + 1) if k == 0 or 2**k < limit]
    eye = torch.eye(size, device=device)[None, None]
    made = [
        rotary.rotate(module, eye, torch.full((1, size), p, device=device))[0, 0].double().cpu().mT for p in powers
    ]  # column i of each: what becomes of channel i
    off = sum(x.abs() for x in made) * (1 - torch.eye(size))
    own = torch.arange(size)
    partner = torch.where(off.amax(1) > 1e-7, off.argmax(1), own)
    turned = partner != own
    first = made[0]
    scale = torch.hypot(first[own, own], torch.where(turned, first[own, partner], torch.zeros(size)))
    scale = torch.where((scale - 1).abs() < 1e-6, torch.ones(size), scale)
    angle = torch.zeros(size, dtype=torch.float64)
    for power, matrix in zip(powers, made, strict=True):
        seen = torch.atan2(torch.where(turned, matrix[own, partner], torch.zeros(size).double()), matrix[own, own])
        off_by = torch.remainder(seen - angle * power + math.pi, 2 * math.pi) - math.pi
        angle = torch.where(turned, angle + off_by / power, angle)
    return partner, angle.float(), scale.float()
