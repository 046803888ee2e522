"""The one reader of a model folder's JSON: whatever is in a file, an answer or ModelLoadFailed."""

from pathlib import Path

import pytest

from mlx_server.errors import ModelLoadFailed
from mlx_server.models.store.folder import model_config, read_json, read_object


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\x00"])
def test_what_is_not_json_names_the_file_and_its_folder(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model" / "config.json"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ModelLoadFailed, match=r"config\.json of model could not be read"):
        read_json(file)
    assert model_config(file.parent) is None


def test_a_missing_file_and_a_folder_in_its_place_are_errors_too(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name in ("missing.json", "folder.json", "a\0b"):
        with pytest.raises(ModelLoadFailed):
            read_json(tmp_path / name)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_an_object_is_told_from_other_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelLoadFailed, match="not a JSON object"):
        read_object(tmp_path / "config.json")
