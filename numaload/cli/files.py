"""``numaload inspect``: what a model or an adapter is, in a line, and its tensors."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from numaload.cli.adapters import describe
from numaload.cli.output import count, note, print_json, print_table, say, size
from numaload.errors import printable

if TYPE_CHECKING:
    from numaload.weights import Tensor, Weights

SHOWN = 8  # elements of an array that inspect prints
WIDTH = 100
WORD = 40  # characters of a name in the summary
SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))  # of parameters
# llama.h, enum llama_ftype: what general.file_type means. Others are not known here.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0",
}  # fmt: skip


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser(
        "inspect", help="tensors, types, split files and bytes of a model; whose an adapter is"
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="any one of the model's files, GGUF or safetensors; of these also index or folder",
    )
    parser.add_argument("--metadata", action="store_true", help="print the metadata too")
    parser.set_defaults(run=inspect)


def inspect(options: argparse.Namespace) -> int:
    from numaload.weights import open_weights

    with open_weights(options.file) as weights:
        if options.json:
            print_json(_as_dict(weights, with_metadata=options.metadata))
            return 0
        adapter = describe(weights)
        say(adapter.line() if adapter else _summary(weights))
        for part in weights.parts:
            tensors = count(len(part.header.tensors), "tensor")
            say(f"{part.file.path}: {part.header.title}, {tensors}, {size(part.file.size)}")
        print_table(*_tensors(weights))
        print_table(["type", "tensors", "bytes"], _by_type(weights))
        _note_unusable(weights)
        if options.metadata:
            for key, value in weights.metadata.items():
                say(f"{key} ({weights.metadata.type_name(key)}) = {_short(value)}")
    return 0


def _tensors(weights: Weights) -> tuple[list[str], list[list[Any]]]:
    """Return the head and rows of the table of tensors; scales only where there are some."""
    heads = ["tensor", "type", "shape", "bytes", "scales"]
    rows = [
        [t.name, _type(t), "x".join(map(str, t.shape)), t.nbytes, " ".join(_scales(t))]
        for t in weights.values()
    ]
    shown = len(heads) if any(row[-1] for row in rows) else len(heads) - 1
    return heads[:shown], [row[:shown] for row in rows]


def _type(tensor: Tensor) -> str:
    """Return the type, and what it is where the scales are in other tensors: U8 (MXFP4)."""
    known = tensor.layout not in ("", tensor.type_name)
    return f"{tensor.type_name} ({tensor.layout})" if known else tensor.type_name


def _scales(tensor: Tensor) -> list[str]:
    return tensor.scales.names if tensor.scales else []


def _summary(weights: Weights) -> str:
    """Describe a model in one line; what its header does not tell is left out."""
    architecture = weights.metadata.get("general.architecture")
    told = [printable(architecture, WORD)] if isinstance(architecture, str) else []
    if weights:
        told += [_parameters(weights), _file_type(weights)]
    told.append(f"{size(weights.nbytes)} in {count(len(weights.paths), 'file')}")
    layers = weights.metadata.get(f"{architecture}.block_count")
    if _is_count(layers):
        told.append(count(layers, "layer"))
    context = weights.metadata.get(f"{architecture}.context_length")
    if _is_count(context):
        told.append(f"context {context}")
    return ", ".join(told)


def _is_count(value: Any) -> bool:
    """Return whether metadata that should be a count is one: anybody may have written it."""
    return isinstance(value, int) and not isinstance(value, bool)


def _parameters(weights: Weights) -> str:
    from math import prod

    number = sum(prod(tensor.dims) for tensor in weights.values())
    for scale, letter in SCALES:
        if number >= scale:
            return f"{number / scale:.1f} {letter} parameters"
    return count(number, "parameter")


def _file_type(weights: Weights) -> str:
    """Return llama.cpp's name for the mix of types, or the type that takes most bytes."""
    known = weights.metadata.get("general.file_type")
    if _is_count(known) and known in FILE_TYPES:
        return FILE_TYPES[known]
    return printable(_by_type(weights)[0][0], WORD)


def _by_type(weights: Any) -> list[list[Any]]:
    counts, nbytes = Counter[str](), Counter[str]()
    for tensor in weights.values():
        counts[_type(tensor)] += 1
        nbytes[_type(tensor)] += tensor.nbytes
    return [[name, counts[name], nbytes[name]] for name, _ in nbytes.most_common()]


def _note_unusable(weights: Any) -> None:
    """Name each type that cannot be used once: a model may have hundreds of such tensors."""
    from numaload.errors import UnknownQuantTypeError, UnsupportedTypeError

    said = set()
    for tensor in weights.values():
        if _type(tensor) in said:
            continue
        try:
            tensor.check_type()
            tensor.check_scales("float32")
        except (UnknownQuantTypeError, UnsupportedTypeError) as error:
            note(error)
            said.add(_type(tensor))


def _as_dict(weights: Any, *, with_metadata: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "files": [
            {
                "path": p.file.path, "size": p.file.size,
                "format": p.header.title.split()[0], "version": p.header.version,
                "byte_order": p.header.byte_order, "alignment": p.header.alignment,
            }
            for p in weights.parts
        ],
        "tensors": [
            {
                "name": t.name, "qtype": t.type_name, "dims": t.dims, "shape": t.shape,
                "offset": t.offset, "nbytes": t.nbytes, "path": t.path,
                "layout": t.layout, "scales": _scales(t),
            }
            for t in weights.values()
        ],
    }  # fmt: skip
    if adapter := describe(weights):
        data["adapter"] = adapter._asdict()
    if with_metadata:
        data["metadata"] = dict(weights.metadata)
    return data


def _short(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
        return text if len(text) <= WIDTH else f"{text[:WIDTH]}... ({len(value)} characters)"
    if not hasattr(value, "tolist"):
        return repr(value)
    if len(value) <= SHOWN:
        return repr(value.tolist())
    return f"[{', '.join(map(repr, value[:SHOWN]))}, ...] ({len(value)} elements)"
