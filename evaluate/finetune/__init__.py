"""The paper's fine-tuning experiments: zero-init prompts beside other ways to adapt a frozen transformers model."""
