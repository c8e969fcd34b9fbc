"""TypeScore by RapidOCR: the default extractor, on the CPU and without network access (the extra `typescore`).

    zoo eval configs/typescore/rapidocr.py wanted=INSTRUCTIONS.jsonl images=DIR

Half a second a picture on two cores. It is no language model and repairs no misspelt word.
"""

from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import RapidOcr

config = TypeScore(extractor=RapidOcr())
