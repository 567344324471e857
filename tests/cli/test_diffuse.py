import json

import pytest
import torch

import longwave
from longwave.diffusion import Dream, LLaDA, generate
from tests.cli.calls import refused, succeeds
from tests.diffusion.checkpoints import DREAM, LLADA, write
from tests.test_checkpoints import dream_tokenizer


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ("llada", "dream")}
    write(made["llada"], LLADA, tokenizer)
    write(made["dream"], DREAM, dream_tokenizer())
    return made


@pytest.fixture
def diffuse(folders):
    return ["generate", "--diffusion", "--model", folders["llada"], "--max-new-tokens", 12]


def answer(*arguments):
    return json.loads(succeeds(*arguments, "--json").stdout)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_it_answers_as_generate_does(folders, name):
    told = ["--temperature", 0.7, "--seed", 5, "--block-length", 4, "--steps", 6]
    said = answer("generate", "--diffusion", "Hello there", "--model", folders[name], "--max-new-tokens", 12, *told)
    model, tokenizer = longwave.load(folders[name], dtype=torch.float32)
    sampler = (Dream if name == "dream" else LLaDA)(temperature=0.7)
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    found = generate(model, ids, sampler=sampler, max_new_tokens=12, block_length=4, steps=6, seed=5)
    assert said["text"] == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert said["prompt_tokens"] == ids.shape[1]
    assert said["passes"] <= 6
    assert "bytes" not in " ".join(said)


def test_for_people(diffuse):
    result = succeeds(*diffuse, "Hello there")
    assert result.stdout.strip()
    assert "tokens in 12 passes" in result.stderr
    assert "LLaDA(temperature=0.0" in result.stderr


@pytest.mark.parametrize("keep", ["prefix", "dual"])
def test_a_method_holds_what_is_kept(diffuse, text, keep):
    read = [*diffuse, "x" * 300, "--keep", keep, "--block-length", 4]
    plain = answer(*read)
    assert plain["method"] == "dense"
    assert plain["tokens"] == 300 + 8
    assert plain["ratio"] == pytest.approx(1, abs=0.3)
    half = answer(*read, "--method", "streaming", "--budget", 0.5, "-o", "window=16")
    assert half["ratio"] < 0.75


def test_a_threshold_and_a_refresh(diffuse):
    said = answer(*diffuse, "Hello", "--threshold", 0.0001, "--keep", "dual", "--refresh", 1, "--block-length", 6)
    assert said["passes"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 5, "--block-length", 4], "5 steps cannot be shared evenly by 3 blocks"),
        (["--threshold", 2], "threshold is a confidence above 0 and at most 1"),
        (["--keep", "duel"], "did you mean 'dual'"),
        (["--refresh", 2], "refresh=2 decides nothing without a cache"),
        (["--method", "fourier"], "--method says how a text is held"),
        (["--keep", "dual", "--method", "furier"], "did you mean 'fourier"),
        (["--budget", "0.5"], "--budget says how a text is held"),
        (["--no-graph"], "leave --graph out"),
        (["--compile"], "leave --compile out"),
        (["--prefill-chunk", 8], "leave --prefill-chunk out"),
        (["--sampler", "remaskin=random"], "did you mean 'remasking'"),
        (["--sampler", "remasking=never"], "unknown remasking 'never'"),
        (["--sampler", "temperature=1", "--temperature", 1], "temperature was given twice"),
        (["--top-k", 3], "LLaDA's sampler has no option 'top_k'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_options(diffuse, arguments, message):
    assert message in refused(*diffuse, "Hello", *arguments)


def test_its_options_need_it(folder):
    assert "--steps is for a masked-diffusion model" in refused("generate", "Hello", "--model", folder, "--steps", 4)


def test_a_causal_model(folder):
    assert "attention is causal" in refused("generate", "--diffusion", "Hello", "--model", folder)
