"""Evaluation: Frechet distance, precision and recall, inception score, label accuracy, and their files."""

from __future__ import annotations

from grafting.evaluation.comparison import compare, read_evaluation
from grafting.evaluation.feature_set import FeatureSet
from grafting.evaluation.features import load_features, register_features
from grafting.evaluation.measure import evaluate
from grafting.evaluation.samples import SampleFile, SampleWriter, to_uint8, write_samples

__all__ = [
    "FeatureSet",
    "SampleFile",
    "SampleWriter",
    "compare",
    "evaluate",
    "load_features",
    "read_evaluation",
    "register_features",
    "to_uint8",
    "write_samples",
]
