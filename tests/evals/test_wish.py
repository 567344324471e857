import pytest
import torch

from longwave.evals.wish import StopTexts, Wish


def test_a_stop_text_does_not_begin_in_the_prompt(tokenizer):
    ids = torch.tensor([tokenizer("ab\n\nc\n").input_ids, tokenizer("abc\n\n\n").input_ids])
    assert StopTexts(tokenizer, ["\n\n"], 3)(ids, None).tolist() == [False, True]
    assert StopTexts(tokenizer, ["\n\n", "c\n"], 4)(ids, None).tolist() == [True, True]
    assert StopTexts(tokenizer, ["\n\n", "c\n"], 5)(ids, None).tolist() == [False, False]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temprature": 1.0}, "'temprature' is not supported; did you mean 'temperature'"),
        ({"num_beams": 4}, "num_beams is 1, got 4"),
        ({"do_sample": True, "temperature": 0.0}, "needs a temperature above 0, got 0.0"),
        ({"until": 3}, "until is a text or a list of texts, got 3"),
        ({"until": ["a", 3]}, "until is a text or a list of texts"),
        ({"max_gen_toks": 0}, "max_gen_toks is a whole number of tokens, at least 1; got 0"),
        ({"max_gen_toks": 4, "max_tokens": 5}, "say different things"),
    ],
    ids=str,
)
def test_generation_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Wish.read(kwargs, 256)
