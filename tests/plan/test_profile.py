import copy
import json
import re
import warnings
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import longwave
from longwave.methods import get_method
from longwave.methods.fourier_paper import paper_share
from longwave.plan.fingerprint import fingerprint
from longwave.plan.profile import SENSITIVITY
from tests.conftest import SMALL, build, random_profile, shape_of

CHANNELS = SMALL["num_key_value_heads"] * SMALL["head_dim"]


@pytest.fixture
def measured(llama):
    """A profile as `calibrate` would write it for the small llama."""
    noise = random_profile(llama)
    info = {"id": "small llama", "fingerprint": fingerprint(llama, (0, 1, 2))}
    return replace(noise, model=info, method={"states": 8}, text={"tokens": 128})


@pytest.fixture
def file(measured, tmp_path):
    measured.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_same_codes(ours, theirs):
    for a, b in zip(ours.plan, theirs.plan, strict=True):
        assert (a.k, a.v) == (b.k, b.v)
        assert torch.equal(a.order_k, b.order_k)


def test_round_trip(measured, file, llama):
    loaded = longwave.Profile.load(file)
    assert (loaded.model, loaded.method, loaded.text) == (measured.model, measured.method, measured.text)
    torch.testing.assert_close(loaded.k_error, measured.k_error, rtol=5e-3, atol=0)
    torch.testing.assert_close(loaded.v_error, measured.v_error, rtol=5e-3, atol=0)
    assert loaded.sensitivity.about == measured.sensitivity.about
    for name in SENSITIVITY:
        ours, theirs = (getattr(profile.sensitivity, name) for profile in (loaded, measured))
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)
    assert loaded.source == str(file)
    loaded.check(llama, shape_of(llama))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_round_trip_of_channels_alone(measured, tmp_path):
    replace(measured, sensitivity=None).save(tmp_path / "profile.json")
    assert longwave.Profile.load(tmp_path / "profile.json").sensitivity is None


def test_round_trip_of_costs_alone(measured, tmp_path, llama):
    replace(measured, k_error=None, v_error=None).save(tmp_path / "profile.json")
    loaded = longwave.Profile.load(tmp_path / "profile.json")
    assert loaded.shape == measured.shape == (3, 2, 8)
    with pytest.raises(ValueError, match=r"profile\.json has no channel errors: measure it .*fourier-paper"):
        longwave.cache(llama, "fourier-paper", keep=0.5, profile=loaded)


def test_a_profile_of_nothing():
    with pytest.raises(ValueError, match="got neither"):
        longwave.Profile({}, {}, {})


def test_errors_of_a_layer(measured):
    assert torch.equal(measured.error("k", 1), measured.k_error[1])
    assert torch.equal(measured.error("v", 2), measured.v_error[2])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no profile at .*absent\.json"):
        longwave.Profile.load(tmp_path / "absent.json")


@pytest.mark.parametrize("content", [b"", b'{"format": "longwave-pro', b"not json", b"\xff\xfe\x00"])
def test_file_that_is_not_json(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"profile\.json is not a profile"):
        longwave.Profile.load(path)


@pytest.mark.parametrize("content", [{}, [], 3, {"format": "other"}, {"Layer_0": {"self_attn.k_proj": [1]}}])
def test_json_of_something_else_names_from_published(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not a longwave profile.*Profile\.from_published"):
        longwave.Profile.load(path)


@pytest.mark.parametrize("version", [1, 2, 3, 5, "4", None])
def test_other_version(file, version):
    change(file, version=version)
    with pytest.raises(ValueError, match=f"profile version {version}, this longwave reads 4: measure it again"):
        longwave.Profile.load(file)


@pytest.mark.parametrize("field", ["model", "method", "text"])
def test_missing_field(file, field):
    data = json.loads(file.read_text())
    del data[field]
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"is damaged: .*{field}"):
        longwave.Profile.load(file)


@pytest.mark.parametrize(
    "fields",
    [
        {"k_error": [[[1.0, 2.0], [3.0]]]},
        {"k_error": "many"},
        {"k_error": None},
        {"k_error": [[1.0, 2.0]]},
        {"k_error": [[[1.0]]]},
        {"model": "small llama"},
        {"model": {"fingerprint": [1.0]}},
        {"text": None},
        {"sensitivity": {}},
        {"sensitivity": None},
    ],
    ids=str,
)
def test_damaged_field(file, fields):
    change(file, **fields)
    with pytest.raises(ValueError, match="is damaged"):
        longwave.Profile.load(file)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_errors_that_are_not_finite(file, measured, bad):
    errors = measured.k_error.tolist()
    errors[1][0][3] = bad
    with pytest.raises(ValueError, match="must be finite"):
        longwave.Profile({}, {}, {}, torch.tensor(errors), measured.v_error)
    change(file, k_error=errors)
    with pytest.raises(ValueError, match="damaged: channel errors must be finite"):
        longwave.Profile.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["k"][1][0][0].__setitem__(3, -0.1), "k must be finite and not negative"),
        (lambda found: found["key_weight"][1][0].__setitem__(3, float("nan")), "key_weight must be finite"),
        (lambda found: found["v"].pop(), "v is [1, 3, 2, 5], not [2, 3, 2, 5]"),
        (lambda found: found["recall"].pop(), "k is [2, 3, 2, 9], not [1, 3, 2, 9]"),
        (
            lambda found: [x.pop() for x in (*found["k"], *found["v"], *found["both"], found["key_weight"])],
            "key_weight is [2, 2, 8], k_error [3, 2, 8]",
        ),
        (lambda found: found["about"].update(v_options=[0, 2]), "its v_options are [0, 2]"),
        (lambda found: found["about"].pop("k_options"), "its k_options are None"),
    ],
    ids=["negative", "nan", "too few", "too few windows", "other layers", "other options", "no options"],
)
def test_damaged_sensitivity(file, change, message):
    data = json.loads(file.read_text())
    change(data["sensitivity"])
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"is damaged: {re.escape(message)}"):
        longwave.Profile.load(file)


def test_shapes_must_agree(measured):
    with pytest.raises(ValueError, match=r"\(3, 2, 8\).*\(2, 2, 8\)"):
        longwave.Profile({}, {}, {}, measured.k_error, measured.v_error[:2])


def test_other_weights_of_the_same_shape_are_refused(file, llama):
    other = copy.deepcopy(llama)
    other.model.layers[1].self_attn.k_proj.weight.data *= 1.01
    with pytest.raises(ValueError, match=r"of small llama, and this model's weights differ.*longwave calibrate"):
        longwave.cache(other, "fourier", profile=file)


def test_other_shape_is_refused(file, models):
    with pytest.raises(ValueError, match=r"3x2x8 layers x heads x channels; this model has 2x2x8"):
        longwave.cache(models["qwen3"][0], "fourier", profile=file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_of_the_same_weights_is_accepted(file, dtype):
    model = build("llama", dtype)
    loaded = longwave.Profile.load(file)
    loaded.check(model, shape_of(model))
    method = longwave.cache(model, "fourier", profile=str(file)).method
    assert_same_codes(method, longwave.Fourier().bind(shape_of(model), loaded, None))


def test_no_profile_names_calibrate(llama):
    with pytest.warns(UserWarning, match="not measured.*context of 512 tokens is too short"):
        longwave.cache(llama, "fourier")
    for method, options in (("fourier", {"plan": "measured"}), ("fourier-paper", {}), ("fourier-paper", {"keep": 0.5})):
        with pytest.raises(ValueError, match=r"`longwave calibrate MODEL .*--text FILE --out PROFILE`"):
            longwave.cache(llama, method, **options)


def test_no_profile_is_needed_where_nothing_is_chosen(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = longwave.cache(llama, "fourier", budget=1.0).method
        none = longwave.cache(llama, "fourier-paper", keep=0.0).method
    assert whole.page_fraction() == 1
    assert not any(table.any() for pair in none.kept for table in pair)


# a write that fails


def test_unwritable_content_leaves_no_file(measured, tmp_path):
    odd = longwave.Profile({"id": object()}, {}, {}, measured.k_error, measured.v_error)
    with pytest.raises(TypeError):
        odd.save(tmp_path / "profile.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_failed_write_leaves_no_file_and_spares_the_old_one(file, measured, monkeypatch, step):
    before = file.read_text()
    real = getattr(Path, step)

    def full(path, *args):
        if step == "write_text":
            real(path, args[0][:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(OSError, match="No space left"):
        measured.save(file)
    with pytest.raises(OSError, match="No space left"):
        measured.save(file.with_name("new.json"))
    monkeypatch.undo()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_text() == before


def test_missing_folder(measured, tmp_path):
    with pytest.raises(FileNotFoundError):
        measured.save(tmp_path / "absent" / "profile.json")


# shipped


@pytest.mark.parametrize(
    ("name", "method"), [("smollm2.json", "fourier"), ("smollm2-paper.json", "fourier-paper")], ids=["plain", "paper"]
)
def test_shipped_profile_is_of_smollm2_and_picked(smollm2, name, method):
    model, _ = smollm2
    with resources.as_file(resources.files("longwave.plan.profiles") / name) as path:
        profile = longwave.Profile.load(path)
    profile.check(model, shape_of(model))
    assert profile.text["tokens"] > 10_000
    assert profile.model["fingerprint"]
    memory = longwave.cache(model, method)
    options = get_method(method)
    shared = profile.method.keys() & vars(options).keys() - {"keep"}  # "paper" where the file was made, now None
    assert {"sinks", "window", "segment" if method == "fourier" else "states"} <= shared
    assert {key: profile.method[key] for key in shared} == {key: getattr(options, key) for key in shared}
    expected = options.bind(shape_of(model), profile, None)
    if method == "fourier":
        assert "measured plan" in str(memory.method)
        assert_same_codes(memory.method, expected)
    for ours, theirs in zip(memory.method.kept, expected.kept, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_given_profile_goes_before_the_shipped_one(smollm2):
    model, _ = smollm2
    given = random_profile(model)
    method = longwave.cache(model, "fourier", profile=given).method
    assert_same_codes(method, longwave.Fourier().bind(shape_of(model), given, None))
    assert method.profile == given.digest
    other = longwave.cache(model, "fourier").method
    assert method.plan[7].k != other.plan[7].k
    assert method != other


# published files


@pytest.fixture(scope="module")
def deep():
    """Twelve layers: Layer_10 sorts before Layer_2 as text, and the paper's schedule has all its three bands."""
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=12)).eval()


def orders(layers):
    """All channels of every layer's K and V, best compressed first: [(k, v), ...]."""
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randperm(CHANNELS, generator=generator).tolist() for _ in "kv") for _ in range(layers)]


def plain_entry(k, v):
    return {"self_attn.k_proj": k, "self_attn.v_proj": v}


def split_entry(k, v):
    entry = {}
    for side, compressed in (("k", k), ("v", v)):
        kept = [channel for channel in range(CHANNELS) if channel not in compressed]
        for letter, listed in (("c", sorted(compressed)), ("n", kept)):
            entry[f"{side}{letter}_list"] = listed
            ends = [(head + 1) * SMALL["head_dim"] for head in range(SMALL["num_key_value_heads"])]
            entry[f"{side}{letter}_h_list"] = [sum(channel < end for channel in listed) for end in ends]
    return entry


def write(path, entries):
    last_first = list(enumerate(entries))[::-1]
    path.write_text(json.dumps({f"Layer_{number}": entry for number, entry in last_first}))
    return path


def compressed(method):
    return [tuple((~table).flatten().nonzero()[:, 0].tolist() for table in pair) for pair in method.kept]


@pytest.mark.parametrize("entry", [plain_entry, split_entry])
def test_published_file_compresses_its_channels(deep, tmp_path, entry):
    listed = [(k[:12], v[:8]) for k, v in orders(12)]
    path = write(tmp_path / "compressed_dims.json", [entry(*pair) for pair in listed])
    profile = longwave.Profile.from_published(path, deep)
    memory = longwave.cache(deep, longwave.FourierPaper(keep=(0.25, 0.5)), profile=profile)
    assert compressed(memory.method) == [tuple(sorted(side) for side in pair) for pair in listed]


@pytest.mark.parametrize("entry", [plain_entry, split_entry])
def test_published_file_with_the_papers_schedule(deep, tmp_path, entry):
    shares = [paper_share(layer, 12) for layer in range(12)]
    assert len(set(shares)) == 3
    listed = [
        (k[: int(share_k * CHANNELS)], v[: int(share_v * CHANNELS)])
        for (k, v), (share_k, share_v) in zip(orders(12), shares, strict=True)
    ]
    path = write(tmp_path / "compressed_dims.json", [entry(*pair) for pair in listed])
    profile = longwave.Profile.from_published(path, deep)
    memory = longwave.cache(deep, "fourier-paper", profile=profile)
    assert compressed(memory.method) == [tuple(sorted(side) for side in pair) for pair in listed]


def test_fewer_than_published_takes_the_smallest_errors(deep, tmp_path):
    listed = [(k[:12], v[:12]) for k, v in orders(12)]
    path = write(tmp_path / "compressed_dims.json", [plain_entry(*pair) for pair in listed])
    method = longwave.FourierPaper(keep=0.5)
    memory = longwave.cache(deep, method, profile=longwave.Profile.from_published(path, deep))
    assert compressed(memory.method) == [tuple(sorted(side[:8]) for side in pair) for pair in listed]


def test_published_profile_is_saved_and_belongs_to_the_model(deep, llama, tmp_path):
    path = write(tmp_path / "compressed_dims.json", [plain_entry(k[:12], v[:8]) for k, v in orders(12)])
    profile = longwave.Profile.from_published(path, deep)
    profile.save(tmp_path / "profile.json")
    loaded = longwave.Profile.load(tmp_path / "profile.json")
    assert torch.equal(loaded.k_error, profile.k_error)
    loaded.check(deep, shape_of(deep))
    with pytest.raises(ValueError, match="this model has"):
        longwave.cache(llama, "fourier", profile=loaded)


def broken(entry, **fields):
    return {**entry, **fields}


@pytest.mark.parametrize(
    "entry",
    [
        plain_entry([0, 1, 1], [2]),
        plain_entry([0, CHANNELS], [2]),
        plain_entry([0, -1], [2]),
        plain_entry([0, 1.5], [2]),
        plain_entry(None, [2]),
        {"self_attn.k_proj": [0]},
        [0, 1],
        broken(split_entry([0, 1], [2]), kc_list=[0, 0, 1]),
        broken(split_entry([0, 1], [2]), vc_list=[CHANNELS]),
        broken(split_entry([0, 1], [2]), kn_list=[5, 6]),
        broken(split_entry([0, 1], [2]), kn_list=list(range(CHANNELS))),
        {key: value for key, value in split_entry([0, 1], [2]).items() if key != "vn_list"},
    ],
    ids=["twice", "too large", "negative", "fraction", "null", "no V", "list", *"abcd", "no kept V"],
)
def test_malformed_published_file_is_refused(llama, tmp_path, entry):
    good = plain_entry([0, 1], [2])
    path = write(tmp_path / "compressed_dims.json", [good, entry, good])
    with pytest.raises(ValueError, match=r"compressed_dims\.json is not a compressed_dims file for this model"):
        longwave.Profile.from_published(path, llama)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"Layer_x": {}}', '{"a": 1}', "3"])
def test_something_else_is_not_a_published_file(llama, tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a compressed_dims file"):
        longwave.Profile.from_published(path, llama)


@pytest.mark.parametrize("layers", [2, 4])
def test_published_file_of_another_depth_is_refused(llama, tmp_path, layers):
    path = write(tmp_path / "compressed_dims.json", [plain_entry([0, 1], [2])] * layers)
    with pytest.raises(ValueError, match=f"{layers}x2x8 layers x heads x channels; this model has 3x2x8"):
        longwave.Profile.from_published(path, llama)
