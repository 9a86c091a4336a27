"""Blocks side by side: every branch gets the same input, one linear layer merges what they make.

arXiv 2506.05340, section "depth to width": consecutive blocks become branches of one, so depth falls and width grows.
Axes: n branches, B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafting.models.stacked import Unlike, stack, take
from grafting.operators import Cost, cost_of
from grafting.operators.base import num_params


class BlockGroup(nn.Module):
    """Blocks of one model, called as one block: x [B, N, D] and the conditioning c [B, ...] -> [B, N, D].

    merge "concat": W [y_1 .. y_n] + b of the branches' outputs y; "residual": x + W [y_1 - x .. y_n - x] + b.
    Like branches are stacked and run as one, in batched products; the state dict has the plain layout
    (`branches.<j>.*`, `merge.*`) in either form. `apart`: a reason to keep the branches in sequence.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, layers: Sequence[int], merge: str, width: int, apart: str | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers, self.form, self.width, self.apart = tuple(layers), merge, width, apart
        like = next(p for block in blocks for p in block.parameters())
        self.branches: nn.Module = nn.ModuleList(blocks)
        self.merge = nn.Linear(len(blocks) * width, width, device=like.device, dtype=like.dtype)
        self.register_state_dict_post_hook(_to_plain_layout)
        self.register_load_state_dict_pre_hook(_from_plain_layout)
        self.train(blocks[0].training)

    @property
    def num_branches(self) -> int:
        return len(self.layers)

    @property
    def is_stacked(self) -> bool:
        """Whether the branches run as one."""
        return not isinstance(self.branches, nn.ModuleList)

    @property
    def readout(self) -> nn.Linear:
        """The merge: what a closed-form fit sets."""
        return self.merge

    @torch.no_grad()
    def set_naive_merge(self) -> None:
        """The start that needs no data: the average of the outputs, or the sum of the residual updates."""
        share = 1.0 if self.form == "residual" else 1.0 / self.num_branches
        eye = share * torch.eye(self.width, device=self.merge.weight.device, dtype=self.merge.weight.dtype)
        self.merge.weight.copy_(eye.repeat(1, self.num_branches))
        self.merge.bias.zero_()

    def with_merge(self, merge: nn.Linear) -> BlockGroup:
        """The same branches under another merge; nothing is copied."""
        other = BlockGroup.__new__(BlockGroup)
        vars(other).update(vars(self))
        vars(other)["_modules"] = {**self._modules, "merge": merge}
        return other

    def stack(self) -> str | None:
        """Run the branches as one, if they are alike; else why not."""
        if self.apart is not None:
            return self.apart
        if isinstance(self.branches, nn.ModuleList):
            try:
                self.branches = stack(list(self.branches))
            except Unlike as reason:
                return str(reason)
        return None

    def unstack(self) -> None:
        """Put the branches back into modules of their own."""
        if self.is_stacked:
            self.branches = nn.ModuleList(
                take(self.branches, j, share=False) for j in range(self.num_branches)
            )

    def branch(self, number: int) -> nn.Module:
        """One branch as a block. Of a stacked group it shares the weights, detached: to look at, not to train."""
        if isinstance(self.branches, nn.ModuleList):
            return self.branches[number]
        return take(self.branches, number, share=True)

    def mix(self, x: Tensor, c: Tensor) -> Tensor:
        """What the merge gets: outputs or residual updates of all branches [B, N, n * D]."""
        if isinstance(self.branches, nn.ModuleList):
            return self._features([branch(x, c) for branch in self.branches], x)
        n = self.num_branches
        return self._features(list(self.branches(_repeat(x, n), _repeat(c, n)).chunk(n)), x)

    def finish(self, features: Tensor, x: Tensor) -> Tensor:
        """The output [B, N, D] from what `mix` made."""
        if self.form == "residual":
            return x + self.merge(features)
        if not torch.is_autocast_enabled(x.device.type):
            return self.merge(features)
        # Under autocast the merge would round the whole residual stream to 16 bits. The average of the branches
        # is kept out of it: W z + b = average + (W - A) z + b.
        outputs = features.unflatten(2, (self.num_branches, -1))  # [B, N, n, D]
        eye = torch.eye(self.width, device=x.device, dtype=self.merge.weight.dtype) / self.num_branches
        rest = self.merge.weight - eye.repeat(1, self.num_branches)
        return outputs.mean(dim=2) + F.linear(features, rest, self.merge.bias)

    def forward(self, x: Tensor, c: Tensor, taps: dict[str, Any] | None = None) -> Tensor:
        """x [B, N, D] -> [B, N, D]. `taps` collects what the operators in the branches saw and made."""
        if taps is None:
            return self.finish(self.mix(x, c), x)
        outputs = []
        for number in range(self.num_branches):
            seen: dict[str, Any] = {}
            outputs.append(self.branch(number)(x, c, seen))
            taps.update({f"branches.{number}.{name}": values for name, values in seen.items()})
        return self.finish(self._features(outputs, x), x)

    def cost(self, num_tokens: int) -> Cost:
        """Cost of all branches and of the merge, for one sample."""
        total = Cost(0.0, 2.0 * num_tokens * self.merge.weight.numel(), num_params(self.merge))
        for number in range(self.num_branches):
            total = total + cost_of(self.branch(number), num_tokens=num_tokens, dim=self.width)
        return total

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, form={self.form!r}, width={self.width}"

    def _features(self, outputs: list[Tensor], x: Tensor) -> Tensor:
        """n outputs [B, N, D] side by side, or their updates of x."""
        return torch.cat([y - x for y in outputs] if self.form == "residual" else outputs, dim=2)


def _repeat(x: Tensor, count: int) -> Tensor:
    """[B, ...] -> [count * B, ...], the whole batch again and again."""
    return x.repeat(count, *[1] * (x.ndim - 1))


def _to_plain_layout(group: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """After `state_dict`: rows of stacked weights under the names of their branches."""
    assert isinstance(group, BlockGroup)
    if not group.is_stacked:
        return
    head = f"{prefix}branches."
    stacked = {name[len(head) :]: state.pop(name) for name in list(state) if name.startswith(head)}
    rest = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    for number in range(group.num_branches):
        for name, values in stacked.items():
            state[f"{head}{number}.{name}"] = values[number]
    state.update(rest)


def _from_plain_layout(
    group: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str],
    unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before `load_state_dict`: the inverse of `_to_plain_layout`."""
    assert isinstance(group, BlockGroup)
    if not group.is_stacked:
        return
    for name, parameter in group.branches.named_parameters():
        names = [f"{prefix}branches.{number}.{name}" for number in range(group.num_branches)]
        if not all(plain in state for plain in names):
            continue
        rows = [state.pop(plain) for plain in names]
        for plain, row in zip(names, rows, strict=True):
            if row.shape != parameter.shape[1:]:
                errors.append(f"{plain} has shape {list(row.shape)}, expected {list(parameter.shape[1:])}")
        if all(row.shape == parameter.shape[1:] for row in rows):
            state[f"{prefix}branches.{name}"] = torch.stack(rows)
