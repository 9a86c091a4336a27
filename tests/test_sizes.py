"""Models at another size of samples, and operators that were built for their number of tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pixart_tools import save_tiny_pipeline, tiny_transformer
from torch import Tensor, nn

import grafting
from grafting import GraftPlan, Replace, operators
from grafting.errors import OperatorError
from grafting.families import family_of
from grafting.operators import registry
from grafting.sizes import resized
from grafting.text_inputs import text_inputs


class Tied(nn.Module):
    def __init__(self, *, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.side, self.proj = math.isqrt(num_tokens), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).unflatten(1, (self.side, self.side)).flatten(1, 2)


class Free(Tied):
    """Told the number, and takes any."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.side


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    operators.register("tied")(Tied)
    operators.register("free")(Free)


def test_an_operator_that_is_tied_to_its_tokens_is_named_before_any_work() -> None:
    student = grafting.graft(tiny_transformer(), GraftPlan([Replace("mha", [2], "tied")]))
    said = r"layer 2 \(mha, transformer_blocks\.2\.attn1\): operator 'tied' was built for 16 tokens and fails on 32"
    with pytest.raises(OperatorError, match=said):
        resized(student, 8, 16)
    assert resized(student, 8, 8) is student
    own = grafting.graft(tiny_transformer(), GraftPlan([Replace("mlp", [1], "mlp_hyena_x")]))
    with pytest.raises(
        OperatorError, match=r"layer 1 .*'mlp_hyena_x' was built for 16 tokens and fails on 32"
    ):
        resized(own, 8, 16)


def test_what_takes_any_number_of_tokens_goes_to_any_size() -> None:
    model = tiny_transformer()
    for one in (
        model,
        grafting.graft(model, GraftPlan([Replace("mha", [2], "free"), Replace("mha", [0], "swa")])),
    ):
        assert family_of(one).sample_shape(resized(one, 8, 16)) == (4, 8, 16)
    again = grafting.graft(resized(model, 8, 16), GraftPlan([Replace("mlp", [2], "mlp_hyena_x")]))
    assert resized(again, 8, 16) is again  # built at that size


def test_images_of_another_size_are_asked_of_a_graft(tmp_path: Path) -> None:
    teacher = grafting.load_model(save_tiny_pipeline(tmp_path / "pipeline"))
    student = grafting.graft(teacher, GraftPlan([Replace("mha", [2], "tied")]))
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(OperatorError, match="'tied' was built for 16 tokens and fails on 24"):
        text_inputs(student, prompts=tmp_path / "prompts.txt", size=(24, 16))
