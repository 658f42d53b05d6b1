"""Tasks: prompts, labels, examples, few-shot prompts and their tokens."""
