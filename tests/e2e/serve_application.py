"""The application on a Ray of its own, until standard input ends; prints its address when it answers.

    python tests/e2e/serve_application.py '{"model": "nano", "restorer": {...}}'

A program, because Ray reads its variables when it starts, and the Ray that tests share runs already.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from sr_platform import cluster


def main(settings: dict[str, Any]) -> None:
    from serve.app import build_app

    from ray import serve  # isort: skip

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with cluster.connected(num_cpus=6, local=True):
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 300})
        serve.run(build_app(settings), name="faithdiff", route_prefix="/")
        print(f"serving at http://127.0.0.1:{port}", flush=True)
        sys.stdin.read()
        serve.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
