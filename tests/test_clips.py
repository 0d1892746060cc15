"""What is made of a voice's clip is kept beside what T3 computes of it: found by what decides it, checked, and else made again."""

import contextlib
import hashlib

import pytest
import torch
from support.inside.speech import StandIn, reseed
from support.snapshots import running_redis
from support.t3_models import UPSTREAMS_WARNINGS, tiny_t3
from support.whole import clip, whole

from kvcache import DiskStore, MemoryStore, PrefixSnapshot, RedisStore, RemoteStore, SpeakerCache, TieredStore
from kvcache.events import subscribe
from kvcache_chatterbox import ChatterboxEngine, stand_in
from kvcache_chatterbox.voices import Voice, clip_key, encoder_of, kept_bytes, packed

pytestmark = [*UPSTREAMS_WARNINGS, pytest.mark.one_release, pytest.mark.filterwarnings("ignore")]
T3 = {}


class Encodes(StandIn):
    """A stand-in that says when it encodes, and has modules that do."""

    def __init__(self, kind="english", seed=0, weight=0.5):
        if kind not in T3:
            T3[kind] = tiny_t3(kind)
        super().__init__(T3[kind], seed)
        for name in ("tokenizer", "speaker_encoder"):
            module = torch.nn.Linear(3, 3)
            torch.nn.init.constant_(module.weight, weight)
            torch.nn.init.zeros_(module.bias)
            setattr(self.s3gen, name, module)

    def prepare_conditionals(self, wav_fpath, exaggeration=0.5):
        COUNTED.add()
        super().prepare_conditionals(wav_fpath, exaggeration)
        assert self.conds is not None
        self.conds.gen["prompt_feat_len"] = None


class Counter:
    """Not a plain value: what a class's code reads of its module would be in its name."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.count = 0

    def add(self):
        self.count += 1

    def __len__(self):
        return self.count


COUNTED = Counter()


@pytest.fixture(autouse=True)
def counted():
    COUNTED.clear()


@pytest.fixture
def file(tmp_path):
    made = tmp_path / "clip.wav"
    made.write_bytes(b"a clip")
    return made


def heard(store, file, model=None, **options):
    """The voice of a clip, as a new process would have it; how often a clip was encoded; and what was told."""
    told, before = [], len(COUNTED)
    ours = ChatterboxEngine(Encodes() if model is None else model, prefix_cache=SpeakerCache(store), **options)
    with subscribe(lambda event: told.append((event.kind, event.reason)), ("hit", "built", "refused")):
        voice = ours.voice_of(None, file)
    return voice, len(COUNTED) - before, [kind for kind, _ in told]


def same(one, other):
    given = [{**vars(voice.t3), **voice.gen} for voice in (one, other)]
    assert given[0].keys() == given[1].keys()
    for name, value in given[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, given[1][name]) and value.dtype == given[1][name].dtype
        else:
            assert value == given[1][name]


@contextlib.contextmanager
def stores(kind, tmp_path):
    """Gives a store; what it keeps is there the next time, as in another process."""
    if kind == "redis":
        with running_redis(tmp_path) as server:
            yield lambda: RedisStore(server.url, namespace="clips", timeout=20)
        return
    memory = MemoryStore("1MiB")
    made = {
        "memory": lambda: memory,
        "disk": lambda: DiskStore(tmp_path / "store"),
        "signed": lambda: DiskStore(tmp_path / "store", secret="a long secret"),
        "remote": lambda: RemoteStore(f"file://{tmp_path}/remote"),
        "tiers": lambda: TieredStore(MemoryStore("1MiB"), DiskStore(tmp_path / "store"), write_behind=False),
    }[kind]
    yield made


@pytest.mark.parametrize("kind", ["memory", "disk", "signed", "tiers", "remote", "redis"])
def test_a_clip_is_encoded_once_for_all_processes(kind, file, tmp_path):
    with stores(kind, tmp_path) as store:
        first, encoded, told = heard(store(), file)
        assert (encoded, told) == (1, ["built"])
        again, encoded, told = heard(store(), file)
        assert (encoded, told) == (0, ["hit"])
        same(first, again)
        assert not again.kept
        alone, _, _ = heard(MemoryStore("1MiB"), file)
        same(first, alone)
        if kind == "memory":
            held = sum(tier.nbytes for tier in store().tiers)
            gen = sum(value.nbytes for value in first.gen.values() if value is not None)
            t3 = sum(value.nbytes for value in vars(first.t3).values() if value is not None)
            assert held == gen + t3 + 4 * 8 + 3  # its key, and a byte for each part that is None


def test_a_voice_from_a_store_speaks_as_the_one_that_was_encoded(file):
    store = MemoryStore("32MiB")
    said = []
    for _ in range(2):
        ours = ChatterboxEngine(Encodes(), prefix_cache=SpeakerCache(store))
        ours.add_voice("sarah", file)
        said.append(ours.generate("Hello there.", voice="sarah", max_new_tokens=8, seed=0))
    assert len(COUNTED) == 1 and torch.equal(*said)


def other_clip(model, file):
    file.write_bytes(b"another clip")


def other_weights(model, file):
    with torch.no_grad():
        model.s3gen.tokenizer.weight[0, 0] = 0.25


def other_speaker_encoder(model, file):
    model.s3gen.speaker_encoder = torch.nn.Linear(3, 4)


def other_setting(model, file):
    reseed(model, 5)


def other_prompt(model, file):
    model.t3 = tiny_t3("english")
    model.t3.hp.speech_cond_prompt_len = 10


def other_code(model, file):
    kind = type(
        "Other", (Encodes,), {"prepare_conditionals": lambda self, path: Encodes.prepare_conditionals(self, path, 0.9)}
    )
    model.__class__ = kind


@pytest.mark.parametrize(
    "change", [other_clip, other_weights, other_speaker_encoder, other_setting, other_prompt, other_code]
)
def test_what_decides_the_voice_is_in_its_key(change, file):
    store, model = MemoryStore("1MiB"), Encodes()
    heard(store, file)
    change(model, file)
    _, encoded, told = heard(store, file, model)
    assert (encoded, told) == (1, ["built"])


def test_a_change_is_noticed_by_an_engine_that_knows_the_clip(file):
    model = Encodes()
    ours = ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("1MiB")))
    first = ours.voice_of(None, file)
    assert ours.voice_of(None, file) is not None and len(COUNTED) == 1
    reseed(model, 7)
    second = ours.voice_of(None, file)
    assert len(COUNTED) == 2 and not torch.equal(first.t3.speaker_emb, second.t3.speaker_emb)


@pytest.mark.parametrize("why", ["hooks", "no modules", "an object", "its own reference"])
def test_what_cannot_be_told_from_others_is_not_kept(why, file):
    store, model = MemoryStore("1MiB"), Encodes()
    if why == "hooks":
        model.s3gen.tokenizer.register_forward_hook(lambda *given: None)
    elif why == "no modules":
        model = stand_in(tiny_t3("english"))
    elif why == "an object":
        model.denoiser = object()
    else:
        model.s3gen.embed_ref = object.__new__(type("Callable", (), {"__call__": lambda self: None}))
    assert encoder_of(model) is None
    heard(store, file, model)
    assert store.nbytes == 0


@pytest.mark.parametrize("harm", ["a byte", "cut short", "empty", "another secret", "evicted"])
def test_what_is_not_intact_is_made_again(harm, file, tmp_path):
    folder = tmp_path / "store"
    first, _, _ = heard(DiskStore(folder, secret="one"), file)
    address = clip_key(encoder_of(Encodes()), _digest(file)).address
    [stored] = [path for path in folder.rglob("*") if address in path.name and path.stat().st_size > 1000]
    data = bytearray(stored.read_bytes())
    if harm == "a byte":
        data[-5] ^= 1
        stored.write_bytes(data)
    elif harm == "cut short":
        stored.write_bytes(data[:-9])
    elif harm == "empty":
        stored.write_bytes(b"")
    elif harm == "evicted":
        DiskStore(folder, secret="one").delete(clip_key(encoder_of(Encodes()), _digest(file)))
    secret = "two" if harm == "another secret" else "one"
    again, encoded, told = heard(DiskStore(folder, secret=secret), file)
    assert encoded == 1 and told == (["built"] if harm == "evicted" else ["refused", "built"])
    same(first, again)
    _, encoded, told = heard(DiskStore(folder, secret=secret), file)
    assert (encoded, told) == (0, ["hit"])


def _digest(file):
    return hashlib.sha256(file.read_bytes()).digest()


FOREIGN = {
    "no voice": lambda parts: {"states": torch.zeros(3)},
    "no reference": lambda parts: {name: value for name, value in parts.items() if "gen." not in name},
    "a part is missing": lambda parts: {name: value for name, value in parts.items() if name != "t3.speaker_emb"},
    "a part too many": lambda parts: {**parts, "t3.other": torch.zeros(1)},
    "another shape": lambda parts: {**parts, "t3.speaker_emb": torch.zeros(1, 7)},
    "ids out of range": lambda parts: {**parts, "t3.cond_prompt_speech_tokens": torch.full((1, 20), 99999)},
    "ids that are numbers": lambda parts: {**parts, "t3.cond_prompt_speech_tokens": torch.zeros(1, 20)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_foreign_is_refused_and_made_again(what, file):
    store = MemoryStore("1MiB")
    first, _, _ = heard(store, file)
    key = clip_key(encoder_of(Encodes()), _digest(file))
    parts = dict(store.get(key).extra)
    store.put(PrefixSnapshot(key, (), extra=FOREIGN[what](parts)))
    again, encoded, told = heard(store, file)
    assert encoded == 1 and told == ["hit", "refused", "built"]
    same(first, again)
    assert heard(store, file)[1] == 0


def test_numbers_that_are_not_finite_are_refused(file, tmp_path):
    store = DiskStore(tmp_path / "store")
    first, _, _ = heard(store, file)
    key = clip_key(encoder_of(Encodes()), _digest(file))
    bad = {**store.get(key).extra, "gen.embedding": torch.full((1, 192), float("nan"))}
    store.put(PrefixSnapshot(key, (), extra=bad))  # which a store does not take
    same(first, heard(store, file)[0])
    memory = MemoryStore("1MiB")
    memory.put(PrefixSnapshot(key, (), extra=bad))
    again, encoded, _ = heard(memory, file)
    assert encoded == 1
    same(first, again)


def test_a_store_that_is_full_or_down_costs_a_computation(file, tmp_path):
    for store in (MemoryStore(100), DiskStore(tmp_path / "small", 100)):
        first, encoded, _ = heard(store, file)
        again, more, _ = heard(store, file)
        assert (encoded, more) == (1, 1)
        same(first, again)


def test_the_entry_of_a_clip_takes_what_is_planned():
    model = Encodes()
    reference = {
        "prompt_token": torch.zeros(1, 250, dtype=torch.long),
        "prompt_token_len": torch.zeros(1, dtype=torch.long),
        "prompt_feat": torch.zeros(1, 500, 80),
        "prompt_feat_len": None,
        "embedding": torch.zeros(1, 192),
    }
    store = MemoryStore("1MiB")
    store.put(packed(clip_key("0" * 64, bytes(range(32))), Voice(model.conds.t3, reference)))
    assert store.nbytes == kept_bytes(model.conds.t3, 250)


@pytest.mark.audio
def test_upstreams_own_encoding_is_kept(tmp_path):
    model, file = whole("english"), clip(tmp_path / "clip.wav", 3)
    store = DiskStore(tmp_path / "store")
    first = ChatterboxEngine(model, prefix_cache=SpeakerCache(store)).voice_of(None, file)
    assert store.nbytes > first.gen["prompt_feat"].nbytes
    model.t3 = tiny_t3("english")  # as another process would have it
    told = []
    with subscribe(lambda event: told.append(event.kind), ("hit", "built", "refused")):
        again = ChatterboxEngine(model, prefix_cache=SpeakerCache(DiskStore(tmp_path / "store"))).voice_of(None, file)
    assert told == ["hit"]
    same(first, again)
