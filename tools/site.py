"""A hook of mkdocs: the site has no source tree around it, so what links there becomes its path in the repository."""

import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./|results(?=[/)]))[^)\s]*)\)")
PAGES = (".md", ".html", ".png", ".svg")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[text](../longwave/ops/x.py)` -> `text (longwave/ops/x.py)`, folders of results alike."""

    def told(link: re.Match[str]) -> str:
        text, target = link.groups()
        if target.partition("#")[0].endswith(PAGES):
            return link[0]
        path = target.removeprefix("../") if target.startswith("../") else f"docs/{target}"
        return text if path in text else f"{text} (`{path}`)"

    return OUTSIDE.sub(told, markdown)
