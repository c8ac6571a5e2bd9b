"""Recipes: strict, all problems at once, each with its place; overrides; the declarations feed help and checks."""

import pytest

from qlora.errors import RecipeError
from qlora.recipe import Recipe, build_recipe, load_recipe
from qlora.settings import describe_settings

GOOD = "model: builtin:tiny\ndata: rows.jsonl\n"


def write(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_sparse_recipe_is_all_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.model.base == "builtin:tiny" and recipe.lora.r == "auto" and recipe.hub is None
    assert recipe.name == "my" and recipe.is_given("model.base") and not recipe.is_given("lora.r")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "lora: {rank: 8}\n", "my.yaml:3: unknown setting lora.rank. Did you mean lora.r?"),
        (GOOD + "train:\n  learning_rte: 1\n", "my.yaml:4: unknown setting train.learning_rte. Did you mean train.learning_rate?"),
        (GOOD + "train:\n  r: 8\n", "my.yaml:4: unknown setting train.r. Did you mean lora.r?"),
        (GOOD + "lara: {r: 8}\n", "my.yaml:3: unknown section 'lara'. Did you mean lora?"),
        (GOOD + "lora: {r: big}\n", "my.yaml:3: lora.r is 'big'; it takes auto or a whole number from 1."),
        (GOOD + "train: {epochs: yes}\n", "my.yaml:3: train.epochs is True; it takes a number above 0."),
        (GOOD + "memory: {budget: 8}\n", 'memory.budget is 8; it takes auto or a size such as "8GB".'),
        (GOOD + "memory: {budget: 8 bananas}\n", 'it takes auto or a size such as "8GB".'),
        (GOOD + "train: {batch: 10, micro_batch: 4, accumulation: 4}\n", "4 x 4 = 16"),
        ("data: rows.jsonl\n", "model.base is missing"),
        (GOOD + "model: other\n", "my.yaml:3: model is written twice"),
        (GOOD + "lora: {r: 8\n", "not valid YAML"),
        (GOOD + "train: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "is empty"),
    ],
)
def test_mistakes_name_their_place_and_the_remedy(tmp_path, text, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert expected in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, "model: {bse: x}\ndata: {path: 3}\nlora: {r: 0, alpha: -1}\nhubb: x\n"))
    for key in ("model.bse", "model.base", "data.path", "lora.r", "lora.alpha", "hubb"):
        assert key in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"Did you mean .*my\.yaml"):
        load_recipe(tmp_path / "mi.yaml")


def test_overrides_win_and_are_given(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD + "lora: {r: 8}\n"), ["lora.r=32", "train.learning_rate=2e-4", "model=other"])
    assert (recipe.lora.r, recipe.train.learning_rate, recipe.model.base) == (32, 2e-4, "other")
    assert recipe.is_given("train.learning_rate")


@pytest.mark.parametrize("override", ["lora.r", "r=8", "=8", "lora.=8"])
def test_an_override_that_is_none_is_refused(tmp_path, override):
    with pytest.raises(RecipeError, match="not an override|unknown section"):
        load_recipe(write(tmp_path, GOOD), [override])


def test_a_bad_override_is_blamed_on_the_command_line(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD + "lora: {r: 8}\n"), ["lora.r=big"])
    assert "command line: lora.r is 'big'" in str(caught.value)


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert load_recipe(write(tmp_path, GOOD)).data.path == str(tmp_path / "rows.jsonl")


def test_hub_names_are_left_alone(tmp_path):
    recipe = load_recipe(write(tmp_path, "model: meta-llama/Llama-3.2-1B\ndata: openai/gsm8k\n"))
    assert (recipe.model.base, recipe.data.path) == ("meta-llama/Llama-3.2-1B", "openai/gsm8k")


def test_replace_keeps_what_was_given():
    recipe = build_recipe(model="builtin:tiny", data="rows.jsonl").replace({"lora.r": 8})
    assert recipe.lora.r == 8 and recipe.is_given("lora.r") and not recipe.is_given("train.seed")


def test_every_setting_says_what_it_does_and_takes():
    docs = describe_settings()
    assert 30 <= len(docs) <= 70
    assert all(doc.help.endswith(".") or doc.help.endswith(")") for doc in docs), [d.key for d in docs if not d.help.endswith(".")]
    assert all(doc.expects for doc in docs)
    assert {doc.key.split(".")[0] for doc in docs} == set(Recipe.model_fields)
