"""Architectures that this package owns. Models of other libraries are used as they are (see `families`)."""
