"""`longwave.generate`: `model.generate` whose steps a `StaticDecoder` takes, token for token the same."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from longwave.build import expect
from longwave.decode.steps import StaticDecoder, Unsupported, check_compiles, check_room, supports
from longwave.frame.argument import NAMES, cache_argument
from longwave.prefill.ahead import Draft, ahead_of, drafted, read_ahead
from longwave.prefill.draft import checked_mask
from longwave.shape import context_limit

# transformers' own, private, that the loop stands on, and how many arguments each is given: looked for before a prompt
# is read. It loops by them itself since 5.17 at least.
PRIVATE = {"_prefill": 3, "_optimize_model_for_decode": 0}


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    graph: bool | None = None,
    compile: bool = False,
    draft: Draft | None = None,
    **options: Any,
) -> Any:
    """`model.generate` with a `LongCache`, its steps taken by a `StaticDecoder`: same arguments, same answer.

    `cache` (or `past_key_values`) is the LongCache; the most new tokens decide the storage that is reserved, and with
    the prompt what a budget given as a size is spent on, where the cache was built without max_tokens. graph and
    compile: as in `StaticDecoder`. draft: as in `longwave.look_ahead`, by which a `speckv` cache reads the prompt.

    Raises Unsupported, a ValueError, for what only model.generate does: what `supports` names, beams and other modes
    than greedy and sampling, assistants, custom_generate, synced_gpus, token_healing, use_cache=False, attentions and
    hidden states as outputs, and model inputs that a step would need again. All this before the prompt is read; errors
    that come later, such as a step that cannot be captured, have a note that the cache holds it.
    """
    caches = [options.pop(name, None) for name in NAMES]
    cache = next((one for one in caches if one is not None), None)
    if cache is None:
        raise ValueError("longwave.generate needs a cache: pass cache=longwave.cache(model, ...)")

    def asked(name: str) -> Any:
        """An option as model.generate takes it: from its arguments, then the config given, then the model's own."""
        found = [getattr(config, name) for config in (generation_config, model.generation_config) if config is not None]
        return options.get(name, next((value for value in found if value is not None), None))

    reason = supports(model, cache) or _lacking(model)
    for name in ("assistant_model", "custom_generate", "synced_gpus"):
        reason = reason or (f"{name} changes the loop" if options.get(name) else None)
    if asked("token_healing"):
        reason = reason or "token_healing rewrites the prompt's last token"
    if reason:
        raise Unsupported(f"longwave.generate cannot do this: {reason}. model.generate works")
    if draft is not None:
        ahead_of(cache)
        if asked("prefill_chunk_size"):
            raise ValueError("a draft writes on from the whole prompt: leave prefill_chunk_size out")
    if graph and model.device.type != "cuda":
        raise ValueError(f"graph=True needs CUDA, and the model is on {model.device}")
    if compile:
        check_compiles(model)
    steps = {"graph": graph, "compile": compile}
    # transformers keeps these two to its own loops
    streamer, tokenizer, strings = options.get("streamer"), options.pop("tokenizer", None), asked("stop_strings")
    if strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={strings!r} need a tokenizer: pass tokenizer=...")
        given = options.get("stopping_criteria") or ()
        options["stopping_criteria"] = StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])
        options["stop_strings"] = None

    def loop(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Any:
        about = (streamer, steps, draft)
        return _loop(model, input_ids, logits_processor, stopping_criteria, generation_config, about, inputs)

    return model.generate(inputs, generation_config, custom_generate=loop, **cache_argument(model, cache), **options)  # type: ignore[operator]


def _lacking(model: PreTrainedModel) -> str | None:
    """Which of `PRIVATE` this transformers has not, or not as the loop calls it."""
    for name, arguments in PRIVATE.items():
        try:
            inspect.signature(getattr(model, name)).bind(*range(arguments))
        except (AttributeError, TypeError):
            return _unknown(f"{type(model).__name__}.{name}")
    return None


def _unknown(name: str) -> str:
    return f"transformers {transformers.__version__} has no {name} as its loop needs it"


# what a step is given, or may go without once the prompt is read
_KNOWN = {"attention_mask", "position_ids", *NAMES, "use_cache", "logits_to_keep", "inputs_embeds"}


def _loop(
    model: Any,
    ids: Any,
    process: Any,
    stop: Any,
    config: Any,
    about: tuple[Any, dict[str, Any], Draft | None],
    inputs: dict[str, Any],
) -> Any:
    """What `GenerationMixin._sample` does, token for token. about: (streamer, what steps are given, draft)."""
    streamer, steps, draft = about
    reasons = {
        f"{config.get_generation_mode().value} is not greedy or sampling": config.get_generation_mode()
        not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "it keeps attentions or hidden states": config.output_attentions or config.output_hidden_states,
        "it goes without a cache": not inputs.get("use_cache"),
    }
    name = "cache" if "cache" in inputs else "past_key_values"
    cache, mask = inputs.get(name), inputs.get("attention_mask")
    # transformers drops a mask of ones, and writes down how long it was
    dropped = mask is None and "attention_mask" in inspect.signature(model.forward).parameters
    for private, needed in (("_mask_length", dropped), ("_pad_token_tensor", True)):
        reasons[_unknown(f"GenerationConfig.{private}")] = needed and not hasattr(config, private)
    reasons["generate prepares no position_ids of this model"] = inputs.get("position_ids") is None
    for name, value in inputs.items():
        if name not in _KNOWN:
            reasons[f"a step might need {name} again"] = value is not None and value is not False
    for reason, applies in reasons.items():
        if applies:
            raise Unsupported(f"longwave.generate cannot do this: {reason}. model.generate works")

    assert cache is not None
    # tokens that the cache will hold after the prompt
    prompt = getattr(config, "_mask_length", ids.shape[1]) if mask is None else mask.shape[1]
    if ids.shape[1] and cache.get_seq_length() == ids.shape[1] == prompt:
        # transformers would read the prompt a second time
        raise ValueError("all of the prompt is in the cache already: cache.reset(), or cache.crop(-1), and ask again")
    longest = config.max_length if stop.max_length is None else stop.max_length
    new = max(0, longest - ids.shape[1] - 1)  # the last new token is not read
    ahead = 0 if draft is None else ahead_of(cache)
    expect(model, cache, prompt + max(new, ahead), ids.shape[0])
    if new:
        check_room(next(cache.memory_layers()), prompt, new)
    limit = context_limit(model)
    if limit is not None and cache.method.reach(limit) is None:
        for criterion in stop:  # what it says of texts beyond the model's length is not so with this cache
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
    pad = config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stop)
    kept: dict[str, Any] = {
        "scores": () if config.return_dict_in_generate and config.output_scores else None,
        "logits": () if config.return_dict_in_generate and config.output_logits else None,
    }
    unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    if draft is None:
        chunk = cache.method.passes(prompt, limit, config.prefill_chunk_size)
        # transformers 5.17 slices no prompt whose beginning is held: in chunks only where one pass does not do
        config.prefill_chunk_size = chunk if chunk is not None and chunk < prompt - cache.get_seq_length() else None
        logits = model._prefill(ids, config, inputs).logits[:, -1]
    else:
        whole = checked_mask(ids, mask)
        logits = read_ahead(model, cache, ids, drafted(model, cache, ids, draft, whole), whole)
    positions = inputs["position_ids"][:, -1:].expand(ids.shape[0], 1) + 1
    decoder: StaticDecoder | None = None
    try:
        with model._optimize_model_for_decode():
            while True:
                logits = logits.to(copy=True, dtype=torch.float32, device=ids.device)
                scores = process(ids, logits)
                for part, value in (("scores", scores), ("logits", logits)):
                    if kept[part] is not None:
                        kept[part] += (value,)
                if config.do_sample:
                    tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0]
                else:
                    tokens = scores.argmax(dim=-1)
                if ends and pad is not None:  # rows that are done go on with padding
                    tokens = tokens * unfinished + pad.to(ids.device) * (1 - unfinished)
                ids = torch.cat([ids, tokens[:, None]], dim=-1)
                unfinished = unfinished & ~stop(ids, kept["scores"])
                if streamer is not None:
                    streamer.put(tokens.cpu())
                if not bool(unfinished.any()):
                    break
                if decoder is None:
                    new = longest - ids.shape[1]
                    decoder = StaticDecoder(model, cache, new_tokens=new, positions=positions, **steps)
                logits = decoder.step(tokens)
    except Exception as error:
        error.add_note("the cache holds what was read: cache.reset() before you ask again")
        raise
    finally:
        if decoder is not None:
            decoder.finish()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    own = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
    return GenerateDecoderOnlyOutput(sequences=ids, **kept, **{own: cache})
