"""A run directory read back: its config, tokenizer, network and parameters. Imports jax only when something needs it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxpretrain import configio
from maxpretrain.config import Run
from maxpretrain.errors import StorageError, UserError, nearest

if TYPE_CHECKING:  # pragma: no cover
    import jax

    from maxpretrain.data.tokenizer import Tokenizer
    from maxpretrain.mesh import Layout
    from maxpretrain.models import Model


def is_published(path: Path) -> bool:
    """Whether a directory is in Hugging Face's layout."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # whoever reads it as ours will say what is wrong
    return isinstance(config, dict) and "model_type" in config


def find_run(name: str | os.PathLike[str]) -> Path:
    """The run directory that RUN means: a path, or a name under runs/.

    Raises:
        UserError: there is none (the nearest of runs/ is named), or the folder is no run directory.
    """
    name = os.fspath(name)
    places = [Path(name).expanduser()] + ([Path("runs", name)] if Path(name).name == name else [])
    for place in places:
        if (place / "config.json").is_file():
            return place
    known = sorted(entry.parent.name for entry in Path("runs").glob("*/config.json"))
    folder = next((place for place in places if place.is_dir()), None)
    what = (
        f"{folder} is not a run directory: it has no config.json"
        if folder
        else f"no run {name}" + ("" if len(places) == 1 else ", here or under runs/")
    )
    raise UserError(what + (nearest(Path(name).name, known) if known else "; maxpretrain train CONFIG makes one"))


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """What training left behind.

    Attributes:
        path: the directory.
        config: as resolved when training began; `model.vocab_size` is a number.
    """

    path: Path
    config: Run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Reads the config.

        Args:
            path: a run directory, a run's name under runs/, or a Hugging Face directory.

        Raises:
            UserError: it is no run directory.
        """
        if is_published(Path(path).expanduser()):
            from maxpretrain.convert.published import open_published

            return open_published(Path(path).expanduser())
        found = find_run(path)
        return cls(found, configio.read_saved(found))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """As it was trained with; None of a network that was imported without one."""
        from maxpretrain.data.tokenizer import load_tokenizer

        given = self.config.tokenizer
        if given.kind == "huggingface" and not given.path and not (self.path / "tokenizer").exists():
            return None
        return load_tokenizer(self.path / "tokenizer")

    def step(self, step: int | None = None) -> int:
        """`step`, or where it is None the last one that has a complete checkpoint.

        Raises:
            StorageError: there is no such checkpoint.
        """
        with self._checkpoints() as checkpoints:
            steps = checkpoints.steps()
        if not steps:
            raise StorageError(
                f"{self.path} has no complete checkpoint; train it first: maxpretrain train {self.path / 'config.json'}"
            )
        if step is not None and step not in steps:
            raise StorageError(f"{self.path} has no checkpoint of step {step}; there is: {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state of a step: tokenizer, data, devices, config, seconds, tokens."""
        with self._checkpoints() as checkpoints:
            return checkpoints.read_meta(step)

    def model(self, layout: Layout | None = None, *, scan: bool | None = None) -> Model:
        """The network, run as suits the devices here, which need not be those it was trained on.

        Args:
            layout: the devices; None: the first one.
            scan: layers in one loop, which compiles faster; None: as the config or the device says.
        """
        import jax

        from maxpretrain import hardware

        device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
        run, compute = self.config, self.config.compute
        if compute.attention == "cudnn":
            obstacle = hardware.cudnn_obstacle(
                run.model, "bfloat16" if compute.dtype == "auto" else compute.dtype, device
            )
            if obstacle:
                warnings.warn(
                    f"{self.path} was trained with cuDNN attention, and XLA's is used here: {obstacle}", stacklevel=2
                )
                run = run.replace(compute=dataclasses.replace(compute, attention="xla"))
        devices, parts = (1, 1) if layout is None else (layout.num_devices, layout.extent("batch"))
        execution, _ = hardware.resolve(run, device, devices=devices, batch_parts=parts)
        execution = execution if scan is None else dataclasses.replace(execution, scan=scan)
        return run.objective.build(run.model, execution)

    def params(self, step: int | None = None, layout: Layout | None = None) -> dict[str, Any]:
        """The parameters of a checkpoint, verified: a nested dict of jax.Array.

        Args:
            step: which; None: the last.
            layout: where to put them; None: the first device.

        Raises:
            StorageError: there is no such checkpoint, or it is damaged.
        """
        step = self.step(step)
        with self._checkpoints() as checkpoints:
            params, _ = checkpoints.restore_params(step, abstract_params(self.config, layout))
        return params

    def _checkpoints(self) -> Any:
        from maxpretrain.checkpoint import Checkpoints

        return Checkpoints(self.path / "checkpoints")


def abstract_params(config: Run, layout: Layout | None = None) -> dict[str, Any]:
    """Shapes, dtypes and (with a layout) placements of a run's parameters: jax.ShapeDtypeStruct."""
    import jax

    from maxpretrain.nn.base import Spec, is_spec

    def struct(spec: Spec) -> jax.ShapeDtypeStruct:
        place = None if layout is None else layout.sharding(spec.axes, len(spec.shape))
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place)

    return jax.tree.map(struct, config.objective.build(config.model).abstract, is_leaf=is_spec)
