import copy

import torch

from tests.conftest import into
from tests.evals.samples import outputs


def test_the_models_own_generation_settings_stay_out(llama, models, tokenizer, makers, mixed, monkeypatch):
    plain = outputs(llama, tokenizer, mixed[:1], makers["dense"])
    own = copy.deepcopy(llama.generation_config)
    own.repetition_penalty, own.no_repeat_ngram_size = 3.0, 1
    monkeypatch.setattr(llama, "generation_config", own)
    assert outputs(llama, tokenizer, mixed[:1], makers["dense"])["alone150"][0] == plain["alone150"][0]
    assert llama.generation_config is own
    ids = torch.tensor([list(mixed[0].ids)])
    penalised = llama.generate(ids, **into(makers["dense"](1)), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(penalised[0, 150:]) != plain["alone150"][0]  # they would have mattered
