"""TarFlowLM: Flexible Language Modeling in Continuous Space with Transformer-based Autoregressive Flows (arXiv:2507.00425).

Tokens become vectors by one Gaussian per token, and a stack of causal transformer flows of alternating direction models
the sequence of vectors. Each flow layer maps a mixture of Gaussians to one: channel by channel (Mix-1) or a token's
vector at a time (Mix-d); with one component it is affine.
B texts, T tokens, V vocabulary, d numbers per token, P tokens per patch, S = T/P steps, C = P d channels of a step,
K components, W width. The paper leaves sizes of the optimiser, initial values and limits open; such choices are ours.
`model.py`: networks and heads, one flow layer, the stack, its inverse. `task.py`: what is trained and sampled, and the discrete model.
"""

from zoo.papers.tarflow_lm.model import Layer, bridge, chain, couple, decode, elbo, encode, forward
from zoo.papers.tarflow_lm.task import DiscreteLM, TarFlowLM

__all__ = [
    "DiscreteLM",
    "Layer",
    "TarFlowLM",
    "bridge",
    "chain",
    "couple",
    "decode",
    "elbo",
    "encode",
    "forward",
]
