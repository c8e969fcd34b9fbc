"""DART: Denoising Autoregressive Transformer for Scalable Text-to-Image Generation (arXiv:2410.08159).

A transformer reads the whole history of noisy copies of an image and writes the next, less noisy one: T calls with a cache.
`process.py`: the copies, and the Markov chain that they determine. `model.py`: the network. `task.py`: what is trained and
sampled. `metrics.py`: whether the history is used.
"""

from zoo.papers.dart.task import Dart

__all__ = ["Dart"]
