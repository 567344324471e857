"""Trials of ways to store the middle of a context: what docs/research.md's tables are made of.

    python -m benchmarks.trials [--device cuda] [--out FILE.json] [--only PATTERN] [--quick]

A codec is simulated on dense values, in every layer at once, for K, for V or for both; what it does not touch is exact.
The KL from the exact run is taken over prose and over the answers of recall prompts. Weights and rotations are measured
on other windows than those scored. Bits are per number, scales, zeros and states at 16 bits each included; rotations
and channel orders are not counted, since a model has them once.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

import longwave
from longwave.evals.fork import prefill
from longwave.frame import MemoryLayer, Needs, assemble, cache_argument
from longwave.ops.attention.reference import group_heads
from longwave.ops.codes import quantize, rotation
from longwave.ops.spectral.basis import table
from longwave.plan.automatic import own_texts
from longwave.plan.recall import windows

SINKS, WINDOW, SEGMENT, CONTEXT, SCORED = 4, 256, 128, 2820, 256
MIDDLE = slice(SINKS, CONTEXT - WINDOW)
# mean squared error of codes in variances of what they code (normal values, the span of least error)
NOISE = {0: 1.0, 1: 0.363, 2: 0.1188, 3: 0.0374, 4: 0.0115, 5: 0.0035, 6: 0.00104}


class Watched(MemoryLayer):
    """A dense layer that remembers the second moment of the queries it answered: [H, D, D]."""

    def attend(self, p):
        grouped = group_heads(p.q, self.dense.view()[0].shape[1])
        self.moment = torch.einsum("bhqd,bhqe->hde", grouped, grouped) / (grouped.shape[0] * grouped.shape[2])
        return super().attend(p)


class Bench:
    """Windows read once, exactly, to be scored again with other K and V."""

    def __init__(self, model, tokenizer, prose, recall, seed):
        self.model, self.windows = model, windows(tokenizer, own_texts(), CONTEXT, SCORED, prose, recall, seed)
        self.ids = self.windows.ids.to(model.device)
        self.weight = self.windows.weight.to(model.device)
        self.kv = [layer.materialize() for layer in prefill(model, self.ids[:, :CONTEXT]).memory_layers()]
        self.exact, memory = self.read(self.kv)
        self.moments = torch.stack([layer.moment for layer in memory.memory_layers()])  # [L, H, D, D]

    @torch.no_grad()
    def read(self, kv):
        memory = assemble(self.model, Watched, Needs(), "dense")
        for layer, (k, v) in zip(memory.memory_layers(), kv, strict=True):
            layer.write(k, v)
            layer.settle()
        logits = self.model(self.ids[:, CONTEXT:-1], **cache_argument(self.model, memory), use_cache=True).logits
        return logits.float().log_softmax(-1), memory

    def score(self, key, value):
        """KL and loss over dense on prose, KL on answers, share of prose tokens with the same first choice."""
        made = []
        for layer, pair in enumerate(self.kv):
            pair = [x.clone() for x in pair]
            for x, codec in zip(pair, (key, value), strict=True):
                if codec is not None:
                    x[:, :, MIDDLE] = codec.run(x[:, :, MIDDLE], layer)
            made.append(pair)
        rows = zip(self.read(made)[0], self.exact, self.ids[:, CONTEXT + 1 :], self.weight, strict=True)
        found = []
        for now, exact, target, weight in rows:
            worse = (exact - now).gather(-1, target[:, None])[:, 0]
            same = (exact.argmax(-1) == now.argmax(-1)).float()
            each = torch.stack([(exact.exp() * (exact - now)).sum(-1), worse, same])
            found.append((each * weight).sum(-1))
        found, recall = torch.stack(found).cpu(), self.windows.recall
        kl, loss, same = found[~recall].mean(0).tolist()
        return {"kl": kl, "loss": loss, "recall": float(found[recall, 0].mean()), "top1": same}


@dataclass(frozen=True)
class Codec:
    """bits a number; run(x [B, H, M, D], layer) -> what the codes of x stand for."""

    bits: float
    run: Callable[[torch.Tensor, int], torch.Tensor]


def rounded(x, bits, zero=True, fit=True):
    """Groups x [..., n] after quantisation."""
    codes, scale, start = quantize(x, bits, zero, fit and bits in (1, 2, 3, 4, 8))
    scale = scale.to(x.dtype)
    return codes * scale + (start.to(x.dtype) if zero else -scale * (2**bits - 1) / 2)


def smooth(x, states, segment=SEGMENT):
    """What `states` DCT coefficients of each channel and segment stand for."""
    basis = table("dct", states, segment, x.dtype, x.device)
    coef = (basis @ x.unflatten(2, (-1, segment))).half().to(x.dtype)
    return (basis.mT @ coef).flatten(2, 3)


def along(x, bits, segment=SEGMENT, fit=True):
    return rounded(x.unflatten(2, (-1, segment)).mT, bits, fit=fit).mT.flatten(2, 3)


def by_time(bits, segment=SEGMENT, fit=True):
    """A scale and a zero for every channel of a segment."""
    return Codec(bits + 32 / segment, lambda x, layer: along(x, bits, segment, fit))


def by_token(bits, group=64, zero=True, fit=True):
    """A scale, and a zero, for `group` channels of a token."""

    def run(x, layer):
        return rounded(x.unflatten(-1, (-1, group)), bits, zero, fit).flatten(-2)

    return Codec(bits + (32 if zero else 16) / group, run)


def states(count, segment=SEGMENT):
    return Codec(16 * count / segment, lambda x, layer: smooth(x, count, segment))


def after(codec, count=1, segment=SEGMENT):
    """States for every channel, and what they leave in the codec."""

    def run(x, layer):
        base = smooth(x, count, segment)
        return base + codec.run(x - base, layer)

    return Codec(codec.bits + 16 * count / segment, run)


def turned(codec, into, back=None):
    """The codec in another basis of the channels: into [D, D], or [L, H, D, D]."""
    back = into.mT if back is None else back

    def pick(matrix, layer):
        return matrix if matrix.ndim == 2 else matrix[layer]

    return Codec(codec.bits, lambda x, layer: codec.run(x @ pick(into, layer), layer) @ pick(back, layer))


def stretched(codec, by):
    """Channels multiplied by `by` [L, H, D] before coding: more precision where it is large."""
    return Codec(codec.bits, lambda x, layer: codec.run(x * by[layer][:, None], layer) / by[layer][:, None])


def exact_tokens(codec, share, worth):
    """The share of tokens with the largest `worth(x, coded)` [B, H, M] kept exactly."""

    def run(x, layer):
        made = codec.run(x, layer)
        best = (
            worth(x, made)
            .topk(max(1, int(share * x.shape[2])), -1)
            .indices[..., None]
            .expand(*x.shape[:2], -1, x.shape[3])
        )
        return made.scatter(2, best, x.gather(2, best))

    return Codec(codec.bits + 16 * share, run)


def channels(bits, allot, count=1, segment=SEGMENT):
    """Every channel in its own bits, `allot(layer)` [H, D]; those with 0 bits as `count` states."""

    def run(x, layer):
        out, own = smooth(x, count, segment), allot(layer)
        for b in own.unique().tolist():
            if b:
                out = torch.where((own == b)[:, None], along(x, b, segment), out)
        return out

    return Codec(bits, run)


def shared_out(weight, parts):
    """Channels of falling weight [L, H, D] in parts (share, bits)."""
    cost = sum(share * (b + (32 if b else 16) / SEGMENT) for share, b in parts)

    def allot(layer):
        rank, own, start = weight[layer].argsort(-1, descending=True).argsort(-1), torch.zeros_like(weight[layer]), 0
        for share, b in parts:
            end = start + round(share * rank.shape[-1])
            own[(rank >= start) & (rank < end)] = b
            start = end
        return own.int()

    return channels(cost, allot)


def filled(weight, target, classes=(1, 2, 3, 4), count=1, segment=SEGMENT):
    """Bits where the weighted error falls most for a bit, at most `target` on average in a head: reverse water-filling.

    One price of a bit a head, found by halving: each channel takes what makes its error and the price least.
    """
    bits = torch.tensor((0, *classes), device=weight.device)
    noise = torch.tensor([NOISE[b] for b in (0, *classes)], device=weight.device)
    cost = torch.where(bits > 0, bits + 32 / segment, 16 * count / segment)

    def allot(layer):
        error = weight[layer][..., None] * noise  # [H, D, choices]
        low, high = (error.new_full((len(error), 1, 1), x) for x in (-60.0, 60.0))
        for _ in range(50):
            price = (low + high) / 2
            own = (error + price.exp() * cost).argmin(-1)
            over = cost[own].mean(-1)[:, None, None] > target + 1e-6
            low, high = torch.where(over, price, low), torch.where(over, high, price)
        return bits[(error + high.exp() * cost).argmin(-1)]

    return channels(target, allot, count, segment)


class Weights:
    """What other windows say about channels: [L, H, D] each; bases are [L, H, D, D], columns of falling variance."""

    def __init__(self, bench):
        k, v = ([pair[side][:, :, MIDDLE] for pair in bench.kv] for side in (0, 1))
        covered = [torch.stack([self.covariance(x) for x in side]) for side in (k, v)]
        self.k, self.v = (c.diagonal(dim1=-2, dim2=-1) for c in covered)
        self.k_basis, self.v_basis = (torch.linalg.eigh(c)[1].flip(-1) for c in covered)
        self.k_turned, self.v_turned = (torch.linalg.eigh(c)[0].flip(-1) for c in covered)
        self.q = bench.moments.diagonal(dim1=-2, dim2=-1)
        self.q_pair = (self.q + self.q.roll(self.q.shape[-1] // 2, -1)) / 2  # the two channels of a rotary pair
        heads, dim = self.k.shape[1:]
        outs = [layer.self_attn.o_proj.weight for layer in bench.model.get_decoder().layers]
        self.out = torch.stack([w.detach().square().sum(0).view(heads, -1, dim).mean(1) for w in outs])
        # K after the square root of the queries' moment: its rounding error is then the scores' error
        eye = torch.eye(dim, device=self.q.device) * 1e-4
        size, axes = torch.linalg.eigh(bench.moments + eye * self.q.mean(-1)[..., None, None])
        root, inverse = ((axes * power[..., None, :]) @ axes.mT for power in (size.sqrt(), size.rsqrt()))
        spread, basis = torch.linalg.eigh(root @ covered[0] @ root)
        self.white, self.white_into = spread.flip(-1).clamp(min=1e-12), root @ basis.flip(-1)
        self.white_back = basis.flip(-1).mT @ inverse

    @staticmethod
    def covariance(x):
        """[H, D, D] around the means of segments."""
        x = (x - smooth(x, 1)).transpose(0, 1).flatten(1, 2)
        return x.mT @ x / x.shape[1]


PARTS = (
    "1/2x3 1/2x1, 1/4x4 1/2x2 1/4x0, 1/4x3 1/2x2 1/4x1, 2/3x3 1/3x0, 1/2x4 1/2x0, "
    "1/2x2 1/2x0, 1/4x2 1/2x1 1/4x0, 1/3x3 2/3x0, 1/4x3 1/4x1 1/2x0, 1/4x4 3/4x0"
)  # shares of the channels, by falling weight, x bits


WORTH = {  # of keeping a token exactly
    "worst": lambda x, coded: (coded - x).square().sum(-1),
    "smallest": lambda x, coded: -x.square().sum(-1),
    "largest": lambda x, coded: x.square().sum(-1),
}


def trials(w):
    """name -> (K's codec or None, V's codec or None)."""
    dim, device = w.k.shape[-1], w.k.device
    hadamard, cosine = rotation(dim).float().to(device), table("dct", dim, dim).mT.to(device)
    coin = torch.rand(dim, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    signs = torch.where(coin, -1.0, 1.0).to(device)

    def scaled(b):
        return turned(by_token(b, zero=False), hadamard)

    made = {f"KV {b} whole range": (by_time(b, 64, False), by_token(b, fit=False)) for b in (4, 3, 2)}
    made |= {f"KV {b} least error": (by_time(b, 64), by_token(b)) for b in (4, 3, 2, 1)}
    sides = (
        ("K", w.k, w.k_turned, w.k_basis, {"var x q": w.k * w.q}),
        ("V", w.v, w.v_turned, w.v_basis, {"var x out": w.v * w.out}),
    )
    for side, variance, main_variance, basis, weighted in sides:
        own = {f"{s} states alone": states(s) for s in (1, 4, 8, 32)}
        own["nothing"] = Codec(0, lambda x, layer: torch.zeros_like(x))
        for b in (4, 3, 2, 1):
            own |= {f"{b} time {t}": by_time(b, t) for t in (64, 128, 256)}
            own |= {f"{b} token groups of {g}": by_token(b, g) for g in (64, 32)}
            turns = {"hadamard": hadamard, "dct": cosine}
            turns |= {f"signed {name}": signs * matrix for name, matrix in turns.items()}
            own |= {f"{b} {name} token": turned(by_token(b), matrix) for name, matrix in turns.items()}
            own |= {f"{b} {name} time": turned(by_time(b), m) for name, m in (("hadamard", hadamard), ("klt", basis))}
            own[f"{b} hadamard token, scale only"] = scaled(b)
            own[f"{b} token after mean"] = after(by_token(b))
            own[f"{b} hadamard token after mean"] = after(turned(by_token(b), hadamard))
            own[f"{b} hadamard token after mean, scale only"] = after(scaled(b))
            own[f"{b} hadamard token after mean of 256, scale only"] = after(scaled(b), 1, 256)
            own[f"{b} hadamard token after 4 states, scale only"] = after(scaled(b), 4)
            own |= {f"{b} time after {s} states": after(by_time(b), s) for s in (4, 8, 16)}
            own |= {f"{b} token after {s} states": after(by_token(b), s) for s in (4, 16)}
            for power in (0.5, 0.25) if side == "K" else ():
                shaped = after(stretched(scaled(b), w.q.clamp(min=1e-6) ** power))
                own[f"{b} hadamard token after mean, scale only, shaped q^{power}"] = shaped
        for name in PARTS.split(", "):
            parts = [(float(Fraction(share)), int(b)) for share, b in (part.split("x") for part in name.split())]
            weights = {"var": variance} | weighted
            own |= {f"mixed {name} {how}": shared_out(weight, parts) for how, weight in weights.items()}
            own[f"mixed {name} klt"] = turned(shared_out(main_variance, parts), basis)
        made |= {f"{side} {name}": (codec, None) if side == "K" else (None, codec) for name, codec in own.items()}
    best = w.k * w.q
    for bits in (3.2, 2.2, 1.5, 1.2, 0.8, 0.5):
        weights = {"var": w.k, "var x q": best, "var x q of pairs": w.k * w.q_pair}
        weights |= {f"var x q^{power}": w.k * w.q**power for power in (0.5, 1.5)}
        fills = {name: filled(weight, bits) for name, weight in weights.items()}
        for classes in ((2, 3, 4), (2, 4), (4,), (1, 2, 3, 4, 5, 6)):
            fills[f"var x q, classes {' '.join(map(str, classes))}"] = filled(best, bits, classes)
        fills |= {f"var x q, segment {t}": filled(best, bits, segment=t) for t in (64, 256)}
        fills |= {f"var x q, {s} states": filled(best, bits, count=s) for s in (4, 8) if bits > s / 8}
        fills["whitened klt"] = turned(filled(w.white, bits), w.white_into, w.white_back)
        made |= {f"K filled {bits} {name}": (codec, None) for name, codec in fills.items()}
    for bits, b in ((3.2, 3), (2.2, 2), (1.5, 2), (1.2, 2), (1.2, 1), (0.8, 1), (0.5, 1)):
        made[f"KV filled {bits}, V {b}"] = filled(best, bits), after(scaled(b))
    made["KV means"] = states(1), states(1)
    for share in (0.01, 0.03):
        made[f"K filled 1.2, {share} worst tokens exact"] = exact_tokens(filled(best, 1.2), share, WORTH["worst"]), None
    # is it the tokens that attention parks on, whose values are small, that spoil V where directions are dropped?
    names = ("V 1 states alone", "V 1 hadamard token after mean, scale only", "V mixed 1/2x4 1/2x0 klt")
    for name in (*names, "V mixed 1/2x4 1/2x0 var"):
        for which, worth in WORTH.items():
            for share in (0.01, 0.03):
                made[f"{name}, {share} {which} tokens exact"] = None, exact_tokens(made[name][1], share, worth)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="a regular expression that names must hold")
    parser.add_argument("--quick", action="store_true", help="one window of each kind: does it run")
    args = parser.parse_args()
    model, tokenizer = longwave.load("smollm2-q4", dtype=torch.float32)
    model.to(args.device)
    weights = Weights(Bench(model, tokenizer, *((1, 1) if args.quick else (12, 4)), seed=7))
    chosen = {name: pair for name, pair in trials(weights).items() if re.search(args.only, name)}
    if not chosen:
        parser.error(f"no trial's name holds {args.only!r}")
    bench = Bench(model, tokenizer, *((1, 1) if args.quick else (20, 10)), seed=3)
    rows = []
    for name, pair in chosen.items():
        began = time.perf_counter()
        bits = [codec.bits for codec in pair if codec is not None]
        rows.append({"trial": name, "bits": sum(bits) / len(bits), **bench.score(*pair)})
        line = "{trial:70s} {bits:5.2f} b  KL {kl:.4f}  loss {loss:+.4f}  recall {recall:.4f}  top-1 {top1:.3f}"
        print(line.format(**rows[-1]), f" {time.perf_counter() - began:.1f} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
