"""How long longcache takes to choose what it reads: rows of `python -m benchmarks.far --kernel`.

`ops.select`'s kernel against scores in one product, `topk` and votes in plain torch, and against the kernel's twin in
blocks; a step's query and a stretch of queries, at SmolLM2's heads and at those of an 8B model, in float16. That all
choose the same tokens is checked before they are timed. Times are medians of replays of a CUDA graph over keys that no
second-level cache holds (benchmarks/kernels.py).
"""

import gc
from functools import partial

import torch

from longwave.cli.console import show_table
from longwave.ops.attention.reference import _product, group_heads
from longwave.ops.select import reference

SHAPES = {"SmolLM2": (9, 3, 64), "8B": (32, 8, 128)}  # query heads, KV heads, head_dim
TOP, SPANS, SPAN, SINKS, WINDOW, STRETCH = 4, 127, 32, 32, 4096, 512  # longcache's own
SETS = 64  # of inputs at most


def whatever(row, work, device):
    """The row, which says why `work` failed where it did; the next one is measured all the same."""
    try:
        work()
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def drawn(shape, queries, keys, device, seed):
    """q [1, query_heads, queries, head_dim], k [1, kv_heads, keys, head_dim], and between which tokens is chosen."""
    query_heads, heads, dim = shape
    g = torch.Generator(device).manual_seed(seed)
    q = torch.randn(1, query_heads, queries, dim, generator=g, device=device).half()
    k = torch.randn(1, heads, keys, dim, generator=g, device=device).half()
    ends = (min(SINKS, keys // 4), keys - min(WINDOW, keys // 4))
    return q, k, *(torch.tensor([end], device=device) for end in ends)


def at_once(q, k, begin, end):
    """Scores and tokens of the best keys of each query, in one product: [1, query_heads, queries, TOP] each."""
    scores = _product(group_heads(q, k.shape[1]).flatten(0, 1), k.flatten(0, 1).mT)
    number = torch.arange(k.shape[2], device=k.device)
    scores.masked_fill_((number < begin) | (number >= end), float("-inf"))
    return tuple(x.view(*q.shape[:3], TOP) for x in scores.topk(TOP, -1))


def in_blocks(q, k, begin, end):
    return reference.best(q, k, begin, end, TOP, True)


def kernel(q, k, begin, end):
    from longwave.ops.select import triton

    why = triton.fits(q, k, TOP)
    if why is not None:
        raise RuntimeError(why)
    return triton.best(q, k, begin, end, TOP, True)


def chosen(best, q, k, begin, end):
    """What is read: bool [1, keys]."""
    return reference.around(best(q, k, begin, end)[1], k.shape[2], begin, end, SPANS, SPAN)


def agree(q, k, begin, end):
    """The share of queries and heads whose tokens are the same in all three; ArithmeticError where they are not.

    Of whole numbers scores are exact, and the kernel and its twin equal to the last tie. Of others sums come in another
    order, so that a query may take either of two tokens that are worth the same.
    """
    whole = [x.mul(2).round().clamp(-4, 4) for x in (q, k)]
    one, other = (best(*whole, begin, end) for best in (kernel, in_blocks))
    if not all(map(torch.equal, one, other)):
        raise ArithmeticError("of whole numbers the kernel and its twin choose other tokens: not timed")
    (values, tokens), *others = (best(q, k, begin, end) for best in (kernel, in_blocks, at_once))
    same = torch.ones_like(tokens[..., 0], dtype=torch.bool)
    for value, token in others:
        torch.testing.assert_close(values, value, rtol=1e-3, atol=1e-3)
        same &= (tokens.sort(-1).values == token.sort(-1).values).all(-1)
    share = same.double().mean().item()
    if share < 0.99:
        raise ArithmeticError(f"only {share:.4f} of the queries choose the same tokens: not timed")
    return share


def measure(row, device):
    from benchmarks import kernels  # which needs Triton

    shape, size = SHAPES[row["shape"]], (row["queries"], row["keys"])
    first = drawn(shape, *size, device, 0)
    row["same"] = agree(*first)
    count = min(SETS, kernels.copies(first[1].nbytes))
    sets = [first, *(drawn(shape, *size, device, seed) for seed in range(1, count))]
    for best in (kernel, at_once, in_blocks):
        row[f"{best.__name__}_us"] = kernels.timed([partial(chosen, best, *given) for given in sets])
    row["of_at_once"], row["of_in_blocks"] = (row["kernel_us"] / row[f"{name}_us"] for name in ("at_once", "in_blocks"))


def rows(contexts, stretch, device):
    for shape in SHAPES:
        for keys in contexts:
            for queries in (1, stretch):
                row = {"shape": shape, "keys": keys, "queries": queries}
                yield whatever(row, lambda row=row: measure(row, device), device)


def show(found):
    columns = [
        "heads",
        "keys",
        "queries",
        "kernel, µs",
        "at once, µs",
        "kernel of it",
        "blocks, µs",
        "kernel of it",
        "",
    ]
    forms = dict(kernel_us=".1f", at_once_us=".1f", of_at_once=".3f", in_blocks_us=".1f", of_in_blocks=".3f")
    table = []
    for row in found:
        figures = [format(row[name], form) if name in row else "" for name, form in forms.items()]
        table.append([row["shape"], f"{row['keys']:,}", str(row["queries"]), *figures, row.get("failed", "")])
    show_table("longcache's choice of tokens, float16", columns, table)
