"""The f8 autoencoder as EDM2 looks through it, to import a published file into: no run.

    zoo import edm2/sd_vae FOLDER_OR_FILE exports/sd-vae-edm2

takes `diffusion_pytorch_model.safetensors` of sd-vae-ft-mse in the layout of diffusers' AutoencoderKL. Its images are
from 0 to 1 and its latents have mean 0 and standard deviation 0.5 by channel: other latents than those of `starflow/sd_vae`.
"""

from zoo.papers import edm2

config = edm2.autoencoder()
