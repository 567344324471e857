"""What decoding on coefficients is measured against: rebuilding K and V in a kernel, and FFTs without a fused kernel.

Both hold a layer as FourierAttention (arXiv 2506.11886) does: 32 of 128 channels of K and of V are kept as 16-bit
values, the rest as coefficients along time, and the ends of the context are dense. Two structures:
    "period"    4 + 1020 dense tokens, all between them one period of a real DFT with 1024 states (the paper's preset)
    "segments"  4 states of a DCT for each 128 tokens (layout "a" of benchmarks/kernels.py), 260 to 387 dense tokens
The rate of the period depends on the context (1/31 at 32k), that of the segments is 1/32.

Coefficients are random normal, as those of white noise in an orthonormal basis are. The paper's mean and gain of a
channel are linear in its coefficients, so they would be folded into these and cost nothing here; the same 32 channels
are kept in every head, which spares the rivals a gather. All of this is in their favour.
"""

import math

import torch
import triton
import triton.language as tl

from longwave.ops.spectral.basis import smooth_ge, table

HEADS, GROUP, DIM, KEPT, DTYPE = 8, 4, 128, 32, torch.bfloat16
REST = DIM - KEPT
SINKS, WINDOW, STATES = 4, 1020, 1024
SEGMENT, SEGMENT_STATES = 128, 4
ROWS = 16  # the group's queries, padded to what a tensor core takes
DENSE = 128  # dense tokens of a program
LOG2E = 1 / math.log(2)
# positions and states of a step, warps, stages: benchmarks/kernels.py takes the fastest
LAUNCHES = {
    "period": ((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3)),
    "segments": ((128, 16, 8, 2), (64, 16, 4, 2)),
}
# the interpreter multiplies the bits of bfloat16, not the numbers
DOT = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16


# lengths differ in every case: one compilation serves all
@triton.jit(do_not_specialize=["middle", "period", "dense_tokens", "per_split", "middle_splits", "splits"])
def _rebuild_kernel(
    q_ptr, kept_k_ptr, kept_v_ptr, coef_ptr, table_ptr, dense_k_ptr, dense_v_ptr, part_ptr, stat_ptr,
    scale, middle, period, states, dense_tokens, per_split, middle_splits, splits,
    G: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, DENSE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head, its group's queries together.

    Columns of coef: 96 of K, then 96 of V, made as three tiles of 64; the middle one has some of both, where zeros of
    q take care of V's and K's are not stored. part float32 [B * H, splits, BR, 128], stat float32 [.., 2, BR].
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, n, j, d = tl.arange(0, BR), tl.arange(0, 32), tl.arange(0, 64), tl.arange(0, 128)
    live = (r < G)[:, None]
    q_row = q_ptr + (pair * G + r[:, None]) * 128
    part = part_ptr + ((pair * splits + split) * BR + r[:, None]) * 128
    top = tl.full([BR], float("-inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    if split >= middle_splits:
        q = tl.load(q_row + d[None, :], mask=live, other=0.0).to(DOT)
        out = tl.zeros([BR, 128], tl.float32)
        first = (split - middle_splits) * DENSE
        for start in range(first, min(first + DENSE, dense_tokens), BD):
            i = start + tl.arange(0, BD)
            ok = (i < dense_tokens)[:, None]
            at = (pair * dense_tokens + i[:, None]) * 128 + d[None, :]
            k = tl.load(dense_k_ptr + at, mask=ok, other=0.0).to(DOT)
            s = tl.where((i < dense_tokens)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            p, old = tl.exp2(s - new[:, None]), tl.exp2(top - new)
            v = tl.load(dense_v_ptr + at, mask=ok, other=0.0).to(DOT)
            out = tl.dot(p.to(DOT), v, out * old[:, None])
            total = total * old + tl.sum(p, 1)
            top = new
        tl.store(part + d[None, :], out)
    else:
        q_kept = tl.load(q_row + n[None, :], mask=live, other=0.0).to(DOT)
        q_low = tl.load(q_row + 32 + j[None, :], mask=live, other=0.0).to(DOT)
        q_high = tl.load(q_row + 96 + j[None, :], mask=live & (j < 32)[None, :], other=0.0).to(DOT)
        out_kept = tl.zeros([BR, 32], tl.float32)
        out_low, out_high = tl.zeros([BR, 64], tl.float32), tl.zeros([BR, 64], tl.float32)
        first = split * per_split
        for start in range(first, min(first + per_split, middle), BL):
            i = start + tl.arange(0, BL)
            held = i < middle
            at = (pair * middle + i[:, None]) * 32 + n[None, :]
            kept_k = tl.load(kept_k_ptr + at, mask=held[:, None], other=0.0).to(DOT)
            kept_v = tl.load(kept_v_ptr + at, mask=held[:, None], other=0.0).to(DOT)
            # the rebuilding: [positions, states] times [states, channels], once for K and V
            count = (middle + period - 1) // period
            coef = coef_ptr + (pair * count + start // period) * states * 192
            row = table_ptr + (i % period)[:, None].to(tl.int64) * states
            x0, x1 = tl.zeros([BL, 64], tl.float32), tl.zeros([BL, 64], tl.float32)
            x2 = tl.zeros([BL, 64], tl.float32)
            for begin in range(0, states, BS):
                m = begin + tl.arange(0, BS)
                ok = m < states
                e = tl.load(row + m[None, :], mask=held[:, None] & ok[None, :], other=0.0).to(DOT)
                c = coef + m[:, None] * 192 + j[None, :]
                x0 = tl.dot(e, tl.load(c, mask=ok[:, None], other=0.0).to(DOT), x0)
                x1 = tl.dot(e, tl.load(c + 64, mask=ok[:, None], other=0.0).to(DOT), x1)
                x2 = tl.dot(e, tl.load(c + 128, mask=ok[:, None], other=0.0).to(DOT), x2)
            mixed = x1.to(DOT)
            s = tl.dot(q_kept, tl.trans(kept_k))
            s = tl.dot(q_low, tl.trans(x0.to(DOT)), s)
            s = tl.dot(q_high, tl.trans(mixed), s)
            s = tl.where(held[None, :], s * scale, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            p, old = tl.exp2(s - new[:, None]), tl.exp2(top - new)
            total = total * old + tl.sum(p, 1)
            top = new
            p = p.to(DOT)
            out_kept = tl.dot(p, kept_v, out_kept * old[:, None])
            out_low = tl.dot(p, mixed, out_low * old[:, None])
            out_high = tl.dot(p, x2.to(DOT), out_high * old[:, None])
        tl.store(part + n[None, :], out_kept)
        tl.store(part + j[None, :], out_low, mask=(r >= 0)[:, None] & (j >= 32)[None, :])
        tl.store(part + 64 + j[None, :], out_high)
    stat = stat_ptr + (pair * splits + split) * 2 * BR + r
    tl.store(stat, top)
    tl.store(stat + BR, total)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    part_ptr, stat_ptr, out_ptr, splits, G: tl.constexpr, BR: tl.constexpr, D: tl.constexpr, BK: tl.constexpr
):
    """Splits weighed and added, one query head a program."""
    pair, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, d = tl.arange(0, BK), tl.arange(0, D)
    ok = i < splits
    stat = stat_ptr + (pair * splits + i) * 2 * BR + r
    top = tl.load(stat, mask=ok, other=float("-inf"))
    w = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(w * tl.load(stat + BR, mask=ok, other=0.0), 0)
    part = tl.load(part_ptr + ((pair * splits + i) * BR + r)[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
    tl.store(out_ptr + (pair * G + r) * D + d, tl.sum(w[:, None] * part, 0) / total)


def period_table(states: int, period: int, length: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """[length, states]: of frequency 0, 1, ... the cosine and the sine along a period, orthonormal. Made by blocks:
    a whole table in float64 would be gigabytes."""
    made = torch.empty(length, states, dtype=dtype, device=device)
    n = torch.arange(states // 2, device=device)
    for start in range(0, length, 4096):
        t = torch.arange(start, min(start + 4096, length), device=device)
        phase = (t[:, None] * n % period).double() * (2 * math.pi / period)
        rows = torch.stack([phase.cos(), phase.sin()], -1) * math.sqrt(2 / period)
        rows[:, 0] /= math.sqrt(2)
        made[start : start + 4096] = rows.flatten(1).to(dtype)
    return made


class Layer:
    """What a step of one layer reads: q [B, Hq, 1, D], dense k, v [B, H, L, D], kept_k, kept_v [B, H, M, 32] and coef
    [B, H, periods, S, 96 of K and 96 of V]."""

    def __init__(self, structure: str, batch: int, context: int, seed: int = 0, device: str = "cuda"):
        g = torch.Generator(device).manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, device=device).to(DTYPE)

        self.structure, self.device = structure, device
        if structure == "period":
            self.middle = context - SINKS - WINDOW
            self.period, self.states = smooth_ge(self.middle), STATES
        else:
            self.middle = (context - 260) // SEGMENT * SEGMENT
            self.period, self.states = SEGMENT, SEGMENT_STATES
        if self.middle < 1:
            raise ValueError(f"no middle is left of {context} tokens")
        periods = -(-self.middle // self.period)
        self.q = noise(batch, HEADS * GROUP, 1, DIM)
        self.k, self.v = noise(2, batch, HEADS, context - self.middle, DIM)
        self.kept_k, self.kept_v = noise(2, batch, HEADS, self.middle, KEPT)
        self.coef = noise(batch, HEADS, periods, self.states, 2 * REST)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.k, self.v, self.kept_k, self.kept_v, self.coef))

    def basis(self, dtype: torch.dtype) -> torch.Tensor:
        """[tokens of a period, S]."""
        if self.structure == "segments":
            return table("dct", self.states, self.period, dtype, self.device).mT.contiguous()
        return period_table(self.states, self.period, self.middle, dtype, self.device)

    def expected(self) -> torch.Tensor:
        """Attention in float32 over K and V that are made again in float32."""
        made = (self.basis(torch.float32) @ self.coef.float()).flatten(2, 3)
        k = torch.cat([self.k.float(), torch.cat([self.kept_k.float(), made[..., :REST]], -1)], 2)
        v = torch.cat([self.v.float(), torch.cat([self.kept_v.float(), made[..., REST:]], -1)], 2)
        q = self.q.float().reshape(len(self.q), HEADS, GROUP, DIM) * DIM**-0.5
        return (torch.softmax(q @ k.mT, -1) @ v).reshape(self.q.shape)


class Rebuild(Layer):
    """The paper's way to decode, own implementation: every step makes all compressed channels of K and V again, for
    every position, inside the attention kernel, basis table times states on tensor cores, beside the kept channels;
    then it attends as flash-decoding does.

    Kinder to the approach than the published kernel: one KV head's query heads share the rebuilding, K and V share the
    reading of the table, which is bfloat16 and made beforehand (no sines in the kernel; all layers would share it, so
    it is not counted in `nbytes`), and products run on 16-bit tensor cores. What is left is the approach's own cost:
    2 x 192 x S multiplications and additions for every token, head and step.
    """

    def __init__(
        self, structure: str, batch: int, context: int, seed: int = 0, device: str = "cuda", basis=None, launch=None
    ):
        """basis: a table to share between copies. launch: one of LAUNCHES."""
        super().__init__(structure, batch, context, seed, device)
        self.table = self.basis(DTYPE) if basis is None else basis
        self.launch = LAUNCHES[structure][0] if launch is None else launch

    def attend(self) -> torch.Tensor:
        block, states, warps, stages = self.launch
        batch, dense = len(self.q), self.k.shape[2]
        pairs = batch * HEADS
        processors = torch.cuda.get_device_properties(self.q.device).multi_processor_count if self.q.is_cuda else 1
        blocks = -(-self.middle // block)
        per_split = -(-blocks // max(1, 2 * processors // pairs)) * block
        middle_splits = -(-self.middle // per_split)
        splits = middle_splits + -(-dense // DENSE)
        part = torch.empty(pairs, splits, ROWS, DIM, dtype=torch.float32, device=self.q.device)
        stat = torch.empty(pairs, splits, 2, ROWS, dtype=torch.float32, device=self.q.device)
        out = torch.empty_like(self.q)
        _rebuild_kernel[(pairs, splits)](
            self.q, self.kept_k, self.kept_v, self.coef, self.table, self.k, self.v, part, stat,
            DIM**-0.5 * LOG2E, self.middle, self.period, self.states, dense, per_split, middle_splits, splits,
            G=GROUP, BR=ROWS, BL=block, BS=states, BD=64, DENSE=DENSE, DOT=DOT, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _combine_kernel[(pairs, GROUP)](
            part, stat, out, splits, G=GROUP, BR=ROWS, D=DIM, BK=max(16, triton.next_power_of_2(splits))
        )
        return out


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of 16-bit matrices [B, H, .., ..] in float32: scores rounded to 16 bits would fail the gate."""
    if not a.is_cuda:
        return a.float() @ b.float()
    made = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return made.unflatten(0, a.shape[:2])


class FFT(Layer):
    """Re-associated but not fused: K and V are not made again; the scores of compressed channels are one inverse FFT of
    (coefficients times q) for each query head, and V's share is an FFT of the probabilities times coefficients.

    Plain torch; on a GPU the transforms are cuFFT's, in float32, of a length without large prime factors. Coefficients
    are stored as the transforms want them, weights folded in: [B, H, S, 96] each, real and imaginary part in turn.
    """

    def __init__(self, batch: int, context: int, seed: int = 0, device: str = "cuda"):
        super().__init__("period", batch, context, seed, device)
        coef = self.coef[:, :, 0].float()
        weights = torch.full((self.states, 1), math.sqrt(0.5), device=device)  # a real signal's half of the spectrum
        weights[0] = 1
        weights[1::2] *= -1  # exp(-i w t)
        self.spectrum_k = (coef[..., :REST] * weights).to(DTYPE)
        self.spectrum_v = (coef[..., REST:] / weights).to(DTYPE)
        # the rounded ones are what `expected` is about
        sides = self.spectrum_k.float() / weights, self.spectrum_v.float() * weights
        self.coef = torch.cat(sides, -1)[:, :, None]

    @property
    def nbytes(self) -> int:
        held = (self.k, self.v, self.kept_k, self.kept_v, self.spectrum_k, self.spectrum_v)
        return sum(x.nbytes for x in held)

    def attend(self) -> torch.Tensor:
        batch, middle = len(self.q), self.middle
        q = self.q.reshape(batch, HEADS, GROUP, DIM)
        bins = product(q[..., KEPT:], self.spectrum_k.mT).unflatten(-1, (-1, 2))
        smooth = torch.fft.irfft(torch.view_as_complex(bins), n=self.period, norm="ortho")[..., :middle]
        scores = torch.cat([smooth + product(q[..., :KEPT], self.kept_k.mT), product(q, self.k.mT)], -1)
        p = torch.softmax(scores * DIM**-0.5, -1)  # q itself would be rounded once more
        bins = torch.view_as_real(torch.fft.rfft(p[..., :middle], n=self.period, norm="ortho")[..., : STATES // 2])
        rest = product(bins.flatten(-2).to(DTYPE), self.spectrum_v)
        p = p.to(DTYPE)
        out = torch.cat([product(p[..., :middle], self.kept_v), rest], -1) + product(p[..., middle:], self.v)
        return out.to(DTYPE).reshape(self.q.shape)
