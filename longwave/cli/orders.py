"""What a line with a slash does in a talk."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from longwave.cli.talk import SIZE, Talk
from longwave.evals.spec import parse_spec

QUIT = "/quit"


@dataclass(frozen=True)
class Order:
    """usage: what may follow its name. what: what it does, for /help."""

    usage: str
    what: str


ORDERS = {
    "/method": Order("[NAME[:OPTION=VALUE,...]]", "hold the talk by another method: /method kivi"),
    "/budget": Order("FRACTION or SIZE", "hold it by the same method in other bytes: /budget 0.1, /budget 64MiB"),
    "/save": Order("PATH [SIZE or exact]", f"keep the talk: coded in {SIZE} of its 16-bit bytes, in SIZE, or as it is"),
    "/load": Order("PATH", "go on with what /save, or generate --save-prefix, kept"),
    "/bytes": Order("", "what is held, part by part"),
    "/help": Order("", "this"),
    QUIT: Order("", "ends the talk, as Ctrl-D does; Ctrl-C ends an answer"),
}


def obey(talk: Talk, line: str) -> str:
    """Do what a line says; what to answer. ValueError for what there is not. Ctrl-C leaves the talk as it was."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name not in ORDERS:
        raise ValueError(f"there is no {name}: /help lists what there is")
    try:
        given = shlex.split(rest) if name in ("/save", "/load") else []
        if name == "/method" and not rest:
            return str(talk.memory.method)
        if name == "/method":
            return change(talk, rest)
        if name == "/budget" and rest:
            return talk.change(talk.memory.method.method, rest)
        if name == "/save" and len(given) in (1, 2):
            return talk.save(*given)
        if name == "/load" and len(given) == 1:
            return talk.load(*given)
        if name == "/bytes" and not rest:
            return talk.bytes()
        if name == "/help" and not rest:
            return "\n".join(f"{name} {order.usage}".strip() + f": {order.what}" for name, order in ORDERS.items())
    except KeyboardInterrupt:
        return "stopped: the talk is as it was"
    raise ValueError(f"{name} is followed by {ORDERS[name].usage or 'nothing'}; /help says more")


def change(talk: Talk, spec: str) -> str:
    """Hold a talk by the method that "NAME:option=value" says, and its budget where it has one."""
    from longwave.methods import get_method

    name, options = parse_spec(spec)
    budget = options.pop("budget", None)
    return talk.change(get_method(name, **options), budget)
