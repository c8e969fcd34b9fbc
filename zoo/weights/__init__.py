"""Weights at rest and on the move: layouts, exports on disk, published checkpoints, filling one model from another.

A parameter tree is a nested dict of arrays; its flat names are joined with "/". A stack of L equal layers has two
layouts: *stacked*, `trunk/block/<leaf>` with a leading axis L, and *unrolled*, `trunk/layer0/<leaf>`,
`trunk/layer1/<leaf>` and so on. On disk there is only the stacked one.
"""

from zoo.weights.export import Program, card, export_stablehlo, load, load_stablehlo, save
from zoo.weights.layout import (
    abstract,
    digest,
    encoder_digest,
    encoding,
    fill,
    flatten,
    grouped,
    matching,
    parts_of,
    resolve,
    stacked,
    unflatten,
)
from zoo.weights.official import Which, from_official, read_state_dict, to_official, write_state_dict

__all__ = [
    "Program",
    "Which",
    "abstract",
    "card",
    "digest",
    "encoder_digest",
    "encoding",
    "export_stablehlo",
    "fill",
    "flatten",
    "from_official",
    "grouped",
    "load",
    "load_stablehlo",
    "matching",
    "parts_of",
    "read_state_dict",
    "resolve",
    "save",
    "stacked",
    "to_official",
    "unflatten",
    "write_state_dict",
]
