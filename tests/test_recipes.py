import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ldae_hf.configuration_ldae import SIZES, LDAEConfig
from ldae_hf.recipes import (
    Recipe,
    RecipeError,
    files,
    load_recipe,
    recipe_names,
    sweep_members,
    sweep_names,
    tier_names,
)
from ldae_hf.recipes.display import path_markdown, show_text, tree_text


# arXiv 2401.14404, Tables 1 to 3: the path, linear probe (Table 1: and FID) after each step.
PATH = {
    "dit_baseline": (57.5, 11.6),
    "remove_class_labels": (62.5, 30.9),
    "retrain_vqgan": (None, None),
    "remove_perceptual_loss": (58.4, 54.3),
    "remove_adversarial_loss": (59.0, 75.6),
    "replace_noise_schedule": (63.4, 93.2),
    "patch_vae": (64.9, None),
    "patch_ae": (64.7, None),
    "patch_pca": (63.4, None),
    "patch_pca_k_32": (65.1, None),
    "predict_clean_latent": (62.4, None),
    "remove_input_scaling": (63.6, None),
    "image_input": (63.6, None),
    "image_output": (63.9, None),
    "l_dae": (64.5, None),
}
# Table 2 and Figure 5 off the path; the in-text numbers on one noise level, augmentation, epochs and size; Table 4.
OFF_THE_PATH = {
    "conv_vae_k_8": 54.5,
    "conv_vae_k_32": 62.8,
    "conv_vae_k_64": 57.0,
    "conv_vae_k_128": 48.1,
    "patch_vae_k_8": 58.3,
    "patch_vae_k_32": 64.8,
    "patch_vae_k_64": 56.8,
    "patch_ae_k_8": 59.9,
    "patch_ae_k_32": 64.6,
    "patch_ae_k_64": 59.9,
    "patch_pca_k_8": 56.0,
    "patch_pca_k_64": 60.0,
    "patch_pca_k_128": 53.9,
    "patch_pca_k_256": 44.7,
    "pixels": 23.6,
    "pixels_size_128": 53.0,
    "pixels_size_64": 58.5,
    "pixels_size_32": 43.7,
    "single_level": 61.5,
    "random_crop": 65.0,
    "epochs_800": 67.5,
    "epochs_1600": 69.6,
    "size_b": 60.3,
    "size_l": 70.9,
    "size_b_epochs_1600": 66.6,
    "size_l_epochs_1600": 75.0,
}
SWEEPS = {
    "conv_vae_k": ["8", "32", "64", "128"],
    "patch_vae_k": ["8", "32", "64", "128"],
    "patch_ae_k": ["8", "32", "64", "128"],
    "patch_pca_k": ["8", "32", "64", "128", "256"],
    "pixels_size": ["128", "64", "32"],
    "l_dae_k": ["8", "16", "64", "128", "256", "768"],
    "epochs": ["800", "1600"],
    "size": ["b", "l"],
    "k_8_noise_of": ["32", "768"],
    "k_32_noise_of": ["8", "768"],
    "latent_scaling": ["whiten", "none"],
    "mae_size": ["b", "l"],
    "residual_weight": ["0", "0.01", "1"],
}
DENOISERS = [name for name in recipe_names() if not load_recipe(name).is_masked]  # l-DAE, its path, its controls
TIERED = [(name, tier) for name in DENOISERS for tier in (None, "desk", "desk_cpu", "cpu")]
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
    """A copy of the packaged family, into which a test may write before it reads; returns its folder."""
    folder = Path(shutil.copytree(files.FOLDER, tmp_path / "family"))
    monkeypatch.setattr(files, "FOLDER", folder)
    return folder


def child(change, parent="l_dae"):
    return f"parent: {parent}\nwhy: A test.\nchange: {change}\n"


# ---- the packaged family


def test_the_family_carries_the_papers_numbers():
    found = {name: load_recipe(name).paper for name in recipe_names()}
    numbers = {name: paper["linear_probe_top1"] for name, paper in found.items() if "linear_probe_top1" in paper}
    assert numbers == {name: probe for name, (probe, _) in PATH.items() if probe} | OFF_THE_PATH
    assert {name: paper["fid"] for name, paper in found.items() if "fid" in paper} == {
        name: fid for name, (_, fid) in PATH.items() if fid
    }


def test_the_path_leads_from_dit_to_the_final_method():
    assert load_recipe("l_dae").steps == list(PATH)


def test_the_family_has_one_root_and_every_name_once():
    assert [name for name in recipe_names() if load_recipe(name).parent is None] == ["dit_baseline"]
    stems = [file.stem for file in files.FOLDER.rglob("*.yaml")]
    members = [member for sweep in sweep_names() for member in sweep_members(sweep)]
    assert sorted([*stems, *members]) == sorted([*recipe_names(), *sweep_names(), *tier_names()])
    assert len(set(stems + members)) == len(stems + members)


def test_a_recipe_without_a_number_of_the_paper_is_a_control_or_says_where_the_paper_speaks_of_it():
    ours = {"retrain_vqgan", "flip", "noise_matched_768", "random_projection", "snr_matched"}
    ours |= {
        "mae_random_crop",
        "mae_epochs_1600",
        "ddpm_schedule",
        "token_noise_levels",
        "block_noise_levels",
        "interpolative_noise",
        "deep_narrow_decoder",
        "global_tokens",
        "k_768_noise_of_8",
        "random_projection_noise_of_32",
    }
    ours |= {"perceptual_labels", "perceptual_random_labels", "mae", "mae_equal_flops"}
    sweeps = ("l_dae_k", "latent_scaling", "residual_weight", "k_8_noise_of", "k_32_noise_of", "mae_size")
    ours |= {name for sweep in sweeps for name in sweep_members(sweep)}
    assert {name for name in recipe_names() if not load_recipe(name).paper} == ours


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "dit_baseline"])
def test_a_step_changes_exactly_what_its_file_says(name):
    recipe = load_recipe(name)
    before, after = values(load_recipe(recipe.parent)), values(recipe)
    change = files.read(name, "recipe")["change"]
    assert {key for key in after if after[key] != before[key]} == set(change)
    assert {key: after[key] for key in change} == change
    assert list(before) == list(after)
    sections = {key.partition(".")[0] for key in change}
    together = {"model.tokenizer": {"model", "tokenizer"}, "model.mask_ratio": {"model", "train"}}
    assert len(sections) == 1 or sections in [together[key] for key in together if key in change]


@pytest.mark.parametrize(("name", "tier"), TIERED)
def test_a_recipe_makes_a_model_of_its_size_at_every_tier(name, tier):
    recipe = load_recipe(name, tier)
    config = recipe.model_config()
    assert {key: getattr(config, key) for key in SIZES[recipe.model["size"]]} == SIZES[recipe.model["size"]]
    assert (config.image_size, config.latent_dim) == (recipe.model["image_size"], recipe.model["latent_dim"])
    assert recipe.tier == tier


def test_a_masked_autoencoder_has_no_configuration_of_an_l_dae():
    with pytest.raises(RecipeError, match="mae is a masked autoencoder"):
        load_recipe("mae").model_config()


def test_the_final_method_is_the_default_configuration():
    assert load_recipe("l_dae").model_config() == LDAEConfig()


@pytest.mark.parametrize(
    ("tier", "size", "patch", "latent_dim", "epochs", "rate"),
    [
        (None, 256, 16, 32, 400, 1e-4),
        ("desk", 128, 16, 32, 400, 5e-4),
        ("cpu", 32, 8, 16, 4, 4e-3),
        ("cifar10", 32, 4, 7, 8, 3e-3),
        ("quickstart", 32, 8, 16, 24, 6e-3),
    ],
)
def test_the_final_method_has_the_values_that_its_published_runs_had(tier, size, patch, latent_dim, epochs, rate):
    recipe = load_recipe("l_dae", tier)
    model, train = recipe.model, recipe.train
    assert (model["image_size"], model["patch_size"], model["latent_dim"]) == (size, patch, latent_dim)
    assert (train["epochs"], train["base_learning_rate"]) == (epochs, rate)


@pytest.mark.parametrize(("tier", "places"), [(None, 256), ("desk", 64), ("desk_cpu", 64), ("cpu", 16)])
def test_every_recipe_has_the_same_number_of_tokens(tier, places):
    assert {load_recipe(name, tier).model_config().num_patches for name in DENOISERS} == {places}


@pytest.mark.parametrize("tier", [None, "desk", "desk_cpu", "cpu"])
def test_only_the_baseline_knows_classes_and_only_it_downloads_weights(tier):
    recipes = [load_recipe(name, tier) for name in recipe_names()]
    assert [recipe.name for recipe in recipes if recipe.model["num_classes"]] == ["dit_baseline"]
    downloads = {recipe.name for recipe in recipes if recipe.tokenizer["pretrained"]}
    assert downloads == (set() if tier else {"dit_baseline", "remove_class_labels"})
    features = {recipe.tokenizer["perceptual_loss"] for recipe in recipes}
    assert ("lpips" in features) == (tier is None)


def test_the_noise_matched_control_scales_the_noise_by_the_measured_ratio_of_latent_variances():
    ratios = {
        tier: load_recipe("noise_matched_768", tier).model["sigma_max"] / 2**0.5 for tier in (None, "desk", "cpu")
    }
    assert ratios == pytest.approx({None: 4.80, "desk": 4.80, "cpu": 3.3635}, abs=1e-3)


@pytest.mark.parametrize("tier", [None, "desk", "desk_cpu", "cpu"])
def test_the_noise_grid_has_one_noise_level_for_each_dimension_whose_noise_is_taken(tier):
    names = {(8, 8): "l_dae_k_8", (8, 32): "k_8_noise_of_32", (8, 768): "k_8_noise_of_768"}
    names |= {(32, 8): "k_32_noise_of_8", (32, 32): "l_dae", (32, 768): "k_32_noise_of_768"}
    names |= {(768, 8): "k_768_noise_of_8", (768, 32): "noise_matched_768", (768, 768): "l_dae_k_768"}
    found = {cell: load_recipe(name, tier).model for cell, name in names.items()}
    # In a column each K has its own latent scale, so that sigma_max over its K's own is one ratio for all columns.
    spread = {k: found[k, 32]["sigma_max"] / found[32, 32]["sigma_max"] for k in (8, 32, 768)}
    assert spread[8] < 1 < spread[768]
    for (own, taken), model in found.items():
        assert model["sigma_max"] == pytest.approx(2**0.5 * spread[own] / spread[taken], rel=1e-3)
        assert model["latent_dim"] == found[own, own]["latent_dim"]
    random = load_recipe("random_projection_noise_of_32", tier).model
    assert (random["tokenizer"], random["latent_dim"]) == ("random_projection", found[32, 32]["latent_dim"])
    assert random["sigma_max"] == found[768, 32]["sigma_max"]


def test_a_tier_refuses_a_noise_level_that_was_not_measured_on_its_patches():
    for tier in ("cifar10", "quickstart"):
        with pytest.raises(RecipeError, match="model.sigma_max has no translation for 2.748"):
            load_recipe("k_32_noise_of_8", tier)


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
    assert recipe.steps == [*PATH, "random_crop", "epochs_1600", "size_l_epochs_1600"]
    root = values(load_recipe("dit_baseline"))
    assert {key for key, value in values(recipe).items() if value != root[key]} == set(recipe.origins)
    before = load_recipe("l_dae").origins
    assert {key: origin for key, origin in recipe.origins.items() if before.get(key) != origin} == {
        "data.crop": "random_crop",
        "train.epochs": "epochs_1600",
        "model.size": "size_l_epochs_1600",
        "data.flip": "override",
    }
    assert before["model.noise_schedule"] == "remove_input_scaling"
    assert before["model.tokenizer"] == "patch_pca"


# ---- sweeps


def test_a_sweep_is_a_file_of_recipes_named_after_it():
    assert {sweep: sweep_members(sweep) for sweep in sweep_names()} == {
        sweep: [f"{sweep}_{label}" for label in labels] for sweep, labels in SWEEPS.items()
    }
    assert {member for sweep in sweep_names() for member in sweep_members(sweep)} <= set(recipe_names())


def test_a_member_has_its_sweeps_parent_and_reason_and_the_paper_keys_of_both():
    member = load_recipe("epochs_1600")
    assert (member.name, member.parent, member.train["epochs"]) == ("epochs_1600", "random_crop", 1600)
    assert member.paper == {"text": "training epochs", "linear_probe_top1": 69.6}
    assert member.why == files.read_sweep("epochs")["why"]


def test_a_member_can_be_a_parent(own):
    assert load_recipe("size_l_epochs_1600").parent == "epochs_1600"
    assert load_recipe(own(child("{model.latent_scaling: none}", parent="l_dae_k_8"))).model["latent_dim"] == 8


@pytest.mark.parametrize("asked", ["recipe", "parent"])
def test_a_sweep_is_no_recipe_and_the_error_names_its_members(own, asked):
    name = "size" if asked == "recipe" else own(child("{data.flip: true}", parent="size"))
    with pytest.raises(RecipeError, match=f"{asked} 'size' is a sweep; choose one of its members, size_b, size_l\\."):
        load_recipe(name)


def test_an_unknown_sweep_suggests_the_likely_one():
    with pytest.raises(RecipeError, match="sweep 'epoch' is unknown; did you mean 'epochs'?"):
        sweep_members("epoch")


def test_a_sweep_of_ones_own_is_refused(own):
    text = "parent: l_dae\nwhy: A test.\nsweep: {3: {change: {train.epochs: 3}}}\n"
    with pytest.raises(RecipeError, match="mine.yaml: a sweep's members could not be named; write one file"):
        load_recipe(own(text))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("{A: {change: {data.flip: true}}}", "sweep.A must be a plain word or number"),
        ("{a_b: {change: {data.flip: true}}}", "sweep.a_b must be a plain word or number"),
        ("{yes: {change: {data.flip: true}}}", "sweep.True must be a plain word or number"),
        ("{a: 3}", "sweep.a must be a mapping with change and paper, not 3"),
        ("{a: {}}", "sweep.a: change missing"),
        ("{a: {changes: {data.flip: true}}}", "sweep.a: key 'changes' is unknown; did you mean 'change'?"),
        ("{a: {change: {data.flip: true}, parent: size_b}}", "sweep.a: key 'parent' is unknown"),
        ("{a: {change: {data.flip: true}, paper: {tabel: 3}}}", "sweep.a: paper.tabel is unknown"),
        ("{1: {change: {data.flip: true}}, '1': {change: {data.flip: true}}}", "'1' is written twice"),
        ("{}", "sweep must be a mapping, not {}"),
        ("{a: {change: {data.flip: true}}}\nchange: {data.flip: true}", "key 'change' is unknown"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line_that_names_it(family, sweep, message):
    (family / "curve.yaml").write_text(f"parent: l_dae\nwhy: A test.\nsweep: {sweep}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("l_dae")
    assert "curve.yaml" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["curve_a", "curve", "size_b"])
def test_no_two_packaged_files_may_mean_one_name(family, name):
    (family / "curve.yaml").write_text("parent: l_dae\nwhy: A test.\nsweep: {a: {change: {data.flip: true}}}\n")
    (family / "later").mkdir()
    (family / "later" / f"{name}.yaml").write_text(child("{data.flip: true}"))
    with pytest.raises(RecipeError, match=f"the name '{name}' is taken by"):
        load_recipe("l_dae")


# ---- one's own files


def test_a_file_of_ones_own_continues_a_packaged_recipe(own):
    recipe = load_recipe(own(child("{model.latent_dim: 16}", parent="size_b")))
    assert (recipe.name, recipe.parent, recipe.model["latent_dim"]) == ("mine", "size_b", 16)
    assert recipe.model["size"] == "b"


def test_a_step_to_another_tokenizer_may_say_how_it_is_trained(own):
    change = "{model.tokenizer: conv_vae, tokenizer.kl_weight: 0, tokenizer.base_width: 64}"
    recipe = load_recipe(own(child(change, parent="patch_ae")))
    assert (recipe.model["tokenizer"], recipe.tokenizer["kl_weight"]) == ("conv_vae", 0.0)
    recipe.model_config()


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
        (child("{model.latent_dim: 8, tokenizer.epochs: 3}"), "touches model and tokenizer; a step changes one"),
        (child("{model.tokenizer: pixels, data.flip: true}"), "touches data and model; a step changes one section"),
        (
            child("{model.tokenizer: patch_ae, tokenizer.epochs: 3, data.flip: true}"),
            "touches data and model and tokenizer; a step changes one section",
        ),
        (child("{model.num_classes: many}"), "model.num_classes must be int or null"),
        (child("{tokenizer.pretrained: ''}"), "tokenizer.pretrained must be null (trained here), or a folder or"),
        (child("{tokenizer.pretrained: 3}"), "tokenizer.pretrained must be str or null"),
        (child("{tokenizer.stride: 1}"), "tokenizer.stride must be a power of two, 2 or more; it is 1"),
        (child("{tokenizer.stride: 6}"), "tokenizer.stride must be a power of two, 2 or more; it is 6"),
        (child("{tokenizer.base_width: 0}"), "tokenizer.base_width must be a power of two; it is 0"),
        (child("{tokenizer.base_width: 100}"), "tokenizer.base_width must be a power of two; it is 100"),
        (child("{tokenizer.residual_blocks: 0}"), "tokenizer.residual_blocks must be at least 1; it is 0"),
        (child("{tokenizer.reconstruction_loss: l2}"), "tokenizer.reconstruction_loss must be l1 or squared"),
        (child("{tokenizer.kl_weight: -1}"), "tokenizer.kl_weight must be 0 or more; it is -1.0"),
        (child("{tokenizer.perceptual_loss: vgg}"), "tokenizer.perceptual_loss must be lpips, labels, random_labels"),
        (child("{tokenizer.adversarial_weight: -0.5}"), "tokenizer.adversarial_weight must be 0 (no discriminator)"),
        (child("{tokenizer.adversarial_start_epochs: -1}"), "tokenizer.adversarial_start_epochs must be 0 or more"),
        (child("{tokenizer.epochs: 0}"), "tokenizer.epochs must be at least 1; it is 0"),
        (child("{tokenizer.global_batch_size: 0}"), "tokenizer.global_batch_size must be at least 1; it is 0"),
        (child("{tokenizer.learning_rate: 0}"), "tokenizer.learning_rate must be above 0; it is 0.0"),
        (child("{tokenizer.betas: [0.5, 1.0]}"), "tokenizer.betas must be two numbers, each 0 or more and below 1"),
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


@pytest.mark.parametrize("name", ["l_dae", "size_b", "size"])
def test_a_file_may_not_take_a_packaged_name(own, name):
    with pytest.raises(RecipeError, match=f"a packaged recipe is called '{name}'; give your file another name"):
        load_recipe(own(child("{train.epochs: 300}"), name=f"{name}.yaml"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent.yaml", "No such file"), ("a\0.yaml", "null byte"), ("l" * 9999 + ".yaml", "too long")],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, reason):
    with pytest.raises(RecipeError, match=f"{name[:9]}.* cannot be read: .*{reason}"):
        load_recipe(name)


@pytest.mark.parametrize(
    "name", ["", "desk", "toward_dae/l_dae", "../recipes/toward_dae/l_dae", "/etc/passwd", "l_dae\0"]
)
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


@pytest.mark.parametrize("name", ["dit_baseline", "patch_pca"])
def test_a_tier_that_is_made_for_the_final_method_refuses_the_rest(name):
    with pytest.raises(RecipeError, match="cifar10.yaml: model.latent_dim has no translation for 16"):
        load_recipe(name, "cifar10")


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


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "retrain_vqgan",
            ["tokenizer.perceptual_loss=null", "tokenizer.adversarial_weight=0"],
            "is 'conv_vae'; call it",
        ),
        (
            "conv_vae_k_8",
            ["tokenizer.perceptual_loss=labels"],
            "'conv_vae' has no use for tokenizer.perceptual_loss, only",
        ),
        (
            "conv_vae_k_8",
            ["tokenizer.adversarial_weight=0.5"],
            "no use for tokenizer.adversarial_weight, only 'vqgan' has",
        ),
        ("l_dae", ["tokenizer.pretrained=some/where"], "'patch_pca' has no use for tokenizer.pretrained, only"),
        ("dit_baseline", ["model.tokenizer=patch_pca"], "use for tokenizer.pretrained, tokenizer.perceptual_loss, to"),
        ("dit_baseline", ["tokenizer.stride=32"], "model.patch_size 16 is not a multiple of tokenizer.stride 32"),
        ("dit_baseline", ["model.latent_dim=18"], "model.latent_dim 18 is not a multiple of the 4 latent places"),
        ("remove_adversarial_loss", ["tokenizer.stride=2"], "model.latent_dim 16 is not a multiple of the 64 latent"),
    ],
)
def test_a_tokenizer_section_for_another_tokenizer_is_refused_in_one_line(name, overrides, message):
    recipe = load_recipe(name, overrides=overrides)
    with pytest.raises(RecipeError) as caught:
        recipe.model_config()
    assert str(caught.value).startswith(name) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["tokenizer.perceptual_loss=null", "tokenizer.adversarial_weight=0"],
        ["tokenizer.pretrained=null", "tokenizer.perceptual_loss=null"],
        ["tokenizer.pretrained=null", "tokenizer.adversarial_weight=0"],
    ],
)
def test_a_vqgan_needs_one_of_pretrained_weights_perceptual_and_adversarial_loss(overrides):
    assert load_recipe("dit_baseline", overrides=overrides).model_config().tokenizer == "vqgan"


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


def test_a_recipe_saved_before_there_were_learned_tokenizers_still_makes_its_model(tmp_path):
    recipe = load_recipe("l_dae", "cifar10")
    new = {"num_classes", "class_dropout_prob", "sigma_max", "loss_weighting"}
    model = {key: value for key, value in recipe.model.items() if key not in new}
    replace(recipe, model=model, tokenizer={"fit_patches": 200000}).save(tmp_path)
    old = Recipe.load(tmp_path)
    assert set(old.tokenizer) == {"fit_patches"} and old.model_config() == recipe.model_config()


def test_the_recipe_of_the_published_encoder_still_makes_its_model():
    folder = Path(__file__).parents[1] / "model_cards" / "ldae-cifar10"
    assert Recipe.load(folder).model_config() == load_recipe("l_dae", "cifar10").model_config()


# ---- as text


@pytest.mark.parametrize(("name", "tier"), TIERED)
def test_a_shown_recipe_is_yaml_that_reads_back_as_its_values(name, tier):
    recipe = load_recipe(name, tier, ["train.max_grad_norm=1"])
    assert yaml.safe_load(show_text(recipe)) == {section: getattr(recipe, section) for section in files.SECTIONS}


def cells(text, name):
    """What stands beside a name in the tree, the name first."""
    lines = [line.lstrip(" │├└─") for line in text.splitlines()]
    (line,) = [line for line in lines if line.split(" ")[0] == name]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_tree_has_one_line_for_every_recipe_and_sweep_and_is_not_wide():
    text = tree_text()
    for name in recipe_names():
        assert str(load_recipe(name).paper.get("linear_probe_top1", "")) in " ".join(cells(text, name))
    for name in sweep_names():
        assert cells(text, name)[1].startswith(files.read_sweep(name)["why"][:20])
    assert max(map(len, text.splitlines())) <= 140


def test_the_tree_has_the_path_at_its_left_edge_and_a_sweep_above_its_members():
    lines = tree_text().splitlines()
    lines = lines[1 : lines.index("")]
    assert [line.split(" ")[0] for line in lines if line[0] not in " │├└"] == list(PATH)
    names = [line.lstrip(" │├└─").split(" ")[0] for line in lines]
    for sweep in sweep_names():
        members = [name for name in sweep_members(sweep) if name not in PATH]
        places = [names.index(name) for name in (sweep, *members)]
        assert places == sorted(places)


def test_the_trees_changes_are_what_the_files_say():
    assert cells(tree_text(), "remove_class_labels") == [
        "remove_class_labels",
        "62.5",
        "30.9",
        "model.num_classes: 1000 → null",
    ]
    assert cells(tree_text(), "size_b_epochs_1600")[1] == "66.6 *"


def test_results_stand_beside_the_papers_a_tier_below_the_other():
    text = tree_text({"l_dae": ["cpu 42.0 ±2.5 (3)", "desk 60.0 (1)"], "flip": ["cpu 1.0 (1)"]}, "my.jsonl")
    assert "cpu 42.0 ±2.5 (3)" in cells(text, "l_dae") and "cpu 1.0 (1)" in cells(text, "flip")
    lines = text.splitlines()
    below = 1 + next(number for number, line in enumerate(lines) if line.startswith("l_dae "))
    assert lines[below].split() == ["│", "desk", "60.0", "(1)"]
    assert "ours: my.jsonl; linear probe on the images of the tier, mean ± half its 95 % interval (seeds)" in lines


def test_the_path_as_markdown_has_a_row_per_step():
    head, rule, *rows = path_markdown({"l_dae": ["cpu 41.0 (1)", "full size 42.0 (1)"]}).splitlines()
    assert (head, rule) == ("| step | changes | paper top-1 | ours |", "|---|---|---|---|")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in rows] == [f"`{name}`" for name in PATH]
    assert [row[2] for row in rows] == [str(probe or "") for probe, _ in PATH.values()]
    assert rows[1][1] == "`model.num_classes: 1000 → null`"
    assert [row[3] for row in rows if row[3]] == ["cpu 41.0 (1), full size 42.0 (1)"]
