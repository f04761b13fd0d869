"""LDAEPipeline: images from noise, or from noisy images, with a model that was pre-trained here.

Sampling walks a schedule's levels downwards in the latent space, from the last one that holds signal: the network is
shown the noisy latents as in training, its answer is read as noise or clean latents, and the scheduler takes the step.
An answer in pixels also says what lies outside the K latent directions; that of the last step is kept.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download

from .image_processing_ldae import LDAEImageProcessor
from .latent_tokenizers import LearnedTokenizer
from .modeling_ldae import LDAEForPreTraining
from .patch_tokenizers import ConvolutionalTokenizer, unpatchify
from .prediction_targets import clean_latents, clean_patches
from .scheduling_ldae import LDAEScheduler


OUTPUT_TYPES = ("pil", "np", "pt")
# diffusers' schedulers that take t - T // n for the next of n timesteps, whatever they said that they would visit.
FIXED_STRIDE = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
}
# The parts of a folder, and the classes that they may be of; a scheduler may also be one of diffusers' own.
PARTS = {
    "model": ["ldae_hf.modeling_ldae", "LDAEForPreTraining"],
    "scheduler": ["ldae_hf.scheduling_ldae", "LDAEScheduler"],
    "processor": ["ldae_hf.image_processing_ldae", "LDAEImageProcessor"],
    "vae": ["diffusers", "AutoencoderKL"],
}

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class LDAEDenoisingOutput(BaseOutput):
    """Output of [`LDAEPipeline.denoise`], both as its `output_type` says.

    images: restored. noisy_images: what the noisy latents decode to, whatever space the network itself sees.
    """

    images: list | torch.Tensor
    noisy_images: list | torch.Tensor


class LDAEPipeline(DiffusionPipeline):
    """Generates and restores images.

    Args:
        model: [`LDAEForPreTraining`], the encoder with its decoder.
        processor: the [`LDAEImageProcessor`] that the model was trained with.
        scheduler: by default [`LDAEScheduler.for_model`]; it may be exchanged for one of diffusers' own, as
            [`LDAEScheduler.to_stock`] makes them.
        vae: the autoencoder of a convolutional tokenizer, None for all others.

    Raises:
        ValueError: parts that do not belong together.
    """

    _optional_components = ["scheduler", "vae"]  # what has a default, else it would not be saved

    def __init__(
        self,
        model: LDAEForPreTraining,
        processor: LDAEImageProcessor,
        scheduler: SchedulerMixin | None = None,
        vae: AutoencoderKL | None = None,
    ):
        super().__init__()
        model.check_processor(processor)
        tokenizer = model.ldae.tokenizer
        if isinstance(tokenizer, ConvolutionalTokenizer) != (vae is not None):
            needs = "needs the vae of its tokenizer" if vae is None else "has no use for a vae"
            raise ValueError(f"A model with tokenizer={model.config.tokenizer!r} {needs}.")
        if vae is not None and not tokenizer.is_attached(vae):
            buffers = {name: value.cpu() for name, value in tokenizer.state_dict().items()}
            sizes = (model.config.tokenizer, model.config.patch_size, model.config.latent_dim)
            model.set_tokenizer(LearnedTokenizer(*sizes, buffers=buffers, autoencoder=vae))
        scheduler = LDAEScheduler.for_model(model.config) if scheduler is None else scheduler
        self.register_modules(model=model.eval(), processor=processor, scheduler=scheduler, vae=vae)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs,
    ):
        """Loads what `save_pretrained` wrote, from a folder or the Hub, and nothing else that may lie there.

        Args:
            revision: of the Hub's repository.
            dtype: of the model; an autoencoder stays fp32, and so do latents.
            kwargs: as diffusers' own.

        Raises:
            ValueError: it is no folder of this pipeline, or names other parts than this pipeline has.
            OSError: it is not there, or cannot be downloaded.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            where = {key: kwargs.pop(key) for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
            files = ["model_index.json", *(f"{part}/*.{end}" for part in PARTS for end in ("json", "safetensors"))]
            name = str(pretrained_model_name_or_path)
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, **where))
            except (OSError, ValueError) as error:  # a name that is none, no network, no access
                reason = " ".join(str(error).split())
                raise OSError(f"{name} is no folder here, and no pipeline can be had from the Hub: {reason}") from error
        check_index(folder)
        dtype = kwargs.pop("torch_dtype", dtype)  # its older name
        if "model" not in kwargs:
            kwargs["model"] = LDAEForPreTraining.from_pretrained(folder / "model", dtype=dtype)
        return super().from_pretrained(folder, use_safetensors=True, **kwargs)

    def to(self, *args, **kwargs) -> "LDAEPipeline":
        """As diffusers' own, but a dtype is the model's, as in `from_pretrained`: an autoencoder keeps its precision.

        Raises:
            ValueError: two dtypes, or what diffusers refuses.
        """
        dtypes = [value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)]
        if len(dtypes) > 1:
            raise ValueError(f"A pipeline has one dtype, not {dtypes[0]} and {dtypes[1]}.")
        if dtypes:
            self.model.to(dtypes[0])
        return super().to(*(value for value in args if not isinstance(value, torch.dtype)), **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        *,
        class_labels: list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LDAEPipeline", int, int, dict], dict | None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            batch_size: how many; with `class_labels` as many as these.
            class_labels: (B,) classes, of a model that was trained with some; without them, "no class".
            guidance_scale: w of classifier-free guidance (arXiv 2207.12598), none + w (class - none); 1 is none, and
                costs half.
            num_inference_steps: levels of noise that are visited.
            eta: 0 deterministic (DDIM) ... 1 ancestral (DDPM), where the scheduler leaves the choice.
            generator: of all noise. With a list of one for each image, an image does not depend on the others.
            latents: (B,N,K) standard normal to begin with, instead of drawn.
            output_type: "pil"; "np" (B,H,W,C) or "pt" (B,C,H,W), in 0 ... 1.
            return_dict: False for a tuple.
            callback_on_step_end: called after each step with the pipeline, its number, its timestep, and a dictionary:
                `latents` after the step, `noisy_latents` before it in the model's scale, `clean_latents` as the network
                has them, (B,N,K) each. If it returns a dictionary with `latents`, these are gone on with.

        Raises:
            ValueError: the model or the scheduler cannot do it, or an argument is out of range.
        """
        check_output_type(output_type)
        labels = self._labels(class_labels, guidance_scale)
        batch_size = batch_size if labels is None else len(labels)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"There are {len(generator)} generators for {batch_size} images; give one, or one each.")
        model, scheduler, device = self.model, self.scheduler, self._execution_device
        step_options = self._step_options(eta, generator)
        scheduler.set_timesteps(num_inference_steps)  # on the CPU, from where a scheduler reads them without waiting
        timesteps = self._trained_timesteps().to(device)
        shape = (batch_size, model.config.num_patches, model.config.latent_dim)
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}.")
        latents = latents.to(device, torch.float32) * self._initial_deviation()
        target, tokenizer = model.prediction_target, model.ldae.tokenizer
        for number, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            level = timesteps[number : number + 1]
            noisy_latents = self._as_trained(latents, timestep, level)
            prediction = self._predict(noisy_latents, level, labels, guidance_scale)
            answer = target.in_latents(tokenizer, prediction)
            latents = scheduler.step(answer, timestep, latents, **step_options).prev_sample
            if callback_on_step_end is not None:
                levels = model.ldae.schedule.levels(level)
                clean = clean_latents(target, tokenizer, prediction, noisy_latents, *levels)
                seen = {"latents": latents, "noisy_latents": noisy_latents, "clean_latents": clean}
                latents = (callback_on_step_end(self, number, int(timestep), seen) or {}).get("latents", latents)
        images = self._show(clean_patches(target, tokenizer, prediction, latents), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def denoise(
        self,
        images,
        timestep: int | torch.Tensor,
        *,
        class_labels: list[int] | torch.Tensor | None = None,
        generator: Generators = None,
        output_type: str = "pil",
    ) -> LDAEDenoisingOutput:
        """Adds noise of one level to images and restores them in one step, which is what the model was trained to do.

        Args:
            images: as the processor takes them: PIL, arrays, tensors, or lists of them.
            timestep: the level, 0 ... T-1, or (B,), one for each image; 0 for a model with a single level.
            class_labels, generator, output_type: as in `__call__`.

        Raises:
            ValueError: an argument is out of range.
        """
        check_output_type(output_type)
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self._execution_device)
        labels = self._labels(class_labels, guidance_scale=1)
        shape = (len(pixels), self.model.config.num_patches, self.model.config.latent_dim)
        noise = randn_tensor(shape, generator, pixels.device, torch.float32)
        noisy, restored = self.model.denoise(pixels, timestep, noise, labels)
        return LDAEDenoisingOutput(self._output(restored, output_type), self._output(noisy, output_type))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil"):
        """What latents (B,N,K) in the model's scale look like, noisy or clean."""
        check_output_type(output_type)
        return self._show(self.model.ldae.tokenizer.decode(latents), output_type)

    # ---- a step

    def _trained_timesteps(self) -> torch.Tensor:
        """(steps,) int64. Some of diffusers' schedulers count in floats.

        Raises:
            ValueError: the scheduler does not lead from noise to images by levels that the model was trained on.
        """
        scheduler, timesteps = self.scheduler, self.scheduler.timesteps.double()
        if not torch.equal(timesteps, timesteps.round()):
            raise ValueError(
                f"{type(scheduler).__name__} visits timesteps between those that the model was trained on, "
                f"{timesteps.frac().max():.2f} of a step apart; give it a timestep_spacing of whole ones."
            )
        if timesteps[0] < timesteps[-1]:
            raise ValueError(f"{type(scheduler).__name__} leads from images to noise, not from noise to images.")
        levels, steps = len(scheduler), scheduler.num_inference_steps
        if FIXED_STRIDE & {kind.__name__ for kind in type(scheduler).__mro__} and levels % steps:
            whole = [number for number in range(1, levels + 1) if levels % number == 0]
            near = [max(n for n in whole if n < steps), *(n for n in whole if n > steps)][:2]
            raise ValueError(
                f"{type(scheduler).__name__} steps by {levels} // {steps} = {levels // steps} levels, which does not "
                f"lead through {levels} levels in {steps} steps: take {' or '.join(map(str, near))} steps, or "
                "LDAEScheduler, which takes any number."
            )
        return timesteps.long()

    def _initial_deviation(self) -> float | torch.Tensor:
        """Of what the scheduler begins with, so that the network is shown what pure noise looks like at that level.

        Some of diffusers' schedulers begin with sigma where sqrt(1 + sigma²) belongs, for theirs is large.
        """
        if isinstance(self.scheduler, LDAEScheduler):
            return self.scheduler.init_noise_sigma
        deviation = torch.as_tensor(self.scheduler.init_noise_sigma, dtype=torch.float32)
        return deviation / self.scheduler.scale_model_input(deviation, self.scheduler.timesteps[0])

    def _as_trained(self, latents, timestep, level):
        """z_t = gamma_t z + sigma_t eps, out of whatever the scheduler carries through its steps."""
        latents = self.scheduler.scale_model_input(latents, timestep)
        if isinstance(self.scheduler, LDAEScheduler):
            return latents
        gammas, sigmas = self.model.ldae.schedule.levels(level)
        return latents * (gammas.square() + sigmas.square()).sqrt()  # the others preserve variance

    def _predict(self, noisy_latents, level, labels, guidance_scale):
        """(B,N,K) or (B,N,P): the network's answer, guided away from that without a class."""
        if labels is None:
            return self.model.predict(noisy_latents, level)
        if guidance_scale == 1:
            return self.model.predict(noisy_latents, level.expand(len(labels)), labels)
        both = torch.cat([labels, torch.full_like(labels, self.model.config.num_classes)])
        with_class, without = self.model.predict(noisy_latents.repeat(2, 1, 1), level.expand(len(both)), both).chunk(2)
        return without + guidance_scale * (with_class - without)

    # ---- images

    def _show(self, patches: torch.Tensor, output_type: str):
        return self._output(unpatchify(patches, self.model.config.patch_size, self.model.ldae.grid), output_type)

    def _output(self, pixels: torch.Tensor, output_type: str):
        """(B,C,H,W) in the processor's normalisation, as the user wants them."""
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        pixels = (pixels.float() * std + mean).clamp(0, 1)
        if output_type == "pt":
            return pixels
        pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels

    # ---- what goes together

    def _labels(self, class_labels, guidance_scale: float) -> torch.Tensor | None:
        """(B,) int64 on the device, or None for "no class"."""
        num_classes = self.model.config.num_classes
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale={guidance_scale} must be 0 or more, and finite.")
        if num_classes is None and (class_labels is not None or guidance_scale != 1):
            asked = f"guidance_scale={guidance_scale}" if class_labels is None else "class_labels"
            raise ValueError(f"This model was trained without class labels (num_classes=None): leave {asked} out.")
        if class_labels is None:
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale} guides towards classes: give class_labels.")
            return None
        labels = torch.as_tensor(class_labels, device="cpu").reshape(-1)
        if labels.is_floating_point() or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
            given = sorted(set(labels.tolist()))
            raise ValueError(f"class_labels must be integers in 0 ... {num_classes - 1}, not {given}.")
        return labels.long().to(self._execution_device)

    def _step_options(self, eta: float, generator: Generators) -> dict:
        """Those of the two that the scheduler's step takes.

        Raises:
            ValueError: its noise is not the model's, or it leaves no choice of eta.
        """
        scheduler, own = self.scheduler, LDAEScheduler.for_model(self.model.config)
        if not own.agrees_with(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} has other levels of noise than the model, clips, or reads answers as "
                f"something else; make one with LDAEScheduler.for_model(pipeline.model.config), and of diffusers' own "
                f"with its to_stock({type(scheduler).__name__})."
            )
        taken = signature(scheduler.step).parameters
        if eta and "eta" not in taken:
            raise ValueError(f"{type(scheduler).__name__} leaves no choice of eta={eta}; leave it out.")
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in taken}


def check_index(folder: Path) -> None:
    """Raises ValueError unless a folder's model_index.json names the parts of this pipeline and no others."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        named = {name: part for name, part in index.items() if not name.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} holds no pipeline: its model_index.json cannot be read ({error}).") from error
    missing_vae = named.get("vae", [None, None]) == [None, None]
    expected = {name: part for name, part in PARTS.items() if name != "vae" or not missing_vae}
    stock = named.get("scheduler")
    if isinstance(stock, list) and len(stock) == 2 and stock[0] == "diffusers" and is_scheduler(stock[1]):
        expected["scheduler"] = stock
    if {name: part for name, part in named.items() if name != "vae" or not missing_vae} != expected:
        raise ValueError(f"{folder / 'model_index.json'} names other parts than LDAEPipeline has ({', '.join(PARTS)}).")


def is_scheduler(name: object) -> bool:
    """Whether diffusers has a scheduler of this name."""
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return isinstance(found, type) and issubclass(found, SchedulerMixin)


def check_output_type(output_type: str) -> None:
    """Raises ValueError for one that there is not."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")


__all__ = ["LDAEDenoisingOutput", "LDAEPipeline"]
