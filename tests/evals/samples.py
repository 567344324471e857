"""Tasks and samples to measure methods on."""

from array import array
from dataclasses import dataclass

from longwave.evals.causal import answer
from longwave.evals.contexts import Contexts
from longwave.evals.task import Judged, LossTask, Sample, TextTask
from tests.conftest import tokens


@dataclass(frozen=True)
class Echo(TextTask):
    """Scores the length of the output."""

    name, version = "echo", 1

    def samples(self, setting):
        raise NotImplementedError

    def judge(self, sample, output):
        return Judged(len(output) / 100, output[:1], {"length": float(len(output))})


@dataclass(frozen=True)
class Loss(LossTask):
    """Loss with a comparison."""

    name, version, compares = "loss", 1, True
    stream: bool = False

    @property
    def feed(self):
        return 1 if self.stream else None

    def samples(self, setting):
        raise NotImplementedError


def sample(name, length, context, seed=1, new=6, **options):
    ids = array("i", tokens(1, length, seed=seed)[0].tolist())
    return Sample(name, ids, context, new, ("yes",), {"length": length}, **options)


def outputs(model, tokenizer, samples, make, question="after"):
    contexts = Contexts(model, samples, 0, question)
    return {s.id: (text, cost) for s, text, cost in answer(model, tokenizer, samples, contexts, make)}
