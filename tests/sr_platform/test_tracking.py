from __future__ import annotations

import hashlib
import logging
import shutil
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sr_platform import mlflow_client
from sr_platform.errors import InputDataError, RequestError, TrackingError
from sr_platform.run_log import Metric, RunLog
from sr_platform.tracking import Tracking, flatten, tracking_uri


def test_the_tracking_server_of_the_environment_comes_before_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path) == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@tracking.example:5000/mlflow")
    assert tracking_uri(tmp_path) == "https://tracking.example:5000/mlflow"


def test_runs_are_nested_and_hold_recipe_and_tags(sqlite: Tracking) -> None:
    many = {f"p{i}": i for i in range(150)}
    parent = sqlite.start("parent", params={"a": {"b": 1}, **many}, tags={"manifest_digest": "abc"})
    stage = sqlite.start("align", parent_run_id=parent, params={}, tags={})
    sqlite.finish(stage)
    sqlite.finish(parent, failed=True)
    client = MlflowClient(sqlite.uri)
    assert client.get_run(parent).data.params["a.b"] == "1"
    assert len(client.get_run(parent).data.params) == 151
    assert client.get_run(parent).data.tags["manifest_digest"] == "abc"
    assert client.get_run(stage).data.tags["mlflow.parentRunId"] == parent
    assert (client.get_run(stage).info.status, client.get_run(parent).info.status) == ("FINISHED", "FAILED")
    assert sqlite.resume(stage)
    assert client.get_run(stage).info.status == "RUNNING"
    assert not sqlite.resume("0" * 32)


def test_a_busy_database_file_delays_the_log_and_not_the_training(sqlite: Tracking) -> None:
    log = RunLog(sqlite.uri, sqlite.start("busy", params={}, tags={}))
    other = sqlite3.connect(sqlite.uri.removeprefix("sqlite:///"), check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    started_s = time.perf_counter()
    log.log([Metric("train/loss", 0.5, 1)])
    assert time.perf_counter() - started_s < 0.2
    assert not log.flush(0.3)
    other.rollback()
    other.close()
    assert log.flush(30)
    log.close()
    assert log.latest() == {"train/loss": 0.5}


def test_a_lost_answer_leaves_no_second_run_or_version(sqlite, folder, monkeypatch) -> None:
    monkeypatch.setattr(mlflow_client, "FIRST_WAIT_S", 0.01)
    for method in ("create_run", "create_model_version"):
        lose_first_answer(monkeypatch, method)
    client = MlflowClient(sqlite.uri)
    num_before = len(client.search_runs([sqlite.experiment_id]))
    run_id = sqlite.start("once", params={}, tags={})
    assert len(client.search_runs([sqlite.experiment_id])) == num_before + 1
    sqlite.register_model(str(folder), name="once", alias="candidate", run_id=run_id, digest="d", tags={})
    assert [str(version.version) for version in client.search_model_versions("name='once'")] == ["1"]


def lose_first_answer(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    real, calls = getattr(MlflowClient, method), []

    def unsteady(self: MlflowClient, *args: object, **kwargs: object) -> object:
        answer = real(self, *args, **kwargs)
        calls.append(answer)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(MlflowClient, method, unsteady)


def test_a_registered_folder_stays_where_it_is_beside_a_database_file(sqlite, folder) -> None:
    run_id = sqlite.start("run", params={}, tags={})
    for _ in range(2):  # one run gives one version
        version = sqlite.register_model(
            str(folder), name="one", alias="candidate", run_id=run_id, digest="abc", tags={"manifest_digest": "d1"}
        )
        assert version == "1"
    client = MlflowClient(sqlite.uri)
    registered = client.get_model_version_by_alias("one", "candidate")
    assert registered.source == folder.as_uri()
    assert registered.tags == {"manifest_digest": "d1", "model_uri": folder.as_uri(), "model_digest": "abc"}
    assert client.list_artifacts(run_id) == []


def test_an_alias_moves_to_the_newest_version(sqlite, folder) -> None:
    for _ in range(2):
        run_id = sqlite.start("run", params={}, tags={})
        sqlite.register_model(folder.as_uri(), name="two", alias="candidate", run_id=run_id, digest="", tags={})
    assert str(MlflowClient(sqlite.uri).get_model_version_by_alias("two", "candidate").version) == "2"


def test_a_run_that_goes_on_with_another_model_gives_another_version(sqlite, folder, tmp_path) -> None:
    run_id = sqlite.start("run", params={}, tags={})
    second = shutil.copytree(folder, tmp_path / "unified")
    versions = [
        sqlite.register_model(str(path), name="on", alias="candidate", run_id=run_id, digest=digest, tags={})
        for path, digest in ((folder, "align"), (second, "unified"), (folder, "align"))
    ]
    assert versions == ["1", "2", "1"]
    client = MlflowClient(sqlite.uri)
    assert client.get_model_version("on", "2").source == second.as_uri()
    assert str(client.get_model_version_by_alias("on", "candidate").version) == "1"


def test_texts_that_are_too_long_for_mlflow_end_in_the_digest_of_the_whole(sqlite, folder) -> None:
    licences, prompt = "CC BY 4.0, " * 1000, "a sharp photograph, " * 400
    run_id = sqlite.start("run", params={"prompt": prompt, "short": "x" * 6000}, tags={"data_licences": licences})
    version = sqlite.register_model(
        str(folder), name="long", alias="candidate", run_id=run_id, digest="d", tags={"data_licences": licences}
    )
    client = MlflowClient(sqlite.uri)
    data = client.get_run(run_id).data
    assert data.params["short"] == "x" * 6000
    for stored, whole, limit in (
        (data.params["prompt"], prompt, 6000),
        (data.tags["data_licences"], licences, 8000),
        (client.get_model_version("long", version).tags["data_licences"], licences, 8000),
    ):
        assert len(stored) == limit
        end = f"... ({len(whole)} characters, sha256 {hashlib.sha256(whole.encode()).hexdigest()})"
        assert stored == whole[: limit - len(end)] + end


def test_what_people_are_shown_has_no_password() -> None:
    runs = Tracking("postgresql://user:secret@host:5432/db", "1")
    assert runs.shown_uri == "postgresql://host:5432/db"
    assert Tracking("http://host:5000", "1").shown_uri == "http://host:5000"


def test_a_run_that_was_deleted_meanwhile_does_not_stop_what_went_well(sqlite, caplog) -> None:
    run_id = sqlite.start("run", params={}, tags={})
    MlflowClient(sqlite.uri).delete_run(run_id)
    for failed in (False, True):
        sqlite.finish(run_id, failed=failed)
    assert caplog.text.count(f"run {run_id} is not marked as") == 2
    assert not sqlite.resume(run_id)


def test_what_is_no_model_folder_is_not_registered(sqlite, tmp_path) -> None:
    for wrong in (str(tmp_path / "missing"), "gs://bucket/model"):
        with pytest.raises(InputDataError, match="is not a folder; give a folder, or s3://bucket/prefix"):
            sqlite.register_model(wrong, name="three", alias="candidate", run_id="0" * 32, digest="", tags={})


def test_the_same_calls_work_against_a_tracking_server(mlflow_server, folder, tmp_path) -> None:
    runs = Tracking.open(default_path=tmp_path / "unused", experiment="served")
    assert Tracking.open(default_path=tmp_path / "unused", experiment="served") == runs
    run_id = runs.start("run", params={"seed": 1}, tags={})
    runs.register_model(str(folder), name="served", alias="candidate", run_id=run_id, digest="abc", tags={})
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version_by_alias("served", "candidate")
    assert version.source == f"{client.get_run(run_id).info.artifact_uri}/model-abc"
    assert version.tags == {"model_uri": version.source, "model_digest": "abc"}
    assert [file.path for file in client.list_artifacts(run_id, "model-abc/unet")] == ["model-abc/unet/weights.bin"]
    assert not (tmp_path / "unused").exists()


def test_models_of_one_run_do_not_mix_on_a_server(mlflow_server, folder, tmp_path) -> None:
    runs = Tracking.open(default_path=tmp_path / "unused", experiment="served")
    run_id = runs.start("run", params={}, tags={})
    for digest in ("1" * 64, "2" * 64):
        (folder / f"only_{digest[0]}").write_text("")
        runs.register_model(str(folder), name="two-of-one", alias="a", run_id=run_id, digest=digest, tags={})
        (folder / f"only_{digest[0]}").unlink()
    client = MlflowClient(mlflow_server.uri)
    folders = [client.get_model_version("two-of-one", version).source.rpartition("/")[2] for version in "12"]
    files = [[Path(file.path).name for file in client.list_artifacts(run_id, name)] for name in folders]
    assert [sorted(set(names) - {"unet", "model_index.json"}) for names in files] == [["only_1"], ["only_2"]]


def test_a_model_in_s3_is_registered_without_a_copy(mlflow_server, tmp_path) -> None:
    runs = Tracking.open(default_path=tmp_path, experiment="served")
    run_id = runs.start("run", params={}, tags={})
    runs.register_model("s3://bucket/model/", name="s3", alias="candidate", run_id=run_id, digest="abc", tags={})
    client = MlflowClient(mlflow_server.uri)
    version = client.get_model_version_by_alias("s3", "candidate")
    assert (version.source, version.run_id) == ("s3://bucket/model", run_id)
    assert version.tags == {"model_uri": "s3://bucket/model", "model_digest": "abc"}
    assert client.list_artifacts(run_id) == []


@pytest.mark.slow
def test_the_driver_waits_for_a_lost_server(mlflow_server, folder, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "sr_platform")
    monkeypatch.setattr(mlflow_client, "LONGEST_WAIT_S", 0.5)
    runs = Tracking.open(default_path=tmp_path, experiment="lost")
    parent = runs.start("parent", params={}, tags={})
    mlflow_server.kill()
    monkeypatch.setattr("sr_platform.tracking.START_PATIENCE_S", 0.2)
    impatient = replace(runs, patience_s=0.2)
    with pytest.raises(TrackingError, match=r"does not answer: .*Connection refused; start the server and run"):
        impatient.resume(parent)
    # What is done is done, whether the server can note it or not.
    impatient.finish(parent)
    runs.finish(parent, failed=True)
    assert f"run {parent} is not marked as FINISHED: " in caplog.text
    assert f"run {parent} is not marked as FAILED: " in caplog.text

    done: list[str] = []

    def between_stages() -> None:
        done.append(str(runs.resume(parent)))
        stage = runs.start("stage", parent_run_id=parent, params={"seed": 1}, tags={})
        done.append(runs.register_model(str(folder), name="lost", alias="a", run_id=stage, digest="", tags={}))
        runs.finish(stage)
        done.append(stage)

    driver = threading.Thread(target=between_stages)
    driver.start()
    time.sleep(1.0)
    assert done == []
    mlflow_server.start()
    driver.join(timeout=60)
    assert done[:2] == ["True", "1"]
    assert MlflowClient(mlflow_server.uri).get_run(done[2]).info.status == "FINISHED"
    assert f"tracking: {mlflow_server.uri} answers again" in caplog.text


def test_a_wrong_server_is_found_at_the_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mlflow_client, "START_PATIENCE_S", 0.2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    started_s = time.perf_counter()
    with pytest.raises(
        RequestError, match=r"http://127.0.0.1:1 does not answer: .*refused; start the server, or unset"
    ) as caught:
        Tracking.open(default_path=tmp_path, experiment="test")
    assert time.perf_counter() - started_s < 10
    assert "secret" not in str(caught.value)


def test_nested_parameters_become_dotted_names() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": None}) == {"a.b.c": 1, "a.d": 2, "e": None}
