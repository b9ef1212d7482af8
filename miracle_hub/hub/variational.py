"""Variational models as users make them, and the small files and repositories they become."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from miracle_hub.codec.compress import Report, compress_folder
from miracle_hub.codec.decompress import load_state_dict
from miracle_hub.codec.folder import temporary_beside
from miracle_hub.codec.network import (
    STREAM,
    decode_stream_entry,
    encode_stream_entry,
    read_network,
    spec_of,
    write_network,
)
from miracle_hub.codec.tensor import decode_payload, payload_of_stream
from miracle_hub.errors import ChecksumError, FormatError, OptionError
from miracle_hub.format.container import writing
from miracle_hub.format.network import NetworkHeader, TensorSpec, decode_network
from miracle_hub.format.payload import decode_header, is_payload
from miracle_hub.hub.card import write_card
from miracle_hub.training import convert
from miracle_hub.training.coder import message_of
from miracle_hub.training.config import VariationalConfig
from miracle_hub.training.targets import matches_any
from miracle_hub.training.variational import Variational, variational_of

if TYPE_CHECKING:
    from miracle_hub.hub.quantizer import MiracleConfig


def make_variational(
    model: nn.Module, config: "MiracleConfig | VariationalConfig | None" = None, **options: Any
) -> nn.Module:
    """Give a model's weights Gaussian posteriors, in place, and return it.

    Make the optimizer after this: the parameters are others. In training mode every forward pass has a draw
    of the weights (the test channel has no noise), in evaluation mode they are the posterior's means.

    Args:
        config: or the same as keywords: `make_variational(model, bits_per_weight=1.0)`.

    Raises:
        OptionError: nothing matches, a parameter cannot be converted, or an option is unknown.
        BudgetError: the budget is below what the code can use.
    """
    if (config is None) == (not options):
        raise OptionError(
            "make_variational: expected either a config or options as keywords; give one of them, such as "
            "bits_per_weight=1.0"
        )
    if config is None:
        config = _from_keywords(options)
    elif not isinstance(config, VariationalConfig):
        config = config.variational()
    return convert.make_variational(model, config)


def _from_keywords(options: dict[str, Any]) -> VariationalConfig:
    known = set(VariationalConfig.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise OptionError(
            f"make_variational: expected options among {', '.join(sorted(known))}, found {unknown[0]!r}; "
            "check the spelling"
        )
    return VariationalConfig(**options)


def save(model: nn.Module, path: str | Path) -> int:
    """Write a coded model as one safetensors file, read it back, and return its bytes.

    With streams="network" the file is for `load` alone; names and shapes are the module's.

    Raises:
        OptionError: the model is not variational, or not coded.
        ChecksumError: what was written does not decode to the model's weights.
        OutputWriteError: the file cannot be written.
    """
    variational, path = variational_of(model), Path(path)
    messages = [message_of(stream) for stream in variational.streams]
    dense = convert.posterior_mean(model)
    coded = {member.name for stream in variational.streams for member in stream.members}
    entries = _coded_entries(variational, messages)
    plain = {name: t for name, t in _stored(dense).items() if name not in coded}

    def check(written: Path) -> None:
        again = read_state(written, dense)
        for name, tensor in _stored(dense).items():
            if not torch.equal(again[name].cpu(), tensor.cpu()):
                raise ChecksumError(
                    f"{path}: {name}: what was written does not decode to the model's weights; report this"
                )

    return write_network(path, entries, plain, check)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Fill a module with the weights of a file that `save` wrote, in place, and return it.

    Raises:
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    state = read_state(Path(path), model)
    with torch.no_grad():
        for name, tensor in _stored(model).items():
            tensor.copy_(state[name])
    return model


def read_state(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module from a file, checked to be all of them and no others.

    Raises:
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    stream, state = read_network(path)
    expected = _stored(model)
    state |= {name: _entry(path, name, state[name], t) for name, t in expected.items() if name in state}
    if stream is not None:
        state |= decode_stream_entry(stream, _specs(expected, state), str(path))
    if set(state) != set(expected):
        raise FormatError(
            f"{path}: expected the tensors of {type(model).__name__}, found one that differs in "
            f"{', '.join(sorted(set(state) ^ set(expected))[:4])}; load it into the module that it was made "
            "from"
        )
    for name, tensor in expected.items():
        _check_shape(path, name, state[name].shape, tensor)
        _check_dtype(path, name, state[name].dtype, tensor.dtype)
    return state


def stream_header(path: Path, model: nn.Module) -> NetworkHeader | None:
    """The header of the stream in a file of `save`; None if the file has no stream.

    Raises:
        FormatError: and its subclasses: the file is not sound, or is that of another module.
    """
    stream, state = read_network(path)
    return None if stream is None else decode_network(stream, _specs(_stored(model), state), str(path))[0]


def _specs(expected: dict[str, Tensor], state: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The tensors of a module that a file's stream holds: those of numbers that have no entry."""
    missing = {name: t for name, t in expected.items() if name not in state and t.is_floating_point()}
    return tuple(spec_of(name, tensor) for name, tensor in missing.items())


def _entry(path: Path, name: str, stored: Tensor, expected: Tensor) -> Tensor:
    """What an entry of a file holds; a payload is decoded once it is known to have the module's shape.

    Raises:
        FormatError: and its subclasses: it is not sound, or has another shape than the module's.
    """
    data = stored.numpy().tobytes() if stored.dtype == torch.uint8 and stored.ndim == 1 else b""
    if not is_payload(data):
        return stored
    _check_shape(path, name, decode_header(data, name)[0].shape, expected)
    return decode_payload(stored, name, rounded=True, backend="cpu")[0]


def _check_dtype(path: Path, name: str, found: torch.dtype, expected: torch.dtype) -> None:
    """Numbers may come in another precision, but whole, real and complex ones are no substitutes."""
    if (found.is_floating_point, found.is_complex) != (expected.is_floating_point, expected.is_complex):
        raise FormatError(
            f"{path}: {name}: expected {expected}, found {found}; load it into the module that it was made "
            "from"
        )


def _check_shape(path: Path, name: str, found: tuple[int, ...], expected: Tensor) -> None:
    if found != tuple(expected.shape):
        raise FormatError(
            f"{path}: {name}: expected shape {tuple(expected.shape)}, found {tuple(found)}; load it into the "
            "module that it was made from"
        )


def compress_model(
    model: nn.Module,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits_per_weight: float | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Write a coded transformers model as a repository that plain `from_pretrained` loads.

    Args:
        size, bits_per_weight: of the whole files; tensors that are not variational are then coded without
            training to meet it. None means that they stay plain.

    Raises:
        OptionError: the model is not coded, or has one stream for the whole network.
        ChecksumError: what was written does not decode to the model's weights.
    """
    variational = variational_of(model)
    if variational.config.streams != "tensor":
        raise OptionError(
            "streams: expected 'tensor' for a repository, found 'network'; use save and load, or "
            "MiracleHubMixin"
        )
    messages = [message_of(stream) for stream in variational.streams]
    payloads = _coded_entries(variational, messages)
    dense: Any = convert.posterior_mean(model)
    out = Path(out).absolute()
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, where the next run finds what a killed one left, and not where the system keeps it.
    with temporary_beside(out) as temporary:
        folder = temporary / out.name
        with writing(folder):
            dense.save_pretrained(folder, save_original_format=False)  # or names are not those of payloads
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        kept = variational.config.modules_to_save
        base = getattr(dense.config, "_name_or_path", None) or None
        base = None if base is None or Path(base).exists() else base
        report = compress_folder(
            folder, out, payloads=payloads, size=size, bits_per_weight=bits_per_weight,
            modules_to_not_convert=[name for name in _stored(dense) if matches_any(name, kept)],
            overwrite=overwrite,
            card=lambda target, report: write_card(target, report, folder, base), progress=progress,
        )  # fmt: skip
    _compare_decoded(out, {name: t for name, t in _stored(dense).items() if name in payloads})
    return report


def _compare_decoded(folder: Path, coded: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ChecksumError: what was written does not decode to the model's weights.
    """
    found = load_state_dict(folder)
    for name, tensor in coded.items():
        if not torch.equal(found[name], tensor.cpu()):
            raise ChecksumError(
                f"{folder}: {name}: what was written does not decode to the model's weights; report this"
            )


def _coded_entries(variational: Variational, messages: list[Tensor]) -> Mapping[str, bytes]:
    """What a file holds of the streams: a payload per tensor, or one entry for all."""
    entries = {}
    for stream, message in zip(variational.streams, messages, strict=True):
        assert stream.fixed_scales is not None
        scales = stream.fixed_scales.cpu()
        if variational.config.streams == "network":
            specs = [
                spec_of(m.name, torch.empty(m.shape, dtype=m.dtype, device="meta"), m.sharing)
                for m in stream.members
            ]
            entries[STREAM] = encode_stream_entry(NetworkHeader(stream.code, tuple(specs)), scales, message)[
                0
            ]
        else:
            member = stream.members[0]
            entries[member.name] = payload_of_stream(member.shape, member.dtype, stream.code, scales, message)
    return entries


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a state dict holds."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}
