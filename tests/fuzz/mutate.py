"""Damage: of bytes, of JSON trees and of safetensors files. Every choice is drawn from the `Random` that is given."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

TEXTS = (
    "", " ", "\0", "x'\"\n\\", "'''\nimport os; os.mkdir('ran')\n'''", "__import__('os').mkdir('ran')", "../../x",
    "/etc/passwd", "{0.__class__}", "{{ 7 * 7 }}", "!!python/object/apply:os.mkdir [ran]", "64", "nan", "vit", "None",
    "AutoModel", "BertModel", "pipeline", "Trainer", "hf-hub:nobody/nothing", "org/kernel", "\ud800", "🦊",
    "a" * 5000, "model\x1b[31m", "gelu", "float16", "float8_e4m3fn", "not_a_dtype",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 5, 7, 33, 1000, 99_999, 10**6, 2**24, 10**9, 2**31 - 1, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**63,
    2**64, 10**30, -(2**63), 10**4000, 0.5, -0.5, 1e-9, 1e9, 1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "")
DEEP = "<deep>"  # becomes brackets, which json.dumps could not write
DEPTHS = (50, 900, 5000, 200_000)


def value(rng: Random) -> Any:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.7:
        return rng.choice(TEXTS)
    return rng.choice([None, True, False, [], {}, [[]], [1, 2], [0] * 3, [-1, 4], {"a": 1}, {"": None}, DEEP])


def nudged(rng: Random, number: int | float) -> int | float:
    """Another number that may well be taken for the right one."""
    return rng.choice([
        number + 1, number - 1, number * 2, number * 3, number // 2, 0, -number, number * 10, number * 1000,
        number * 10**6, float(number) if abs(number) < 1e300 else number,
    ])  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        todo += [node[key] for key in keys]
    return found


def damage_tree(rng: Random, tree: dict[str, Any], keys: tuple[str, ...] = ()) -> None:
    """One to three changes anywhere in the tree, in place; `keys` may be added."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        choices = places(tree)
        if not choices or (keys and rng.random() < 0.15):
            tree[rng.choice(keys or ("x",))] = value(rng)
            continue
        node, key = rng.choice(choices)
        old = node[key]
        kind = rng.random()
        if type(old) in (int, float) and kind < 0.6:
            node[key] = nudged(rng, old)
        elif kind < 0.15:
            del node[key]
        elif kind < 0.25:
            other, elsewhere = rng.choice(choices)
            node[key] = json.loads(json.dumps(other[elsewhere]))  # a copy: no cycles
        elif kind < 0.3:
            node[key] = [old] * rng.choice([1, 2, 50])
        elif kind < 0.35:
            node[key] = {"x": old}
        else:
            node[key] = value(rng)


def dump(rng: Random, tree: Any) -> str:
    text = json.dumps(tree)
    if DEEP in text:
        depth, (start, end) = rng.choice(DEPTHS), rng.choice([("[", "]"), ('{"a":', "}")])
        text = text.replace(f'"{DEEP}"', start * depth + "1" + end * depth, 1)
    return text


def load(text: str) -> Any:
    return json.loads(text)


def damage_bytes(rng: Random, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """Bits flipped, bytes replaced, cut, doubled or stuffed, between `start` and `stop`."""
    stop = len(data) if stop is None else min(stop, len(data))
    at = rng.randrange(start, max(stop, start + 1))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + rng.choice([1, 2, 8, 100]) :]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.choice([1, 8, 100])) + data[at:]
    if kind == 3:
        return data[:at] + data[max(0, at - 20) : at] * rng.choice([1, 2, 500]) + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 4, 30])):
        at = rng.randrange(start, max(stop, start + 1))
        if at < len(changed):
            changed[at] = changed[at] ^ (1 << rng.randrange(8)) if kind == 4 else rng.randrange(256)
    return bytes(changed)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: str | bytes, data: bytes, claimed: int | None = None) -> bytes:
    raw = header.encode(errors="surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if claimed is None else claimed % 2**64) + raw + data


def damage_header(rng: Random, content: bytes) -> bytes:
    """A header that lies: offsets, dtypes, shapes, names twice, depth, a wrong length."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    kind = rng.randrange(9)
    if kind == 0:
        return joined(json.dumps(header), data, rng.choice([0, 1, 2, 10**8, 2**40, 2**63, 2**64 - 1, len(content)]))
    if kind == 1:
        text = json.dumps(header)
        return joined(text[:-1] + "," + json.dumps({name: entry})[1:], data)
    if kind == 2:
        return joined(damage_bytes(rng, json.dumps(header).encode()), data)
    if kind == 3:
        side = rng.randrange(2)
        entry["data_offsets"][side] = rng.choice([nudged(rng, entry["data_offsets"][side]), value(rng)])
    elif kind == 4:
        entry["shape"] = rng.choice([
            [], [0], entry["shape"][::-1], [*entry["shape"], 1], [*entry["shape"], 0, 10**4000], [10**9] * 8,
            [10**4000] * 3, [99_999_999] * 20_000, value(rng),
        ])  # fmt: skip
    elif kind == 5:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 6:
        other = rng.choice(names)
        header[name], header[other] = header[other], entry
    elif kind == 7:
        header["__metadata__"] = value(rng)
    else:
        damage_tree(rng, header)
    return joined(dump(rng, header), data)


def damage_tensors(rng: Random, path: Path) -> None:
    """A valid file with the wrong tensors: missing, renamed, reshaped, of another dtype, too many, NaN or infinite."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice([name + "x", name.upper(), "a.b.c", *(t for t in TEXTS if t.isprintable())])] = tensors.pop(
            name
        )
    elif kind == 2:
        tensors[name] = rng.choice([tensor.flatten(), tensor[None], tensor[:0], tensor[:1], tensor.sum()]).clone()
    elif kind == 3:
        dtypes = [
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.bool,
            torch.float8_e4m3fn,
        ]
        chosen = rng.choice(dtypes)
        for each in rng.choice([[name], list(tensors)]):
            tensors[each] = tensors[each].to(chosen)
    elif kind == 4:
        tensors[rng.choice(["extra", "register_tokens", "visual.x"])] = torch.ones(rng.choice([1, 3]))
    elif kind == 5:
        tensors = {each: tensors[each] for each in rng.sample(sorted(tensors), rng.randrange(len(tensors)))}
    else:
        dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
        changed = tensor.to(dtype).flatten().clone()
        if changed.numel():
            changed[rng.randrange(changed.numel())] = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38])
        tensors[name] = changed.reshape(tensor.shape)
    save_file(tensors, path, metadata={"format": "pt"})
