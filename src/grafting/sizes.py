"""A model at another size of samples, and whether the operators that a plan put there go with it."""

from __future__ import annotations

import torch
from torch import nn

from grafting import operators
from grafting.errors import OperatorError
from grafting.families import family_of
from grafting.families.base import Site
from grafting.plan import Replace
from grafting.surgery import record_of


def resized(model: nn.Module, height: int, width: int) -> nn.Module:
    """The same model, weights shared, for samples of height x width.

    Raises DataError (it takes no such size), OperatorError (an operator that was built for its number of tokens fails
    on another).
    """
    family = family_of(model)
    view, record = family.resized(model, height, width), record_of(model)
    if view is model or record is None:
        return view
    entries, built_for = record.plan.sites, {site.path: site.num_tokens for site in family.sites(model)}
    for site in family.sites(view):
        entry, num_tokens = entries.get((site.kind, site.layer)), built_for[site.path]
        if entry is not None and site.num_tokens != num_tokens and site.operator == entry.operator:
            _check_tokens(site, entry, num_tokens)
    return view


def _check_tokens(site: Site, entry: Replace, built_for: int) -> None:
    """Pass the tokens of the new size through an operator that was given its number of tokens, without weights.

    What fails at its own size, too, can't be tried without weights: the first real pass will tell.
    """
    if "num_tokens" not in operators.get(entry.operator).dimensions:
        return
    if _failure(site, entry, built_for, built_for) is not None:
        return
    error = _failure(site, entry, built_for, site.num_tokens)
    if error is not None:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        said = f"{site}: operator '{entry.operator}' was built for {built_for} tokens and fails on {site.num_tokens}"
        raise OperatorError(
            f"{said} ({reason}); keep to the size that the model was grafted at, or replace it by one that takes any"
        ) from None


def _failure(site: Site, entry: Replace, built_for: int, num_tokens: int) -> Exception | None:
    with torch.device("meta"), torch.no_grad():
        try:
            operator = operators.build(
                entry.operator, dim=site.width, num_heads=site.num_heads, num_tokens=built_for,
                **entry.config.to_dict(),
            )  # fmt: skip
            operator.to("meta")(torch.empty(1, num_tokens, site.width))
        except NotImplementedError:  # no kernel for shapes alone
            return None
        except Exception as error:  # of others' code
            return error
    return None
