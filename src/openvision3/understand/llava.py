"""Our tower, a projector and a language model as transformers' LLaVA-1.5 or LLaVA-NeXT, and that as a trainable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from openvision3 import distributed
from openvision3.data.crops import PATCH
from openvision3.model.losses import caption_loss
from openvision3.pipeline import Pipeline
from openvision3.understand.prompts import Prompts
from openvision3.understand.tiles import ImageLayout

PROJECTOR, NEWLINE, LANGUAGE = "model.multi_modal_projector.", "model.image_newline", "model.language_model."
"""where the trained parts stand in transformers' classes"""


class Connection(Protocol):
    """The settings of `connect`: those of a training or of a saved chat model."""

    size: int
    anyres: bool
    layer: int
    train_language: Any
    lora_rank: int
    lora_alpha: float


def connect(settings: Connection, pipeline: Pipeline, language: nn.Module, prompts: Prompts, seed: int = 0) -> Any:
    """A LlavaForConditionalGeneration, or with `anyres` a LlavaNextForConditionalGeneration, around the opened parts.

    The projector (two layers with a GELU between them) and what LoRA adds are drawn from `seed`. What `train_language` says and the projector are
    trained, everything else is frozen.

    Raises:
        ValueError: a layer that the tower does not have; LoRA without peft.
    """
    import transformers

    from openvision3.adapters.transformers import register, vision_model

    register()
    tower = vision_model(pipeline).requires_grad_(False)
    check_tower(tower, settings)
    _give_token(language, prompts.image_id)
    layout = ImageLayout(settings.size, settings.anyres)
    kind = "LlavaNext" if settings.anyres else "Llava"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=prompts.image_id,
        image_seq_length=(settings.size // PATCH) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=settings.layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language.get_output_embeddings().weight is language.get_input_embeddings().weight,  # type: ignore[operator]
        **({"image_grid_pinpoints": layout.pinpoints} if settings.anyres else {}),
    )
    config.vision_config.image_size = settings.size
    with torch.device("meta"):
        network = _class_for(language, getattr(transformers, f"{kind}ForConditionalGeneration"))(config)
    network.model.vision_tower, network.model.language_model = tower, language.base_model
    network.lm_head = language.get_output_embeddings()  # type: ignore[operator]
    network.generation_config = language.generation_config
    torch.manual_seed(seed)
    projector = network.model.multi_modal_projector.to_empty(device="cpu")
    for layer in (projector.linear_1, projector.linear_2):
        layer.reset_parameters()
    if settings.anyres:
        width = projector.linear_2.out_features
        network.model.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))
    _choose_trained(network, settings)
    return network.eval()


def _class_for(language: Any, llava: Any) -> type:
    """transformers' class, which knows where the word embedding is: it looks for Llama's, and Bloom, whose head shares it too, has another name for it."""
    embedding = language.get_input_embeddings()
    place = next(name for name, module in language.base_model.named_modules() if module is embedding)
    tied = {"lm_head.weight": f"{LANGUAGE}{place}.weight"}

    def save_pretrained(self, folder, state_dict=None, **options):
        """As transformers', which would write the additions of LoRA under names that it cannot open."""
        llava.save_pretrained(self, folder, state_dict=merged(self) if state_dict is None else state_dict, **options)

    return type(llava.__name__, (llava,), {"_tied_weights_keys": tied, "__module__": llava.__module__, "save_pretrained": save_pretrained})


def check_tower(tower: Any, settings: Connection) -> None:
    """Raises ValueError where the tower has no such layer, or gives another number of tokens than an image has in its conversation."""
    with torch.no_grad():
        states = tower(torch.zeros(1, 3, settings.size, settings.size), output_hidden_states=True).hidden_states
    if not -len(states) <= settings.layer < len(states):
        raise ValueError(f"layer {settings.layer}: the tower has {len(states) - 1} blocks; choose one of {-len(states)} to {len(states) - 1}")
    wanted, seen = (settings.size // PATCH) ** 2, states[settings.layer].shape[1]
    if seen != wanted:
        raise ValueError(f"the tower gives {seen} tokens for an image of {settings.size} px, and {wanted} stand in its conversation; choose another --layer")


def _give_token(language: Any, token: int) -> None:
    """A row of zeros in the word embedding for the image token, whose place the image takes, if there is none to spare."""
    rows = language.get_input_embeddings().weight.shape[0]
    if token < rows:
        return
    language.resize_token_embeddings(token + 1, mean_resizing=False)
    with torch.no_grad():
        for part in (language.get_input_embeddings(), language.get_output_embeddings()):
            part.weight[rows:] = 0


def _choose_trained(network: Any, settings: Connection) -> None:
    network.requires_grad_(False)
    if settings.train_language == "lora":
        add_lora(network.model.language_model, settings)
    elif settings.train_language == "full":
        for part in (network.model.language_model, network.lm_head):
            part.requires_grad_(True)
    network.model.multi_modal_projector.requires_grad_(True)
    if settings.anyres:
        network.model.image_newline.requires_grad_(True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_lora(language: nn.Module, settings: Connection) -> None:
    """Low-rank additions (arXiv 2106.09685) to every linear layer; at first they add nothing."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("train_language lora needs peft, which is not installed; pip install 'openvision3[chat]'") from error
    inject_adapter_in_model(LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear"), language)  # type: ignore[arg-type]
    for name, parameter in language.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network, the additions of LoRA put into the matrices that they are added to."""
    state = network.state_dict()
    for name, layer in network.named_modules():
        if hasattr(layer, "get_delta_weight"):
            own = {part: state.pop(part) for part in list(state) if part.startswith(f"{name}.")}
            base = {part.replace(".base_layer.", "."): value for part, value in own.items() if ".base_layer." in part}
            weight = base[f"{name}.weight"]
            state |= base | {f"{name}.weight": weight + layer.get_delta_weight("default").to(weight.dtype)}  # type: ignore[operator]
    return state


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """{name: parameter} of what is trained, each parameter once."""
    return {_plain(name): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


class Llava(nn.Module):
    """transformers' network as a trainable. Dropout of the language model is off: a run has no draw that is not a function of a key.

    A batch has `input_ids` and `attention_mask` (B, T); `answer_positions` (M,), the places in B x T after which a word of an answer follows, and
    `answer_ids` (M,), these words; `pixel_values` (P, 3, S, S) in [-1, 1] and `image_sizes` (I, 2), (height, width) of the I images before they were cut.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> Llava:
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(this rank's share of the mean loss of all words of answers in the global batch, {})."""
        count = batch["count"] if "count" in batch else distributed.total(_count(batch))
        head = self.network.lm_head
        loss = caption_loss(self.features(batch), head.weight, head.bias, batch["answer_ids"], count)
        if not len(batch["pixel_values"]):  # the projector has a gradient in every process, as gradients are averaged
            loss = loss + 0.0 * sum(p.sum() for name, p in trained_tensors(self.network).items() if name.startswith((PROJECTOR, NEWLINE)))
        return loss, {}

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """(M, W): what each word of an answer is predicted from."""
        seen: dict[str, Tensor] = {}
        if len(batch["pixel_values"]):
            seen["pixel_values"] = batch["pixel_values"]
            if self.network.config.model_type == "llava_next":
                seen["image_sizes"] = batch["image_sizes"]
        out = self.network.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **seen)
        return out.last_hidden_state.flatten(0, 1)[batch["answer_positions"]]

    def prepare(self, batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches of one step, each with the number of words of answers in all of them."""
        kept = list(batches)
        count = distributed.total(torch.stack([_count(batch) for batch in kept]).sum())
        return [batch | {"count": count} for batch in kept]


def _count(batch: dict[str, Tensor]) -> Tensor:
    return batch["answer_ids"].new_full((), len(batch["answer_ids"]))
