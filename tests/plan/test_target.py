"""Names of devices to plan for."""

import jax
import pytest

from maxpretrain.errors import UserError
from maxpretrain.plan.target import find_target


@pytest.mark.parametrize(
    ("name", "count", "kind", "devices"),
    [
        ("h200", None, "NVIDIA H200", 1),
        ("H200-8", None, "NVIDIA H200", 8),
        ("h200", 4, "NVIDIA H200", 4),
        ("h200-8", 8, "NVIDIA H200", 8),
        ("a100-40gb", None, "NVIDIA A100 40GB", 1),
        ("a100-40gb-16", None, "NVIDIA A100 40GB", 16),
        ("rtx-4090", None, "NVIDIA RTX 4090", 1),
        ("v5p-128", None, "TPU v5p", 64),  # two cores a chip, one device
        ("v4-8", None, "TPU v4", 4),
        ("v5e-16", None, "TPU v5e", 16),
        ("v5litepod-16", None, "TPU v5e", 16),
        ("v6e-8", None, "TPU v6e", 8),
        ("tpu7x-16", None, "TPU7x", 16),  # two cores a chip, two devices
        ("v3-8", None, "TPU v3", 8),
    ],
)
def test_names(name, count, kind, devices):
    target = find_target(name, count)
    assert (target.kind, len(target.devices)) == (kind, devices)
    assert len({device.id for device in target.devices}) == devices
    assert target.memory == target.devices[0].memory_stats()["bytes_limit"]


def test_memory_and_peak_are_of_one_device():
    target = find_target("v5p-8", None)
    assert (target.memory, target.peak_flops, target.peak_source) == (95 * 2**30, 459e12, "TPU v5p, bf16 dense")


def test_the_devices_here_and_another_number_of_them():
    here = find_target(None, None)
    assert here.devices == tuple(jax.devices())
    more = find_target("cpu", 16)
    assert len(more.devices) == 16
    assert more.devices[0].platform == "cpu"
    assert more.memory is None or more.memory > 2**26


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("h2000", None, 'no accelerator "h2000" is known; did you mean "h200"?'),
        ("v6p-64", None, 'no accelerator "v6p-64" is known; did you mean "v6e"?'),
        ("v5p-7", None, "the number counts cores, 2 a device"),
        ("h200-0", None, "names no slice"),
        ("h200-8", 4, "h200-8 has 8 devices, not 4; leave out one of the two numbers"),
    ],
)
def test_errors(name, count, said):
    with pytest.raises(UserError) as error:
        find_target(name, count)
    assert said in str(error.value)
