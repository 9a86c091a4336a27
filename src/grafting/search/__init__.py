"""Which operator in which layer, under a budget: score every candidate at every site, then choose."""

from grafting.search.choice import Choice, Option, best_choice, pareto_choices
from grafting.search.rehearsal import rehearse_search
from grafting.search.run import search_plan

__all__ = ["Choice", "Option", "best_choice", "pareto_choices", "rehearse_search", "search_plan"]
