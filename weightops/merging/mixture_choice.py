"""The mixture of experts that a recipe describes: its models, and the way to their routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from weightops.errors import RecipeError
from weightops.merging.recipe_values import check_keys
from weightops.merging.yaml_lines import line_of, located
from weightops.support.registry import unknown

GateMode = Literal["hidden", "cheap_embed", "random", "uniform_random"]
"""Where the rows of routers come from: prompts' hidden states or embeddings, or chance."""

_KEYS = ("experts", "shared_experts", "gate_mode", "experts_per_token", "architecture")
_EXPERT_KEYS = ("model", "positive_prompts", "negative_prompts", "residual_scale")


@dataclass(frozen=True)
class Expert:
    """A model whose feed-forward layers become experts.

    Attributes:
        model: the ref of the model.
        positive_prompts: texts that are to be routed to it.
        negative_prompts: texts that aren't.
        residual_scale: what the output of its layers is multiplied by.
    """

    model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float = 1.0

    @classmethod
    def of(cls, content: Any) -> Expert:
        """Return the expert that an entry of a recipe describes.

        Raises:
            RecipeError: for a value that its key can't have.
        """
        check_keys(content, _EXPERT_KEYS, "key of an expert")
        if not isinstance(content.get("model"), str):
            raise RecipeError("an expert names no model")
        for key in ("positive_prompts", "negative_prompts"):
            texts = content.get(key) or []
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                with located(line_of(content, key)):
                    raise RecipeError(f"{key} is {texts!r:.80}, and must be a list of texts")
        scale = content.get("residual_scale")
        if not isinstance(scale, (int, float, type(None))) or isinstance(scale, bool):
            with located(line_of(content, "residual_scale")):
                raise RecipeError(f"residual_scale is {scale!r:.80}, and must be a number")
        return cls(
            content["model"],
            tuple(content.get("positive_prompts") or ()),
            tuple(content.get("negative_prompts") or ()),
            1.0 if scale is None else float(scale),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the entry that `of` reads, without defaults."""
        content: dict[str, Any] = {"model": self.model}
        content["positive_prompts"] = list(self.positive_prompts)
        content["negative_prompts"] = list(self.negative_prompts)
        scaled = {"residual_scale": self.residual_scale} if self.residual_scale != 1.0 else {}
        return {key: value for key, value in content.items() if value} | scaled


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts that dense models become.

    Attributes:
        experts: the models whose feed-forward layers are the experts.
        shared: the model of the expert that all tokens pass, in Qwen's mixtures; or None.
        gate_mode: how the rows of the routers are made.
        experts_per_token: the number of experts that a token passes.
        architecture: the model type that is wanted; None for the one that fits.
    """

    experts: tuple[Expert, ...]
    shared: Expert | None = None
    gate_mode: GateMode = "hidden"
    experts_per_token: int = 2
    architecture: str | None = None

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        """The experts, and the shared one last."""
        return (*self.experts, *([self.shared] if self.shared else ()))

    @classmethod
    def of(cls, content: Any) -> Mixture:
        """Return the mixture that a recipe's ``mixture`` describes.

        Raises:
            RecipeError: for a value that its key can't have, with its line where it is known.
            UnknownNameError: for an unknown key or gate mode, with the nearest.
        """
        check_keys(content, _KEYS, "key of a mixture")
        experts, shared = (_experts(content, key) for key in ("experts", "shared_experts"))
        gate_mode, count = content.get("gate_mode", "hidden"), content.get("experts_per_token", 2)
        with located(line_of(content, "gate_mode")):
            if gate_mode not in get_args(GateMode):
                raise unknown("gate mode", str(gate_mode), get_args(GateMode))
        with located(line_of(content, "experts_per_token")):
            if type(count) is not int or not 0 < count <= len(experts):
                raise RecipeError(
                    f"experts_per_token is {count!r:.80}, and there are {len(experts)} experts"
                )
        with located(line_of(content, "shared_experts")):
            if len(shared) > 1:
                raise RecipeError(f"there are {len(shared)} shared experts; one at most can be")
        architecture = content.get("architecture")
        with located(line_of(content, "architecture")):
            if not isinstance(architecture, (str, type(None))):
                raise RecipeError(f"architecture is {architecture!r:.80}, and must be a name")
        made = cls(experts, next(iter(shared), None), gate_mode, count, architecture)
        made._check_prompts(content)
        return made

    def _check_prompts(self, content: Mapping[str, Any]) -> None:
        """Check that each expert has prompts, and not all the same, if the gates are of them."""
        if "random" in self.gate_mode:
            return
        for key, experts in (
            ("experts", self.experts),
            ("shared_experts", self.all_experts[len(self.experts) :]),
        ):
            for i, expert in enumerate(experts):
                if not expert.positive_prompts:
                    with located(line_of(content[key], i)):
                        raise RecipeError(
                            f"{expert.model} has no positive_prompts, which {self.gate_mode} needs",
                            hint="gate_mode: random takes none",
                        )
        prompts = {(e.positive_prompts, e.negative_prompts) for e in self.experts}
        if len(self.experts) > 1 and len(prompts) == 1:
            with located(line_of(content, "experts")):
                raise RecipeError("all experts have the same prompts, so no router can choose")

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, without defaults."""
        content = {
            "experts": [expert.to_dict() for expert in self.experts],
            "shared_experts": [self.shared.to_dict()] if self.shared else None,
            "gate_mode": self.gate_mode,
            "experts_per_token": self.experts_per_token,
            "architecture": self.architecture,
        }
        return {key: value for key, value in content.items() if value is not None}


def _experts(content: Mapping[str, Any], key: str) -> tuple[Expert, ...]:
    listed = content.get(key)
    if listed is None and key != "experts":
        return ()
    if not isinstance(listed, list) or (not listed and key == "experts"):
        with located(line_of(content, key)):
            raise RecipeError(f"{key} is a list of mappings, each with a model")
    experts = []
    for i, entry in enumerate(listed):
        with located(line_of(listed, i)):
            experts.append(Expert.of(entry))
    return tuple(experts)
