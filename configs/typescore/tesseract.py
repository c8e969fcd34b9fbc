"""TypeScore by Tesseract, for clean pictures only: it reads letters into noise and texture, and fails on text that is turned.

zoo eval configs/typescore/tesseract.py wanted=INSTRUCTIONS.jsonl images=DIR
"""

from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Tesseract

config = TypeScore(extractor=Tesseract())
