"""What every way to store a head's K or V costs, measured by doing it: the check of longwave/plan/probe.py, which is a
few hundred times as fast.

Windows are read once, exactly. Then, one head and one side at a time, the middle is replaced by what an option's pages
stand for, and the same tokens are scored again: the cost is the KL from the exact run. All else stays exact, so costs
add up as far as errors do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave import plan as planner
from longwave.frame import MemoryLayer, Pass, assemble, cache_argument
from longwave.frame.observe import Needs
from longwave.ops.attention.reference import group_heads
from longwave.plan.plan import LayerCodes
from longwave.plan.probe import about_of
from longwave.plan.profile import Sensitivity
from longwave.plan.recall import Windows
from longwave.shape import CacheShape
from longwave.store.pages import PageStore

Progress = Callable[[int, int], None]


class _Watched(MemoryLayer):
    """A dense layer that sums the squares of the queries it answers: `energy` [kv_heads, head_dim]."""

    energy: torch.Tensor | None = None

    def attend(self, p: Pass) -> torch.Tensor:
        heads = self.dense.view()[0].shape[1]
        self.energy = group_heads(p.q, heads).float().square().mean((0, 2))
        return super().attend(p)


@contextmanager
def _from_layer(decoder: Any, first: int) -> Iterator[None]:
    """Run the decoder from layer `first` on: its input embeddings are then that layer's input."""
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList(list(layers)[first:])
    try:
        yield
    finally:
        decoder.layers = layers


class Bench:
    """Windows read exactly, ready to be scored with one head's middle replaced."""

    def __init__(self, model: PreTrainedModel, windows: Windows, method: Any):
        self.model, self.windows, self.method = model, windows, method
        self.decoder: Any = model.get_decoder()
        self.ids = windows.ids.to(model.device)
        self.memory = assemble(model, _Watched, Needs(), "dense")
        context = windows.context
        model(self.ids[:, :context], **cache_argument(model, self.memory), use_cache=True, logits_to_keep=1)
        self.layers: list[_Watched] = list(self.memory.memory_layers())  # type: ignore[arg-type]
        self.indices = [i for i, layer in enumerate(self.memory.layers) if isinstance(layer, MemoryLayer)]
        middle = max(0, context - method.sinks - method.window) // method.segment * method.segment
        if not middle:
            raise ValueError(f"a window of {context} tokens is too short for {method.name} to compress anything")
        self.middle = slice(method.sinks, method.sinks + middle)
        self.counted = windows.weight.to(model.device) > 0
        self.weight = windows.weight.to(model.device)
        self.inputs: dict[int, torch.Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(self._remember(i), with_kwargs=True)
            for i, layer in enumerate(self.decoder.layers)
        ]
        try:
            self.exact = self._score(0, None)
        finally:
            for hook in hooks:
                hook.remove()
        self.energy = [layer.energy for layer in self.layers]

    def _remember(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.inputs[index] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def _score(self, first: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """Log-probabilities of the counted tokens, from decoder layer `first` on: [counted, vocabulary]."""
        context, count = self.windows.context, self.ids.shape[1] - self.windows.context - 1
        positions = torch.arange(context, context + count, device=self.ids.device).expand(len(self.ids), -1)
        given = {"input_ids": self.ids[:, context:-1]} if hidden is None else {"inputs_embeds": hidden}
        with _from_layer(self.decoder, first):
            out = self.model(**given, position_ids=positions, **cache_argument(self.model, self.memory), use_cache=True)
        for layer in self.memory.layers:
            if layer.get_seq_length() > context:
                layer.crop(-count)
        return out.logits[self.counted].float().log_softmax(-1)

    def cost(self, position: int, side: str, head: int, values: torch.Tensor) -> torch.Tensor:
        """KL in nats of each row when one head's middle is `values` [rows, M, D]: float [rows]."""
        buffer = self.layers[position].dense
        x = buffer.k if side == "k" else buffer.v
        assert x is not None
        exact = x[:, head, self.middle].clone()
        x[:, head, self.middle] = values.to(x.dtype)
        index = self.indices[position]
        scored = self._score(index, self.inputs[index])
        buffer = self.layers[position].dense  # scoring may have moved it to a larger one
        x = buffer.k if side == "k" else buffer.v
        assert x is not None
        x[:, head, self.middle] = exact
        kl = torch.zeros_like(self.weight)
        kl[self.counted] = (self.exact.exp() * (self.exact - scored)).sum(-1)
        return (kl * self.weight).sum(-1).clamp(min=0)


def key_weights(bench: Bench) -> torch.Tensor:
    """A K channel's variance around its segment's mean times the query's mean square: [layers, kv_heads, head_dim]."""
    segment, made = bench.method.segment, []
    for layer, energy in zip(bench.layers, bench.energy, strict=True):
        k = layer.dense.view()[0][:, :, bench.middle].float()
        spread = k.unflatten(2, (-1, segment)).var(3, unbiased=False).mean((0, 2))
        assert energy is not None
        made.append((spread * energy).cpu())
    return torch.stack(made)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: Windows,
    method: Any,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Costs of every option of every head in every window, `batch` rows at a time: as `probe.measure`."""
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    page, layers = method.page(shape), len(shape.memory_layers)
    weight: torch.Tensor | None = None
    costs: dict[str, list[torch.Tensor]] = {"k": [], "v": []}  # of each batch: [rows, layers, heads, options]
    for start in range(0, len(windows.ids), batch):
        bench = Bench(model, windows.part(slice(start, start + batch)), method)
        if weight is None:  # channels are ordered once, by the first part: plans and costs must agree on it
            weight = key_weights(bench)
        found = []
        for position in range(layers):
            progress(start * layers + position, len(windows.ids) * layers)
            found.append(_layer_costs(bench, position, weight[position], shape.kv_heads, page).permute(2, 0, 1))
        every = torch.stack(found, 1)
        costs["k"].append(every[..., : len(planner.KEY_OPTIONS)])
        costs["v"].append(every[..., len(planner.KEY_OPTIONS) :])
    assert weight is not None
    k, v = torch.cat(costs["k"]), torch.cat(costs["v"])
    both = k[..., :1].expand(*k.shape[:3], len(planner.BOTH_OPTIONS)).clone()  # not measured: never better than flat
    return Sensitivity(about_of(page, windows), k, v, both, windows.recall.clone(), weight)


def _layer_costs(bench: Bench, position: int, weight: torch.Tensor, heads: int, page: planner.Shape) -> torch.Tensor:
    """Costs of one layer's options, K's then V's: [heads, options, rows]."""
    order = weight.argsort(dim=-1, descending=True, stable=True)
    straight = torch.arange(page.dim).expand(heads, -1)
    falling = [weight[head, order[head]].tolist() for head in range(heads)]
    k, v = (x[:, :, bench.middle].clone() for x in bench.layers[position].dense.view())  # `cost` writes where they lie
    rows = k.shape[0]
    key_options, value_options = planner.KEY_OPTIONS, planner.VALUE_OPTIONS
    found = torch.zeros(heads, len(key_options) + len(value_options), rows)
    before: dict[tuple[str, int], Any] = {}
    for i in range(max(len(key_options), len(value_options))):
        value = value_options[min(i, len(value_options) - 1)]
        key = key_options[min(i, len(key_options) - 1)]
        codes = LayerCodes(
            tuple(planner.key_code(falling[head], key, page) for head in range(heads)),
            (planner.value_code(value, page),) * heads,
            order,
            straight,
        )
        store = PageStore(rows, codes.layout(page.segment, k.dtype), "dct", codes.states, k.device)
        store.append(None, k, v)
        held = store.materialize()
        for side, options, column in (("k", key_options, i), ("v", value_options, len(key_options) + i)):
            if i >= len(options):
                continue
            for head in range(heads):
                code = codes.k[head] if side == "k" else codes.v[head]
                if before.get((side, head)) == code:  # few weights: a larger option buys nothing more
                    found[head, column] = found[head, column - 1]
                    continue
                before[side, head] = code
                found[head, column] = bench.cost(position, side, head, held["kv".index(side)][:, head]).cpu()
    return found
