"""The methods, by name. A method is one file and one line here."""

import difflib
from dataclasses import fields

from longwave.methods.base import Method
from longwave.methods.dense import Dense
from longwave.methods.fourier import Fourier
from longwave.methods.kivi import Kivi

METHODS: dict[str, type[Method]] = {method.name: method for method in (Dense, Fourier, Kivi)}
PRESETS = {"fourier-paper": Fourier.paper}  # complete settings that have a name of their own


def get_method(name: str, /, **options: object) -> Method:
    """A method by name with its options, or an error that suggests the nearest name or option."""
    if name in PRESETS:
        if options:
            raise ValueError(f"{name} is a complete preset and takes no options; got {', '.join(options)}")
        return PRESETS[name]()
    if name not in METHODS:
        names = [*METHODS, *PRESETS]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    known = [field.name for field in fields(METHODS[name]) if not field.name.startswith("_")]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"{name} has no option {key!r}; {hint}")
    return METHODS[name](**options)


__all__ = ["METHODS", "PRESETS", "Dense", "Fourier", "Kivi", "Method", "get_method"]
