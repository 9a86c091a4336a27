"""Operators: modules [B, N, D] -> [B, N, D] that can take the place of attention or MLP in a block."""

from grafting.operators import attention, hyena, mamba2, mlp
from grafting.operators.base import (
    AttentionDonor,
    Cost,
    Donor,
    MLPDonor,
    Operator,
    copy_donor,
    cost_of,
    linear,
    takes_donor,
)
from grafting.operators.filters import DepthwiseFilter
from grafting.operators.registry import Entry, build, config_of, describe, get, names, register

__all__ = [
    "AttentionDonor",
    "Cost",
    "DepthwiseFilter",
    "Donor",
    "Entry",
    "MLPDonor",
    "Operator",
    "attention",
    "build",
    "config_of",
    "copy_donor",
    "cost_of",
    "describe",
    "get",
    "hyena",
    "linear",
    "mamba2",
    "mlp",
    "names",
    "register",
    "takes_donor",
]
