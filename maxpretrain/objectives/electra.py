"""Replaced token detection: a small network fills masks, a large one finds the tokens that are not the original ones."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.modelconfig import ModelConfig, MoEConfig, validate_model
from maxpretrain.objectives import masking
from maxpretrain.objectives.base import Fields, Loss, Work

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.models import Model
    from maxpretrain.nn.stack import Execution
else:
    np = lazy("numpy")

Sharing = Literal["shared", "none", "disentangled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELECTRA(masking.Masked):
    """L = mean over masked places of −log p_G(x | masked) + λ · mean over all tokens of the cross entropy of "is it replaced?".

    The generator G is trained as a masked language model alone. A token drawn from it stands at each masked place in what the
    discriminator reads; one that happens to be the original counts as original. The run's network is the discriminator; the
    generator's shape follows from it, and its parameters are beside it (`models.paired`).

    Reference: Clark et al. 2020, arXiv:2003.10555, §2 and appendix A. As there, the tables of tokens, positions and token types
    are shared; the released code shares the norm behind them as well.
    """

    mask_share: float = 0.85  # of the predicted tokens, the share that the mask stands for
    random_share: float = 0.0  # of those, the share that a random token stands for; the rest stay as they are
    rtd_weight: float = 50.0  # of the discriminator's loss (λ)
    generator_share: float = 0.25  # width, heads and MLP of the generator, as a share of the discriminator's
    generator_depth: float = 1.0  # layers of the generator, as a share of the discriminator's
    sharing: Sharing = "shared"  # of the input's tables; disentangled: the discriminator learns a difference
    mask_decoder: bool = False  # the generator's last layer runs twice, told absolute positions (DeBERTa)

    heads: ClassVar[tuple[str, ...]] = ("replaced",)

    def validate(self, run: Run) -> None:
        super().validate(run)
        if self.rtd_weight < 0:
            raise UserError(f"objective.rtd_weight is {self.rtd_weight}; it must be at least 0")
        for part in ("generator_share", "generator_depth"):
            if not 0 < getattr(self, part) <= 1:
                raise UserError(f"objective.{part} is {getattr(self, part)}; it must be above 0 and at most 1")
        if self.sharing not in get_args(Sharing):
            kinds = ", ".join(get_args(Sharing))
            raise UserError(f"objective.sharing is {self.sharing!r}; it must be one of {kinds}")
        name = type(self).__name__
        if "lm" in run.model.heads:
            raise UserError(
                f'objective {name} trains no "lm" of the discriminator, for the generator has its own; leave it out of model.heads'
            )
        if run.model.mask_decoder:
            raise UserError(
                f"model.mask_decoder is on, and the discriminator of objective {name} has no masks to decode; use "
                "objective.mask_decoder, which is of the generator"
            )
        try:
            validate_model(self.generator(run.model), run.batch.length)
        except UserError as error:
            raise UserError(
                f"objective.generator_share {self.generator_share} and objective.generator_depth {self.generator_depth} make a "
                f"generator for which {error}"
            ) from error

    def generator(self, model: ModelConfig) -> ModelConfig:
        """The generator's shape beside a discriminator's. It has no experts, and the heads of a published generator."""
        share = lambda n: max(1, round(self.generator_share * n))  # noqa: E731
        width = share(model.model_dim)
        embed = width if self.sharing == "none" else model.embed_width
        return dataclasses.replace(
            model,
            num_layers=max(1, round(self.generator_depth * model.num_layers)),
            model_dim=width,
            num_heads=share(model.num_heads),
            num_kv_heads=None if model.num_kv_heads is None else share(model.num_kv_heads),
            mlp_dim=share(model.mlp_width),
            embed_dim=None if embed == width else embed,
            moe=MoEConfig(),
            heads=("lm",),
            lm_transform=True,
            lm_bias=True,
            tie_embeddings=True,
            mask_decoder=self.mask_decoder,
        )

    def build(self, config: ModelConfig, execution: Execution | None = None) -> Model:
        from maxpretrain.models.paired import Paired
        from maxpretrain.nn.stack import Execution

        return Paired(config, self.generator(config), execution or Execution(), sharing=self.sharing)

    def fields(self, length: int) -> Fields:
        budget = masking.exact_count(self.rate, length)
        return masking.row_fields(length) | masking.prediction_fields(budget) | {"seeds": ((2,), "uint32")}

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        generator = self.generator(model)
        passes = generator.num_layers + self.mask_decoder
        generator = dataclasses.replace(generator, num_layers=passes)
        return [Work(model, length, 0, 0), Work(generator, length, 0, masking.exact_count(self.rate, length))]

    def example(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        segments: np.ndarray | None = None,
        **more: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Masks an exact count of the tokens.

        Returns:
            The arrays of `fields` for as many tokens as there are: "tokens" as the generator reads them; "places", "labels" and
            "weights" of what is masked, and no other; "seeds", from which the device draws what the generator says.
        """
        vocabulary = self.vocabulary
        row = masking.framed(tokens, segments, vocabulary, mask_documents=self.mask_documents)
        original = row["tokens"]
        count = masking.exact_count(self.rate, len(original))
        places = masking.chosen(masking.candidates(original, vocabulary), count, rng)
        row["tokens"] = masking.corrupted(
            original, places, rng, vocabulary, mask_share=self.mask_share, random_share=self.random_share
        )
        seeds = rng.integers(1 << 32, size=2, dtype=np.uint32)
        row |= masking.predictions(original, places) | {"seeds": seeds}
        return masking.filled(row, self.fields(len(tokens) - self.raw_length(0)))  # raw_length adds a constant

    def normalized(self, batch: dict[str, jax.Array], step: jax.Array | None = None) -> dict[str, jax.Array]:
        """Adds "mlm_scale" [B], tokens by masked ones: the sum of both losses divided by the tokens has then both means in it."""
        real = (batch["segments"] > 0).astype("float32")
        return batch | {"mlm_scale": masking.scale(real, batch["weights"])}

    def combined(self, means: dict[str, float]) -> float:
        return means["mlm_loss"] + self.rtd_weight * means["rtd_loss"]

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        """Both losses.

        Metrics: "mlm_loss" and "mlm_accuracy" of the generator; "rtd_loss" and "replaced_token_accuracy" over all tokens,
        "replaced_token_precision" over those called replaced, "replaced_token_recall" over those that are.

        Args:
            model: made by `build`.
        """
        import jax.numpy as jnp

        from maxpretrain.nn.dropout import split
        from maxpretrain.objectives import replacing
        from maxpretrain.objectives.cross_entropy import gathered, token_cross_entropy

        batch = batch if "mlm_scale" in batch else self.normalized(batch)
        places, labels, weights = (batch[name] for name in ("places", "labels", "weights"))
        where, keys = (batch.get("positions"), batch["segments"]), split(key, 2)
        own = model.generator_params(params)
        filled = model.generator.apply(own, batch["tokens"], *where, keys[0])
        hidden = gathered(filled.hidden, places)
        mlm, sums = token_cross_entropy(model.generator, own, hidden, labels, weights)
        drawn = replacing.sampled(model.generator, own, hidden, batch["seeds"])

        tokens = replacing.placed(batch["tokens"], places, drawn, weights > 0)
        original = replacing.placed(batch["tokens"], places, labels, weights > 0)
        replaced, real = tokens != original, batch["segments"] > 0
        output = model.apply(params, tokens, *where, keys[1])
        logits = model.head_outputs(params, output.hidden)["replaced_logits"]
        total = lambda x: jnp.sum(jnp.where(real, x.astype(jnp.float32), 0.0))  # noqa: E731
        rtd, count = total(replacing.binary_cross_entropy(logits, replaced)), total(real)
        masked, called = jnp.sum(weights), logits > 0
        metrics = {
            "mlm_loss": (jnp.sum(sums["nll"]), masked),
            "mlm_accuracy": (jnp.sum(sums["correct"]), masked),
            "rtd_loss": (rtd, count),
            "replaced_token_accuracy": (total(called == replaced), count),
            "replaced_token_precision": (total(called & replaced), total(called)),
            "replaced_token_recall": (total(called & replaced), total(replaced)),
        }
        return Loss(jnp.max(batch["mlm_scale"]) * mlm + self.rtd_weight * rtd, count, metrics, output.aux)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTD(ELECTRA):
    """ELECTRA as in DeBERTa-v3: only masks, a generator of the same width and half the depth, tables that are shared without the
    discriminator pulling on the generator's, absolute positions where masks are filled.

    References: He et al. 2021, arXiv:2111.09543, §3; the mask decoder: He et al. 2020, arXiv:2006.03654, §3.2.
    """

    mask_share: float = 1.0  # of the predicted tokens, the share that the mask stands for
    generator_share: float = 1.0  # width, heads and MLP of the generator, as a share of the discriminator's
    generator_depth: float = 0.5  # layers of the generator, as a share of the discriminator's
    sharing: Sharing = "disentangled"  # of the input's tables; disentangled: the discriminator learns a difference
    mask_decoder: bool = True  # the generator's last layer runs twice, told absolute positions
