"""Serving: one base and many adapters answer many requests at once.

`engine` is the library: continuous batching over a paged cache, without HTTP. `app` is the OpenAI protocol before it,
and `python -m model.serve` the program.
"""
