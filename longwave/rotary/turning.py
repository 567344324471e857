"""Turning keys and queries by the model's own rotary embedding: on, back, and from one position to another.

Nothing of a model's rotation is written down here. The tables come from its rotary modules and its own function
applies them, so that pairs of halves and of neighbours, partial rotation and YaRN's scaling are right without a word
about them. Which layer uses which table, and how, is found out once, on the model itself (`Rotary.of`):

1. The decoder's forward pass runs over five tokens with stand-ins for its layers and rotary modules. What reaches a
   layer says which table it gets (Gemma 3 has two), or that it gets none.
2. Every attention module's forward pass runs, up to its cache, over one token at five positions. What it stores there
   must be one key, turned: the first way of calling the model's function that turns all five back into that key is the
   layer's. Keys that are equal as they are belong to a layer that does not turn them.

Whatever does not fit is refused with the reason: tables that change with the length, keys changed after their rotation,
caches of latents. It costs the query, key and value projections of five tokens a layer.

Queries are turned as the attention function gets them: a factor that the model puts on them stays.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

POSITIONS = (0, 1, 3, 10, 31)  # at which the model is watched
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")  # what attention modules call their cache

Angles = tuple[Tensor, Tensor]  # cos and sin


class Rotary:
    """Rotates, un-rotates and shifts the keys and queries of one model.

    Holds references to the model's modules and copies nothing: copy and deepcopy give the same object, and a pickle
    leaves the model behind. After `of` nothing is read from a device, so that every call can be captured in a graph.
    """

    def __init__(self, turns: Mapping[nn.Module, "Turn | None"] | None = None):
        self.turns = dict(turns or {})  # of every attention module; None where keys are not turned

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "Rotary":
        """The rotation of `model`, a transformers model with a text decoder and its weights; the model stays as it is.

        Raises NotImplementedError with the reason where keys cannot be turned back for certain.
        """
        decoder, lists = _decoder(model)
        _check_tables(decoder, model)
        turns: dict[nn.Module, Turn | None] = {}
        for layer, call in _follow(decoder, lists).items():
            for attention in _attentions(layer, decoder):
                turns[attention] = _turn_of(attention, call, turns)
        if not any(turns.values()):
            _refuse(decoder, "no layer turns the keys that it stores: its positions are learned, ALiBi's or none")
        return cls(turns)

    def module_of(self, index: int) -> nn.Module | None:
        """The attention module of layer number `index`; None where that is none of the model's."""
        return next((module for module in self.turns if module.layer_idx == index), None)

    def rotates(self, module: nn.Module) -> bool:
        """Whether the attention module turns its keys at all: some layers of SmolLM3, Cohere 2 or Llama 4 do not."""
        return self._turn(module) is not None

    def tables(self, module: nn.Module, positions: Tensor) -> Angles:
        """The model's cos and sin for an attention module, attention scaling (YaRN's) included.

        positions: int [B, n]. Returns float32 [B, n, width] on their device. The model's function alone knows which
        channels a column turns; most models have a column a channel, GPT-J and Llama 4 one a pair. Width 0 where the
        module turns nothing.
        """
        turn = self._turn(module)
        _check_integers(positions)
        if positions.ndim != 2:
            raise ValueError(f"tables are made for positions [B, n], not {list(positions.shape)}")
        if turn is None:
            nothing = torch.empty(*positions.shape, 0, device=positions.device)
            return nothing, nothing
        return turn.table(positions, torch.float32)

    def rotate(self, module: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        """x as the attention module turns it at `positions`.

        x: [B, heads, n, D] of any floating dtype; positions: int [B, n], [1, n], or per head [B, heads, n]. Returns
        x's shape and dtype, computed in float32 (float64 for float64). A layer that turns nothing gives x itself.
        Raises ValueError where shapes or dtypes do not fit, or the module is none of the model's.
        """
        return self._turned(module, x, (positions,), _forward)

    def unrotate(self, module: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        """x as it was before the attention module turned it at `positions`; shapes, dtypes and errors as `rotate`.

        The attention scaling is divided out. In float32 the relative error is about 2e-7 at any position.
        """
        return self._turned(module, x, (positions,), _backward)

    def shift(self, module: nn.Module, x: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """x, turned at `old`, as if turned at `new`; shapes, dtypes and errors as `rotate`, for either.

        This is rotate(unrotate(x)) by one rotation; the attention scaling stays.
        """
        return self._turned(module, x, (old, new), _between)

    def _turned(
        self, module: nn.Module, x: Tensor, positions: tuple[Tensor, ...], angles: Callable[..., Angles]
    ) -> Tensor:
        turn = self._turn(module)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(f"x must be [B, heads, n, D] of a floating dtype, not {list(x.shape)} of {x.dtype}")
        batch, heads, tokens, channels = x.shape
        for p in positions:
            _check_integers(p)
            fits = p.ndim == 2 or (p.ndim == 3 and p.shape[1] in (1, heads))
            if not fits or p.shape[0] not in (1, batch) or p.shape[-1] != tokens:
                raise ValueError(f"positions {list(p.shape)} do not fit x {list(x.shape)}: [B, n] or [B, heads, n]")
        if turn is None:
            return x
        if channels != turn.channels:
            raise ValueError(f"x has {channels} channels a head, {type(module).__name__} has {turn.channels}")
        return turn.by(x, positions, angles)

    def _turn(self, module: nn.Module) -> "Turn | None":
        if module not in self.turns:
            why = "it is none of the model's attention modules" if self.turns else "it came without its model"
            raise ValueError(f"this Rotary does not know the {type(module).__name__}: {why}; see Rotary.of(model)")
        return self.turns[module]

    def __copy__(self) -> "Rotary":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotary":
        return self

    def __reduce__(self) -> tuple[type["Rotary"], tuple[()]]:
        return Rotary, ()


def _check_integers(positions: Tensor) -> None:
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integers, not {positions.dtype}")


# What to turn by, of the tables at one position or at two.


def _forward(cos: Tensor, sin: Tensor) -> Angles:
    return cos, sin


def _backward(cos: Tensor, sin: Tensor) -> Angles:
    square = cos * cos + sin * sin
    return cos / square, -sin / square


def _between(cos: Tensor, sin: Tensor, new_cos: Tensor, new_sin: Tensor) -> Angles:
    square = cos * cos + sin * sin
    return (new_cos * cos + new_sin * sin) / square, (new_sin * cos - new_cos * sin) / square


@dataclass(frozen=True)
class Table:
    """A rotary module and the arguments by which the decoder calls it for some layers (Gemma 3: the layers' type)."""

    rotary: nn.Module
    options: tuple[tuple[str, Any], ...]
    columns: int
    sin_first: bool
    axes: int  # positions are given so many times over (text models made for images); 0: once

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """cos and sin [B, n, width] of int positions [B, n], in float32 or float64, on the device of `positions`."""
        device = positions.device
        buffers = dict(self.rotary.named_buffers())
        if buffers and not any(name.endswith("inv_freq") for name in buffers):
            device = next(iter(buffers.values())).device  # GPT-J's keeps all its rows, and where they are
        like = torch.empty((), dtype=dtype, device=device)
        given = positions.to(device)
        given = given.expand(self.axes, *given.shape) if self.axes else given
        made = self.rotary(like, position_ids=given, **dict(self.options))
        first, second = (made.real, made.imag) if isinstance(made, Tensor) else made
        cos, sin = (second, first) if self.sin_first else (first, second)
        return cos.to(positions.device, dtype), sin.to(positions.device, dtype)


@dataclass(frozen=True)
class Turn:
    """How an attention module turns: its table, the model's function and how that is called."""

    table: Table
    function: Callable[..., Any]
    takes: tuple[str, ...]  # the function's parameters, up to the last one of the table
    heads_last: bool  # it wants [B, n, heads, D]
    width: int  # channels that turn, the first ones of a head
    channels: int  # of a head

    def by(self, x: Tensor, positions: tuple[Tensor, ...], angles: Callable[..., Angles]) -> Tensor:
        """x [B, heads, n, D] turned by the `angles` of the tables at each of `positions`, [B or 1, (heads or 1,) n]."""
        batch, heads, tokens, channels = x.shape
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if any(p.ndim == 3 for p in positions):  # heads become rows
            y = y.reshape(batch * heads, 1, tokens, channels)
            each = (p if p.ndim == 3 else p[:, None] for p in positions)
            positions = tuple(p.expand(batch, heads, tokens).reshape(batch * heads, tokens) for p in each)
        tables = chain.from_iterable(self.table(p.to(x.device), y.dtype) for p in positions)
        return self._apply(y, *angles(*tables)).reshape(x.shape).to(x.dtype)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The model's function on x [B, heads, n, D], with tables [B or 1, n, columns]."""
        axis = 2 if self.heads_last else 1
        part = x[..., : self.width].transpose(1, axis)
        split = "cos" in self.takes
        # what the function turns besides (keys beside queries): no head, or one where complex numbers forbid none
        spare = part.narrow(axis, 0, 0 if split else 1)
        table = {"cos": cos, "sin": sin} if split else {self.takes[-1]: torch.complex(cos, sin)}
        made = self.function(*(table.get(name, spare if i else part) for i, name in enumerate(self.takes)))
        made = (made if isinstance(made, Tensor) else made[0]).transpose(1, axis)
        return made if self.width == self.channels else torch.cat((made, x[..., self.width :]), dim=-1)


# Finding out, once a model.


@dataclass
class Call:
    """What reaches a decoder layer: its arguments by name, its input, its table."""

    arguments: dict[str, Any]
    hidden: Tensor
    table: Table | None


class _Refused(NotImplementedError):
    """The rotation of a model cannot be undone."""


class _Followed(Exception):
    """Every layer was called."""


class _Stored(Exception):
    """What an attention module stores: keys and values."""


class StandIn(nn.Module):
    """A module whose call is another's, and which is the real module in everything else."""

    def __init__(self, real: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.__dict__.update(real=real, call=call)  # no child of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["call"](self.__dict__["real"], *args, **kwargs)


class Follower:
    """Notes, while a decoder runs on stand-ins, which tables its rotary modules make and which layer gets which."""

    def __init__(self, layers: set[nn.Module]):
        self.layers = layers
        self.made: list[tuple[Tensor, Table]] = []
        self.calls: dict[nn.Module, Call] = {}
        self.hidden: Tensor | None = None  # what the first layer got

    def rotary(self, rotary: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands for a rotary module: the same tables."""
        made = rotary(*args, **kwargs)
        first = _first(made)
        options = dict(list(_arguments(rotary, args, kwargs).items())[1:])  # the first is there for dtype and device
        position_ids = options.pop("position_ids", None)
        if first is None or position_ids is None or any(isinstance(value, Tensor) for value in options.values()):
            _refuse(rotary, "its tables are not made of position_ids alone")
        sin_first = not isinstance(made, Tensor) and not first.reshape(-1, first.shape[-1])[0].any()
        axes = position_ids.shape[0] if position_ids.ndim == 3 else 0
        table = Table(rotary, tuple(options.items()), first.shape[-1], bool(sin_first), axes)
        again = table(torch.tensor([POSITIONS], device=first.device), torch.float32)[sin_first]
        seen = first.real.float()
        precision = torch.finfo(first.real.dtype).eps * 2 * float(seen.abs().max())
        if again.shape != seen.shape or float((again - seen).abs().max()) > precision:
            _refuse(rotary, "its tables are not those of the positions that the model was given")
        self.made.append((first, table))
        return made

    def layer(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for a decoder layer: hands its input on."""
        arguments = _arguments(layer, args, kwargs)
        if self.hidden is None:
            self.hidden = next(value for value in arguments.values() if isinstance(value, Tensor))
        got = [(value.data_ptr(), value.shape) for value in map(_first, arguments.values()) if value is not None]
        tables = [table for made, table in self.made if (made.data_ptr(), made.shape) in got]
        table = tables[0] if tables else None
        if table is None and arguments.get("position_embeddings") is not None:
            _refuse(layer, "it gets tables that its decoder changed after the rotary module made them")
        if len(tables) > 1 or self.calls.setdefault(layer, Call(arguments, self.hidden, table)).table != table:
            _refuse(layer, "it gets more than one rotary table")
        if self.calls.keys() == self.layers:
            raise _Followed
        return self.hidden  # also where the decoder takes the first of a layer's outputs, since each gets the same


class Tap:
    """An empty cache for one attention module, which ends its forward pass at what it stores."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Stored(keys, values)


def _refuse(module: nn.Module, why: str, error: Exception | None = None) -> NoReturn:
    raise _Refused(f"the rotation of {type(module).__name__}'s keys cannot be undone: {why}") from error


def _decoder(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The text decoder and the names of its lists of layers."""
    get = getattr(model, "get_decoder", None)  # of some models it gets something else
    for parent in chain.from_iterable(top.modules() for top in ([get(), model] if callable(get) else [model])):
        children = [(n, child) for n, child in parent.named_children() if isinstance(child, nn.ModuleList)]
        lists = [name for name, child in children if any(_attentions(layer, parent) for layer in child)]
        if lists:
            return parent, lists
    _refuse(model, "no attention layers were found in it")


def _attentions(layer: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules in a decoder layer that attend, and store keys, of the sequence itself."""
    types = getattr(getattr(decoder, "config", None), "layer_types", None) or []

    def attends(module: nn.Module) -> bool:
        name, index = type(module).__name__, getattr(module, "layer_idx", None)
        linear = index is not None and index < len(types) and "linear" in types[index]
        return index is not None and not linear and "Attention" in name and "Cross" not in name

    found = [module for module in layer.modules() if attends(module)]
    return [m for m in found if not any(inner in found for inner in list(m.modules())[1:])]


def _is_rotary(module: nn.Module) -> bool:
    return "Rotary" in type(module).__name__


def _check_tables(decoder: nn.Module, model: nn.Module) -> None:
    """Refuses a decoder without tables, or with one that is no function of the one position that attention is told."""
    rotaries = [module for module in decoder.modules() if _is_rotary(module)]
    if not rotaries and any(map(_is_rotary, model.modules())):
        _refuse(decoder, "its rotary embedding module is not where its layers are called")
    if not rotaries:
        _refuse(decoder, "it has no rotary embedding module; learned positions and ALiBi do not turn keys")
    for rotary in rotaries:
        kinds = getattr(rotary, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if "dynamic" in str(kind) or kind == "longrope":
                _refuse(decoder, f'its rotary table changes with the length (rope_type "{kind}"), stored keys do not')
        if hasattr(rotary, "mrope_section") and hasattr(getattr(model, "config", None), "vision_config"):
            _refuse(decoder, "an image gives its tokens three positions, attention is told one; load the text model")


def _follow(decoder: nn.Module, lists: list[str]) -> dict[nn.Module, Call]:
    """What the decoder calls its layers with, over one token at POSITIONS."""
    follower = Follower({layer for name in lists for layer in getattr(decoder, name)})

    def stand_in(module: nn.Module) -> nn.Module:
        if module in follower.layers:
            return StandIn(module, follower.layer)
        if _is_rotary(module):
            return StandIn(module, follower.rotary)
        return nn.ModuleList(map(stand_in, module)) if isinstance(module, nn.ModuleList) else module

    copy = object.__new__(type(decoder))  # shares everything but its children
    children = {name: stand_in(child) for name, child in decoder.named_children()}
    copy.__dict__ = {**decoder.__dict__, "_modules": {**decoder._modules, **children}, "training": False}
    weight = next((p for p in decoder.parameters() if p.device.type != "meta"), torch.empty(0))
    positions = torch.tensor([POSITIONS], device=weight.device)
    try:
        type(decoder).forward(copy, input_ids=torch.ones_like(positions), position_ids=positions, use_cache=False)
    except _Followed:
        pass
    except _Refused:
        raise
    except Exception as error:
        _refuse(decoder, f"its forward pass could not be followed from the tables to the layers ({error})", error)
    for layer in follower.layers - follower.calls.keys():
        if _attentions(layer, decoder):
            _refuse(layer, "its decoder does not call it")
    return follower.calls


def _turn_of(attention: nn.Module, call: Call, known: Mapping[nn.Module, Turn | None]) -> Turn | None:
    """How an attention module turns its keys, proved on the keys that it stores; None where it does not turn them."""
    if getattr(attention, "is_kv_shared_layer", False):  # it reads what another layer of its kind stored
        for other, turn in known.items():
            if type(other) is type(attention) and turn is not None and turn.table == call.table:
                return turn
    keys, values = _stored(attention, call)
    if keys.ndim != 4 or keys.shape[2] != len(POSITIONS):
        _refuse(attention, f"it stores keys {list(keys.shape)}, not [B, heads, n, D]")
    if not _equal(values, values):
        _refuse(attention, "what it stores as values depends on the position too (latents, as in MLA)")
    if _equal(keys, keys):
        return None
    if call.table is None:
        _refuse(attention, "its keys depend on the position, but no rotary table reaches it")
    functions = list(_functions(attention))
    if not functions:
        _refuse(attention, f"{type(attention).__module__} has no function apply_rotary...")
    for turn in _ways(call.table, functions, keys.shape[-1]):
        if _fits(turn, keys) and (turn in known.values() or _is_rotation(turn, keys.device)):
            return turn
    names = sorted({getattr(function, "__name__", type(function).__name__) for function, _ in functions})
    _refuse(attention, f"the keys it stores are not one key turned by {' or '.join(names)}, but something else too")


def _stored(attention: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
    """The keys and values that an attention module stores for one token at POSITIONS."""
    weight = next(chain(attention.parameters(), attention.buffers()), call.hidden)
    device = call.hidden.device if weight.device.type == "meta" else weight.device
    token = torch.randn(call.hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    hidden = token.to(device, call.hidden.dtype).expand(1, len(POSITIONS), -1)
    parameters = inspect.signature(type(attention).forward).parameters
    cache = next((name for name in CACHES if name in parameters), None)
    if cache is None:
        _refuse(attention, "its forward pass takes no cache")
    wanted = set(list(parameters)[2:])
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        wanted.add("position_ids")
    given = {name: _moved(value, device) for name, value in call.arguments.items() if name in wanted}
    try:
        attention.forward(hidden, **{**given, cache: Tap()})
    except _Stored as stored:
        keys, values = stored.args
        return keys, values
    except Exception as error:
        _refuse(attention, f"its forward pass could not be followed to its cache ({error})", error)
    _refuse(attention, "its forward pass stores no keys")


def _functions(attention: nn.Module) -> Iterator[tuple[Callable[..., Any], tuple[str, ...]]]:
    """The functions apply_rotary... beside the attention's class, with their parameters up to the table's last."""
    for cls in type(attention).__mro__:
        for name, function in vars(sys.modules[cls.__module__]).items():
            if name.startswith("apply_rotary") and callable(function):
                takes = list(inspect.signature(getattr(function, "forward", function)).parameters)
                last = max((i for i, n in enumerate(takes) if n in ("cos", "sin") or n.startswith("freqs")), default=0)
                if last:
                    yield function, tuple(takes[: last + 1])


def _ways(table: Table, functions: list[tuple[Callable[..., Any], tuple[str, ...]]], channels: int) -> Iterator[Turn]:
    """The ways to turn that may be meant: which function, where heads are, one channel a table's column or two."""
    for (function, takes), width, heads_last in product(functions, (table.columns, 2 * table.columns), (False, True)):
        if width <= channels:
            yield Turn(table, function, takes, heads_last, width, channels)


def _fits(turn: Turn, keys: Tensor) -> bool:
    """Whether `turn` turns the keys stored at POSITIONS back into one key."""
    positions = torch.tensor([POSITIONS], device=keys.device)
    try:
        return _equal(turn.by(keys.float(), (positions,), _backward), keys)
    except (RuntimeError, IndexError, ValueError, TypeError):  # the function is not meant to be called so
        return False


def _is_rotation(turn: Turn, device: torch.device) -> bool:
    """Whether the inverse undoes `turn`, a shift is both, products depend on distances alone, and inputs stay."""
    positions = torch.tensor([POSITIONS], device=device)
    start = torch.zeros_like(positions)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 1, 3, len(POSITIONS), turn.channels, generator=generator).to(device)
    there = turn.by(given := x.clone(), (positions,), _forward)
    back = turn.by(there, (positions,), _backward)
    shifted = turn.by(there, (positions, start), _between)
    near, far = (turn.by(x, (positions + s,), _forward) * turn.by(y, (start + s,), _forward) for s in (0, 1))
    errors = (given - x, back - x, shifted - turn.by(x, (start,), _forward), (near - far).sum(-1) / turn.channels)
    return all(float(error.abs().max()) < 1e-5 for error in errors)


def _equal(vectors: Tensor, like: Tensor) -> bool:
    """Whether the tokens of `vectors` [B, heads, n, D] are equal, channel by channel, to the precision of `like`'s."""
    size = like.float().abs().amax(2)
    size = size + size.median(-1, keepdim=True).values  # a few large channels excuse no other's error
    error = (vectors.float() - vectors[:, :, :1].float()).abs().amax(2)
    return bool((error <= max(16 * torch.finfo(like.dtype).eps, 1e-3) * size).all())


def _first(value: Any) -> Tensor | None:
    """A table's first tensor; None of what is no table."""
    value = value[0] if isinstance(value, (tuple, list)) and len(value) == 2 else value
    return value if isinstance(value, Tensor) else None


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A module's arguments by name, in the order of its parameters."""
    signature = inspect.signature(type(module).forward)
    arguments = dict(signature.bind(module, *args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return dict(list(arguments.items())[1:])


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value
