"""From what was read of a model to a codec: predictors and bases by moments, sizes and tables by segments kept apart.

Half of the segments kept apart make scales and entropy tables, the other half the curve from step to size: real bytes,
of text that made nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longwave.codec import blob, entropy
from longwave.codec.calibrate import Apart, Calibration, Effort, Progress, calibrate
from longwave.codec.file import Codec
from longwave.codec.fitted import Basis, Fitted, Scales, Side
from longwave.codec.given import Given
from longwave.codec.predict import RIDGES, Moments, features
from longwave.codec.quantise import OCTAVE, step_of
from longwave.codec.segment import SegmentCodec
from longwave.codec.transform import BANDS, TOKENS, bands, principal
from longwave.plan.automatic import own_texts

LARGEST, SMALLEST = 0.2, 0.01  # sizes that a codec is made for
EVERY = 3 * OCTAVE // 4  # steps between two points of the curve
NEIGHBOURS, PRIOR = 8, 8.0  # components whose mean size stands for so many numbers more of each


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] | None = None,
    *,
    seed: int = 0,
    effort: Effort | None = None,
    model_id: str = "",
    progress: Progress = lambda done, total: None,
) -> Codec:
    """A codec of `model`, fitted on `texts` (None: text that ships with the package), the same for the same seed.

    effort: how much is read; None: about a minute's worth on the model's device. Raises NotImplementedError, with the
    reason, for a model whose keys cannot be turned back, NoGradients where gradients do not go through its weights, and
    ValueError where text or context are too short.
    """
    read = calibrate(model, tokenizer, own_texts() if texts is None else texts, effort, seed, model_id, progress)
    return build(read)


@torch.no_grad()
def build(
    read: Calibration,
    *,
    weigh: bool = True,
    predict: bool = True,
    cosines: bool = True,
    groups: tuple[tuple[int, int], ...] | None = None,
) -> Codec:
    """The codec that a calibration makes. What is False is left out, for comparison; groups: smaller ones than were
    read, each within one of those."""
    groups = groups or read.groups
    sides, spectra = [], []
    tried, ridges = (_tried(read) if predict else None), []
    for number, (moments, weight) in enumerate(zip(_regrouped(read, groups), read.weights, strict=True)):
        w = weight.flatten().to(moments.ff.device) if weigh else torch.ones(weight.numel(), device=moments.ff.device)
        ridge, predictor = _predictor(moments, w, None if tried is None else (tried[0], tried[1 + number]))
        side, variances = _side(moments, w.double(), predictor, predict)
        ridges.append(ridge)
        sides.append(side)
        spectra.append(variances)
    level = torch.cat([v for variances in spectra for v in variances]).mean().sqrt()
    least = _least_step([v / level**2 for variances in spectra for v in variances])
    cut = []
    for side, variances in zip(sides, spectra, strict=True):
        some = [int((v / level**2 >= (step_of(least) / 3) ** 2).sum()) for v in variances]
        bases = tuple(
            replace(basis, axes=basis.axes[:, : max(1, m)].contiguous())
            for basis, m in zip(side.bases, some, strict=True)
        )
        cut.append(replace(side, weight=(side.weight / level.cpu()).float(), bases=bases))
    shape = read.shape
    fitted = Fitted(
        len(shape.memory_layers), shape.kv_heads, shape.head_dim, groups, read.table, read.rotation, cut[0], cut[1],
        torch.from_numpy(entropy.tabled(entropy.laplace())), read.places, cosines,
    )  # fmt: skip
    device = read.moments[0].ff.device
    fitted = _scaled(fitted, read.apart[::2], device)
    fitted = replace(fitted, frequency=torch.from_numpy(_tables(fitted, read.apart[::2], least, device)))
    about = {**read.about, "weigh": weigh, "predict": predict, "ridges": ridges}
    return Codec(fitted, _curve(fitted, read.apart[1::2], least, device), read.model, about)


def _regrouped(read: Calibration, groups: tuple[tuple[int, int], ...]) -> list[Moments]:
    """Moments by `groups`, each a part of one of those that were read."""
    if groups == read.groups:
        return list(read.moments)
    width, found = read.shape.kv_heads * read.shape.head_dim, []
    for moments in read.moments:
        cuts, parts = [slice(a * width, b * width) for a, b in groups], []
        for cut in cuts:
            of = next(i for i, g in enumerate(moments.groups) if g.start <= cut.start and cut.stop <= g.stop)
            inner = slice(cut.start - moments.groups[of].start, cut.stop - moments.groups[of].start)
            parts.append(moments.xx[of][inner, inner])
        found.append(replace(moments, groups=cuts, xx=parts))
    return found


def _tried(read: Calibration) -> tuple[Tensor, Tensor, Tensor]:
    """Features, K (turned back) and V of every other segment kept apart, float32 [tokens, ...]: ridges are tried on
    them."""
    device, found = read.moments[0].ff.device, []
    for one in read.apart[::2]:
        k = read.rotation.unrotate(one.k.float(), torch.arange(one.start, one.start + one.k.shape[1]))
        sides = (x.transpose(0, 1).flatten(1) for x in (k, one.v.float()))
        found.append((features(read.table, one.ids), *sides))
    f, k, v = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
    return f, k, v


def _predictor(moments: Moments, weight: Tensor, tried: tuple[Tensor, Tensor] | None) -> tuple[float | None, Tensor]:
    """(r, W [features, channels]) that leaves least of `tried`, weighted; the mean alone where nothing is tried."""
    best, found = float("inf"), None
    w = torch.zeros_like(moments.fx)
    w[-1] = moments.mean()
    if tried is None:
        return None, w
    for ridge, one in zip(RIDGES, moments.predictors(RIDGES), strict=True):
        left = float(((tried[1] - tried[0] @ one.float()) * weight.float()).double().square().sum())
        if left < best:
            best, found, w = left, ridge, one
    return found, w


def _side(moments: Moments, weight: Tensor, w: Tensor, predict: bool) -> tuple[Side, list[Tensor]]:
    """A side without sizes, and the variances of all its components by group. weight float64 [channels], w its
    predictor [features, channels]."""
    mean = moments.mean()
    unit = w.abs().amax(0).clamp(min=1e-20)
    kept = (w / unit).half()  # what is kept is what residuals are of
    w = kept.double() * unit
    bases, variances = [], []
    for number, cut in enumerate(moments.groups):
        s = weight[cut]
        axes, variance = principal(s[:, None] * moments.residual(w, number) * s)
        none = Scales(torch.zeros(0, BANDS, dtype=torch.int16), torch.zeros(0, dtype=torch.int16))
        bases.append(Basis(axes.half().cpu(), none, none))
        variances.append(variance)
    predictor = kept.cpu() if predict else kept[:0].cpu()
    return Side(weight.cpu(), mean.float().cpu(), predictor, unit.float().cpu(), tuple(bases)), variances


def _least_step(variances: list[Tensor]) -> int:
    """About the step at which numbers of these variances take LARGEST of 16 bits."""
    every = torch.cat([v.cpu() for v in variances])

    def bits(j: int) -> float:
        return float((1 + 6 * every / step_of(j) ** 2).log2().mean() / 2)

    low, high = -40 * OCTAVE, 40 * OCTAVE
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bits(middle) > 16 * LARGEST else (low, middle)
    return high


def _everything(fitted: Fitted, device: torch.device) -> SegmentCodec:
    """A codec that leaves no component out."""
    sides = []
    for side in (fitted.k, fitted.v):
        bases = []
        for basis in side.bases:
            m = basis.axes.shape[1]
            all_of_them = Scales(torch.zeros(m, BANDS, dtype=torch.int16), torch.zeros(m, dtype=torch.int16))
            bases.append(replace(basis, known=all_of_them, blind=all_of_them))
        sides.append(replace(side, bases=tuple(bases)))
    return SegmentCodec(replace(fitted, k=sides[0], v=sides[1]), 0, device=device)


def _scaled(fitted: Fitted, segments: list[Apart], device: torch.device) -> Fitted:
    """With the sizes of coefficients on `segments`, with ids and without."""
    codec = _everything(fitted, device)
    band = bands(TOKENS) if fitted.cosines else torch.zeros(TOKENS, dtype=torch.long)
    within = one_hot(band, BANDS).double().to(device)
    share = torch.bincount(band, minlength=BANDS).double()
    found: list[list[dict[str, Scales]]] = [[{} for _ in fitted.groups] for _ in range(2)]
    for kind in ("known", "blind"):
        sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for one in segments:
            c = codec._coefficients([_given(one, kind == "known")])[0][0]
            sizes = [len(side.bases[g].axes[0]) for g in range(len(fitted.groups)) for side in (fitted.k, fitted.v)]
            for place, own in enumerate(part.double() for part in c.split(sizes)):
                new, old = (own.abs() @ within, own.square().mean(1)), sums.get((place % 2, place // 2))
                sums[place % 2, place // 2] = new if old is None else (old[0] + new[0], old[1] + new[1])
        for (number, g), (absolute, square) in ((at, (a.cpu(), b.cpu())) for at, (a, b) in sums.items()):
            found[number][g][kind] = Scales.of(_smoothed(absolute, share * len(segments)), square / len(segments))
    sides = []
    for side, each in zip((fitted.k, fitted.v), found, strict=True):
        bases = (replace(basis, **of) for basis, of in zip(side.bases, each, strict=True))  # type: ignore[arg-type]
        sides.append(replace(side, bases=tuple(bases)))
    return replace(fitted, k=sides[0], v=sides[1])


def _smoothed(absolute: Tensor, counts: Tensor) -> Tensor:
    """Mean absolute sizes [m, BANDS] of sums over `counts` [BANDS] numbers: pulled to their neighbours', which differ
    little in a spectrum, the more the fewer were seen."""
    mean = absolute / counts.clamp(min=1)
    reach = min(NEIGHBOURS, len(mean) - 1)
    padded = torch.cat([mean[:1].expand(reach, -1), mean, mean[-1:].expand(reach, -1)])
    around = padded.unfold(0, 2 * reach + 1, 1).mean(-1)
    return (absolute + PRIOR * around) / (counts + PRIOR)


def _tables(fitted: Fitted, segments: list[Apart], least: int, device: torch.device) -> NDArray[np.uint16]:
    """Frequencies by what the contexts met on `segments`, at steps all over the sizes."""
    codec = SegmentCodec(fitted, least, device=device)
    counts = torch.zeros(entropy.CONTEXTS * 256, dtype=torch.long, device=device)
    for one in segments:
        coefficients, _ = codec._coefficients([_given(one)])
        for step in range(least, least + 6 * OCTAVE, OCTAVE):
            q = codec._numbers(coefficients, step, True)[0].flatten()
            symbols = torch.where(q.abs() <= entropy.REACH, q + entropy.REACH, entropy.ESCAPE)
            parts = [codec._contexts(g, step, TOKENS, True) for g in range(len(fitted.groups))]
            contexts = torch.cat(parts).to(device).long()
            counts += torch.bincount(contexts * 256 + symbols, minlength=len(counts))
    return entropy.learned(counts.cpu().numpy().reshape(entropy.CONTEXTS, 256))


def _given(one: Apart, known: bool = True) -> Given:
    return Given(one.k, one.v, one.ids.numpy() if known else None, one.start, raw=0)


def _curve(fitted: Fitted, segments: list[Apart], least: int, device: torch.device) -> tuple[tuple[int, float], ...]:
    """(step, size) down to SMALLEST: bytes of whole segments over those in 16 bits."""
    codec = SegmentCodec(fitted, least, device=device)
    some, most = [_given(one) for one in segments], codec._batch
    held = [codec._coefficients(some[first : first + most]) for first in range(0, len(some), most)]
    fixed = blob.SIZE + codec._id_bytes(TOKENS) + 4 * len(fitted.groups)
    dense = 2 * 2 * TOKENS * fitted.layers * fitted.width
    found: list[tuple[int, float]] = []
    step = least
    while True:
        parts = [part for c, finite in held for one in codec._parts(c, step, True, finite)() for part in one or ()]
        size = (fixed * len(some) + sum(map(len, parts))) / (dense * len(some))
        if found and size >= found[-1][1]:
            return tuple(found)  # nothing is left but the header
        found.append((step, size))
        if size < SMALLEST:
            return tuple(found)
        step += EVERY
