"""InceptionV3 as FID knows it (Szegedy et al. 2016; the variant of the 2015-12-05 TensorFlow graph).

Against the ordinary network: 1008 classes, average pooling that does not count padding, a maximum instead of
an average in the pool branch of the last block, and the graph's own image scaling. State-dict names are those
of the public PyTorch port of its weights (`pt_inception-2015-12-05`).

Definitions follow the ADM evaluator (Dhariwal and Nichol 2021): pool3 features (2048) for FID, precision and
recall; the first 7 channels of mixed_6/conv (17 x 17 x 7 = 2023, channels last) for sFID; softmax of the
product of pool3 and the last weight matrix, without its bias, for the inception score. The resize has the
corners of TensorFlow 1 (source = target * in / out), the scaling is (x - 128) / 128.

NOT VERIFIED HERE: no weights were at hand when this was written. Shapes, parameter names and counts are
tested; agreement of values with the TensorFlow graph, and that mixed_6/conv is the rectified first branch of
`Mixed_6d`, are not. Compare one published pair (ADM's samples and its printed figures) before quoting a FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafting.errors import CheckpointError, DataError
from grafting.evaluation.feature_set import FeatureSet, batches

NUM_SPATIAL_CHANNELS = 7
INPUT_SIZE = 299


class InceptionFeatures:
    """Feature network of FID from a weight file; images uint8 [N, H, W, 3] of any size (grey is repeated)."""

    num_label_classes: int | None = None  # its classes are not in ImageNet's label order

    def __init__(self, path: str | Path) -> None:
        self.name = "inception"
        self._model, self.weights_hash = load_inception(path)

    @torch.inference_mode()
    def extract(
        self, images: np.ndarray, batch_size: int = 64, device: str | torch.device = "cpu"
    ) -> FeatureSet:
        """Return pool3 [N, 2048], spatial [N, 2023] and bias-free logits [N, 1008] of uint8 images."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise DataError(f"inception takes uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        model = self._model.to(device)
        parts: list[tuple[np.ndarray, ...]] = []
        for batch in batches(images, batch_size):
            x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(device).float()
            parts.append(tuple(part.cpu().numpy() for part in model(prepare(x))))
        pool, spatial, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
        return FeatureSet(pool, spatial=spatial, logits=logits)


def prepare(x: Tensor) -> Tensor:
    """Grey levels [N, 1 or 3, H, W] in [0, 255] to network input [N, 3, 299, 299]."""
    rows = _resize_matrix(x.shape[2], INPUT_SIZE).to(x)
    columns = _resize_matrix(x.shape[3], INPUT_SIZE).to(x)
    resized = rows @ x @ columns.T  # [N, C, 299, 299]
    return ((resized - 128.0) / 128.0).expand(-1, 3, -1, -1)


def _resize_matrix(num_in: int, num_out: int) -> Tensor:
    """Bilinear weights [num_out, num_in]: source = target * num_in / num_out, clamped at the last pixel."""
    source = torch.arange(num_out, dtype=torch.float64) * num_in / num_out
    low = source.floor().long().clamp(max=num_in - 1)
    high = (low + 1).clamp(max=num_in - 1)
    fraction = source - low
    matrix = torch.zeros(num_out, num_in, dtype=torch.float64)
    target = torch.arange(num_out)
    matrix.index_put_((target, low), 1.0 - fraction, accumulate=True)
    matrix.index_put_((target, high), fraction, accumulate=True)
    return matrix


class InceptionV3(nn.Module):
    """Map [N, 3, 299, 299] in [-1, 1] to (pool3 [N, 2048], spatial [N, 2023], bias-free logits [N, 1008])."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _MixedA(192, 32)
        self.Mixed_5c = _MixedA(256, 64)
        self.Mixed_5d = _MixedA(288, 64)
        self.Mixed_6a = _MixedB(288)
        self.Mixed_6b = _MixedC(128)
        self.Mixed_6c = _MixedC(160)
        self.Mixed_6d = _MixedC(160)
        self.Mixed_6e = _MixedC(192)
        self.Mixed_7a = _MixedD(768)
        self.Mixed_7b = _MixedE(1280, _average)
        self.Mixed_7c = _MixedE(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)  # [N, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [N, 768, 17, 17]
        spatial = self.Mixed_6d.branch1x1(x)[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 2048, 8, 8]
        pool = x.mean(dim=(2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


class _Conv(nn.Module):
    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _MixedA(nn.Module):
    """35 x 35: 1x1, 5x5, double 3x3 and pooled branches."""

    def __init__(self, num_in: int, num_pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(num_in, 64, 1)
        self.branch5x5_1 = _Conv(num_in, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(num_in, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(num_in, num_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class _MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, num_in: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(num_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(num_in, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], dim=1)


class _MixedC(nn.Module):
    """17 x 17: 1x1, factored 7x7, double factored 7x7 and pooled branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, width, 1)
        self.branch7x7_2 = _Conv(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = _Conv(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = _Conv(768, width, 1)
        self.branch7x7dbl_2 = _Conv(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = _Conv(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = _Conv(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = _Conv(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class _MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, num_in: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(num_in, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(num_in, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class _MixedE(nn.Module):
    """8 x 8: branches that fork into 1x3 and 3x1; `pool` is an average or a maximum."""

    def __init__(self, num_in: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = _Conv(num_in, 320, 1)
        self.branch3x3_1 = _Conv(num_in, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(num_in, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(num_in, 192, 1)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([*parts, self.branch_pool(self._pool(x))], dim=1)


def load_inception(path: str | Path) -> tuple[InceptionV3, str]:
    """Return the network in eval mode and the SHA-256 of its .pth or .safetensors file; no code is run.

    Raises `CheckpointError` for a file that is missing, damaged, or not in the FID layout (1008 classes).
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            model = InceptionV3()
        state = {name: tensor for name, tensor in state.items() if not name.startswith("AuxLogits.")}
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                state.setdefault(name, torch.zeros_like(tensor, device="cpu"))
        model.load_state_dict(state, assign=True)
    except (
        OSError,
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        AttributeError,
        EOFError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} is not a file of FID's InceptionV3 weights ({reason}); give the public "
            "pt_inception-2015-12-05 state dict as .pth or .safetensors"
        ) from error
    return model.float().eval().requires_grad_(False), digest.hexdigest()
