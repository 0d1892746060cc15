"""Stream speech from Chatterbox on managed KV caches.

Builds the real T3 model of the installed chatterbox-tts. Weights come from --checkpoint, else from the Hugging Face hub
if it answers, else they are random: shapes, speed and memory are then real, the speech is not. Without weights it hands out
speech tokens; with --audio, upstream's S3Gen, with random weights too, makes noise of them that takes as long as speech.

    python examples/chatterbox_stream.py --variant nano
    python examples/chatterbox_stream.py --variant nano --audio --chunking fixed
    python examples/chatterbox_stream.py --variant english --checkpoint ./chatterbox --wav hello.wav
"""

import argparse
import importlib
import json
import time
import wave
from pathlib import Path
from typing import Any

import torch
from example_options import (
    CLASSES,
    LARGEST_SEED,
    Parser,
    add_model,
    add_sound,
    check_backend,
    check_device,
    check_model,
    check_sound,
    count,
    new_file,
    words,
)  # fmt: skip
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvcache import KeepAll, KVCacheError, SlidingWindow
from kvcache.errors import said
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, load_t3, random_conditionals, stand_in
from kvcache_chatterbox.loading import WEIGHTS
from kvcache_chatterbox.units import SAMPLE_RATE
from kvcache_chatterbox.vocoder import random_s3gen, s3gen_module

TEXT = "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background."
REPOSITORIES = {
    "english": "ResembleAI/chatterbox",
    "multilingual": "ResembleAI/chatterbox",
    "turbo": "ResembleAI/chatterbox-turbo",
}
TOKENS_PER_SECOND = 25  # of speech
REFERENCE = 10  # seconds of a made-up voice's clip, as long as one that is heard whole


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model(parser)
    parser.add_argument("--text", type=words, default=TEXT)
    parser.add_argument(
        "--weights", choices=("auto", "hub", "random"), default="auto", help="without a checkpoint (default: auto)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-new-tokens", type=count(1), default=250)
    parser.add_argument(
        "--chunk-size", type=count(1), default=25, help="of tokens, where there is no audio (default: 25)"
    )
    parser.add_argument(
        "--audio", action="store_true", help="without weights, let a random S3Gen make audio of the tokens"
    )
    add_sound(parser)
    parser.add_argument("--window", type=count(1), help="keep only so many speech tokens (default: all)")
    parser.add_argument(
        "--backend", choices=("auto", "eager", "compile", "graph", "graph+compile", "off"), default="auto",
        help="what decodes (default: auto, graph on a GPU, eager elsewhere; compile takes a minute at first)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16", "int8"), help="of the backbone (default: as loaded)"
    )
    parser.add_argument("--no-cache", action="store_true", help="recompute everything, for comparison")
    parser.add_argument("--seed", type=count(0, LARGEST_SEED), default=0)
    parser.add_argument("--language", default="en", help="of the text, for the multilingual variant")
    parser.add_argument(
        "--wav", type=new_file, default=Path("chatterbox.wav"), help="where to write audio, if there is a vocoder"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the summary there")
    options = parser.parse_args()
    check_model(parser, options.variant, options.checkpoint)
    check_device(parser, options.device)
    check_backend(parser, options.backend, options.device)
    check_sound(parser, options)
    if options.audio:
        try:
            s3gen_module()
        except KVCacheError as error:
            parser.error(f"--audio: {said(error)}")
    elif options.vocoder is not None and options.weights == "random" and options.checkpoint is None:
        parser.error("--vocoder, --steps, --reference-seconds, --vocoder-precision: no audio is made; add --audio")
    options.fail = parser.error
    return options


def hub_folder(variant: str) -> Path | None:
    """The variant's files from the Hugging Face hub, or its local copy; None if it does not answer within seconds."""
    if variant not in REPOSITORIES:
        return None
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        # One small question first, with a short time-out: a machine without a network should not wait for minutes.
        hf_hub_download(REPOSITORIES[variant], WEIGHTS[variant][0], etag_timeout=3, local_files_only=not _hub_answers())
        return Path(snapshot_download(REPOSITORIES[variant], etag_timeout=3))
    except Exception as error:  # the hub's errors have no common base; which one it was is said
        Console(stderr=True).print(f"[dim]no weights from the hub ({type(error).__name__})[/dim]")
        return None


def _hub_answers() -> bool:
    import socket

    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def load(options: argparse.Namespace) -> tuple[Any, str]:
    """The model, whole where its audio stack is installed, and a sentence on its weights."""
    folder = options.checkpoint
    if folder is None and options.weights != "random":
        folder = hub_folder(options.variant)
        if folder is None and options.weights == "hub":
            raise SystemExit(
                f"the hub has no weights for {options.variant!r} here; give --checkpoint, or --weights random"
            )
    if folder is None:
        t3 = load_t3(options.variant, device=options.device, seed=0)
        if options.audio:
            return with_random_s3gen(t3), "All weights are random, S3Gen's too: speed and memory are real, it is noise."
        return t3, "Weights are random: speed, memory and shapes are real, the tokens are not speech."
    if options.variant in CLASSES:
        module, name = CLASSES[options.variant]
        try:
            tts = getattr(importlib.import_module(module), name)
        except ImportError as error:
            Console(stderr=True).print(f"[dim]no audio: {error.name} is not installed; speech tokens only[/dim]")
        else:
            return tts.from_local(folder, options.device), f"Weights from {folder}."
    return load_t3(
        options.variant, folder, device=options.device
    ), f"T3 weights from {folder}; no vocoder, so tokens only."


def with_random_s3gen(t3: Any) -> Any:
    """A stand-in for the whole model whose vocoder is upstream's, with random weights and a made-up clip for a voice."""
    tts = stand_in(t3)
    tts.s3gen = random_s3gen(meanflow=t3.is_gpt).to(t3.device)
    clip = 0.1 * torch.randn(REFERENCE * SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tts.conds.gen = tts.s3gen.embed_ref(clip, SAMPLE_RATE)
    return tts


def text_tokens(t3: Any, text: str, folder: Path | None) -> torch.Tensor:
    """The text as tokens, by the checkpoint's tokenizer where there is one."""
    if folder is not None and not t3.is_gpt and (folder / "tokenizer.json").is_file():
        tokenizer = importlib.import_module("chatterbox.models.tokenizers").EnTokenizer(str(folder / "tokenizer.json"))
        tokens = tokenizer.text_to_tokens(text)
        start, stop = torch.tensor([[t3.hp.start_text_token]]), torch.tensor([[t3.hp.stop_text_token]])
        return torch.cat([start, tokens, stop], 1)
    if folder is not None and t3.is_gpt:
        from transformers import AutoTokenizer

        return torch.as_tensor(AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids)
    return byte_tokens(t3, text)


def write_wav(path: Path, audio: torch.Tensor, rate: int) -> None:
    samples = (audio.clamp(-1, 1) * 32767).to(torch.int16).numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def main() -> None:
    options = parse()
    console = Console()
    with console.status(f"loading {options.variant} …"):
        model, sentence = load(options)
    t3 = getattr(model, "t3", model)
    policy = KeepAll() if options.window is None else SlidingWindow(options.window)
    try:
        engine = ChatterboxEngine(
            model, policy, backend=options.backend, precision=options.precision, vocoder=options.vocoder
        )
    except KVCacheError as error:
        options.fail(said(error))
    if options.no_cache:
        engine.enabled = False
    millions = sum(p.numel() for p in t3.parameters()) / 1e6
    console.print(
        f"[bold]Chatterbox {options.variant}[/bold], T3 of {millions:.0f} M parameters on {options.device}. {escape(sentence)}"
    )
    console.print(f"“{options.text}”", markup=False)

    shared: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    per_token = 1
    begin = time.perf_counter()
    try:
        if model is not t3:
            per_token = model.sr // TOKENS_PER_SECOND
            language = options.language if t3.hp.is_multilingual else None
            chunks = engine.generate_stream(options.text, language_id=language, **options.chunks, **shared)
        else:
            text = text_tokens(t3, options.text, options.checkpoint)
            chunks = engine.inference_stream(
                t3_cond=random_conditionals(t3), text_tokens=text, chunk_size=options.chunk_size, **shared
            )
    except KVCacheError as error:
        options.fail(f"cannot speak this: {error}")
    first, parts, tokens = 0.0, [], 0.0
    with Live(console=console, refresh_per_second=8) as live:
        for n, chunk in enumerate(chunks, 1):
            now = time.perf_counter() - begin
            first = first or now
            parts.append(chunk)
            tokens += chunk.shape[1] / per_token
            cache = engine.report()
            live.update(
                Text(
                    f"chunk {n}  {tokens:.0f} tokens  {tokens / now:.1f} tokens/s  first chunk {first:.2f} s  "
                    f"cache {cache.stored} tokens, {cache.nbytes / 2**20:.1f} MiB"
                )
            )
    seconds = time.perf_counter() - begin
    report = engine.report()
    summary = {
        "variant": options.variant,
        "weights": sentence,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "kv_cache": report.enabled,
        "policy": repr(engine.policy),
        "decoded by": report.backend or "a loop on the host",
        "precision": options.precision or "as loaded",
        "speech tokens": round(tokens),
        "seconds of speech": round(tokens / TOKENS_PER_SECOND, 2),
        "first chunk, s": round(first, 3),
        "total, s": round(seconds, 2),
        "tokens/s": round(tokens / seconds, 1),
        "RTF (T3 alone)" if model is t3 else "RTF": round(seconds / (tokens / TOKENS_PER_SECOND), 3),
        "cache, tokens kept": report.stored,
        "cache, tokens seen": report.seen,
        "cache, MiB": round(report.nbytes / 2**20, 1),
    }
    table = Table(title="Summary", show_header=False)
    for name, value in summary.items():
        table.add_row(name, escape(str(value)))
    console.print(table)
    if model is not t3:
        write_wav(options.wav, torch.cat(parts, 1)[0], model.sr)
        console.print(f"audio in {options.wav}", markup=False)
    else:
        console.print("[dim]tokens only; docs/chatterbox.md says how to add audio, then try --audio[/dim]")
    if options.json is not None:
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
