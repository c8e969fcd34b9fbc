"""TypeScore by the oracle, which reads what zoo's own renderer wrote into its PNG files: the metric without a reader's faults.

zoo eval configs/typescore/oracle.py images=DIR
"""

from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Oracle

config = TypeScore(extractor=Oracle())
