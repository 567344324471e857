"""Attend over sinks, pages, open segment and window on a GPU: the twin of reference.py, in Triton.

Nothing is rebuilt. States meet q before the softmax and p after it; scales of K go into q, scales of V into p, codes go
to the tensor cores as they lie in memory, tokens (of K) or channels (of V) as rows, the few queries as columns. A
program is one warp with one row of the batch, one KV head and some pages, or a stretch of the dense tokens:

    codes       `_score_kernel`  probabilities of a page relative to its own maximum    triton_score.py
                `_mix_kernel`    these times V                                          triton_mix.py
    none        `_attend_kernel` both in one, online                                    triton_attend.py
    then        `_merge_kernel`  where there are many splits, `_combine_kernel`: adds   triton_combine.py
                                 up, undoes V's rotation once

This file launches them; triton_parts.py and triton_products.py hold what they share. docs/kernels.md has the figures;
tables.py says what a head stores.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from longwave.ops.spectral.tables import Tables, fits, tables_of
from longwave.ops.spectral.triton_attend import _attend_kernel
from longwave.ops.spectral.triton_combine import _combine_kernel, _merge_kernel
from longwave.ops.spectral.triton_mix import _mix_kernel
from longwave.ops.spectral.triton_products import INTERPRETED
from longwave.ops.spectral.triton_score import _score_kernel

__all__ = ["ROWS", "attend", "fits", "tables_of"]

ROWS = 64  # query rows (group x queries) up to which this is used: beyond, products dominate and the reference does
_OWN = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = {kind: tl.float32 if INTERPRETED.value else own for kind, own in _OWN.items()}
BLOCK = 128  # tokens of a step where there are no codes
MIX_STEP = 32  # tokens of a step of V's codes
STRETCH, DENSE_STEP = 64, 16  # dense tokens of a program, and of a step
MERGE = 16  # splits made one, or more of very many
LEAST = 4  # pages of a program where there are no codes, and pages for two such programs a processor
REGISTERS = 128  # of a thread where there are codes
STAGES = (3, 2)  # pages under way where there are no codes: while all programs fit at once, and else


def _resources(
    rows: int, dim: int, segment: int, coded: bool, stages: int, traits: dict[str, int | bool]
) -> tuple[dict, int, int]:
    """Options of a launch, pages under way where there are no codes, and programs a multiprocessor runs at once.

    One warp waits for nobody; more where its registers would not do. Half of them let twice as many warps wait.
    """
    wide = max(traits["K_WIDE"], traits["V_WIDE"])
    warps = 4 if rows > 32 or wide > 32 or dim > 128 else 2 if rows > 16 or segment > 128 else 1
    options = dict(num_warps=warps, num_stages=1)
    if coded and warps == 1 and rows <= 8:
        return options | dict(maxnreg=REGISTERS), 1, 65536 // (32 * REGISTERS)
    page = 2 * segment * (traits["K_WIDE"] + traits["V_WIDE"])
    most = max(4, triton.next_power_of_2(max(traits["K_MOST"], traits["V_MOST"])))
    stages = stages if page <= 1 << 14 else 2 if page <= 1 << 15 else 1
    held = page * (stages - 1) + 16 * segment * most + 4096  # shared memory
    return options, stages, max(1, min(8 // warps, (227 << 10) // held))


@lru_cache(1024)  # asked by every layer of every step, and answered anew once in a segment
def _shares(costs: tuple[int, ...], n: int, most: float, least: int) -> tuple[float, int, tuple[int, ...]]:
    """How the programs of a row, about `most`, are shared among its heads, by what a page of each costs.

    n: pages of the row; a program has `least` or more. Programs a cost, the most that a head may have, and how many
    each has. Once around: a few programs left over for a second time would take as long as all the others.
    """
    share, cap = np.float32(most / sum(costs)), -(-n // least)
    # to the last bit as `_programs` has it
    own = tuple(min(max(int(np.float32(cost) * share), 1), cap) for cost in costs)
    if len(set(own)) == 1 and n:  # kernels are told so: no more programs than the longest of them needs
        own = (-(-n // -(-n // own[0])),) * len(own)
    return float(share), cap, own


def attend(
    tables: Tables,
    pages: torch.Tensor,
    counts: torch.Tensor,
    basis: torch.Tensor,
    q: torch.Tensor,
    scaling: float,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Attention of q over pages and dense tokens: [B, Hq, Q, D] in q's dtype.

    pages uint8 [B, N, page bytes], row b fills its first counts[b] (int32 [B]). basis float32 [S, T].
    q [B, Hq, Q, D] with Hq / H * Q at most `ROWS`. k, v [B, H, L, D]: the dense tokens, of which query i of row b sees
    the first seen[b, i] (int32 [B, Q]). scaling multiplies the scores. A query that sees nothing gets zeros.
    """
    layout, traits = tables.layout, tables.traits
    coded = bool(traits["CODED"])
    batch, heads, queries, dim = q.shape
    if {q.dtype, k.dtype, v.dtype} != {layout.dtype}:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; the pages were made of {layout.dtype}")
    group = heads // layout.heads
    rows = max(4, triton.next_power_of_2(group * queries))
    if rows > ROWS:
        raise ValueError(f"{group * queries} query rows a KV head; this kernel takes {ROWS}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    n, pairs, segment = pages.shape[1], batch * layout.heads, layout.segment
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    for stages in STAGES:
        resources, stages, slots = _resources(rows, dim, segment, coded, stages, traits)
        if coded or pairs * -(-n // LEAST) <= slots * processors:
            break
    least = LEAST if not coded and pairs * n >= 2 * LEAST * processors else 1
    dense_splits = -(-k.shape[2] // STRETCH)
    most = slots * processors / batch  # programs of a row
    beside = most * n / max(1, n + dense_splits / 2)  # where dense tokens take their part: two stretches are a page
    score, mix = (_shares(costs, n, room, least) for costs, room in zip(tables.costs, (beside, most), strict=True))
    if not coded:
        mix = score
    equal = [len(set(own)) == 1 for *_, own in (score, mix)]
    score_share, mix_share = ((share, cap, sum(own)) for share, cap, own in (score, mix))
    splits, jobs = max(mix[-1]), mix_share[-1]
    k_most, v_most, wide = traits["K_MOST"], traits["V_MOST"], traits["V_WIDE"]
    step = min(segment, BLOCK)  # tokens of a step where there are no codes
    sets = max(1, dim * traits["V_CODES"] + wide + dim * (v_most > 0))

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(pairs, *shape, dtype=dtype, device=q.device)

    dense_part, dense_stat = scratch(dense_splits, rows, dim), scratch(dense_splits, 2, rows)
    near = scratch(n, k_most, rows)
    out = torch.empty(batch, heads, queries, dim, dtype=q.dtype, device=q.device)
    shape = dict(H=layout.heads, G=group, D=dim, BR=rows)
    # Hopper and later: a launch begins while the one before ends
    early = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (9, 0)
    follows = dict(EARLY=early, EQUAL=equal[1]) | (dict(launch_pdl=True) if early else {})
    kinds = dict(OWN=_OWN[q.dtype], DOT=_DOT[q.dtype], **resources)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    dense = dict(BD=DENSE_STEP, STRETCH=STRETCH)
    bytes_of = (layout.page_bytes, pages.stride(0))
    scale = scaling * 1.4426950408889634

    def traited(*names: str) -> dict[str, int | bool]:
        return {name: traits[name] for name in names}

    part = torch.empty(batch, jobs, rows, sets, dtype=torch.float32, device=q.device)
    stat = torch.empty(batch, jobs, 2, rows, dtype=torch.float32, device=q.device)
    if coded:
        far, tops = scratch(n, v_most, rows), scratch(n, 2, rows)
        mass = scratch(n * bool(traits["V_CODES"] or wide), segment, rows, dtype=torch.float16)
        ordered = torch.empty(batch, score_share[-1] * traits["K_CODES"], dim, rows, device=q.device)
        _score_kernel[(batch, dense_splits * layout.heads + score_share[-1])](
            q, pages, counts, basis, tables.iota, tables.keys, tables.values, tables.cost_k, tables.order_k, k, v, seen,
            near, ordered, far, mass, tops, dense_part, dense_stat,
            queries, scale, *bytes_of, n, k.shape[2], *score_share, dense_splits,
            tables.keys.shape[1], *strides, EARLY=early, EQUAL=equal[0], T=segment, **shape, **dense, **kinds,
            **traited("K_WIDE", "ALIGN", "K_CODES", "K_MOST", "V_MOST", "K_EIGHT", "EVEN", "RAISED"),
        )  # fmt: skip
        if n:
            _mix_kernel[(batch, jobs)](
                pages, counts, tables.iota, tables.values, tables.cost_v, far, mass, tops, part, stat,
                queries, *bytes_of, n, *mix_share,
                T=segment, BT=min(MIX_STEP, segment), SETS=sets, **shape, **kinds, **follows,
                **traited("V_WIDE", "ALIGN", "GROUPS", "V_CODES", "V_MOST", "V_EIGHT", "EVEN"),
            )  # fmt: skip
    else:
        parts = segment // step
        far, tops = scratch(n, parts, v_most, rows), scratch(n, parts, rows)
        _attend_kernel[(batch, dense_splits * layout.heads + jobs)](
            q, pages, counts, basis, tables.keys, tables.values, tables.cost_v, tables.order_k, k, v, seen,
            near, far, tops, part, stat, dense_part, dense_stat,
            queries, scale, *bytes_of, n, k.shape[2], *mix_share, dense_splits, tables.keys.shape[1], *strides,
            EARLY=early, EQUAL=equal[1], T=segment, BT=step, SETS=sets, STAGES=stages, **shape, **dense, **kinds,
            **traited("K_WIDE", "V_WIDE", "ALIGN", "K_MOST", "V_MOST", "K_EIGHT", "V_EIGHT", "EVEN", "RAISED"),
        )  # fmt: skip
    groups = 0
    if splits > 2 * MERGE:
        merge = max(MERGE, triton.next_power_of_2(-(-splits // 16)))  # combined are 16 at once
        groups = -(-splits // merge)
        many = (part, stat)
        part, stat = scratch(groups, rows, sets), scratch(groups, 2, rows)
        _merge_kernel[(pairs, group * queries, groups)](
            *many, part, stat, tables.cost_v, *mix_share, groups, H=layout.heads,
            BR=rows, SETS=sets, COLUMNS=triton.next_power_of_2(sets), BS=merge, num_warps=4, **follows,
        )  # fmt: skip
    _combine_kernel[(pairs, group * queries)](
        part, stat, dense_part, dense_stat, out, tables.values, tables.order_v, tables.cost_v, queries,
        *mix_share, groups, dense_splits, SETS=sets, BS=16, V_WIDE=wide, V_CODES=traits["V_CODES"], V_MOST=v_most,
        ROOT=dim**-0.5, BITS_OF_D=dim.bit_length() - 1, MERGED=groups > 0, **shape, num_warps=8, **follows,
    )  # fmt: skip
    return out
