"""Checkpoints survive kills, full disks and bad bits, and never come back as something else."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxpretrain import manifest
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.errors import StorageError, UserError
from maxpretrain.fingerprint import named_leaves
from maxpretrain.manifest import DamagedCheckpoint
from maxpretrain.storage import StepDirectories

GOLDEN = Path(__file__).parent / "golden" / "checkpoint"


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_state(seed=0, n=64):
    """Noise of n² floats and leaves of every kind the trainer has."""
    noise = np.random.default_rng(seed).standard_normal((n, n), np.float32)
    return {
        "params": {"w": jnp.asarray(noise), "block": {"b": jnp.asarray(noise[0], jnp.bfloat16)}},
        "opt_state": (Moments(jnp.int32(seed), {"w": jnp.asarray(noise * 2)}), (), [jnp.asarray(noise[1] > 0)]),
        "step": jnp.uint32(seed),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, leaf in named_leaves(a).items():
        other = named_leaves(b)[name]
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), name


@pytest.fixture
def notes():
    return []


@pytest.fixture
def checkpoints(tmp_path, notes):
    made = Checkpoints(tmp_path / "checkpoints", keep=2, keep_best=True, warn=notes.append)
    yield made
    with contextlib.suppress(StorageError):
        made.close()


def save_all(checkpoints, *steps, **options):
    for step in steps:
        checkpoints.save(step, make_state(step), {"at": step}, **options)
    checkpoints.wait()


def flip(path, position, bit=3):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def biggest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("key", ["..", "a/b", "", "."])
def test_a_key_that_could_leave_the_directory_is_refused(checkpoints, key):
    with pytest.raises(ValueError, match="has a name that cannot be stored"):
        checkpoints.save(1, {"params": {key: jnp.ones(2)}}, {})
    assert checkpoints.steps() == []


# Saving and restoring


def test_round_trip_is_exact(checkpoints, notes):
    state = make_state(3)
    meta = {"config": {"name": "x"}, "position": 12, "loss": None}
    seconds = checkpoints.save(3, state, meta, metric=1.5)
    meta["position"] = 99  # after save() the dict is the caller's again
    checkpoints.wait()
    assert 0 < seconds < 60
    assert checkpoints.steps() == [3]
    read, read_meta = checkpoints.restore(3, abstract(state))
    assert_same(read, state)
    assert read_meta == {"config": {"name": "x"}, "position": 12, "loss": None} == checkpoints.read_meta(3)
    assert read["opt_state"][0].count.dtype == jnp.int32  # the same classes, too
    assert notes == []


def test_every_dtype_and_empty_arrays(checkpoints):
    names = [
        "bfloat16",
        "float16",
        "float32",
        "float8_e4m3fn",
        "int8",
        "int16",
        "int32",
        "uint8",
        "uint16",
        "uint32",
        "bool",
        "int4",
        "complex64",
    ]
    state = {name: jnp.asarray(np.arange(6) % 3).astype(name) for name in names} | {"none": jnp.zeros((0, 4), jnp.int8)}
    checkpoints.save(1, state, {}, final=True)
    read, _ = checkpoints.restore(1, abstract(state))
    assert_same(read, state)


def test_final_save_is_on_the_disk_when_it_returns(checkpoints, notes):
    checkpoints.save(4, make_state(4), {}, final=True)
    assert checkpoints.latest() == 4


def test_final_save_of_the_step_just_saved_only_adds_its_metric(checkpoints):
    checkpoints.save(4, make_state(4), {"at": 4})
    checkpoints.save(4, make_state(5), {"at": 5}, metric=2.0, final=True)
    assert checkpoints.read_meta(4) == {"at": 4}
    assert checkpoints.best() == 4


def test_state_may_be_donated_right_after_save(checkpoints):
    noise = np.random.default_rng(0).standard_normal(2_000_000, np.float32)
    # Made by a program: an array that shares numpy's memory would not be donated at all.
    make = jax.jit(lambda x: {"w": x * 2})
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0)
    probe = make(noise)
    jax.block_until_ready(spoil(probe))  # compiled before, so that it runs at once
    assert probe["w"].is_deleted()
    state = make(noise)
    form = abstract(state)
    checkpoints.save(1, state, {})
    after = spoil(state)
    del state
    checkpoints.wait()
    read, _ = checkpoints.restore(1, form)
    assert np.array_equal(np.asarray(read["w"]), noise * 2)
    assert float(after["w"][0]) == 7


def mesh_of(n):
    return Mesh(np.array(jax.devices()[:n]), ("d",))


@pytest.mark.parametrize("counts", [(8, 4), (4, 1), (1, 8), (8, 1)])
def test_restores_exactly_on_other_devices(checkpoints, counts):
    before, after = (NamedSharding(mesh_of(n), PartitionSpec("d")) for n in counts)
    state = {"params": {"w": jax.device_put(make_state(1)["params"]["w"], before)}, "step": jnp.int32(1)}
    checkpoints.save(1, state, {}, final=True)
    form = abstract(state)
    form["params"]["w"] = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=after)
    read, _ = checkpoints.restore(1, form)
    assert_same(read, state)
    assert read["params"]["w"].sharding == after
    assert len(read["params"]["w"].addressable_shards) == counts[1]


def test_parameters_alone(checkpoints):
    state = make_state(2)
    checkpoints.save(2, state, {"at": 2}, final=True)
    params, meta = checkpoints.restore_params(2)
    assert_same(params, state["params"])
    assert meta == {"at": 2}
    sharding = NamedSharding(mesh_of(8), PartitionSpec(None, "d"))
    form = abstract(state["params"])
    form["w"] = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    params, _ = checkpoints.restore_params(2, form)
    assert_same(params, state["params"])
    assert params["w"].sharding == sharding


def test_another_process_object_sees_the_same(checkpoints, tmp_path):
    save_all(checkpoints, 1, 2)
    with Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=False) as other:
        assert other.steps() == [1, 2]  # reading removes nothing
        assert other.read_meta(2) == {"at": 2}


# Which are kept


def test_last_k_and_the_best_are_kept(checkpoints):
    for step, metric in [(1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, None), (6, float("-inf"))]:
        checkpoints.save(step, make_state(step), {}, metric=metric)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best() == 2
    assert checkpoints.latest() == 6
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["2", "5", "6"]


def test_best_is_not_kept_unasked(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_best=False) as c:
        for step, metric in [(1, 1.0), (2, 2.0)]:
            c.save(step, make_state(step), {}, metric=metric)
        c.wait()
        assert c.steps() == [2]


def test_of_equal_metrics_the_later_is_best(checkpoints):
    save_all(checkpoints, 1, 2, metric=1.0)
    assert checkpoints.best() == 2


def test_keep_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.keep is 0; it must be at least 1"):
        Checkpoints(tmp_path, keep=0, keep_best=True)


# Steps that exist already


def test_saving_an_earlier_or_existing_step_raises(checkpoints):
    save_all(checkpoints, 5, 10)
    with pytest.raises(UserError, match=r"checkpoint .*10 exists; pass replace=True"):
        checkpoints.save(10, make_state(), {})
    with pytest.raises(UserError, match=r"step 7 lies before checkpoint 10 .* remove_after\(7\)"):
        checkpoints.save(7, make_state(), {})
    assert checkpoints.remove_after(5) == [10]
    checkpoints.save(7, make_state(7), {}, final=True)
    assert checkpoints.steps() == [5, 7]


def test_replacing_keeps_the_old_until_the_new_is_complete(checkpoints, monkeypatch):
    save_all(checkpoints, 5)
    real = StepDirectories.commit
    monkeypatch.setattr(StepDirectories, "commit", fail_with(OSError(5, "Input/output error")))
    checkpoints.save(5, make_state(8), {"at": "new"}, replace=True)
    with pytest.raises(StorageError, match="Input/output error"):
        checkpoints.wait()
    assert checkpoints.read_meta(5) == {"at": 5}
    monkeypatch.setattr(StepDirectories, "commit", real)
    checkpoints.save(5, make_state(8), {"at": "new"}, replace=True)
    checkpoints.wait()
    assert checkpoints.read_meta(5) == {"at": "new"}
    assert [p.name for p in checkpoints.directory.iterdir()] == ["5"]


# Another config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["params"].update(w=jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)), r"params/w is float32\[64, 64\] there and bfloat16\[64, 64\]"),
        (lambda s: s["params"].update(w=jax.ShapeDtypeStruct((64, 32), jnp.float32)), r"params/w is float32\[64, 64\] there and float32\[64, 32\]"),
        (lambda s: s["params"].pop("w"), r"has params/w, which this run's state has not"),
        (lambda s: s.update(ema=jax.ShapeDtypeStruct((), jnp.float32)), r"has no ema, which this run's state has"),
    ],
)  # fmt: skip
def test_another_state_is_an_error_that_names_the_leaf(checkpoints, change, words):
    state = make_state(1)
    checkpoints.save(1, state, {}, final=True)
    form = abstract(state)
    change(form)
    with pytest.raises(UserError, match=words) as error:
        checkpoints.restore_latest(form)
    assert error.value.exit_status == 2
    assert checkpoints.steps() == [1]  # nothing was set aside: the checkpoint is good


@pytest.mark.parametrize("leaf", [3, np.ones(2), jax.random.key(0)])
def test_a_state_of_other_things_is_refused(checkpoints, leaf):
    with pytest.raises(TypeError, match="the leaf x of the state is a"):
        checkpoints.save(1, {"x": leaf}, {})


# Damage


def break_bit(d):
    """A bit of the incompressible noise: Orbax alone restores it without a word."""
    path = biggest(d / "state")
    flip(path, path.stat().st_size // 2)


def break_truncate(d):
    path = biggest(d / "state")
    path.write_bytes(path.read_bytes()[:-1])


def break_manifest(d):
    path = d / "manifest.json"
    path.write_text(path.read_text().replace('"at": 30', '"at": 31'))


def break_empty(d):
    shutil.rmtree(d)
    d.mkdir()


DAMAGES = {
    "flipped bit": (break_bit, r"params/w has fingerprint|opt_state/0/mu/w has fingerprint|cannot be read"),
    "truncated": (break_truncate, r"has \d+ bytes where \d+ bytes were saved"),
    "file missing": (lambda d: biggest(d / "state").unlink(), r"is missing where \d+ bytes were saved"),
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
    "manifest altered": (break_manifest, "does not match its own sha256"),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 100), "does not match its own sha256"),
    "state missing": (lambda d: shutil.rmtree(d / "state"), "is missing where"),
    "empty": (break_empty, "it is empty or incomplete"),
    "another step": (lambda d: shutil.copytree(d.with_name("20"), d, dirs_exist_ok=True), "holds step 20"),
    "linked state": (lambda d: (os.rename(d / "state", d / "s"), os.symlink(d / "s", d / "state")), "is missing where"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A directory with checkpoints 20 and 30, to be copied and broken."""
    directory = tmp_path_factory.mktemp("sound")
    with Checkpoints(directory, keep=2, keep_best=True) as c:
        save_all(c, 20, 30)
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, sound, notes, damage):
    breaking, words = DAMAGES[damage]
    shutil.copytree(sound, tmp_path / "c")
    breaking(tmp_path / "c" / "30")
    with Checkpoints(tmp_path / "c", keep=2, keep_best=True, warn=notes.append) as c:
        with pytest.raises(DamagedCheckpoint, match=words) as error:
            c.restore(30, abstract(make_state()))
        assert len(str(error.value)) < 500
        assert "\n" not in str(error.value)
        state, meta, step = c.restore_latest(abstract(make_state()))
        assert (step, meta) == (20, {"at": 20})
        assert_same(state, make_state(20))
        assert c.steps() == [20]
    assert len(notes) == 1
    assert "set aside as 30.corrupt and the one before is taken" in notes[0]
    assert (tmp_path / "c" / "30.corrupt").is_dir()


def test_no_flipped_bit_passes(tmp_path, sound):
    """Wherever a bit flips, the state is refused or exactly what was saved; the arrays' own bits are refused."""
    form, expected = abstract(make_state()), make_state(30)
    refused = 0
    with Checkpoints(tmp_path / "c", keep=2, keep_best=True) as c:
        for trial in range(20):
            shutil.copytree(sound / "30", tmp_path / "c" / "30", dirs_exist_ok=True)
            files = sorted(p for p in (tmp_path / "c" / "30" / "state").rglob("*") if p.is_file() and p.stat().st_size)
            path = biggest(tmp_path / "c" / "30" / "state") if trial < 10 else files[trial * 7 % len(files)]
            flip(path, (trial * 7919 + 13) % path.stat().st_size, trial % 8)
            try:
                assert_same(c.restore(30, form)[0], expected)
            except DamagedCheckpoint:
                refused += 1
    assert refused >= 8


def test_parameters_are_verified_too(tmp_path, sound):
    shutil.copytree(sound, tmp_path / "c")
    # Orbax writes arrays in the order in which they are ready: only damage all over is sure to meet a parameter.
    for path in (tmp_path / "c" / "30" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            data = bytearray(path.read_bytes())
            data[::64] = bytes(byte ^ 8 for byte in data[::64])
            path.write_bytes(data)
    with Checkpoints(tmp_path / "c", keep=2, keep_best=True) as c, pytest.raises(DamagedCheckpoint):
        c.restore_params(30)
    body = manifest.read(tmp_path / "c" / "20", 20)
    name = next(name for name in body["leaves"] if name.startswith("params/"))
    body["leaves"][name]["fingerprint"] = "00000000"
    manifest.write(tmp_path / "c" / "20", body)
    told = f"{name} has fingerprint .* saved was 00000000"
    with Checkpoints(tmp_path / "c", keep=2) as c, pytest.raises(DamagedCheckpoint, match=told):
        c.restore_params(20)


def test_all_damaged_is_status_4_and_stays_so(tmp_path, sound, notes):
    shutil.copytree(sound, tmp_path / "c")
    for step in ("20", "30"):
        break_truncate(tmp_path / "c" / step)
    for resume in ("auto", "auto", "must"):  # the second time there is no numbered directory left: still no fresh start
        with Checkpoints(tmp_path / "c", keep=2, keep_best=True, warn=notes.append) as c:
            with pytest.raises(StorageError, match=r"no checkpoint in .* \(20\.corrupt, 30\.corrupt\)") as error:
                c.restore_latest(abstract(make_state()), resume)
            assert error.value.exit_status == 4
    assert len(notes) == 2


def test_damage_of_the_same_step_twice_keeps_both(tmp_path, sound, notes):
    shutil.copytree(sound, tmp_path / "c")
    with Checkpoints(tmp_path / "c", keep=2, keep_best=True, warn=notes.append) as c:
        break_truncate(tmp_path / "c" / "30")
        c.restore_latest(abstract(make_state()))
        c.save(30, make_state(30), {"at": 30}, final=True)
        break_truncate(tmp_path / "c" / "30")
        assert c.restore_latest(abstract(make_state()))[2] == 20
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["20", "30.corrupt", "30.corrupt-2"]


def test_resume_auto_must_never(checkpoints):
    form = abstract(make_state())
    assert checkpoints.restore_latest(form) is None
    assert checkpoints.restore_latest(form, "never") is None
    with pytest.raises(StorageError, match=r"there is no checkpoint in .*resume is must; check --root and --name"):
        checkpoints.restore_latest(form, "must")
    save_all(checkpoints, 1)
    assert checkpoints.restore_latest(form, "must")[2] == 1
    with pytest.raises(UserError, match=r"holds a checkpoint of step 1 and checkpoint\.resume is never; pass --fresh"):
        checkpoints.restore_latest(form, "never")


def test_a_missing_step_says_which_there_are(checkpoints):
    save_all(checkpoints, 1, 2)
    with pytest.raises(StorageError, match=r"no checkpoint of step 7 in .*; there is: 1, 2"):
        checkpoints.restore(7, abstract(make_state()))


def test_links_and_other_names_are_ignored(checkpoints, sound, notes):
    save_all(checkpoints, 1)
    (checkpoints.directory / "99").symlink_to(sound / "30")
    (checkpoints.directory / "98").write_text("")
    for name in ("007", "-3", "1e9", "notes"):
        (checkpoints.directory / name).mkdir()
    assert checkpoints.steps() == [1]
    assert checkpoints.restore_latest(abstract(make_state()))[2] == 1
    assert len(notes) == 2
    assert "99 is ignored: it is a link" in notes[1]
    checkpoints.remove_after(0)
    assert (sound / "30" / "manifest.json").exists()


def test_a_newer_format_is_not_called_damage(tmp_path, sound):
    shutil.copytree(sound, tmp_path / "c")
    body = json.loads((tmp_path / "c" / "30" / "manifest.json").read_text())
    body.pop("sha256")
    manifest.write(tmp_path / "c" / "30", {**body, "format": 2})
    c = Checkpoints(tmp_path / "c", keep=2, keep_best=True)
    with pytest.raises(StorageError, match="has format 2 and this maxpretrain reads format 1"):
        c.restore_latest(abstract(make_state()))
    c.close()
    assert (tmp_path / "c" / "30").is_dir()


# Failing saves


def fail_with(error):
    def fail(*args, **options):
        raise error

    return fail


def test_a_failure_in_the_background_surfaces_at_wait(checkpoints, notes, monkeypatch):
    monkeypatch.setattr(StepDirectories, "commit", fail_with(OSError(28, "No space left on device")))
    checkpoints.save(1, make_state(), {})
    with pytest.raises(StorageError, match=r"checkpoint 1 was not saved in .*: the disk is full"):
        checkpoints.wait()
    checkpoints.wait()  # told once
    assert list(checkpoints.directory.iterdir()) == []


def test_a_failure_in_the_background_warns_at_the_next_save(checkpoints, notes, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StepDirectories, "commit", fail_with(RuntimeError("thunder")))
        checkpoints.save(1, make_state(), {})
        checkpoints._thread.join()
    checkpoints.save(2, make_state(), {}, final=True)
    assert notes == [f"checkpoint 1 was not saved in {checkpoints.directory}: thunder; training goes on"]
    assert checkpoints.steps() == [2]


def test_too_little_room_is_seen_before_writing(checkpoints, notes, monkeypatch):
    save_all(checkpoints, 1)
    monkeypatch.setattr(StepDirectories, "free", lambda self: 1000)
    checkpoints.save(2, make_state(), {})
    assert notes == [
        f"checkpoint 2 was not saved in {checkpoints.directory}: the disk is full (1.1 MB needed, 0.0 MB free); training goes on"
    ]
    with pytest.raises(StorageError, match="free space or mend the directory, and run again") as error:
        checkpoints.save(3, make_state(), {}, final=True)
    assert error.value.exit_status == 4
    assert checkpoints.steps() == [1]  # dropping it would not have helped, so it stays
    assert checkpoints.restore_latest(abstract(make_state()))[2] == 1


def test_full_disk_drops_the_oldest_but_the_best(checkpoints, notes, monkeypatch):
    checkpoints._on_disk.keep = 4
    for step, metric in [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]:
        checkpoints.save(step, make_state(step), {}, metric=metric)
    checkpoints.wait()
    short = [True]
    real = StepDirectories.drop_oldest

    def drop(self):
        short[0] = False
        return real(self)

    monkeypatch.setattr(StepDirectories, "drop_oldest", drop)
    monkeypatch.setattr(StepDirectories, "_droppable", lambda self: {2: 2 << 20, 3: 2 << 20})
    monkeypatch.setattr(StepDirectories, "free", lambda self: 1000 if short[0] else 1 << 30)
    checkpoints.save(5, make_state(5), {}, metric=5.0, final=True)
    assert checkpoints.steps() == [1, 3, 4, 5]
    assert notes == [f"checkpoint 2 was dropped to make room in {checkpoints.directory}"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    for _ in range(50):
        if subprocess.run(["umount", disk], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", disk], check=True)


def big(seed, size=900_000):
    """3.6 MB, of which a compressed 3.3 reach the disk: two are well below its 8 MB and three well above."""
    return {"params": {"w": jnp.asarray(np.random.default_rng(seed).standard_normal(size, np.float32))}}


def test_a_really_full_disk(small_disk, notes, monkeypatch):
    """The disk holds two checkpoints and not three; dropping the oldest makes room for the next."""
    with Checkpoints(small_disk / "c", keep=4, keep_best=True, warn=notes.append) as c:
        for step in (1, 2, 3, 4):
            c.save(step, big(step), {})
        c.wait()
        assert c.steps() == [3, 4]
        assert [n.split(" in /")[0] for n in notes] == [f"checkpoint {s} was dropped to make room" for s in (1, 2)]
        # Now the space check is fooled, as by a quota: the write itself fails in the background.
        monkeypatch.setattr(StepDirectories, "free", lambda self: 1 << 40)
        notes.clear()
        c.save(5, big(5), {})
        c._thread.join()
        c.save(6, big(6), {})
        c.wait()
        assert c.steps() == [4, 6]
        assert len(notes) == 2
        assert "checkpoint 5 was not saved" in notes[0]
        assert "the disk is full; training goes on" in notes[0]
        assert "checkpoint 3 was dropped" in notes[1]
        # A final save retries by itself.
        c.save(7, big(7), {}, final=True)
        assert c.steps() == [6, 7]
        (small_disk / "rest").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
        with pytest.raises(StorageError, match=r"checkpoint 8 was not saved .*: the disk is full"):
            c.save(8, big(8, 1_200_000), {}, final=True)  # more than dropping 6 gives back
        assert c.steps() == [7]
        assert sorted(p.name for p in (small_disk / "c").iterdir()) == ["7"]
        state, _, step = c.restore_latest(abstract(big(0)))
        assert step == 7
        assert_same(state, big(7))


def test_a_read_only_directory(small_disk, notes):
    with Checkpoints(small_disk, keep=2, keep_best=True, warn=notes.append) as c:
        save_all(c, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with Checkpoints(small_disk, keep=2, keep_best=True, warn=notes.append) as c:
        assert_same(c.restore_params(1)[0], make_state(1)["params"])  # evaluate and generate only read
        assert c.restore_latest(abstract(make_state()))[2] == 1
        c.save(2, make_state(), {})
        assert len(notes) == 1
        assert "checkpoint 2 was not saved" in notes[0]
        assert "Read-only file system" in notes[0]
        with pytest.raises(StorageError, match="Read-only file system"):
            c.save(3, make_state(), {}, final=True)


def test_a_directory_that_cannot_be_made(tmp_path, notes):
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / "file" / "c", keep=2, keep_best=True, warn=notes.append) as c:
        c.save(1, make_state(), {})
        assert "Not a directory" in notes[0]
        with pytest.raises(StorageError, match="Not a directory"):
            c.save(1, make_state(), {}, final=True)


def test_a_deleted_array_is_not_taken_for_a_disk_error(checkpoints):
    state = {"w": jnp.ones(3)}
    state["w"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        checkpoints.save(1, state, {})
    assert list(checkpoints.directory.iterdir()) == []


def test_orbax_is_silent(checkpoints, capfd, caplog):
    save_all(checkpoints, 1)
    checkpoints.restore(1, abstract(make_state()))
    out, err = capfd.readouterr()
    assert out + err == ""
    assert [r for r in caplog.records if "orbax" in r.pathname] == []


# kill -9

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from maxpretrain import manifest, storage
from maxpretrain.checkpoint import Checkpoints

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def state(seed, n=1000):
    return {"params": {"w": jnp.asarray(np.random.default_rng(seed).standard_normal((n, n), np.float32))}}

def run(directory, when):
    c = Checkpoints(directory, keep=1, keep_best=False)
    c.save(1, state(1), {"at": 1}, final=True)
    if when == "before":
        c._orbax.save = die
    elif when == "commit":
        manifest.write = die
    elif when == "rename":
        storage.StepDirectories._promote = die
    elif when == "deletion":
        def rmtree(path, **options):
            next(p for p in path.rglob("*") if p.is_file()).unlink()
            die()
        shutil.rmtree = rmtree
    c.save(2, state(2), {"at": 2})
    if when == "during":
        die()
    c.wait()
    die()

# Forked before jax starts a backend: the imports are paid for once.
children = [os.fork() or run(Path(sys.argv[1], when), when) for when in sys.argv[2:]]
sys.exit(any(os.waitpid(child, 0)[1] != signal.SIGKILL for child in children))
"""
# What is there after a kill at each moment, and what is left over.
MOMENTS = {
    "before": (1, ["1", "2.saving"]),
    "during": (1, ["1", "2.saving"]),
    "commit": (1, ["1", "2.saving"]),
    "rename": (2, ["1", "2"]),
    "deletion": (2, ["1.deleting", "2"]),
    "after": (2, ["2"]),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A directory for each moment, left by a process of its own."""
    root = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, root, *MOMENTS], stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_at_any_moment(killed, moment, notes):
    def state(seed):
        return {"params": {"w": jnp.asarray(np.random.default_rng(seed).standard_normal((1000, 1000), np.float32))}}

    expected, left = MOMENTS[moment]
    with Checkpoints(killed / moment, keep=1, keep_best=False, warn=notes.append) as c:
        read, meta, step = c.restore_latest(abstract(state(0)))
        assert (step, meta) == (expected, {"at": expected})
        assert_same(read, state(expected))
        assert sorted(p.name for p in (killed / moment).iterdir()) == left
        assert notes == []  # a kill is nothing unusual
        c.save(3, state(3), {}, final=True)
        assert sorted(p.name for p in (killed / moment).iterdir()) == ["3"]


# Several processes

PROCESS = """
import os, sys
index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
jax.distributed.initialize(
    f"127.0.0.1:{port}", 2, index, coordinator_bind_address=f"127.0.0.1:{port}", heartbeat_timeout_seconds=10
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from maxpretrain.checkpoint import Checkpoints
x = np.arange(64, dtype=np.float32).reshape(8, 8)
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d"))
state = {"w": jax.make_array_from_callback((8, 8), sharding, lambda i: x[i])}
form = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding)}
with Checkpoints(directory, keep=2, keep_best=True, warn=print) as c:
    for step in (1, 2, 3):
        c.save(step, state, {"at": step}, final=step == 3)
    c.remove_after(2)
    read, meta, step = c.restore_latest(form)
    assert (step, meta) == (2, {"at": 2}), (step, meta)
    assert all(np.array_equal(s.data, x[s.index]) for s in read["w"].addressable_shards)
"""


@pytest.mark.multi
def test_two_processes_and_then_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-c", PROCESS]
    running = [
        subprocess.Popen([*command, str(i), port, tmp_path / "c"], stderr=subprocess.PIPE, text=True) for i in (0, 1)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    with Checkpoints(tmp_path / "c", keep=2, keep_best=True) as c:
        assert c.steps() == [2]
        state, _ = c.restore(2, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    assert np.asarray(state["w"]).ravel().tolist() == list(range(64))


# Across versions


def test_checkpoint_of_an_earlier_release(tmp_path):
    """Written by jax 0.10.2 and orbax 0.12.8 (golden/make_checkpoint.py): whatever is installed now must read it."""
    shutil.copytree(GOLDEN, tmp_path / "c")
    with Checkpoints(tmp_path / "c", keep=2, keep_best=True) as c:
        assert c.steps() == [7]
        assert c.best() == 7
        params, meta = c.restore_params(7)
    assert meta == {"made": "for the test"}
    assert params["w"].tolist() == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]
    assert params["b"].dtype == jnp.bfloat16
    assert params["b"].astype(jnp.float32).tolist() == [1.0, -2.0]
