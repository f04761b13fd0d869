"""Images to `pixel_values`, and the PCA tokenizer of l-DAE as an image processor: fit, encode, decode, save, load."""

import math
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.image_processing_base import ImageProcessingMixin  # noqa: F401 (diffusers looks for it here)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file
from transformers.utils.hub import resolve_revision

from .images import centre_box, flatten_images, open_image, resize_crop, to_rgb
from .patch_covariance import PatchBasis, PatchCovariance
from .patch_tokenizers import dct_basis, latent_scales, patchify, unpatchify


BASIS_NAME = "patch_pca.safetensors"
LATENT_SCALINGS = ("global", "whiten", "none")
# What transformers writes into preprocessor_config.json besides the arguments of the class.
_METADATA = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "transformers_version"}


class LDAEImageProcessor(BaseImageProcessor):
    """Images of any kind to normalised `pixel_values`, and by patch-wise PCA (section 4.2) to latents and back.

    The centre square is cut out and resized (bicubic, antialias) to `image_size`; pixels become
    (x / 255 - image_mean) / image_std, [-1, 1] by default. Patches run row by row, each in (channel, row, column)
    order. Before `fit` the basis is a DCT, the mean 0 and every variance 1; a fitted basis is kept in
    `patch_pca.safetensors` beside `preprocessor_config.json`. One PIL-based class serves every backend.

    Args:
        image_size: pixels per side of `pixel_values`, a multiple of `patch_size`.
        patch_size: pixels per side of a patch; P = 3 * patch_size**2.
        latent_dim: K, latent values per patch, 1...P.
        latent_scaling: "global" (one factor: mean variance 1), "whiten" (each variance 1) or "none".
        image_mean: of the three channels, in units of 0...1.
        image_std: of the three channels, in the same units.

    Raises:
        ValueError: a value is out of range, or the patch does not divide the image.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        latent_dim: int = 32,
        latent_scaling: str = "global",
        image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        for name, value in {"patch_size": patch_size, "latent_dim": latent_dim}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}.")
        self.patch_size = patch_size
        self.image_size = self._check_image_size(image_size)
        if latent_dim > self.patch_dim:
            raise ValueError(f"latent_dim={latent_dim} is more than the {self.patch_dim} values of a patch.")
        if latent_scaling not in LATENT_SCALINGS:
            raise ValueError(f"latent_scaling must be one of {', '.join(LATENT_SCALINGS)}, not {latent_scaling!r}.")
        for name, values in {"image_mean": image_mean, "image_std": image_std}.items():
            numbers = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
            if not numbers or len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} must hold three finite numbers, not {values!r}.")
        if min(image_std) <= 0:
            raise ValueError(f"image_std must be positive, not {image_std!r}.")
        self.latent_dim = latent_dim
        self.latent_scaling = latent_scaling
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self._basis = None

    def _check_image_size(self, image_size: int) -> int:
        if type(image_size) is not int or image_size < 1 or image_size % self.patch_size:
            raise ValueError(f"image_size={image_size!r} is not a positive multiple of patch_size={self.patch_size}.")
        return image_size

    # -- Images -> pixel_values ---------------------------------------------------------------------------------------

    @property
    def size(self) -> dict[str, int]:
        """`image_size` in the form in which other image processors state it."""
        return {"height": self.image_size, "width": self.image_size}

    def preprocess(
        self,
        images: Any,
        image_size: int | None = None,
        do_normalize: bool = True,
        input_data_format: str | ChannelDimension | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Images to {"pixel_values": (B,C,H,W) float32}; this is what calling the processor does.

        Args:
            images: one image or any nesting of lists: PIL, array or tensor (see `to_rgb`), array (B,...), file bytes,
                or a row of a dataset.
            image_size: another size than the processor's, for once.
            do_normalize: False leaves the pixels in 0...1.
            input_data_format: "channels_first" or "channels_last", for arrays whose shape does not tell.
            return_tensors: "pt" or "np"; by default NumPy.

        Raises:
            ValueError: there is no image, or one cannot be read; the message gives its position.
        """
        pixels = torch.from_numpy(self.crop(images, image_size, input_data_format))
        pixel_values = self.normalize_pixels(pixels) if do_normalize else pixels / 255
        return BatchFeature({"pixel_values": pixel_values.numpy()}, tensor_type=return_tensors)

    def crop(
        self,
        images: Any,
        image_size: int | None = None,
        input_data_format: str | ChannelDimension | None = None,
    ) -> np.ndarray:
        """Images (as `preprocess` takes them) to their centre squares (B,C,H,W) in uint8."""
        size = self.image_size if image_size is None else self._check_image_size(image_size)
        crops = [
            self._crop(image, index, size, input_data_format) for index, image in enumerate(flatten_images(images))
        ]
        if not crops:
            raise ValueError("There is no image in the input; give at least one.")
        return np.stack(crops)

    def _crop(self, image: Any, index: int, size: int, input_data_format: str | ChannelDimension | None = None):
        try:
            image = to_rgb(open_image(image), input_data_format)
        except ValueError as error:
            raise ValueError(f"Image {index} of the input: {error}") from error
        return resize_crop(image, size, centre_box(*image.size))

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) grey levels 0...255 to normalised float32, on the device of `pixels`."""
        mean = torch.tensor(self.image_mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.image_std, device=pixels.device)[:, None, None]
        return (pixels.to(torch.float32) / 255).sub_(mean).div_(std)

    # -- The PCA basis ------------------------------------------------------------------------------------------------

    @property
    def patch_dim(self) -> int:
        """P, the values of a patch."""
        return 3 * self.patch_size**2

    @property
    def num_patches(self) -> int:
        """N, the patches (tokens) of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def fitted(self) -> bool:
        """Whether the basis comes from images; before that it is a DCT."""
        return self._basis is not None

    @property
    def basis(self) -> PatchBasis:
        """Components, mean and explained variance in float64, in units of normalised pixels."""
        if self._basis is not None:
            return self._basis
        components = dct_basis(self.patch_size, 3)
        return PatchBasis(components, torch.zeros_like(components[0]), torch.ones_like(components[0]))

    @property
    def components(self) -> torch.Tensor:
        """(P,P) float64, one direction per row, by falling variance: V_full."""
        return self.basis.components

    @property
    def mean(self) -> torch.Tensor:
        """(P,) float64, the mean patch in normalised pixels: μ."""
        return self.basis.mean

    @property
    def explained_variance(self) -> torch.Tensor:
        """(P,) float64, the variance along each direction in squared normalised pixels: ω."""
        return self.basis.explained_variance

    @property
    def scale(self) -> torch.Tensor:
        """(K,) float64, the factors s on the latents; all equal but for "whiten"."""
        return latent_scales(self.explained_variance, self.latent_dim, self.latent_scaling)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of patch size and normalisation, and of mean, variance and components in float32."""
        header = f"patch_pca patch_size={self.patch_size} image_mean={self.image_mean} image_std={self.image_std} "
        digest = sha256(header.encode())
        for tensor in (self.mean, self.explained_variance, self.components):
            digest.update(tensor.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def fit(
        self, images: Iterable[Any], num_patches: int = 1_000_000, seed: int = 0, progress: bool = True
    ) -> "LDAEImageProcessor":
        """Fits the PCA to patches of the images' centre squares, in one pass and bounded memory.

        Every patch is kept with the probability num_patches / (images * N), drawn from the seed and the crop's own
        bytes: the result does not depend on the order of the images, nor on who sees which.

        Args:
            images: a Hugging Face dataset or any iterable; rows are images as `preprocess` takes them. All patches of
                an iterable without a length are used.
            num_patches: how many patches to use, about; all when there are fewer.
            seed: chooses them.
            progress: show a progress bar.

        Raises:
            ValueError: an image is unreadable; there are too few patches, all are equal, or they vary in fewer than
                `latent_dim` directions.
        """
        total = len(images) if hasattr(images, "__len__") else None
        probability = 1.0 if total is None else self.patch_probability(total, num_patches)
        covariance = PatchCovariance(self.patch_dim)
        bar = tqdm(images, total=total, desc="Patch PCA", unit=" images", disable=not progress)
        for index, image in enumerate(bar):
            self.accumulate(covariance, self._crop(image, index, self.image_size)[None], probability, seed)
        return self.set_basis(covariance)

    def patch_probability(self, num_images: int, num_patches: int = 1_000_000) -> float:
        """The probability with which to keep a patch of so many images, to keep about `num_patches` in all."""
        return min(1.0, num_patches / max(1, num_images * self.num_patches))

    def accumulate(
        self, covariance: PatchCovariance, crops: np.ndarray | torch.Tensor, probability: float = 1.0, seed: int = 0
    ) -> PatchCovariance:
        """Adds the patches of uint8 crops (B,C,H,W) to a covariance, each with the given probability.

        Processes call this on their shards, merge the covariances in any order and call `set_basis`: bit for bit what
        `fit` gives on all images.
        """
        crops = torch.as_tensor(crops).cpu()
        patches = patchify(crops, self.patch_size)
        if probability < 1:
            patches = patches[torch.stack([self._draw(crop, patches.shape[1], probability, seed) for crop in crops])]
        return covariance.update(patches.reshape(-1, self.patch_dim))

    @staticmethod
    def _draw(crop: torch.Tensor, num_patches: int, probability: float, seed: int) -> torch.Tensor:
        digest = sha256(f"{seed} ".encode() + crop.numpy().tobytes()).digest()
        # RandomState: the generator whose stream NumPy promises never to change.
        draws = np.random.RandomState(np.frombuffer(digest, dtype="<u4")).random_sample(num_patches)
        return torch.from_numpy(draws < probability)

    def set_basis(self, covariance: PatchCovariance) -> "LDAEImageProcessor":
        """Takes the PCA of uint8 patches seen by `covariance` as basis, in units of normalised pixels.

        Raises:
            ValueError: there are too few patches, all are equal, or they vary in fewer than `latent_dim` directions.
        """
        std = torch.tensor(self.image_std, dtype=torch.float64).repeat_interleave(self.patch_size**2)
        mean = torch.tensor(self.image_mean, dtype=torch.float64).repeat_interleave(self.patch_size**2)
        self._basis = self._check_basis(covariance.principal_components(scale=1 / (255 * std), offset=-mean / std))
        return self

    def _check_basis(self, basis: PatchBasis) -> PatchBasis:
        if not all(torch.isfinite(tensor).all() for tensor in basis):
            raise ValueError("The PCA basis holds values that are not finite; fit the processor again.")
        # Below this an eigenvalue of a float64 matrix is rounding.
        floor = basis.explained_variance.max() * self.patch_dim * torch.finfo(torch.float64).eps
        rank = int((basis.explained_variance > floor).sum())
        if rank < self.latent_dim:
            raise ValueError(
                f"The patches vary in {rank} directions only, fewer than latent_dim={self.latent_dim}; give images "
                "with more content or choose a smaller latent_dim."
            )
        return basis

    def encode(self, images: Any) -> torch.Tensor:
        """Images (as `preprocess` takes them) to latents z = s V (p - μ), (B,N,K) float32."""
        pixel_values = self(images, return_tensors="pt")["pixel_values"]
        components, mean, scale = self._projection(pixel_values.device)
        return F.linear(patchify(pixel_values, self.patch_size) - mean, components) * scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B,N,K) to images μ + Vᵀ z / s, (B,C,H,W) float32 in normalised pixels, not clipped.

        Raises:
            ValueError: the latents have another shape.
        """
        if latents.ndim != 3 or tuple(latents.shape[1:]) != (self.num_patches, self.latent_dim):
            raise ValueError(
                f"Latents must have the shape (B, {self.num_patches}, {self.latent_dim}), not {tuple(latents.shape)}."
            )
        components, mean, scale = self._projection(latents.device)
        side = self.image_size // self.patch_size
        return unpatchify(mean + F.linear(latents.float() / scale, components.T), self.patch_size, (side, side))

    def _projection(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """V (K,P), μ (P,) and s (K,) in float32."""
        components, mean, explained_variance = self.basis
        scale = latent_scales(explained_variance, self.latent_dim, self.latent_scaling)
        return tuple(tensor.to(device, torch.float32) for tensor in (components[: self.latent_dim], mean, scale))

    # -- Saving and loading -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessor_config.json` holds: the arguments of the class and, once fitted, the fingerprint."""
        output = super().to_dict()
        output.pop("_basis", None)
        return {**output, "fingerprint": self.fingerprint} if self.fitted else output

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes `preprocessor_config.json` and, once fitted, `patch_pca.safetensors`; both are pushed if asked."""
        save_directory = Path(save_directory)
        files = super().save_pretrained(save_directory, **kwargs)
        if self.fitted:
            files.append(str(save_directory / BASIS_NAME))
            save_file(self._basis._asdict(), files[-1])
        # Here and not in the base class, which would upload before the basis is written.
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", save_directory.name), **kwargs)
        return files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str = "main",
        return_unused_kwargs: bool = False,
        **kwargs,
    ):
        """Loads a saved processor from a folder or the Hub; arguments of the class override what was saved.

        Raises:
            ValueError: the configuration holds unknown keys, or the basis is missing, damaged or not the one that the
                configuration names.
            TypeError: a keyword is unknown (with `return_unused_kwargs` such ones are returned instead).
        """
        where = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "subfolder")
        where = {name: kwargs[name] for name in where if name in kwargs}
        # Resolved once, so that both files come from one commit.
        where["revision"] = resolve_revision(
            pretrained_model_name_or_path,
            revision,
            **{name: where[name] for name in ("token", "local_files_only", "cache_dir") if name in where},
        )
        # A pipeline hands the model's keywords to every part of it.
        ignore_unknown = return_unused_kwargs or "_from_pipeline" in kwargs
        config, kwargs = cls.get_image_processor_dict(pretrained_model_name_or_path, **{**kwargs, **where})
        fingerprint = config.pop("fingerprint", None)
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        built = cls.from_dict(config, return_unused_kwargs=ignore_unknown, **kwargs)
        processor, unused = built if ignore_unknown else (built, {})
        if fingerprint is not None:
            folder = Path(pretrained_model_name_or_path)
            folder = folder.parent if folder.is_file() else pretrained_model_name_or_path
            file = cached_file(folder, BASIS_NAME, _raise_exceptions_for_missing_entries=False, **where)
            if file is None:
                raise ValueError(
                    f"{IMAGE_PROCESSOR_NAME} in {folder} tells of a fitted PCA, but {BASIS_NAME} is not beside it; "
                    "copy both files or save the processor again."
                )
            processor._load_basis(file, fingerprint)
        return (processor, unused) if return_unused_kwargs else processor

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Builds a processor without fitted basis from what `to_dict` gave; keywords override.

        Raises:
            ValueError: a key is unknown, or the dictionary is a fitted processor's, whose basis it does not hold.
            TypeError: a keyword is unknown (with `return_unused_kwargs` such ones are returned instead).
        """
        names = ("image_size", "patch_size", "latent_dim", "latent_scaling", "image_mean", "image_std")
        if "fingerprint" in image_processor_dict:
            raise ValueError("A fitted processor's dictionary does not hold its basis; use from_pretrained.")
        if unknown := image_processor_dict.keys() - _METADATA - set(names):
            raise ValueError(
                f"{IMAGE_PROCESSOR_NAME} holds {', '.join(sorted(unknown))}, which {cls.__name__} does not know; "
                "remove it or load the folder with the class that saved it."
            )
        stated = {**image_processor_dict, **kwargs}
        processor = cls(**{name: stated[name] for name in names if name in stated})
        unused = {name: value for name, value in kwargs.items() if name not in names}
        if return_unused_kwargs:
            return processor, unused
        if unused:
            raise TypeError(f"{cls.__name__} does not take {', '.join(unused)}.")
        return processor

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "LDAEImageProcessor":
        """Loads from the path of a `preprocessor_config.json`, with the basis beside it."""
        return cls.from_pretrained(json_file)

    def _load_basis(self, file: str, fingerprint: str) -> None:
        expected = {name: ("F64", [self.patch_dim]) for name in PatchBasis._fields}
        expected["components"] = ("F64", [self.patch_dim, self.patch_dim])
        try:
            with safe_open(file, "pt") as tensors:
                # Read from the header first: a file must not make us allocate what it likes.
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}
                found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
                if found != expected:
                    raise ValueError(f"{file} must hold {expected} for patch_size={self.patch_size}, not {found}.")
                basis = PatchBasis(**{name: tensors.get_tensor(name) for name in expected})
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); copy or download it again.") from error
        self._basis = self._check_basis(basis)
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"{file} does not have the fingerprint that {IMAGE_PROCESSOR_NAME} names: the file was damaged or "
                "exchanged, or image_mean or image_std differ from those of the fit."
            )
