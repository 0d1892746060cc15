"""A transformers language model by its name: a folder, a ``.gguf`` file, or an id of the Hugging Face hub."""

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcache.cache import CacheReport, KeepAll, KVQuantization
from kvcache.decoding import BUCKET, Setting, Told, WarmUp
from kvcache.errors import InputError, KVCacheError, MissingDependencyError, said
from kvcache.manager import KVCacheManager
from kvcache.models import cache_kwarg, encoder_input, planned, quantize_linear, reads_text
from kvcache.tools._footprint import Footprint, language_footprint
from kvcache.tools._target import ModelTarget, Prepared


class LanguageTarget(ModelTarget):
    """A transformers language model: a folder, a ``.gguf`` file, or an id of the Hugging Face hub.

    Raises:
        InputError: if it is none of these.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path = Path(name)
        if not name.strip():
            raise InputError(
                "the model's name is empty; give a folder, a .gguf file, a hub id or a name such as chatterbox-nano"
            )
        self._options: dict[str, Any] = {}
        self._from = name
        if path.suffix == ".gguf" and path.is_file():
            if find_spec("gguf") is None:
                raise MissingDependencyError(
                    f"{name}: a .gguf file needs the package gguf; run: pip install gguf accelerate"
                )
            self._options = {"gguf_file": path.name, "local_files_only": True}
            self._from = str(path.parent)
        elif path.is_dir():
            if not (path / "config.json").is_file():
                raise InputError(f"{name}: the folder has no config.json; give one that save_pretrained wrote")
            self._options = {"local_files_only": True}
        elif path.suffix or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise InputError(
                f"{name!r} is no folder with a config.json, no .gguf file and no hub id (owner/name), nor a name that an "
                "installed adapter knows, such as 'chatterbox-nano'"
            )

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return self._read(lambda: AutoConfig.from_pretrained(self._from, **self._options))

    def skeleton(self) -> nn.Module:
        def made() -> nn.Module:
            with torch.device("meta"):
                model: nn.Module = self._auto.from_config(self._config, dtype=self._dtype)
            return model.eval()

        found: nn.Module = self._read(made)
        return found

    @property
    def _auto(self) -> Any:
        """What transformers makes such a model with."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

        decoders: tuple[Any, ...] = (AutoModelForCausalLM,)
        if getattr(self._config, "is_encoder_decoder", False):
            decoders = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForCausalLM)
        return next((auto for auto in decoders if type(self._config) in auto._model_mapping), decoders[-1])

    @property
    def _dtype(self) -> torch.dtype:
        """What `load` makes of the weights: as transformers does, the dtype that the config names, else fp32."""
        named = getattr(self._config, "dtype", None)
        return named if isinstance(named, torch.dtype) and "gguf_file" not in self._options else torch.float32

    def decoder(self, model: nn.Module) -> nn.Module:
        return model

    def load(self, device: str = "cpu") -> nn.Module:
        return self._model.to(device)

    @cached_property
    def _model(self) -> nn.Module:
        model: nn.Module = self._read(
            lambda: self._auto.from_pretrained(self._from, dtype=self._dtype, **self._options)
        )
        return model.eval()

    def _read(self, read: Callable[[], Any]) -> Any:
        level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            with redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
                return read()
        except KVCacheError:
            raise
        except Exception as error:  # whatever transformers, torch and safetensors make of such a file
            lines = said(error).strip().splitlines() or [""]
            known = isinstance(error, (OSError, ValueError, KeyError))  # whose words are for users
            line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
            line = line if known and line else f"{type(error).__name__}: {line}"
            if isinstance(error, MemoryError):
                line = "there is not enough memory for it"
            elif "ignore_mismatched_sizes" in line:
                line = "its weights are not of the sizes that its config.json says"
            raise InputError(
                f"{self.name} cannot be loaded: {line.rstrip('.')}; check the name and the files, or give another folder"
            ) from error
        finally:
            logging.getLogger("transformers").setLevel(level)

    def sample(self, tokens: int) -> tuple[Tensor, str | None]:
        from transformers import AutoTokenizer

        try:
            tokenizer = self._read(lambda: AutoTokenizer.from_pretrained(self._from, **self._options))
            ids = tokenizer(_TEXT).input_ids
        except InputError:
            ids = []
        if len(ids) >= tokens:
            return torch.as_tensor(ids[:tokens]), None
        vocabulary = self._config.get_text_config().vocab_size
        made_up = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
        return made_up, "there is no tokenizer beside the weights: judged on made-up tokens"

    def prepared(self, setting: Setting, device: str = "cpu") -> "Prepared":
        return PreparedLanguage(self.load(device), setting)

    def warm_up(self, setting: Setting, context: int, tokens: int, told: Told) -> WarmUp:
        if setting.requests > 1:
            raise InputError(
                f"{self.name} decodes its requests one by one, not {setting.requests} together; leave that out"
            )
        language = PreparedLanguage(self.load(), setting)
        prompt, settings = language.request(context, tokens)
        if (reason := language.manager.explain(prompt, backend="auto", **settings).reason) is not None:
            raise InputError(f"{self.name} has no steps to compile: {reason}")
        return language.manager.warm_up(prompt, backend=setting.backend, told=told, **settings)

    def longest(self, setting: Setting) -> int | None:
        text, names = self._config.get_text_config(), ("max_position_embeddings", "max_target_positions")
        given = [setting.max_length, *(getattr(text, name, None) for name in names)]
        return min((most for most in given if most is not None), default=None)

    def footprint(self, setting: Setting, context: int, tokens: int, device: str) -> Footprint:
        manager = _managed(planned(self.blank, setting.precision, torch.device(device)), setting)
        return language_footprint(manager, setting, context, tokens, device)


def _managed(model: Any, setting: Setting) -> KVCacheManager:
    return KVCacheManager(
        model,
        KeepAll() if setting.policy is None else setting.policy,
        setting.max_length,
        kv_dtype=setting.kv_dtype,
        bucket=setting.bucket or BUCKET,
        storage=None if setting.quantization is None else KVQuantization(setting.quantization),
    )


class PreparedLanguage:
    """A language model that decodes in one way."""

    def __init__(self, model: Any, setting: Setting) -> None:
        self._model = model if setting.precision is None else quantize_linear(model, setting.precision)
        self._setting = setting
        self.manager = _managed(self._model, setting)

    @property
    def module(self) -> nn.Module:
        found: nn.Module = self.manager.observed_model
        return found

    def stream(self, context: int, tokens: int, chunk_size: int = 16) -> Iterator[int]:
        prompt, settings = self.request(context, tokens)
        for chunk in self.manager.stream(prompt, chunk_size=chunk_size, backend=self._setting.backend, **settings):
            yield chunk.numel()

    def run(self, context: int, tokens: int) -> None:
        prompt, settings = self.request(context, tokens)
        if (
            self._setting.backend == "off"
            or self.manager.explain(prompt, backend="auto", **settings).reason is not None
        ):
            self.manager.generate(prompt, **settings)
        else:
            for _ in self.stream(context, tokens):
                pass

    def vocode(self, tokens: int) -> Mapping[str, float] | None:  # noqa: ARG002  # as every runner
        return None

    @property
    def vocoder(self) -> nn.Module | None:
        return None

    @property
    def kept(self) -> int:
        return 0

    def request(self, context: int, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        """What `generate` is given: the tokens, or what an encoder hears, and how many to make."""
        ids = self._ids(context)
        # An end that the vocabulary does not have: only the length ends it.
        end = self._model.config.get_text_config().vocab_size
        settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": end, "pad_token_id": end}
        if not self._hears:
            return ids, {"attention_mask": torch.ones_like(ids), **settings}
        (features,) = encoder_input(self._model, self._setting.requests, context, self._model.device).values()
        return features, {"decoder_input_ids": ids, **settings}

    @property
    def _hears(self) -> bool:
        return bool(self._model.config.is_encoder_decoder) and not reads_text(self._model)

    def _ids(self, context: int) -> Tensor:
        """Made-up prompts ``[requests, context]``."""
        vocabulary = self._model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (self._setting.requests, context), generator=generator)
        return ids.to(self._model.device)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        ids = ids[None].to(self._model.device)
        cache, half = self.manager.new_cache(), (ids.shape[1] + 1) // 2
        given = {**cache_kwarg(self.module, cache), "use_cache": True}
        if self._model.config.is_encoder_decoder:
            return self._translated(ids, half, given)
        said = [self.module(ids[:, :half], **given).logits[0]]
        some = max(1, half // 32)  # tokens at a time, of a long text
        if self._setting.backend != "off":
            return torch.cat(
                [*said, self.manager.engine.decoder.teacher_forced_logits(said[0][-1:], cache, ids[0, half:])]
            )
        rest = torch.split(ids[:, half:], some, 1)
        return torch.cat(said + [self.module(one, **given).logits[0] for one in rest])

    def _translated(self, ids: Tensor, half: int, given: dict[str, Any]) -> Tensor:
        """The logits of a decoder that says the text that its encoder has read, or what it would of silence."""
        heard = encoder_input(self._model, 1, ids.shape[1], ids.device)
        heard = heard if self._hears else {"input_ids": ids}
        given["encoder_outputs"] = self._model.get_encoder()(**heard)
        parts = [ids[:, :half], *torch.split(ids[:, half:], 1, 1)]
        return torch.cat([self.module(decoder_input_ids=part, **given).logits[0] for part in parts])

    def report(self) -> CacheReport:
        return self.manager.report()

    def release(self) -> None:
        self.manager.release()


_TEXT = """The tide had gone out further than anyone in the village could remember, and along the wet sand people walked \
slowly, looking at what the sea had kept to itself. There were the ribs of a boat, black and soft as bread; a chain whose \
links had grown together; bottles, some of them whole. An old man who had fished there all his life said that his father \
had told him of such a day, and that it would be followed by a year of good catches or by none at all. Nobody asked which \
of the two it had been. The children found a bell. It was too heavy for them, so they dug around it with their hands until \
it stood free, and when the eldest struck it with a stone it gave a note so clear that everybody on the beach stopped and \
turned. Later they would not agree on what it had sounded like. The teacher, who played the organ on Sundays, was sure that \
it was an A, a little flat, and wrote that down in the book where she noted the weather. By four the light had changed. The \
first to see the line of water was the dog of the postman, which stood still and would not be called; then all of them saw it, \
grey and quite straight, and heard it too. They took what they could carry. The bell they left where it was, upright, and for \
some years, when the wind came from the west and the sea was high, there were people who said that they could hear it."""
"""What fidelity is judged on: plain prose."""
