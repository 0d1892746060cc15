"""The other side of quality.py: kvpress's presses, and transformers' own quantized cache, on the same tokens.

It is run by a Python that has kvpress (0.5.5 wants transformers 5.2), given a file of token ids and budgets, and writes a
file of losses, hits, bytes and times. It needs nothing of this project's.

A text's prefill is one and the same for every press and budget, as presses look at what a layer was given and change nothing
but its cache afterwards: it runs once, what each layer's hook would have been given is kept, and every press compresses that.
`--check` compares this with kvpress's own `with press(model):`, compression 0 with no press, and a chunk with single tokens.

Where layers or heads keep different tokens, a chunk's causal mask has to be made per layer and head; that is done here. kvpress
itself masks heads by keys that no query looks at, which is the same where such a key is found.
"""
# Not by `make bench`: it needs kvpress; quality.py runs it.

import argparse
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CompactorPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses import kvzip_press
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

# As kvpress sets them, but for what is said in the name.
PRESSES: dict[str, Callable[[float], Any]] = {
    "StreamingLLM": lambda ratio: StreamingLLMPress(ratio, n_sink=4),
    "SnapKV": SnapKVPress,
    "TOVA": TOVAPress,
    "Knorm": KnormPress,
    "KeyDiff": KeyDiffPress,
    "ObservedAttention": ObservedAttentionPress,
    "ExpectedAttention": ExpectedAttentionPress,
    "PyramidKV": PyramidKVPress,
    "LagKV": LagKVPress,
    "CUR": CURPress,
    "NonCausalAttn": NonCausalAttnPress,
    "Compactor": CompactorPress,
    "CriticalKV(SnapKV)": lambda ratio: CriticalKVPress(SnapKVPress(ratio)),
    "ChunkKV(SnapKV)": lambda ratio: ChunkKVPress(SnapKVPress(ratio)),
    "AdaKV(SnapKV)": lambda ratio: AdaKVPress(SnapKVPress(ratio)),
    "AdaKV(ExpectedAttention)": lambda ratio: AdaKVPress(ExpectedAttentionPress(ratio)),
    "AdaKV(ExpectedAttention ε=0.01)": lambda ratio: AdaKVPress(ExpectedAttentionPress(ratio, epsilon=1e-2)),
    "CriticalAdaKV(SnapKV)": lambda ratio: CriticalAdaKVPress(SnapKVPress(ratio)),
    "KVzip": KVzipPress,
}
EAGER = {"ObservedAttention"}  # want attention weights
QUANTIZED = {  # transformers' own: backend and options
    "HQQ int8": ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}),
    "HQQ int4": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
    "HQQ int2": ("hqq", {"nbits": 2, "axis_key": 1, "axis_value": 1}),
    "quanto int4": ("quanto", {"nbits": 4}),
    "quanto int2": ("quanto", {"nbits": 2}),
}
MODULES = {"hqq": "hqq", "quanto": "optimum.quanto"}
Masked = list[Any]  # what each layer's `masked_key_indices` is


class Kept:
    """A cache after a prefill, and which of its entries heads do not look at."""

    def __init__(self, cache: Any, masked: Masked) -> None:
        self.cache, self.masked = cache, masked

    @property
    def held(self) -> int:
        """Bytes of all tensors."""
        return sum(storage(value) for layer in self.cache.layers for value in vars(layer).values())

    @property
    def nbytes(self) -> int:
        """Bytes without what is masked: those of an implementation that drops it."""
        unused = 0
        for layer, masked in zip(self.cache.layers, self.masked, strict=True):
            if masked is not None:
                unused += len(masked[2]) * 2 * layer.keys.shape[-1] * layer.keys.element_size()
        return self.held - unused

    def copied(self) -> "Kept":
        """The same entries in a cache of their own."""
        return Kept(filled((layer.keys.clone(), layer.values.clone()) for layer in self.cache.layers), self.masked)


def storage(value: Any) -> int:
    """Bytes of the tensors in a value, a quantized tensor's parts among them."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
            return sum(storage(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(storage, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(storage, value))
    return 0


def filled(layers: Iterator[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def take_masks(model: Any) -> Masked:
    """What presses have left on the layers, taken off them."""
    found = []
    for module in attentions(model):
        found.append(getattr(module, "masked_key_indices", None))
        module.masked_key_indices = None
    return found


@contextmanager
def hooked(model: Any, hook: Callable[..., Any], before: bool) -> Iterator[None]:
    handles = [
        (module.register_forward_pre_hook if before else module.register_forward_hook)(hook, with_kwargs=True)
        for module in attentions(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Capture:
    """What every layer's hook would be given in a prefill."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model = model
        self.layers: list[tuple[Any, ...]] = []
        for module in attentions(model):
            module.rotary_emb = model.model.rotary_emb
            module.masked_key_indices = None
        self.cache = DynamicCache()
        with hooked(model, self._hook, before=False):
            model.model(ids, past_key_values=self.cache)

    def _hook(self, module: Any, given: Any, kwargs: dict[str, Any], output: Any) -> None:
        keys, values = (getattr(self.cache.layers[module.layer_idx], name) for name in ("keys", "values"))
        self.layers.append((module, kwargs["hidden_states"], keys, values, output[1], kwargs))

    def full(self) -> Kept:
        return Kept(filled((keys, values) for _, _, keys, values, _, _ in self.layers), [None] * len(self.layers))

    def compressed(self, press: Any) -> Kept:
        press.post_init_from_model(self.model)
        cache = filled(press.compress(*layer) for layer in self.layers)
        return Kept(cache, take_masks(self.model))


class Zip(KVzipPress):
    """KVzip for several ratios after one scoring."""

    def compressed(self, model: Any, ids: Tensor, ratios: list[float]) -> dict[float, Kept]:
        self.ratios, self.found = ratios, {}
        self.compression_ratio = ratios[0]
        self.kept = DynamicCache()
        with self(model):
            model(input_ids=ids, past_key_values=self.kept, logits_to_keep=1)
        return {ratio: Kept(self.kept, masked).copied() for ratio, masked in self.found.items()}

    def compress_post(self, model: Any) -> None:
        for ratio in self.ratios:
            self.compression_ratio = ratio
            super().compress_post(model)
            self.found[ratio] = take_masks(model)


class Reader:
    """Reads on after a compressed context, at true positions."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, kept: Kept, ids: Tensor, begin: int) -> Tensor:
        """Of a chunk ``[1, n]`` whose first token has this position, ``[n, vocabulary]``; appends it to the cache."""
        length = ids.shape[1]

        def mask(module: Any, given: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            layer = kept.cache.layers[module.layer_idx]
            past = layer.get_seq_length()
            seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)[None, None]
            masked = kept.masked[module.layer_idx]
            if masked is not None:
                heads = module.config.num_key_value_heads
                seen = seen.repeat(1, heads, 1, 1)
                seen[masked[0], masked[1], :, masked[2]] = False
                seen = seen.repeat_interleave(module.num_key_value_groups, 1)
            return given, kwargs | {"attention_mask": seen}

        positions = torch.arange(begin, begin + length)
        past = kept.cache.get_seq_length()
        with hooked(self.model, mask, before=True):
            return self.model(
                ids,
                past_key_values=kept.cache,
                position_ids=positions[None],
                cache_position=torch.arange(past, past + length),
            ).logits[0]


class Figures:
    """Sums of each method and budget."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, float], dict[str, Any]] = {}

    def of(self, side: str, method: str, budget: float) -> dict[str, Any]:
        row = {"side": side, "method": method, "budget": budget, "losses": [], "hits": [], "ms": []}
        return self.rows.setdefault((side, method, budget), row)


def every(model: Any, ids: Tensor, methods: list[str], budgets: list[float]) -> Iterator[tuple[str, str, float, Kept]]:
    """All caches of a context, one after the other: side, method, budget and cache."""
    capture = Capture(model, ids)
    yield "full", "full cache", 1.0, capture.full()
    for method in methods:
        if method in QUANTIZED:
            backend, options = QUANTIZED[method]
            cache = QuantizedCache(backend, model.config, q_group_size=64, residual_length=128, **options)
            model(ids, past_key_values=cache, logits_to_keep=1)
            yield "transformers", method, 1.0, Kept(cache, [None] * len(cache.layers))
    smaller = [budget for budget in budgets if budget < 1]
    for eager in (False, True):
        mine = [method for method in methods if method in PRESSES and (method in EAGER) == eager]
        if eager and mine:
            del capture
            model.set_attn_implementation("eager")
            capture = Capture(model, ids)
            model.set_attn_implementation("sdpa")
        for method in mine:
            if method == "KVzip":
                found = Zip().compressed(model, ids, [1 - budget for budget in smaller])
                for budget in smaller:
                    yield "kvpress", method, budget, found[1 - budget]
                continue
            for budget in smaller:
                yield "kvpress", method, budget, capture.compressed(PRESSES[method](1 - budget))


def time_tokens(
    model: Any, ids: Tensor, methods: list[str], budgets: list[float], rounds: int, figures: Figures
) -> None:
    """Milliseconds a token of decoding, all caches in turn, as kvpress decodes: what heads do not see, fake keys hide."""
    kept = [(side, method, budget, each) for side, method, budget, each in every(model, ids, methods, budgets)]
    token = ids[:, -1:]
    for i in tqdm(range(rounds + 1), desc="timing", leave=False):
        for side, method, budget, each in kept:
            for module, masked in zip(attentions(model), each.masked, strict=True):
                module.masked_key_indices = masked
            where = torch.tensor([[ids.shape[1] + i]])
            start = time.perf_counter()
            try:
                model(token, past_key_values=each.cache, position_ids=where)
            except (RuntimeError, ValueError):  # no fake key found; or lengths that a layer's mask does not fit
                continue
            finally:
                take_masks(model)
            if i:
                figures.of(side, method, budget)["ms"].append(1e3 * (time.perf_counter() - start))


def read(model: Any, task: dict[str, Any], methods: list[str], figures: Figures, save: Callable[[], None]) -> None:
    """Losses on every piece, hits on every passkey, bytes of the first piece."""
    reader = Reader(model)
    budgets, context = task["budgets"], task["context"]
    texts = [("piece", piece) for piece in task["pieces"]] + [("passkey", each) for each in task["passkeys"]]
    for kind, text in tqdm(texts, desc="texts"):
        whole = torch.tensor([text if kind == "piece" else text["context"]])
        ids = whole[:, :context] if kind == "piece" else whole
        rest = whole[:, context:] if kind == "piece" else torch.tensor([text["question"] + text["answer"]])
        for side, method, budget, kept in every(model, ids, methods, budgets if kind == "piece" else task["asked"]):
            row = figures.of(side, method, budget)
            if kind == "piece":
                row.setdefault("nbytes", kept.nbytes)
                row.setdefault("held", kept.held)
            logits = reader.logits(kept, rest[:, :-1], ids.shape[1])
            if kind == "piece":
                loss = torch.nn.functional.cross_entropy(logits.float(), rest[0, 1:], reduction="none")
                row["losses"].append(float(loss.sum()))
            else:  # greedy decoding writes the answer if and only if each of its tokens is the likeliest after those before
                answer = torch.tensor(text["answer"])
                row["hits"].append(bool((logits[-len(answer) :].argmax(-1) == answer).all()))
        gc.collect()
        save()


def check(model: Any, task: dict[str, Any]) -> None:
    """That the shortcuts here are none in what they give."""
    reader, context = Reader(model), task["context"]
    text = torch.tensor([task["pieces"][0]])
    ids, rest = text[:, :context], text[:, context:-1][:, :32]
    plain = model(text[:, : context + 32]).logits[0, context:]

    def worst(found: Tensor, expected: Tensor) -> float:
        return float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max())

    capture = Capture(model, ids)
    print("full cache, a chunk, against one forward pass:", worst(reader.logits(capture.full(), rest, context), plain))
    for method, make in PRESSES.items():
        implementation = "eager" if method in EAGER else "sdpa"
        model.set_attn_implementation(implementation)
        mine = Capture(model, ids) if method in EAGER else capture
        found = {}
        for ratio in (0.0, 0.5):
            model.set_attn_implementation(implementation)
            torch.manual_seed(0)
            cache, press = DynamicCache(), make(ratio)
            with press(model):
                model(input_ids=ids, past_key_values=cache)
            model.set_attn_implementation("sdpa")
            own = Kept(cache, take_masks(model))
            found[ratio] = reader.logits(own.copied(), rest, context)
        torch.manual_seed(0)
        kept = Zip().compressed(model, ids, [0.5])[0.5] if method == "KVzip" else mine.compressed(make(0.5))
        step = kept.copied()
        single = torch.cat([reader.logits(step, rest[:, i : i + 1], context + i) for i in range(rest.shape[1])])
        share = kept.nbytes / capture.full().nbytes
        chunk = reader.logits(kept, rest, context)
        print(
            f"{method}: ratio 0 {worst(found[0.0], plain):.1e}, its own way {worst(chunk, found[0.5]):.1e}, "
            f"single tokens {worst(chunk, single):.1e}, of the bytes {share:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", type=Path, help="JSON, as quality.py writes it")
    parser.add_argument("result", type=Path, help="JSON: rows and versions")
    parser.add_argument("--methods", nargs="+", choices=[*PRESSES, *QUANTIZED], default=[*PRESSES, *QUANTIZED])
    parser.add_argument("--check", action="store_true", help="compare with kvpress's own way, write nothing")
    options = parser.parse_args()
    task = json.loads(options.task.read_text())
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = Path(task["model"])
    where = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    name = str(file.parent if where else file)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True, **where).eval()
    if "KVzip" in options.methods or options.check:  # its prompt needs a tokenizer, and the text is no chat
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, **where)
        tokenizer.chat_template = None
        kvzip_press.AutoTokenizer = type("Given", (), {"from_pretrained": staticmethod(lambda name: tokenizer)})
        kvzip_press.logger.disabled = True
    methods = []
    for method in options.methods:
        if method in QUANTIZED and importlib.util.find_spec(MODULES[QUANTIZED[method][0]].split(".")[0]) is None:
            print(f"no row for {method}: {QUANTIZED[method][0]} is not installed")
        else:
            methods.append(method)
    with torch.inference_mode():
        if options.check:
            check(model, task)
            return
        figures = Figures()

        def save() -> None:
            rows = [row | {"ms": statistics.median(row["ms"]) if row["ms"] else None} for row in figures.rows.values()]
            packages = ("kvpress", "transformers", "torch", "hqq", "optimum-quanto")
            versions = {package: version(package) for package in packages if _installed(package)}
            options.result.write_text(json.dumps({"rows": rows, "versions": versions}))

        read(model, task, methods, figures, save)
        if task["rounds"]:
            ids = torch.tensor([task["pieces"][0][: task["context"]]])
            time_tokens(model, ids, methods, task["budgets"], task["rounds"], figures)
        save()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", ".").split(".")[0]) is not None


if __name__ == "__main__":
    main()
