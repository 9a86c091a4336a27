"""Which operator in which layer, under a budget: score every candidate at every site, then choose."""

from grafting.search.choice import Choice, Option, best_choice, pareto_choices
from grafting.search.run import search_plan

__all__ = ["Choice", "Option", "best_choice", "pareto_choices", "search_plan"]
