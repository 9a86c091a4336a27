"""Analyses of a model: what it costs, how local its attention is, what its activations are like."""
