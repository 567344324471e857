"""Reading tokens into a cache pass by pass, and what the cache then is."""

import torch

from longwave.frame import cache_argument
from longwave.store.latents import LatentStore


def positions_of(mask, new):
    """Positions of the last `new` columns, as generate has them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]


def read(model, memory, ids, mask=None, **options):
    """Read those of ids [batch, columns] that the cache does not hold; their logits. mask is of all columns."""
    new = ids.shape[1] - memory.get_seq_length()
    if mask is not None:
        mask = mask[:, : ids.shape[1]]
        options |= {"attention_mask": mask, "position_ids": positions_of(mask, new)}
    with torch.no_grad():
        return model(ids[:, -new:], **cache_argument(model, memory), use_cache=True, **options).logits


def read_in(model, memory, ids, sizes, mask=None):
    """Logits of passes of so many tokens each."""
    found, end = [], memory.get_seq_length()
    for size in sizes:
        end += size
        found.append(read(model, memory, ids[:, :end], mask))
    return torch.cat(found, dim=1)


def state_of(memory):
    """All that a cache's layers hold and count, layer by layer: name -> number, list or tensor, the tensors copied."""
    found = []
    for layer in memory.memory_layers():
        state = {name: getattr(layer, name) for name in ("columns", "batch_size")}
        for name in ("rows", "_run", "_evicted", "_known"):
            state[name] = list(getattr(layer, name, ()))
        if isinstance(getattr(layer, "store", None), LatentStore) and not layer.progress.rotary.turns:
            # a pickle left the model behind, and nothing can be rotated: what is held, then
            state["k"], state["v"] = layer.store.k.clone(), layer.store.v.clone()
        else:
            state["k"], state["v"] = layer.materialize()
        state |= {"lengths": list(layer.dense.lengths), "middle": [0] * len(layer.rows)}
        if getattr(layer, "store", None) is not None:
            state["middle"] = list(layer.store.tokens)
        state |= {name: layer.dense.column(name).clone() for name in layer.dense.columns}
        if getattr(layer, "turn", None) is not None:
            state["turn"] = layer.turn.clone()
        if layer.queries is not None:
            age = torch.arange(layer.queries.width - 1, -1, -1)
            known = age < torch.tensor(layer.queries.counts)[:, None]
            state["counts"] = list(layer.queries.counts)
            state["asked"] = layer.queries.positions * known
            state["queries"] = layer.queries.q * known[:, None, :, None]
        if getattr(layer, "summary", None) is not None:
            chunks = torch.arange(layer.summary.shape[2]) * layer.method.chunk
            real = chunks < torch.tensor(layer.dense.lengths)[:, None]
            state["summary"] = layer.summary * real[:, None, :, None, None]
        if getattr(layer, "means", None) is not None:
            real = torch.arange(layer.means.shape[2]) < torch.tensor(layer._known)[:, None]
            state["means"] = layer.means * real[:, None, :, None]
        found.append(state)
    return found


def check_state(got, want, but=(), rtol=0, atol=0, share=1.0):
    """The same numbers; of floating ones at least a `share` is close. `but`: names that may differ."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - set(but):
            a, b = ours[name], theirs[name]
            if not torch.is_tensor(a):
                assert a == b, name
                continue
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if a.is_floating_point():
                close = torch.isclose(a, b, rtol=rtol, atol=atol).float()
                assert close.numel() == 0 or close.mean() >= share, name
            else:
                assert torch.equal(a, b), name
