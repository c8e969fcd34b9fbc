"""The f8 autoencoder of latent models (4 channels, 84 M parameters), to import a published file into: no run.

    zoo import starflow/sd_vae FOLDER_OR_FILE exports/sd-vae

takes `diffusion_pytorch_model.safetensors` in the layout of diffusers' AutoencoderKL, with older or newer attention keys.
"""

from zoo.encoders import vae

config = vae.sd()
