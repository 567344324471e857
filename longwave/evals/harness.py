"""longwave inside EleutherAI's lm-evaluation-harness: importing this module registers the model "longwave" there.

    import lm_eval, longwave.evals.harness
    lm_eval.simple_evaluate(model="longwave", model_args="pretrained=smollm2,budget=0.25", tasks=["hellaswag"])

lm_eval has no plugins, so `python -m longwave.evals.harness` is its command line with this module imported first.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import longwave
from longwave.budget import parse_budget
from longwave.checks import nearest
from longwave.evals.pieces import Piece, branches, score, write
from longwave.evals.wish import Wish, counted
from longwave.frame import LongCache
from longwave.methods import METHODS, get_method
from longwave.models import find_device
from longwave.shape import context_limit

try:
    import lm_eval.models  # noqa: F401  # lm_eval registers its own models only where there is none yet
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"longwave.evals.harness needs lm-evaluation-harness ({error}): pip install 'longwave[lm-eval]'"
    ) from error

logger = logging.getLogger("lm_eval.longwave")  # lm_eval shows what is logged below its own name
DTYPES = ("auto", "float32", "bfloat16", "float16")


class LongwaveLM(TemplateLM):
    """A Hugging Face model that answers from a compressed cache, for every request type of the harness.

    The context of a request is read in one exact pass and compressed, except its last `question_tokens` tokens. Those
    and the continuation are fed afterwards, so every scored or generated token reads the compressed cache. Scored
    tokens are fed `step` at a time: a later chunk sees the earlier ones compressed. Requests with the same context
    (multiple choice) share one reading of it. A context of at most `question_tokens` tokens has nothing to compress
    beforehand: that is so in the first windows of a rolling log-likelihood, which the chunks alone compress.

    pretrained: hub id, local path, or "smollm2". method: a name, and its options as further arguments.
    budget, profile: as in `longwave.cache`; a budget given as a size holds for one row, so it implies batch_size 1.
    max_length: tokens of prompt and answer together, longer prompts lose their first ones; None: the model's window.
    max_gen_toks: new tokens where the task names no number. batch_size: rows of a pass.
    dtype, device: as in `longwave.load`; None is "auto".
    prefix_token_id: what stands for an empty context; None takes BOS, else EOS.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        method: str = "fourier",
        budget: float | str | None = None,
        profile: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        question_tokens: int = 1,
        step: int = 256,
        prefix_token_id: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size == "auto" or str(batch_size).startswith("auto:"):
            raise ValueError("longwave does not search for a batch size: give batch_size as a number of rows")
        self.batch_size = counted("batch_size", batch_size, "rows")
        self.question_tokens = counted("question_tokens", question_tokens, "tokens")
        self.step = counted("step", step, "tokens")
        self.max_gen_toks = counted("max_gen_toks", max_gen_toks, "tokens")
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        self._check_options(method, options)
        sized = budget is not None and parse_budget(budget)[1] is not None
        if sized and self.batch_size > 1:
            logger.info("a budget of %s is for one row: requests are run one at a time", budget)
            self.batch_size = 1
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}; got {dtype!r}")

        try:
            place = find_device(device or "auto")
        except ValueError as error:
            hint = ". lm_eval's command line asks for cuda:0 unless --device says otherwise"
            raise ValueError(f"{error}{hint if device == 'cuda:0' else ''}") from None
        extra: dict[str, Any] = {} if revision is None else {"revision": revision}
        self.model: Any
        self.model, self.tokenizer = longwave.load(
            pretrained, device=place, dtype=dtype, trust_remote_code=trust_remote_code, **extra
        )
        if not getattr(self.model.config.get_text_config(decoder=True), "is_causal", True):
            raise ValueError(
                f"{pretrained} looks in both directions, and the harness's requests are read and scored as causal "
                "text: `longwave eval` measures masked-diffusion models"
            )
        self._device = self.model.device
        self.pretrained, self.budget = str(pretrained), budget

        window = context_limit(self.model)
        limit = window if max_length is None else counted("max_length", max_length, "tokens")
        if limit is None:
            raise ValueError(f"{pretrained} names no context length: give max_length")
        if window is not None and limit > window:
            raise ValueError(f"max_length is at most this model's window of {window} tokens, got {limit}")
        self.max_length: int = limit
        longest = self.max_length if sized else None
        self._empty = longwave.cache(
            self.model, method, budget, Path(profile) if profile else None, max_tokens=longest, **options
        )
        self._prefix = prefix_token_id
        self._held = self._dense = 0.0
        self.requests = self.truncated = 0

    @staticmethod
    def _check_options(method: str, options: Mapping[str, Any]) -> None:
        """Refuse what is unknown before a model is loaded."""
        if method in METHODS:
            own = [name for name in inspect.signature(LongwaveLM).parameters if name != "options"]
            fields = [name for name in METHODS[method].__dataclass_fields__ if not name.startswith("_")]
            for name in options:
                if name not in fields:
                    hint = nearest(name, [*own, *fields])
                    raise ValueError(f"{name!r} is neither an argument of longwave nor an option of {method}; {hint}")
        if what := get_method(method, **options).beforehand():
            raise ValueError(f"the harness's requests are read plainly, and {what}")

    # what the harness asks of a tokenizer

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        for token in (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("this tokenizer has no BOS or EOS token to stand for an empty context: give prefix_token_id")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written BOS already
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.pretrained} has no chat template: leave apply_chat_template out")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # the three request types; `loglikelihood` is the base class's, which tokenises and calls `_loglikelihood_tokens`

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pieces = []
        for number, (texts, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has from 1 to {self.max_length} tokens, not {len(continuation)}, in {texts!r}"
                )
            pieces.append(self._piece(number, context, continuation))
        self._warn_truncated(pieces, [len(c) + len(d) - 1 for _, c, d in requests])
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pieces)
        for piece, answer in self._scores(pieces, "loglikelihood", disable_tqdm):
            answers[piece.number] = answer
            self.cache_hook.add_partial("loglikelihood", requests[piece.number][0], answer)
        self._log()
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        pieces: list[Piece] = []
        owner: list[int] = []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, windows):
                pieces.append(self._piece(len(pieces), context, continuation))
                owner.append(number)
        totals = [0.0] * len(texts)
        for piece, (logprob, _) in self._scores(pieces, "loglikelihood_rolling", disable_tqdm):
            totals[owner[piece.number]] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        self._log()
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        pieces: dict[Wish, list[Piece]] = {}
        lengths, flat = [], []
        for number, (text, kwargs) in enumerate(asked):
            wish = Wish.read(kwargs, self.max_gen_toks)
            room = self.max_length - wish.new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={wish.new_tokens} leaves no room for a prompt in max_length={self.max_length}"
                )
            ids = self.tok_encode(text) or [self.prefix_token_id]
            split = max(0, min(len(ids), room) - self.question_tokens)
            piece = Piece(number, tuple(ids[-room:][:split]), tuple(ids[-room:][split:]))
            pieces.setdefault(wish, []).append(piece)
            flat.append(piece)
            lengths.append(len(ids))
        self._warn_truncated(flat, lengths)
        answers = [""] * len(asked)
        with tqdm(total=len(asked), desc="longwave: generate_until", disable=disable_tqdm) as bar:
            for wish, alike in pieces.items():
                for piece, answer in self._texts(alike, wish):
                    answers[piece.number] = answer
                    self.cache_hook.add_partial("generate_until", asked[piece.number], answer)
                    bar.update()
        self._log()
        return answers

    # what was held

    def report(self) -> dict[str, Any]:
        """The setting, how many requests ran, how many lost tokens to max_length, and their bytes, summed up.

        Bytes are those held when a request is done, over those of a dense cache of the same tokens without padding.
        """
        return {
            "version": longwave.__version__,
            "method": str(self._empty.method),
            "budget": self.budget,
            "question_tokens": self.question_tokens,
            "step": self.step,
            "max_length": self.max_length,
            "requests": self.requests,
            "truncated": self.truncated,
            "bytes": round(self._held),
            "dense_bytes": round(self._dense),
            "bytes_ratio": self._held / self._dense if self._dense else None,
        }

    def get_model_info(self) -> dict[str, Any]:
        """The harness stores this in results["config"], after the evaluation."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "longwave": self.report(),
        }

    def _count(self, memory: LongCache, rows: int) -> None:
        report = memory.report()
        padding = sum(
            layer.dense_nbytes * (1 - sum(layer.rows) / (layer.batch_size * layer.columns))
            for layer in memory.memory_layers()
        )
        self.requests += rows
        self._held += report.nbytes
        self._dense += report.dense_nbytes - padding

    def _log(self) -> None:
        if self._dense:
            logger.info(
                "%s held %.3f of the dense bytes over %d requests",
                self._empty.method,
                self._held / self._dense,
                self.requests,
            )

    def _warn_truncated(self, pieces: Sequence[Piece], lengths: Sequence[int]) -> None:
        lost = [length - len(p.context) - len(p.fed) for p, length in zip(pieces, lengths, strict=True)]
        if count := sum(n > 0 for n in lost):
            self.truncated += count
            logger.warning(
                "%d of %d prompts do not fit into max_length=%d and lost their first tokens (at most %d)",
                count,
                len(pieces),
                self.max_length,
                max(lost),
            )

    # inside

    def _piece(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> Piece:
        """A pair of the harness, cut from the left to what the model reads; the last token is only predicted."""
        ids = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        split = max(0, len(ids) - len(continuation) - self.question_tokens)
        return Piece(number, tuple(ids[:split]), tuple(ids[split:-1]), tuple(continuation))

    def _branches(self, pieces: Iterable[Piece]) -> Iterator[tuple[list[Piece], LongCache, torch.Tensor, torch.Tensor]]:
        return branches(self.model, self.tokenizer, self._empty, pieces, self.batch_size)

    def _scores(
        self, pieces: Sequence[Piece], what: str, disable_tqdm: bool
    ) -> Iterator[tuple[Piece, tuple[float, bool]]]:
        with tqdm(total=len(pieces), desc=f"longwave: {what}", disable=disable_tqdm) as bar:
            for part, memory, _, mask in self._branches(pieces):
                yield from zip(part, score(self.model, self.tokenizer, part, memory, mask, self.step), strict=True)
                self._count(memory, len(part))
                bar.update(len(part))

    @torch.no_grad()
    def _texts(self, pieces: Sequence[Piece], wish: Wish) -> Iterator[tuple[Piece, str]]:
        for part, memory, first, first_mask in self._branches(pieces):
            yield from write(self.model, self.tokenizer, part, memory, first, first_mask, wish)
            self._count(memory, len(part))


# by its path, not as a class: run with -m this file is __main__, and there should be one class of that name
model_registry.register("longwave", target="longwave.evals.harness:LongwaveLM")


def main() -> None:
    """lm_eval's own command line, where --model longwave is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
