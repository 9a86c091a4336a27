"""Optional fast paths; each equals the plain PyTorch path of its operator, by a test."""
