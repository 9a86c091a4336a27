"""File formats: reading weights safely, graft folders, the published checkpoints, diffusers' layout."""
