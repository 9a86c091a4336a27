"""Stage 1 (activation distillation) and stage 2 (lightweight finetuning), and what they share."""
