"""Model families: adapters for the parts in which they differ."""

from diffes.adapters.base import Call, Condition, ModelAdapter, Probes, SamplingState, Split, check_finite
from diffes.adapters.groups import AnySet, BlockSet, BranchSet, GroupSet, Kind, ReuseSet, UpLayerSet
from diffes.adapters.guidance import ClassifierFreeGuidance
from diffes.adapters.loading import ADAPTERS, adapter_for, load_pipeline, model_folder, pipeline_class
from diffes.files import shipped_models

__all__ = [
    "ADAPTERS", "AnySet", "BlockSet", "BranchSet", "Call", "ClassifierFreeGuidance", "Condition", "GroupSet", "Kind",
    "ModelAdapter", "Probes", "ReuseSet", "SamplingState", "Split", "UpLayerSet", "adapter_for", "check_finite",
    "load_pipeline", "model_folder", "pipeline_class", "shipped_models",
]  # fmt: skip
