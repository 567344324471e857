import pytest
import torch

from longwave import codec
from longwave.plan import automatic
from longwave.plan.automatic import Effort
from tests.cli.calls import SEGMENTS, TEXT, succeeds
from tests.codec.conftest import EFFORT


@pytest.fixture(scope="package", autouse=True)
def float32():
    """A CPU without bfloat16, so that the commands load the saved models as they are, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="package")
def profile(folder, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "tiny.json"
    sizes = ["--tokens", 500, "--windows", 3, "--scored", 64]
    succeeds("calibrate", folder, "--text", text, "--out", path, *sizes, *SEGMENTS)
    return path


@pytest.fixture(autouse=True)
def commands_measure_nothing_by_themselves(monkeypatch):
    """They hand over a tokenizer; what they would measure would be kept, and found by other tests."""
    monkeypatch.setattr(Effort, "of", classmethod(lambda cls, model, method: None))


@pytest.fixture(scope="session")
def profiles(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture
def codecs(profiles, monkeypatch):
    """The folder of codecs that the commands fitted: the small model's takes a second, once."""
    monkeypatch.setattr(automatic, "_folder", lambda: profiles)
    monkeypatch.setattr(codec.Effort, "of", classmethod(lambda cls, model: EFFORT))
    return profiles
