"""Stage 1 with each teacher pass used for several updates: a bounded buffer of the newest passes' taps.

An update draws its samples from all passes in the buffer, so that one sample's uses lie apart. The buffer is a function
of the seed and the step: after a stop it is made again. Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grafting import draws
from grafting.families import Tap

TapsAt = Callable[[Tensor, list[str]], dict[str, Tap]]


class ReusedTaps:
    """The taps of `passes` batches of `batch_size` samples; a new pass every `reuse` updates."""

    def __init__(
        self,
        taps_at: TapsAt,
        paths: list[str],
        *,
        seed: int,
        batch_size: int,
        micro_batch: int,
        reuse: int,
        passes: int,
    ) -> None:
        self.taps_at, self.paths, self.seed = taps_at, paths, seed
        self.batch_size, self.micro_batch = batch_size, micro_batch or batch_size
        self.reuse, self.passes = reuse, passes
        self._held: dict[str, list[Tensor | None]] = {}  # path -> parts of a tap [passes * B, ...]
        self._newest = -1

    def at(self, step: int, rows: Tensor, paths: Sequence[str]) -> dict[str, Tap]:
        """The taps of some places `rows` (0 .. B - 1) of the batch of update number `step`."""
        number = step // self.reuse
        for missing in range(max(self._newest + 1, number - self.passes + 1), number + 1):
            self._pass(missing)
        self._newest = max(self._newest, number)
        filled = min(number + 1, self.passes) * self.batch_size
        chosen = draws.permutation(self.seed, "distill/reuse", step, filled)[rows]
        found = {}
        for path in paths:
            parts = [None if part is None else part[chosen.to(part.device)] for part in self._held[path]]
            assert parts[0] is not None
            assert parts[1] is not None
            found[path] = Tap(parts[0], parts[1], parts[2], parts[3])
        return found

    def _pass(self, number: int) -> None:
        """Put the taps of pass `number` in the place of the oldest."""
        first = number % self.passes * self.batch_size
        samples = torch.arange(number * self.batch_size, (number + 1) * self.batch_size)
        for index in samples.split(self.micro_batch):
            for path, tap in self.taps_at(index, self.paths).items():
                if path not in self._held:
                    size = self.passes * self.batch_size
                    self._held[path] = [None if t is None else t.new_empty(size, *t.shape[1:]) for t in tap]
                for held, part in zip(self._held[path], tap, strict=True):
                    if held is not None and part is not None:
                        held[first : first + len(index)] = part
            first += len(index)
