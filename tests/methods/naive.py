"""Naive twins of the methods that choose tokens: for each row and head a Python list, in float64 and with loops."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from longwave.frame.attention import StepMask
from longwave.methods.base import CacheShape

H, G, D = 2, 3, 8  # KV heads, query heads of each, channels
SCALE = 0.4


def shape(dtype=torch.float64, layers=1):
    return CacheShape(tuple(range(layers)), (), H, D, dtype, H * G)


def draw(batch, count, seed=0, dtype=torch.float64, sharp=1.5):
    """k, v [batch, H, count, D] and q [batch, H * G, count, D]."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, H, count, D, generator=g, dtype=torch.float64).to(dtype)
    q = torch.randn(batch, H * G, count, D, generator=g, dtype=torch.float64) * sharp
    return k, v, q.to(dtype)


def drive(layer, k, v, q, sizes, valid=None, start=0):
    """Give a layer tokens in passes of `sizes`, as attention modules do, from token `start` on; yields each answer."""
    for size in sizes:
        now = slice(start, start + size)
        mask = StepMask(None if valid is None else valid[:, : start + size], True)
        layer.update(k[:, :, now], v[:, :, now])
        yield layer.forward(q[:, :, now], SCALE, mask)
        start += size


@dataclass
class Token:
    place: int  # in its row, padding not counted
    k: torch.Tensor
    v: torch.Tensor
    mass: float = 0.0


@dataclass
class Head:
    """What one KV head of one row holds, and the queries of its last tokens."""

    tokens: list[Token] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)  # [G, D] each
    seen: int = 0

    def places(self):
        return [token.place for token in self.tokens]


def softmax(q, tokens):
    """Probabilities of queries [.., D] over tokens, a list."""
    return torch.softmax(q @ torch.stack([token.k for token in tokens]).T * SCALE, -1)


def by_place(head):
    return [token.place for token in head.tokens]


def by_mass(head):
    return [token.mass for token in head.tokens]


def by_votes(head, kernel=5, pool="avg", window=7):
    """The window's queries, each over all that it sees; votes of the window itself do not count."""
    count = len(head.tokens)
    votes = [0.0] * count
    for age, q in enumerate(reversed(head.queries)):
        for i, p in enumerate(softmax(q, head.tokens[: count - age]).sum(0).tolist()):
            votes[i] += p if i < count - window else 0
    half, pooled = kernel // 2, []
    for i in range(count):
        near = [votes[j] if 0 <= j < count else 0.0 for j in range(i - half, i + half + 1)]
        pooled.append(sum(near) / kernel if pool == "avg" else max(near))
    return pooled


def limit(method, budget, columns, itemsize=8):
    """Tokens that a head may keep of `seen`: a fraction bounds the bytes of the middle, of which a token costs K, V and
    `columns` bytes beside."""
    dense = 2 * D * itemsize

    def most(seen):
        if method.tokens is not None:
            return min(seen, method.tokens)
        middle = max(0, seen - method.sinks - method.window)
        return seen - middle + int(budget * dense / (dense + columns) * middle)

    return most


def best(scores, tokens, method, count):
    """The `count` tokens that stay: first and last ones, then the best, the earlier one of equals; in order."""
    last = len(tokens) - method.window
    always = [i for i in range(len(tokens)) if i < method.sinks or i >= last]
    free = sorted((i for i in range(method.sinks, last)), key=lambda i: (-scores[i], i))
    return [tokens[i] for i in sorted(always + free[: count - len(always)])]


def run_head(score, method, most, k, v, q, parts):
    """One head through passes: k, v [t, D], q [G, t, D] of its real tokens; parts: how many of them each pass brings.

    Yields the head and the answers [G, real tokens, D] of each pass.
    """
    head = Head()
    for count in parts:
        answers = torch.zeros(G, count, D, dtype=torch.float64)
        for n in range(count):
            t = head.seen + n
            head.tokens.append(Token(t, k[t], v[t]))
            head.queries = [*head.queries, q[:, t]][-method.window :]
            p = softmax(q[:, t], head.tokens)
            answers[:, n] = p @ torch.stack([token.v for token in head.tokens])
            for token, got in zip(head.tokens, p.sum(0).tolist(), strict=True):
                token.mass += got
        head.seen += count
        over = len(head.tokens) - most(head.seen)
        if over >= (method.every if count <= 1 else 1):
            head.tokens = best(score(head), head.tokens, method, most(head.seen))
        yield head, answers


def parts_of(sizes, valid):
    """Real tokens of each pass, of one row: valid [t], or None."""
    found, start = [], 0
    for size in sizes:
        found.append(size if valid is None else int(valid[start : start + size].sum()))
        start += size
    return found


def coming_with(pads, total):
    """Which of `total` tokens of each row are real, bool [rows, total], None where all are; a row keeps its last 5."""
    return None if pads == [0] else torch.arange(total) >= torch.tensor([min(p, total - 5) for p in pads])[:, None]


def rows_of(given, sizes, valid):
    """(row, which of its tokens are real, those of k, v, q, how many come in each pass) of every row."""
    for row in range(given[0].shape[0]):
        own = slice(None) if valid is None else valid[row]
        yield row, own, [x[row][:, own] for x in given], parts_of(sizes, None if valid is None else valid[row])


def check(layer, score, most, k, v, q, sizes, valid=None, atol=1e-9):
    """Drive a layer and its twins side by side: after every pass the same tokens stay; answers and mass are equal."""
    method, batch = layer.bound.method, k.shape[0]
    twins = {}
    for row in range(batch):
        own = slice(None) if valid is None else valid[row]
        for h in range(H):
            mine = [x[row, h][own].double() for x in (k, v)]
            asked = q[row, h * G : (h + 1) * G][:, own].double()
            parts = parts_of(sizes, None if valid is None else valid[row])
            twins[row, h] = run_head(score, method, most, *mine, asked, parts)
    start = 0
    for size, out in zip(sizes, drive(layer, k, v, q, sizes, valid), strict=True):
        now = slice(start, start + size)
        start += size
        for (row, h), twin in twins.items():
            head, answers = next(twin)
            held = layer.dense.lengths[row]
            places = layer.dense.column("position")[row, h, :held].tolist()
            assert places == head.places(), (start, row, h)
            assert layer.rows[row] == head.seen
            keys = layer.dense.view()[0][row, h, :held]
            if "mass" in layer.dense.columns:
                mass = layer.dense.column("mass")[row, h, :held].tolist()
                assert mass == pytest.approx([token.mass for token in head.tokens], rel=1e-5, abs=1e-6)
            if held:
                assert torch.equal(keys.double(), torch.stack([token.k for token in head.tokens]))
            got = out[row, h * G : (h + 1) * G]
            got = got if valid is None else got[:, valid[row, now]]
            torch.testing.assert_close(got.double(), answers, rtol=0, atol=atol)


# a model


def rotated(x, places, base=10_000.0):
    """x [.., n, D] turned by its places [n], halves paired."""
    dim = x.shape[-1]
    angle = places[:, None] * base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class InSlots:
    """A small Llama written out in float64, for one row: each layer and KV head has a list of un-rotated keys and
    values, turned by their place in it whenever they are read. `keep` takes such a list and says what stays."""

    def __init__(self, model, keep):
        self.model, self.keep = copy.deepcopy(model).double(), keep
        config = model.config
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.held = [[[] for _ in range(config.num_key_value_heads)] for _ in range(config.num_hidden_layers)]
        self.seen = self.longest = 0

    @torch.no_grad()
    def read(self, ids):
        """Logits [n, vocabulary] of the next ids [n]."""
        count, hidden = len(ids), self.model.model.embed_tokens(ids)
        for layer, heads in zip(self.model.model.layers, self.held, strict=True):
            x, module = layer.input_layernorm(hidden), layer.self_attn
            q, k, v = (
                project(x).view(count, -1, module.head_dim).transpose(0, 1)
                for project in (module.q_proj, module.k_proj, module.v_proj)
            )
            out = torch.empty_like(q)
            for h, held in enumerate(heads):
                held += [Token(self.seen + i, k[h, i], v[h, i]) for i in range(count)]
                self.longest = max(self.longest, len(held))
                places = torch.arange(len(held), dtype=torch.float64)
                keys = rotated(torch.stack([token.k for token in held]), places)
                values = torch.stack([token.v for token in held])
                asked = rotated(q[h * self.group : (h + 1) * self.group], places[-count:])
                for i in range(count):
                    now = len(held) - count + i + 1
                    p = torch.softmax(asked[:, i] @ keys[:now].T * module.scaling, -1)
                    out[h * self.group : (h + 1) * self.group, i] = p @ values[:now]
                    for token, got in zip(held, p.sum(0).tolist(), strict=False):
                        token.mass += got
                heads[h] = self.keep(held)
            hidden = hidden + module.o_proj(out.transpose(0, 1).flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.seen += count
        return self.model.lm_head(self.model.model.norm(hidden))
