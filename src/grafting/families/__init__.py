"""Model families: where a model's sites are, its conditioning, its loss, its codec, its loader."""

from grafting.families.base import Family, Site, Tap, families, family_of, is_known, register_family, unwrap
from grafting.families.dit import DiTFamily
from grafting.families.pixart import PixArtFamily

register_family(DiTFamily())
register_family(PixArtFamily())

__all__ = [
    "DiTFamily",
    "Family",
    "PixArtFamily",
    "Site",
    "Tap",
    "families",
    "family_of",
    "is_known",
    "register_family",
    "unwrap",
]
