"""Write a program as a separate model: a Hugging Face folder with the layers it visits, in its order.

Loaded with transformers or another server, the folder computes what the engine computes under that program. Knows
folders, weights and configurations; the program only as a list of layers.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_sdk.errors import ExportError, FolderError, FolderExistsError
from polar_sdk.models.convert import LOADING_LOCK, quiet_transformers
from polar_sdk.models.fingerprint import mark_source
from polar_sdk.models.network import bringer, read_network

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from polar_sdk.engine.types import AttentionKind
    from polar_sdk.programs.program import Program
    from polar_sdk.serving.loaded import LoadedModel


def export(loaded: LoadedModel, program: Program, folder: str | Path, *, force: bool = False) -> Path:
    """Write a program as a model folder; it appears whole or not at all.

    The weights are those of the model's files, or of the adopted model, in their own dtype, whatever precision this
    process runs them in.

    Args:
        loaded: The model.
        program: Visits every layer at most once, in any order, without bridges or damping.
        folder: Where to write it; its parents are created.
        force: Replace a model that is stored there already.

    Returns:
        The folder.

    Raises:
        ExportError: No plain model computes what the program does, or the adopted model is gone.
        FolderExistsError: Something is stored there already.
        FolderError: The folder cannot be written.
    """
    layers = plain_layers(program)
    target = Path(folder).absolute()
    _check_target(target, loaded, force=force)
    with LOADING_LOCK, quiet_transformers():
        model = cut(_source(loaded), layers)
        with _whole_folder(target) as draft:
            model.save_pretrained(draft)
            loaded.tokenizer.save_pretrained(draft)
            if program.is_identity(loaded.decoder.depth):  # maps that were fitted on the model fit what was written
                mark_source(draft, loaded.fingerprint)
    return target


def cut(source: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of some layers of another, in that order; the weights are shared, the source is not changed.

    Raises:
        ExportError: An option of the configuration depends on the position of a layer, so that a layer at another
            position would compute something else.
    """
    import torch

    from polar_sdk.engine.families import find_family

    config = _config(source.config, layers)
    kinds = find_family(source.config).kinds
    if list(map(_function, find_family(config).kinds)) != [_function(kinds[layer]) for layer in layers]:
        raise ExportError(
            f"architecture {config.model_type!r} with these options computes something else in a layer at another "
            "position, so the program cannot be a model of its own.",
            hint="Export a program that skips only the last layers, or run it in the engine.",
        )
    with torch.device("meta"):
        model: PreTrainedModel = type(source)(config)
    model.load_state_dict(_renamed(source, layers), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model


def plain_layers(program: Program) -> tuple[int, ...]:
    """The layers of a program that a plain model can stand for.

    Raises:
        ExportError: None can.
    """
    if program.bridges:
        first, last = program.bridges[0]
        raise _no_export(
            program, f"crosses layers {first} to {last} by a bridge", "use a program that skips them instead"
        )
    for first, last in program.fills:
        raise _no_export(program, f"fills layers {first} to {last}", "use a program whose layers run for all tokens")
    for step in program.steps:
        if step.parts != 1:
            raise _no_export(program, f"visits layer {step.first} damped", "use a program without damped visits")
    layers = program.layers
    for layer in layers:
        if (count := layers.count(layer)) > 1:
            raise _no_export(
                program, f"visits layer {layer} {count} times", "use a program that visits each layer once"
            )
    return layers


def _no_export(program: Program, reason: str, fix: str) -> ExportError:
    return ExportError(f"program {program.text!r} {reason}, which no plain model can do; {fix}.")


def _function(kind: AttentionKind) -> tuple[Any, ...]:
    """The arithmetic of a kind of attention; the number of its rotary table may differ between two models."""
    return kind.scale, kind.window, kind.softcap


def _config(config: Any, layers: Sequence[int]) -> Any:
    """The configuration for these layers."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    depth = text.num_hidden_layers
    sparse = _sparse_layers(text, depth)
    text.num_hidden_layers = len(layers)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = [text.layer_types[layer] for layer in layers]
    if sparse is not None:
        text.decoder_sparse_step = 1
        text.mlp_only_layers = [position for position, layer in enumerate(layers) if layer not in sparse]
    return changed


def _sparse_layers(config: Any, depth: int) -> set[int] | None:
    """Layers with experts where only some have them; None if the configuration does not choose."""
    if getattr(config, "mlp_only_layers", None) is None:
        return None
    step = config.decoder_sparse_step
    return {layer for layer in range(depth) if layer not in config.mlp_only_layers and (layer + 1) % step == 0}


def _renamed(source: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """Weights of the source by their names in the model of these layers."""
    from polar_sdk.engine.families import find_family

    stem = _stem(source, find_family(source.config).layer_modules(source))
    positions = {layer: position for position, layer in enumerate(layers)}
    renamed: dict[str, Tensor] = {}
    for name, value in source.state_dict().items():
        if not name.startswith(stem):
            renamed[name] = value
            continue
        layer, _, rest = name.removeprefix(stem).partition(".")
        if int(layer) in positions:
            renamed[f"{stem}{positions[int(layer)]}.{rest}"] = value
    return renamed


def _stem(source: PreTrainedModel, modules: Sequence[nn.Module]) -> str:
    """The prefix of the names of the layers' weights, such as `model.layers.`."""
    name: str = next(name for name, module in source.named_modules() if module is modules[0])
    return name.removesuffix("0")


def _source(loaded: LoadedModel) -> PreTrainedModel:
    """The model as transformers knows it: the adopted one, or read again from its files."""
    if loaded.adopted is not None:
        adopted = loaded.adopted()
        if adopted is None:
            raise ExportError(
                f"the weights of {loaded.name!r} are not available: the transformers model they came from is gone.",
                hint="Keep that model while you export, or load the model with from_pretrained.",
            )
        return adopted
    if any(file.suffix == ".gguf" for file in loaded.weights):
        import torch

        network = read_network(loaded.path, loaded.weights)
        bring = bringer(network, loaded.name, torch.bfloat16, threading.Event())
        bring(list(network.parameters()), torch.device("cpu"))
        return network
    from transformers import AutoModelForCausalLM

    source: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        loaded.path, dtype="auto", local_files_only=True, use_safetensors=True
    )
    return source


def _check_target(target: Path, loaded: LoadedModel, *, force: bool) -> None:
    if loaded.adopted is None and target.resolve() == loaded.path.resolve():
        raise FolderExistsError(f"{str(target)!r} is the folder of the model itself; choose another one.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "config.json").is_file():
        raise FolderExistsError(f"{str(target)!r} exists and is not a model folder; choose another one.")
    if not force:
        raise FolderExistsError(
            f"{str(target)!r} contains a model already; choose another folder, or replace it with force (--force)."
        )


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A draft beside the target that replaces it when the block succeeds, and is removed otherwise.

    Raises:
        FolderError: The disk is full, or nothing may be written there.
    """
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
            draft = Path(work) / "new"
            draft.mkdir()
            yield draft
            _put_in_place(draft, target, Path(work) / "old")
    except (OSError, SafetensorError) as error:
        room = shutil.disk_usage(_nearest(target)).free
        raise FolderError(
            f"{str(target)!r} cannot be written ({' '.join(str(error).split())}; {room / 1e6:,.0f} MB are free there); "
            "nothing was left behind: free some space, or choose another folder."
        ) from error


def _put_in_place(draft: Path, target: Path, old: Path) -> None:
    replaced = target.exists()
    if replaced:
        target.replace(old)
    try:
        draft.replace(target)
    except OSError:
        if replaced:
            old.replace(target)
        raise


def _nearest(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    return next(folder for folder in [path, *path.parents] if folder.is_dir())
