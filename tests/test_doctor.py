"""The doctor: what it finds on a machine that works, and on ones that don't."""

import json
import tomllib
from pathlib import Path

import pytest

from maxpretrain import doctor, environment

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAXPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_name(report):
    return {check["name"]: (check["status"], check["detail"]) for check in report["checks"]}


def test_a_machine_that_works(cache):
    report = doctor.diagnose()
    checks = by_name(report)
    assert report["usable"]
    assert list(report) == ["usable", "versions", "extras", "machine", "devices", "kernels", "environment", "checks"]
    assert [checks[name][0] for name in ("packages", "flax", "jax", "matmul", "cache")] == ["ok"] * 5
    assert report["devices"][0]["count"] >= 1
    assert report["kernels"]["attention"] in ("xla", "cudnn")
    assert report["kernels"]["matrix products"] in ("float32", "bfloat16")
    assert checks["cache"] == ("ok", f"{cache} can be written")
    assert report["environment"]["MAXPRETRAIN_CACHE"] == str(cache)
    assert json.loads(json.dumps(report)) == report
    text = doctor.render(report)
    assert text.endswith("\nready to train")
    assert "\nchecks\n  packages  ok: all there\n" in text
    assert f"  jax                  {report['versions']['jax']}\n" in text


def without_jax(monkeypatch, **versions):
    """Versions of an installation, none of which may be imported."""
    found = dict.fromkeys(doctor.REQUIRED, "1.0.0") | versions
    monkeypatch.setattr(environment, "versions", lambda packages: {name: found.get(name) for name in packages})
    for name in ("_flax", "_devices", "_matmul"):
        monkeypatch.setattr(doctor, name, lambda *_: pytest.fail("imported"))


@pytest.mark.parametrize(("jax", "flax"), [("0.11.1", "0.12.8"), ("0.11.2", "0.12.9")])
def test_pairs_that_fail_on_import_are_known(jax, flax, cache, monkeypatch):
    without_jax(monkeypatch, jax=jax, jaxlib=jax, flax=flax)
    report = doctor.diagnose()
    assert not report["usable"]
    detail = f"flax {flax} fails on import with jax {jax}; pip install --upgrade maxpretrain flax jax"
    assert by_name(report)["jax and flax"] == ("error", detail)
    assert doctor.render(report).endswith("\nnot usable: 1 error above")


def test_a_missing_package(cache, monkeypatch):
    without_jax(monkeypatch, grain=None, clu=None)
    report = doctor.diagnose()
    assert not report["usable"]
    assert by_name(report)["packages"] == ("error", "grain, clu not installed; pip install maxpretrain")


def test_an_import_that_fails_is_one_line(cache, monkeypatch):
    def broken():
        raise AttributeError("module 'jax' has no attribute 'x'\nand much more")

    monkeypatch.setattr(doctor, "_flax", broken)
    report = doctor.diagnose()
    assert not report["usable"]
    assert by_name(report)["flax"] == ("error", "AttributeError: module 'jax' has no attribute 'x'")


def test_a_kernel_that_the_rule_table_counts_on_is_tried(cache, monkeypatch):
    monkeypatch.setattr(doctor, "_kernels", lambda: {"attention": "cudnn", "matrix products": "bfloat16"})
    report = doctor.diagnose()  # no GPU here: cuDNN refuses
    status, detail = by_name(report)["cudnn attention"]
    assert (status, report["usable"]) == (
        ("ok", True) if report["devices"][0]["platform"] == "gpu" else ("error", False)
    )
    assert "\n" not in detail


def test_a_jaxlib_of_another_version_is_a_warning(cache, monkeypatch):
    assert [c.status for c in doctor._packages(dict.fromkeys(doctor.REQUIRED, "1.0") | {"jaxlib": "1.1"})] == [
        "ok",
        "warning",
    ]


def test_a_gpu_that_jax_does_not_use(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: True)
    (check,) = doctor._unused_accelerators("cpu")
    assert check == doctor.Check(
        "gpu", "warning", "an NVIDIA GPU is there, but jax uses the CPU; pip install 'maxpretrain[cuda]'"
    )
    assert doctor._unused_accelerators("gpu") == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor._unused_accelerators("cpu") == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAXPRETRAIN_CACHE", str(tmp_path / "file"))
    check = doctor._cache()
    assert (check.status, check.detail) == (
        "error",
        f"{tmp_path / 'file'} cannot be written (File exists); set MAXPRETRAIN_CACHE to a folder that can",
    )


def test_a_disk_that_is_nearly_full(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1_500_000_000}))
    assert doctor._disk() == doctor.Check("disk", "warning", "1.5 GB free for the cache, 1.5 GB free for this folder")


def test_packages_and_extras_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {requirement.split(";")[0].split(">")[0].strip() for requirement in project["dependencies"]}
    assert named == set(doctor.REQUIRED) - {"jaxlib"}
    assert set(project["optional-dependencies"]) == set(doctor.EXTRAS)
