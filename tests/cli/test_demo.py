from tests.cli.calls import refused


def test_documents_are_read_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("longwave.models.load", lambda *given, **options: 1 / 0)
    (tmp_path / "empty.txt").write_text("\n")
    assert "absent.txt" in refused("demo", "--file", tmp_path / "absent.txt", "--out", tmp_path / "out")
    assert "is empty" in refused("demo", "--file", tmp_path / "empty.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
