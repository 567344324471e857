"""How fast programs of one warp read parts of pages, by how many bytes each has under way: what the memory would allow
the attention kernels, which read so.

    python -m benchmarks.reading [--cases 16x256,1x1024] [--part 8192]

A case is BATCHxPAGES; pages are 128 KiB, of which 8 heads read `part` bytes each, a load at a time, the next only when
the one before is there. As many programs as fit at once, 16 a processor, each for some pages of a head.
"""

import argparse

import torch
import triton
import triton.language as tl

from benchmarks import kernels
from benchmarks.kernels import HEADS
from longwave.ops.spectral import triton as kernel

PAGE = 1 << 17
SLOTS = 65536 // (32 * kernel.REGISTERS)  # programs of a processor
LOADS = (512, 1024, 2048, 4096)  # bytes


@triton.jit
def _read_kernel(
    pages_ptr, out_ptr, n, own, H: tl.constexpr, PAGE: tl.constexpr, PART: tl.constexpr, LOAD: tl.constexpr
):
    """The sum of what program `job` of a row reads, int32, at out [B, programs]."""
    b, job = tl.program_id(0), tl.program_id(1)
    h, split = job // own, job % own
    words: tl.constexpr = LOAD // 4
    row = pages_ptr + (b.to(tl.int64) * n * PAGE + h * PART) // 4 + tl.arange(0, words)
    total = tl.zeros([words], tl.int32)
    page_words = tl.full([], PAGE // 4, tl.int64)
    for page in range(n * split // own, n * (split + 1) // own):
        at = row + page * page_words
        for i in tl.static_range(PART // LOAD):
            x = tl.load(at + i * words)
            total += x
            at += (x == -1).to(tl.int32)  # never: makes the next load wait for this one
    tl.store(out_ptr + b * tl.num_programs(1) + job, tl.sum(total, 0))


def reader(pages, part, load, processors):
    """A step that reads `part` bytes of each head of pages int32 [B, N, words], `load` at once; its answer is sums."""
    batch, n, _ = pages.shape
    *_, (own, *_) = kernel._shares((1,) * HEADS, n, SLOTS * processors / batch, 1)  # as there
    out = torch.empty(batch, own * HEADS, dtype=torch.int32, device=pages.device)

    def step():
        _read_kernel[(batch, own * HEADS)](
            pages, out, n, own, H=HEADS, PAGE=PAGE, PART=part, LOAD=load, num_warps=1, maxnreg=kernel.REGISTERS
        )
        return out

    return step


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="16x256,1x1024")
    parser.add_argument("--part", type=int, default=8192)
    args = parser.parse_args(argv)
    if not LOADS[-1] <= args.part <= PAGE // HEADS or args.part % LOADS[-1]:
        parser.error(f"--part is a multiple of {LOADS[-1]}, {PAGE // HEADS} at most")
    cuda = kernels.DEVICE == "cuda"
    processors = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    for case in args.cases.split(","):
        batch, n = map(int, case.split("x"))
        g = torch.Generator(kernels.DEVICE).manual_seed(0)
        inputs = [
            torch.randint(0, 1 << 15, (batch, n, PAGE // 4), generator=g, dtype=torch.int32, device=kernels.DEVICE)
            for _ in range(kernels.copies(batch * n * HEADS * args.part))
        ]
        want = inputs[0][..., : HEADS * args.part // 4].sum((1, 2))
        for load in LOADS:
            steps = [reader(pages, args.part, load, processors) for pages in inputs]
            if not torch.equal(steps[0]().sum(-1), want):
                raise SystemExit(f"{case}, {load} bytes: the sums are wrong")
            us = kernels.timed(steps)
            rate = batch * n * HEADS * args.part / us / 1e6
            print(f"{case}: {load} bytes under way a warp, {us:.1f} us, {rate:.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
