"""Model URI -> the pipeline that a stage starts from, and the module that trains only what the stage trains."""

from __future__ import annotations

import torch

from faithdiff.loss import FaithDiffForTraining, trained_parameters
from faithdiff.pipeline import FaithDiffPipeline
from faithdiff.schedule import alphas_cumprod
from faithdiff.variants import with_architecture
from pipelines.training.recipe import ArchitectureConfig, Stage, TrainConfig
from sr_platform.folders import fetch_folder
from sr_platform.model_registry import resolve_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""A recipe's precision -> that of tensors."""


def local_model(uri: str) -> str:
    """A folder on this node, or a preset's name: what lies in the registry or in storage is fetched, once per node."""
    if uri.startswith("models:"):
        return resolve_model(uri).path
    return str(fetch_folder(uri)) if "://" in uri else uri


def load_model(uri: str, architecture: ArchitectureConfig) -> FaithDiffPipeline:
    """The model that a stage starts from, in fp32 on the CPU and in the recipe's architecture."""
    return with_architecture(FaithDiffPipeline.from_pretrained(local_model(uri)), **architecture.model_dump())


def trainable_module(pipeline: FaithDiffPipeline, cfg: TrainConfig, stage: Stage) -> FaithDiffForTraining:
    """UNet and LQ encoder of `pipeline` as one module; parameters that the stage does not train are frozen."""
    if cfg.alignment_attention == "batch":
        pipeline.unet.set_batch_attention(cfg.attention_group)
    elif cfg.alignment_attention != "model":
        pipeline.unet.set_alignment_attention(cfg.alignment_attention)
    module = FaithDiffForTraining(pipeline.unet, pipeline.lq_encoder, alphas_cumprod(pipeline.scheduler.config))
    trained_parameters(module, cfg.trained_parts(stage))
    if cfg.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.lq_encoder.enable_gradient_checkpointing()
    return module
