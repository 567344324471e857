import hashlib

import pytest

from longwave.fetch import fetch
from tests.server import serving

CONTENT = bytes(range(256)) * 5000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site():
    with serving() as site:
        site.files["/file"] = CONTENT
        yield site


def get(site, tmp_path, sha=SHA, name="/file", **more):
    return fetch(site.url + name, tmp_path / "in" / "file", sha, wait=0, **more)


def test_whole_and_told(site, tmp_path):
    told = []
    path = get(site, tmp_path, advance=lambda *at: told.append(at))
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_break_is_taken_up(site, tmp_path, ranges):
    site.ranges, site.cuts = ranges, {"/file": [1000, 5000]}
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == [None, "bytes=1000-", "bytes=6000-" if ranges else "bytes=5000-"]


def test_a_later_call_goes_on(site, tmp_path):
    site.cuts = {"/file": [1000, 0, 0]}
    with pytest.raises(OSError, match=r"broke off .*1,000 bytes are kept"):
        get(site, tmp_path)
    site.asked.clear()
    assert get(site, tmp_path).read_bytes() == CONTENT
    assert site.asked == [("/file", "bytes=1000-")]


def test_all_had_come(site, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file.part").write_bytes(CONTENT)
    assert get(site, tmp_path).read_bytes() == CONTENT


def test_another_file_is_refused_and_forgotten(site, tmp_path):
    with pytest.raises(OSError, match=f"has sha256 {SHA}, expected {'0' * 64}"):
        get(site, tmp_path, "0" * 64)
    assert not list((tmp_path / "in").iterdir())


def test_not_there_is_said_at_once(site, tmp_path):
    with pytest.raises(OSError, match="404"):
        get(site, tmp_path, name="/other")
    assert len(site.asked) == 1


def test_nobody_there(tmp_path):
    with serving() as site:
        pass
    with pytest.raises(OSError, match="broke off"):
        get(site, tmp_path)
