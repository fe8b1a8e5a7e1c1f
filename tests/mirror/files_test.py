import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mirror.rounds import (
    IDENTITY,
    ROPE,
    SPECS,
    Sample,
    aligned,
    assert_same_bits,
    encode,
    lane_plan,
    pool,
)
from tokendance_jax.mirror import MirrorError, Quantised, restore_mirrors, save_mirrors

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Sample(
    lanes=[
        lane_plan([(9, 0, 0, 4, 0), (20, 4, 0, 4, 5), (6, 4, 0, 4, 6), (10, 0, 0, 2, 0)], 12),
        lane_plan([(6, 8, 0, 3, 6)], 2),  # no private page, no patch
    ],
    lengths=[14, 3],
)


def example(storage="float32", seed=0, form=None):
    sample = aligned(SAMPLE)
    return encode(sample.lanes, sample.lengths, pool(sample, SPECS[storage], seed=seed), form=form)


def int8_example():
    bias = np.random.default_rng(0).standard_normal((2, 2, 4)).astype(np.float32)
    return example("uint16", form=Quantised(bias, ROPE))


@pytest.fixture
def saved(tmp_path):
    save_mirrors(tmp_path / "saved", example())
    return tmp_path / "saved"


@pytest.mark.parametrize("storage", ["float32", "uint16", "bfloat16"])
@pytest.mark.parametrize("on_device", [False, True])
def test_round_trip_is_exact(tmp_path, storage, on_device):
    mirrors = example("float32" if storage == "float32" else "uint16")
    if storage == "bfloat16":  # as an accelerator stores it
        mirrors = jax.tree.map(
            lambda x: x.view(jnp.bfloat16) if x.dtype == np.uint16 else x, mirrors
        )
    # -0.0 equals the files' fill value, but has other bits.
    mirrors.base.k[...] = -0.0 if storage != "uint16" else 0x8000
    target = tmp_path / "new" / "saved"
    save_mirrors(target, jax.tree.map(jnp.asarray, mirrors) if on_device else mirrors)
    assert [path.name for path in target.parent.iterdir()] == ["saved"]
    restored = restore_mirrors(target)
    assert_same_bits(restored, mirrors)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize("on_device", [False, True])
def test_int8_mirrors_come_back_with_all_that_restores_them(tmp_path, on_device):
    mirrors = int8_example()
    target = tmp_path / "saved"
    save_mirrors(target, jax.tree.map(jnp.asarray, mirrors) if on_device else mirrors)
    restored = restore_mirrors(target)
    assert_same_bits(restored, mirrors)
    assert restored.identity == IDENTITY
    assert restored.form is not None
    assert restored.form.rope == ROPE
    # Another rope would rotate keys to other positions.
    path = target / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"]["quantised"]["theta"] = 1e6
    path.write_text(json.dumps(manifest))
    assert restore_error(target).startswith(f"{path}: sha256: is not that of the content; ")


def test_existing_folder_is_kept(saved):
    before = example()
    with pytest.raises(MirrorError, match="saved: path: exists already; name a new folder"):
        save_mirrors(saved, example(seed=1))
    assert_same_bits(restore_mirrors(saved), before)


@pytest.mark.parametrize("where", [(Path, "write_text"), (Path, "rename"), (json, "dumps")])
def test_failure_leaves_nothing(tmp_path, monkeypatch, where):
    mirrors = example()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(*where, fail)
    with pytest.raises(OSError, match="disk full"):
        save_mirrors(tmp_path / "saved", mirrors)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, sys
from pathlib import Path
from tests.mirror.files_test import example
from tokendance_jax.mirror import save_mirrors

Path.rename = lambda *_: os._exit(9)  # dies when all files are written
save_mirrors(sys.argv[1], example())
"""


def test_a_killed_process_leaves_no_folder(tmp_path):
    done = subprocess.run([sys.executable, "-c", _KILLED, tmp_path / "saved"], cwd=ROOT)
    assert done.returncode == 9
    assert not (tmp_path / "saved").exists()
    assert "saved/manifest.json: manifest: cannot be read" in restore_error(tmp_path / "saved")
    save_mirrors(tmp_path / "saved", example())  # the leftover files do not get in the way
    assert_same_bits(restore_mirrors(tmp_path / "saved"), example())


def restore_error(folder):
    with pytest.raises(MirrorError) as error:
        restore_mirrors(folder)
    assert str(error.value).endswith(
        ("; save the mirrors again, to a new folder", "this version reads format 4")
    )
    return str(error.value)


_DAMAGED = """
import shutil, sys
from pathlib import Path
from tests.mirror.files_test import example
from tests.mirror.rounds import assert_same_bits
from tokendance_jax.mirror import MirrorError, restore_mirrors

saved, damaged = Path(sys.argv[1]), Path(sys.argv[2])
for file in sorted(path for path in saved.rglob("*") if path.is_file()):
    content = bytearray(file.read_bytes())
    if not content:
        continue
    content[len(content) // 2] ^= 1
    shutil.copytree(saved, damaged)
    (damaged / file.relative_to(saved)).write_bytes(content)
    try:
        assert_same_bits(restore_mirrors(damaged), example())
    except MirrorError:
        print(file.relative_to(saved))
    shutil.rmtree(damaged)
"""


def test_one_wrong_bit_in_any_file_is_refused_or_does_not_matter(saved, tmp_path):
    # Run in a separate process: when one read fails, Orbax's other reads go on in threads and may
    # fail at any later time.
    done = subprocess.run(
        [sys.executable, "-c", _DAMAGED, saved, tmp_path / "damaged"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert done.returncode == 0
    refused = {Path(line) for line in done.stdout.splitlines()}
    data = {path.relative_to(saved) for path in (saved / "arrays" / "d").iterdir()}
    assert refused >= data | {Path("manifest.json"), Path("arrays/manifest.ocdbt")}


def test_arrays_of_another_round_are_refused(saved, tmp_path):
    save_mirrors(tmp_path / "other", example(seed=1))
    shutil.rmtree(saved / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", saved / "arrays")
    message = restore_error(saved)
    assert message.startswith(f"{saved / 'arrays'}: base.k: is not the array that the manifest ")


def test_missing_arrays_are_refused(saved):
    shutil.rmtree(saved / "arrays")
    assert restore_error(saved).startswith(f"{saved / 'arrays'}: arrays: cannot be restored (")


def test_a_changed_identity_is_refused(saved):
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"]["identity"]["weights"] = "1" * 64
    path.write_text(json.dumps(manifest))
    assert restore_error(saved).startswith(f"{path}: sha256: is not that of the content; ")


@pytest.mark.parametrize("changed", ["shape", "dtype", "sha256"])
def test_a_changed_manifest_is_refused(saved, changed):
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"]["arrays"]["mirrors.1.patch.k"][changed] = [2, 0, 5, 2, 4]
    path.write_text(json.dumps(manifest))
    assert restore_error(saved).startswith(f"{path}: sha256: is not that of the content; ")


@pytest.mark.parametrize("version", [3, 5])  # format 3 recorded no scaling of positions
def test_another_format_is_refused(saved, version):
    path = saved / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    assert restore_error(saved).startswith(f"{path}: format: is {version}; serve the round again")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_damaged_manifest_is_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    assert "manifest.json: manifest: cannot be read (" in restore_error(saved)
