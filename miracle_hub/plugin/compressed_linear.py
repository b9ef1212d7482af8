"""Linear layers that hold a payload instead of a weight.

The payload is a buffer, so that moving, saving and loading a model treat it as any other tensor. It is
not called "weight": code around models (accelerate's, for one) reads a tensor by the name of its buffer
and writes back what it read, which must be the bytes. `weight` is a property that decodes.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from miracle_hub.codec import payloads as codecs
from miracle_hub.codec.packed import packed_linear, packed_matmul
from miracle_hub.codec.payloads import Packed
from miracle_hub.codec.repository import payloads_digest
from miracle_hub.codec.stored import decode_sum, payload_at
from miracle_hub.errors import OptionError

PAYLOAD = "payload"
_REFUSED = ("half", "float")
_Function = TypeVar("_Function", bound=Callable)


def _uncompiled(function: _Function) -> _Function:
    """torch.compile breaks its graph here: decoding is no torch operation."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class DecodedWeight(Tensor):
    """A decoded copy: what is written to its `.data`, as merging an adapter would, is refused, not lost."""

    # Results of operations are ordinary tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def _refuse(self, value: Tensor) -> NoReturn:
        raise OptionError(
            "weight: expected no change to the weight of a compressed layer, found an assignment to its "
            ".data, which is a decoded copy; call model.dequantize() first"
        )

    data = property(Tensor.data.__get__, _refuse)  # pyright: ignore


class CompressedLayer(nn.Module):
    """What compressed layers share; put before the class whose place they take."""

    payload: Tensor
    bias: Tensor | None

    def _hold(self, original: nn.Module, name: str, n_bytes: int, dtype: torch.dtype, backend: str) -> None:
        """Take over an unloaded layer; the payload of `n_bytes` bytes is still to come."""
        nn.Module.__init__(self)
        self.train(original.training)
        self.weight_name, self.backend = f"{name}.weight", backend
        self.weight_shape = tuple(original.weight.shape)  # pyright: ignore[reportArgumentType]
        self.register_buffer(PAYLOAD, torch.empty(n_bytes, dtype=torch.uint8, device="meta"))
        # Its dtype is the layer's: whatever casts a model casts this, and leaves the bytes alone.
        self.register_buffer("_cast", torch.empty(0, dtype=dtype, device="meta"), persistent=False)
        self.register_parameter("bias", original.bias)  # pyright: ignore[reportArgumentType]
        self._parsed: tuple | None = None
        # While a model is loaded its layers' weights are read many times, to be initialized.
        self.is_loaded = False
        self._is_hf_initialized = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoded weight."""
        return self._cast.dtype  # pyright: ignore[reportReturnType]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The decoded weight, a new tensor each time, in the layer's dtype and on its device.

        Raises:
            FormatError: and its subclasses: the payload is not sound.
        """
        weight = self._decoded().as_subclass(DecodedWeight)
        weight._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        return weight

    @_uncompiled
    def _decoded(self) -> Tensor:
        if not self.is_loaded or self.payload.is_meta:
            return torch.empty(self.weight_shape, dtype=self.dtype, device="meta")
        with torch.no_grad():
            return self.packed().dense().to(self.payload.device)

    def packed(self) -> Packed:
        """The payload, parsed again only if the buffer was changed, moved or cast.

        Raises:
            FormatError: and its subclasses: the payload is not sound.
            OptionError: the payload's shape is not the layer's.
        """
        payload = self.payload
        version = None if payload.is_inference() else payload._version
        key = (payload.data_ptr(), version, payload.device, self.dtype, self.backend)
        if self._parsed is None or self._parsed[0]() is not payload or self._parsed[1] != key:
            packed = payload_at(payload, self.weight_name).packed(self.dtype, self.backend)
            if packed.shape != self.weight_shape:
                raise OptionError(
                    f"{self.weight_name}: expected a payload of shape {self.weight_shape}, found "
                    f"{packed.shape}; load the state dict of a model of this architecture"
                )
            self._parsed = (weakref.ref(payload), key, packed)
        return self._parsed[2]

    def finish_loading(self) -> None:
        """The payload is there: from now on `weight` decodes. What is not sound is found now.

        Raises:
            FormatError: and its subclasses: the payload is not sound.
        """
        self.is_loaded = True
        if not self.payload.is_meta:
            self.packed()

    def ordinary(self, *, trainable: bool) -> nn.Module:
        """An ordinary layer with the decoded weight."""
        layer = self._empty_original()
        layer.weight = nn.Parameter(self._decoded(), trainable)  # pyright: ignore[reportAttributeAccessIssue]
        layer.register_parameter("bias", self.bias)  # pyright: ignore[reportArgumentType]
        return layer.train(self.training)

    def _empty_original(self) -> nn.Module:
        raise NotImplementedError

    def _with_bias(self, product: Tensor) -> Tensor:
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Payloads of one shape differ in length: take the new one's."""
        found = state_dict.get(f"{prefix}{PAYLOAD}")
        if isinstance(found, Tensor) and found.shape != self.payload.shape and found.dtype == torch.uint8:
            self.payload = torch.empty_like(found, device=self.payload.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> "CompressedLayer":
        """`Module.type` casts integers too: bytes stay bytes."""
        payload = self.payload
        super()._apply(fn, recurse)
        if self.payload.dtype != torch.uint8:
            self.payload = payload.to(self.payload.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is parsed: copies and pickles parse again."""
        return {**self.__dict__, "_parsed": None}


class CompressedLinear(CompressedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer whose weight stays compressed: y = x·Wᵀ + b."""

    def __init__(
        self, original: nn.Linear, name: str, n_bytes: int, dtype: torch.dtype, backend: str
    ) -> None:
        self._hold(original, name, n_bytes, dtype, backend)
        self.in_features, self.out_features = original.in_features, original.out_features

    def forward(self, input: Tensor) -> Tensor:
        """x·Wᵀ + b: `[..., in_features]` → `[..., out_features]`."""
        return self._with_bias(self._product(input))

    @_uncompiled
    def _product(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed())

    def _empty_original(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        """The layer's sizes, its dtype, and the bytes that it holds."""
        return f"{nn.Linear.extra_repr(self)}, dtype={self.dtype}, payload_bytes={self.payload.numel()}"


class CompressedConv1D(CompressedLayer, Conv1D):
    """GPT-2's linear layer, whose weight is the transpose of others': y = x·W + b."""

    def __init__(self, original: Conv1D, name: str, n_bytes: int, dtype: torch.dtype, backend: str) -> None:
        self._hold(original, name, n_bytes, dtype, backend)
        self.nf, self.nx = original.nf, original.nx

    def forward(self, x: Tensor) -> Tensor:
        """x·W + b: `[..., nx]` → `[..., nf]`."""
        return self._with_bias(self._product(x))

    @_uncompiled
    def _product(self, x: Tensor) -> Tensor:
        return packed_matmul(x, self.packed())

    def _empty_original(self) -> nn.Module:
        with torch.device("meta"):
            return Conv1D(self.nf, self.nx)

    def extra_repr(self) -> str:
        """The layer's sizes, its dtype, and the bytes that it holds."""
        return f"nf={self.nf}, nx={self.nx}, dtype={self.dtype}, payload_bytes={self.payload.numel()}"


# Only these very classes: a subclass computes something else.
COMPRESSED_CLASSES = {nn.Linear: CompressedLinear, Conv1D: CompressedConv1D}


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedLayer)}


def allow_casts(model: nn.Module) -> None:
    """Let `half()` and `float()` do what `bfloat16()` and `to(dtype)` do: transformers refuses these two on
    all quantized models, as others' weights cannot be cast.
    """
    for name in _REFUSED:
        # A partial, which copies and pickles follow to the new model.
        setattr(model, name, partial(getattr(nn.Module, name), model))


def make_ordinary(model: nn.Module) -> None:
    """Decode all compressed layers of a model; those below an adapter stay frozen."""
    for name in _REFUSED:
        vars(model).pop(name, None)
    for name, layer in compressed_layers(model).items():
        model.set_submodule(name, layer.ordinary(trainable=not name.endswith("base_layer")))


def saved_state(model: nn.Module, payloads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the checkpoint's names, as compressed as it was loaded.

    Args:
        payloads: of dense tensors by name; each is written if the tensor still is what it decodes to.
    """
    state = model.state_dict()
    unchanged: dict[Any, str] = {}
    for name, payload in payloads.items():
        tensor = state.get(name)
        if tensor is not None and not tensor.is_meta and _decodes_to(payload, tensor, name):
            unchanged.setdefault(_place(tensor), name)
    saved: dict[str, Tensor] = {}
    renamed = {f"{name}.{PAYLOAD}": f"{name}.weight" for name in compressed_layers(model)}
    for name, tensor in state.items():
        stored_as = unchanged.get(_place(tensor))
        # Of tied tensors only the one that the checkpoint names is written.
        if stored_as in (None, name):
            saved[renamed.get(name, name)] = tensor if stored_as is None else payloads[name]
    return saved


def saved_digest(state: Mapping[str, Tensor]) -> str:
    """The digest that the repository of such a state dict has."""
    found = {name: codecs.read(tensor, name) for name, tensor in state.items()}
    return payloads_digest({name: payload.facts.digest for name, payload in found.items() if payload})


def _decodes_to(payload: Tensor, tensor: Tensor, name: str) -> bool:
    with torch.device("cpu"):
        weights = decode_sum([payload], name)
    return torch.equal(weights.to(tensor.device, tensor.dtype), tensor)


def _place(tensor: Tensor) -> tuple:
    """Equal for tied tensors only."""
    if tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
