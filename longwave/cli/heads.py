"""What a plan made of every head, and what it costs on the text that follows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from longwave.evals.loss import score
from longwave.frame import LongCache
from longwave.methods.segmented import SegmentedBound


def head_bits(bound: SegmentedBound) -> list[dict[str, Any]]:
    """For each memory layer, of every head: bits a number of K and of V, scales, states and biases included, and
    whether its segments are merged. What aligns the fields of a page belongs to no head and is left out."""
    found = []
    for position, layer in enumerate(bound.shape.memory_layers):
        k, v = bound.layout(position).bits()
        merged = [code.merged for code in bound.plan[position].k]
        found.append({"layer": layer, "k": k, "v": v, "merged": merged})
    return found


def merged_segments(bound: SegmentedBound, held: LongCache) -> dict[str, int]:
    """How many heads merge their segments, and how many segments of a head the cache holds merged, of all it holds."""
    heads = [code.merged for layer in bound.plan for code in layer.k]
    stores = [getattr(layer, "store", None) for layer in held.memory_layers()]
    segments = next((store.tokens[0] // bound.span for store in stores if store is not None), 0)
    return {
        "heads": sum(heads),
        "of_heads": len(heads),
        "segments": sum(heads) * segments,
        "of_segments": len(heads) * segments,
    }


def head_rows(bits: list[dict[str, Any]]) -> list[list[Any]]:
    """A row a layer, a cell a head: bits of K and V, "merged" where its segments are."""
    return [
        [row["layer"]]
        + [
            f"{k:.2f} {v:.2f}" + " merged" * merged
            for k, v, merged in zip(row["k"], row["v"], row["merged"], strict=True)
        ]
        for row in bits
    ]


def measured(model: PreTrainedModel, exact: LongCache, held: LongCache, ids: torch.Tensor) -> dict[str, float]:
    """What `held` costs on ids [1, n + 1] that follow what both caches have read: means over n tokens, nats.

    Both caches have read them afterwards.
    """
    dense, mine = score(model, exact, ids), score(model, held, ids)
    kl, same = mine.divergence(dense)
    return {
        "tokens": ids.shape[1] - 1,
        "kl": float(kl.mean()),
        "over_dense": mine.loss - dense.loss,
        "same_top1": float(same.mean()),
    }
