"""Training by many processes: which of them does what, how weights are divided, and what they tell each other."""
