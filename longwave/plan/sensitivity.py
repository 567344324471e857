"""Measuring what every way to store a head's K or V costs: the numbers behind a plan.

Windows are read once, exactly. Then, one head and one side at a time, the middle is replaced by what an option's pages
stand for, and the same tokens are scored again: the cost is the KL from the exact run. All else stays exact, so costs
add up as far as errors do not meet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from longwave import plan as planner
from longwave.frame import MemoryLayer, Pass, assemble
from longwave.frame.observe import Needs
from longwave.ops.attention.reference import group_heads
from longwave.plan.plan import LayerCodes
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
        model(self.ids[:, :context], past_key_values=self.memory, use_cache=True, logits_to_keep=1)
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
            out = self.model(**given, position_ids=positions, past_key_values=self.memory, use_cache=True)
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


def parts(model: PreTrainedModel, windows: Windows, batch: int) -> int:
    """How many parts `measure` reports progress in."""
    layers = len(CacheShape.of(model.config.get_text_config(decoder=True), model.dtype).memory_layers)
    return -(-len(windows.ids) // batch) * layers


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    windows: Windows,
    method: Any,
    batch: int = 8,
    partial: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Sensitivity:
    """Costs of every option of every head, mean over `windows`, `batch` rows at a time.

    partial: a file of finished parts; a killed run with the same windows goes on from there.
    """
    batches = [windows.part(slice(i, i + batch)) for i in range(0, len(windows.ids), batch)]
    done = _Partial(partial, _key(model, windows, method, batch))
    shape = CacheShape.of(model.config.get_text_config(decoder=True), model.dtype)
    layers, heads = len(shape.memory_layers), shape.kv_heads
    total = parts(model, windows, batch)
    page = method.page(shape)
    weight: torch.Tensor | None = done.get("weight")
    costs: dict[str, list[torch.Tensor]] = {"k": [], "v": []}  # a part each: [layers, heads, options, rows]
    for number, part in enumerate(batches):
        keys = [f"{number}/{position}" for position in range(layers)]
        bench = None
        if weight is None or not all(key in done.found for key in keys):
            bench = Bench(model, part, method)
        if weight is None:  # channels are ordered once, by the first part: plans and costs must agree on it
            assert bench is not None
            weight = key_weights(bench)
            done.put("weight", weight)
        held: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
        for position, key in enumerate(keys):
            progress(number * layers + position, total)
            found = done.get(key)
            if found is None:
                assert bench is not None
                found = _layer_costs(bench, position, weight[position], heads, page)
                done.put(key, found)
            options = len(planner.KEY_OPTIONS)
            held["k"].append(found[:, :options])
            held["v"].append(found[:, options:])
        for side in "kv":
            costs[side].append(torch.stack(held[side]))
    progress(total, total)
    assert weight is not None
    means = {}
    for side in "kv":
        whole = torch.cat(costs[side], dim=-1)
        for name, rows in (("prose", ~windows.recall), ("recall", windows.recall)):
            none = torch.zeros(whole.shape[:-1])
            means[f"{side}_{name}"] = whole[..., rows].mean(-1) if bool(rows.any()) else none
    about = {
        "k_options": list(planner.KEY_OPTIONS),
        "v_options": list(planner.VALUE_OPTIONS),
        "segment": method.segment,
        "states": page.states,
        "coef_bits": page.state_bits,
        "context": windows.context,
        "scored": windows.weight.shape[1],
        "prose_windows": int((~windows.recall).sum()),
        "recall_windows": int(windows.recall.sum()),
    }
    measured = Sensitivity(about=about, key_weight=weight, **means)
    done.remove()
    return measured


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


def _key(model: PreTrainedModel, windows: Windows, method: Any, batch: int) -> str:
    """Names a measurement: what would give other numbers has another name."""
    import hashlib

    digest = hashlib.sha256(windows.ids.numpy().tobytes() + windows.weight.numpy().tobytes())
    options = [list(planner.KEY_OPTIONS), list(planner.VALUE_OPTIONS), batch, windows.context, str(model.dtype)]
    weights = next(p for n, p in model.named_parameters() if "k_proj" in n or p.ndim == 2)
    digest.update(f"{options} {method!r} {float(weights.detach().float().abs().mean()):.6g}".encode())
    return digest.hexdigest()


class _Partial:
    """Finished parts of a measurement, a JSON line each, in a file that says which measurement it is of."""

    def __init__(self, path: Path | None, key: str):
        self.path = path
        self.found: dict[str, torch.Tensor] = {}
        if path is None:
            return
        if path.exists():
            lines = path.read_text().split("\n")
            try:
                same = json.loads(lines[0]) == {"measurement": key}
            except json.JSONDecodeError:
                same = False
            if not same:
                raise ValueError(
                    f"{path} holds part of another measurement: delete it to start anew, or give the "
                    "options of the run that wrote it"
                )
            whole = lines[1:-1]  # the last line is empty, or was cut off
            for line in whole:
                entry = json.loads(line)
                self.found[entry["part"]] = torch.tensor(entry["values"]).reshape(entry["shape"])
            path.write_text("\n".join([lines[0], *whole, ""]))
        else:
            path.write_text(json.dumps({"measurement": key}) + "\n")

    def get(self, part: str) -> torch.Tensor | None:
        return self.found.get(part)

    def put(self, part: str, values: torch.Tensor) -> None:
        self.found[part] = values
        if self.path is not None:
            entry = {"part": part, "shape": list(values.shape), "values": values.flatten().tolist()}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
