import json

from longwave.cli.listing import methods
from tests.cli.calls import succeeds


def test_every_method_with_its_options():
    rows = [line.split("\t") for line in succeeds("methods").stdout.splitlines()]
    assert rows[0] == ["method", "what", "options"]
    assert rows[1:] == [[name, about.what, ", ".join(about.options)] for name, about in methods().items()]
    listed = json.loads(succeeds("methods", "--json").stdout)
    assert [(item["method"], tuple(item["options"])) for item in listed] == [
        (name, about.options) for name, about in methods().items()
    ]
