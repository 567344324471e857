"""What a model's attention does with the K and V that its cache gives back, read from its forward pass.

A memory layer gives back a handle and answers when attention is called with it. That is right where the module hands
both, whole and once, to transformers' AttentionInterface. Whether it does is found in the source, before anything runs;
branches that the module's own attributes decide are followed as they go. Only the source is read: what a function that
K and V are not given to does elsewhere is not known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# arguments of attention that a memory layer honours, or that say nothing about what is attended to
HONOURED = {
    *("query", "key", "value", "attention_mask", "dropout", "scaling", "position_ids", "s_aux"),
    *(
        "sliding_window",
        "is_causal",
        "output_attentions",
    ),  # the mask has both; the last is refused when it is asked for
}
WORDS = {
    "softcap": "caps attention logits (soft-capping)",
    "position_bias": "adds a position bias to attention",
}


UNKNOWN = object()
NEVER = -100


@dataclass(frozen=True)
class Source:
    """A forward pass that gives K and V to a cache. kept: what it calls those that come back; interfaces: names of what
    the AttentionInterface chose; tests, told: what a module's attributes may decide, branches and arguments."""

    forward: ast.FunctionDef
    update: ast.Call
    kept: tuple[str, ...]
    interfaces: tuple[str, ...]
    tests: tuple[ast.AST, ...]
    told: tuple[ast.AST, ...]
    found: dict[Any, str | None] = field(default_factory=dict)  # by what they decide


def source_of(module: nn.Module) -> Source | None:
    """The forward pass of a module that calls a cache's `update`; None where it does not. Read once a class."""
    return _read(type(module))  # type: ignore[arg-type]  # classes of modules do hash


@functools.cache
def _read(kind: type) -> Source | None:
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if "forward" not in vars(cls):
            continue
        try:
            text = textwrap.dedent(inspect.getsource(inspect.unwrap(vars(cls)["forward"])))
            forward = ast.parse(text).body[0]
        except (OSError, TypeError, SyntaxError):  # made by a program: nothing to read
            continue
        if not isinstance(forward, ast.FunctionDef):
            continue
        updates = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and _is_update(node)]
        if updates:
            kept, interfaces = [], []
            for node in ast.walk(forward):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                    if node.value in updates:
                        kept += names
                    elif "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value):
                        interfaces += names
            tests = tuple(node.test for node in ast.walk(forward) if isinstance(node, (ast.If, ast.IfExp)))
            told = tuple(node.value for node in ast.walk(forward) if isinstance(node, ast.keyword))
            return Source(forward, updates[-1], tuple(kept), tuple(interfaces), tests, told)
    return None


def _is_update(call: ast.Call) -> bool:
    named = isinstance(call.func, ast.Attribute) and call.func.attr == "update"
    return named and any("layer_idx" in ast.unparse(part) for part in (*call.args, *call.keywords))


def why_not(module: nn.Module) -> str | None:
    """Why no handle can stand for the K and V of an attention module that has a `source_of`; None where one can.

    A phrase that goes on from the module's name: "learns attention sinks".
    """
    source = source_of(module)
    assert source is not None
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return "attends to something else than the tokens (cross-attention)"
    decided = (
        *(_truth(_value(test, module)) for test in source.tests),
        *(_value(value, module) is None for value in source.told),
        bool(getattr(module, "kv_lora_rank", None)),
    )
    if decided not in source.found:
        source.found[decided] = _why_not(module, source)
    return source.found[decided]


def _why_not(module: nn.Module, source: Source) -> str | None:
    answered: list[ast.Call] = []
    own: ast.AST | None = None
    noted: set[ast.AST] = set()
    behind = (source.update.end_lineno or 0, source.update.end_col_offset or 0)
    for node in _passed(source.forward.body, module):
        if (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)) <= behind:
            continue
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            noted.add(node.value)  # `shared[...] = keys, values`: whether other layers take them, a config tells
        if isinstance(node, ast.Call) and _is_interface(node, source):
            answered.append(node)
            noted.update(node.keywords)
        elif node in noted:
            continue
        elif own is None and any(_is_kept(child, source) for child in ast.iter_child_nodes(node)):
            own = node
    if not answered:
        return "does not call attention through transformers' AttentionInterface, so no cache can answer for it"
    if own is not None or not all(_takes_both(call, source) for call in answered):
        if getattr(module, "kv_lora_rank", None):
            return "stores latents, which it expands to K and V itself (MLA)"
        line = f" ({ast.unparse(own)})" if own is not None else ""
        return f"works with K and V itself after its cache gave them back{line}"
    if max(_asks(source.forward.body, module, source)) > 1:
        return "attends to the same K and V more than once"
    for keyword in answered[0].keywords:
        name = keyword.arg
        if name is not None and name not in HONOURED and _value(keyword.value, module) is not None:
            return WORDS.get(name, f"tells attention {name!r}, which a longwave cache does not know")
    return None


def told(module: nn.Module, name: str) -> bool:
    """Whether an attention module that has a `source_of` tells attention something by this name."""
    source = source_of(module)
    assert source is not None
    calls = [node for node in ast.walk(source.forward) if isinstance(node, ast.Call) and _is_interface(node, source)]
    return any(k.arg == name and _value(k.value, module) is not None for call in calls for k in call.keywords)


def _is_interface(call: ast.Call, source: Source) -> bool:
    if isinstance(call.func, ast.Name) and call.func.id in source.interfaces:
        return True
    return isinstance(call.func, (ast.Subscript, ast.Call)) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(call.func)


def _is_kept(node: ast.AST, source: Source) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in source.kept


def _takes_both(call: ast.Call, source: Source) -> bool:
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return len(source.kept) == 2 == sum(_is_kept(value, source) for value in given)


def _passed(nodes: list[Any], module: nn.Module) -> Iterator[ast.AST]:
    """Every node that a pass may come by, outer ones first."""
    for node in nodes:
        if isinstance(node, (ast.If, ast.IfExp)):
            yield from _passed([node.test, *(part for branch in _open(node, module) for part in branch)], module)
        else:
            yield node
            yield from _passed(list(ast.iter_child_nodes(node)), module)


def _asks(nodes: list[Any], module: nn.Module, source: Source) -> tuple[int, int]:
    """How often a pass asks for attention at most: one that ends here, and one that goes on (NEVER: none does)."""
    ended, on = NEVER, 0
    for node in nodes:
        if isinstance(node, ast.If):
            paths = [_asks(branch, module, source) for branch in _open(node, module)] or [(NEVER, 0)]
            ended = max(ended, *(on + end for end, _ in paths))
            on += max(more for _, more in paths)
        else:
            on += sum(isinstance(part, ast.Call) and _is_interface(part, source) for part in ast.walk(node))
        if isinstance(node, (ast.Return, ast.Raise)) or on < 0:
            return max(ended, on), NEVER
    return ended, on


def _open(node: ast.If | ast.IfExp, module: nn.Module) -> list[list[Any]]:
    """The branches that the module's own attributes do not close."""
    branches = [branch if isinstance(branch, list) else [branch] for branch in (node.body, node.orelse)]
    test = _truth(_value(node.test, module))
    return branches if test is UNKNOWN else branches[:1] if test else branches[1:]


def _value(node: ast.AST, module: nn.Module) -> Any:
    """What an expression of constants and the module's own attributes is; UNKNOWN for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Attribute):
        base = _value(node.value, module)
        return base if base is UNKNOWN else getattr(base, node.attr, UNKNOWN)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _truth(_value(node.operand, module))
        return value if value is UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_truth(_value(value, module)) for value in node.values]
        decides = isinstance(node.op, ast.Or)
        if decides in values:
            return decides
        return UNKNOWN if UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        left, right = (_value(side, module) for side in (node.left, node.comparators[0]))
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        return (left is right) == isinstance(node.ops[0], ast.Is)
    return UNKNOWN


def _truth(value: Any) -> Any:
    """True or False where that is plain; of a tensor or a module nobody asks."""
    return bool(value) if value is None or isinstance(value, (bool, int, float, str)) else UNKNOWN
