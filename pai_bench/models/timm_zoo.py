"""The models of timm, untrained."""

from typing import Any

from torch import nn

from pai_bench.core import Shape
from pai_bench.errors import ConfigError


def timm_model(input_shape: Shape, num_classes: int, *, architecture: str, options: dict[str, Any]) -> nn.Module:
    """A timm model with timm's own initialization.

    Args:
        options: further keyword arguments of the model. An example is {zero_init_last: false}. By default timm sets the
            last batch norm of a residual block to zero, and then scores get no signal through the block.

    Raises:
        ConfigError: timm is not installed or has no such model, or the model refuses the options.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ConfigError(
            f"model=timm model.name={architecture}: timm is not installed: pip install timm, or choose another model"
        ) from error
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture.split('.')[0]}*")[:5]) or "see timm.list_models()"
        raise ConfigError(f"model.name={architecture}: timm has no such model; near it: {near}")
    # Transformers are built for one image size; convolutional networks accept any size.
    known = timm.get_pretrained_cfg(architecture)
    if known is not None and known.fixed_input_size:
        options = {"img_size": input_shape[1:], **options}
    try:
        model: nn.Module = timm.create_model(
            architecture, pretrained=False, num_classes=num_classes, in_chans=input_shape[0], **options
        )
    except MemoryError:
        raise
    except Exception as error:  # what a model says of options that it does not know, or cannot build
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ConfigError(f"model.options={options}: {architecture} refuses them ({said}); give others") from error
    return model
