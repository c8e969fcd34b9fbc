"""The encoder of Flan-T5-XL (1.2 B parameters), to import a published file into: no run.

    zoo import starflow/flan_t5_xl FOLDER exports/flan-t5-xl

takes the safetensors files of the folder, of the encoder or of the whole model, and keeps `spiece.model`, its tokenizer.
"""

from zoo.encoders import text

config = text.xl(dtype="bfloat16")
