"""Data: labelled images and latents, read safely from files, drawn reproducibly."""

from __future__ import annotations

from grafting.data.dataset import DataSource, ImageLabelDataset
from grafting.data.sources import load_dataset

__all__ = ["DataSource", "ImageLabelDataset", "load_dataset"]
