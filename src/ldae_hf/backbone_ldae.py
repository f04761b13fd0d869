"""The encoder as a backbone: feature maps at chosen depths for detection, segmentation and depth models."""

import torch
import torch.nn.functional as F
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_ldae import LDAEConfig
from .modeling_ldae import LDAEModel


class LDAEBackbone(BackboneMixin, LDAEModel):
    """The weights of [`LDAEModel`], giving feature maps (B,D,H/p,W/p) in place of tokens (B,N,D).

    Stage `stem` is what enters the first block and `stage1`, `stage2`, … is what leaves each; `out_features` or
    `out_indices`, of the configuration or given to `from_pretrained`, choose among them, by default the last. All have
    one resolution: a pyramid needs a neck that resizes them.
    """

    def __init__(self, config: LDAEConfig):
        if config.out_features is None:
            config.set_output_features_output_indices(None, None)
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(self.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Feature maps of images (B,C,H,W), H and W multiples of the patch size.

        Further arguments (`timesteps`, `noise`, `output_hidden_states`, …) go to [`LDAEModel`].

        Returns:
            `feature_maps`, one (B,D,H/p,W/p) for each chosen stage, layer-normalised without parameters as
            `last_hidden_state` is; on request `hidden_states` and `attentions`.

        Raises:
            ValueError: wrong image shape or type.
        """
        # By its name: the mixin, which comes before it, has a `forward` of its own.
        outputs = LDAEModel.forward(self, pixel_values, return_dict=True, **kwargs)
        grid = self.grid_of(pixel_values)
        feature_maps = tuple(
            F.layer_norm(
                hidden_state[:, self.global_tokens.count :], hidden_state.shape[-1:], eps=self.config.layer_norm_eps
            )
            .transpose(1, 2)
            .unflatten(2, grid)
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(feature_maps, outputs.hidden_states, outputs.attentions)


__all__ = ["LDAEBackbone"]
