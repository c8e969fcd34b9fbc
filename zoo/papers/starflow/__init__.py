"""STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis (arXiv:2506.06276).

A deep-shallow stack of causal transformers over the latents of a frozen autoencoder, for classes and for captions.
`model.py`: the network of a block. `task.py`: what is trained and sampled, and the published layout.
`decoder.py`: an autoencoder whose decoder removes the noise.
"""

from zoo.papers.starflow.decoder import DecoderTune
from zoo.papers.starflow.model import LanguageModel
from zoo.papers.starflow.task import StarFlow, class_conditional, text_to_image

__all__ = [
    "DecoderTune",
    "LanguageModel",
    "StarFlow",
    "class_conditional",
    "text_to_image",
]
