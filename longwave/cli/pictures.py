"""Pictures of what a cache holds: which channels are kept, and what a compressed channel looks like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longwave.evals import style
from longwave.frame import LongCache

Kept = Sequence[tuple[torch.Tensor, torch.Tensor]]  # of every memory layer: K and V, bool [kv_heads, head_dim]


def kept_by_pair(kept: Kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of channels kept per layer and rotary pair, K and V: [layers, head_dim / 2] each.

    Pair j of a head is made of channels j and j + head_dim / 2; the rotation slows down as j rises. V is not rotated:
    its pairs are only the same channels, for comparison.
    """
    sides = []
    for side in (0, 1):
        tables = torch.stack([pair[side] for pair in kept]).float()  # [layers, heads, dim]
        half = tables.shape[-1] // 2
        sides.append((tables[..., :half] + tables[..., half:]).mean(1) / 2)
    return sides[0], sides[1]


@style.paper()
def plot_kept(kept: Kept, path: Path, title: str) -> None:
    """Heat map, layers down and rotary pairs across: what share of the channels is kept as values."""
    figure = style.blank(3.2)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, name, shares in zip(panels, ("keys", "values"), kept_by_pair(kept), strict=True):
        image = panel.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        panel.grid(False)
        panel.set_title(f"{name}: {shares.mean():.1%} kept")
        panel.set_xlabel("rotary pair (fast to slow)" if name == "keys" else "channel pair (not rotated)")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="share kept, mean over heads")
    figure.suptitle(title)
    style.save(figure, path)


@style.paper()
def plot_channel(exact: LongCache, held: LongCache, layer: int, side: str, head: int, channel: int, path: Path) -> dict:
    """One channel of the middle: its values with what the store makes of them, and its spectrum with the band kept.

    `exact` is a dense cache of the same tokens. Returns the numbers behind the picture.
    """
    memory, bound = held.layers[layer], held.method
    if getattr(memory, "store", None) is None:
        raise ValueError(f"layer {layer} has compressed nothing: give more tokens")
    k, _ = exact.layers[layer].materialize()
    if not (0 <= head < k.shape[1] and 0 <= channel < k.shape[3]):
        raise ValueError(f"layer {layer} has heads 0 to {k.shape[1] - 1} of channels 0 to {k.shape[3] - 1}")
    which = "kv".index(side)
    (start, _, segment), count = bound.dense_tokens, memory.store.tokens[0]
    true = exact.layers[layer].materialize()[which][0, head, start : start + count, channel].cpu().double()
    made = memory.materialize()[which][0, head, start : start + count, channel].cpu().double()
    kept = bool(bound.kept[memory.position][which][head, channel])
    power = torch.fft.rfft(true - true.mean()).abs().square()
    frequency = torch.arange(len(power)) / count  # periods per token
    period, states = segment or count, states_of(bound, memory.position, which, head)
    missed = float((true - made).square().mean() / (true - true.mean()).square().mean())

    figure = style.blank(4.4)
    above, below = figure.subplots(2, 1)
    tokens = range(start, start + count)
    above.plot(tokens, true.numpy(), lw=0.6, color=style.GREY, label="exact")
    above.plot(
        tokens, made.numpy(), lw=1.2, color=style.INKS[0], label="as it is stored" if kept else "from its coefficients"
    )
    above.set_xlabel("token")
    above.set_ylabel("value")
    above.legend(loc="upper right")
    above.set_title(
        f"layer {layer}, {'key' if side == 'k' else 'value'} head {head}, channel {channel}: "
        + ("kept" if kept else f"{states} states per {period} tokens, {missed:.0%} of the variance missed")
    )
    below.loglog(frequency[1:].numpy(), power[1:].numpy() + 1e-12, lw=0.6, color=style.GREY)
    if states:
        band = f"band kept: periods above {2 * period / states:.0f} tokens"
        below.axvspan(float(frequency[1]), states / 2 / period, color=style.INKS[0], alpha=0.15, label=band)
        below.legend(loc="lower left")
    below.set_xlabel("frequency (periods per token)")
    below.set_ylabel("power")
    style.save(figure, path)
    return {"layer": layer, "side": side, "head": head, "channel": channel, "kept": kept, "variance_missed": missed}


def states_of(bound: Any, position: int, which: int, head: int) -> int:
    """Coefficients that a compressed channel of a head keeps, 0 where the method has none."""
    if not bound.plan:
        return int(bound.method.states)
    codes = bound.plan[position]
    return int((codes.k, codes.v)[which][head].states)
