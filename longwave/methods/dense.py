"""dense: keep every token. The frame's own baseline, and the proof that it changes nothing. Or, with offload="coded",
keep the middle in the codec's form in host memory (docs/codec.md), and expand it as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from transformers import PreTrainedModel

from longwave.codec import codec_for
from longwave.codec.coder import SINKS, WINDOW, Coder, Share, together
from longwave.codec.layer import CodedLayer
from longwave.codec.middle import Part
from longwave.frame import MemoryLayer, Needs
from longwave.methods.base import Bound, CacheShape, Method, Unmeasured
from longwave.plan.profile import Profile
from longwave.store.tokens import capacity

DEFAULT_SIZE = 0.1
ID = 4  # bytes


@dataclass(frozen=True)
class Dense(Method):
    """Every token of every layer, as it is; the only budget it can meet is 1.

    offload: "coded": the middle lies coded in host memory and is expanded, as many layers at a time as the codec
    decodes together, in every pass. size: what it takes there, a fraction of its bytes in 16 bits. coder: what codes;
    None: the model's own codec, kept from before or fitted now.
    """

    name: ClassVar[str] = "dense"
    learns: ClassVar[bool] = True

    offload: str | None = None
    size: float | None = None
    coder: Coder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.offload not in (None, "coded"):
            raise ValueError(f'offload is "coded" or None, got {self.offload!r}')
        if self.offload is None and (self.size is not None or self.coder is not None):
            raise ValueError('size and coder decide nothing without offload="coded": leave them out, or give it')
        if self.size is not None and (
            isinstance(self.size, bool) or not isinstance(self.size, (int, float)) or not 0 < self.size <= 1
        ):
            raise ValueError(f"size is a fraction of the bytes in 16 bits, such as 0.05; got {self.size!r}")
        if self.coder is not None and not isinstance(getattr(self.coder, "fingerprint", None), bytes):
            raise ValueError(f"coder is what codes segments, such as longwave.codec's, got {self.coder!r}")

    @property
    def share(self) -> float:
        return DEFAULT_SIZE if self.size is None else self.size

    def known(self, model: PreTrainedModel, shape: CacheShape, tokenizer: Any) -> Dense:
        if self.offload is None or self.coder is not None:
            return self
        return replace(self, coder=codec_for(model, tokenizer).at(self.share, device=model.device))

    def fits_budget(self) -> bool:
        return self.offload is None  # size says it all

    def bind(self, shape: CacheShape, profile: Profile | None, budget: float | None) -> DenseBound:
        if self.offload is not None:
            if budget is not None:
                raise ValueError(f"size= says what coded layers take: leave budget={budget:g} out")
            if self.coder is None:
                raise Unmeasured("this model's codec is not known: longwave.cache finds it, or fits one")
            return CodedBound(self, shape, budget)
        if budget is not None and budget < 1:
            raise ValueError(f"dense keeps everything, so its budget is 1; got {budget}. Use fourier for less")
        return DenseBound(self, shape, budget)

    def least_budget(self, shape: CacheShape, profile: Profile | None = None) -> float:
        return 1.0


class DenseBound(Bound):
    def layer(self, index: int) -> MemoryLayer:
        return MemoryLayer(index)

    def layer_bytes(self, index: int, tokens: int) -> int:
        return capacity(tokens) * self.shape.token_bytes


class CodedBound(DenseBound):
    """What is coded is counted at the most that it may take: twice its share."""

    method: Dense

    def __str__(self) -> str:
        return f"dense(coded at {self.method.share:g} of 16 bits)"

    def decisions(self) -> Iterator[bytes]:
        yield self._coder.fingerprint

    @property
    def _coder(self) -> Coder:
        assert self.method.coder is not None
        return self.method.coder

    @property
    def needs(self) -> Needs:
        return Needs(ids=True)

    @cached_property
    def parts(self) -> list[Part]:
        """What is coded together: as little as the coder allows, so that a prompt is coded while it is read."""
        layers, shape = len(self.shape.memory_layers), self.shape
        groups, own = together(self._coder, layers), getattr(self._coder, "parts", None)
        coders = own() if own is not None else [self._coder]
        groups = groups if own is not None else [range(layers)]
        each = self.method.share * shape.kv_heads * shape.head_dim * 2 * 2
        return [Part(group, one, Share(each * len(group))) for group, one in zip(groups, coders, strict=True)]

    def layer(self, index: int) -> MemoryLayer:
        return CodedLayer(index, self.shape.memory_layers.index(index), self.parts)

    def layer_bytes(self, index: int, tokens: int) -> int:
        segments = max(0, tokens - SINKS - WINDOW) // self._coder.tokens
        dense = capacity(tokens - segments * self._coder.tokens)
        held, position = dense * self.shape.token_bytes, self.shape.memory_layers.index(index)
        for part in self.parts:
            if position == part.layers[0]:
                held += segments * part.room.most(self._coder.tokens) + dense * self.shape.kv_heads * ID
        return held

    def peak_bytes(self, tokens: int, batch: int = 1) -> int:
        """A prompt that is read at once is dense in a part until it is coded; a pass expands a group, has the next one
        made, and puts a layer together."""
        part = max(len(part.layers) for part in self.parts)
        group = max(map(len, together(self._coder, len(self.shape.memory_layers))))
        dense = max(part, 2 * group) * capacity(tokens) + tokens
        return self.nbytes(tokens, batch) + batch * dense * self.shape.token_bytes
