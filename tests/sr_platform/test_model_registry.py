from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sr_platform.errors import RequestError
from sr_platform.model_registry import alias_version, give_alias, resolve_model, tag_version, version_tags
from sr_platform.storage import Storage, open_storage
from sr_platform.tracking import Tracking


def register(runs: Tracking, uri: str, name: str) -> None:
    run_id = runs.start("run", params={}, tags={})
    tags = {"manifest_digest": "d1"}
    runs.register_model(uri, name=name, alias="candidate", run_id=run_id, digest="abc", tags=tags)


def files_below(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_preset_or_a_folder_passes_through_as_it_is(folder: Path) -> None:
    assert resolve_model("nano").path == resolve_model("nano").version == "nano"
    assert (resolve_model(str(folder)).path, resolve_model(str(folder)).version) == (str(folder), "folder")
    assert resolve_model(folder.as_uri()).path == str(folder)
    assert resolve_model(str(folder)).manifest_digest is None


def test_a_model_in_a_folder_is_used_where_it_lies(sqlite, folder, tmp_path) -> None:
    register(sqlite, str(folder), "in-place")
    by_alias = resolve_model("models:/in-place@candidate", cache_path=tmp_path / "cache")
    assert resolve_model("models:/in-place/1", cache_path=tmp_path / "cache") == by_alias
    assert (by_alias.version, by_alias.manifest_digest) == ("in-place/1", "d1")
    assert by_alias.path == str(folder)
    assert not (tmp_path / "cache").exists()


def test_a_model_whose_folder_is_gone_is_named(sqlite, folder) -> None:
    register(sqlite, str(folder), "gone")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(RequestError, match=f"models:/gone/1 lies in {folder}, which is not here"):
        resolve_model("models:/gone@candidate")


def test_a_model_in_s3_is_fetched_once(sqlite, folder, s3_uri, tmp_path, monkeypatch) -> None:
    for name, data in files_below(folder).items():
        open_storage(f"{s3_uri}/models/a").write_bytes_atomic(name, data)
    register(sqlite, f"{s3_uri}/models/a", "s3")
    model = resolve_model("models:/s3@candidate", cache_path=tmp_path / "cache")
    assert files_below(Path(model.path)) == files_below(folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(model.path).name]
    monkeypatch.delattr(Storage, "read_chunks")
    assert resolve_model("models:/s3/1", cache_path=tmp_path / "cache") == model


def test_a_download_that_breaks_off_leaves_nothing(sqlite, s3_uri, tmp_path, monkeypatch) -> None:
    for name in ("a", "b"):
        open_storage(f"{s3_uri}/model").write_bytes_atomic(name, b"\0" * 1000)
    register(sqlite, f"{s3_uri}/model", "broken")
    real = Storage.read_chunks

    def fail_at_the_second(self: Storage, name: str) -> Iterator[bytes]:
        if name == "b":
            raise RequestError("refused")
        return real(self, name)

    monkeypatch.setattr(Storage, "read_chunks", fail_at_the_second)
    with pytest.raises(RequestError, match="refused"):
        resolve_model("models:/broken@candidate", cache_path=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unsteady_storage_still_gives_the_whole_model(sqlite, folder, faulty_s3, tmp_path) -> None:
    uri = f"{faulty_s3(rate=0.3).uri}/model"
    for name, data in files_below(folder).items():
        open_storage(uri).write_bytes_atomic(name, data)
    register(sqlite, uri, "unsteady")
    model = resolve_model("models:/unsteady@candidate", cache_path=tmp_path / "cache")
    assert files_below(Path(model.path)) == files_below(folder)


def test_a_source_without_files_is_an_error(sqlite, s3_uri, tmp_path) -> None:
    register(sqlite, f"{s3_uri}/nothing", "empty")
    with pytest.raises(RequestError, match="/nothing of the registry holds no files"):
        resolve_model("models:/empty@candidate", cache_path=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_on_a_tracking_server_is_downloaded_once(mlflow_server, folder, tmp_path) -> None:
    runs = Tracking.open(default_path=tmp_path / "unused", experiment="registry")
    register(runs, str(folder), "registry-served")
    model = resolve_model("models:/registry-served@candidate", cache_path=tmp_path / "cache")
    assert (model.version, model.manifest_digest) == ("registry-served/1", "d1")
    assert files_below(Path(model.path)) == files_below(folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(model.path).name]
    assert resolve_model("models:/registry-served/1", cache_path=tmp_path / "cache") == model


def test_a_wrong_model_uri_says_what_there_is(sqlite, folder, monkeypatch) -> None:
    register(sqlite, str(folder), "three")
    with pytest.raises(RequestError, match=r"aliases \['candidate'\]"):
        resolve_model("models:/three@champion")
    with pytest.raises(RequestError, match=r"not in the registry; it has .*three"):
        resolve_model("models:/missing@champion")
    with pytest.raises(RequestError, match="not in the registry"):
        resolve_model("models:/three/9")
    with pytest.raises(RequestError, match="models:/name@alias or models:/name/3"):
        resolve_model("models:/three")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RequestError, match="MLFLOW_TRACKING_URI, which is not set"):
        resolve_model("models:/three@candidate")


def test_an_alias_moves_after_the_tags_are_there(sqlite, folder) -> None:
    register(sqlite, str(folder), "gated")
    register(sqlite, str(folder), "gated")
    assert alias_version("gated", "champion") is None
    give_alias("gated", "champion", 1, {"gate": "passed"})
    tag_version("gated", 2, {"gate": "refused"})
    assert alias_version("gated", "champion") == 1
    assert (version_tags("gated", 1)["gate"], version_tags("gated", 2)["gate"]) == ("passed", "refused")
    with pytest.raises(RequestError, match="models:/gated/3 is not in the registry"):
        give_alias("gated", "champion", 3, {"gate": "passed"})
    assert alias_version("gated", "champion") == 1
    with pytest.raises(RequestError, match=r"nobody is not in the registry; it has .*gated"):
        alias_version("nobody", "champion")
