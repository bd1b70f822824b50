"""Every config that ships resolves, is planned without data, and says in its docstring how it is run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from maxpretrain import configio
from maxpretrain.config import validate

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
# Parameters of the published shapes, with what the objective adds: pairs are in BERT's; ELECTRA has a generator, DeBERTa-v3 that and
# a difference of the embeddings, DeepSeek-V3 a module for the token after the next.
PUBLISHED = {
    "bert_base": 110_106_428,
    "roberta_base": 124_697_433,
    "electra_small": 14_196_475,
    "deberta_v3_base": 326_840_677,
    "t5_v1_1_base": 247_577_856,
    "bart_base": 139_420_416,
    "ul2": 19_591_209_984,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3": 682_636_472_320,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_resolves_and_tells_how_to_run_it(path):
    run = configio.load_config(str(path))
    validate(run)
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert f"maxpretrain train configs/{path.name}" in doc
    assert "Hardware: " in doc
    assert run.name == path.stem.replace("_", "-").replace("v1-1", "v1.1").replace("2-5-1-5b", "2.5-1.5b")
    if path.stem.endswith("_tiny"):
        assert run.data.train == ("embedded",)  # anybody can run it


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_sizes(name):
    import jax

    from maxpretrain.nn.base import is_spec

    run = configio.load_config(name)
    leaves = jax.tree.leaves(run.objective.build(run.model).abstract, is_leaf=is_spec)
    assert sum(spec.size for spec in leaves if spec.role != "buffer") == PUBLISHED[name]
