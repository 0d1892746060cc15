"""`kvcache prefixes` over real stores: what it says is what was put, and what it does is what it says."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from support.inside import stores as inside
from support.inside.commands import DESCRIBE, UNPACK
from support.ports import deserted
from support.snapshots import BLOBS, cold, exact, ids, voice

pytest.importorskip("typer")
pytest.importorskip("rich")

from kvcache import PrefixSnapshot
from kvcache.cache import pack
from kvcache.cli import main
from kvcache.prefixes.stores import DiskStore, open_store, shown_place

pytestmark = pytest.mark.one_release

DAY = 86400
KEYS = [voice(1), voice(2, tokens=9, dtype=torch.long), voice(3, model="bf16"), voice(4, tokens=1)]


@pytest.fixture
def place(request, tmp_path):
    """A new store of a kind: the options that name it, and the store itself."""
    opened = []

    def make(kind, where="a", secret=None):
        namespace = None
        if kind == "disk":
            url = str(tmp_path / where)
        elif kind == "redis":
            url, namespace = request.getfixturevalue("redis_url"), f"{tmp_path.name}.{where}"[-64:]
        else:
            url = f"{kind.removeprefix('remote-')}://{tmp_path}/{where}"
        options = ["--store", url, *(() if namespace is None else ("--namespace", namespace))]
        if secret is not None:
            (tmp_path / f"{where}.secret").write_bytes(secret + b"\n")
            options += ["--secret-file", str(tmp_path / f"{where}.secret")]
        opened.append(open_store(url, secret=secret, namespace=namespace))
        if kind == "disk":
            opened[-1].folder.mkdir(exist_ok=True)
        return SimpleNamespace(options=options, store=opened[-1])

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def down():
    with deserted() as port:
        yield SimpleNamespace(options=["--store", f"redis://user:hunter2@127.0.0.1:{port}"])


@pytest.fixture
def prefixes(capsys):
    """Runs the command and gives what it printed, and the JSON of it if that was asked for."""

    def run(place, *arguments, code=0):
        assert main(["prefixes", *arguments, *(() if place is None else place.options)]) == code
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == (code != 0), err
        return SimpleNamespace(out=out, err=err, json=json.loads(out) if "--json" in arguments and out else None)

    return run


def filled(place, keys=KEYS):
    for key in keys:
        place.store.put(cold(key))
    return place


def held(place):
    return {entry.address: entry for entry in place.store.entries()}


def cells(table):
    """The rows of a printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]


# ---------------------------------------------------------------------- list and show


@pytest.mark.parametrize("kind", BLOBS)
def test_list_says_what_was_put(kind, place, prefixes):
    here = filled(place(kind))
    here.store.pin(KEYS[2])
    said = prefixes(here, "list", "--json").json
    rows = {row["address"]: row for row in said["prefixes"]}
    assert rows.keys() == {key.address for key in KEYS}
    for key in KEYS:
        row, nbytes = rows[key.address], len(cold(key).to_bytes())
        expected = {
            "content": "token ids" if key.content.ndim == 1 else "embeddings",
            "model": key.model, "tokens": len(key), "layers": 2, "kv_heads": 2, "head_dim": 8,
            "dtype": "BF16" if key.model == "bf16" else "F32",
            "nbytes": nbytes, "pinned": key is KEYS[2], "signed": False, "problem": None,
        }  # fmt: skip
        assert {name: row[name] for name in expected} == expected
        assert abs(row["used"] - time.time()) < 300
        assert prefixes(here, "show", key.address[:16], "--json").json == row
    assert said["nbytes"] == sum(len(cold(key).to_bytes()) for key in KEYS)
    used = [row["used"] for row in said["prefixes"]]
    assert used == sorted(used, reverse=True)

    shown = cells(prefixes(here, "list").out)
    assert [row[0] for row in shown] == [row["address"][:16] for row in said["prefixes"]]
    for row, given in zip(shown, said["prefixes"], strict=True):
        assert row[1:7] == [
            given["content"], given["dtype"], given["model"], *(str(given[n]) for n in ("tokens", "layers", "kv_heads"))
        ]  # fmt: skip
        assert row[-1] == ("yes" if given["pinned"] else "")


def test_looking_changes_nothing(place, prefixes):
    here = filled(place("disk"))
    for i, path in enumerate(sorted(here.store.folder.glob("*.safetensors"))):
        os.utime(path, (i * DAY, i * DAY))
    before = held(here)
    for arguments in (["list"], ["verify"], ["show", KEYS[0].address], ["prune", "--older-than", "1d", "--dry-run"]):
        prefixes(here, *arguments)
    assert held(here) == before


def test_the_last_used_stand_first_and_say_how_long_ago_that_was(place, prefixes):
    here = filled(place("disk"))
    for key, ago in zip(KEYS, (40 * DAY, 10, 600, 7300), strict=True):
        os.utime(here.store.folder / f"{key.address}.safetensors", (time.time() - ago,) * 2)
    shown = cells(prefixes(here, "list").out)
    assert [row[0] for row in shown] == [KEYS[i].address[:16] for i in (1, 2, 3, 0)]
    assert [row[8].split()[1:] for row in shown] == [["s", "ago"], ["min", "ago"], ["h", "ago"], ["d", "ago"]]


def test_a_store_that_is_empty_or_not_made_yet(place, prefixes, tmp_path, monkeypatch):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KVCACHE_STORE", raising=False)
    for where in (None, place("disk"), place("remote-memory")):
        assert "0 prefixes, 0 B" in prefixes(where, "list").out
        assert prefixes(where, "list", "--json").json["prefixes"] == []
        assert "0 prefixes read, 0 intact" in prefixes(where, "verify").out
    assert not (tmp_path / "home").exists()


def test_the_store_may_stand_in_the_environment(place, prefixes, monkeypatch):
    here = filled(place("disk"))
    monkeypatch.setenv("KVCACHE_STORE", here.options[1])
    assert len(prefixes(None, "list", "--json").json["prefixes"]) == len(KEYS)


def test_show_of_a_file_checks_all_of_it(place, prefixes, tmp_path):
    file, data = tmp_path / "voice.safetensors", cold(KEYS[1]).to_bytes()
    file.write_bytes(data)
    said = prefixes(None, "show", str(file), "--json").json
    assert (said["format"], said["nbytes"], said["tokens"], said["problem"]) == ("kvcache-prefix", len(data), 9, None)
    for name in ("model", "tokens", "dtype", "layers"):
        assert f"{name:14} {said[name]}" in prefixes(None, "show", str(file)).out
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    wrong = prefixes(None, "show", str(file), "--json", code=1)
    assert "checksum" in wrong.json["problem"] and "checksum" in wrong.err
    file.write_bytes(pack({"x": torch.zeros(2, 3)}, {"format": "somebody's", "version": 7}))
    said = prefixes(None, "show", str(file), "--json").json  # another format in the same envelope
    assert (said["format"], said["version"], said["tensors"]) == ("somebody's", 7, 1)


def test_show_of_a_voice_tells_of_the_prefix_inside(prefixes, tmp_path):
    prefix = cold(voice(5, tokens=7))
    data = pack(
        {f"prefix.{name}": tensor for name, tensor in prefix.tensors().items()},
        {"format": "kvcache-voice", "version": 1, "name": "sarah", "prefix": prefix.header()},
    )
    (tmp_path / "sarah").write_bytes(data)
    said = prefixes(None, "show", str(tmp_path / "sarah"), "--json").json
    assert (said["name"], said["tokens"], said["content"]) == ("sarah", 7, "embeddings")


# ---------------------------------------------------------------------- verify


def changed(data):
    return data[:-1] + bytes([data[-1] ^ 1])


PLANTED = {  # what stands at an address instead of the right bytes
    "a changed bit": lambda key: changed(cold(key).to_bytes()),
    "a torn file": lambda key: cold(key).to_bytes()[:-9],
    "an empty file": lambda key: b"",
    "junk": lambda key: bytes(range(256)) * 9,
    "another's": lambda key: cold(voice(99)).to_bytes(),
}


@pytest.mark.parametrize("kind", BLOBS)
def test_verify_finds_what_is_not_intact_and_removes_only_that(kind, place, prefixes):
    here, keys = place(kind), [voice(100 + seed) for seed in range(len(PLANTED))]
    filled(here)
    # Redis has no empty values; what is stored there as one is not there.
    planted = {k: plant(k) for k, plant in zip(keys, PLANTED.values(), strict=True)}
    planted = {key: data for key, data in planted.items() if data or kind != "redis"}
    for key, data in planted.items():
        inside.write(here.store, key.address, data)
        here.store.pin_address(key.address)
    wrong = {key.address for key in planted}
    count = len(KEYS) + len(planted)

    said = prefixes(here, "verify", "--json", code=1)
    assert said.json["checked"] == count
    assert {row["address"] for row in said.json["bad"]} == wrong
    assert all(row["problem"] and not row["removed"] for row in said.json["bad"])
    assert "--remove" in said.err and len(held(here)) == count
    lines = prefixes(here, "verify", code=1).out.splitlines()
    assert f"{count} prefixes read, {len(KEYS)} intact" in lines[0]
    assert {line.partition(":")[0] for line in lines[1:]} == wrong
    assert "1 prefix read, 1 intact" in prefixes(here, "verify", KEYS[0].address).out

    said = prefixes(here, "verify", "--remove", "--json", code=1)
    assert all(row["removed"] for row in said.json["bad"]) and "computed again" in said.err
    assert held(here).keys() == {key.address for key in KEYS}
    assert prefixes(here, "verify", "--json").json["bad"] == []
    assert all(exact(here.store.get(key), key) for key in KEYS)


@pytest.mark.parametrize("kind", BLOBS)
def test_what_is_signed_otherwise_is_told_and_never_removed(kind, place, prefixes):
    """Who verifies with the wrong secret must not lose a store."""
    ours, bare = place(kind, secret=b"ours"), place(kind)
    ours.store.put(cold(KEYS[0]))
    theirs = cold(KEYS[1]).to_bytes(b"theirs")
    inside.write(ours.store, KEYS[1].address, theirs)
    for where, wrong in ((ours, {KEYS[1].address}), (bare, {KEYS[0].address, KEYS[1].address})):
        said = prefixes(where, "verify", "--remove", "--json", code=1)
        assert {row["address"] for row in said.json["bad"]} == wrong
        assert not any(row["removed"] for row in said.json["bad"])
        assert "--secret-file" in said.err
    assert held(ours).keys() == {KEYS[0].address, KEYS[1].address}
    ours.store.remove(KEYS[1].address)
    assert prefixes(ours, "verify", "--json").json["bad"] == []
    row = prefixes(bare, "list", "--json").json["prefixes"][0]
    assert row["signed"] and row["problem"] is None  # what it says of itself can be read without the secret


def test_what_cannot_be_read_is_listed_as_that(place, prefixes):
    here = filled(place("disk"))
    inside.write(here.store, voice(9).address, b"junk")
    rows = {row["address"]: row for row in prefixes(here, "list", "--json").json["prefixes"]}
    assert "not a file of kvcache's" in rows[voice(9).address]["problem"]
    assert [row[1] for row in cells(prefixes(here, "list").out) if row[0] == voice(9).address[:16]] == ["unreadable"]
    assert "not a file of kvcache's" in prefixes(here, "show", voice(9).address, code=1).err


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), MemoryError(), OverflowError("too large")], ids=repr
)
def test_one_that_cannot_be_read_stops_no_other(error, place, prefixes, monkeypatch):
    here = filled(place("disk"))
    bad, real = KEYS[1].address, inside.disk_peek

    def peek(self, address, most=None):
        if address == bad:
            raise error
        return real(self, address, most)

    monkeypatch.setattr(inside.DISK_PEEK, peek)
    rows = {row["address"]: row["problem"] for row in prefixes(here, "list", "--json").json["prefixes"]}
    assert type(error).__name__ in rows.pop(bad) and list(rows.values()) == [None] * 3
    out = prefixes(here, "list").out
    assert sorted(row[1] == "unreadable" for row in cells(out)) == [False] * 3 + [True]
    assert f"{bad}: " in out and type(error).__name__ in out
    assert type(error).__name__ in prefixes(here, "show", bad, code=1).err


@pytest.mark.parametrize(
    "error", [OverflowError("infinity"), NotImplementedError("aminmax"), RecursionError()], ids=repr
)
def test_a_file_of_which_no_sense_can_be_made_is_said_to_be_that(error, place, prefixes, tmp_path, monkeypatch):
    here, file = filled(place("disk"), KEYS[:2]), tmp_path / "file"
    file.write_bytes(cold(KEYS[0]).to_bytes())

    def raising(*given, **named):
        raise error

    monkeypatch.setattr(DESCRIBE, raising)
    monkeypatch.setattr(UNPACK, raising)
    problems = [row["problem"] for row in prefixes(here, "list", "--json").json["prefixes"]]
    assert [type(error).__name__ in problem for problem in problems] == [True, True]
    assert type(error).__name__ in prefixes(here, "show", str(file), code=1).err


def test_one_that_cannot_be_removed_stops_no_other(place, prefixes, monkeypatch):
    here, real = filled(place("disk")), inside.disk_remove
    stuck = min(held(here).values(), key=lambda entry: entry.used).address

    def remove(self, address):
        if address == stuck:
            raise PermissionError(13, "Permission denied")
        real(self, address)

    monkeypatch.setattr(inside.DISK_REMOVE, remove)
    said = prefixes(here, "prune", "--max-bytes", "1", "--json", code=1)
    assert [row["address"] for row in said.json["failed"]] == [stuck] and list(held(here)) == [stuck]
    assert stuck not in {row["address"] for row in said.json["removed"]} and len(said.json["removed"]) == 3
    assert said.json["nbytes"] == held(here)[stuck].nbytes and "1 prefix could not be removed" in said.err
    assert f"{stuck}: disk: could not remove" in prefixes(here, "prune", "--max-bytes", "1", code=1).out
    inside.write(here.store, KEYS[3].address, b"junk")
    inside.write(here.store, stuck, b"junk")
    bad = prefixes(here, "verify", "--remove", "--json", code=1).json["bad"]
    assert {row["address"]: row["removed"] for row in bad} == {stuck: False, KEYS[3].address: KEYS[3].address != stuck}
    assert any("could not remove" in row["problem"] for row in bad)


# ---------------------------------------------------------------------- export and import


@pytest.mark.parametrize("kind", BLOBS)
def test_what_is_exported_is_taken_in_elsewhere_bit_for_bit(kind, place, prefixes, tmp_path):
    here, there, file = filled(place(kind)), place(kind, "b"), tmp_path / "voice.safetensors"
    key = KEYS[2]
    said = prefixes(here, "export", key.address[:20], str(file), "--json").json
    assert said == {"address": key.address, "file": str(file), "nbytes": len(file.read_bytes())}
    assert file.read_bytes() == here.store.peek(key.address)
    said = prefixes(there, "import", str(file), "--json").json
    assert said == {"address": key.address, "nbytes": len(file.read_bytes()), "pinned": False}
    assert exact(there.store.get(key), key) and not held(there)[key.address].pinned
    assert "is in" in prefixes(there, "import", str(file), "--pin").out
    assert held(there)[key.address].pinned and len(held(there)) == 1
    prefixes(here, "export", KEYS[0].address, str(file), "--force")
    assert exact(PrefixSnapshot.from_bytes(file.read_bytes()), KEYS[0])
    assert [path.name for path in tmp_path.glob("voice*")] == ["voice.safetensors"]


def test_export_replaces_nothing_but_a_file(place, prefixes, tmp_path):
    here, documents = filled(place("disk")), tmp_path / "Documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("x")
    said = prefixes(here, "export", KEYS[0].address, str(documents), "--force", code=2)
    assert "Documents is a folder, not a file" in said.err
    assert [path.name for path in tmp_path.glob("Doc*")] == ["Documents"] and (documents / "thesis.txt").exists()


def test_import_makes_the_folder_of_a_store(place, prefixes, tmp_path):
    (tmp_path / "file").write_bytes(cold(KEYS[0]).to_bytes())
    new = SimpleNamespace(options=["--store", str(tmp_path / "new" / "store")])
    prefixes(new, "import", str(tmp_path / "file"))
    assert exact(DiskStore(tmp_path / "new" / "store").get(KEYS[0]), KEYS[0])


def test_what_is_not_intact_goes_neither_in_nor_out(place, prefixes, tmp_path):
    here, file = place("disk"), tmp_path / "file"
    inside.write(here.store, KEYS[0].address, changed(cold(KEYS[0]).to_bytes()))
    assert "checksum" in prefixes(here, "export", KEYS[0].address, str(file), code=1).err
    assert not file.exists()
    file.write_bytes(changed(cold(KEYS[1]).to_bytes()))
    assert "checksum" in prefixes(here, "import", str(file), code=1).err
    file.write_bytes(cold(KEYS[1]).to_bytes(b"theirs"))
    assert "--secret-file" in prefixes(here, "import", str(file), code=1).err
    signed = place("disk", "b", secret=b"ours")
    assert "signed by someone else" in prefixes(signed, "import", str(file), code=1).err
    file.write_bytes(cold(KEYS[1]).to_bytes())
    assert "not signed" in prefixes(signed, "import", str(file), code=1).err
    assert held(here).keys() == {KEYS[0].address} and held(signed) == {}


def test_a_signed_one_stays_signed(place, prefixes, tmp_path):
    here, there, file = place("disk", secret=b"ours"), place("disk", "b", secret=b"ours"), tmp_path / "file"
    here.store.put(cold(KEYS[0]))
    prefixes(here, "export", KEYS[0].address, str(file))
    prefixes(there, "import", str(file))
    assert exact(there.store.get(KEYS[0]), KEYS[0])
    bare = SimpleNamespace(options=here.options[:2])
    assert "--secret-file" in prefixes(bare, "export", KEYS[0].address, str(tmp_path / "other"), code=1).err


# ---------------------------------------------------------------------- prune, remove, pin

AGED = [  # days since it was used, model, pinned; the sizes are all the same
    (50, "aa11", False),
    (40, "aa11", True),
    (30, "bb", False),
    (20, "aa22", False),
    (10, "bb", False),
    (0, "aa11", False),
]


@pytest.mark.parametrize(
    ("options", "leave", "code"),
    [
        (["--older-than", "25d"], [0, 2], 0),
        (["--older-than", "25d", "--pinned"], [0, 1, 2], 0),
        (["--older-than", "600h"], [0, 2], 0),
        (["--older-than", "3 w"], [0, 2], 0),
        (["--older-than", "1min"], [0, 2, 3, 4], 0),
        (["--older-than", "90d"], [], 0),
        (["--model", "aa11"], [0, 5], 0),
        (["--model", "aa11", "--pinned"], [0, 1, 5], 0),
        (["--model", "b", "--older-than", "15d"], [2], 0),
        (["--model", "cc"], [], 0),
        (["--max-bytes", "4 of"], [0, 2], 0),
        (["--max-bytes", "3 of"], [0, 2, 3], 0),
        (["--max-bytes", "3 of", "--pinned"], [0, 1, 2], 0),
        (["--max-bytes", "9 of"], [], 0),
        (["--max-bytes", "1"], [0, 2, 3, 4, 5], 1),  # the pinned one stays, so more is held than was asked for
        (["--max-bytes", "1", "--pinned"], [0, 1, 2, 3, 4, 5], 0),
        (["--max-bytes", "5 of", "--model", "bb"], [2], 0),
        (["--max-bytes", "2 of", "--older-than", "25d"], [0, 2], 1),
    ],
)
def test_what_leaves_is_what_was_asked_for(options, leave, code, place, prefixes):
    here, keys = place("disk"), [voice(i, model=model) for i, (_, model, _) in enumerate(AGED)]
    filled(here, keys)
    for key, (days, _, pinned) in zip(keys, AGED, strict=True):
        os.utime(here.store.folder / f"{key.address}.safetensors", (time.time() - days * DAY,) * 2)
        here.store.pin(key, pinned)
    largest = max(entry.nbytes for entry in held(here).values())
    options = [str(int(one[0]) * largest) if one.endswith(" of") else one for one in options]
    before, gone = held(here), [keys[i].address for i in leave]

    said = prefixes(here, "prune", *options, "--dry-run", "--json", code=code).json
    assert held(here) == before and said["dry_run"]
    assert [row["address"] for row in said["removed"]] == gone  # the least recently used first
    assert said["freed"] == sum(before[address].nbytes for address in gone)
    shown = prefixes(here, "prune", *options, "--dry-run", code=code).out.splitlines()
    assert [line.split()[0] for line in shown[:-1]] == gone and held(here) == before

    done = prefixes(here, "prune", *options, "--json", code=code)
    assert done.json == said | {"dry_run": False}
    assert ("more than --max-bytes" in done.err) == (code == 1)
    assert held(here).keys() == before.keys() - set(gone)
    assert sum(entry.nbytes for entry in held(here).values()) == said["nbytes"]


def test_a_model_that_is_not_told_apart_is_asked_for(place, prefixes):
    here = filled(place("disk"), [voice(1, model="aa11"), voice(2, model="aa22")])
    assert "several models" in prefixes(here, "prune", "--model", "aa", code=2).err
    assert len(held(here)) == 2


@pytest.mark.parametrize("kind", BLOBS)
def test_prune_pin_unpin_and_remove_over_every_store(kind, place, prefixes):
    here = filled(place(kind))
    kept, gone = KEYS[1], KEYS[3]
    assert prefixes(here, "pin", kept.address[:12], "--json").json == {"address": kept.address, "pinned": True}
    assert held(here)[kept.address].pinned
    assert prefixes(here, "remove", gone.address, "--json").json == {"address": gone.address, "removed": True}
    assert held(here).keys() == {key.address for key in KEYS if key != gone}
    prefixes(here, "prune", "--max-bytes", "1", code=1)
    assert held(here).keys() == {kept.address}
    assert prefixes(here, "unpin", kept.address, "--json").json == {"address": kept.address, "pinned": False}
    assert not held(here)[kept.address].pinned
    prefixes(here, "pin", kept.address)
    assert "removed" in prefixes(here, "remove", kept.address).out  # pinned or not
    assert held(here) == {}


def test_numbers_of_one_prefix_and_of_many_read_well(place, prefixes):
    here = filled(place("disk"), [ids(1, 2, 3)])
    assert "1 prefix," in prefixes(here, "list").out
    assert "1 prefix read, 1 intact" in prefixes(here, "verify").out


# ---------------------------------------------------------------------- down


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["show", "ab"],
        ["verify"],
        ["export", "ab", "{tmp}/new"],
        ["import", "{tmp}/file"],
        ["prune", "--max-bytes", "1GiB"],
        ["remove", "ab"],
        ["pin", "ab"],
        ["unpin", "ab"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_store_that_is_down_is_one_line_and_exit_code_1(arguments, prefixes, down, tmp_path, monkeypatch):
    pytest.importorskip("redis")
    fsspec = pytest.importorskip("fsspec")
    (tmp_path / "file").write_bytes(cold(KEYS[0]).to_bytes())
    arguments = [one.format(tmp=tmp_path) for one in arguments]

    def unreachable(*args, **kwargs):
        raise OSError("the network is unreachable")

    for name in ("ls", "pipe_file", "makedirs"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), name, unreachable)
    bucket = SimpleNamespace(options=["--store", f"memory://{tmp_path}"])
    for where, reason in ((down, "ConnectionError"), (bucket, "the network is unreachable")):
        for form in ([], ["--json"]):
            said = prefixes(where, *arguments, *form, code=1)
            assert said.out == "" and reason in said.err and "check that it is up" in said.err
            assert "hunter2" not in said.err


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("redis://user:hunter2@host:6379/0", "redis://user:…@host:6379/0"),
        ("rediss://:hunter2@host/1?ssl_ca_certs=x", "rediss://:…@host/1"),
        ("redis://host", "redis://host"),
        ("memory:///a/b", "memory:///a/b"),
        ("s3://bucket/prefixes?token=hunter2", "s3://bucket/prefixes"),
    ],
)
def test_a_place_is_shown_without_its_secrets(given, shown):
    assert shown_place(given) == shown
