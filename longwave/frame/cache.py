"""`LongCache`, what transformers holds: memory layers of one method, and transformers' own for the rest."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from longwave.frame.attention import uncompiled
from longwave.frame.counting import storage_bytes
from longwave.frame.layer import MemoryLayer
from longwave.frame.parked import exchange, to_host
from longwave.frame.progress import Progress
from longwave.frame.report import OTHERS, Report, tensors_in


class Origin:
    """The model that a cache was built on, as long as it lives. A pickle does not know it."""

    def __init__(self, model: Any = None):
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> Any:
        return None if self._model is None else self._model()

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, ()

    def __deepcopy__(self, memo: object) -> Origin:
        return self


def _cut(layer: Any) -> None:
    """Have one of transformers' own layers hold what it counts, where that is a view of much more."""
    for name in ("keys", "values"):
        held = getattr(layer, name, None)
        if isinstance(held, torch.Tensor) and held.untyped_storage().nbytes() > 1.25 * held.nbytes:
            setattr(layer, name, held.clone())


class LongCache(Cache):
    """A cache for `longwave.generate` and `model.generate` (cache=), made by `longwave.cache`.

    Full-attention layers are `MemoryLayer`s of one method; every other kind of layer keeps transformers' own class.
    """

    layers: list[Any]
    sized: Any = None  # what `longwave.build.expect` needs to plan it again, where its budget is a size
    drops: int = 0  # see __bool__
    origin: Origin = Origin()
    _homes: dict[tuple[int, str], torch.device] | None = None  # of a parked cache: where each tensor came from

    def __bool__(self) -> bool:
        """False where the model would drop the cache: Phi-3's family does if it is true, the text passes `drops` tokens
        and it does not. A cache is more than something to be made again, and layers refuse what would go wrong."""
        return self.get_seq_length() > self.drops if self.drops else True

    def __init__(self, layers: list[Any], method: Any, rotary: Any = None, watch: Any = None):
        """method: what decided the layers. rotary, watch: what they need to see of the model, kept as long as they."""
        super().__init__(layers=layers)
        self.method = method
        self._watch = watch
        attention = [i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
        memory = [i for i, layer in enumerate(layers) if isinstance(layer, MemoryLayer)]
        linear = [i for i, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)]
        first = None if linear and linear[0] <= attention[0] else attention[0]  # their states have moved on by then
        self._progress = Progress(first, attention[-1], memory[-1], rotary=rotary)
        for layer in self.memory_layers():
            layer.progress = self._progress
        for layer in self.memory_layers():
            layer.join(list(self.memory_layers()))
        self._unused = [None if isinstance(layer, MemoryLayer) else copy.deepcopy(layer) for layer in layers]

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Hand new tokens to a layer. transformers' own layers keep a view of all they returned: cut it to size."""
        self._progress.check_here()
        try:
            next(self.memory_layers()).check_dtype(value_states)  # before a sliding layer takes them
            returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:
            self._progress.refused(layer_idx)
            raise
        self._progress.reached = layer_idx
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, MemoryLayer):
            _cut(layer)
        return returned

    def reset(self) -> None:
        """Forget everything; the next use may have another batch size."""
        self._progress.reached, self._progress.broken, self._progress.lent = None, False, None
        self._progress.parked, self._homes = False, None
        self._progress.ids, self._progress.unheard, self._progress.concluding = None, False, []
        for index, unused in enumerate(self._unused):
            if unused is None:
                self.layers[index].reset()
            else:  # transformers' own layers may keep their old batch size through a reset
                self.layers[index] = copy.deepcopy(unused)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens in all layers, or raise and leave every layer as it was."""
        self._progress.check()
        for layer in self.memory_layers():
            layer.check_crop(tokens_to_remove)
        others = [layer for layer in self.layers if not isinstance(layer, MemoryLayer)]
        before = [dict(vars(layer)) for layer in others]  # they cut by pointing at other tensors
        try:
            for layer in others:
                layer.crop(tokens_to_remove)
                _cut(layer)
        except BaseException as error:
            for layer, was in zip(others, before, strict=True):
                vars(layer).clear()
                vars(layer).update(was)
            raise ValueError(
                f"cannot remove the last {-int(tokens_to_remove)} tokens: {error} Every layer is as it was; keep a "
                "copy.deepcopy of the cache to go back to"
            ) from error
        try:
            for layer in self.memory_layers():
                layer.crop(tokens_to_remove)
        except BaseException:
            self._progress.broken = True
            raise

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order. Some of transformers' own layers can only reorder, which selects as well."""
        rows = getattr(next(self.memory_layers()), "batch_size", None)
        if rows is None:
            return
        order = torch.arange(rows)[indices.cpu()]  # masks and negative indices become row numbers
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                layer.batch_select_indices(order)
            else:
                layer.reorder_cache(order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = getattr(next(self.memory_layers()), "batch_size", 0)
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    @uncompiled
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)

    @uncompiled
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Called at the start of a forward pass, so the place to see that the last one ended well."""
        self._progress.check()
        return super().get_mask_sizes(query_length, layer_idx)

    def mask(self) -> torch.Tensor:
        """Which columns hold a real token: bool [batch, columns], on the host, padding first.

        ValueError where a row has padding between its tokens: which columns those were is not known any more.
        """
        first = next(self.memory_layers())
        if not first.is_initialized:
            raise ValueError("no token was read into this cache")
        if not first.unbroken:
            raise ValueError("a row has padding between its tokens, and which columns those were is not known any more")
        return torch.arange(first.columns) >= first.columns - torch.tensor(first.rows)[:, None]

    def park(self) -> None:
        """Move all that is held to host memory, pinned where it comes from a GPU, until `wake`.

        A parked cache takes no pass; it can be reported on, saved, copied, woken and reset. Both copies are held while
        it moves. If anything fails, memory included, the cache is as it was. Parked already: nothing happens.
        """
        if self._progress.parked:
            return
        self._progress.check()
        self._progress.check_lent()
        homes: dict[tuple[int, str], torch.device] = {}

        def out(index: int, name: str, x: torch.Tensor) -> torch.Tensor:
            homes[index, name] = x.device
            return to_host(x)

        exchange(self.layers, out)
        self._homes, self._progress.parked = homes, True

    def wake(self) -> None:
        """Move everything back to where it lay before `park`, bit for bit. If anything fails it stays parked."""
        homes = self._homes
        if not self._progress.parked or homes is None:
            return
        exchange(self.layers, lambda index, name, x: x.to(homes[index, name], non_blocking=True))
        self._homes, self._progress.parked = None, False

    def memory_layers(self) -> Iterator[MemoryLayer]:
        return (layer for layer in self.layers if isinstance(layer, MemoryLayer))

    @property
    def nbytes(self) -> int:
        """Bytes all layers really hold."""
        return sum(self.report().parts.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes transformers' DynamicCache would hold after the same calls."""
        return self.report().dense_nbytes

    def report(self) -> Report:
        """Tokens seen, bytes held by part, bytes a dense cache would hold, and their ratio."""
        parts: dict[str, int] = {}
        host = storage_bytes([x for layer in self.layers for x in self._away(layer)])
        mapped = storage_bytes([x for layer in self.memory_layers() for x in layer.mapped()])
        dense, batch, held, answers = 0, 0, 0, []
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                dense += layer.dense_nbytes
                batch = getattr(layer, "batch_size", 0)
                held = max(held, *layer.held(), 0) if layer.is_initialized else held
                answers += [answer for answer in layer.answers() if answer not in answers]
                for name, tensors in layer.parts().items():
                    parts[name] = parts.get(name, 0) + storage_bytes(tensors)
            else:
                other = storage_bytes(list(tensors_in(layer)))
                parts[OTHERS] = parts.get(OTHERS, 0) + other
                dense += other
        scratch = self._progress.scratch
        if scratch.tensors():
            parts["scratch"] = storage_bytes(scratch.tensors())
        return Report(
            method=str(self.method),
            tokens=self.get_seq_length(),
            held=held,
            batch=batch,
            nbytes=sum(parts.values()),
            dense_nbytes=dense,
            parts=parts,
            scratch=scratch.most,
            host=host,
            mapped=mapped,
            answers=tuple(answers),
        )

    def _away(self, layer: Any) -> list[torch.Tensor]:
        """What a layer holds in host memory that does not belong there, or that is parked there."""
        home = getattr(layer, "device", None)
        if not self._progress.parked and (home is None or home.type == "cpu"):
            return []
        memory = isinstance(layer, MemoryLayer)
        held = [x for part in layer.parts().values() for x in part] if memory else list(tensors_in(layer))
        files = {x.untyped_storage().data_ptr() for x in layer.mapped()} if memory else set()
        return [x for x in held if x.device.type == "cpu" and x.untyped_storage().data_ptr() not in files]
