"""One rank of a gloo process group, as a program: runs functions of test files until its parent hangs up.

Test files are no modules that a spawned process could import, so a function comes as (path of its file, name).
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client
from types import ModuleType

import torch
import torch.distributed

_PATIENCE = datetime.timedelta(seconds=100)


@functools.cache
def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loaded_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(address: str, rank: int, world_size: int, store: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=_PATIENCE
    )
    with Client(address) as parent:
        while True:
            try:
                path, name, args = pickle.loads(parent.recv_bytes())  # noqa: S301
            except EOFError:
                return
            try:
                answer = (rank, True, getattr(load(path), name)(*args))
            except Exception:  # noqa: BLE001
                answer = (rank, False, traceback.format_exc())
            parent.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
