"""A method that keeps everything and watches, and what it should have seen, by transformers' own eager attention."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from longwave.frame import MemoryLayer, Needs
from longwave.methods.base import Bound, Method
from longwave.store.tokens import capacity


@dataclass(frozen=True)
class Spy(Method):
    """Everything of every layer, and what is asked for of the frame."""

    name: ClassVar[str] = "spy"

    queries: int = 0
    every: int = 1
    mass: bool = False
    positions: bool = False
    unrotated: bool = False
    hidden: bool = False

    def bind(self, shape, profile, budget):
        return SpyBound(self, shape, budget)


class SpyBound(Bound):
    @property
    def needs(self):
        m = self.method
        return Needs(m.queries, m.every, m.mass, m.positions, m.unrotated, m.hidden)

    def layer(self, index):
        return SpyLayer(index, self.needs)

    def layer_bytes(self, index, tokens):
        return capacity(tokens) * self.shape.token_bytes


class SpyLayer(MemoryLayer):
    """`passes`: each Pass that it answered, its tensors copied since they may be overwritten."""

    def _clear(self):
        super()._clear()
        self.passes = []
        self.unrotated = []

    def note(self, p):
        if self.needs.unrotated:
            self.unrotated.append(p.unrotated())
        self.passes.append(p)

    def attend(self, p):
        self.note(p)
        return super().attend(p)

    def attend_step(self, p, step):
        self.note(p)
        return super().attend_step(p, step)

    def unsteady(self):
        return None


class Truth:
    """What a model's layers compute of one row, read alone and at once, its attention being eager.

    Of each layer: q [query_heads, tokens, head_dim], rotated; keys [kv_heads, tokens, head_dim], before rotation;
    hidden [tokens, hidden_size], which goes into the attention module; share [query_heads, tokens, tokens], the
    softmax.
    """

    def __init__(self, eager, ids):
        self.q, self.keys, self.hidden = [], [], []
        hooks = []
        for layer in eager.model.layers:
            attention = layer.self_attn
            assert attention.config._attn_implementation == "eager"
            hooks.append(attention.register_forward_pre_hook(self._enters, with_kwargs=True))
            hooks.append(getattr(attention, "k_norm", attention.k_proj).register_forward_hook(self._keys))
        home = sys.modules[type(attention).__module__]
        plain = home.eager_attention_forward

        def watched(module, query, *args, **kwargs):
            self.q.append(query[0])
            return plain(module, query, *args, **kwargs)

        home.eager_attention_forward = watched
        try:
            with torch.no_grad():
                out = eager(ids[None], output_attentions=True, use_cache=False)
        finally:
            home.eager_attention_forward = plain
            for hook in hooks:
                hook.remove()
        self.dim = attention.head_dim
        self.logits = out.logits[0]
        self.share = [share[0] for share in out.attentions]

    def _enters(self, module, args, kwargs):
        self.hidden.append((args[0] if args else kwargs["hidden_states"])[0])

    def _keys(self, module, args, out):
        self.keys.append(out[0] if out.ndim == 4 else out[0].unflatten(-1, (2, -1)).transpose(0, 1))

    def mass(self, layer, asked=slice(None)):
        """What each token got from the queries of the tokens `asked`: [2 KV heads, tokens]."""
        return self.share[layer][:, asked].sum(1).unflatten(0, (2, -1)).sum(1)
