"""Every table and figure of the paper that is run here, and what goes beyond it.

No number of the paper is written here that a recipe or a sweep already holds.
"""

from collections.abc import Callable
from dataclasses import replace

from ..evaluation.sweeps import PAPER_BLOCKS, PAPER_DEPTH, PAPER_LEVELS, PAPER_TIMESTEPS, depth_range, timestep_range
from ..recipes import load_recipe, sweep_members
from ..recipes.display import END_OF_PATH
from .experiments import Experiment, Row


def experiment(name: str, tier: str | None = None) -> Experiment:
    """The experiment of this name, as far as its rows depend on the size of the tier's model.

    Raises:
        ValueError: there is no such experiment.
        RecipeError: there is no such tier.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"There is no table or figure {name!r}; choose one of {', '.join(EXPERIMENTS)}.")
    return replace(EXPERIMENTS[name](tier), name=name)


def _of(recipe: str, against: str | None = None, label: str | None = None, **other) -> Row:
    """A row of a recipe with the paper's number of its linear probe."""
    paper = load_recipe(recipe).paper
    number = None if "protocol" in paper else paper.get("linear_probe_top1")
    return Row(label or recipe, recipe, paper=number, against=against, **other)


def _curve(sweep: str, best: str | None = None) -> list[Row]:
    """A sweep and the recipe that it starts from, each compared with the one of them that is best in the paper."""
    members = sweep_members(sweep)
    rows = [_of(name) for name in [load_recipe(members[0]).parent, *members]]
    known = [row for row in rows if row.paper is not None]
    best = best or max(known, key=lambda row: row.paper).label
    return [replace(row, against=None if row.label == best else best) for row in rows]


def _table1(tier: str | None) -> Experiment:
    steps = load_recipe(END_OF_PATH).steps
    steps = steps[: steps.index("replace_noise_schedule") + 1]
    probes, distances = [], []
    for before, name in zip([None, *steps], steps, strict=False):
        probes.append(_of(name, before))
        fid = load_recipe(name).paper.get("fid")
        distances.append(Row(name, name, "distance", paper=fid, against=before))
    # The paper trains no VQGAN between these two: what it compares is the step after with the step before.
    place = steps.index("retrain_vqgan")
    for rows in (probes, distances):
        rows[place + 1] = replace(rows[place + 1], against=steps[place - 1])
    notes = ("`retrain_vqgan` is a step of ours, between a downloaded VQGAN and one that is trained here",)
    return Experiment("", "Table 1: reorienting DDM for self-supervised learning", (*probes, *distances), notes=notes)


def _table2(tier: str | None) -> Experiment:
    rows = [row for sweep in ("conv_vae_k", "patch_vae_k", "patch_ae_k", "patch_pca_k") for row in _curve(sweep)]
    rows = [row for row in rows if row.recipe != "patch_pca_k_256"]  # of Figure 5
    # And the tokenizers side by side, at the K that is PCA's best: the same rows, with another reference.
    for name in ("conv_vae_k_32", "patch_vae_k_32", "patch_ae_k_32"):
        rows.append(_of(name, "patch_pca_k_32", label=f"{name}, as patch_pca_k_32"))
    return Experiment("", "Table 2: four tokenizers and the latent dimension K", tuple(rows))


def _table3(tier: str | None) -> Experiment:
    steps = load_recipe(END_OF_PATH).steps
    steps = steps[steps.index("patch_pca_k_32") :]
    rows = [_of(name, before) for before, name in zip([None, *steps], steps, strict=False)]
    return Experiment("", "Table 3: from DDM to a classical denoising autoencoder", tuple(rows))


def _table4(tier: str | None) -> Experiment:
    rows = []
    for size, mae in (("b", (68.0, 83.6)), ("l", (75.8, 85.9))):
        ours, theirs = f"size_{size}_epochs_1600", f"mae_size_{size}"
        paper = load_recipe(ours).paper
        numbers = (("probe", paper["linear_probe_top1"], mae[0]), ("fine_tune", paper["fine_tune_top1"], mae[1]))
        for measure, number, other in numbers:
            rows.append(Row(theirs, theirs, "cached_probe" if measure == "probe" else measure, paper=other))
            own = "best_noisy" if measure == "probe" else measure
            rows.append(Row(ours, ours, own, paper=number, against=theirs))
    notes = (
        "l-DAE's probe is at the best timestep of noisy input, as in the paper; both probes are on cached features, at "
        "full size too",
        "MoCo v3 (probe 76.7 B, 77.6 L; fine-tuned 83.2 B, 84.1 L in the paper) is not trained here: evaluate its "
        "weights with `ldae full-probe timm:NAME@FILE`",
    )
    return Experiment("", "Table 4: MAE and l-DAE, ViT-B and ViT-L, 1600 epochs", tuple(rows), notes=notes)


def _figure5(tier: str | None) -> Experiment:
    rows = [*_curve("patch_pca_k", "patch_pca_k_32"), *_curve("pixels_size")]
    # Footnote 1: with noise on pixels it is a classical DAE, below 20 %. All 768 directions are those pixels, rotated.
    finals = [replace(row, claim="lower" if row.label == "l_dae_k_768" else None) for row in _curve("l_dae_k", "l_dae")]
    rows += finals
    notes = ("the paper's curves are of noise prediction; it does not vary K in the final method, `l_dae_k`",)
    return Experiment("", "Figure 5: accuracy over the latent dimension K", tuple(rows), notes=notes)


def _timesteps(tier: str | None) -> Experiment:
    levels = load_recipe(END_OF_PATH, tier).model_config().num_noise_levels
    rows = []
    for noise, numbers in PAPER_TIMESTEPS.items():
        for timestep in timestep_range(levels):
            paper = numbers.get(timestep * PAPER_LEVELS / levels)
            label, point = f"t = {timestep}, {noise}", (("timestep", timestep), ("noise", noise))
            rows.append(Row(label, END_OF_PATH, "timesteps", point, paper))
    own = load_recipe(END_OF_PATH, tier).model["feature_timestep"]
    rows = [replace(row, against=None if row.label == f"t = {own}, clean" else f"t = {own}, clean") for row in rows]
    notes = ("frozen: each image always with the same noise; the paper's is probably fresh",)
    return Experiment("", "Features at timesteps, of clean and of noisy input", tuple(rows), notes=notes)


def _depth(tier: str | None) -> Experiment:
    config = load_recipe(END_OF_PATH, tier).model_config()
    encoder, blocks = config.num_hidden_layers, config.num_hidden_layers + config.decoder_num_hidden_layers
    rows = []
    for block in depth_range(encoder, blocks):
        paper = PAPER_DEPTH.get(block * PAPER_BLOCKS / blocks)
        against = None if block == encoder else f"block {encoder} of {blocks}"
        # The paper's curve falls to both sides of the middle; a small model has blocks where it has no number.
        claim = "lower" if against and paper is None else None
        rows.append(Row(f"block {block} of {blocks}", END_OF_PATH, "depth", (("block", block),), paper, against, claim))
    return Experiment("", "Which block ends the encoder", tuple(rows))


def _epochs(tier: str | None) -> Experiment:
    rows = [_of("random_crop"), _of("epochs_800", "random_crop"), _of("epochs_1600", "epochs_800")]
    return Experiment("", "Training epochs", tuple(rows))


def _sizes(tier: str | None) -> Experiment:
    rows = [_of("size_b", "random_crop"), _of("random_crop"), _of("size_l", "random_crop")]
    return Experiment("", "Model size", tuple(rows))


def _augmentation(tier: str | None) -> Experiment:
    rows = [_of(END_OF_PATH), _of("random_crop", END_OF_PATH), _of("flip", "random_crop")]
    notes = ("the paper does not mention flips",)
    return Experiment("", "Data augmentation", tuple(rows), notes=notes)


def _single_level(tier: str | None) -> Experiment:
    rows = [_of(END_OF_PATH), _of("single_level", END_OF_PATH)]
    return Experiment("", "A single noise level", tuple(rows))


def _latent_scale(tier: str | None) -> Experiment:
    rows = [_of(END_OF_PATH), *(_of(name, END_OF_PATH) for name in sweep_members("latent_scaling"))]
    notes = ("the paper does not say how the latents are scaled; `l_dae` scales them by one number",)
    return Experiment("", "The scale of the latents", tuple(rows), notes=notes)


def _controls(tier: str | None) -> Experiment:
    rows = [
        _of(END_OF_PATH),
        _of("classical_dae", END_OF_PATH, claim="lower"),  # footnote 1: below 20 %
        _of("noise_prediction", END_OF_PATH, claim="equal"),  # footnote 4
        _of("predict_clean_latent"),
        _of("snr_weighting", "predict_clean_latent", claim="lower"),  # section 4.3
        _of("remove_input_scaling"),
        _of("snr_matched", "remove_input_scaling"),
        _of("patch_pca_k_32"),
        _of("ddpm_schedule", "patch_pca_k_32", claim="lower"),  # as in the last step of Table 1
        _of("random_projection", END_OF_PATH),
        _of("l_dae_k_768", END_OF_PATH),
        _of("noise_matched_768", "l_dae_k_768"),
    ]
    notes = (
        "`classical_dae` adds noise to pixels: below 20 % in the paper's footnote 1",
        "`noise_matched_768` has the noise of K = 32 on its leading components",
        "`random_projection` always has the same random directions, whatever the seed",
    )
    return Experiment("", "Controls", tuple(rows), notes=notes)


def _residual_weight(tier: str | None) -> Experiment:
    rows = [_of(END_OF_PATH), *(_of(name, END_OF_PATH) for name in sweep_members("residual_weight"))]
    return Experiment("", "The weight of the loss outside the K directions, 0.1 in l_dae", tuple(rows))


def _mae(tier: str | None) -> Experiment:
    rows = [_of(END_OF_PATH), _of("mae", END_OF_PATH), _of("mae_equal_flops", END_OF_PATH)]
    notes = ("400 epochs of centre crops, as in the path, or as many FLOPs; Table 4 has the paper's comparison",)
    return Experiment("", "The masked autoencoder beside l-DAE", tuple(rows), notes=notes)


def _noise_grid(tier: str | None) -> Experiment:
    rows = [
        _of(END_OF_PATH),
        # The noise as it is at K = 32, other dimensions.
        _of("k_8_noise_of_32", END_OF_PATH),
        _of("noise_matched_768", END_OF_PATH),
        # K = 32, other noise.
        _of("k_32_noise_of_8", END_OF_PATH),
        _of("k_32_noise_of_768", END_OF_PATH),
        # Other noise at the other dimensions: the first and the last are those of the curve over K.
        _of("l_dae_k_8", "k_8_noise_of_32"),
        _of("k_8_noise_of_768", "k_8_noise_of_32"),
        _of("k_768_noise_of_8", "noise_matched_768"),
        _of("l_dae_k_768", "noise_matched_768"),
        # As many directions, but random ones: with the noise that they bring, and with that of K = 32.
        _of("random_projection", END_OF_PATH),
        _of("random_projection_noise_of_32", END_OF_PATH),
    ]
    notes = (
        "the noise on a fixed direction of pixels falls as K grows, so the curve over K varies both; here one is held",
        "`k_A_noise_of_B` has A components and the noise that B components have; the weights of the loss, "
        "1 / (1 + sigma²), change with the noise",
        "the random directions are always the same ones, which hold 0.73 of the variance that such directions hold on "
        "average (tier cpu), so their noise is 0.86 of what the name says",
    )
    return Experiment("", "Is it the low dimension or the noise level?", tuple(rows), notes=notes)


def _variants(tier: str | None) -> Experiment:
    names = ("token_noise_levels", "block_noise_levels", "interpolative_noise", "deep_narrow_decoder", "global_tokens")
    rows = [_of(END_OF_PATH), *(_of(name, END_OF_PATH) for name in names)]
    notes = (
        "the budget is the number of steps; of FLOPs a step, at the tier cpu, where an image has 16 tokens, more than "
        "one noise level an image takes a fifth more, four global tokens a quarter, a deep narrow decoder none",
    )
    return Experiment("", "Variants of the final method, with the same budget", tuple(rows), notes=notes)


EXPERIMENTS: dict[str, Callable[[str | None], Experiment]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "figure5": _figure5,
    "timesteps": _timesteps,
    "depth": _depth,
    "epochs": _epochs,
    "sizes": _sizes,
    "augmentation": _augmentation,
    "single-level": _single_level,
    "latent-scale": _latent_scale,
    "controls": _controls,
    "mae": _mae,
    "noise-grid": _noise_grid,
    "residual-weight": _residual_weight,
    "variants": _variants,
}
