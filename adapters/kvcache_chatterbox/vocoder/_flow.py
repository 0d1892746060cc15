"""The flow of S3Gen: speech tokens to mel, by upstream's own modules, one or several texts at once.

Upstream's `flow.inference` (CosyVoice2's, arXiv:2412.10117) runs for each chunk what only the voice decides, masks that hide
nothing, and a progress bar. Here a voice's part is a `Reference`, made once; rows of different lengths run together; noise,
steps and guidance are given. With upstream's noise the mel is upstream's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from kvcache import InputError
from kvcache.decoding import Programs
from kvcache.models import Precision
from kvcache_chatterbox.units import FRAMES_PER_TOKEN, MELS, SPEECH_TOKENS, TOKENS_PER_SECOND
from kvcache_chatterbox.vocoder._compiling import compiled_over
from kvcache_chatterbox.vocoder._narrow import at_precision

LEAST_REFERENCE, LONGEST_REFERENCE = 1.0, 30.0  # seconds that are heard
# Which dimensions are rows and frames.
_MOVING = {
    "x": (0, 2), "mu": (0, 2), "speakers": (0,), "conditions": (0, 2), "mask": (0, 1), "now": (0,), "then": (0,),
}  # fmt: skip
_HIDDEN = -1e10  # what upstream adds to the scores of padded frames


@dataclass(frozen=True, eq=False)
class Reference:
    """What the flow is told of a voice.

    Attributes:
        tokens: speech tokens of the reference clip ``[p]``.
        mel: its mel ``[2 p, 80]``.
        speaker: the speaker embedding, projected, ``[80]``.
    """

    tokens: Tensor
    mel: Tensor
    speaker: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.tokens, self.mel, self.speaker))


def check_reference(gen: Mapping[str, Any], seconds: float | None = None) -> None:
    """Raise `InputError` for a voice's reference, upstream's ``ref_dict``, that the flow cannot hear.

    Args:
        seconds: of it that are used, its first ones; all by default.
    """
    missing = [name for name in ("prompt_token", "prompt_feat", "embedding") if gen.get(name) is None]
    if missing:
        raise InputError(
            f"the voice has no reference for the vocoder: {', '.join(missing)} of S3Gen's ref_dict is missing; encode its clip, "
            "or give upstream's whole Conditionals"
        )
    tokens, mel, embedding = (torch.as_tensor(gen[name]) for name in ("prompt_token", "prompt_feat", "embedding"))
    # Upstream's own runs turn the ids into fp32, in the dictionary that they were given.
    ids = tokens.is_meta or bool(((tokens == tokens.round()) & (tokens >= 0) & (tokens < SPEECH_TOKENS)).all())
    known = tokens.numel() > 0 and ids
    if not known or mel.shape[-1:] != (MELS,) or embedding.numel() == 0:
        raise InputError(
            f"the voice's reference has tokens {list(tokens.shape)} of {tokens.dtype}, a mel {list(mel.shape)} and an embedding "
            f"{list(embedding.shape)}; expected ids below {SPEECH_TOKENS} [1, p], [1, 2 p, {MELS}] and [1, 192]: encode its clip again"
        )
    has = min(tokens.numel(), mel.numel() // MELS // FRAMES_PER_TOKEN) / TOKENS_PER_SECOND
    heard = has if seconds is None else min(has, seconds)
    if not LEAST_REFERENCE <= heard <= LONGEST_REFERENCE:
        raise InputError(
            f"the voice's reference is {heard:.2f} s long, and the vocoder takes {LEAST_REFERENCE:g} to {LONGEST_REFERENCE:g} s: "
            + ("encode a longer clip" if heard < LEAST_REFERENCE else "encode a shorter clip, or set reference_seconds")
        )


def reference_tokens(gen: Mapping[str, Any], seconds: float | None = None) -> int:
    """Speech tokens that the flow hears of a voice's reference, both of which `check_reference` has seen."""
    mel = torch.as_tensor(gen["prompt_feat"])
    length = min(torch.as_tensor(gen["prompt_token"]).numel(), mel.numel() // MELS // FRAMES_PER_TOKEN)
    return length if seconds is None else min(length, math.ceil(seconds * TOKENS_PER_SECOND))


class Flow:
    """Upstream's flow, driven from outside.

    Args:
        flow: `CausalMaskedDiffWithXvec` of an S3Gen.
        meanflow: whether its weights are distilled (MeanFlow, arXiv:2505.13447): no guidance, even steps.
        steps: of Euler's method; by default upstream's, 10, or 2 of distilled weights.
        guidance: classifier-free guidance; by default upstream's 0.7. 0 runs one row instead of two.
        precision: it computes in, see `at_precision`; by default as it is.
        compiled: let torch's compiler fuse what lies between the kernels of the estimator.
        programs: where what it made is kept; by default in the user's cache.
    """

    def __init__(
        self,
        flow: Any,
        *,
        meanflow: bool,
        steps: int | None = None,
        guidance: float | None = None,
        precision: Precision | None = None,
        compiled: bool = False,
        programs: Programs | None = None,
    ) -> None:
        self._flow = flow
        self._meanflow = meanflow
        self._encoder = at_precision(flow.encoder, precision)
        self._estimator = at_precision(flow.decoder.estimator, precision)
        computed = flow.decoder.estimator if self.device.type in ("cpu", "meta") else self._estimator
        self._dtype = next(computed.parameters()).dtype  # between its layers
        self._slope: Any = partial(estimate, self._estimator)
        if compiled:
            self._slope = compiled_over(estimate, self._estimator, _MOVING, "the flow's estimator", programs)
        self.steps = steps or (2 if meanflow else 10)
        rate = float(flow.decoder.inference_cfg_rate) if guidance is None else guidance
        self.guidance = 0.0 if meanflow else rate

    @property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        """What runs: the encoder and the estimator, at their precision."""
        return self._encoder, self._estimator

    @property
    def device(self) -> torch.device:
        return torch.device(self._flow.input_embedding.weight.device)

    @torch.inference_mode()
    def reference(self, gen: Mapping[str, Any], seconds: float | None = None) -> Reference:
        """The reference of a voice, from upstream's ``ref_dict``.

        Args:
            gen: what `embed_ref` made.
            seconds: of the clip that are used, its first ones; all by default.
        """
        weight = self._flow.spk_embed_affine_layer.weight
        tokens = torch.as_tensor(gen["prompt_token"]).reshape(-1).to(self.device)
        mel = torch.as_tensor(gen["prompt_feat"]).reshape(-1, MELS).to(weight)
        embedding = torch.as_tensor(gen["embedding"]).reshape(1, -1).to(weight)
        length = reference_tokens(gen, seconds)
        speaker = self._flow.spk_embed_affine_layer(normalize(embedding, dim=1))[0]
        return Reference(tokens[:length].clone(), mel[: FRAMES_PER_TOKEN * length].clone(), speaker.clone())

    @torch.inference_mode()
    def mels(
        self,
        texts: Sequence[Tensor],
        references: Sequence[Reference],
        noises: Sequence[Tensor],
        ended: Sequence[bool] | None = None,
    ) -> list[Tensor]:
        """The mels ``[80, 2 n]`` of speech tokens ``[n]``, each behind its reference.

        Args:
            texts: speech tokens.
            references: whose voice, one for each.
            noises: ``[80, 2 (p + n)]`` for each: what the flow starts from, the reference's part first.
            ended: whether each text ends here, as all do by default. Otherwise its last three tokens are only looked ahead at,
                and have no mel yet.
        """
        lengths = [reference.tokens.numel() + text.numel() for text, reference in zip(texts, references, strict=True)]
        tokens = torch.stack(
            [
                pad(torch.cat([reference.tokens.long(), text.to(self.device).long()]), (0, max(lengths) - length))
                for text, reference, length in zip(texts, references, lengths, strict=True)
            ]
        )
        hidden = self._encode(tokens, torch.tensor(lengths, device=self.device))
        ahead = int(self._flow.pre_lookahead_len)
        ends = [True] * len(lengths) if ended is None else ended
        frames = [FRAMES_PER_TOKEN * (length - ahead * (not end)) for length, end in zip(lengths, ends, strict=True)]
        most = max(frames)
        mu = self._flow.encoder_proj(hidden)[:, :most].transpose(1, 2).contiguous()
        conditions, start = torch.zeros_like(mu), torch.zeros_like(mu)
        for row, (reference, noise, count) in enumerate(zip(references, noises, frames, strict=True)):
            conditions[row, :, : reference.mel.shape[0]] = reference.mel.T
            start[row, :, :count] = noise[:, :count]
        prefix_cache = torch.stack([reference.speaker for reference in references])
        mask = None
        if min(frames) < most:
            mask = torch.arange(most, device=self.device) < torch.tensor(frames, device=self.device)[:, None]
        found = self._solve(start, mu, prefix_cache, conditions, mask)
        return [
            found[row, :, reference.mel.shape[0] : count]
            for row, (reference, count) in enumerate(zip(references, frames, strict=True))
        ]

    def _encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Upstream's `UpsampleConformerEncoder.forward`, in which a text's last tokens look ahead at nothing, as alone."""
        net = self._encoder
        known = _known(lengths, tokens.shape[1])
        x, positions, shown = net.embed(self._flow.input_embedding(tokens) * known.transpose(1, 2), known)
        x = net.pre_lookahead_layer(x * known.transpose(1, 2))
        x = net.forward_layers(x, shown, positions, shown)
        x, lengths = net.up_layer(x.transpose(1, 2).contiguous(), lengths)
        x, positions, shown = net.up_embed(x.transpose(1, 2).contiguous(), _known(lengths, x.shape[2]))
        x = net.forward_up_layers(x, shown, positions, shown)
        return torch.as_tensor(net.after_norm(x) if net.normalize_before else x)

    def _solve(self, x: Tensor, mu: Tensor, prefix_cache: Tensor, conditions: Tensor, mask: Tensor | None) -> Tensor:
        """Euler's method from noise at 0 to the mel at 1, as upstream's `basic_euler` and `solve_euler`."""
        given = x.dtype
        x, mu, prefix_cache, conditions = (part.to(self._dtype) for part in (x, mu, prefix_cache, conditions))
        times = torch.linspace(0, 1, self.steps + 1, device=x.device, dtype=x.dtype)
        if not self._meanflow and self._flow.decoder.t_scheduler == "cosine":
            times = 1 - torch.cos(times * 0.5 * torch.pi)
        rows = x.shape[0]
        guided = self.guidance > 0
        if guided:  # the second half is told nothing
            mu, prefix_cache, conditions = (
                torch.cat([part, torch.zeros_like(part)]) for part in (mu, prefix_cache, conditions)
            )
            mask = None if mask is None else mask.repeat(2, 1)
        for now, then in pairwise(times):
            slope = self._slope(
                torch.cat([x, x]) if guided else x,
                mu,
                prefix_cache,
                conditions,
                mask,
                now.expand(mu.shape[0]),
                then.expand(mu.shape[0]),
            )
            if guided:
                told, untold = slope[:rows], slope[rows:]
                slope = (1.0 + self.guidance) * told - self.guidance * untold
            x = x + (then - now) * slope
        return x.to(given)


def estimate(
    net: Any,
    x: Tensor,
    mu: Tensor,
    prefix_cache: Tensor,
    conditions: Tensor,
    mask: Tensor | None,
    now: Tensor,
    then: Tensor,
) -> Tensor:
    """Upstream's `ConditionalDecoder.forward`, whose attention has no mask where no frame is padded."""
    time = net.time_mlp(net.time_embeddings(now).to(now.dtype))
    if net.meanflow:
        end = net.time_mlp(net.time_embeddings(then).to(now.dtype))
        time = net.time_embed_mixer(torch.cat([time, end], 1))
    x = torch.cat([x, mu, prefix_cache[..., None].expand(-1, -1, x.shape[-1]), conditions], 1)
    shown = x.new_ones(1, 1, 1) if mask is None else mask[:, None].to(x.dtype)
    bias = None if mask is None else (1.0 - shown) * _HIDDEN
    skipped = []
    for resnet, blocks, down in net.down_blocks:
        x = _attended(resnet(x, shown, time), blocks, bias, time)
        skipped.append(x)
        x = down(x * shown)
    for resnet, blocks in net.mid_blocks:
        x = _attended(resnet(x, shown, time), blocks, bias, time)
    for resnet, blocks, up in net.up_blocks:
        x = torch.cat([x, skipped.pop()], 1)
        x = up(_attended(resnet(x, shown, time), blocks, bias, time) * shown)
    x = net.final_block(x, shown)
    return torch.as_tensor(net.final_proj(x * shown) * shown)


def _attended(x: Tensor, blocks: Any, bias: Tensor | None, time: Tensor) -> Tensor:
    x = x.transpose(1, 2).contiguous()
    for block in blocks:
        x = block(hidden_states=x, attention_mask=bias, timestep=time)
    return x.transpose(1, 2).contiguous()


def _known(lengths: Tensor, most: int) -> Tensor:
    """Which of `most` places are no padding ``[rows, 1, most]``."""
    return (torch.arange(most, device=lengths.device) < lengths[:, None])[:, None]
