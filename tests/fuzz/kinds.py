"""What is damaged, and the public entry points that get it. A kind is `damage` and `run`, on a folder of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.bases import RECIPE, Bases

LOADER = "modeling_regsurgery.py"
PATCHED = ("patched-vit", "patched-timm")
LOADED = ("vit", "dinov2", "clip", "timm", "timm-beit", "open_clip")
CONFIG_KEYS = ("architectures", "auto_map", "attn_implementation", "_attn_implementation", "num_labels", "id2label",
               "num_classes", "in_chans", "quantization_config", "dtype", "torch_dtype", "vision_config", "regsurgery",
               "max_position_embeddings", "patch_size", "image_size", "num_hidden_layers", "out_features", "layers",
               "hf_model_name", "timm_model_name", "mlp_ratio", "init_values", "reg_tokens", "use_cache")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """`damage` changes a copy of one of `bases` in place; `run` gives it to the package."""

    bases: tuple[str, ...]
    damage: Callable[[Random, Path], None]
    run: Callable[[Random, Path, Bases], None]
    weight: int


def weights_of(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def config_of(folder: Path) -> Path:
    return next(p for p in (folder / "open_clip_config.json", folder / "config.json") if p.is_file())


# --- damage ---------------------------------------------------------------------------------------------------------


def weight_bytes(rng: Random, folder: Path) -> None:
    path = weights_of(folder)
    content = path.read_bytes()
    stop = rng.choice([8, 200, len(content) - len(mutate.split(content)[1]), None])
    path.write_bytes(mutate.damage_bytes(rng, content, 0, stop))


def weight_header(rng: Random, folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(mutate.damage_header(rng, path.read_bytes()))


def weight_tensors(rng: Random, folder: Path) -> None:
    mutate.damage_tensors(rng, weights_of(folder))


def config_tree(rng: Random, folder: Path) -> None:
    _tree(rng, config_of(folder), CONFIG_KEYS)


def config_text(rng: Random, folder: Path) -> None:
    path = config_of(folder)
    path.write_bytes(mutate.damage_bytes(rng, path.read_bytes()))


def processor(rng: Random, folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        _tree(rng, path, ("auto_map", "crop_size", "do_center_crop", "size", "image_processor_type", "resample"))
        return
    path = config_of(folder)
    tree = json.loads(path.read_text("utf-8"))
    part = tree.get("pretrained_cfg", tree.get("preprocess_cfg"))
    mutate.damage_tree(rng, part, ("crop_pct", "interpolation", "mean", "std", "size", "input_size", "resize_mode"))
    path.write_text(mutate.dump(rng, tree), "utf-8")


def _tree(rng: Random, path: Path, keys: tuple[str, ...] = ()) -> None:
    tree = json.loads(path.read_text("utf-8"))
    mutate.damage_tree(rng, tree, keys)
    path.write_text(mutate.dump(rng, tree), "utf-8")


def index(rng: Random, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    tree = json.loads(path.read_text("utf-8"))
    shards, names = sorted(set(tree["weight_map"].values())), sorted(tree["weight_map"])
    name, shard = rng.choice(names), rng.choice(shards)
    outside = folder.parent / "outside.safetensors"
    kind = rng.randrange(8)
    if kind == 0:
        shutil.copyfile(folder / shard, outside)
        tree["weight_map"][name] = rng.choice(["../outside.safetensors", str(outside), "./../outside.safetensors"])
    elif kind == 1:
        (folder / shard).unlink()
    elif kind == 2:
        tree["weight_map"][name] = shard
    elif kind == 3:
        (folder / shard).rename(outside)
        (folder / shard).symlink_to(rng.choice([outside, Path("../outside.safetensors"), Path("nowhere"), Path(shard)]))
    elif kind == 4:
        shutil.copyfile(folder / shards[0], folder / shards[1])
    elif kind == 5:
        del tree["weight_map"][name]
    else:
        mutate.damage_tree(rng, tree)
    path.write_text(mutate.dump(rng, tree), "utf-8")


def links(rng: Random, folder: Path) -> None:
    """A file of the folder lies elsewhere, or is a device, a pipe or a folder."""
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
    outside = folder.parent / "outside"
    shutil.copyfile(path, outside)
    kind = rng.randrange(6)
    if kind != 5:
        path.unlink()
    if kind == 0:
        path.symlink_to(rng.choice([outside, Path("../outside")]))
    elif kind == 1:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", path.name, "/proc/self/environ"]))
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        shutil.copyfile(outside, folder / "inside")
        path.symlink_to("inside")
    else:
        (folder / rng.choice(["vocab.txt", "sub"])).symlink_to(rng.choice(["/etc/passwd", "/etc", "/"]))


def pickled(rng: Random, folder: Path) -> None:
    import torch

    path = folder / "pytorch_model.bin"
    content = path.read_bytes()
    kind = rng.randrange(8)
    if kind == 0:
        path.write_bytes(mutate.damage_bytes(rng, content))
    elif kind == 1 and zipfile.is_zipfile(path):
        _rezip(rng, path)
    elif kind == 2:
        torch.save({"weight": Runs(folder.parent / "ran")}, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    elif kind == 3:
        path.write_bytes(
            rng.choice([b"", b"PK\5\6" + b"\0" * 18, pickle.dumps(Runs(folder.parent / "ran")), b"\x80\x02}."])
        )
    elif kind == 4:
        large = torch.zeros(1).expand(rng.choice([10, 10**9, 10**12]))
        torch.save({"cls_token": large, "b": [large] * 2}, path)
    elif kind == 5:
        shared = torch.zeros(10_000)
        torch.save({f"w{number}": shared[number % 7 :] for number in range(rng.choice([3, 2000]))}, path)
    elif kind == 6:
        two = torch.ones(2)
        torch.save(rng.choice([{"state_dict": 3}, {"state_dict": {"a": two}}, {1: two}, two, {"a": two.to_sparse()},
                               {"a": torch.ones(2, device="meta")}, None]), path)  # fmt: skip
    else:
        path.write_bytes(mutate.damage_bytes(rng, content, len(content) - 3000))


def _rezip(rng: Random, path: Path) -> None:
    """The same archive with an entry that unpacks to far more than the file, damaged names or a damaged pickle."""
    with zipfile.ZipFile(path) as archive:
        parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    bomb = rng.random() < 0.4
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if bomb else zipfile.ZIP_STORED) as archive:
        for name, data in parts:
            if bomb and name.endswith("data/0"):
                data = b"\0" * 30_000_000
            elif not bomb and name.endswith("data.pkl") and rng.random() < 0.8:
                data = mutate.damage_bytes(rng, data)
            elif not bomb and rng.random() < 0.02:
                continue
            archive.writestr(name, data)
    path.write_bytes(out.getvalue())


FILES = ("file-timm", "file-timm", "file-archive", "file-ckpt", "file-shards", "file-bare")
FILE_KEYS = ("state_dict", "state_dict_ema", "model", "teacher", "student", "args", "arch", "weight_map", "metadata",
             "model_kwargs", "num_classes", "mean", "crop_pct", "in_chans", "gp", "input_size")  # fmt: skip


ADAPTER_KEYS = ("base_model_name_or_path", "peft_type", "task_type", "target_modules", "modules_to_save", "r", "bias",
                "auto_mapping", "rank_pattern", "use_dora", "layers_to_transform", "revision")  # fmt: skip


def file_of(folder: Path) -> Path:
    return next(folder.glob("weights.*"))


def file_words(rng: Random, folder: Path) -> None:
    """What the user says of a file: see `run_file`."""
    right = (folder / "arch").read_text() if (folder / "arch").is_file() else "timm:vit_tiny_patch16_224"
    library, _, name = right.partition(":")
    said = [right, name, f"{library}:", f"timm:{name}", "open_clip:ViT-B-32", f"open_clip:{folder}", "timm:test_vit",
            f"transformers:{folder}", "transformers:no/thing", f"{library}:{rng.choice(mutate.TEXTS)}",
            rng.choice(mutate.TEXTS)]  # fmt: skip
    (folder / "arch").write_text(rng.choice(said), "utf-8", "surrogatepass")


def adapter(rng: Random, folder: Path) -> None:
    if rng.random() < 0.5:
        _tree(rng, folder / "adapter_config.json", ADAPTER_KEYS)
    else:
        rng.choice([weight_bytes, weight_header, weight_tensors])(rng, folder)


def picture(rng: Random, folder: Path) -> None:
    path = rng.choice(sorted((folder / "labels").iterdir()))
    content = path.read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        path.rename(folder / "labels" / rng.choice(["a.png", "a", ".a.jpg", "a.mp4", "a.jfif", "10.jpg"]))
    elif kind == 1:
        path.unlink()
        path.symlink_to(rng.choice([folder, "/dev/zero", "nowhere"]))
    else:
        path.write_bytes(mutate.damage_bytes(rng, content, 0, rng.choice([64, 200, None])))


def file_bytes(rng: Random, folder: Path) -> None:
    path = rng.choice(sorted({file_of(folder), *folder.glob("*.bin")}))
    content = path.read_bytes()
    start = rng.choice([0, 0, max(0, len(content) - 3000)])
    path.write_bytes(mutate.damage_bytes(rng, content, start, rng.choice([None, min(start + 4000, len(content))])))


def file_content(rng: Random, folder: Path) -> None:
    """Other content of the same kind: damaged entries and arguments, other names, a rezipped archive."""
    import torch

    path = file_of(folder)
    if path.suffix == ".json":
        _tree(rng, path, FILE_KEYS)
        return
    if path.suffix == ".pt":
        _rezip(rng, path)
        return
    if path.suffix == ".safetensors":
        rng.choice([weight_header, weight_tensors])(rng, folder)
        return
    content = torch.load(path, weights_only=False)
    if "args" in content and rng.random() < 0.5:
        arguments = vars(content["args"])
        arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
        mutate.damage_tree(rng, arguments, FILE_KEYS)
        content["args"] = arguments
    key = rng.choice(sorted(set(content) & {"state_dict", "state_dict_ema"}))
    state, kind = content[key], rng.randrange(6)
    names = list(state)
    if kind == 0:
        content[key] = {rng.choice(["module.", "a.b.", "_orig_mod.", "0.", "", ".", "\0."]) + name: value
                        for name, value in state.items()}  # fmt: skip
    elif kind == 1:
        content[key] = mutate.value(rng)
    elif kind == 2:
        state[rng.choice(names)] = rng.choice([torch.ones(3), None, torch.ones(2).to_sparse(), 3, torch.empty(0)])
    elif kind == 3:
        content[rng.choice(FILE_KEYS)] = rng.choice([state, {"state_dict": state}, mutate.value(rng), content])
    elif kind == 4:
        del state[rng.choice(names)]
    else:
        content = rng.choice([content[key], [content], {key: {key: {key: {key: state}}}}])
    torch.save(content, path)


class Runs:
    """A pickle that makes a folder where it is loaded carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


RECIPE_VALUES = (
    "~", "[]", "{}", "-1", "0x" + "f" * 9000, "9" * 4000, "9" * 6000, "1:30:59", "1e400", ".nan", "2001-01-01",
    "2001-99-99", "{2001-01-01 00:00:00: [1], 2001-01-01 00:00:00Z: [2]}", "{~: [1], a: [1]}", "native", "bias",
    "!!python/object/apply:os.mkdir [ran]", "!!binary '%%'", "!!set {a, b}", "!!int x", "!!timestamp x",
    "&a [*a]", "*nobody", "|\n  a\n  b", "\t", "\0", "\ud800", "{0: [1], 0.0: [1]}", "{1: [0x" + "f" * 9000 + "]}",
    "[" * 3000, "[" * 300 + "]" * 300, "{0: [" + "1," * 4000 + "1]}", "'" + "x" * 70_000 + "'",
    "!!omap [a: 1]", "{? [a] : 1}", "{? {a: 1} : 1}", "<<", "{<<: {a: 1}}", "{<<: 3}", "{.nan: [1], .nan: [2]}",
    "__import__('os').mkdir('ran')", '"\\x1b[31m"', "{0: [true]}", "{99999999999999999999: [1]}", "{0: [10000000000]}",
    "1_000", "0o7", "{0: [3], 1: [3, 4]}", "[1.0, .inf]", "yes", "0", "1", "2", "64",
)  # fmt: skip
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def recipe_text(rng: Random, folder: Path) -> None:
    lines = RECIPE.splitlines()
    kind = rng.randrange(7)
    if kind == 0:
        content = mutate.damage_bytes(rng, RECIPE.encode())
    elif kind == 1:
        key = rng.choice(
            ["schema", "model", "mode", "fill", "scale", "register_neurons", "provenance", "num_registers"]
        )
        nested = LAUGHS.replace("\n", ", ").removesuffix(", ")
        content = (
            f"provenance2: {{{nested}}}\n{key}: *i\n".encode()
            if rng.random() < 0.5
            else (
                "\n".join(line for line in lines if not line.startswith((key, " "))) + f"\n{key}: {{{nested}}}\n"
            ).encode()
        )
    elif kind == 2:
        content = "\n".join([*lines[: rng.randrange(len(lines))], rng.choice(lines)]).encode()
    else:
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(9)
            lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(RECIPE_VALUES)}"
        if not lines[8].endswith(":"):
            del lines[9:]
        content = "\n".join(lines).encode(errors="surrogatepass")
    (folder / "recipe.yaml").write_bytes(content)


def patched_block(rng: Random, folder: Path) -> None:
    path = config_of(folder)
    tree = json.loads(path.read_text("utf-8"))
    if rng.random() < 0.1:
        tree["regsurgery"] = mutate.value(rng)
    else:
        keys = ("mode", "source", "num_registers", "layouts", "register_neurons")
        mutate.damage_tree(rng, tree["regsurgery"] if rng.random() < 0.8 else tree, keys)
    path.write_text(mutate.dump(rng, tree), "utf-8")
    resum(folder)


def patched_files(rng: Random, folder: Path) -> None:
    rng.choice([weight_bytes, weight_header, weight_tensors, config_text, recipe_text, links])(rng, folder)
    if rng.random() < 0.7:
        resum(folder)


def patched_record(rng: Random, folder: Path) -> None:
    """Damage to what restoring the original takes; deflated entries among it."""
    path = folder / "regsurgery_original.json"
    tree = json.loads(path.read_text("utf-8"))
    entry = rng.choice(list(tree["files"].values()))
    if rng.random() < 0.3:
        entry[rng.choice(["header", "content"])] = rng.choice(
            ["", "!", "eJw=", base64.b64encode(zlib.compress(bytes(1 << 26))).decode(),
             base64.b64encode(zlib.compress(mutate.dump(rng, {"a": mutate.value(rng)}).encode())).decode()]
        )  # fmt: skip
    elif rng.random() < 0.3:
        if rng.random() < 0.3:
            tree["files"] |= {f"again{number}": entry for number in range(rng.choice([2, 5000]))}
        tree["files"][rng.choice(["../x", "/etc/x", "a/b", "", ".", ".hidden", "\0", "a" * 300])] = entry
    else:
        mutate.damage_tree(rng, tree, ("files", "sha256", "header", "not_copied", "converted_from"))
    path.write_text(mutate.dump(rng, tree), "utf-8")
    resum(folder)


def patched_loader(rng: Random, folder: Path) -> None:
    """Another byte anywhere in the code that a folder brings."""
    path = folder / LOADER
    path.write_bytes(mutate.damage_bytes(rng, path.read_bytes()))
    resum(folder)


def names(rng: Random, folder: Path) -> None:
    """A file whose name checksums or terminals cannot take."""
    (folder / os.fsdecode(rng.choice([b"\xff", b"a\nb", b"\x1b[31m", "\u202e".encode(), b"a b", b"\xc3\xa9"]))).touch()


def patched_sums(rng: Random, folder: Path) -> None:
    path = folder / "SHA256SUMS"
    lines = path.read_text("utf-8").splitlines()
    if rng.random() < 0.5:
        path.write_bytes(mutate.damage_bytes(rng, path.read_bytes()))
        return
    name = rng.choice(
        ["../x", "/etc/passwd", "\0", "a" * 5000, ".", "", "sub/../x", "\ud800", "config.json/x", "link/passwd"]
    )
    (folder / "link").symlink_to("/etc")
    path.write_bytes("\n".join([rng.choice(lines).split()[0] + "  " + name, *lines]).encode(errors="surrogatepass"))


def resum(folder: Path) -> None:
    from regsurgery.checkpoints.sums import write_sums

    if all(path.is_file() and not path.is_symlink() for path in folder.iterdir()):
        write_sums(folder)


# --- entry points ---------------------------------------------------------------------------------------------------


def run_load(rng: Random, folder: Path, bases: Bases) -> None:
    import PIL.Image

    from regsurgery.frontends.load import load
    from regsurgery.options import LoadOptions

    loaded = load(str(folder), LoadOptions(allow_pickle=True))
    loaded.preprocess([PIL.Image.new("RGB", (20, 18), (9, 90, 200))])


def run_file(rng: Random, folder: Path, bases: Bases) -> None:
    from regsurgery.frontends.load import load
    from regsurgery.options import LoadOptions

    prefix = rng.choice([None, None, None, "net", "module.", "", "."])
    load(str(file_of(folder)), LoadOptions(allow_pickle=True, ema=rng.choice([None, None, False]), prefix=prefix))


def run_words(rng: Random, folder: Path, bases: Bases) -> None:
    from regsurgery.frontends.load import load
    from regsurgery.options import LoadOptions

    arch = (folder / "arch").read_text("utf-8", "surrogatepass")
    how = {"subfolder": rng.choice([None] * 9 + ["a"]), "revision": rng.choice([None] * 9 + ["main"])}
    prefix = rng.choice([None, None, None, "net", "\0", "a.b"])
    load(
        str(file_of(folder)),
        LoadOptions(allow_pickle=True, arch=arch, prefix=prefix, ema=rng.choice([None, None, None, True]), **how),
    )


def run_images(rng: Random, folder: Path, bases: Bases) -> None:
    import torch

    from regsurgery.images.image_set import image_set

    found = image_set(folder, rng.choice([3, 8]), seed=rng.randrange(3))
    list(found.batches(4, lambda images: torch.ones(len(images), 3, 4, 4)))


def run_ids(rng: Random, folder: Path, bases: Bases) -> None:
    """Ids of models and recipes; `me/model` is in the Hub's cache, whose other ids are refused offline."""
    from huggingface_hub import constants

    from regsurgery.frontends.load import load
    from regsurgery.hub.recipe import named_recipe
    from regsurgery.options import LoadOptions
    from regsurgery.settings import replaced

    repository = folder.parent / "model" / "models--me--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c" * 40)
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(snapshot / path.name)
    text = rng.choice(mutate.TEXTS)
    ids = [
        "me/model",
        "hf-hub:me/model",
        "me/model@main",
        f"me/model@{text}",
        f"https://hf.co/me/model/tree/main/{text}",
        f"https://{text}",
        f"timm:{text}",
        f"open_clip:{text}",
        f"hf://{text}",
        text,
        f"me/{text}",
        "me/model/a",
    ]
    chosen = rng.choice(ids)
    with replaced(constants, "HF_HUB_CACHE", str(folder)), replaced(constants, "HF_HUB_OFFLINE", True):
        if rng.random() < 0.5:
            named_recipe(chosen)
        else:
            said = text[:200]
            load(chosen, LoadOptions(subfolder=rng.choice([None, None, said]), revision=rng.choice([None, None, said])))


def run_header(rng: Random, folder: Path, bases: Bases) -> None:
    from regsurgery.checkpoints.safetensors_file import read_header

    read_header(weights_of(folder))


def run_recipe(rng: Random, folder: Path, bases: Bases) -> None:
    from regsurgery.compiler.passes.plan import plan_surgery
    from regsurgery.compiler.surgery import check_fit
    from regsurgery.recipe import find_recipe, parse_recipe

    recipe = find_recipe(str(folder / "recipe.yaml"))
    assert parse_recipe(recipe.to_yaml(), "written").as_dict() == recipe.as_dict(), (
        "a recipe is not what it was written as"
    )
    recipe.with_num_registers(3).with_mode("shift")
    check_fit(recipe, bases.sites)
    plan_surgery(bases.sites, recipe)


def run_patched(rng: Random, folder: Path, bases: Bases) -> None:
    from regsurgery.checkpoints.sums import check_sums
    from regsurgery.frontends.load import load
    from regsurgery.recipe import find_recipe
    from regsurgery.verification.original import restore_original
    from regsurgery.verification.patched import existing_folder, folder_format, patched_mode
    from regsurgery.verification.patched import load as load_patched

    check_sums(existing_folder(folder))
    fmt = folder_format(folder)
    patched_mode(folder, fmt)
    find_recipe(str(folder / "recipe.yaml"))
    restore_original(folder, folder.parent / "restored", fmt)
    load(str(folder.parent / "restored"))
    load_patched(folder)


def run_loader(rng: Random, folder: Path, bases: Bases) -> None:
    from regsurgery.verification.patched import load

    load(folder)
    ours = {(bases.folders[name] / LOADER).read_bytes() for name in PATCHED}
    assert (folder / LOADER).read_bytes() in ours, "code that no regsurgery wrote was run"


KINDS = {
    "header: bytes": Kind(LOADED, weight_bytes, run_header, 8),
    "header: lies": Kind(LOADED, weight_header, run_header, 10),
    "weights: bytes": Kind(LOADED, weight_bytes, run_load, 6),
    "weights: header lies": Kind(LOADED, weight_header, run_load, 8),
    "weights: other tensors": Kind(LOADED, weight_tensors, run_load, 12),
    "config: tree": Kind(LOADED, config_tree, run_load, 30),
    "config: text": Kind(LOADED, config_text, run_load, 6),
    "preprocessor": Kind(("vit", "clip", "timm", "open_clip"), processor, run_load, 12),
    "index": Kind(("sharded",), index, run_load, 8),
    "links": Kind((*LOADED, "sharded", "bin"), links, run_load, 5),
    "pickle": Kind(("bin", "bin", "bin-legacy"), pickled, run_load, 8),
    "file: bytes": Kind(FILES, file_bytes, run_file, 10),
    "file: content": Kind(FILES, file_content, run_file, 16),
    "file: words": Kind(FILES, file_words, run_words, 8),
    "adapter": Kind(("adapter",), adapter, run_load, 8),
    "images": Kind(("images",), picture, run_images, 10),
    "ids": Kind(("patched-vit", "vit"), recipe_text, run_ids, 8),
    "recipe": Kind(("vit",), recipe_text, run_recipe, 15),
    "patched: config": Kind(PATCHED, patched_block, run_patched, 12),
    "patched: files": Kind(PATCHED, patched_files, run_patched, 6),
    "patched: record": Kind(PATCHED, patched_record, run_patched, 6),
    "patched: loader": Kind(PATCHED, patched_loader, run_loader, 6),
    "names": Kind(LOADED, names, run_load, 2),
    "patched: sums": Kind(PATCHED, patched_sums, run_patched, 3),
}
