"""Loading that never invents weights, opens no pickle, and allocates no more than the files can fill."""

import math

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel


COUNTERS = "num_batches_tracked"  # of a BatchNorm: the only integer among the weights


class SafeLoading:
    """`from_pretrained` of l-DAE's models; stands before `PreTrainedModel` among their bases."""

    _keys_that_may_be_new: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = True,
        **kwargs,
    ):
        """As [`~transformers.PreTrainedModel.from_pretrained`], but weights are loaded or the call fails, and from
        safetensors only.

        Raises:
            ValueError: the checkpoint lacks weights of this class (only a classifier's head may be new, and one of
                another shape only with `ignore_mismatched_sizes=True`), is damaged, or names a pickle.
            OSError: there is no configuration, or there are no weights in safetensors.
        """
        if use_safetensors is False:
            raise ValueError("Weights are read from safetensors only, never from a pickle; leave use_safetensors out.")
        kwargs |= dict(output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} are damaged ({error}); copy or download them again."
            ) from error
        except OSError as error:
            if "no file named" not in str(error) and "with `safetensors`" not in str(error):
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} holds no model.safetensors; weights are read from no other format, "
                "and a pickle (pytorch_model.bin) is never opened."
            ) from error
        missing, mismatched = set(info["missing_keys"]), {key for key, *_ in info["mismatched_keys"]}
        head = {key for key in model.state_dict() if key.startswith(cls._keys_that_may_be_new)}
        new = head if head <= missing else set()  # a part of a head is a damaged head
        new |= head & mismatched if ignore_mismatched_sizes else set()
        lacking = sorted((missing | mismatched) - new)
        if lacking:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold all weights of {cls.__name__}: {len(lacking)} are "
                f"missing or have another shape, the first is {lacking[0]!r}; load the class and the configuration "
                "that were saved (an encoder has no decoder), or train one."
            )
        schedule = model.base_model.schedule  # its tables follow the configuration, even if noise_schedule was changed
        for table, value in zip((schedule.gammas, schedule.sigmas), schedule.tables(), strict=True):
            table.copy_(value)
        return (model, info) if output_loading_info else model

    def _apply(self, fn, recurse=True):
        """What `to(dtype)`, `half()` and their like go through, of this module or of one around it: the parts in
        `_keep_in_fp32_modules_strict` are never rounded to less than fp32, as `from_pretrained(dtype=...)` has it."""
        parts = [part for name, part in self.named_children() if name in self._keep_in_fp32_modules_strict]
        kept = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}

        def convert(tensor):
            moved = fn(tensor)
            rounded = id(tensor) in kept and moved.dtype != tensor.dtype and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if rounded else moved

        return super()._apply(convert, recurse)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        """transformers calls this when the model stands on the meta device and nothing is allocated yet."""
        files, held = checkpoint_files or (), 0
        quantized = getattr(model.config, "quantization_config", None) is not None
        for file in files:
            if not str(file).endswith(".safetensors"):  # an index can name any file
                raise ValueError(f"{file} is not a safetensors file; weights are never read from a pickle.")
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():
                    tensor = tensors.get_slice(key)
                    held += math.prod(tensor.get_shape())
                    if not (tensor.get_dtype().startswith(("F", "BF")) or key.endswith(COUNTERS) or quantized):
                        raise ValueError(f"{key} in {file} is of the type {tensor.get_dtype()}, not floating-point.")
        sizes = {key: value.numel() for key, value in model.state_dict().items()}
        needed = sum(size for key, size in sizes.items() if not key.startswith(model._keys_that_may_be_new))
        # What is missing would be allocated and drawn before it is found missing; a few layers may, a giant may not.
        if files and not quantized and needed > 4 * held:
            raise ValueError(
                f"The configuration describes a model of {needed} values, but the weights beside it hold {held}; load "
                "the configuration that was saved with them."
            )
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
