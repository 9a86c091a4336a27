"""What a GPU needs of code that is tested without one: memory that can be pinned, the device of a kernel's launch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from torch import Tensor, nn

from grafting import GraftError
from grafting.conditioning import Caption, move
from grafting.evaluation import to_uint8
from grafting.families import Tap, codec
from grafting.kernels import gates
from grafting.training.compute import Compute
from grafting.training.distillation import _Stage


def test_captions_with_one_empty_caption_for_all_can_be_moved_to_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pinned(tensor: Tensor) -> Tensor:  # as PyTorch does it: memory of the same strides, then a copy
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, non_blocking: tensor)
    embeds, mask = torch.randn(3, 5, 2), torch.ones(3, 5)
    null = torch.randn(1, 5, 2)
    given = Caption(embeds, mask, null.expand(3, -1, -1), torch.ones(1, 5).expand(3, -1))
    with pytest.raises(RuntimeError, match="single memory location"):
        pinned(given.null_embeds)
    found = move(given, "cuda")
    assert torch.equal(found.embeds, embeds)
    assert torch.equal(found.null_embeds, null.repeat(3, 1, 1))


def test_the_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[Tensor] = []
    launched: list[bool] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    def forward(u: Tensor, *_: Any) -> Tensor:
        launched.append(bool(inside))
        return u[..., : u.shape[-1] // 3].clone()

    def backward(u: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        launched.append(bool(inside))
        return torch.ones_like(u), torch.zeros(3, 5, u.shape[-1] // 3)

    stub = ModuleType("grafting.kernels.triton_gates")
    vars(stub).update(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr("grafting.kernels.triton_gates", stub, raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    u = torch.randn(2, 4, 6, requires_grad=True)
    gates.fused(u, torch.randn(6, 1, 4), torch.randn(6), None, None).sum().backward()
    assert launched == [True, True]


class _VAE:
    """A stand-in that notes how many images it decodes at once."""

    config = SimpleNamespace(scaling_factor=0.5, shift_factor=None)

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def decode(self, z: Tensor) -> Any:
        self.sizes.append(len(z))
        return SimpleNamespace(sample=z[:, :3].clamp(-1, 1))


@pytest.mark.parametrize(("side", "sizes"), [(32, [8, 2]), (64, [8, 2]), (128, [2] * 5), (256, [1] * 10)])
def test_large_images_are_decoded_a_few_at_a_time(
    side: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, model = _VAE(), tiny_dit(in_channels=4)
    monkeypatch.setattr(codec, "load_vae", lambda *_: vae)
    latents = torch.linspace(-1, 1, 10).view(10, 1, 1, 1).expand(10, 4, side, side)
    images = codec.decoder(model, "some/vae")(latents)
    assert vae.sizes == sizes
    assert images.shape == (10, side, side, 3)
    assert np.array_equal(images, to_uint8((2 * latents[:, :3]).clamp(-1, 1)))


def test_latents_of_any_channels_are_decoded_by_a_vae_of_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, model = _VAE(), tiny_dit(in_channels=16)
    monkeypatch.setattr(vae, "config", SimpleNamespace(**vars(_VAE.config), latent_channels=16))
    monkeypatch.setattr(codec, "load_vae", lambda *_: vae)
    assert codec.decoder(model, "some/vae")(torch.zeros(2, 16, 8, 8)).shape == (2, 8, 8, 3)
    with pytest.raises(GraftError, match=r"have 4 channels, the VAE 'some/vae' decodes 16"):
        codec.decoder(tiny_dit(in_channels=4), "some/vae")


def test_a_vae_for_a_model_of_pixels_is_refused() -> None:
    with pytest.raises(GraftError, match=r"makes pixels.*some/vae.*leave it out"):
        codec.decoder(tiny_dit(), "some/vae")


def test_a_process_without_samples_of_a_held_out_batch_sums_on_its_device() -> None:
    """Where the last held-out batch has fewer parts than there are processes; the meta device stands in for a GPU."""
    device, summed = torch.device("meta"), list[Tensor]()

    class OneOfTwo(Compute):
        def sum(self, tensor: Tensor) -> Tensor:
            summed.append(tensor)
            return torch.tensor([[[1.0, 4.0], [3.0, 4.0]]])

    def taps(part: str, paths: list[str]) -> dict[str, Tap]:
        assert part == "second"
        return {
            path: Tap(torch.ones(2, 3, 4, device=device), torch.ones(2, 3, 4, device=device), None)
            for path in paths
        }

    stage: Any = SimpleNamespace(
        compute=OneOfTwo(device, "fp32", rank=1, world=2),
        validation=[["first", "second"], ["third"]],
        taps=taps,
    )
    assert _Stage.errors(stage, {"site": nn.Identity()}) == {"site": 0.5}
    assert [(tensor.device, tensor.shape) for tensor in summed] == [(device, (1, 2, 2))]
