import json
import shutil
from pathlib import Path

import pytest
import yaml

from ldae_hf.configuration_ldae import SIZES, LDAEConfig
from ldae_hf.recipes import Recipe, RecipeError, files, load_recipe, recipe_names, tier_names
from ldae_hf.recipes.display import show_text


# arXiv 2401.14404: Table 3, the in-text tables on augmentation, epochs and model size, and Table 4.
PAPER_PROBES = {
    "l_dae": 64.5,
    "random_crop": 65.0,
    "epochs_800": 67.5,
    "epochs_1600": 69.6,
    "size_b": 60.3,
    "size_l": 70.9,
    "size_b_epochs_1600": 66.6,
    "size_l_epochs_1600": 75.0,
}
TIERED = [(name, tier) for name in recipe_names() for tier in (None, "desk", "cpu")]
TIERED += [("l_dae", "cifar10"), ("l_dae", "quickstart")]


def values(recipe):
    return {f"{s}.{key}": value for s in files.SECTIONS for key, value in getattr(recipe, s).items()}


@pytest.fixture
def own(tmp_path):
    """Writes the user's own YAML file and returns its path."""

    def write(text, name="mine.yaml"):
        file = tmp_path / name
        file.write_text(text) if isinstance(text, str) else file.write_bytes(text)
        return str(file)

    return write


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A copy of the packaged family, into which a test may write; returns its folder."""
    folder = Path(shutil.copytree(files.FOLDER, tmp_path / "family"))
    monkeypatch.setattr(files, "FOLDER", folder)
    return folder


def child(change, parent="l_dae"):
    return f"parent: {parent}\nwhy: A test.\nchange: {change}\n"


# ---- the packaged family


def test_the_family_carries_the_papers_linear_probes():
    assert {name: load_recipe(name).paper["linear_probe_top1"] for name in recipe_names()} == PAPER_PROBES


def test_the_family_has_one_root_and_every_file_its_own_name():
    assert [name for name in recipe_names() if load_recipe(name).parent is None] == ["l_dae"]
    stems = [file.stem for file in files.FOLDER.rglob("*.yaml")]
    assert sorted(stems) == sorted({*recipe_names(), *tier_names()})


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "l_dae"])
def test_a_step_changes_exactly_what_its_file_says(name):
    recipe = load_recipe(name)
    before, after = values(load_recipe(recipe.parent)), values(recipe)
    change = files.read(name, "recipe")["change"]
    assert {key for key in after if after[key] != before[key]} == set(change)
    assert {key: after[key] for key in change} == change
    assert list(before) == list(after)


@pytest.mark.parametrize(("name", "tier"), TIERED)
def test_a_recipe_makes_a_model_of_its_size_at_every_tier(name, tier):
    recipe = load_recipe(name, tier)
    config = recipe.model_config()
    assert {key: getattr(config, key) for key in SIZES[recipe.model["size"]]} == SIZES[recipe.model["size"]]
    assert (config.image_size, config.latent_dim) == (recipe.model["image_size"], recipe.model["latent_dim"])
    assert recipe.tier == tier


def test_the_root_is_the_default_configuration():
    assert load_recipe("l_dae").model_config() == LDAEConfig()


@pytest.mark.parametrize("tier", [None, *tier_names()])
def test_warm_up_is_a_quarter_of_the_run_at_every_tier(tier):
    train = load_recipe("l_dae", tier).train
    assert train["warmup_epochs"] == train["epochs"] / 4


def test_sizes_keep_their_order_when_they_are_shrunk():
    for tier in (None, "desk", "cpu"):
        base, half, large = (
            SIZES[load_recipe(name, tier).model["size"]] for name in ("size_b", "random_crop", "size_l")
        )
        assert base["hidden_size"] < half["hidden_size"] == large["hidden_size"]
        assert base["num_hidden_layers"] == half["num_hidden_layers"] == large["num_hidden_layers"] / 2


def test_origins_say_who_set_what_the_root_does_not():
    recipe = load_recipe("size_l_epochs_1600", overrides=["data.flip=true"])
    assert recipe.steps == ["l_dae", "random_crop", "epochs_1600", "size_l_epochs_1600"]
    assert recipe.origins == {
        "data.crop": "random_crop",
        "train.epochs": "epochs_1600",
        "model.size": "size_l_epochs_1600",
        "data.flip": "override",
    }
    root = values(load_recipe("l_dae"))
    assert {key for key, value in values(recipe).items() if value != root[key]} == set(recipe.origins)


# ---- one's own files


def test_a_file_of_ones_own_continues_a_packaged_recipe(own):
    recipe = load_recipe(own(child("{model.latent_dim: 16}", parent="size_b")))
    assert (recipe.name, recipe.parent, recipe.model["latent_dim"]) == ("mine", "size_b", 16)
    assert recipe.model["size"] == "b"


def test_yaml_numbers_are_read_as_people_write_them(own):
    train = load_recipe(own(child("{train.base_learning_rate: 3e-4, train.max_grad_norm: 1}"))).train
    assert (train["base_learning_rate"], train["max_grad_norm"]) == (3e-4, 1.0)
    assert isinstance(train["max_grad_norm"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (child("{train.epoch: 3}"), "'train.epoch' is unknown; did you mean 'train.epochs'?"),
        (child("{optimizer.lr: 3}"), "'optimizer.lr' is unknown"),
        (child("{1: 3}"), "key 1 is unknown"),
        (child("{train.epochs: 400}"), "train.epochs is already 400 in parent l_dae"),
        (child("{train.epochs: 3, data.flip: true}"), "touches data and train; a step changes one section"),
        (child("{train.epochs: many}"), "train.epochs must be int, like 400; it is 'many'"),
        (child("{train.epochs: true}"), "train.epochs must be int, like 400; it is True"),
        (child("{train.epochs: 2.5}"), "train.epochs must be int, like 400; it is 2.5"),
        (child("{train.epochs: null}"), "train.epochs must be int, like 400; it is None"),
        (child("{train.epochs: 0}"), "train.epochs must be at least 1; it is 0"),
        (child("{train.epochs: 50}"), "train.warmup_epochs=100 is longer than train.epochs=50"),
        (child("{train.base_learning_rate: .nan}"), "train.base_learning_rate must be float"),
        (child("{train.base_learning_rate: -1.0}"), "train.base_learning_rate must be above 0"),
        (child("{train.max_grad_norm: big}"), "train.max_grad_norm must be float or null"),
        (child("{train.betas: 0.9}"), "train.betas must be a list of 2, like [0.9, 0.999]; it is 0.9"),
        (child("{train.betas: [0.9, 1.5]}"), "train.betas must be two numbers, each 0 or more and below 1"),
        (child("{data.crop: center}"), "data.crop must be centre or random_resized; it is 'center'"),
        (child("{data.crop_scale: [1.0, 0.2]}"), "data.crop_scale must be two shares"),
        (child("{data.flip: {false: true}}"), "data.flip must be bool"),
        (child("{train.epochs: 3}", parent="l_dea"), "parent 'l_dea' is unknown; did you mean 'l_dae'?"),
        (child("{train.epochs: 3}", parent="../mine.yaml"), "parent '../mine.yaml' is unknown"),
        (child("{}"), "change must be a mapping, not {}"),
        (child("[train.epochs]"), "change must be a mapping"),
        ("why: No parent.\nchange: {train.epochs: 3}\n", "parent missing"),
        (child("{train.epochs: 3}") + "papper: {table: 3}\n", "'papper' is unknown; did you mean 'paper'?"),
        (child("{train.epochs: 3}") + "paper: {tabel: 3}\n", "paper.tabel is unknown; did you mean 'table'?"),
        (child("{train.epochs: 3}") + "paper: {table: [3]}\n", "paper.table must be a number or a text"),
        (child("{train.epochs: 3}") + "change: {data.flip: true}\n", "'change' is written twice"),
        (child("{train.epochs: 3, train.epochs: 4}"), "'train.epochs' is written twice"),
        (child("{train.epochs: &n 3, train.global_batch_size: *n}"), "aliases are not allowed"),
        (child("!!python/object/apply:os.getcwd []"), "could not determine a constructor"),
        (child("{train.epochs: 3"), "not the YAML of a recipe"),
        (child("[" * 5000), "not the YAML of a recipe"),
        ("", "a recipe is a mapping"),
        (b"\xff\xfe\x00\xd8", "not the YAML of a recipe"),
        (b"#" * 70_000, "70000 bytes are too many"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(own, text, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(own(text))
    assert message in str(caught.value)
    assert "mine" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_may_not_take_a_packaged_name(own):
    with pytest.raises(RecipeError, match="give your file another name"):
        load_recipe(own(child("{train.epochs: 300}"), name="size_b.yaml"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent.yaml", "No such file"), ("a\0.yaml", "null byte"), ("l" * 9999 + ".yaml", "too long")],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, reason):
    with pytest.raises(RecipeError, match=f"{name[:9]}.* cannot be read: .*{reason}"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["", "desk", "scaling/size_b", "../recipes/l_dae", "/etc/passwd", "l_dae\0"])
def test_a_name_is_never_a_way_into_the_file_system(name):
    with pytest.raises(RecipeError, match="is unknown"):
        load_recipe(name)


def test_recipes_that_are_each_others_parents_are_a_circle(family):
    (family / "one.yaml").write_text(child("{data.flip: true}", parent="two"))
    (family / "two.yaml").write_text(child("{data.flip: true}", parent="one"))
    with pytest.raises(RecipeError, match="two.yaml: parent one closes a circle"):
        load_recipe("one")


def test_a_step_may_undo_an_earlier_one(family):
    (family / "back.yaml").write_text(child("{data.crop: centre}", parent="random_crop"))
    assert values(load_recipe("back")) == values(load_recipe("l_dae"))


# ---- tiers


def tier(change):
    return f"why: A test.\nchange: {change}\n"


def test_a_tier_translates_the_recipes_own_value():
    epochs = {name: load_recipe(name, "cpu").train["epochs"] for name in ("l_dae", "epochs_800", "epochs_1600")}
    assert epochs == {"l_dae": 4, "epochs_800": 8, "epochs_1600": 16}
    assert load_recipe("l_dae", "desk").model["latent_dim"] == load_recipe("l_dae").model["latent_dim"] == 32


def test_a_value_without_translation_is_an_error_that_names_it():
    with pytest.raises(RecipeError, match="quickstart.yaml: model.size has no translation for 'b'"):
        load_recipe("size_b", "quickstart")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tier("{train.epochs: 3}"), "train.epochs would hide the change made by epochs_800; map the values"),
        (tier("{train.epochs: {800: much}}"), "train.epochs must be int"),
        (tier("{train.epoch: 3}"), "'train.epoch' is unknown; did you mean 'train.epochs'?"),
        ("parent: desk\n" + tier("{model.patch_size: 8}"), "key 'parent' is unknown"),
        ("why: Nothing.\n", "change missing"),
    ],
)
def test_a_wrong_tier_is_refused_in_one_line_that_names_it(own, text, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("epochs_800", own(text))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_a_tier_of_ones_own_is_named_in_the_recipe(own):
    recipe = load_recipe("epochs_800", own(tier("{train.epochs: {800: 120}, model.patch_size: 8}")))
    assert (recipe.tier, recipe.train["epochs"], recipe.model["patch_size"]) == ("mine", 120, 8)
    assert recipe.title == "epochs_800 (tier mine)"


def test_an_unknown_tier_suggests_the_likely_one():
    with pytest.raises(RecipeError, match="tier 'dask' is unknown; did you mean 'desk'?"):
        load_recipe("l_dae", "dask")


# ---- overrides


def test_overrides_come_last_and_are_read_as_the_type_they_replace():
    overrides = [
        "train.epochs=20",
        "train.warmup_epochs=2",
        "train.base_learning_rate=2e-3",
        "train.max_grad_norm=1",
        "data.flip=true",
        "data.crop_scale=[0.5, 1]",
        "data.dataset=2024",
        "model.conditioning_hidden_size=null",
    ]
    recipe = load_recipe("l_dae", "cpu", overrides)
    changed = {text.partition("=")[0]: values(recipe)[text.partition("=")[0]] for text in overrides}
    assert list(changed.values()) == [20, 2.0, 2e-3, 1.0, True, [0.5, 1.0], "2024", None]
    assert type(changed["train.warmup_epochs"]) is float
    assert recipe.overrides == overrides
    assert all(recipe.origins[key] == "override" for key in changed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "write it as section.key=value"),
        ("epochs=3", "key 'epochs' is unknown; did you mean 'train.epochs'?"),
        ("train.epochs=x", "train.epochs must be int"),
        ("train.epochs=", "train.epochs must be int"),
        ("train.epochs=[", "not the YAML of a recipe"),
        ("train.warmup_epochs=999", "train.warmup_epochs=999 is longer than train.epochs=400"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("l_dae", overrides=[override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.size=half-l", "model.size 'half-l' is unknown; did you mean 'half_l'?"),
        ("model.latent_dim=1000", "exceeds the 768 values"),
        ("model.noise_schedule=cosine", "'cosine' is not one of"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line_when_it_is_configured(override, message):
    recipe = load_recipe("l_dae", overrides=[override])
    with pytest.raises(RecipeError) as caught:
        recipe.model_config()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- saved recipes


def test_a_saved_recipe_loads_as_the_same_recipe(tmp_path):
    recipe = load_recipe("size_b", "desk", ["train.epochs=120"])
    assert recipe.save(tmp_path) == tmp_path / "recipe.json"
    assert Recipe.load(tmp_path) == recipe
    assert json.loads(recipe.to_json()) == recipe.to_dict()


def test_a_recipe_handed_out_as_a_dict_is_a_copy():
    recipe = load_recipe("l_dae")
    recipe.to_dict()["train"]["betas"][0] = 0.0
    assert recipe.train["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"name": "l_dae"}'])
def test_a_broken_saved_recipe_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(RecipeError, match="recipe.json"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(("name", "tier"), TIERED)
def test_a_shown_recipe_is_yaml_that_reads_back_as_its_values(name, tier):
    recipe = load_recipe(name, tier, ["train.max_grad_norm=1"])
    assert yaml.safe_load(show_text(recipe)) == {section: getattr(recipe, section) for section in files.SECTIONS}
