"""The transformers models: `OpenVision3VisionModel`, which is also a tower for LLaVA, and the dual encoder `OpenVision3Model`.

They are our own modules under other names; nothing is computed anew. The VAE stays in fp32 whatever dtype the model is loaded in, and has no decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from openvision3.adapters.parts import STRIDE, make_vae, precision
from openvision3.adapters.transformers_config import OpenVision3Config, OpenVision3VisionConfig
from openvision3.model.encoder import Encoder, EncoderConfig
from openvision3.model.transformer import Attention, init_weights
from openvision3.model.understanding import TextEncoder, TextEncoderConfig, at_class_token, temperature


class OpenVision3PreTrainedModel(PreTrainedModel):
    """What both models share: how fresh weights are drawn, and that the VAE stays in fp32."""

    config_class: Any = OpenVision3Config
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["vae"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        own = [*module.parameters(recurse=False), *(module.qkv.parameters() if isinstance(module, Attention) else ())]
        if all(getattr(parameter, "_is_hf_initialized", False) for parameter in own):
            return  # loaded: transformers calls this for every module
        if isinstance(module, OpenVision3Model):
            module.log_temperature.fill_(LOG_TEMPERATURE)
        elif not isinstance(module, Encoder | TextEncoder):
            init_weights(module)
        elif not any(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
            module.init_weights()
        else:  # a file without this one tensor, of which transformers warns
            nn.init.normal_(own[0], std=0.02)


LOG_TEMPERATURE = 2.6592600369327779
"""log(1 / 0.07), with which training starts"""


class OpenVision3VisionModel(OpenVision3PreTrainedModel):
    """Images -> tokens, as a vision tower."""

    config_class = OpenVision3VisionConfig
    base_model_prefix = "vision_model"
    """so that it also loads from a saved dual encoder"""

    def __init__(self, config: Any):
        super().__init__(config)
        vae = make_vae(config.vae_settings, config.vae_shift, config.vae_origin, decoder=False)
        self.encoder = Encoder(EncoderConfig(**config.encoder_settings), vae.latent_channels)  # first: `dtype` is that of the first parameter
        self.vae = vae
        self.post_init()

    @property
    def patch_size(self) -> int:
        return STRIDE

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patchify

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, return_dict: bool | None = None, **_: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """pixel_values (B, 3, H, W) in [-1, 1], H and W multiples of 16 -> last_hidden_state (B, N, D), the tokens; pooler_output (B, E), not normalised.

        `output_hidden_states` also returns hidden_states, each (B, N, D) without the class token: what enters the first block, what each block returns, and
        in the place of the last block the tokens (normalised, and summed over blocks where the encoder does so). LLaVA passes a layer's index here.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        layers: list[Tensor] | None = [] if wanted is not None and wanted is not False else None
        with precision(self.device, self.dtype):
            tokens, pooled = self.encoder(self.vae.encode(pixel_values), layers)
        dtype = self.dtype
        tokens = tokens.to(dtype)
        states = None if layers is None else (*(state.to(dtype) for state in layers[:-1]), tokens)
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled.to(dtype), hidden_states=states)
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()


@dataclass
class OpenVision3Output(ModelOutput):
    """What OpenVision3Model returns: embeddings are unit vectors (B, E), logits their cosines times the learned temperature."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


class OpenVision3Model(OpenVision3PreTrainedModel):
    """Images and texts -> embeddings of one space: the encoder, its pooling, and the text encoder."""

    input_modalities = ("image", "text")

    def __init__(self, config: Any):
        super().__init__(config)
        self.vision_model = OpenVision3VisionModel(config.vision_config)
        self.text_encoder = TextEncoder(TextEncoderConfig(**config.text_settings), config.vocab_size, config.projection_dim, config.pad_token_id)
        self.log_temperature = nn.Parameter(torch.full((1,), LOG_TEMPERATURE))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.embedding

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        """pixel_values (B, 3, H, W) -> tokens as last_hidden_state, the embedding (B, E) as pooler_output, not normalised."""
        return self.vision_model(pixel_values, **options | {"return_dict": True})

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        """input_ids (B, T) of the tokenizer -> features of all pieces as last_hidden_state, the embedding (B, E) as pooler_output, not normalised."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)
        with precision(self.device, self.dtype):
            words, seen = self.text_encoder.words(input_ids)
            pooled = self.text_encoder.projection(at_class_token(words, seen))
        return BaseModelOutputWithPooling(last_hidden_state=words.to(self.dtype), pooler_output=pooled.to(self.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> OpenVision3Output | BaseModelOutputWithPooling | tuple:
        """Embeddings of images and texts, and the logits of all pairs. `return_loss` adds the contrastive loss, where row i of both belongs together.

        Of images or texts alone it returns what `get_image_features` and `get_text_features` do: the pipelines for feature extraction give one of them.

        Raises:
            ValueError: neither images nor texts, or `return_loss` without both.
        """
        use_dict = self.config.return_dict if return_dict is None else return_dict
        if input_ids is None or pixel_values is None:
            if return_loss or (input_ids is None and pixel_values is None):
                raise ValueError("pixel_values or input_ids are missing: give one of them for features, and both for logits and the loss")
            alone = self.get_image_features(pixel_values, **options) if input_ids is None else self.get_text_features(input_ids, attention_mask)  # type: ignore[arg-type]
            return alone if use_dict else alone.to_tuple()
        images, texts = self.get_image_features(pixel_values, **options), self.get_text_features(input_ids, attention_mask)
        image_embeds, text_embeds = (F.normalize(pooled.float(), dim=-1) for pooled in (images["pooler_output"], texts["pooler_output"]))
        logits = temperature(self.log_temperature) * image_embeds @ text_embeds.T
        loss = None
        if return_loss:
            rows = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        output = OpenVision3Output(loss, logits, logits.T, text_embeds, image_embeds, texts, images)
        return output if use_dict else output.to_tuple()
