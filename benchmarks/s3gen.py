"""S3Gen, which makes audio of speech tokens: as upstream runs it, in bf16, and with CUDA graphs.

Every side makes the same tokens into audio with a 10 s reference. "estimator graphed" replays a recording of the flow's
estimator, which upstream calls 10 times a chunk (2 times with Turbo's distilled weights, "meanflow"); "and HiFT" also one of
the vocoder's network between its two Fourier transforms, the second of which looks at the host. Recordings are made once for
each length. On a CPU a trace takes a recording's place, which shows that it can be recorded and is no faster.

Weights are random: they decide neither shapes nor speed.
"""
# Not by `make bench`: it needs what upstream's S3Gen imports.

import argparse
import copy
import importlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from common import arguments, finish, interleaved, keep, paired_ratio, spread, synchronize
from torch import Tensor

from kvcache.decoding import Recorder, cuda_graph
from kvcache.testing import traced
from kvcache_chatterbox.units import SAMPLE_RATE, SAMPLES_PER_TOKEN, SPEECH_TOKENS
from kvcache_chatterbox.upstream import upstream_t3

UPSTREAM = "as upstream runs it"
GRAPHED = "estimator graphed, bf16, and HiFT"
TOLERANCE = (
    1e-5  # of the audio on a CPU, where a trace runs the same operators; 1e-7 was seen. A GPU's is told, not judged.
)


def load(meanflow: bool, device: str, seconds: float) -> tuple[Any, dict[str, Any]]:
    """Upstream's S3Gen with random weights, and a made-up reference of so many seconds.

    Raises:
        SystemExit: if what it imports is not installed.
    """
    upstream_t3()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("chatterbox.models.s3gen")
    except (ImportError, OSError) as error:
        raise SystemExit(f"S3Gen's own imports are missing or do not load, see docs/chatterbox.md: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        s3gen = module.S3Gen(meanflow=meanflow).eval()
        clip = 0.1 * torch.randn(round(seconds * SAMPLE_RATE))
    s3gen = s3gen.to(device)
    # Upstream draws a bar for each chunk and prints a line.
    flow = importlib.import_module("chatterbox.models.s3gen.flow_matching")
    flow.tqdm, flow.print = (lambda steps, **_: steps), (lambda *_: None)  # type: ignore[attr-defined]
    with torch.inference_mode():
        return s3gen, s3gen.embed_ref(clip, SAMPLE_RATE)


class Recorded:
    """A function of tensors that is recorded for each set of shapes it is called with, and replayed.

    What it returns is written over by its next call.
    """

    def __init__(self, function: Callable[..., Any], record: Recorder) -> None:
        self._function = function
        self._signature = inspect.signature(function)
        self._record = record
        self._known: dict[Any, tuple[dict[str, Tensor], tuple[Tensor, ...], Callable[[], Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {
            name: value for name, value in self._signature.bind(*args, **kwargs).arguments.items() if value is not None
        }
        key = tuple((name, value.shape, value.dtype) for name, value in given.items())
        if key not in self._known:
            self._known[key] = self._recording(given)
        inputs, outputs, replay = self._known[key]
        for name, value in given.items():
            inputs[name].copy_(value)
        replay()
        return outputs if len(outputs) > 1 else outputs[0]

    def _recording(self, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...], Callable[[], Any]]:
        inputs = {name: value.clone() for name, value in given.items()}
        outputs = tuple(torch.empty_like(value) for value in self._run(inputs))

        def step() -> None:
            for output, value in zip(outputs, self._run(inputs), strict=True):
                output.copy_(value)

        return inputs, outputs, self._record(step, lambda: None)

    def _run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        found = self._function(**inputs)
        return found if isinstance(found, tuple) else (found,)


def _every_frame(frames: Tensor, masks: Tensor, *_: Any) -> Tensor:
    """What upstream's `add_optional_chunk_mask` returns where no frame is padded, without its look at the host."""
    return masks


def recorded_estimator(estimator: Any, record: Recorder) -> Recorded:
    """The flow's estimator, for a batch without padding."""
    forward = estimator.forward

    def run(x: Tensor, mask: Tensor, mu: Tensor, t: Tensor, spks: Any = None, cond: Any = None, r: Any = None) -> Any:
        with patch("chatterbox.models.s3gen.decoder.add_optional_chunk_mask", _every_frame):
            return forward(x, mask, mu, t, spks=spks, cond=cond, r=r)

    return Recorded(run, record)


def recorded_hift(hift: Any, record: Recorder) -> Callable[..., Tensor]:
    """HiFT's `decode`, whose network is recorded between the two Fourier transforms."""
    decode, stft, istft = hift.decode, hift._stft, hift._istft

    def network(x: Tensor, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
        spectrum: list[Tensor] = []

        def kept(magnitude: Tensor, phase: Tensor) -> Tensor:
            spectrum.extend((magnitude, phase))
            return magnitude

        with patch.object(hift, "_stft", lambda _: (real, imaginary)), patch.object(hift, "_istft", kept):
            decode(x, real)
        return spectrum[0], spectrum[1]

    replayed = Recorded(network, record)

    def run(x: Tensor, s: Tensor) -> Tensor:
        magnitude, phase = replayed(x, *stft(s.squeeze(1)))
        return torch.as_tensor(istft(magnitude, phase).clamp(-hift.audio_limit, hift.audio_limit))

    return run


class Ways:
    """The ways to run one S3Gen; each is what it is only for the time of a call.

    Args:
        s3gen: upstream's.
        voice: what `embed_ref` made.
        steps: of the flow; None leaves them to upstream.
    """

    def __init__(self, s3gen: Any, voice: dict[str, Any], steps: int | None = None) -> None:
        self.s3gen, self.voice = s3gen, voice
        self._steps = steps
        record = cuda_graph if s3gen.device.type == "cuda" else traced
        estimator = s3gen.flow.decoder.estimator
        narrow = copy.deepcopy(estimator).to(torch.bfloat16)
        self._narrow = narrow
        self._recorded = {False: recorded_estimator(estimator, record), True: recorded_estimator(narrow, record)}
        self._hift = recorded_hift(s3gen.mel2wav, record)

    def names(self) -> dict[str, str]:
        """Each way, and the precision of its flow."""
        return {
            UPSTREAM: "fp32",
            "the flow under autocast": "bf16",
            "estimator graphed": "fp32",
            "estimator graphed, bf16": "bf16",
            GRAPHED: "bf16",
        }

    @contextmanager
    def like(self, name: str) -> Iterator[None]:
        """Let S3Gen run in that way meanwhile."""
        decoder, hift = self.s3gen.flow.decoder, self.s3gen.mel2wav
        estimator = self._narrow if "bf16" in name else decoder.estimator
        graphed = "graphed" in name
        with (
            patch.object(decoder, "estimator", estimator) if graphed else nullcontext(),
            patch.object(estimator, "forward", self._recorded["bf16" in name]) if graphed else nullcontext(),
            patch.object(hift, "decode", self._hift) if "HiFT" in name else nullcontext(),
            patch.object(self.s3gen.flow, "inference", self._cast) if "autocast" in name else nullcontext(),
        ):
            yield

    def run(self, name: str, tokens: Tensor) -> Tensor:
        """The audio ``[1, samples]`` of tokens ``[n]``, in that way."""
        with self.like(name):
            audio, _ = self.s3gen.inference(tokens, ref_dict=dict(self.voice), n_cfm_timesteps=self._steps)
        return torch.as_tensor(audio)

    def _cast(self, **given: Any) -> Any:
        with torch.autocast(self.s3gen.device.type, torch.bfloat16):
            return type(self.s3gen.flow).inference(self.s3gen.flow, **given)


def farthest(ways: Ways, tokens: Tensor) -> float:
    """How far a recorded estimator's audio, at most 1, is from upstream's under the same noise."""
    said = []
    for name in (UPSTREAM, "estimator graphed"):
        ways.run(name, tokens)  # a recording draws no noise, but what comes before it may
        torch.manual_seed(0)
        said.append(ways.run(name, tokens).clone())
    assert said[0].shape == said[1].shape == (1, tokens.numel() * SAMPLES_PER_TOKEN), said[1].shape
    return float((said[0] - said[1]).abs().max())


def measure(ways: Ways, kind: str, count: int, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """A row for each way, and how many times longer upstream's takes than the fastest."""
    device = ways.s3gen.device
    tokens = torch.randint(0, SPEECH_TOKENS, (count,), generator=torch.Generator().manual_seed(count)).to(device)
    first, peak = {}, {}
    for name in ways.names():
        synchronize()
        start = time.perf_counter()
        ways.run(name, tokens)
        synchronize()
        first[name] = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            ways.run(name, tokens)
            peak[name] = torch.cuda.max_memory_allocated() / 2**20
    sides = {name: lambda name=name: ways.run(name, tokens) for name in ways.names()}
    seconds = interleaved(sides, rounds, warmup=1)  # type: ignore[arg-type]
    rows = []
    for name, precision in ways.names().items():
        took = spread(seconds[name])
        rows.append(
            {
                "S3Gen": kind, "way": name, "flow": precision, "tokens": count,
                "s": took["median"], "q1": took["q1"], "q3": took["q3"], "rounds": took["n"],
                "RTF": took["median"] / (count * SAMPLES_PER_TOKEN / SAMPLE_RATE),
                "upstream / this": paired_ratio(seconds[UPSTREAM], seconds[name]),
                "first call, s": first[name],
                "GPU MiB, peak": peak.get(name),
            }
        )  # fmt: skip
    return rows, max(row["upstream / this"] for row in rows)


def options_of() -> argparse.Namespace:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each length (default: 5)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[25, 125], help="lengths (default: 25 125)")
    parser.add_argument("--reference", type=float, default=10, metavar="S", help="seconds of it (default: 10)")
    options: argparse.Namespace = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.steps = None
    if options.quick:
        options.rounds, options.tokens, options.reference, options.steps = 1, [3], 0.4, 2
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    more: dict[str, Any] = {"weights": "random", "reference, s": options.reference}
    for kind in ("English", "meanflow"):
        ways = Ways(*load(kind == "meanflow", options.device, options.reference), options.steps)
        far = farthest(ways, torch.arange(3, device=ways.s3gen.device))
        if options.device == "cpu" and far > TOLERANCE:
            raise SystemExit(f"{kind}: a recorded estimator is {far:.2g} from upstream's, more than {TOLERANCE:g}")
        more[f"{kind}, recorded from upstream's"] = far
        for count in options.tokens:
            found, best = measure(ways, kind, count, options.rounds)
            rows += found
            ratios[f"s3gen_{kind.lower()}_{count}_best"] = best
            keep("s3gen", rows, ratios, options, **more)
    finish("s3gen", rows, ratios, options, **more)


if __name__ == "__main__":
    main()
