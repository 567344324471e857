"""No circle of imports: not between files, and not between the folders and files at the top of the package."""

import ast
from pathlib import Path

import longwave

ROOT = Path(longwave.__file__).parent


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(module):
    """longwave's own modules that a file imports when it is imported, or would for its types."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    waiting = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:  # a module of that name, or something in the package
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)  # under if, try and class, too
    return {name for name in found if name in MODULES} - {module}


def circle_in(graph):
    """The names along a circle, or None."""
    done = set()

    def visit(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            found = visit(other, [*trail, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


GRAPH = {module: imported(module) for module in MODULES}


def test_files_import_each_other_in_one_direction():
    lazy = {name: {other for other in others if other != "longwave"} for name, others in GRAPH.items()}
    circle = circle_in({name: others for name, others in lazy.items() if name != "longwave"})
    assert circle is None, " -> ".join(circle or ())


def test_folders_import_each_other_in_one_direction():
    """`longwave` itself only says where names are, for whoever asks."""

    def top(module):
        return ".".join(module.split(".")[:2])

    graph = {}
    for module, others in GRAPH.items():
        if module != "longwave":
            graph.setdefault(top(module), set()).update(top(other) for other in others if other != "longwave")
    for name, others in graph.items():
        others.discard(name)
    circle = circle_in(graph)
    assert circle is None, " -> ".join(circle or ())


def test_a_circle_would_be_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle_in({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert "longwave.frame.observe" in GRAPH["longwave.frame.layer"]
    assert "longwave.methods" in GRAPH["longwave.build"]
