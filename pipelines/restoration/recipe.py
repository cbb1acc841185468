"""The recipe of `restore.py`: what becomes of which pictures, and who works on them.

Settings that decide a result's bytes are in `settings()`. All others, such as workers and limits, may change between
runs over one output.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import httpx
import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from faithdiff.picture_files import OutputOptions
from faithdiff.request import ColorFix, RestorationRequest, StartFrom
from pipelines.restoration.naming import Format, check_template, written_format
from pipelines.sources import SourceConfig
from pipelines.stages.caption import NOT_CONTENT as CAPTION_NOT_CONTENT
from pipelines.stages.caption import CaptionConfig
from pipelines.stages.workers import WorkersConfig
from sr_platform.config import StrictConfig
from sr_platform.shards import json_digest

SOURCE_NAME = "input"
_REQUEST = (
    *("scale", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "start_from", "color_fix"),
    "tile_px",
)


class OutputConfig(StrictConfig):
    """How results are written."""

    format: Literal["same", "png", "jpeg", "webp", "tiff"] = "same"
    """same: that of the input, by the end of its name."""
    quality: int = Field(default=90, ge=1, le=100)
    """Of JPEG and WebP."""
    keep_metadata: bool = True
    """Keep EXIF data such as place and time of the shot; the colour profile is always kept."""


class LimitsConfig(StrictConfig):
    """How large a picture may be; a larger one fails alone, before anything of it is decoded."""

    max_file_mib: PositiveFloat = 256.0
    """Of an input file."""
    max_input_megapixels: PositiveFloat = 100.0
    max_output_megapixels: PositiveFloat = 128.0
    """Of a result. A worker needs about 150 bytes of memory for each pixel of it, besides the model."""
    max_side_px: PositiveInt = 65_535
    """Longest side of an input."""

    @property
    def max_upload_bytes(self) -> int:
        return int(self.max_file_mib * 2**20)

    @property
    def max_input_px(self) -> int:
        return int(self.max_input_megapixels * 1e6)


class RestoreWorkers(StrictConfig):
    """Who works, and how many at once."""

    num_actors: PositiveInt = 1
    """Processes that hold the model; each restores one picture, reads the next and writes the last at a time."""
    num_cpus: PositiveFloat = 1.0
    """Logical CPUs of each of them."""
    num_gpus: NonNegativeFloat = 0.0
    """GPUs of each of them; above 0 the model runs on cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network."""
    caption_actors: PositiveInt = 1
    """Processes that hold the captioning model, or talk to the captioning endpoint."""
    caption_num_gpus: NonNegativeFloat = 0.0
    """GPUs, or a fraction of one, for each captioning process."""
    caption_batch_size: PositiveInt = 8
    """Pictures per call of the captioning model."""

    def of_captions(self) -> WorkersConfig:
        """As the stages of `prepare.py` take them."""
        return WorkersConfig(
            caption_actors=self.caption_actors,
            caption_num_gpus=self.caption_num_gpus,
            caption_batch_size=self.caption_batch_size,
        )


class ServiceConfig(StrictConfig):
    """How a running endpoint is used."""

    api_key_env: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")] = "FAITHDIFF_API_KEY"
    """Name of the environment variable that holds the key; not set: no key is sent. A key is never a flag."""
    max_in_flight: PositiveInt = 8
    """Jobs that wait or run there at once."""
    priority: int = Field(default=5, ge=0, le=9)
    """Of the jobs; 9 is served before 0."""
    timeout_s: PositiveFloat = 120.0
    """For one answer."""
    give_up_after_s: PositiveFloat = 3600.0
    """Longest time without a single answer; then the run ends, and the same command goes on where it stopped."""


class RestoreConfig(StrictConfig):
    """Pictures to restored pictures."""

    input: str
    """Folder, prefix or archive of pictures: a path, file:// or s3:// URI."""
    out: str
    """Where the results go, with the sub-folders of the input: a path, file:// or s3:// URI."""
    model: str = ""
    """Preset, folder, or models:/name@alias; empty with an endpoint, which has a model of its own."""
    endpoint: str = ""
    """Address of a running service such as http://host:8000, whose jobs do the work; empty: Ray Data does it here."""
    scale: int = 4
    """Output size / input size; 1 restores at the same size."""
    prompt: str = ""
    """Caption of the pictures that have none of their own (see caption)."""
    negative_prompt: str = ""
    num_inference_steps: PositiveInt = 20
    guidance_scale: float = 5.0
    seed: NonNegativeInt = 0
    """Of every picture alike: a picture gives the same result in any folder, under any name, alone or among others."""
    start_from: StartFrom = "lq"
    color_fix: ColorFix = "adain"
    tile_px: PositiveInt = 1024
    """Side of the tiles of large pictures; an endpoint has its own."""
    name_template: str = "{stem}_x{scale}{suffix}"
    """Name of a result in its folder, of {stem} and {suffix} (with its dot), and perhaps {scale}, {seed}, {steps}."""
    include: tuple[str, ...] = ("**",)
    """Which pictures are taken: patterns for the path below the input, in which an archive counts as a folder."""
    exclude: tuple[str, ...] = ()
    """Which of those are not: **/ stands for any folders, * for anything within a name."""
    output: OutputConfig = OutputConfig()
    caption: CaptionConfig = CaptionConfig()
    """Who describes the pictures. Mode text takes the .txt or .json beside a picture, else `prompt`; reuse_existing
    False leaves what lies beside it alone."""
    overwrite: bool = False
    """Make results again that were made with other settings or model, and replace files that this job did not make."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of the pictures of a run; with more that failed the exit status is 1, after all others are done."""
    limits: LimitsConfig = LimitsConfig()
    workers: RestoreWorkers = RestoreWorkers()
    service: ServiceConfig = ServiceConfig()
    dry_run: bool = False
    """Print what would be done, with estimates from a small measurement, and restore nothing."""

    @pydantic.field_validator("name_template")
    @classmethod
    def _template_can_be_used(cls, template: str) -> str:
        check_template(template)
        return template

    @pydantic.field_validator("endpoint")
    @classmethod
    def _is_plain_address(cls, endpoint: str) -> str:
        if not endpoint:
            return endpoint
        try:
            url = httpx.URL(endpoint)
        except httpx.InvalidURL as error:
            raise ValueError(f"got {endpoint!r} ({error}); give http://host:port") from None
        if url.userinfo or url.query or url.fragment:
            # Not repeated: it may hold a key.
            raise ValueError(
                "an address with a user, a query or a fragment; give http://host:port, and service.api_key_env"
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"got {endpoint!r}, no http address; give http://host:port")
        return endpoint.rstrip("/")

    @pydantic.model_validator(mode="after")
    def _one_engine(self) -> RestoreConfig:
        if bool(self.model) == bool(self.endpoint):
            came = f"model {self.model!r} and endpoint {self.endpoint!r}" if self.model else "neither"
            raise ValueError(
                f"got {came}; give a model, which is run here, or an endpoint, which has its own (then --model '')"
            )
        RestorationRequest(**self.restoration(""))  # raises InputError, a ValueError that says what is out of range
        return self

    def restoration(self, prompt: str) -> dict[str, Any]:
        """Of one picture, as FaithDiffPipeline takes it."""
        return {"prompt": prompt, **{name: getattr(self, name) for name in _REQUEST}}

    def request_fields(self, path: str, prompt: str) -> dict[str, Any]:
        """Of one picture, as the service's form takes them."""
        fields = {name: getattr(self, name) for name in _REQUEST if name != "tile_px"}
        options = self.output_options(path)
        return {
            **fields,
            "prompt": prompt,
            "output_format": options.format,
            "output_quality": options.quality,
            "keep_metadata": options.keep_metadata,
        }

    def output_options(self, path: str) -> OutputOptions:
        return OutputOptions(
            format=self.format_of(path), quality=self.output.quality, keep_metadata=self.output.keep_metadata
        )

    def format_of(self, path: str) -> Format:
        """In which the result of an input is written."""
        return written_format(path, self.output.format)

    def settings(self) -> dict[str, Any]:
        """All that decides a result's bytes, besides the picture and the model."""
        names = set(_REQUEST) - ({"tile_px"} if self.endpoint else set())
        content = self.model_dump(mode="json", include={*names, "prompt", "output"})
        content["caption"] = self.caption.model_dump(mode="json", exclude=CAPTION_NOT_CONTENT)
        content["engine"] = "endpoint" if self.endpoint else self.workers.dtype
        return content

    @property
    def settings_digest(self) -> str:
        return json_digest(self.settings())

    def source(self) -> SourceConfig:
        """The input as the listing takes it."""
        return SourceConfig(name=SOURCE_NAME, uri=self.input, include=self.include, exclude=self.exclude)
