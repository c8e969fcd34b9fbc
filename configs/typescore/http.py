"""TypeScore by a vision model behind an OpenAI-compatible endpoint. Calibrate it first: language models repair misspelt words.

    zoo eval configs/typescore/http.py wanted=INSTRUCTIONS.jsonl images=DIR \\
      extractor.base_url=http://127.0.0.1:8000/v1 extractor.model=NAME extractor.api_key_env=VARIABLE

`api_key_env` is the name of the environment variable that holds the key, never the key. Readings are kept as they come: a run that is
stopped pays twice for requests then under way, at most `extractor.threads`, and for no reading that had come. Where eight pictures in a
row fail by the endpoint, the run stops with exit code 3, and the same command goes on.
"""

from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Http

config = TypeScore(extractor=Http())
