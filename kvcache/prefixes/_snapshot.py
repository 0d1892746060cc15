"""The keys and values of a prefix, computed once, and the key that says of what.

Attention is causal, so what a prefix computes does not depend on what follows it: a system prompt or a voice can be run
once and put at the beginning of any cache. A key names the whole content, never a path, a name or an object: the model's
fingerprint and the token ids or embeddings themselves, which are stored along and compared at each use.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvcache.cache import CacheGeometry, LayerCache, check_finite, longest_beginning, pack, unpack
from kvcache.errors import CapacityError, CorruptError, GeometryError, InputError, said
from kvcache.models import tensor_bytes, unattended

_EXTRA = "extra."  # before the names of what is beside keys and values
FORMAT = 1  # of what is stored; another number is another key
_ADDRESS = re.compile(r"[0-9a-f]{64}")
_MOST_OF_A_TOKEN = 2**24  # bytes of its keys and values in all layers: no model's take so much
_LONGEST_BUILD = 1e7  # seconds, four months: no prefix took longer to compute


@dataclass(frozen=True)
class Layout:
    """What the keys and values of a model look like, so that what somebody else stored can be compared with it.

    Attributes:
        layers: KV heads, size of a key and size of a value of each layer that caches any.
        dtype: of keys and values; None if that is not known.
    """

    layers: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, geometry: CacheGeometry) -> "Layout":
        """That of a model's cache, as it is computed now: autocast may choose another dtype."""
        each = geometry.shapes or ((geometry.kv_heads, geometry.head_dim, geometry.value_dim),) * geometry.layers
        cast = torch.is_autocast_enabled(geometry.device.type)
        return cls(tuple(shape for shape in each if any(shape)), None if cast else geometry.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class PrefixKey:
    """What a prefix is: a model and the input it was given.

    Two keys are equal if their fingerprints and every byte of their content are.

    Attributes:
        model: the model's fingerprint, see `kvcache.models.model_fingerprint`.
        content: token ids ``[tokens]``, or embeddings ``[tokens, dim]``; on the CPU, not to be changed.
        layout: what the model caches of it, where that is known: a stored snapshot that looks otherwise is refused. It is
            no part of what makes two keys equal.
    """

    model: str
    content: Tensor
    layout: Layout | None = None

    def __post_init__(self) -> None:
        given = self.content
        neither = given.is_complex() or given.dtype == torch.bool
        if neither or given.dim() != (2 if given.is_floating_point() else 1) or given.shape[0] == 0:
            raise InputError(
                f"a prefix is token ids [tokens] or embeddings [tokens, dim], at least one; got {given.dtype} {list(given.shape)}"
            )
        try:
            self.model.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise InputError(
                f"model={self.model!r:.80} must be text that UTF-8 can write; give a fingerprint"
            ) from error
        own = given.detach().to("cpu", None if given.is_floating_point() else torch.long, copy=True).contiguous()
        object.__setattr__(self, "content", own)

    def __len__(self) -> int:
        return self.content.shape[0]

    def __repr__(self) -> str:
        kind = "embeddings" if self.content.is_floating_point() else "token ids"
        return f"PrefixKey({len(self)} {kind}, model {self.model[:8]}, {self.address[:8]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrefixKey) and len(self) == len(other) == self.common(other)

    def __hash__(self) -> int:
        return hash((self.family, len(self), bytes(tensor_bytes(self.content[-1]))))

    @cached_property
    def address(self) -> str:
        """Where a store keeps it, 64 hex digits; equal addresses are not yet equal keys."""
        digest = hashlib.sha256(f"{FORMAT} {self.model} {self.content.dtype} {list(self.content.shape)} ".encode())
        digest.update(tensor_bytes(self.content))
        return digest.hexdigest()

    @cached_property
    def family(self) -> tuple[str, torch.dtype, bytes]:
        """The same for all keys that have at least their first token in common."""
        return self.model, self.content.dtype, bytes(tensor_bytes(self.content[0]))

    @property
    def most_bytes(self) -> int:
        """A file of this prefix has no more, whoever wrote it: what the model caches, or where that is not known, could."""
        states = _MOST_OF_A_TOKEN
        if self.layout is not None:
            size = 8 if self.layout.dtype is None else self.layout.dtype.itemsize
            states = size * sum(heads * (key + value) for heads, key, value in self.layout.layers)
        return longest_beginning() + self.content.nbytes + len(self) * states

    def common(self, other: "PrefixKey") -> int:
        """How many of the first tokens are the same, byte for byte; 0 with another model."""
        if self.family != other.family:
            return 0
        shorter = min(len(self), len(other))
        mine, theirs = (_words(key.content[:shorter]) for key in (self, other))
        if torch.equal(mine, theirs):
            return shorter
        return int((mine == theirs).all(1).long().argmin())

    def first(self, tokens: int) -> "PrefixKey":
        """The key of the first `tokens` tokens."""
        return self if tokens == len(self) else PrefixKey(self.model, self.content[:tokens], self.layout)


@dataclass(frozen=True, eq=False, repr=False)
class PrefixSnapshot:
    """The keys and values of a prefix, one row, never changed.

    Attributes:
        key: of what.
        layers: keys and values of each layer, ``[1, heads, tokens, head_dim]``.
        build_seconds: what it took to compute.
        parent: address of the beginning that it was computed from, which need not be stored; None if from nothing.
        extra: what else was computed of all of it, by name: it belongs to no beginning, and there may be no layers beside it.

    Raises:
        GeometryError: if the layers do not hold as many tokens as the key, or not in one row.
        InputError: for seconds that nothing can take, or a parent that is no address.
    """

    key: PrefixKey
    layers: tuple[tuple[Tensor, Tensor], ...]
    build_seconds: float = 0.0
    parent: str | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_build_seconds(self.build_seconds)
        if self.parent is not None and not is_address(self.parent):
            raise InputError(f"parent={self.parent!r} is no address of a prefix: 64 hex digits")
        for i, (keys, values) in enumerate(self.layers):
            for states in (keys, values):
                if states.dim() != 4 or states.shape[0] != 1 or states.shape[2] != len(self.key):
                    raise GeometryError(
                        f"layer {i} of a prefix of {len(self.key)} tokens must be [1, heads, {len(self.key)}, head_dim], got {list(states.shape)}"
                    )
        if not self.layers and not self.extra:
            raise GeometryError("a prefix has no layers: nothing was computed")

    @classmethod
    def of(
        cls, layers: Sequence[LayerCache], key: PrefixKey, *, row: int = 0, build_seconds: float = 0.0
    ) -> "PrefixSnapshot":
        """A copy of the first tokens of a cache's layers, as many as `key` has.

        Raises:
            GeometryError: if tokens have been evicted, or not enough of them were appended.
        """
        for kv in layers:
            if kv.evicted or kv.stored < len(key):
                raise GeometryError(
                    f"a prefix of {len(key)} tokens cannot be taken: {kv.seen} were seen and {kv.evicted} evicted; "
                    "run it on a cache that keeps everything"
                )
        with torch.inference_mode(False):
            copies = tuple(
                (_copy(kv.keys[row : row + 1, :, : len(key)]), _copy(kv.values[row : row + 1, :, : len(key)]))
                for kv in layers
                if kv.keys is not None and kv.values is not None
            )
        return cls(key, copies, build_seconds)

    def __len__(self) -> int:
        return len(self.key)

    def __repr__(self) -> str:
        return f"PrefixSnapshot({self.key!r}, {len(self.layers)} layers, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all that it keeps in memory, its content too."""
        tensors = [self.key.content, *(states for layer in self.layers for states in layer), *self.extra.values()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(held.values())

    def first(self, tokens: int) -> "PrefixSnapshot":
        """The first `tokens` tokens, as views."""
        if not 0 < tokens <= len(self):
            raise InputError(f"cannot take the first {tokens} tokens of a prefix of {len(self)}; give 1 to {len(self)}")
        if tokens == len(self):
            return self
        layers = tuple((keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in self.layers)
        return PrefixSnapshot(self.key.first(tokens), layers, self.build_seconds * tokens / len(self), self.parent)

    def to(self, device: torch.device | str) -> "PrefixSnapshot":
        """The same on another device."""
        layers = tuple((keys.to(device), values.to(device)) for keys, values in self.layers)
        extra = {name: tensor.to(device) for name, tensor in self.extra.items()}
        return PrefixSnapshot(self.key, layers, self.build_seconds, self.parent, extra)

    def compact(self) -> "PrefixSnapshot":
        """The same without the memory of what it was cut from."""
        with torch.inference_mode(False):
            layers = tuple((_own(keys), _own(values)) for keys, values in self.layers)
            extra = {name: _own(tensor) for name, tensor in self.extra.items()}
        return PrefixSnapshot(self.key, layers, self.build_seconds, self.parent, extra)

    def check(self, key: PrefixKey) -> None:
        """Raise `CorruptError` unless this can be what was asked for: of this content, and of the model's shape.

        Args:
            key: that was asked for; the snapshot may be of a beginning of it.
        """
        if self.key.common(key) != len(self):
            raise CorruptError(f"it is {self.key!r}")
        if (layout := key.layout) is not None:
            shapes = tuple((k.shape[1], k.shape[3], v.shape[3]) for k, v in self.layers if k.shape[1] == v.shape[1])
            dtypes = {states.dtype for layer in self.layers for states in layer}
            if shapes != layout.layers or (layout.dtype is not None and dtypes != {layout.dtype}):
                raise CorruptError(
                    f"its {len(self.layers)} layers of {sorted(set(shapes))[:3]} (heads, key, value) in "
                    f"{', '.join(sorted(map(str, dtypes)))} are not the model's {len(layout.layers)} layers of "
                    f"{sorted(set(layout.layers))[:3]} in {layout.dtype}"
                )

    def check_finite(self) -> None:
        """Raise `CorruptError` if a key or value is not a finite number."""
        for i, layer in enumerate(self.layers):
            for states in layer:
                check_finite(states, f"layer {i}")
        for name, tensor in self.extra.items():
            if tensor.is_floating_point():
                check_finite(tensor, name)

    def write_to(self, cache: Any, rows: int = 1) -> None:
        """Begin an empty cache of any kind with this prefix, in all of its rows.

        The one copy made is the cache's own, so no cache ever changes the snapshot, nor another cache.

        Args:
            cache: one of ours or of transformers', for the model that the prefix is of.
            rows: the cache's batch size.

        Raises:
            InputError: if the cache is not empty.
            GeometryError: if it has another number of layers.
            CapacityError: if the prefix does not fit.
        """
        if (seen := int(cache.get_seq_length())) != 0:
            raise InputError(f"the cache already holds {seen} tokens; a prefix goes into an empty one: reset it first")
        if (given := len(cache.layers)) not in (0, len(self.layers)):  # a DynamicCache without a config has none yet
            raise GeometryError(
                f"the prefix has {len(self.layers)} layers, the cache {given}; use a cache for the same model"
            )
        for layer in cache.layers:
            _check_room(layer, len(self))
        with unattended():
            for i, (keys, values) in enumerate(self.layers):
                cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), i)

    # ------------------------------------------------------------------ as tensors and as a file

    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors by name, to be stored."""
        named = {"content": self.key.content}
        for i, (keys, values) in enumerate(self.layers):
            named |= {f"keys.{i}": keys[0], f"values.{i}": values[0]}
        return named | {f"{_EXTRA}{name}": tensor for name, tensor in self.extra.items()}

    def header(self) -> dict[str, Any]:
        """What there is to say about it in JSON."""
        return {
            "format": "kvcache-prefix",
            "version": FORMAT,
            "model": self.key.model,
            "layers": len(self.layers),
            "build_seconds": self.build_seconds,
            "parent": self.parent,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "PrefixSnapshot":
        """The inverse of `tensors` and `header`.

        Raises:
            CorruptError: if they do not belong to a prefix of this version, or are not finite.
        """
        if (header.get("format"), header.get("version")) != ("kvcache-prefix", FORMAT):
            raise CorruptError(
                f"a {header.get('format')!r} of version {header.get('version')!r}; this is version {FORMAT} of 'kvcache-prefix'"
            )
        try:
            model, count, seconds = header["model"], header["layers"], header["build_seconds"]
            extra = {name[len(_EXTRA) :]: tensor for name, tensor in tensors.items() if name.startswith(_EXTRA)}
            if type(model) is not str or type(count) is not int or len(tensors) != 1 + 2 * count + len(extra):
                raise ValueError(f"{count!r:.40} layers in {len(tensors)} tensors, of a model {model!r:.40}")
            layers = tuple((tensors[f"keys.{i}"][None], tensors[f"values.{i}"][None]) for i in range(count))
            found = cls(PrefixKey(model, tensors["content"]), layers, seconds, header.get("parent"), extra)
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise CorruptError(f"the parts of a prefix do not fit together: {said(error)}") from error
        found.check_finite()
        return found

    def to_bytes(self, secret: bytes | None = None) -> bytes:
        """As a checked safetensors file; see `kvcache.cache.pack`."""
        return pack(self.tensors(), self.header(), secret)

    @classmethod
    def from_bytes(cls, data: bytes, secret: bytes | None = None) -> "PrefixSnapshot":
        """The inverse of `to_bytes`.

        Raises:
            CorruptError: if one byte of it has changed.
        """
        return cls.from_tensors(*unpack(data, secret))


def check_build_seconds(seconds: object) -> None:
    """Raise `InputError` for what is no time that computing can have taken."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds <= _LONGEST_BUILD:  # type: ignore[operator]
        raise InputError(f"build_seconds={seconds!r:.40} is no time that a prefix takes: 0 to {_LONGEST_BUILD:g} s")


def is_address(name: object) -> bool:
    """Whether this is 64 hex digits."""
    return isinstance(name, str) and _ADDRESS.fullmatch(name) is not None


def _check_room(layer: Any, tokens: int) -> None:
    """Raise `CapacityError` if `tokens` do not fit: asked of every layer before the first of them changes."""
    if isinstance(kv := getattr(layer, "kv", None), LayerCache):
        kv.check(tokens)
    static = not getattr(layer, "is_sliding", False)
    room = getattr(layer, "max_cache_len", None) if static else None  # of one of transformers' static layers
    if room is not None and tokens > room:
        raise CapacityError(
            f"the prefix has {tokens} tokens, the cache room for {room}; make it with a larger max_cache_len"
        )


def _words(content: Tensor) -> Tensor:
    """Each token's bytes, ``[tokens, words]``: so that -0.0 is not 0.0 and NaN is NaN; in large words, for speed."""
    rows = content.reshape(content.shape[0], -1)
    size = rows.shape[1] * rows.element_size()
    return rows.view(torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8)


def _copy(states: Tensor) -> Tensor:
    return states.detach().clone(memory_format=torch.contiguous_format)


def _own(states: Tensor) -> Tensor:
    size = states.numel() * states.element_size()
    return states if states.is_contiguous() and states.untyped_storage().nbytes() == size else _copy(states)
