"""TypeScore by a vision model behind an OpenAI-compatible endpoint. Calibrate it first: language models repair misspelt words.

    zoo eval configs/typescore/http.py wanted=INSTRUCTIONS.jsonl images=DIR \\
      extractor.base_url=http://127.0.0.1:8000/v1 extractor.model=NAME extractor.api_key_env=VARIABLE

`api_key_env` is the name of the environment variable that holds the key, never the key. Readings are kept in `cache` as they come,
so that a run that is stopped pays for none twice. Each attribute of style is one more question a picture; `style=false` saves them.
An endpoint that fails `extractor.give_up` images in a row is asked no more for the pictures at hand; the same command tries again.
"""

from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Http

config = TypeScore(extractor=Http(), cache="typescore-cache")
