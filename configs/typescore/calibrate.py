"""Whether an extractor reads what is drawn, or repairs misspelt words: pictures with known faults, read and scored.

zoo eval configs/typescore/calibrate.py
zoo eval configs/typescore/calibrate.py:http extractor.base_url=http://127.0.0.1:8000/v1 extractor.model=NAME out=FOLDER
"""

from zoo.papers.typescore.calibrate import Calibrate
from zoo.papers.typescore.extractors import Http, RapidOcr

config = Calibrate(extractor=RapidOcr())
http = Calibrate(extractor=Http())
