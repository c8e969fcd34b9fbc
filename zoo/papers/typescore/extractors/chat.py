"""What language models that see are asked, what is made of their answers, and such a model run here by `transformers`."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar, Literal

from PIL import Image

from zoo.errors import UserError
from zoo.fields import Count, check_fields
from zoo.papers.typescore.extractors.base import REVISION, Extraction, Keep, aside, each, join, missing, need

# A model that is not told so repairs misspelt words, which would raise the score; the text that is wanted is never told.
PROMPT = (
    "Transcribe every piece of text that is visible in this image, exactly as it is drawn, including misspellings, in reading "
    "order. Do not correct, translate, complete or describe. Output only the transcription. If there is no text output NO TEXT."
)
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)\n?```$", re.DOTALL)
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "'": "'", "‘": "’", "`": "`"}


def clean(answer: str) -> str:
    """The transcription in an answer to `PROMPT`: without a code fence, one pair of quotes around it, and NO TEXT."""
    text = answer.strip()
    if fenced := _FENCE.match(text):
        text = fenced.group(1).strip()
    elif len(text) > 6 and text.startswith("```") and text.endswith("```"):
        text = text[3:-3].strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        apart = re.sub(r"(?<=\w)['’](?=\w)", "", inner)  # an apostrophe is no quote
        if text[0] not in apart and text[-1] not in apart:  # "open" and "closed" is no pair around the whole
            text = inner.strip()
    if re.fullmatch(r"no text\.?", text, re.IGNORECASE):
        return ""
    return join(text.splitlines())


@dataclass(frozen=True)
class Transformers:
    """Any image-text-to-text model with a chat template, run by the package transformers (the extra `vlm`). Greedy."""

    model: str = ""  # a folder, or the name of a model that transformers fetches
    revision: str = ""  # of a fetched model: a branch, tag or commit; empty for its main branch
    device: str = aside("cpu")  # as PyTorch calls it: cpu, cuda, cuda:1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the parameters
    max_tokens: Count = 512  # of an answer

    name: ClassVar[str] = "transformers"
    prompt: ClassVar[str] = PROMPT

    def __post_init__(self) -> None:
        check_fields(self, f"extractor {self.name}: ")

    @property
    def batch(self) -> int:
        return 1

    def version(self) -> str:
        self.check()
        return f"{metadata.version('transformers')}+{REVISION}"

    def check(self) -> None:
        need(bool(self.model), self.name, "model", self.model, "the folder of a model, or its name on a hub")
        for package in ("transformers", "torch"):
            try:
                __import__(package)
            except ImportError:
                raise missing(self.name, package, "vlm") from None

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        return self._answer(images, [PROMPT] * len(images), True, keep)

    def ask(
        self, images: Sequence[Image.Image], questions: Sequence[str], keep: Keep | None = None
    ) -> list[Extraction]:
        """A question on each image; the answers as they come."""
        return self._answer(images, questions, False, keep)

    def _answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], cleaned: bool, keep: Keep | None
    ) -> list[Extraction]:
        self.check()
        pipeline = _pipeline(self.model, self.revision, self.device, self.dtype)

        def read(image: Image.Image, prompt: str) -> Extraction:
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            found = pipeline(
                text=[{"role": "user", "content": content}],
                return_full_text=False,
                generate_kwargs={"max_new_tokens": self.max_tokens, "do_sample": False},
            )
            answer = found[0]["generated_text"]
            if isinstance(answer, list):  # the whole conversation
                answer = answer[-1]["content"]
            if not isinstance(answer, str):
                raise TypeError(f"the model answered with {type(answer).__name__}, not with text")
            return Extraction(clean(answer) if cleaned else answer.strip(), (), {"content": answer})

        found: list[Extraction] = []
        for i, (image, prompt) in enumerate(zip(images, questions, strict=True)):
            found += each([image], functools.partial(read, prompt=prompt))
            if keep is not None:
                keep(i, found[-1])
        return found


@functools.lru_cache(maxsize=1)  # a second model would not fit beside the first
def _pipeline(model: str, revision: str, device: str, dtype: str) -> Any:
    import transformers

    try:
        return transformers.pipeline(
            "image-text-to-text", model=model, revision=revision or None, device=device, dtype=dtype
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"extractor transformers: model is {model!r}, which could not be opened for image-text-to-text on {device!r} "
            f"({str(error).strip().partition(chr(10))[0]}); give the folder of such a model, or its name on a hub that can be reached"
        ) from None
