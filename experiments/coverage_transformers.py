"""Networks of Hugging Face's transformers: small members, random, from configs.

Their widths and depths are those of the smallest published members or halves of them,
so that the layer that reads the image has a share of the MACs as it has in practice.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Plain vision transformers, with the width and heads of ViT-Tiny and half its depth.
PLAIN: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 64,
    "patch_size": 8,
}
RESNET18: dict[str, Any] = {
    "layer_type": "basic",
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
}


def names() -> list[str]:
    """The networks' names, small ones first."""
    return list(BUILDERS)


def build(name: str) -> nn.Module:
    """A network with random weights.

    Args:
        name: One of `names`.
    """
    # Imported here, since it takes seconds that the other families needn't wait for.
    import transformers

    return BUILDERS[name](transformers)


def image_size(model: Any) -> int:
    """Height and width of a network's input.

    Args:
        model: One of these networks.
    """
    size = getattr(model.config, "image_size", None)
    return size if isinstance(size, int) else 64


class BoxesOnly(nn.Module):
    """DETR with the outputs that its users read, without its hidden states."""

    def __init__(self, detr: nn.Module):
        super().__init__()
        self.detr = detr
        self.config = detr.config

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and boxes of all queries."""
        output = self.detr(pixel_values=x)
        return output.logits, output.pred_boxes


def _plain(hf: Any, kind: str, **options: Any) -> nn.Module:
    """A classifier that is built as ViT is.

    Args:
        hf: The library.
        kind: How the library's classes begin.
        options: Of its config, beside `PLAIN`.
    """
    config = getattr(hf, f"{kind}Config")(**PLAIN, **options)
    return getattr(hf, f"{kind}ForImageClassification")(config)


def _swin(hf: Any) -> nn.Module:
    config = hf.SwinConfig(
        image_size=128,
        embed_dim=48,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=4,
    )
    return hf.SwinForImageClassification(config)


def _convnext(hf: Any) -> nn.Module:
    config = hf.ConvNextConfig(
        image_size=64, hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2]
    )
    return hf.ConvNextForImageClassification(config)


def _detr(hf: Any) -> nn.Module:
    """DETR on a ResNet-18, with half of its layers."""
    config = hf.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=hf.ResNetConfig(**RESNET18, out_features=["stage4"]),
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
    )
    return hf.DetrForObjectDetection(config)


BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "vit": lambda hf: _plain(hf, "ViT"),
    "deit": lambda hf: _plain(hf, "DeiT"),
    "dinov2": lambda hf: _plain(hf, "Dinov2"),
    "beit": lambda hf: _plain(hf, "Beit"),
    "beit_relative": lambda hf: _plain(hf, "Beit", use_relative_position_bias=True),
    "convnext": _convnext,
    "segformer": lambda hf: hf.SegformerForSemanticSegmentation(hf.SegformerConfig()),
    "segformer_classifier": lambda hf: hf.SegformerForImageClassification(
        hf.SegformerConfig()
    ),
    "swin": _swin,
    "resnet": lambda hf: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET18)),
    "detr": _detr,
    "detr boxes only": lambda hf: BoxesOnly(_detr(hf)),
}
