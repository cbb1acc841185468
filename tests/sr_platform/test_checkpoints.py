"""Checkpoint files without a network: real files and a real, spoiled S3 server; ranks are writers in one process."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sr_platform import checkpoint_writer
from sr_platform.checkpoint_writer import CheckpointWriter
from sr_platform.checkpoints import CheckpointReader, list_checkpoints, open_checkpoint
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.storage import Storage
from sr_platform.train_state import AVERAGE, WEIGHT, Fragment, Snapshot

SHAPES = {"unet.conv": (3, 2, 5), "unet.bias": (7,), "scale": ()}
KINDS = (WEIGHT, AVERAGE)


def whole(name: str, kind: str, update: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * update + 10 * list(SHAPES).index(name) + KINDS.index(kind))
    return torch.randn(SHAPES[name], generator=generator)


def snapshot(rank: int = 0, world_size: int = 1, update: int = 1) -> Snapshot:
    """What a rank owns where ranks cut every parameter in equal shares."""
    fragments = {}
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        start, end = numel * rank // world_size, numel * (rank + 1) // world_size
        if start < end:
            fragments[name] = Fragment(start, {k: whole(name, k, update).reshape(-1)[start:end] for k in KINDS})
    return Snapshot(fragments, SHAPES, torch.tensor(float(update)), {"cur_scale": 256.0})


def writers(uri: str | Path, world_size: int = 1, *, attempt: str = "one", **kwargs: Any) -> list[CheckpointWriter]:
    options = {"keep": 2, "commit_timeout_s": 20.0, **kwargs}
    return [
        CheckpointWriter(str(uri), rank=rank, world_size=world_size, attempt=attempt, **options)
        for rank in range(world_size)
    ]


def save(ranks: list[CheckpointWriter], update: int, meta: dict[str, Any] | None = None) -> None:
    """All ranks save, and it is committed."""
    for rank, writer in enumerate(ranks):
        writer.save(update, snapshot(rank, len(ranks), update), (meta or {}) if rank == 0 else {"rank": rank})
    for writer in ranks:
        writer.wait()


def opened(uri: str | Path, update: int | None = None) -> CheckpointReader:
    reader = open_checkpoint(str(uri), update)
    assert reader is not None
    return reader


def assert_holds(reader: CheckpointReader, update: int) -> None:
    assert reader.update == update
    for name in SHAPES:
        for kind in KINDS:
            assert torch.equal(reader.tensor(name, kind), whole(name, kind, update)), (name, kind)


def files_below(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A storage that lets nothing be written before the event is set."""
    event, write = threading.Event(), Storage.write_bytes_atomic

    def write_later(self: Storage, name: str, data: bytes) -> None:
        assert event.wait(20)
        write(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes_atomic", write_later)
    yield event
    event.set()


@pytest.fixture
def break_storage(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`break_storage("checkpoint.json")`: files whose names end like that cannot be written."""

    def break_for(ending: str) -> None:
        write = Storage.write_bytes_atomic

        def write_or_fail(self: Storage, name: str, data: bytes) -> None:
            if name.endswith(ending):
                raise StorageError(f"no room for {name}")
            write(self, name, data)

        monkeypatch.setattr(Storage, "write_bytes_atomic", write_or_fail)

    return break_for


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_what_ranks_saved_in_shares_is_read_whole(tmp_path: Path, world_size: int) -> None:
    save(writers(tmp_path, world_size), 3, {"digest": "abc", "account": {"losses": [0.5]}})
    reader = opened(tmp_path)
    assert_holds(reader, 3)
    assert reader.meta == {"digest": "abc", "account": {"losses": [0.5]}}
    assert reader.kinds == set(KINDS)
    assert reader.shapes == SHAPES
    assert (reader.optimizer_steps, reader.loss_scaler) == (3, {"cur_scale": 256.0})
    assert reader.uri == f"{tmp_path}/update_00000003"


def test_any_range_is_read_across_files(tmp_path: Path) -> None:
    save(writers(tmp_path, 3), 1)
    reader, expected = opened(tmp_path), whole("unet.conv", WEIGHT).reshape(-1)
    for start in range(30):
        for numel in range(30 - start + 1):
            assert torch.equal(reader.read("unet.conv", WEIGHT, start, numel), expected[start : start + numel])


def test_large_states_are_cut_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "PART_BYTES", 4 * 11)
    save(writers(tmp_path, 2), 1)
    assert_holds(opened(tmp_path), 1)
    folder = tmp_path / "update_00000001"
    # 38 elements of 2 kinds on 2 ranks.
    assert files_below(folder) == ["checkpoint.json"] + [
        f"one-0000{rank}-of-00002.00{part}.safetensors" for rank in range(2) for part in range(4)
    ]
    sizes = [sum(t.numel() for t in safetensors.torch.load_file(p).values()) for p in folder.glob("*.safetensors")]
    assert max(sizes) == 11


def test_every_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    save(writers(tmp_path, 2), 1)
    (path,) = tmp_path.rglob("*-00001-of-00002.000.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["unet.conv|weight"], whole("unet.conv", WEIGHT).reshape(-1)[15:])
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["unet.conv|weight"] == "15"


def test_a_spoiled_s3_server_ends_up_with_the_right_bytes(faulty_s3: Callable[..., Any]) -> None:
    server = faulty_s3(seed=3, rate=0.1)
    ranks = writers(f"{server.uri}/run", 2)
    for update in range(1, 7):
        save(ranks, update, {"update": update})
    assert sum(server.injected.values()) > 5
    assert list_checkpoints(f"{server.uri}/run") == [5, 6]
    reader = opened(f"{server.uri}/run")
    assert_holds(reader, 6)
    assert reader.meta == {"update": 6}


def test_megabytes_go_to_s3_and_back(s3_uri: str) -> None:
    tensor = torch.randn(1_000_000)
    large = Snapshot({"w": Fragment(0, {WEIGHT: tensor})}, {"w": (1000, 1000)}, torch.tensor(1.0), {})
    (writer,) = writers(s3_uri)
    writer.save(1, large, {})
    writer.close()
    assert torch.equal(opened(s3_uri).tensor("w", WEIGHT), tensor.reshape(1000, 1000))


def test_nothing_counts_before_the_last_rank_is_there(tmp_path: Path) -> None:
    first, second = writers(tmp_path, 2)
    first.save(1, snapshot(0, 2), {})
    time.sleep(0.3)
    assert list_checkpoints(str(tmp_path)) == []
    assert open_checkpoint(str(tmp_path)) is None
    second.save(1, snapshot(1, 2), {})
    # Once any rank has waited, it counts.
    second.wait()
    assert_holds(opened(tmp_path), 1)
    first.close()


def test_a_rank_that_never_comes_is_an_error_and_no_checkpoint(tmp_path: Path) -> None:
    first, second = writers(tmp_path, 2, commit_timeout_s=0.2)
    first.save(1, snapshot(0, 2), {})
    with pytest.raises(StorageError, match="the files of all 2 ranks in update_00000001 did not come within"):
        first.close()
    second.save(1, snapshot(1, 2), {})
    with pytest.raises(StorageError, match="the commit of update_00000001 by rank 0 did not come within"):
        second.wait()


def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    save(writers(tmp_path, 2), 1)
    code = (
        "import os, sys, time, torch\n"
        "from sr_platform.checkpoint_writer import CheckpointWriter\n"
        "from sr_platform.train_state import Fragment, Snapshot\n"
        "w = CheckpointWriter(sys.argv[1], rank=0, world_size=2, attempt='two', keep=2)\n"
        "w.save(2, Snapshot({'a': Fragment(0, {'weight': torch.ones(9)})}, {'a': (9,)}, torch.tensor(2.), {}), {})\n"
        "while not os.path.exists(sys.argv[1] + '/update_00000002/two-00000-of-00002.json'): time.sleep(.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=100)
    assert killed.returncode == -9
    assert len(files_below(tmp_path / "update_00000002")) == 2
    assert_holds(opened(tmp_path), 1)

    # The next attempt removes it, but only once it got further itself.
    ranks = writers(tmp_path, 2, attempt="three")
    assert len(files_below(tmp_path / "update_00000002")) == 2
    save(ranks, 3)
    assert {name.partition("/")[0] for name in files_below(tmp_path)} == {"update_00000001", "update_00000003"}


def test_attempts_do_not_mix(tmp_path: Path) -> None:
    lost, new = writers(tmp_path, 2, attempt="lost"), writers(tmp_path, 2, attempt="new")
    # One rank of each: together they would be complete.
    lost[0].save(4, snapshot(0, 2, update=99), {"attempt": "lost"})
    new[1].save(4, snapshot(1, 2, update=4), {})
    time.sleep(0.3)
    assert list_checkpoints(str(tmp_path)) == []
    new[0].save(4, snapshot(0, 2, update=4), {"attempt": "new"})
    for writer in new:
        writer.wait()
    assert_holds(opened(tmp_path), 4)
    # The old one comes to its end meanwhile, and is one whole checkpoint again.
    lost[1].save(4, snapshot(1, 2, update=99), {})
    for writer in lost:
        writer.close()
    reader = opened(tmp_path)
    assert reader.meta == {"attempt": "lost"}
    assert torch.equal(reader.tensor("unet.bias", WEIGHT), whole("unet.bias", WEIGHT, 99))


def test_an_attempt_that_goes_back_replaces_what_the_one_before_had_saved(tmp_path: Path) -> None:
    save(writers(tmp_path, 1, attempt="first"), 2, {"attempt": 1})
    save(writers(tmp_path, 2, attempt="second"), 2, {"attempt": 2})
    reader = opened(tmp_path)
    assert_holds(reader, 2)
    assert reader.meta == {"attempt": 2}


def test_a_newer_attempts_unfinished_files_are_never_taken_for_left_over(tmp_path: Path) -> None:
    (old,), (_, second) = writers(tmp_path, 1, attempt="old"), writers(tmp_path, 2, attempt="new")
    second.save(3, snapshot(1, 2), {})
    time.sleep(0.3)
    save([old], 5)
    assert len([name for name in files_below(tmp_path) if "/new-" in name]) == 2


def test_a_lost_attempt_that_commits_late_keeps_its_files(tmp_path: Path) -> None:
    lost = writers(tmp_path, 2, attempt="lost")
    lost[1].save(4, snapshot(1, 2, update=4), {})
    wait_for(lambda: len(files_below(tmp_path)) == 2)
    (new,) = writers(tmp_path, attempt="new")
    lost[0].save(4, snapshot(0, 2, update=4), {})
    for writer in lost:
        writer.close()
    save([new], 5)
    assert list_checkpoints(str(tmp_path)) == [4, 5]
    assert_holds(opened(tmp_path, 4), 4)


def test_what_a_lost_attempt_left_in_the_folder_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    lost = writers(tmp_path, 2, attempt="lost")
    lost[1].save(4, snapshot(1, 2, update=99), {})
    wait_for(lambda: len(files_below(tmp_path)) == 2)
    save(writers(tmp_path, attempt="new"), 4)
    assert files_below(tmp_path / "update_00000004") == ["checkpoint.json", "new-00000-of-00001.000.safetensors"]
    assert_holds(opened(tmp_path), 4)


def test_what_a_checkpoints_own_attempt_left_beside_it_is_removed_by_the_next(tmp_path: Path) -> None:
    """A worker killed between the commit and what follows it, and one killed there that had a lost one's files too."""
    for update, stray in ((2, "one-2-00000-of-00001.json"), (4, "lost-00001-of-00002.000.safetensors")):
        save(writers(tmp_path, attempt=f"one-{update}"), update)
        (tmp_path / f"update_{update:08d}" / stray).write_bytes(b"{}")
    save(writers(tmp_path, attempt="two", keep=9), 6)
    parts = {2: "one-2", 4: "one-4", 6: "two"}
    assert files_below(tmp_path) == [
        f"update_{update:08d}/{name}"
        for update, attempt in parts.items()
        for name in ("checkpoint.json", f"{attempt}-00000-of-00001.000.safetensors")
    ]
    assert_holds(opened(tmp_path, 2), 2)
    assert_holds(opened(tmp_path, 4), 4)


def test_a_table_written_again_because_the_answer_was_lost_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit follows the first time; the second comes after it."""
    write = Storage.write_bytes_atomic

    def write_twice(self: Storage, name: str, data: bytes) -> None:
        write(self, name, data)
        if name.endswith("00001-of-00002.json"):
            wait_for(lambda: list_checkpoints(str(tmp_path)) == [1])
            time.sleep(0.3)
            write(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes_atomic", write_twice)
    save(writers(tmp_path, 2), 1)
    assert files_below(tmp_path) == files_below_one(tmp_path, 1)


@pytest.mark.parametrize("refusal", [StorageError("down"), RequestError("refused: AccessDenied")])
def test_what_cannot_be_deleted_stops_no_training_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusal: Exception
) -> None:
    ranks, delete = writers(tmp_path, 2, keep=1), Storage.delete
    save(ranks, 1)

    def delete_tables_alone(self: Storage, name: str) -> None:
        if name.endswith(".safetensors"):
            raise refusal
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", lambda *_: (_ for _ in ()).throw(refusal))
        save(ranks, 2)
        assert list_checkpoints(str(tmp_path)) == [1, 2]
        patch.setattr(Storage, "delete", delete_tables_alone)
        save(ranks, 3)
        assert list_checkpoints(str(tmp_path)) == [3]
        assert (tmp_path / "update_00000001").exists()
    assert caplog.text.count(f"could not be removed: {refusal}") == 3
    save(ranks, 4)
    assert_holds(opened(tmp_path), 4)
    assert files_below(tmp_path) == files_below_one(tmp_path, 4)


def files_below_one(path: Path, update: int) -> list[str]:
    """What a checkpoint of two ranks consists of."""
    names = ["checkpoint.json", *(f"one-0000{rank}-of-00002.000.safetensors" for rank in range(2))]
    return [f"update_{update:08d}/{name}" for name in names]


def wait_for(fact: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not fact():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_the_newest_stay_and_those_at_multiples(tmp_path: Path) -> None:
    ranks = writers(tmp_path, 2, keep=2, keep_every_updates=4)
    for update in range(1, 10):
        save(ranks, update)
    assert list_checkpoints(str(tmp_path)) == [4, 8, 9]
    assert {name.partition("/")[0] for name in files_below(tmp_path)} == {f"update_0000000{u}" for u in (4, 8, 9)}
    assert_holds(opened(tmp_path, 4), 4)


def test_a_run_that_went_back_leaves_newer_checkpoints_alone(tmp_path: Path) -> None:
    for attempt, update in (("a", 1), ("b", 8), ("c", 9), ("d", 3), ("e", 4)):
        save(writers(tmp_path, keep=1, attempt=attempt), update)
    assert list_checkpoints(str(tmp_path)) == [4, 9]


def test_save_returns_while_storage_is_slow_and_the_next_one_waits(tmp_path: Path, gate: threading.Event) -> None:
    (writer,) = writers(tmp_path)
    writer.save(1, snapshot(update=1), {})
    second = threading.Thread(target=writer.save, args=(2, snapshot(update=2), {}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert list_checkpoints(str(tmp_path)) == []
    gate.set()
    second.join(20)
    assert 1 in list_checkpoints(str(tmp_path))
    writer.close()
    assert list_checkpoints(str(tmp_path)) == [1, 2]


@pytest.mark.parametrize("ending", ["000.safetensors", "00000-of-00001.json", "checkpoint.json"])
@pytest.mark.parametrize("raised_by", ["save", "wait", "close"])
def test_what_went_wrong_in_the_background_is_raised_next(
    tmp_path: Path, break_storage: Callable[[str], None], ending: str, raised_by: str
) -> None:
    (writer,) = writers(tmp_path)
    save([writer], 1)
    break_storage(ending)
    writer.save(2, snapshot(update=2), {})
    arguments = (3, snapshot(update=3), {}) if raised_by == "save" else ()
    with pytest.raises(StorageError, match="no room for update_00000002/"):
        getattr(writer, raised_by)(*arguments)
    assert list_checkpoints(str(tmp_path)) == [1]


def test_after_an_error_the_writer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (writer,) = writers(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_bytes_atomic", lambda *_: (_ for _ in ()).throw(StorageError("down")))
        writer.save(1, snapshot(), {})
        with pytest.raises(StorageError, match="down"):
            writer.wait()
    save([writer], 2)
    writer.close()
    assert list_checkpoints(str(tmp_path)) == [2]


def test_a_state_with_a_gap_is_not_committed(tmp_path: Path) -> None:
    (writer,) = writers(tmp_path)
    writer.save(1, snapshot(rank=1, world_size=2), {})
    with pytest.raises(AssertionError, match=r"unet.conv\|average has a gap or an overlap at element 0"):
        writer.wait()
    assert list_checkpoints(str(tmp_path)) == []


def damaged(tmp_path: Path, how: str) -> None:
    """Two checkpoints, the newer one spoiled."""
    ranks = writers(tmp_path, 2)
    save(ranks, 1)
    save(ranks, 2)
    folder = tmp_path / "update_00000002"
    path = next(folder.glob("*-00001-*.safetensors"))
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "gone":
        path.unlink()
    elif how == "overlap":
        table = json.loads((folder / "checkpoint.json").read_text())
        table["files"][1]["pieces"][0][2] -= 1
        (folder / "checkpoint.json").write_text(json.dumps(table))
    else:
        (folder / "checkpoint.json").write_text('{"format": 2}')


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("cut off", r"damaged: one-00001-of-00002\.000\.safetensors has \d+ of \d+ bytes"),
        ("gone", r"damaged: one-00001-of-00002\.000\.safetensors has 0 of \d+ bytes"),
        ("overlap", r"damaged: unet.conv\|weight has a gap or an overlap at element 14"),
        ("version", "is of another version"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, problem: str
) -> None:
    damaged(tmp_path, how)
    with pytest.raises(InputDataError, match=problem):
        open_checkpoint(str(tmp_path), 2)
    with caplog.at_level(logging.WARNING):
        assert_holds(opened(tmp_path), 1)
    assert "update_00000002" in caplog.text
    assert "the one before it is looked at" in caplog.text


def test_where_all_checkpoints_are_damaged_nothing_starts_silently_from_the_beginning(tmp_path: Path) -> None:
    damaged(tmp_path, "gone")
    next((tmp_path / "update_00000001").glob("*.safetensors")).unlink()
    with pytest.raises(InputDataError, match="update_00000002 is damaged"):
        open_checkpoint(str(tmp_path))


def test_a_checkpoint_that_is_not_there_is_an_error_that_tells_which_are(tmp_path: Path) -> None:
    save(writers(tmp_path), 5)
    with pytest.raises(InputDataError, match=r"has none of update 7; it has \[5\]"):
        open_checkpoint(str(tmp_path), 7)
    assert open_checkpoint(str(tmp_path / "elsewhere")) is None


def test_a_file_that_is_cut_off_after_opening_is_noticed(tmp_path: Path) -> None:
    save(writers(tmp_path), 1)
    reader = opened(tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputDataError, match=r"has 0 of 4 bytes of scale\|average"):
        reader.tensor("scale", AVERAGE)


def test_what_a_checkpoint_does_not_hold_is_named(tmp_path: Path) -> None:
    save(writers(tmp_path), 1)
    with pytest.raises(InputDataError, match="has no exp_avg of scale; it has average, weight of 3 parameters"):
        opened(tmp_path).tensor("scale", "exp_avg")


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_byte_that_changed_is_found_when_everything_is_read(
    tmp_path: Path, request: pytest.FixtureRequest, where: str
) -> None:
    uri = str(tmp_path) if where == "local" else request.getfixturevalue("s3_uri")
    save(writers(uri, 3), 1)
    opened(uri).verify()
    storage = Storage(opened(uri).uri)
    name = "one-00001-of-00003.000.safetensors"
    data = bytearray(storage.read_bytes(name))
    data[-1] ^= 1
    storage.write_bytes_atomic(name, bytes(data))
    with pytest.raises(InputDataError, match=rf"update_00000001/{name} differs from what was written; give another"):
        opened(uri).verify()


def test_the_digest_tells_checkpoints_apart(tmp_path: Path) -> None:
    for folder, update in (("a", 1), ("b", 1), ("c", 2)):
        save(writers(tmp_path / folder), update)
    a, b, c = (opened(tmp_path / folder).digest for folder in "abc")
    assert a == b != c


def test_an_attempts_name_is_not_used_again(tmp_path: Path) -> None:
    save(writers(tmp_path), 1)
    with pytest.raises(AssertionError, match="an attempt has a new name"):
        writers(tmp_path)
