"""The two passes of evaluate.py over Ray: look at every picture, then restore and score each.

inspect:  tasks                  a digest per picture, and everything that is wrong with any of them
measure:  restore > score        Ray Data, a block per picture; restorers hold the model, scorers the metrics
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from tqdm import tqdm

from pipelines.evaluation.measuring import Measure, Score
from pipelines.evaluation.pictures import EvaluationPicture, Place, all_problems, load
from pipelines.evaluation.protocol import EvaluateConfig
from pipelines.evaluation.restoring import Restore
from pipelines.preparation.passes import quiet_ray_data
from pipelines.preparation.progress import watched
from pipelines.stages.sample import map_shards
from sr_platform.errors import InputDataError
from sr_platform.storage import open_storage

_PICTURES_PER_TASK = 8


@dataclass(frozen=True)
class Measured:
    """Everything that came back, in the order of the pictures."""

    pictures: list[dict[str, Any]]
    scores: list[Score]


def inspect_pictures(cfg: EvaluateConfig, pictures: Sequence[EvaluationPicture]) -> dict[str, str]:
    """The digest of every picture's files.

    Raises:
        InputDataError: pictures are damaged or do not fit each other; each is named.
    """
    parts = [pictures[at : at + _PICTURES_PER_TASK] for at in range(0, len(pictures), _PICTURES_PER_TASK)]
    dumped = cfg.model_dump(mode="json")
    look = ray.remote(num_cpus=cfg.workers.num_cpus)(_inspect)
    pending = [look.remote(dumped, [picture.dump() for picture in part]) for part in parts]
    digests: dict[str, str] = {}
    problems: dict[str, str] = {}
    with tqdm(total=len(pictures), desc="look at pictures", unit=" pictures", disable=None) as bar:
        for future in pending:
            for name, digest, problem in ray.get(future):
                (problems if problem else digests)[name] = problem or digest
                bar.update()
    if problems:
        raise all_problems(problems, len(pictures), open_storage(cfg.data).uri)
    return digests


def _inspect(cfg: Mapping[str, Any], pictures: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, digest, problem) of each."""
    config, found = EvaluateConfig.model_validate(cfg), []
    for text in pictures:
        picture = EvaluationPicture.parse(text)
        try:
            found.append((picture.name, load(picture, config).digest, ""))
        except InputDataError as error:
            found.append((picture.name, "", str(error)))
    return found


def measure_pictures(
    cfg: EvaluateConfig,
    pictures: Sequence[EvaluationPicture],
    outputs: Mapping[str, Mapping[str, Place]],
    *,
    model: str,
    model_digest: str,
    weights: Mapping[str, str],
    cache: str,
) -> Measured:
    """Restores and scores every picture; what the cache knows is neither restored nor scored again."""
    rows = [_row(number, picture, outputs) for number, picture in enumerate(pictures)]
    places = {"report": open_storage(cfg.report).uri, "cache": cache}
    dumped = cfg.model_dump(mode="json")
    restore = {"cfg": dumped, "model": model, "model_digest": model_digest, **places}
    measure = {"cfg": dumped, "weights": dict(weights), **places}
    found: list[dict[str, Any]] = []
    with quiet_ray_data(), watched({"restore": len(rows), "score": len(rows)}):
        ds = ray.data.from_items(rows, override_num_blocks=len(rows))
        ds = _stage(ds, Restore, cfg.workers.restorers, cfg.workers.restorer_num_gpus, cfg, restore, name="restore")
        ds = _stage(ds, Measure, cfg.workers.scorers, cfg.workers.scorer_num_gpus, cfg, measure, name="score")
        found.extend(ds.iter_rows())
    if len(found) != len(rows):
        raise RuntimeError(f"evaluate: {len(rows)} pictures were to be scored and {len(found)} came back; run it again")
    found.sort(key=lambda row: row["number"])
    scores = [Score(*score) for row in found for score in json.loads(row["scores"])]
    return Measured([json.loads(row["about"]) for row in found], scores)


def _row(number: int, picture: EvaluationPicture, outputs: Mapping[str, Mapping[str, Place]]) -> dict[str, Any]:
    own = {
        method: dataclasses.asdict(places[picture.name]) for method, places in outputs.items() if picture.name in places
    }
    return {"number": number, "picture": picture.dump(), "outputs": json.dumps(own)}


def _stage(
    ds: ray.data.Dataset,
    stage: type[Any],
    num_actors: int,
    num_gpus: float,
    cfg: EvaluateConfig,
    arguments: Mapping[str, Any],
    *,
    name: str,
) -> ray.data.Dataset:
    resources = {"num_gpus": num_gpus} if num_gpus else {}
    return map_shards(
        ds,
        stage,
        num_cpus=cfg.workers.num_cpus,
        name=name,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        fn_constructor_kwargs=dict(arguments),
        **resources,
    )
