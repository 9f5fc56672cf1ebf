"""The benchmarks of the LLaMA-Adapter paper (arXiv 2303.16199), by their official rules. Run as `python -m evaluate`.

`scorers` holds the rules: pure functions that serve any model's answers.
"""
