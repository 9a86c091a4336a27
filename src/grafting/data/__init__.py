"""Data: labelled images and latents, read safely from files, drawn reproducibly; images encoded to latents."""

from __future__ import annotations

from grafting.data.dataset import DataSource, ImageLabelDataset
from grafting.data.encoder import EncodeConfig
from grafting.data.encoding import encode_images, preview_encoding
from grafting.data.image_source import ImageSource
from grafting.data.images import open_images
from grafting.data.latents import LatentDataset
from grafting.data.manifest import Manifest
from grafting.data.sources import as_data, load_dataset

__all__ = [
    "DataSource",
    "EncodeConfig",
    "ImageLabelDataset",
    "ImageSource",
    "LatentDataset",
    "Manifest",
    "as_data",
    "encode_images",
    "load_dataset",
    "open_images",
    "preview_encoding",
]
