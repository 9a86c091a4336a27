"""Model families: where a model's sites are, its conditioning, its loss, its codec, its loader."""

from grafting.families.base import Family, Site, Tap, families, family_of, register_family
from grafting.families.dit import DiTFamily

register_family(DiTFamily())

__all__ = ["DiTFamily", "Family", "Site", "Tap", "families", "family_of", "register_family"]
