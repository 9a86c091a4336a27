"""Presets: sets of defaults under a recipe. And what the paper's experiments run on where nothing else is said."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "grafting": {},
    "small": {
        # The demo's protocol, with about 30,000 image visits in stage 2.
        "distill": {"steps": 250, "batch_size": 64},
        "finetune": {
            "steps": 470, "batch_size": 64, "optimizer": "muon", "lr": 1e-3, "objectives": {"output": 1.0},
        },
        "sample": {"num": 1000, "steps": 10, "sampler": "dpm++", "guidance": 1.5},
    },
    "paper": {
        # 8k samples x 200 epochs at batch 64; then 50k steps at batch 256.
        "init": "random",
        "distill": {
            "steps": 25_000, "lr": 1e-4, "schedule": "constant", "warmup": 0, "betas": [0.9, 0.999],
            "fit_readout": False, "early_stop": 0, "validate_every": 1000, "checkpoint_every": 1000, "log_every": 100,
        },
        "finetune": {
            "steps": 50_000, "batch_size": 256, "lr": 1e-4, "schedule": "constant", "warmup": 1000,
            "betas": [0.9, 0.999], "ema_decay": 0.9999, "objectives": {"diffusion": 1.0},
            "validate_every": 1000, "checkpoint_every": 1000, "log_every": 100,
        },
        "sample": {"num": 50_000, "steps": 250, "sampler": "ddpm", "guidance": 1.5},
    },
    "paper-code": {},
}  # fmt: skip
PRESETS["paper-code"] = {
    **PRESETS["paper"],
    "distill": {
        **PRESETS["paper"]["distill"],
        "lr": 5e-4,
        "schedule": "halving",
        "halve_at": [0.25, 0.5, 0.75],
    },
}

REAL_SIZE = ("paper", "paper-code")

# Model, data and evaluation of the paper's experiments at either size.
TESTBEDS: dict[str, dict[str, Any]] = {
    "fashion": {"model": "dit-fashion", "data": "fashion-10", "sample": {"batch_size": 20}},
    "imagenet": {
        "model": "facebook/DiT-XL-2-256",
        "data": "imagenet256-latents.safetensors",
        "evaluate": {
            "reference": "VIRTUAL_imagenet256_labeled.npz",
            "features": "inception:pt_inception-2015-12-05.pth",
        },
        "pretraining": {"image_visits": 1_792_000_000},  # 7M steps of batch 256 (arXiv 2212.09748)
    },
}

# Five layers from the first to the last, for the study of regression losses.
FIVE_LAYERS = {"fashion": [0, 3, 6, 8, 11], "imagenet": [0, 7, 14, 20, 27]}

# What share of its training set a packaged data set is; any other data is taken for the whole of it.
SHARES = {"fashion-10": 0.1}
