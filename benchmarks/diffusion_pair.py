"""A masked-diffusion model and an autoregressive one, trained alike, read 1 to 8 times the length they were trained on.

    python -m benchmarks.diffusion_pair --device cuda --train 400 --save FOLDER --out FILE     # make and judge them
    python -m benchmarks.diffusion_pair --device cuda --load FOLDER --only steps --out FILE    # judge them again
    python -m benchmarks.diffusion_pair --device cuda --kind diffusion --train 240 ...      # one, after short rows
    python -m benchmarks.diffusion_pair --plot FILE [--plot FILE] --out PNG

Two Llamas of 26 million parameters with SmolLM2's tokenizer: one looks in both directions, and its loss is over k of a
row's tokens, masked, one to all as often (as in `diffusion.loss_bound`); one is causal. For the first fifth of the time
there is only the causal one, and rows have 32 tokens: among few, what to copy is found soon. Then both kinds go on from
its weights, as Dream and DiffuLLaMA came from causal models; so diffusion's logits, too, are of the next token. From
there every step gives both the same rows of 512 tokens. Of all rows, a quarter is text of books, all of whose tokens
count, half text with facts in it ("We call Amber Julia Harbor.") that are asked for at its end, whose answers count, a
quarter nothing but names of facts with their words ("Amber Julia Harbor"), said again and again, which count from the
second time on. Two books are held out for all that is judged.
LongLLaDA (arXiv 2506.14429) measured 8B models so; what it found is asked of these: perplexity and retrieval by length
and depth, with rotary bases multiplied by what the scaling law says and by more, and by the number of sampling steps.

FILE gets a line of JSON for every figure as it is there: perplexity in nats a token over the same 64 tokens at every
length, diffusion's an upper bound; retrieval as the share of answers with every word right, and of words.
"""

import argparse
import copy
import itertools
import json
import math
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import plot_diffusion_pair
from longwave import diffusion
from longwave.cli.console import show_table
from longwave.evals.data import data_folder
from longwave.models import load_tokenizer, locate
from longwave.rotary import ntk_factor, ntk_reach

BASE, WORDS = 10_000.0, 2  # of the rotary tables; words of an answer, a token each
NAMES = 64  # that facts are made of
ROWS = ("text", "repeated", "asked", "asked")  # of a step, in turns
ALONE = 0.2  # of the time: what the causal model has, on short rows, before there is another
HELD_OUT = ("10762_impressions_of_theophrastus_such.txt", "28444_turn_about_eleanor.txt")
PARTS = ("perplexity", "needle", "factors", "steps")
KINDS = ("diffusion", "autoregressive")
FASTEST, WARMUP = 1e-3, 100  # learning rate and the steps up to it
SPREAD = 0.1  # of embeddings at first
MAKERS = 4  # processes that make rows, for a GPU


@dataclass(frozen=True)
class Size:
    """Shape, training and how much is judged. rows: of a step, which has as many tokens in short ones. lengths: in
    contexts."""

    hidden: int = 320
    layers: int = 8
    heads: int = 5
    context: int = 512
    short: int = 32  # tokens of the first rows
    rows: int = 16  # few: it is steps that teach to copy, more than tokens
    characters: int | None = None  # of a book, None: all
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    depths: int = 11
    samples: int = 20  # of a cell of depth and length
    windows: int = 48  # that perplexity is the mean of
    scored: int = 64

    @property
    def channels(self):
        return self.hidden // self.heads


SMALL = Size(128, 4, 4, 128, 32, 8, None, scored=32)
TINY = Size(32, 2, 2, 64, 32, 4, 12_000, (1, 2), 2, 2, 2, 8)


def number_of(draw, least, most):
    """Of facts in a row, few as often as many: among few, any of their words is nearly the right one. No more than
    there are names for."""
    most = min(most, NAMES // (1 + WORDS))
    return int(least * ((most + 1) / least) ** draw.random())


class Texts:
    """Token numbers of books, and text with facts in it."""

    def __init__(self, tokenizer, size):
        self.size = size
        folder = data_folder()
        files = sorted((*folder.glob("books/*/*.txt"), *folder.glob("haystack_pd/*.txt")))
        encoded = {file.name: tokenizer(file.read_text()[: size.characters], verbose=False).input_ids for file in files}
        self.held_out = [token for name in HELD_OUT for token in encoded.pop(name)]
        self.books = np.concatenate(list(encoded.values()))  # a stretch may run from one into the next
        self.before, self.end = (tokenizer(part, verbose=False).input_ids for part in ("\nWe call", ".\n"))
        words = tokenizer.get_vocab()
        names = sorted(words[word] for word in words if re.fullmatch("Ġ[A-Z][a-z]{3,9}", word))
        self.names = np.array(names[:NAMES])  # the commonest: pairs of a tokenizer were joined in the order of number
        self.form = np.array([*self.before, *[-1] * (1 + WORDS), *self.end])  # of a fact: name and words are neighbours
        self.is_word = (self.form < 0) & (np.arange(len(self.form)) > len(self.before))

    def question(self, name):
        return [*self.before, name]

    def _facts(self, draw, count):
        """Name and words of so many facts, [count, 1 + WORDS], all of them different: whoever copies any word of the
        row is already better than one who guesses, which digits would not reward."""
        return draw.permutation(self.names)[: count * (1 + WORDS)].reshape(count, 1 + WORDS)

    def told(self, facts):
        """What says each of them, [count, tokens]."""
        told = np.tile(self.form, (len(facts), 1))
        told[:, self.form < 0] = facts
        return told

    def _stretches(self, draw, count, tokens):
        starts = draw.integers(len(self.books) - tokens, size=(count, 1))
        return self.books[starts + np.arange(tokens)]

    def rows(self, draw, tokens):
        """A step's rows int64 [rows, tokens], and which tokens count, bool of the same shape."""
        ids = self._stretches(draw, self.size.rows * self.size.context // tokens, tokens)
        counts = np.ones(ids.shape, dtype=bool)
        for number in range(len(ids)):
            kind = ROWS[number % len(ROWS)]
            if kind != "text":
                make = self._asked if kind == "asked" else self._repeated
                ids[number], counts[number] = make(draw, ids[number])
        return torch.from_numpy(ids), torch.from_numpy(counts)

    def _repeated(self, draw, text):
        """Facts without their form, said in any order until the row is full: words count from the second time on. That
        words can be copied is learned here, where most tokens teach it. Facts have 1 to WORDS words: of one length,
        their words would be found by counting positions."""
        facts = self._facts(draw, number_of(draw, 2, len(text) // (1 + WORDS) // 2))
        lengths = draw.integers(2, 1 + WORDS, size=(len(facts), 1), endpoint=True)
        order = draw.integers(len(facts), size=len(text) // 2)
        counts = np.ones((len(order), 1 + WORDS), dtype=bool)
        counts[:, 0] = counts[np.unique(order, return_index=True)[1]] = False
        said = (np.arange(1 + WORDS) < lengths)[order]
        return facts[order][said][: len(text)], counts[said][: len(text)]

    def _asked(self, draw, text):
        """Facts in text that are all asked for at its end; half of them not far from it. The row ends in an answer."""
        each, ended = len(self.form), len(self.end)
        facts = self._facts(draw, number_of(draw, 1, len(text) // each // 2))
        count, told = len(facts), self.told(facts)
        behind = len(text) + ended - count * each  # where questions begin
        room = behind - count * each
        span = room if draw.random() < 0.5 else draw.integers(room, endpoint=True)
        places = room - np.sort(draw.integers(span, size=count, endpoint=True))[::-1]
        inside = ((places + each * np.arange(count))[:, None] + np.arange(each)).ravel()
        row, counts = np.empty(len(text) + ended, dtype=text.dtype), np.zeros(len(text) + ended, dtype=bool)
        between = np.ones(behind, dtype=bool)
        between[inside] = False
        row[inside], row[:behind][between] = told.ravel(), text[:room]
        row[behind:] = draw.permutation(told).ravel()
        counts[behind:] = np.tile(self.is_word, count)
        return row[:-ended], counts[:-ended]

    def needle(self, draw, tokens, depth):
        """A prompt of unseen text with one fact at `depth`, 0 its beginning and 1 its end, the answer, and how many
        tokens behind the fact the answer begins. Prompt and answer are `tokens`."""
        name, *value = self._facts(draw, 1)[0].tolist()
        asked = self.question(name)
        room = tokens - len(self.form) - len(asked) - WORDS
        start = draw.integers(len(self.held_out) - room)
        text = self.held_out[start : start + room]
        at = round(depth * room)
        return [*text[:at], *self.told([[name, *value]])[0].tolist(), *text[at:], *asked], value, room - at + len(asked)

    def windows(self, tokens, count):
        """int64 [count, tokens] of unseen text, spread over all of it."""
        last = len(self.held_out) - tokens
        starts = [round(last * number / max(1, count - 1)) for number in range(count)]
        return torch.tensor([self.held_out[start : start + tokens] for start in starts])


# training


def untrained(kind, tokenizer, size):
    words = len(tokenizer)
    config = LlamaConfig(
        vocab_size=-(-(words + 1) // 64) * 64,
        hidden_size=size.hidden,
        intermediate_size=-(-size.hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.context,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"is_causal": False, "mask_token_id": words, "logit_shift": True} if kind == "diffusion" else {}),
    )
    model = LlamaForCausalLM(config)
    # wider than all else: an optimizer's first steps, alike for all names, would leave them hard to tell apart
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=SPREAD)
    return model


def masks(counts, generator):
    """Which tokens are masked: of the n of a row that count, k of 1 .. n, each as likely, over the rows spread evenly;
    any k of them alike."""
    rows = len(counts)
    start = torch.rand((), generator=generator) + torch.randperm(rows, generator=generator)
    k = 1 + (counts.sum(-1) * (start / rows % 1)).long()
    rank = torch.rand(counts.shape, generator=generator).masked_fill(~counts, 2.0).argsort(-1).argsort(-1)
    return rank < k[:, None]


class Steps(Dataset):
    """A step's rows, and the places of the tokens each kind's loss is of, in the rows laid end to end, by its number.
    Places are found here and not on the GPU, which would have to be waited for."""

    def __init__(self, texts, seed, tokens):
        self.texts, self.seed, self.tokens = texts, seed, tokens

    def __getitem__(self, step):
        draw = np.random.default_rng([self.seed, step])
        ids, counts = self.texts.rows(draw, self.tokens)
        counts[:, 0] = False  # nothing before it speaks of it
        hidden = masks(counts, torch.Generator().manual_seed(int(draw.integers(2**63))))
        judged = {"diffusion": hidden, "autoregressive": counts}
        return ids, {kind: asked.flatten().nonzero()[:, 0] for kind, asked in judged.items()}


def step_loss(kind, model, ids, places, body=None):
    """Each row's mean loss of its tokens at `places`: [rows]. body: what stands for the model's layers, compiled."""
    flat = ids.flatten()
    given = ids if kind == "autoregressive" else flat.index_fill(0, places, model.config.mask_token_id).view_as(ids)
    last = (model.model if body is None else body)(given, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(last.index_select(0, places - 1))
    loss = cross_entropy(logits.float(), flat[places], reduction="none")
    row, none = places // ids.shape[1], loss.new_zeros(len(ids))
    return none.index_add(0, row, loss) / none.index_add(0, row, torch.ones_like(loss))


def optimizer_of(model):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=FASTEST, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def train(models, kinds, texts, seconds, seed):
    """The causal model alone on short rows; then `kinds`, all from what it is by then, on the same rows in the same
    steps, until the time is over."""
    first, size = models["autoregressive"], texts.size
    cuda = first.device.type == "cuda"
    bodies = {kind: torch.compile(x.model, dynamic=False) if cuda else x.model for kind, x in models.items()}
    optimizers = {kind: optimizer_of(model) for kind, model in models.items()}
    began, step, about = time.perf_counter(), 0, {}

    def teach(kinds, tokens, until):
        nonlocal step
        # made ahead by other processes: in this one python is what a step waits for
        steps = DataLoader(
            Steps(texts, seed, tokens),
            batch_size=None,
            sampler=itertools.count(step),
            num_workers=MAKERS if cuda else 0,
            pin_memory=cuda,
        )
        losses = {}
        for ids, places in steps:
            if (done := (time.perf_counter() - began) / seconds) >= until:
                break
            ids = ids.to(first.device, non_blocking=True)
            for kind in kinds:
                model, optimizer = models[kind], optimizers[kind]
                for group in optimizer.param_groups:
                    group["lr"] = FASTEST * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
                with torch.autocast(first.device.type, torch.bfloat16, enabled=cuda):
                    loss = step_loss(kind, model, ids, places[kind].to(first.device, non_blocking=True), bodies[kind])
                loss.mean().backward()
                losses[kind] = loss.detach().view(-1, len(ROWS)).mean(0)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 100 == 0:
                print(f"step {step}, {done:.0%} of the time: {losses_said(losses)}", flush=True)
            step += 1
        return {kind: [round(float(x), 4) for x in each] for kind, each in losses.items()}

    about["alone_loss"] = teach(["autoregressive"], size.short, ALONE)
    about["alone_steps"] = step
    models["diffusion"].load_state_dict(first.state_dict())
    optimizers["diffusion"].load_state_dict(copy.deepcopy(optimizers["autoregressive"].state_dict()))
    about["last_loss"] = teach(kinds, size.context, 1)
    return {
        "steps": step,
        "tokens": step * size.rows * size.context,
        "seconds": round(time.perf_counter() - began, 1),
        **about,
    }


def losses_said(losses):
    return "; ".join(
        f"{kind} " + ", ".join(f"{x:.2f} {row}" for row, x in zip(ROWS, each.tolist(), strict=True))
        for kind, each in losses.items()
    )


# what is kept


def weights_in(model, dtype):
    """The model, its weights in `dtype`; rotary frequencies stay float32, as in a model that is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def rounded(model):
    """The weights in 8 bits by row, as files hold them; `model` becomes what they say."""
    held = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            held[name] = parameter.data.half()
        else:
            scale = (parameter.data.abs().amax(-1, keepdim=True) / 127).half().clamp(min=1e-7)
            held[name] = (parameter.data / scale.float()).round().clamp(-127, 127).to(torch.int8)
            held[name + ".scale"] = scale
        parameter.data.copy_(said(held, name))
    return {name: tensor.cpu().contiguous() for name, tensor in held.items()}


def said(held, name):
    weight, scale = held[name].float(), held.get(name + ".scale")
    return weight if scale is None else weight * scale.float()


def save(held, kind, folder):
    """Embeddings and layers by themselves: two files of less than 16 MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, inside in (("embeddings", True), ("layers", False)):
        chosen = {name: tensor for name, tensor in held.items() if ("embed_tokens" in name) == inside}
        save_file(chosen, folder / f"{kind}-{part}.safetensors")


def load(model, kind, folder):
    held = {
        name: x
        for part in ("embeddings", "layers")
        for name, x in load_file(folder / f"{kind}-{part}.safetensors").items()
    }
    for name, parameter in model.named_parameters():
        parameter.data.copy_(said(held, name))


# judging


def with_base(model, factor):
    """The model with its rotary base multiplied."""
    if factor == 1:
        return model
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] *= factor
    made = type(model)(config).to(model.device)
    made.load_state_dict(model.state_dict())
    return weights_in(made, model.dtype)


@torch.no_grad()
def text_loss(kind, model, ids, scored):
    """Nats a token of the last `scored` tokens of each row, diffusion's an upper bound: float64 [rows]."""
    if kind == "diffusion":
        return diffusion.loss_bound(model, ids, scored=scored)
    logits = model(ids, use_cache=False, logits_to_keep=scored + 1).logits[:, :-1]
    return cross_entropy(logits.double().transpose(1, 2), ids[:, -scored:], reduction="none").mean(-1)


@torch.no_grad()
def answers(kind, model, prompts, steps):
    """What is written behind prompts of equal length: int64 [rows, WORDS]."""
    if kind == "diffusion":
        made = diffusion.generate(model, prompts, max_new_tokens=WORDS, steps=steps, stop_ids=())
    else:
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=WORDS,
            min_new_tokens=WORDS,
            do_sample=False,
        )
    return made[:, prompts.shape[1] :]


class Judge:
    """Writes a row for every figure of the two models."""

    def __init__(self, models, texts, seed, write):
        self.models, self.texts, self.size, self.seed, self.write = models, texts, texts.size, seed, write

    def perplexity(self, kind, model, factor=1):
        size = self.size
        windows = self.texts.windows(max(size.lengths) * size.context, size.windows).to(model.device)
        for times in size.lengths:
            ids = windows[:, -times * size.context :]
            losses = torch.cat([text_loss(kind, model, rows, size.scored) for rows in ids.split(8)]).tolist()
            self.write(
                part="perplexity",
                model=kind,
                factor=factor,
                times=times,
                tokens=ids.shape[1],
                loss=statistics.mean(losses),
                error=statistics.stdev(losses) / math.sqrt(len(losses)),
                perplexity=math.exp(statistics.mean(losses)),
            )

    def needle(self, kind, model, factor=1, steps=WORDS, part="needle", lengths=None):
        """A cell for every depth and length; the same questions for every model, factor and number of steps. Returns
        the share of answers that are right by length, in tokens."""
        size, means = self.size, {}
        for times in lengths or size.lengths:
            tokens, right = times * size.context, []
            for number in range(size.depths):
                depth = number / (size.depths - 1)
                draw = np.random.default_rng([self.seed, tokens, number])
                asked = [self.texts.needle(draw, tokens, depth) for _ in range(size.samples)]
                prompts = torch.tensor([prompt for prompt, _, _ in asked], device=model.device)
                wanted = torch.tensor([value for _, value, _ in asked], device=model.device)
                same = answers(kind, model, prompts, steps) == wanted
                right.append(float(same.all(-1).float().mean()))
                self.write(
                    part=part,
                    model=kind,
                    factor=factor,
                    steps=steps if kind == "diffusion" else None,
                    times=times,
                    tokens=tokens,
                    depth=depth,
                    distance=asked[0][2],
                    right=right[-1],
                    words=float(same.float().mean()),
                )
            means[tokens] = statistics.mean(right)
        return means

    def factors(self, kind, model):
        size = self.size
        law = (BASE, size.channels, size.context)
        lengths = [times * size.context for times in (2, 4, 8)]
        by_law = {ntk_factor(*law, tokens, both_signs) for tokens in lengths for both_signs in (False, True)}
        for factor in sorted({1, *by_law, 4 * max(by_law)}):
            turned = with_base(model, factor)
            if factor > 1:
                self.perplexity(kind, turned, factor)
            means = self.needle(kind, turned, factor)
            self.write(
                part="reach",
                model=kind,
                factor=factor,
                ntk=round(ntk_reach(*law, factor)),
                ntk_both_signs=round(ntk_reach(*law, factor, both_signs=True)),
                measured=reached(means),
            )

    def steps(self, kind, model):
        if kind == "diffusion":
            for steps in (1, WORDS):
                self.needle(kind, model, steps=steps, part="steps", lengths=[x for x in self.size.lengths if x <= 4])

    def __call__(self, parts):
        for part in parts:
            if part == "needle" and "factors" in parts:
                continue  # a factor of 1 is among them
            for kind, model in self.models.items():
                getattr(self, part)(kind, model)


def reached(means):
    """Tokens up to which at least half as many answers are right as at the shortest length: None where those are less
    than a tenth, and nothing was learned that could be lost."""
    lengths = sorted(means)
    if means[lengths[0]] < 0.1:
        return None
    far = [tokens for tokens in lengths if means[tokens] < means[lengths[0]] / 2]
    return max(tokens for tokens in lengths if not far or tokens < far[0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", type=float, metavar="SECONDS", help="of both models together")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="both models, in 8 bits, which is what is judged")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="what --save wrote, instead of training")
    parser.add_argument(
        "--only", choices=PARTS, action="append", metavar="PART", help=f"of {', '.join(PARTS)}; repeats"
    )
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="not both, once rows are long: rows are the same all the same"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="4 layers, rows of 128 tokens: half an hour of a CPU")
    parser.add_argument("--tiny", action="store_true", help="models that learn nothing, to see that all of it runs")
    parser.add_argument(
        "--plot", type=Path, action="append", metavar="FILE", help="draw what was measured into --out, and do no more"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.plot:
        rows = [json.loads(line) for file in args.plot for line in file.read_text().splitlines()]
        return plot_diffusion_pair.plot(rows, args.out)
    if bool(args.train) == bool(args.load):
        parser.error("give one of --train SECONDS and --load FOLDER")
    size = TINY if args.tiny else SMALL if args.small else Size()
    tokenizer = load_tokenizer(locate("smollm2-q4"))
    texts = Texts(tokenizer, size)
    device, dtype = torch.device(args.device), torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    rows = []

    def write(**row):
        rows.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    args.out.write_text("")
    about = {
        "part": "about",
        "command": sys.argv,
        "seed": args.seed,
        "context": size.context,
        "torch": torch.__version__,
    }
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about["texts"] = {"books": len(texts.books), "held_out": len(texts.held_out)}
    models = {}
    kinds = args.kind or KINDS
    for kind in KINDS if args.train else kinds:
        torch.manual_seed(args.seed)
        models[kind] = untrained(kind, tokenizer, size).to(device)
        if args.load:
            load(models[kind], kind, args.load)
    if args.train:
        about["training"] = train(models, kinds, texts, args.train, args.seed)
        models = {kind: models[kind] for kind in kinds}
    for kind, model in models.items():
        if args.train:
            held = rounded(model)
            if args.save:
                save(held, kind, args.save)
        weights_in(model, dtype)
    about["parameters"] = {kind: model.num_parameters() for kind, model in models.items()}
    write(**about)
    print(json.dumps(about), flush=True)
    began = time.perf_counter()
    Judge(models, texts, args.seed, write)(args.only or PARTS)
    write(part="done", seconds=round(time.perf_counter() - began, 1))
    show_table(
        "right answers by length, all depths",
        ["model", "factor", "steps", *(f"{times}x" for times in size.lengths)],
        plot_diffusion_pair.by_length(rows, size.lengths),
    )


if __name__ == "__main__":
    main()
