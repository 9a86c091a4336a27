"""Analyses of a model: what it costs."""
