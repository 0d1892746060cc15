"""How many times fewer bytes a quantized cache holds than one in fp16, by length: scales, minima and tail counted.

A cache of each kind is filled with made-up tokens of a model's shape, and what it then holds is counted, tensor by tensor. The
tail, up to a group of the newest tokens in the precision that they came in, weighs on short texts, and twice as much where the
model computes in fp32. "at length" is over what that many tokens take in fp16; "a token" is of the tokens behind the first
thousand, over theirs.
"""

from typing import Any

import torch
from common import arguments, finish
from tqdm import tqdm

from kvcache import KVQuantization
from kvcache.cache import CacheSpec

SHAPES = {"SmolLM2-135M": (30, 3, 64), "Chatterbox T3, English": (30, 16, 64)}  # layers, KV heads, head_dim
CHUNK = 512


def held(heads: int, dim: int, dtype: torch.dtype, quantization: KVQuantization, lengths: list[int]) -> dict[int, int]:
    """Bytes of one layer at each of these lengths."""
    layer, found = CacheSpec(storage=quantization).layer(), {}
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        while layer.seen < length:
            states = torch.randn(1, heads, min(CHUNK, length - layer.seen), dim, generator=generator).to(dtype)
            layer.append(states, states)
        tensors, _ = layer.state()
        # Of what is saved only the part in use is there; the tail is held whole, however few tokens are in it.
        tail = 2 * heads * (quantization.group_size or 0) * dim * dtype.itemsize
        counted = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.endswith("tail")) + tail
        if counted != layer.nbytes:
            raise RuntimeError(f"counted {counted} bytes at {length} tokens, the layer says {layer.nbytes}")
        found[length] = counted
    return found


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64])
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.groups = [64, 128], [32]
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    ratios = {}
    cases = [
        (model, shape, bits, group, dtype)
        for model, shape in SHAPES.items()
        for bits in (8, 4)
        for group in options.groups
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for model, (layers, heads, dim), bits, group, dtype in tqdm(cases, leave=False):
        found = held(heads, dim, dtype, KVQuantization(bits, group_size=group), sorted(options.lengths))
        fp16 = {length: 2 * heads * dim * 2 * length for length in found}
        first, last = min(found), max(found)
        row: dict[str, Any] = {"model": model, "bits": bits, "group": group, "of states": str(dtype)[6:]}
        row |= {f"at {length}": fp16[length] / found[length] for length in found}
        row["a token"] = (fp16[last] - fp16[first]) / (found[last] - found[first])
        row[f"MiB at {last}"] = layers * found[last] / 2**20
        rows.append(row)
        kind = f"{model}, int{bits}, group {group}, {row['of states']}"
        ratios[f"{kind}, at {last}"] = row[f"at {last}"]
    finish("quantized_bytes", rows, ratios, options)


if __name__ == "__main__":
    main()
