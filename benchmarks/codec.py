"""What a coded cache says of the tokens after it: KL from the dense model, and real bytes, by size and by step.

    python -m benchmarks.codec [--windows 16 --context 2820 --scored 256] [--only PATTERN] [--device cuda] [--out FILE]
    python -m benchmarks.codec --needles 1000,2000 --sizes 0.05 ...         needles behind what was coded with all steps

A codec is fitted on the text that ships with the package (or `--text` files) once for all rows: all steps, each step
left out, the basis of every layer by itself, and the form of KVTC (arXiv 2511.01815) as read from its paper: principal
axes without weights, prediction or transform in time, bits a component by dynamic programming, and DEFLATE. Windows are
task divergence's, of other text. Sinks (4 tokens) and the last 256 stay exact; what lies between is coded in segments
and the bytes are those of the segments over the same K and V in 16 bits.
"""

import argparse
import json
import re
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import longwave
from benchmarks.hybrid import opened
from benchmarks.sensitivity import Judge
from longwave.cli.console import show_table
from longwave.codec import Effort, build, calibrate
from longwave.codec.fit import _regrouped
from longwave.codec.transform import TOKENS, principal
from longwave.evals.data import data_folder
from longwave.evals.fork import fork, prefill
from longwave.evals.loss import score
from longwave.evals.task import Setting
from longwave.evals.tasks.needle import Needle
from longwave.plan.automatic import own_texts

SIZES = (0.15, 0.10, 0.07, 0.05, 0.03, 0.02)
SINKS, WINDOW = 4, 256
ROWS = {
    "all steps": {},
    "no weights": {"weigh": False},
    "no prediction": {"predict": False},
    "no DCT": {"cosines": False},
    "weights and PCA alone": {"predict": False, "cosines": False},
    "PCA alone": {"weigh": False, "predict": False, "cosines": False},
    "PCA within each layer": {"groups": "layer"},
}
KVTC = "KVTC's form"


class Coded:
    """Segments by one of our codecs."""

    def __init__(self, read, device, **options):
        if options.get("groups") == "layer":
            options["groups"] = tuple((i, i + 1) for i in range(len(read.shape.memory_layers)))
        self.codec, self.device = build(read, **options), device

    def at(self, size):
        least, most = self.codec.sizes
        if not least <= size <= most:
            return None
        codec = self.codec.at(size, device=self.device)

        def through(segments):
            ks, vs, ids, starts = zip(*segments, strict=True)
            made = codec.encode_many(ks, vs, ids=ids, starts=starts)
            codec.decode_many(made, ks, vs)
            return sum(map(len, made))

        return through


class Kvtc:
    """K (turned back) and V in principal axes over the layers of a group, whole numbers of bits a component, DEFLATE.

    A component of b bits has 2^b levels over its range on the calibration text's end; what that costs in mean square
    is measured there too, and the bits that cost least are found by dynamic programming over blocks of components.
    """

    BITS, BLOCK = (0, 1, 2, 3, 4, 6, 8), 16

    def __init__(self, read):
        self.read, self.parts = read, []
        self.width = read.shape.kv_heads * read.shape.head_dim
        sides = _regrouped(read, read.groups)
        for number, moments in enumerate(sides):
            mean = moments.mean()
            w = torch.zeros_like(moments.fx)
            w[-1] = mean
            for g, cut in enumerate(moments.groups):
                axes = principal(moments.residual(w, g))[0].float().cpu()
                seen = torch.cat([self.columns(one.k, one.v, one.start)[number][:, cut] for one in read.apart])
                c = (seen - mean[cut].float().cpu()) @ axes
                self.parts.append((number, cut, mean[cut].float().cpu(), axes, *self.ranges(c)))

    def columns(self, k, v, start):
        k = self.read.rotation.unrotate(k.float(), torch.arange(start, start + k.shape[1]))
        return [x.float().transpose(0, 1).flatten(1) for x in (k, v)]

    def ranges(self, c):
        """Half the range of each component and what each number of bits leaves, by blocks [blocks, bits]."""
        largest = c.abs().sort(0).values[int(0.999 * (len(c) - 1))].clamp(min=1e-9)
        size = torch.stack([largest * share for share in (0.0, 0.5, 0.7, 0.85, 0.9, 1, 1)])
        left = torch.stack(
            [(c - self.levels(c, b, s)[1]).square().sum(0) for b, s in zip(self.BITS, size, strict=True)]
        )
        pad = -left.shape[1] % self.BLOCK
        return size, torch.nn.functional.pad(left, (0, pad)).unflatten(1, (-1, self.BLOCK)).sum(-1).T

    @staticmethod
    def levels(c, bits, size):
        """(codes, what they stand for)."""
        if not bits:
            return None, torch.zeros_like(c)
        each = 2 * size / 2**bits
        codes = ((c + size) / each).floor().clamp(0, 2**bits - 1)
        return codes, (codes + 0.5) * each - size

    def allot(self, size):
        """Bits of every block: the least error that `size` pays for, by dynamic programming over the sum of bits."""
        errors = torch.cat([part[5] for part in self.parts]).numpy()
        total = int(size * 16 * len(errors) * 1.0)
        best, choice = np.zeros(total + 1), []
        for row in errors:
            tried = np.full((len(self.BITS), total + 1), np.inf)
            for n, b in enumerate(self.BITS):
                tried[n, b:] = best[: total + 1 - b] + row[n]
            choice.append(tried.argmin(0))
            best = tried.min(0)
        at, found = int(best.argmin()), []
        for row in reversed(choice):
            found.append(self.BITS[row[at]])
            at -= found[-1]
        return found[::-1]

    def at(self, size):
        aim = size
        for _ in range(4):  # DEFLATE takes some off
            made = self.coder(self.allot(aim))
            taken = sum(made(one.k.clone(), one.v.clone(), one.start) for one in self.read.apart[:4])
            aim *= size / (taken / sum(2 * 2 * one.k.numel() for one in self.read.apart[:4]))
            if aim > 0.5:
                return None
        through = self.coder(self.allot(aim))

        def every(segments):
            taken = 0
            for k, v, _, start in segments:
                one, two = k.cpu(), v.cpu()
                taken += through(one, two, start)
                k.copy_(one)
                v.copy_(two)
            return taken

        return every

    def coder(self, allotted):
        def through(k, v, start):
            sides = self.columns(k, v, start)
            out, taken, first = [torch.empty_like(x) for x in sides], 0, 0
            for number, cut, mean, axes, size, errors in self.parts:
                bits = torch.tensor(allotted[first : first + len(errors)]).repeat_interleave(self.BLOCK)[
                    : axes.shape[1]
                ]
                first += len(errors)
                c = (sides[number][:, cut] - mean) @ axes
                stands = torch.zeros_like(c)
                packed = []
                for n, b in enumerate(self.BITS[1:], 1):
                    of = bits == b
                    codes, stands[:, of] = self.levels(c[:, of], b, size[n, of])
                    packed.append(packed_bits(codes.T.to(torch.uint8).numpy(), b))
                taken += len(zlib.compress(b"".join(packed), 6)) + 4
                out[number][:, cut] = stands @ axes.T + mean
            shape = (k.shape[1], k.shape[0], *k.shape[2:])
            k_new, v_new = (x.view(shape).transpose(0, 1) for x in out)
            k.copy_(self.read.rotation.rotate(k_new, torch.arange(start, start + k.shape[1])))
            v.copy_(v_new)
            return taken

        return through


def packed_bits(codes, bits):
    return np.packbits(np.unpackbits(codes.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]).tobytes()


@torch.no_grad()
def through(model, memory, ids, coder):
    """(a dense cache of what `memory` read, its middle coded and decoded; bytes of the segments; what they take in 16
    bits; seconds of coding and decoding)."""
    made = fork(memory, longwave.cache(model, "dense"))
    layers = list(made.memory_layers())
    pairs = [layer.dense.view() for layer in layers]
    k, v = (torch.stack([pair[side][0].transpose(0, 1) for pair in pairs]) for side in (0, 1))
    end = k.shape[1] - WINDOW
    parts = [slice(start, min(end, start + TOKENS)) for start in range(SINKS, end, TOKENS)]
    began = time.perf_counter()
    taken = coder([(k[:, part], v[:, part], list(ids[part]), part.start) for part in parts])
    seconds = time.perf_counter() - began
    for position, layer in enumerate(layers):
        new = [x[position].transpose(0, 1)[None] for x in (k, v)]
        layer.dense.k, layer.dense.v = (x.contiguous() for x in new)
        layer.dense.owned = True
    return made, taken, 2 * 2 * k[:, SINKS:end].numel(), seconds


class CodedJudge(Judge):
    """Unseen windows whose middle goes through a codec."""

    def through(self, coder):
        """(mean KL, its standard error, bytes over those in 16 bits, seconds of coding and decoding 1,000 tokens)."""
        kls, sums, tokens = [], [0, 0, 0.0], 0
        for number, (memory, ids, _) in enumerate(self.read):
            made, *figures = through(self.model, memory, self.ids[number], coder)
            sums, tokens = (
                [a + b for a, b in zip(sums, figures, strict=True)],
                tokens + made.get_seq_length() - SINKS - WINDOW,
            )
            kls.append(self.divergence(number, score(self.model, made, ids)))
        kl, (taken, dense, seconds) = torch.tensor(kls), sums
        return float(kl.mean()), float(kl.std() / len(kls) ** 0.5), taken / dense, 1000 * seconds / tokens


def asked(model, tokenizer, coders, lengths, found):
    """Needles (88 a length: 11 depths, 8 texts) that are asked for behind a middle that went through each of `coders`
    {size: one, None: none}; what is answered comes to `found`, one dict a prompt."""
    task = Needle(lengths=lengths, depths=[i / 10 for i in range(11)], repeats=8, haystack="essays")
    for sample in task.samples(Setting(tokenizer, seed=42, data=data_folder())):
        ids = torch.tensor([list(sample.ids)], device=model.device)
        memory = prefill(model, ids[:, : sample.context])
        told = {"length": sample.meta["length"], "depth": sample.meta["depth"], "repeat": sample.meta["repeat"]}
        for size, coder in coders.items():
            cache, taken, dense, _ = through(model, memory, sample.ids, coder or (lambda segments: 0))
            out = longwave.generate(
                model, ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=sample.max_new_tokens,
                do_sample=False,
            )  # fmt: skip
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            told[str(size)] = task.judge(sample, text).score
            told[f"bytes {size}"] = taken / dense
        found.append(told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-q4", help="or the folder of benchmarks.hybrid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=16, help="unseen ones")
    parser.add_argument("--context", type=int, default=2820)
    parser.add_argument("--judge-text", default="mixed", help="task divergence's text=, or a file")
    parser.add_argument("--recall", action="store_true", help="judge answers for facts hidden in the windows")
    parser.add_argument("--needles", type=lambda text: [int(x) for x in text.split(",")], help="ask at these lengths")
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--sizes", type=lambda text: [float(part) for part in text.split(",")], default=list(SIZES))
    parser.add_argument("--only", default="", help="a regular expression that a row's name must hold")
    parser.add_argument("--text", type=Path, action="append", default=[], help="fit on these files instead")
    parser.add_argument("--fit-windows", type=int)
    parser.add_argument("--fit-tokens", type=int)
    parser.add_argument("--channels", type=int, help="the most that one basis joins")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = [name for name in (*ROWS, KVTC) if re.search(args.only, name)]
    if not names:
        parser.error(f"no row's name holds {args.only!r}; there are {', '.join((*ROWS, KVTC))}")
    model, tokenizer = opened(args.model, args.dtype)
    model.to(args.device)
    effort = Effort.of(model)
    given = {"windows": args.fit_windows, "tokens": args.fit_tokens, "channels": args.channels}
    effort = replace(effort, **{name: value for name, value in given.items() if value})
    effort = replace(effort, probed=min(effort.probed, effort.windows))
    began = time.perf_counter()
    read = calibrate(model, tokenizer, [path.read_text() for path in args.text] or own_texts(), effort)
    print(f"read in {time.perf_counter() - began:.0f} s: {read.about}", flush=True)
    found = []

    def keep(**more):
        if args.out:
            told = {"arguments": vars(args), "read": read.about, **more, "rows": found}
            args.out.write_text(json.dumps(told, default=str) + "\n")

    if args.needles:
        codec = Coded(read, model.device)
        coders = {size: codec.at(size) for size in args.sizes}
        if None in coders.values():
            parser.error(
                f"this codec codes in {codec.codec.sizes[0]:.3f} to {codec.codec.sizes[1]:.3f}, not all of these sizes"
            )
        try:
            asked(model, tokenizer, {None: None} | coders, args.needles, found)
        finally:
            means = {key: sum(one[key] for one in found) / max(len(found), 1) for key in found[0]} if found else {}
            print(f"{len(found)} needles at {args.needles}: {means}", flush=True)
            keep()
        return
    judge = CodedJudge(model, tokenizer, args.windows, args.context, args.scored, args.judge_text, args.recall)
    for name in names:
        began = time.perf_counter()
        coder = Kvtc(read) if name == KVTC else Coded(read, model.device, **ROWS[name])
        print(f"{name}: built in {time.perf_counter() - began:.0f} s", flush=True)
        for size in args.sizes:
            through = coder.at(size)
            if through is None:
                continue
            kl, error, ratio, seconds = judge.through(through)
            found.append({"row": name, "size": size, "bytes": ratio, "kl": kl, "error": error, "seconds": seconds})
            print(
                f"{name:24s} {size:.2f} bytes {ratio:.4f}  KL {kl:.5f} ({error:.5f})  {seconds:.2f} s a 1,000",
                flush=True,
            )
            keep(**{"dense loss": judge.dense()})
    cells = {(row["row"], row["size"]): f"{row['bytes']:.4f}: {row['kl']:.4f}" for row in found}
    show_table(
        f"bytes: KL from dense, {args.windows} windows of {args.context}",
        ["", *map(str, args.sizes)],
        [[name, *(cells.get((name, size), "") for size in args.sizes)] for name in names],
    )


if __name__ == "__main__":
    main()
