"""Known ways to get a parametrization wrong: each a table, or a model, that differs from the right one in one thing."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from scaling_jax.model import Transformer
from scaling_jax.parametrization import Parametrization


def mutant(change=None, **methods):
    """A Transformer whose parametrization passes every rule through `change(self, role, rule, sizes)`, or has other `methods`."""

    class Wrong(Parametrization):
        def rule(self, role, **sizes):
            right = super().rule(role, **sizes)
            return change(self, role, right, sizes) if change else right

    for name, method in methods.items():
        setattr(Wrong, name, method)
    return lambda config, parametrization, rngs: Transformer(config, Wrong(**dataclasses.asdict(parametrization)), rngs=rngs)


def of(parametrization, name, role, sizes):
    """The rule that another table gives."""
    return Parametrization(**dataclasses.asdict(parametrization) | {"name": name}).rule(role, **sizes)


def m(sizes):
    return sizes["fan_in"] / sizes["base_fan_in"]


def n(parametrization, sizes):
    return sizes["width"] / parametrization.base_width


def init_only(p, role, rule, sizes):
    return of(p, "standard", role, sizes)._replace(init_std=rule.init_std)


def lr_only(p, role, rule, sizes):
    return of(p, "standard", role, sizes)._replace(lr=rule.lr, weight_decay=rule.weight_decay)


def no_output_multiplier(p, role, rule, sizes):
    return rule._replace(multiplier=1.0)


def output_multiplier_twice(p, role, rule, sizes):
    return rule._replace(multiplier=rule.multiplier**2)


def hidden_lr_twice(p, role, rule, sizes):
    return rule._replace(lr=rule.lr**2, weight_decay=1 / rule.lr**2 if rule.weight_decay else 0.0)


def embedding_lr_scaled(p, role, rule, sizes):
    return rule._replace(lr=rule.lr / n(p, sizes), weight_decay=n(p, sizes)) if role == "embedding" else rule


def one_kind_ignored(p, role, rule, sizes):
    is_mlp_out = role == "hidden" and sizes["base_fan_in"] != p.base_width
    return of(p, "standard", role, sizes) if is_mlp_out else rule


def tied_like_hidden(p, role, rule, sizes):
    return rule._replace(init_std=rule.init_std * n(p, sizes) ** -0.5) if role == "tied" else rule


def tied_grows(p, role, rule, sizes):
    return rule._replace(init_std=rule.init_std * n(p, sizes) ** 0.5) if role == "tied" else rule


def decay_not_compensated(p, role, rule, sizes):
    return rule._replace(weight_decay=1.0) if rule.weight_decay else rule


def eps_not_scaled(p, role, rule, sizes):
    return rule._replace(eps=1.0)


def bias_lr_scaled(p, role, rule, sizes):
    return rule._replace(lr=rule.lr / n(p, sizes)) if role == "vector" else rule


def tied_logits_over_the_root(p, role, rule, sizes):
    return rule._replace(multiplier=n(p, sizes) ** -0.5) if role == "tied" else rule


def biases_decay(p, role, rule, sizes):
    return rule._replace(weight_decay=n(p, sizes)) if role == "vector" else rule


def between_the_scales(self, head_dim):
    return (self.base_head_dim / head_dim) ** 0.75 * self.base_head_dim**-0.5


def hidden_lr_over_depth(p, role, rule, sizes):
    return rule._replace(lr=rule.lr * p.base_depth / sizes["depth"]) if role in ("hidden", "query") else rule


class Mutant(NamedTuple):
    """A model as `Trainer` takes it, config fields (section__key) in which it is to be caught, and what must vary: width, depth, or the
    width with the number of heads kept."""

    model: Callable[..., Transformer]
    fields: dict[str, Any] = {}
    varied: str = "width"


# Epsilon matters in training where it is at or above the gradients' entries, about 1e-3 at the sizes of a test. It is caught at any
# value, by the step of a gradient far below it.
LARGE_EPS = {"optimizer__eps": 3e-3}
TIED, BIASED = {"model__tied_embeddings": True}, {"model__biases": True}
COMPLETEP = {"parametrization__name": "completep"}
MUTANTS = {
    "standard with μP init": Mutant(mutant(init_only)),
    "standard with μP lr": Mutant(mutant(lr_only)),
    "no output multiplier": Mutant(mutant(no_output_multiplier)),
    "output multiplier twice": Mutant(mutant(output_multiplier_twice)),
    "hidden lr divided twice": Mutant(mutant(hidden_lr_twice)),
    "1/sqrt(head_dim) attention": Mutant(mutant(attention_scale=lambda self, head_dim: head_dim**-0.5), varied="heads"),
    "embedding lr scaled": Mutant(mutant(embedding_lr_scaled)),
    "one kind of layer ignored": Mutant(mutant(one_kind_ignored)),
    "tied embedding like hidden": Mutant(mutant(tied_like_hidden), TIED),
    "tied embedding grows": Mutant(mutant(tied_grows), TIED),
    "weight decay not compensated": Mutant(mutant(decay_not_compensated)),
    "epsilon not scaled": Mutant(mutant(eps_not_scaled)),
    "epsilon not scaled, and large": Mutant(mutant(eps_not_scaled), LARGE_EPS),
    "tied logits over the root of the width": Mutant(mutant(tied_logits_over_the_root), TIED),
    "biases decay": Mutant(mutant(biases_decay), BIASED),
    "head_dim^-3/4 attention": Mutant(mutant(attention_scale=between_the_scales), varied="heads"),
    "hidden bias lr scaled": Mutant(mutant(bias_lr_scaled), BIASED),
    "residual branch unscaled": Mutant(mutant(residual_multiplier=lambda self, depth: 1.0), COMPLETEP, "depth"),
    "hidden lr over depth": Mutant(mutant(hidden_lr_over_depth), COMPLETEP, "depth"),
}
