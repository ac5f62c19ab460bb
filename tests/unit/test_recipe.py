from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from regsurgery.errors import RecipeError
from regsurgery.plain import plural
from regsurgery.recipe import Recipe, bundled_recipes, find_recipe, parse_recipe, recipe_for_model

RECIPES_DATA = Path(__file__).parents[2].parent / "shared" / "recipes-data"
MINIMAL = "schema: 1\nregister_neurons: {7: [417]}\n"


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml: ")
    assert "\n" not in message
    return message


def test_a_minimal_recipe_has_the_contracts_defaults():
    assert parse_recipe(MINIMAL, "some.yaml") == Recipe(
        register_neurons={7: (417,)}, model="", num_registers=1, mode="shift", fill="zero", prefix="keep",
        compat="none", scale=(1.0,), provenance={},
    )  # fmt: skip


def test_blocks_and_neurons_are_sorted():
    recipe = parse_recipe("schema: 1\nregister_neurons: {11: [9, 10, 2], 2: [5]}\n", "some.yaml")
    assert list(recipe.register_neurons.items()) == [(2, (5,)), (11, (2, 9, 10))]
    assert recipe.num_neurons == 4


@pytest.mark.parametrize(
    "line, expected",
    [
        ("num_register: 1", "unknown key 'num_register'; did you mean 'num_registers'?"),
        ("fil: zero", "unknown key 'fil'; did you mean 'fill'?"),
        ("wholly_different: 1", "unknown key 'wholly_different'"),
        ("5: 1", "unknown key '5'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(line, expected):
    assert refusal(MINIMAL + line) == f"some.yaml: {expected}"


@pytest.mark.parametrize("key", ["schema", "register_neurons"])
def test_a_missing_key_is_named(key):
    kept = [line for line in MINIMAL.splitlines() if not line.startswith(key)]
    assert f"the key '{key}' is missing" in refusal("\n".join(kept))


@pytest.mark.parametrize(
    "text, key",
    [
        (MINIMAL + "fill: zero\nfill: mean", "fill"),
        ("schema: 1\nregister_neurons: {7: [1], 7: [2]}", "7"),
        ("schema: 1\nregister_neurons: {7: [1], 0x7: [2]}", "7"),
        (MINIMAL + "provenance: {by: me, by: you}", "by"),
    ],
)
def test_a_key_given_twice_is_refused(text, key):
    message = refusal(text)
    assert "is given twice" in message
    assert key in message


@pytest.mark.parametrize("schema", ["2", "0", "one", "~", "true", "'1'", "[1]"])
def test_another_schema_is_refused(schema):
    assert "schema" in refusal(f"schema: {schema}\nregister_neurons: {{7: [417]}}")


@pytest.mark.parametrize(
    "line, named",
    [
        ("num_registers: two", "num_registers"),
        ("num_registers: 1.0", "num_registers"),
        ("num_registers: true", "num_registers"),
        ("num_registers: -1", "num_registers"),
        ("num_registers: 65", "num_registers"),
        ("num_registers: 100000000000000000000", "num_registers"),
        ("scale: big", "scale"),
        ("scale: true", "scale"),
        ("scale: .nan", "scale"),
        ("scale: .inf", "scale"),
        ("scale: [one]", "scale"),
        ("model: 7", "model"),
        ("model: ~", "model"),
        ("provenance: me", "provenance"),
        ("provenance: [me]", "provenance"),
        ("provenance: []", "provenance"),
        ("mode: 1", "mode"),
        ("fill: ~", "fill"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(line, named):
    assert named in refusal(MINIMAL + line)


@pytest.mark.parametrize(
    "neurons, expected",
    [
        ("[7, 417]", "register_neurons must be {block: [neuron, ...]}"),
        ("417", "register_neurons must be {block: [neuron, ...]}"),
        ("{7: 417}", "block 7"),
        ("{7: []}", "block 7"),
        ("{-1: [417]}", "block -1"),
        ("{seven: [417]}", "block 'seven'"),
        ("{true: [417]}", "block True"),
        ("{7: [-417]}", "neuron -417 of block 7"),
        ("{7: [1.0]}", "neuron 1.0 of block 7"),
        ("{7: [true]}", "neuron True of block 7"),
        ("{7: [3, 417, 3]}", "neuron 3 of block 7 is listed twice"),
    ],
)
def test_a_wrong_neuron_list_is_refused_by_block_and_neuron(neurons, expected):
    assert expected in refusal(f"schema: 1\nregister_neurons: {neurons}")


def test_neurons_without_a_register_are_refused():
    assert "num_registers is 0 but neurons are listed" in refusal(MINIMAL + "num_registers: 0")


def test_no_registers_and_no_neurons_are_accepted():
    recipe = parse_recipe("schema: 1\nregister_neurons: {}\nnum_registers: 0", "some.yaml")
    assert (recipe.num_registers, recipe.num_neurons, recipe.scale) == (0, 0, ())


@pytest.mark.parametrize("num_registers, scale", [(1, "[1, 2]"), (3, "[1, 2]"), (1, "[]")])
def test_a_scale_list_of_the_wrong_length_is_refused(num_registers, scale):
    message = refusal(MINIMAL + f"num_registers: {num_registers}\nscale: {scale}")
    assert (
        f"scale lists {len(yaml.safe_load(scale))} numbers for {plural(num_registers, 'register')}; list one" in message
    )


@pytest.mark.parametrize(
    "line, expected",
    [
        ("mode: shfit", "mode must be one of shift, native, bias, found 'shfit'; did you mean 'shift'?"),
        ("fill: outlier", "fill must be one of zero, mean, outliers, keep, found 'outlier'; did you mean 'outliers'?"),
        ("prefix: fil", "prefix must be one of keep, fill, found 'fil'; did you mean 'fill'?"),
        ("compat: referenc", "compat must be one of none, reference, found 'referenc'; did you mean 'reference'?"),
        ("compat: [none]", "compat must be one of none, reference"),
    ],
)
def test_an_unknown_option_is_refused_with_those_that_exist(line, expected):
    assert expected in refusal(MINIMAL + line)


@pytest.mark.parametrize(
    "text",
    ["a: [", "\x00", "a: b: c", "[" * 100_000, "a: !!python/object/apply:os.getcwd []", "? [1]\n: 2",
     MINIMAL + "model: 2001-99-99", "schema: !!int one"],
    ids=["open", "nul", "two colons", "deep", "python tag", "list as key", "no such day", "int that is none"],
)  # fmt: skip
def test_bad_yaml_is_refused(text):
    refusal(text)


@pytest.mark.parametrize("text", ["", "- schema: 1", "schema", "1"])
def test_yaml_that_is_no_mapping_is_refused(text):
    assert "expected a mapping" in refusal(text)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe({7: (417,)}),
        Recipe({}, num_registers=0, scale=()),
        Recipe({1: (2, 3), 10: (0,)}, model="a/b", num_registers=2, fill="outliers", prefix="fill", compat="reference",
               scale=(0.5, 1e-07), provenance={"found_by": "Ænne: #1", "figures": {"kl": 0.25}}),
        Recipe({1: (2,)}, num_registers=3, scale=(2.0, 2.0, 2.0)),
    ],
    ids=["defaults", "nothing", "everything", "common scale"],
)  # fmt: skip
def test_what_is_written_reads_back_equal(recipe):
    text = recipe.to_yaml()
    assert parse_recipe(text, "some.yaml") == recipe
    assert yaml.safe_load(text) == recipe.as_dict()
    assert text.startswith("schema: 1\n")


def test_a_common_scale_follows_the_number_of_registers():
    recipe = parse_recipe(MINIMAL + "scale: 0.5", "some.yaml").with_num_registers(4)
    assert (recipe.num_registers, recipe.scale) == (4, (0.5, 0.5, 0.5, 0.5))


def test_different_scales_do_not_follow_the_number_of_registers():
    recipe = parse_recipe(MINIMAL + "num_registers: 2\nscale: [1, 2]", "some.yaml")
    with pytest.raises(RecipeError, match="one scale per register"):
        recipe.with_num_registers(3)


@pytest.mark.parametrize("num_registers", [0, -1, 65])
def test_a_number_of_registers_out_of_range_is_refused(num_registers):
    with pytest.raises(RecipeError, match="--num-registers"):
        parse_recipe(MINIMAL, "some.yaml").with_num_registers(num_registers)


# --- bundled recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, model, num_neurons, num_registers",
    [
        ("demo", "demo", 3, 1),
        ("vit-tiny", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", 2, 3),
        ("dinov2-large", "facebook/dinov2-large", 50, 1),
        ("dinov2-large-torchhub", "facebook/dinov2-large", 45, 1),
    ],
)
def test_a_bundled_recipe_is_found_by_name(name, model, num_neurons, num_registers):
    recipe = find_recipe(name)
    assert (recipe.model, recipe.num_neurons, recipe.num_registers) == (model, num_neurons, num_registers)
    assert bundled_recipes()[name] == recipe


def test_the_vit_tiny_recipe_is_what_find_chose():
    recipe = find_recipe("vit-tiny")
    assert recipe.register_neurons == {6: (189,), 7: (417,)} and recipe.changes_since_found() == ()
    (chosen,) = (row for row in recipe.table() if row["chosen"])
    (paper,) = (row for row in recipe.table() if row["paper"])
    assert (chosen["num_registers"], paper["num_registers"]) == (3, 1) and chosen["drift"] < 0.3 * paper["drift"]


@pytest.mark.parametrize("name", ["dinov2-large", "dinov2-large-torchhub"])
def test_a_dinov2_recipe_lists_the_published_neurons(name):
    table = RECIPES_DATA / f"{name}.tsv"
    if not table.is_file():
        pytest.skip("shared/recipes-data is absent")
    with table.open(encoding="utf-8") as file:
        published = {(int(row["block"]), int(row["index"])) for row in csv.DictReader(file, delimiter="\t")}
    listed = [(block, neuron) for block, neurons in find_recipe(name).register_neurons.items() for neuron in neurons]
    assert set(listed) == published
    assert len(listed) == len(published)


def test_bundled_recipes_are_in_alphabetical_order():
    assert list(bundled_recipes()) == sorted(bundled_recipes())


def test_a_recipe_file_is_found_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL, "utf-8")
    assert find_recipe(str(path)) == parse_recipe(MINIMAL, "mine.yaml")


def test_an_error_in_a_recipe_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL + "fil: zero", "utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml: unknown key 'fil'"):
        find_recipe(str(path))


def test_a_recipe_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"schema: \xff\xfe")
    with pytest.raises(RecipeError, match="not a UTF-8 text file"):
        find_recipe(str(path))


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'vit-tiny'"):
        find_recipe("vit-tny")


def test_a_wholly_unknown_name_gets_the_list():
    with pytest.raises(RecipeError) as caught:
        find_recipe("zzzzzzzz")
    assert all(name in str(caught.value) for name in bundled_recipes())


@pytest.mark.parametrize(
    "model, name",
    [
        ("demo", "demo"),
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit-tiny"),
        ("facebook/dinov2-large", "dinov2-large"),
    ],
)
def test_a_model_has_its_recipe_and_the_first_by_name_where_there_are_two(model, name):
    assert recipe_for_model(model) == (name, find_recipe(name))


@pytest.mark.parametrize("model", ["", "facebook/dinov2", "facebook/dinov2-large/"])
def test_another_model_has_none(model):
    assert recipe_for_model(model) is None


# --- hostile input --------------------------------------------------------------------------------------------------

HUGE = "0x" + "f" * 9000
LAUGHS = "".join(
    f"  {new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "provenance:\n  a: &a [x]\n" + LAUGHS,
        MINIMAL + "provenance: &a [*a]",
        "schema: 1\nregister_neurons: {7: &a [417], 8: *a}",
    ],
)
def test_aliases_are_refused(text):
    assert "aliases (*name) are not supported; write the value out" in refusal(text)


def test_a_value_that_occurs_twice_is_written_out_and_read_back():
    shared = [1, 2]
    recipe = Recipe(register_neurons={7: (417,)}, provenance={"a": shared, "b": shared, "c": {"d": shared}})
    assert parse_recipe(recipe.to_yaml(), "some.yaml") == recipe


@pytest.mark.parametrize(
    "text",
    [
        f"schema: {HUGE}\nregister_neurons: {{7: [417]}}",
        f"schema: 1\nregister_neurons: {{{HUGE}: [417]}}",
        f"schema: 1\nregister_neurons: {{7: [{HUGE}]}}",
        "schema: 1\nregister_neurons: {7: [2147483648]}",
        MINIMAL + f"num_registers: {HUGE}",
        MINIMAL + f"scale: {HUGE}",
        MINIMAL + f"mode: {HUGE}",
        MINIMAL + f"{HUGE}: 1",
        MINIMAL + "mode: '" + "x" * 50_000 + "'",
        MINIMAL + "x" * 50_000 + ": 1",
        MINIMAL + 'fill: "\\x1b[31m\\n"',
        MINIMAL + "provenance: !!python/object/apply:os.system [true]",
        MINIMAL + "provenance: !!set {? [a]}",
        MINIMAL + "provenance: !!timestamp x",
        MINIMAL + "provenance: 2001-99-99",
        "schema: 1\nregister_neurons: {2001-01-01 00:00:00: [1], 2001-01-01 00:00:00Z: [2]}",
        "schema: 1\nregister_neurons: {~: [1], a: [1]}",
        MINIMAL + "provenance: " + "[" * 5000,
        MINIMAL + "#" * (1 << 16),
    ],
)
def test_a_hostile_recipe_is_refused_in_one_short_printable_line(text):
    message = refusal(text)
    assert len(message) < 1000 and message.isprintable()


def test_a_recipe_as_large_as_allowed_is_read_soon():
    neurons = list(range(10_000))
    recipe = parse_recipe(f"schema: 1\nregister_neurons: {{7: {neurons}}}", "some.yaml")
    assert recipe.num_neurons == 10_000


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(RecipeError, match="no such recipe file"):
        find_recipe(name)


CHOSEN = {"register_neurons": {7: [417], 6: [189]}, "num_registers": 3, "fill": "zero", "num_patches": 196}


def found_by_find(chosen: object = CHOSEN, found_by: object = "regsurgery 0.3.0 find", **changes) -> Recipe:
    settings = {"register_neurons": {6: (189,), 7: (417,)}, "num_registers": 3, "num_patches": 196,
                "scale": (1.0,) * 3, **changes}  # fmt: skip
    return Recipe(**settings, provenance={"found_by": found_by, "chosen": chosen})


def test_a_recipe_as_find_wrote_it_has_no_changes():
    assert found_by_find().changes_since_found() == ()
    written = parse_recipe(found_by_find().to_yaml(), "some.yaml")
    assert written == found_by_find() and written.changes_since_found() == ()


def test_what_was_changed_by_hand_is_listed():
    assert found_by_find().with_num_registers(4).changes_since_found() == (
        "num_registers 3 -> 4",
        "num_patches 196 -> None",
    )
    other = found_by_find(register_neurons={7: (3, 417)}, fill="mean")
    assert other.changes_since_found() == ("register_neurons 6:189, 7:417 -> 7:3, 7:417", "fill zero -> mean")
    assert found_by_find(mode="bias").changes_since_found() == (), "the mode is the user's to choose"


@pytest.mark.parametrize(
    "provenance",
    [
        {"chosen": None},
        {"chosen": ["register_neurons"]},
        {"chosen": {}},
        {"chosen": {"register_neurons": [417], "num_registers": "3", "fill": None}},
        {"chosen": {**CHOSEN, "num_registers": 5}, "found_by": "somebody else"},
        {"chosen": {**CHOSEN, "num_registers": 5}, "found_by": None},
    ],
)
def test_a_provenance_that_is_not_finds_tells_nothing(provenance):
    assert found_by_find(**provenance).changes_since_found() == ()


def test_a_provenance_may_list_anything_as_neurons():
    chosen = {"register_neurons": {"a": [None, 3], 7: 417, None: []}}
    (change,) = found_by_find(chosen).changes_since_found()
    assert change == "register_neurons 7:417, a:3, a:None -> 6:189, 7:417"
