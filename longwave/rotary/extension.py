"""Reading beyond the trained length without training: other frequencies in the model's own rotary modules.

A rule says what becomes of the rotary parameters; the tables are made by the model's own module, by transformers'
functions where it has them (linear, dynamic, yarn) and by two of ours, which it then knows by name: Giraffe's (arXiv
2308.10882). Nothing else changes: no weight, no position. docs/extension.md has the formulas.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longwave.checks import nearest, whole
from longwave.rotary.laws import ntk_factor

MARK = "longwave_extension"  # what a text config says of its extension; saved with it
FULL = "full_attention"  # the layers whose distances grow with the context, where tables are given by layer type


@dataclass(frozen=True)
class Extension:
    """What `extend` did: a model trained on `trained` tokens, with frequencies of `base`, reads `tokens` by `rule`.

    parameters: what it set. The law of "ntk" may find that the base reaches so far already: the factor is 1 then.
    both_signs: the factor by the law of "ntk_both_signs", said of a bidirectional model extended by "ntk".
    """

    rule: str
    trained: int
    tokens: int
    base: float
    parameters: dict[str, Any]
    both_signs: int | None = None

    def __str__(self) -> str:
        other = {name: value for name, value in self.parameters.items() if name not in ("rope_type", "rope_theta")}
        said = [f"{name}={value:g}" for name, value in other.items()]
        if (theta := self.parameters.get("rope_theta")) is not None:
            said = [f"rotary base {self.base:,.0f} x {theta / self.base:.4g}"]
        if self.both_signs is not None:
            said.append(f"x {self.both_signs} by ntk_both_signs, as this model is trained on distances of both signs")
        return f"{self.trained:,} trained tokens extended to {self.tokens:,} by {self.rule}: {', '.join(said)}"


# The rules: from the trained base, the channels that turn, the trained and the wanted length to rotary parameters.

Rule = Callable[..., dict[str, Any]]


def _ntk(base: float, dim: int, trained: int, tokens: int) -> dict[str, Any]:
    return {"rope_theta": base * ntk_factor(base, dim, trained, tokens)}


def _ntk_both_signs(base: float, dim: int, trained: int, tokens: int) -> dict[str, Any]:
    return {"rope_theta": base * ntk_factor(base, dim, trained, tokens, both_signs=True)}


def _ntk_fixed(base: float, dim: int, trained: int, tokens: int) -> dict[str, Any]:
    return {"rope_theta": base * (tokens / trained) ** (dim / (dim - 2))}


def _linear(base: float, dim: int, trained: int, tokens: int) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": tokens / trained}


def _dynamic(base: float, dim: int, trained: int, tokens: int) -> dict[str, Any]:
    return {"rope_type": "dynamic", "factor": tokens / trained}


def _yarn(
    base: float,
    dim: int,
    trained: int,
    tokens: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
) -> dict[str, Any]:
    made = {"rope_type": "yarn", "factor": tokens / trained, "original_max_position_embeddings": trained}
    made |= {"beta_fast": beta_fast, "beta_slow": beta_slow}
    return made if attention_factor is None else {**made, "attention_factor": attention_factor}


def _truncated(base: float, dim: int, trained: int, tokens: int, *, context: int | None = None) -> dict[str, Any]:
    context = trained if context is None else whole("context", context, 1, "tokens")
    return {"rope_type": "giraffe_truncated", "context": context}


def _power(base: float, dim: int, trained: int, tokens: int, *, exponent: float | None = None) -> dict[str, Any]:
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not 0 < exponent < math.inf:
        raise ValueError(f"giraffe_power takes an exponent above 0, of (1 - 2i / d); got {exponent!r}")
    return {"rope_type": "giraffe_power", "exponent": float(exponent)}


RULES: dict[str, Rule] = {
    "ntk": _ntk,
    "ntk_both_signs": _ntk_both_signs,
    "ntk_fixed": _ntk_fixed,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "giraffe_truncated": _truncated,
    "giraffe_power": _power,
}


def extend(
    model: PreTrainedModel | PretrainedConfig,
    tokens: int,
    rule: str = "ntk",
    trained: int | None = None,
    **options: Any,
) -> Extension:
    """Give a model, or a config before its model is built, the rotary tables that `rule` has for `tokens` tokens.

    rule: a name in RULES. options: its own, "yarn": beta_fast, beta_slow, attention_factor; "giraffe_truncated":
    context, in tokens (the trained length); "giraffe_power": exponent, to be said. trained: tokens that the model was
    trained on, its max_position_embeddings where not said. Where layers with a window have tables of their own, those
    stay as they are.

    The config names the new length and parameters and can be saved; one with a Giraffe rule is read back by
    longwave.load. What was done is logged. Caches filled before hold keys that were turned otherwise.
    Raises ValueError for a rule, an option or a length that does not fit, NotImplementedError with the reason for a
    model whose tables are none of `rope_parameters`' plain ones; the model is then as it was.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; {nearest(rule, RULES)}")
    known = [p.name for p in inspect.signature(RULES[rule]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ValueError(f"{rule} has no option {name!r}; {nearest(name, known) if known else 'it has none'}")
    config = (model if isinstance(model, PretrainedConfig) else model.config).get_text_config(decoder=True)
    rope = _plain(config)
    if trained is None:
        trained = getattr(config, "max_position_embeddings", None)
    whole("trained", trained, 7, "tokens (the length that the model was trained on)")
    assert trained is not None
    whole("extend_to", tokens, trained + 1, f"tokens: this model reads {trained:,} as it is")
    base, dim = rope["rope_theta"], _turned_channels(config, rope)
    found = Extension(rule, trained, tokens, base, RULES[rule](base, dim, trained, tokens, **options))
    if rule == "ntk" and not getattr(config, "is_causal", True):
        found = replace(found, both_signs=ntk_factor(base, dim, trained, tokens, both_signs=True))

    register()
    made = copy.deepcopy(config)
    made.rope_parameters = _with(made.rope_parameters, found.parameters)
    # the dynamic formula of transformers has the trained length from here
    made.max_position_embeddings = trained if rule == "dynamic" else tokens
    setattr(made, MARK, {"rule": rule, "trained": trained, "tokens": tokens})
    if isinstance(model, PreTrainedModel) and made.rope_parameters != config.rope_parameters:
        for module, fresh in _modules(model, config, made):
            _install(module, fresh)
    for name in ("rope_parameters", "max_position_embeddings", MARK):
        setattr(config, name, getattr(made, name))
    logging.getLogger("longwave").info("%s", found)
    return found


def register() -> None:
    """Make our rope types known to transformers, so that a config that has one can be built."""
    ROPE_INIT_FUNCTIONS.setdefault("giraffe_truncated", truncated_frequencies)
    ROPE_INIT_FUNCTIONS.setdefault("giraffe_power", power_frequencies)


def truncated_frequencies(
    config: Any, device: Any = None, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[Tensor, float]:
    """Giraffe's truncated basis: frequencies that turn within `context` tokens stay, those just below become one that
    hardly turns, the slowest 0. float32 [d / 2] and the attention scaling, 1, as transformers' own functions."""
    frequency, rope = _frequencies(config, device, layer_type)
    least = 2 * math.pi / rope["context"]
    slow = torch.where(frequency >= least / 8, least / 16, 0.0)
    return torch.where(frequency >= least, frequency, slow), 1.0


def power_frequencies(
    config: Any, device: Any = None, seq_len: int | None = None, layer_type: str | None = None
) -> tuple[Tensor, float]:
    """Giraffe's power basis: pair i of d / 2 times (1 - 2i / d)^exponent. Returns as `truncated_frequencies`."""
    frequency, rope = _frequencies(config, device, layer_type)
    pairs = len(frequency)
    return frequency * (1 - torch.arange(pairs, device=frequency.device) / pairs) ** rope["exponent"], 1.0


def _frequencies(config: Any, device: Any, layer_type: str | None) -> tuple[Tensor, dict[str, Any]]:
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    dim = _turned_channels(config, rope)
    return rope["rope_theta"] ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim), rope


def _turned_channels(config: Any, rope: dict[str, Any]) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * rope.get("partial_rotary_factor", 1.0))


def _refuse(why: str) -> NoReturn:
    raise NotImplementedError(f"this model's rotary tables cannot be extended: {why}")


def _plain(config: Any) -> dict[str, Any]:
    """The rotary parameters of a config's full-attention layers, refused where they are not the trained, plain ones."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and "rope_theta" not in rope:
        rope = rope.get(FULL) or {}
    if rope.get("rope_theta") is None:
        _refuse("its config has no rope_parameters with a rope_theta for full-attention layers")
    if (done := getattr(config, MARK, None)) is not None:
        _refuse(f"they are extended already, from {done['trained']:,} to {done['tokens']:,} tokens: load it anew")
    kind = rope.get("rope_type", "default")
    if kind != "default":
        _refuse(f'they are of rope_type "{kind}", and the rules are of plain ones')
    return rope


def _with(ropes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    if "rope_theta" not in ropes:
        return {**ropes, FULL: {**ropes[FULL], **changes}}
    return {**ropes, **changes}


def _modules(model: nn.Module, config: Any, made: Any) -> list[tuple[nn.Module, nn.Module]]:
    """The model's rotary modules that go by `config`, each with one that goes by `made`."""
    pairs = []
    for module in model.modules():
        if "Rotary" in type(module).__name__ and getattr(module, "config", None) is config:
            try:
                fresh = type(module)(made)
            except Exception as error:
                _refuse(f"{type(module).__name__} cannot be built anew ({error})")
            theirs, ours = dict(module.named_buffers()), dict(fresh.named_buffers())
            if {name: x.shape for name, x in theirs.items()} != {name: x.shape for name, x in ours.items()}:
                _refuse(f"{type(module).__name__} makes tables of another shape of them")
            changed = getattr(fresh, "rope_type", None) != getattr(module, "rope_type", None)
            if not changed and all(not x.is_meta and torch.equal(x.cpu(), ours[name]) for name, x in theirs.items()):
                _refuse(f"{type(module).__name__} does not go by its config's rope_parameters")
            pairs.append((module, fresh))
    if not pairs:
        _refuse("it has no rotary module that goes by its config")
    return pairs


def _install(module: nn.Module, fresh: nn.Module) -> None:
    """Everything of `fresh` but its config becomes `module`'s; buffers stay where they are."""
    for name, x in fresh.named_buffers():
        module.get_buffer(name).copy_(x)
    for name, value in vars(fresh).items():
        if not name.startswith("_") and name not in ("config", "training"):
            setattr(module, name, value)
