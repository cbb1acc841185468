"""The whole road at nano size on this machine: photographs -> shards -> training -> registry -> endpoint -> picture.

    python pipelines/demo.py --out out/demo

Photographs come from the wheels of scikit-image and scikit-learn; nothing is downloaded. One of them is held out,
degraded, and restored through the HTTP endpoint by the model that was just trained and registered. The nano model is
tiny and its weights are untrained: the demo shows that the road holds, not what FaithDiff can restore. Running it
again goes on where it stopped.

Out: `photographs/ shards/ train/` (with the MLflow database), `lq.png restored.png hq.png` and `side_by_side.png`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pydantic
import yaml
from PIL import Image, ImageDraw, ImageFont

from faithdiff.degradation import PASD, degrade
from faithdiff.errors import InputError
from pipelines.photographs import LICENCE, write_photographs
from pipelines.prepare import PrepareConfig, prepare
from pipelines.train import TrainResult, train
from pipelines.training.recipe import TrainConfig
from sr_platform import cluster
from sr_platform.config import StrictConfig, load_config, read_recipe, run_job, validate

HELD_OUT = "coffee.png"
SIDE_PX = 384
SCALE = 4


class DemoConfig(StrictConfig):
    """The demo needs nothing: every setting has a default."""

    out: Path = Path("out/demo")
    """Folder of everything the demo makes."""
    seed: pydantic.NonNegativeInt = 0
    """Decides the degradation of the held-out picture and the noise of its restoration."""
    max_updates: pydantic.PositiveInt | None = None
    """Cuts each training stage short, for a quick look."""
    start_timeout_s: pydantic.PositiveFloat = 180.0
    """How long the endpoint may take to be ready."""


@dataclass(frozen=True)
class Places:
    """Where the demo leaves what."""

    out: Path

    @property
    def photographs(self) -> Path:
        return self.out / "photographs"

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def training(self) -> Path:
        return self.out / "train"

    def picture(self, name: str) -> Path:
        return self.out / f"{name}.png"


def main(argv: Sequence[str]) -> None:
    cfg = load_config(DemoConfig, argv, job="demo", description=__doc__ or "")
    start = time.perf_counter()
    places = Places(cfg.out.expanduser().resolve())
    if places.out.exists() and not places.out.is_dir():
        raise InputError(f"demo: out is {places.out}, which is a file; give a folder")
    result = walk(cfg, places)
    print(summary(places, result, time.perf_counter() - start))


def walk(cfg: DemoConfig, places: Places) -> TrainResult:
    """All five steps in a row; what each leaves is found by the next and by the next run of the demo."""
    announce(1, "photographs from the installed wheels")
    held_out = lay_out_photographs(places)
    with cluster.connected():
        announce(2, "prepare: photographs -> shards")
        prepare_shards(places)
        announce(3, "train: alignment module, then everything; tracked and registered")
        result = train_model(cfg, places)
    announce(4, "serve: the registered model behind HTTP")
    hq, lq = held_out_pair(held_out, cfg.seed)
    with endpoint(places, result, cfg.start_timeout_s) as url:
        announce(5, "restore: the held-out photograph through the endpoint")
        restored = restore_through_http(url, lq, cfg.seed)
    save_pictures(places, lq, restored, hq)
    return result


def announce(step: int, title: str) -> None:
    print(f"\n[{step}/5] {title}", flush=True)


def lay_out_photographs(places: Places) -> Path:
    """Writes the photographs to train on, and beside their folder the one held out, whose path is returned."""
    write_photographs(places.photographs)
    held_out = places.out / "held_out" / HELD_OUT
    held_out.parent.mkdir(parents=True, exist_ok=True)
    (places.photographs / HELD_OUT).replace(held_out)
    (places.photographs / HELD_OUT).with_suffix(".txt").replace(held_out.with_suffix(".txt"))
    return held_out


def prepare_shards(places: Places) -> None:
    """The job of pipelines/prepare.py with its nano recipe."""
    recipe = read_recipe("prepare_nano.yaml", job="demo")
    recipe["source"] = {"name": "photographs", "licence": LICENCE}
    request = {**recipe, "input": str(places.photographs), "out": str(places.shards)}
    prepare(validate(PrepareConfig, request, where="demo: prepare_nano.yaml"))


def train_model(cfg: DemoConfig, places: Places) -> TrainResult:
    """The job of pipelines/train.py with its nano recipe."""
    recipe = read_recipe("train_nano.yaml", job="demo")
    request = {**recipe, "data": str(places.shards), "out": str(places.training), "max_updates": cfg.max_updates}
    return train(validate(TrainConfig, request, where="demo: train_nano.yaml"))


def held_out_pair(path: Path, seed: int) -> tuple[Image.Image, Image.Image]:
    """The middle of the held-out photograph (hq), and its degraded quarter-size version (lq)."""
    photograph = Image.open(path).convert("RGB")
    left, top = (photograph.width - SIDE_PX) // 2, (photograph.height - SIDE_PX) // 2
    hq = photograph.crop((left, top, left + SIDE_PX, top + SIDE_PX))
    return hq, Image.fromarray(degrade(np.asarray(hq), PASD, key=path.stem, seed=seed))


@contextmanager
def endpoint(places: Places, result: TrainResult, timeout_s: float) -> Iterator[str]:
    """The Serve application in a process of its own, ready; its URL. It ends with the block."""
    port = _free_port()
    app_yaml, log = places.out / "serve.yaml", places.out / "serve.log"
    app_yaml.write_text(yaml.safe_dump(_serve_config(result, port), sort_keys=False))
    # Without an address it would join whatever Ray was started on this machine last, be it dead by now.
    address = os.environ.get("RAY_ADDRESS", "local")
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(app_yaml)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": result.tracking_uri,
        "PYTHONPATH": os.pathsep.join([str(cluster.REPOSITORY_PATH / "platform"), str(cluster.REPOSITORY_PATH)]),
    }
    with log.open("w") as lines:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
            command, cwd=cluster.REPOSITORY_PATH, env=environment, stdout=lines, stderr=lines, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log, timeout_s)
        yield url
    finally:
        _stop(process)


def restore_through_http(url: str, lq: Image.Image, seed: int) -> Image.Image:
    """What an application developer does: POST a picture, get a picture."""
    picture = _png(lq)
    fields = {"scale": SCALE, "seed": seed, "prompt": "A cup of espresso on a red saucer with a small spoon."}
    response = httpx.post(
        f"{url}/v1/upscale", files={"picture": ("lq.png", picture, "image/png")}, data=fields, timeout=600
    )
    if response.status_code != 200:
        raise RuntimeError(f"demo: the endpoint answered {response.status_code}: {response.text}")
    return Image.open(BytesIO(response.content)).convert("RGB")


def save_pictures(places: Places, lq: Image.Image, restored: Image.Image, hq: Image.Image) -> None:
    """The three pictures, and all of them side by side under their names."""
    for name, picture in (("lq", lq), ("restored", restored), ("hq", hq)):
        picture.save(places.picture(name))
    side_by_side(
        {
            f"lq, {lq.width} x {lq.height} px, enlarged": lq.resize(hq.size, Image.Resampling.NEAREST),
            "restored by the (untrained) nano model": restored,
            f"hq, {hq.width} x {hq.height} px": hq,
        }
    ).save(places.picture("side_by_side"))


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures of one size next to each other, each under its title."""
    margin_px, title_px = 12, 28
    width, height = next(iter(pictures.values())).size
    sheet = Image.new("RGB", (margin_px + (width + margin_px) * len(pictures), height + title_px + margin_px), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for index, (title, picture) in enumerate(pictures.items()):
        left = margin_px + index * (width + margin_px)
        draw.text((left, 6), title, fill="black", font=font)
        sheet.paste(picture, (left, title_px))
    return sheet


def summary(places: Places, result: TrainResult, seconds: float) -> str:
    """Where everything is, and the commands that go on from here."""
    lines = [
        "",
        f"The whole road in {seconds:.0f} s.",
        f"  look first    {places.picture('side_by_side')}",
        f"  pictures      {places.picture('lq')}  {places.picture('restored')}  {places.picture('hq')}",
        f"  shards        {places.shards}",
        f"  model         {result.model_uri}  ({result.registered_uri})",
        f"  MLflow        {result.tracking_uri}",
        "",
        "The MLflow page:",
        f"  {_command('mlflow')} ui --backend-store-uri {result.tracking_uri} --port 5000",
        "Serve the model and restore a picture of yours:",
        f"  MLFLOW_TRACKING_URI={result.tracking_uri} \\",
        f"    {_command('serve')} run --address local serve.app:build_app model={result.registered_uri}",
        "  curl -F picture=@photo.jpg -F scale=4 http://127.0.0.1:8000/v1/upscale -o restored.png",
        "",
        "The nano weights are untrained but for these few updates, so the picture is noise in the colours of the",
        "input: this shows that the road holds, not what FaithDiff can restore.",
    ]
    return "\n".join(lines)


def _serve_config(result: TrainResult, port: int) -> dict[str, object]:
    application = {"name": "faithdiff", "import_path": "serve.app:build_app", "args": {"model": result.registered_uri}}
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # nobody listens yet
        time.sleep(0.5)
    tail = "\n".join(log.read_text().splitlines()[-15:])
    raise RuntimeError(f"demo: the endpoint was not ready after {timeout_s:g} s; the end of {log}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGINT, on which `serve run` shuts its replicas down; whoever ignores it is ended with its whole session."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _command(name: str) -> str:
    """The program beside this interpreter, as one would type it from here."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    run_job(main, user_errors=(InputError,))
