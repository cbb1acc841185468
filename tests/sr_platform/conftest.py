"""MLflow for the tests of this room in a database file, and what is kept in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sr_platform.tracking import Tracking


@pytest.fixture(scope="session")
def sqlite_tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """One database file for the session: creating MLflow's tables takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Tracking.open(default_path=tmp_path_factory.mktemp("tracking"), experiment="test")


@pytest.fixture
def sqlite(sqlite_tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """The database file of the session, which MLFLOW_TRACKING_URI names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_tracking.uri)
    return sqlite_tracking


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something like a model: two files, one of them in a folder of its own."""
    path = tmp_path / "pipeline"
    (path / "unet").mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    (path / "unet" / "weights.bin").write_bytes(b"\0" * 1000)
    return path
