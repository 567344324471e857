"""LongICLBench (arXiv 2404.02060): many labels that are only shown in examples, one round of which has one of each.

Sets:

- "fewnerd": entities of a sentence with 66 types, from longicl/ in the data folder; prompt and score are the
  benchmark's, micro F1 over entities.
- "banking77": 77 intents, from a folder (`source`) with train and test files in any format we read, records with "text"
  and "label", names or numbers of names.json; prompt and score are the benchmark's, accuracy.
- "synthetic-like": made-up labels, each with three trigger words of which an item holds one; ours, for length sweeps.
  Its prompts end in the cue alone, where the benchmark's end in a space that its examples do not have as a token.

Examples lie `order`ed as the benchmark scatters them, "grouped" by label, or "reversed". No chat template, and nothing
is cut: a round that does not fit is refused.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longwave.checks import parse_json, read_text, whole
from longwave.evals import data
from longwave.evals.metrics import first_line
from longwave.evals.task import Judged, Sample, Setting, TextTask, chosen, listed

FEWNERD, BANKING, SYNTHETIC = "fewnerd", "banking77", "synthetic-like"
SETS = (FEWNERD, BANKING, SYNTHETIC)
ORDERS = ("scattered", "grouped", "reversed")
NEW_TOKENS = 100
TESTED = 500  # of a set
ROUNDS = (57, 114, 170, 224, 281)  # rows of Few-NERD's examples that 1 to 5 rounds take
ENTITIES = (
    "Given the sentence, please find the name entities in the sentence and their corresponding entity types in the "
    "strict format of given examples as following (Entity: EntityType):\n"
)
INTENTS = (
    "Given a customer service query, please predict the intent of the query. The predict answer must come from the "
    "demonstration examples with the exact format. The examples are as follows: \n"
)
NOTES = "Each note has a class. Say the class of the last one, as the examples do.\n"
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


@dataclass(frozen=True)
class LongICL(TextTask):
    """Many labels shown in examples: entity types, intents, made-up classes (LongICLBench)."""

    name: ClassVar[str] = "longicl"
    version: ClassVar[int] = 1
    columns: ClassVar[str] = "round"
    unit: ClassVar[str] = "accuracy or micro F1, 0 to 100"

    set: str = FEWNERD
    rounds: Any = (1,)  # examples of every label
    order: str = "scattered"
    source: str = "data"  # longicl/ in the data folder; or a folder, which banking77 needs
    labels: int = 8  # of synthetic-like
    count: int = TESTED  # items asked for, a prompt each

    def __post_init__(self) -> None:
        chosen((self.set,), SETS, "the sets of LongICLBench")  # one of them: "all" is none
        object.__setattr__(self, "rounds", listed(self.rounds, int, "rounds"))
        most = len(ROUNDS) if self.set == FEWNERD else 100
        for number in self.rounds:
            if not 1 <= number <= most:
                raise ValueError(f"rounds are from 1 to {most}, got {number}")
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}; got {self.order!r}")
        if self.order == "grouped" and self.set == FEWNERD:
            raise ValueError("fewnerd's examples hold several labels each, which cannot be grouped: another order")
        if not isinstance(self.source, (str, Path)) or not str(self.source):
            raise ValueError(f'source is "data" or a folder; got {self.source!r}')
        object.__setattr__(self, "source", str(self.source))
        if self.set == BANKING and self.source == "data":
            raise ValueError("banking77 is not in the data folder: give source=FOLDER with its train and test files")
        whole("labels", self.labels, 2)
        whole("count", self.count, 1)

    def samples(self, setting: Setting) -> list[Sample]:
        count = self.count if setting.limit is None else min(self.count, setting.limit)
        made: list[Sample] = []
        for rounds in self.rounds:
            head, items = self._items(setting, rounds, count)
            for number, (question, answers) in enumerate(items[:count]):
                ids, before = setting.encode(head + question, question, chat=False)
                setting.check_fits(len(ids), NEW_TOKENS, f"longicl at {rounds} rounds")
                meta = {"set": self.set, "round": rounds}
                made.append(Sample(f"{rounds}/{number}", ids, before, NEW_TOKENS, answers, meta))
        return made

    def judge(self, sample: Sample, output: str) -> Judged:
        if self.set == FEWNERD:
            named, gold = read_entities(output), dict(split_entity(answer) for answer in sample.answers)
            right = sum(gold.get(entity) == kind for entity, kind in named.items())
            f1 = 2 * right / (len(named) + len(gold)) if right else 0.0
            counts = {"right": float(right), "named": float(len(named)), "gold": float(len(gold))}
            return Judged(f1, named, counts)
        cue = "service query" if self.set == BANKING else "note:"
        said = first_line(output.split(cue)[0].strip()).strip().lower()
        return Judged(float(said == sample.answers[0].lower()), said)

    def total(self, rows: Sequence[Mapping[str, Any]]) -> float:
        if self.set != FEWNERD:
            return super().total(rows)
        right, named, gold = (sum(row["metrics"][name] for row in rows) for name in ("right", "named", "gold"))
        return 100 * 2 * right / (named + gold) if right else 0.0

    def _items(self, setting: Setting, rounds: int, count: int) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
        """The prompt up to the item that is asked for, and the items with their answers."""
        if self.set == FEWNERD:
            shown, asked = self._fewnerd(setting)
            texts = self._ordered([(text, "") for text in shown[: ROUNDS[rounds - 1]]])
            return ENTITIES + "".join(texts), asked
        if self.set == BANKING:
            train, test = (read_labelled(Path(self.source).expanduser(), name) for name in ("train", "test"))
            form, head = "service query: {text}\nintent category: ", INTENTS
        else:
            train, test = synthetic(random.Random(f"longicl/{self.labels}/{setting.seed}"), self.labels, rounds, count)
            form, head = "note: {text}\nclass:", NOTES
        examples = [(form.format(text=t).rstrip() + f" {label}\n", label) for t, label in in_rounds(train, rounds)]
        return head + "".join(self._ordered(examples)), [(form.format(text=t), (label,)) for t, label in test]

    def _ordered(self, examples: list[tuple[str, str]]) -> list[str]:
        if self.order == "grouped":
            examples = sorted(examples, key=lambda example: example[1])
        texts = [text for text, _ in examples]
        return texts[::-1] if self.order == "reversed" else texts

    def _fewnerd(self, setting: Setting) -> tuple[list[str], list[tuple[str, tuple[str, ...]]]]:
        if self.source == "data":
            folder = data.require(setting.data, "longicl", "longicl")
        else:
            folder = Path(self.source).expanduser()
        train, test = (folder / f"fewnerd_{name}.json" for name in ("train_10turns", "test_1800"))
        shown, asked = [], []
        for number, record in enumerate(data.read_records(train)):
            sentence, entities = entity_lines(record, f"{train}, record {number + 1}")
            shown.append(sentence + "".join(f"{line}\n" for line in entities))
        for number, record in enumerate(data.read_records(test)[:TESTED]):
            asked.append(entity_lines(record, f"{test}, record {number + 1}"))
        return shown, asked


def entity_lines(record: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """A sentence as a prompt shows it, and "entity: type" for each of its entities."""
    entities = data.field(record, "entities", where)
    if not isinstance(entities, dict) or not entities:
        raise ValueError(f"{where} has entities {entities!r}, which are not a table of types")
    sentence = data.text_field(record, "sentence", where)
    return f"Sentence: {sentence}\n", tuple(f"{entity}: {kind}" for entity, kind in entities.items())


def split_entity(line: str) -> tuple[str, str]:
    """The type comes last: an entity may hold a colon itself, and then no answer can name it."""
    entity, _, kind = line.rpartition(": ")
    return entity, kind


def read_entities(output: str) -> dict[str, str]:
    """The lines of an answer that name an entity, up to the first that does not; of two equal ones the last."""
    named: dict[str, str] = {}
    for line in output.lstrip("\n").split("\n"):
        if ": " not in line or line.lower().startswith("sentence"):
            break
        entity, kind = line.split(": ")[:2]
        named[entity] = kind
    return named


def read_labelled(folder: Path, name: str) -> list[tuple[str, str]]:
    """Texts and labels of a file."""
    path = data.find_records(folder, name)
    if path is None:
        raise ValueError(f"there is no {name}{data.FORMATS[0]} in {folder}: banking77 needs its train and test files")
    listed_in = folder / "names.json"
    names = parse_json(read_text(listed_in), listed_in) if listed_in.is_file() else None
    found = []
    for number, record in enumerate(data.read_records(path)):
        label = data.field(record, "label", f"{path}, record {number + 1}")
        if isinstance(label, int):
            if not isinstance(names, list) or not 0 <= label < len(names):
                raise ValueError(f"{path}, record {number + 1} has label {label}, which {listed_in} does not name")
            label = names[label]
        found.append((data.text_field(record, "text", f"{path}, record {number + 1}"), str(label)))
    return found


def in_rounds(items: Sequence[tuple[str, str]], rounds: int) -> list[tuple[str, str]]:
    """One item of every label a round, labels as they first come. Where a label has none left, the next one that has
    gives one more."""
    left: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        left.setdefault(item[1], []).append(item)
    labels = list(left)
    taken = []
    for _ in range(rounds):
        for place in range(len(labels)):
            own = next((left[label] for label in [*labels[place:], *labels[:place]] if left[label]), None)
            if own:
                taken.append(own.pop(0))
    return taken


def synthetic(
    draw: random.Random, labels: int, rounds: int, count: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Made-up labels, examples of them round by round, and items to ask for: eight filler words and one trigger."""
    words = [one + other for one in SYLLABLES for other in SYLLABLES]
    words += [word + end for word in words for end in SYLLABLES]
    draw.shuffle(words)
    names = [f"{words.pop()} {words.pop()}" for _ in range(labels)]
    triggers = {name: [words.pop() for _ in range(3)] for name in names}
    filler = words[:200]

    def item(name: str) -> tuple[str, str]:
        text = [*draw.sample(filler, 8), draw.choice(triggers[name])]
        draw.shuffle(text)
        return " ".join(text), name

    shown = [item(name) for _ in range(rounds) for name in draw.sample(names, labels)]
    return shown, [item(draw.choice(names)) for _ in range(count)]
