"""Measuring what every way to store a head's K or V costs, by Fisher probes: one pass and a few backward passes.

An option moves the attention outputs o of the scored tokens by d. To second order the divergence of the next-token
distribution p is KL = 1/2 d'Fd with F = E[g g'], g = grad_o log p(y), y drawn from p itself (the Fisher information).
A *probe* draws y_s at every scored token s and takes G = grad_o sum_s sqrt(w_s) log p(y_s), w the weights of the
scored tokens. Draws at different tokens are independent and g has mean zero, so E[(G.d)^2] = sum_s w_s d'F_s d.

The second order is right for small changes. A large one can turn a token that is as good as certain, where F is nearly
0: what an option really costs there shows in F of a flatter distribution. So tokens are drawn, and F taken, at a
temperature above 1, in units of the model's own logits; 1 is the Fisher information itself (docs/planner.md).

This module does not know what pages are made of, nor which plan will come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave import plan as planner
from longwave.frame import MemoryLayer, assemble, cache_argument
from longwave.frame.attention import Handle
from longwave.frame.later import later_queries
from longwave.frame.observe import probing
from longwave.ops.attention.reference import group_heads, query_block
from longwave.ops.merge import merge_heads
from longwave.plan.plan import LayerCodes
from longwave.plan.profile import SIDES, Sensitivity
from longwave.plan.recall import Windows
from longwave.shape import CacheShape
from longwave.store.pages import PageStore

Progress = Callable[[int, int], None]
FORMS = ("diag", "full")
OPTIONS = [len(options) for options in (planner.KEY_OPTIONS, planner.VALUE_OPTIONS, planner.BOTH_OPTIONS)]
TEMPERATURE = 2.0
UNREACHED = (
    "no gradients go through this model's weights here (some kernels of quantised weights have none), so it cannot be "
    "measured: give the profile of its float form, or measure it on another device"
)
SCALE = 2.0**10  # of gradients in float16, whose smallest numbers are too large for them


class NoGradients(ValueError):
    """A model whose probes reach nothing."""


class Scores:
    """Softmax of scored queries over the context and the scored tokens before them, a block of queries at a time.

    q [B, Hq, Q, D]; keys [B, H, L, D] of the context; own [B, H, Q, D], the scored tokens' keys; sinks [Hq], learned
    scores of a token without a value.
    """

    def __init__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        own: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ):
        self.sinks = sinks
        self.groups = q.shape[1] // keys.shape[1]
        self.q, self.keys, self.own, self.scaling = q, keys, own, scaling
        self.kind = torch.float64 if q.dtype == torch.float64 else torch.float32

    def blocks(self, count: int = 1) -> Iterator[slice]:
        """Of queries, so that `count` tables of scores stay small."""
        queries, columns = self.q.shape[2], self.keys.shape[2] + self.own.shape[2]
        step = query_block(count * self.q.shape[0] * self.q.shape[1], columns)
        return (slice(start, min(start + step, queries)) for start in range(0, queries, step))

    def grouped(self, x: torch.Tensor, block: slice) -> torch.Tensor:
        """Some queries' part of a tensor shaped as q, in the type that is computed in: [B, H, G * block, D]."""
        return group_heads(x[:, :, block].to(self.kind), self.keys.shape[1])

    def raw(self, x: torch.Tensor, block: slice) -> torch.Tensor:
        """Scores of grouped queries x: [B, H, G * block, L + Q]."""
        scores = torch.cat([x @ self.keys.to(self.kind).mT, x @ self.own.to(self.kind).mT], -1).mul_(self.scaling)
        queries = torch.arange(block.start, block.stop, device=x.device).repeat(self.groups)
        hidden = torch.arange(self.own.shape[2], device=x.device) > queries[:, None]
        scores[..., self.keys.shape[2] :].masked_fill_(hidden, torch.finfo(self.kind).min)
        return scores

    def softmax(self, raw: torch.Tensor) -> torch.Tensor:
        """Of `raw`, as it: with sinks it sums to less than one."""
        if self.sinks is None:
            return torch.softmax(raw, -1)
        sinks = self.sinks.to(raw.dtype).view(1, raw.shape[1], -1, 1)
        beside = sinks.repeat_interleave(raw.shape[2] // sinks.shape[2], 2).expand(*raw.shape[:3], 1)
        return torch.softmax(torch.cat([raw, beside], -1), -1)[..., :-1]


class ContextAttention(torch.autograd.Function):
    """Attention over a context and the scored tokens themselves, whose backward pass forms the scores anew: a pass over
    all layers holds nothing of the size of the context. The context's own gradients are formed where they are asked
    for."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        own_k: torch.Tensor,
        own_v: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, own_k, own_v, k, v)
        ctx.scaling, ctx.sinks = scaling, sinks
        scores, out = Scores(q, k, own_k, scaling, sinks), torch.empty_like(q)
        for block in scores.blocks():
            p = scores.softmax(scores.raw(scores.grouped(q, block), block))
            mixed = p[..., : k.shape[2]] @ v.to(p.dtype) + p[..., k.shape[2] :] @ own_v.to(p.dtype)
            out[:, :, block] = mixed.reshape(out[:, :, block].shape).to(q.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, own_k, own_v, k, v = ctx.saved_tensors
        (grad,), length = grads, k.shape[2]
        scores = Scores(q, k, own_k, ctx.scaling, ctx.sinks)
        to_q = torch.empty_like(q)
        to_k, to_v = (torch.zeros(x.shape, dtype=scores.kind, device=x.device) for x in (own_k, own_v))
        asked = ctx.needs_input_grad[3]
        past_k, past_v = (torch.zeros(x.shape if asked else 0, dtype=scores.kind, device=x.device) for x in (k, v))
        values, keys = (x.to(scores.kind) for x in (v, k))
        own_values, own_keys = (x.to(scores.kind) for x in (own_v, own_k))
        for block in scores.blocks(2):
            x, g = scores.grouped(q, block), scores.grouped(grad, block)
            p = scores.softmax(scores.raw(x, block))
            to_v += p[..., length:].mT @ g
            if asked:
                past_v += p[..., :length].mT @ g
            slope = torch.cat([g @ values.mT, g @ own_values.mT], -1)
            slope = p * (slope - (slope * p).sum(-1, keepdim=True)) * ctx.scaling
            moved = slope[..., :length] @ keys + slope[..., length:] @ own_keys
            to_q[:, :, block] = moved.reshape(to_q[:, :, block].shape).to(q.dtype)
            to_k += slope[..., length:].mT @ x
            if asked:
                past_k += slope[..., :length].mT @ x
        past = (past_k.to(k.dtype), past_v.to(v.dtype)) if asked else (None, None)
        return to_q, to_k.to(own_k.dtype), to_v.to(own_v.dtype), *past, None, None


class Watched(MemoryLayer):
    """A dense layer. A pass with gradients does not enter it: it leaves q, own, out and scaling behind instead."""

    q: torch.Tensor  # rotated, [B, Hq, Q, D]
    own: tuple[torch.Tensor, torch.Tensor]  # K and V of the scored tokens, [B, H, Q, D] each
    out: torch.Tensor  # what attention answered, in the graph: as q
    sinks: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        self.own = key_states, value_states
        handle = Handle(self)
        return handle, handle

    def forward(  # masks and positions are those of a plain pass
        self,
        q: torch.Tensor,
        scaling: float,
        mask: Any = None,
        module: Any = None,
        positions: Any = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(q, scaling, mask, module, positions, sinks)
        self.sinks = None if sinks is None else sinks.detach()
        out = ContextAttention.apply(q, *self.own, *self.dense.view(), scaling, self.sinks)
        if not out.requires_grad:  # the first of them: nothing below it is to be changed
            out.requires_grad_()
        self.q, self.own, self.out, self.scaling = q.detach(), tuple(x.detach() for x in self.own), out, scaling  # type: ignore[assignment]
        return out


def drawn(logp: torch.Tensor, windows: Windows, probes: int, first: int = 0) -> Iterator[torch.Tensor]:
    """sum_s sqrt(w_s) log p(y_s) of every probe, y_s drawn from p itself.

    logp float [tokens that count, vocabulary]. first: number of the first of the windows, which decides what is drawn.
    """
    counted = windows.weight > 0
    weight = windows.weight[counted].sqrt().to(logp.device)
    numbers = [
        torch.rand(probes, int(counts.sum()), generator=torch.Generator().manual_seed(first + row))
        for row, counts in enumerate(counted)
    ]
    cumulated = logp.detach().exp().cumsum_(-1)
    for uniform in torch.cat(numbers, -1).to(logp.device):
        at = uniform[:, None] * cumulated[:, -1:]
        said = torch.searchsorted(cumulated, at).clamp(max=logp.shape[1] - 1)
        yield (logp.gather(1, said)[:, 0] * weight).sum()


def slopes(scores: Iterator[torch.Tensor], at: list[torch.Tensor]) -> Iterator[tuple[tuple[torch.Tensor, ...], float]]:
    """Of every score the gradients at some tensors, times the number beside them: those of float16 would vanish."""
    scale = SCALE if at[0].dtype == torch.float16 else 1.0
    for score in scores:
        grads = torch.autograd.grad(score * scale, at, retain_graph=True, allow_unused=True)
        if any(g is None for g in grads):
            raise NoGradients(UNREACHED)
        while scale > 1 and not all(bool(torch.isfinite(g).all()) for g in grads):
            scale /= 4
            grads = torch.autograd.grad(score * scale, at, retain_graph=True)
        yield grads, scale


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Parameters that ask for no gradients, so that a pass keeps nothing for theirs."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_()


class Bench:
    """Windows read exactly and scored once, with the probes' gradients at every memory layer.

    first: number of the first of the windows, which decides what is drawn, so that it does not matter how many are read
    at once. layers: what each saw. probes: a tensor a layer, [probes, B, Hq, Q, D]. middle: the tokens that
    options change.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        method: Any,
        probes: int,
        first: int = 0,
        temperature: float = TEMPERATURE,
    ):
        ids, context = windows.ids.to(model.device), windows.context
        sinks, window, segment = method.dense_tokens
        count = max(0, context - sinks - window) // segment * segment
        if not count:
            raise ValueError(f"a window of {context} tokens is too short for {method.name} to compress anything")
        self.middle, self.window = slice(sinks, sinks + count), window
        needs = probing(window)
        memory = assemble(model, lambda index: Watched(index, needs), needs, "dense")
        with torch.no_grad():
            model(ids[:, :context], **cache_argument(model, memory), use_cache=True, logits_to_keep=1)
        self.layers: list[Watched] = list(memory.memory_layers())  # type: ignore[arg-type]
        with torch.enable_grad(), frozen(model):
            logits = model(ids[:, context:-1], **cache_argument(model, memory), use_cache=True).logits
            if not logits.requires_grad:  # not one layer's answer
                raise NoGradients(UNREACHED)
            logits = logits[(windows.weight > 0).to(logits.device)]
            logp = logits.float().div_(temperature).log_softmax(-1)
            del logits
            self.probes = self._draw(logp, windows, probes, first, temperature)
        for layer in self.layers:
            layer.out = layer.out.detach()

    def _draw(
        self, logp: torch.Tensor, windows: Windows, probes: int, first: int, temperature: float
    ) -> list[torch.Tensor]:
        """Gradients of what the model itself would say: the same tokens on every device, up to its rounding.

        logp float [tokens that count, vocabulary], of logits divided by `temperature`. What 16 bits computed is kept in
        16 bits, of float32's range.
        """
        outs = [layer.out for layer in self.layers]
        kind = torch.bfloat16 if outs[0].element_size() == 2 else torch.float32
        found = [torch.empty(probes, *out.shape, dtype=kind, device=out.device) for out in outs]
        for number, (grads, scale) in enumerate(slopes(drawn(logp, windows, probes, first), outs)):
            for kept, g in zip(found, grads, strict=True):
                kept[number] = g.float() * (temperature / scale)
        return found

    def key_weight(self, position: int, segment: int) -> torch.Tensor:
        """A K channel's variance around its segment's mean times the query's mean square: [kv_heads, head_dim]."""
        layer = self.layers[position]
        k = layer.dense.view()[0][:, :, self.middle].float()
        spread = k.unflatten(2, (-1, segment)).var(3, unbiased=False).mean((0, 2))
        return (spread * group_heads(layer.q, k.shape[1]).float().square().mean((0, 2))).cpu()

    def merged(self, position: int, segment: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The middle with every segment merged as a layer would: K and V [B, H, M, D], and the bias [B, H, M /
        segment]."""
        layer = self.layers[position]
        found = later_queries(layer, self.window)
        assert found is not None
        q, _, lse = found
        k, v = (x[:, :, self.middle] for x in layer.dense.view())
        return merge_heads(q, k, v, lse, layer.scaling, segment, range(k.shape[1]))

    def dots(
        self, position: int, changed: Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]
    ) -> Iterator[torch.Tensor]:
        """G.d of each change, every head alone and all else exact: float [probes, B, H, Q].

        changed: K's and V's middle as an option stores it [B, H, M, D], None where it is exact, and what is added to
        the scores of each of its tokens [B, H, M].
        """
        layer, probes = self.layers[position], self.probes[position]
        k, v = layer.dense.view()
        own_k, own_v = layer.own
        scores = Scores(layer.q, k, own_k, layer.scaling, layer.sinks)
        first, last = self.middle.start, self.middle.stop
        batch, heads = k.shape[:2]
        values = torch.cat([v, own_v], 2).to(scores.kind)
        blocks = list(scores.blocks(3))
        held = {}
        if len(blocks) == 1:  # else formed again for every change
            held[0] = self._exact(scores, blocks[0])
        for key, value, bias in changed:
            found = []  # [probes, B, H, block]
            mixed = values
            if value is not None:
                value = value.to(scores.kind)
                if key is not None:
                    mixed = torch.cat([values[:, :, :first], value, values[:, :, last:]], 2)
            for number, block in enumerate(blocks):
                raw, p, x = held[number] if number in held else self._exact(scores, block)
                if key is None:
                    assert value is not None
                    moved = p[..., first:last] @ (value - values[:, :, first:last])
                else:
                    other = raw.clone()
                    other[..., first:last] = (x @ key.to(scores.kind).mT).mul_(layer.scaling)
                    if bias is not None:
                        other[..., first:last] += bias.to(scores.kind)[:, :, None]
                    other = scores.softmax(other)
                    moved = (other - p) @ values if value is None else other @ mixed - p @ values
                moved = moved.view(batch, heads, -1, block.stop - block.start, moved.shape[-1])
                g = probes[:, :, :, block].unflatten(2, (heads, -1))
                found.append(torch.einsum("pbhgqd,bhgqd->pbhq", g.to(moved.dtype), moved))
            yield torch.cat(found, -1)

    def _exact(self, scores: Scores, block: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = scores.grouped(scores.q, block)
        raw = scores.raw(x, block)
        return raw, scores.softmax(raw), x


def costs(dot: torch.Tensor, form: str) -> torch.Tensor:
    """KL in nats as each probe sees it, of G.d [probes, B, H, Q]: float [probes, B, H].

    form: "full" squares the sum over positions; "diag" sums the squares by position, which leaves out how positions
    hang together and is less noisy.
    """
    return (dot.square().sum(-1) if form == "diag" else dot.sum(-1).square()).cpu() / 2


def parts(shape: CacheShape, windows: Windows, batch: int) -> int:
    """How many parts `measure` reports progress in."""
    return -(-len(windows.ids) // batch) * (1 + len(shape.memory_layers))


def measure(
    model: PreTrainedModel,
    windows: Windows,
    method: Any,
    probes: int = 8,
    form: str = "diag",
    batch: int = 1,
    temperature: float = TEMPERATURE,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Costs of every option of every head in every one of `windows`, `batch` rows at a time.

    probes: backward passes a window. form: see `costs`. temperature: of what is drawn, see above.
    Raises ValueError where a window is too short for `method` to compress anything.
    """
    if form not in FORMS:
        raise ValueError(f"form is {FORMS[0]} or {FORMS[1]}, got {form!r}")
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    page, layers = method.page(shape), len(shape.memory_layers)
    total, done = parts(shape, windows, batch), 0
    weight: torch.Tensor | None = None
    found: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}  # of each batch: [rows, layers, heads, options]
    for start in range(0, len(windows.ids), batch):
        progress(done, total)
        bench = Bench(model, windows.part(slice(start, start + batch)), method, probes, start, temperature)
        done += 1
        if weight is None:  # channels are ordered once, by the first part: plans and costs must agree on it
            weight = torch.stack([bench.key_weight(position, page.segment) for position in range(layers)])
        held: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
        with torch.no_grad():
            for position in range(layers):
                progress(done, total)
                changed = stored(bench, position, weight[position], page)
                every = torch.stack([costs(dot, form).mean(0) for dot in bench.dots(position, changed)], -1)
                for side, part in zip(SIDES, every.split(OPTIONS, -1), strict=True):
                    held[side].append(part)
                done += 1
        for side in SIDES:
            found[side].append(torch.stack(held[side], 1))
    progress(total, total)
    assert weight is not None
    about = {**about_of(page, windows), "probes": probes, "form": form, "temperature": temperature}
    k, v, both = (torch.cat(found[side]) for side in SIDES)
    return Sensitivity(about, k, v, both, windows.recall.clone(), weight)


def about_of(page: planner.Shape, windows: Windows) -> dict[str, Any]:
    """What a measurement is of: `Sensitivity.about`, but for how it was made."""
    return {
        "k_options": list(planner.KEY_OPTIONS),
        "v_options": list(planner.VALUE_OPTIONS),
        "both_options": list(planner.BOTH_OPTIONS),
        "segment": page.segment,
        "states": page.states,
        "context": windows.context,
        "scored": windows.weight.shape[1],
    }


def stored(
    bench: Bench, position: int, weight: torch.Tensor, page: planner.Shape
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """The middle of one layer as every option of K, then of V, then of both stores it, all heads at once: `dots`."""
    k, v = (x[:, :, bench.middle] for x in bench.layers[position].dense.view())
    heads = k.shape[1]
    order = weight.argsort(dim=-1, descending=True, stable=True)
    straight = torch.arange(page.dim).expand(heads, -1)
    falling = [weight[head, order[head]].tolist() for head in range(heads)]
    least = planner.value_code(0, page)
    for option in planner.KEY_OPTIONS:
        codes = tuple(planner.key_code(falling[head], option, page) for head in range(heads))
        yield _through(LayerCodes(codes, (least,) * heads, order, straight), page, k, v)[0], None, None
    flat = planner.key_code(None, 0.0, page)
    for option in planner.VALUE_OPTIONS:
        codes = (planner.value_code(option, page),) * heads
        yield None, _through(LayerCodes((flat,) * heads, codes, order, straight), page, k, v)[1], None
    for both in planner.BOTH_OPTIONS:
        key, value = planner.both_codes(both, page)
        keys, values, bias = bench.merged(position, page.segment)
        keys, values = _through(LayerCodes((key,) * heads, (value,) * heads, straight, straight), page, keys, values)
        yield keys, values, bias.half().float().repeat_interleave(page.segment, 2)


def _through(
    codes: LayerCodes, page: planner.Shape, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    store = PageStore(k.shape[0], codes.layout(page.segment, k.dtype), "dct", codes.states, k.device)
    store.append(None, k, v)
    return store.materialize()
