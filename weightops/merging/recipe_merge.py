"""Run a recipe: open its models, bring their rows to one vocabulary, and merge or stack them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from weightops.algebra.linear_form import LinearForm, check_match
from weightops.algebra.names import layer_of
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.matching import open_matched
from weightops.checkpoints.opening import open_any
from weightops.checkpoints.ties import with_tied_names
from weightops.errors import CheckpointError, RecipeError, SpaceError
from weightops.hub.cards import merge_card
from weightops.merging.filling import fill_missing, like
from weightops.merging.layers import Stack, stack_layers, take_layers
from weightops.merging.mixture import family_of, layers_alone, make_mixture
from weightops.merging.mixture_choice import Mixture
from weightops.merging.output_files import warn_of_differing_tokens, with_chat_template
from weightops.merging.recipe_content import in_file
from weightops.merging.recipe_models import depends_on_packing, merge_models, with_packed_experts
from weightops.merging.recipe_parts import leaves_of, only_stacks, place_of, recorded_names, refs_of
from weightops.merging.tokenizers import TokenMap
from weightops.merging.towers import belongs
from weightops.merging.yaml_lines import located
from weightops.support.text import first_few, portable, renamed
from weightops.support.yaml_files import yaml_text

if TYPE_CHECKING:
    from weightops.merging.recipe import Recipe

log = logging.getLogger("weightops")


class RecipeMerge:
    """One run of a recipe, in which each model is opened once.

    Args:
        recipe: the recipe.
        named: name -> a recipe that it may name as a model; by default the recipe's own.
        running: the names of the recipes that wait for this one.
        strict: refuse models that don't belong together, instead of warning; see `merge`.
        device: where models are run.
        open_ref: opens what a ref names.
    """

    def __init__(
        self,
        recipe: Recipe,
        named: Mapping[str, Recipe] | None = None,
        running: tuple[str, ...] = (),
        *,
        strict: bool = False,
        device: str = "cpu",
        open_ref: Callable[[str], Checkpoint] = open_any,
    ) -> None:
        self.recipe, self._strict, self._device = recipe, strict, device
        file = recipe.lines.get("file", "")
        self._open_ref: Callable[[str], Checkpoint] = lambda ref: open_ref(place_of(ref, file))
        self._merge_models = partial(merge_models, strict=strict, open_model=self._open_ref)
        self._named = recipe.named if named is None else {**named, **recipe.named}
        self._running = running or ((recipe.name,) if recipe.name else ())
        self._opened: dict[str, Checkpoint] = {}
        self._tokens: TokenMap | None = None
        self._has_packed = False
        packs = recipe.forgiving or recipe.packed_experts
        self._packs = packs and any(map(depends_on_packing, leaves_of(recipe)))

    def run(self) -> Checkpoint:
        """Merge the models; the result is lazy, unless it needs images."""
        with in_file(self.recipe.lines.get("file", "")):
            return self._finished(self._whole())

    def _finished(self, merged: Checkpoint) -> Checkpoint:
        """Return a merge with its recipe and card, and its running statistics as they should be."""
        packed_experts = self.recipe.packed_experts or self._has_packed
        recipe = replace(self.recipe, packed_experts=packed_experts)
        if recipe.batchnorm == "base":
            from weightops.evaluation.batchnorm import with_batchnorm

            base = self.open(recipe.base) if recipe.base else None
            merged = with_batchnorm(merged, recipe.batchnorm, base)
        names = recorded_names(recipe)
        merged.recipe = portable(renamed(recipe.to_dict(), names))
        merged.card = merge_card(
            recipe.method,
            renamed(recipe.models, names),
            renamed(recipe.base, names),
            yaml_text(merged.recipe),
            recipe.all_options,
        )
        merged = merged.to(recipe.dtype) if recipe.dtype else merged
        if recipe.batchnorm in (None, "base"):
            return merged
        from weightops.evaluation.batchnorm import recompute_batchnorm

        with located(recipe.lines.get("batchnorm", "")):
            return recompute_batchnorm(merged, recipe.batchnorm, device=self._device)

    def _whole(self) -> Checkpoint:
        """Merge by the whole recipe; the result has no dtype, recipe or card yet."""
        recipe = self.recipe
        refs = refs_of(recipe)
        if recipe.tokenizer is not None:
            with located(recipe.lines.get("tokenizer", "")):
                self._tokens = self._token_map(refs)
        elif len(refs) > 1 and not recipe.mixture and not only_stacks(recipe):
            self._warn_of_vocabularies(refs)
        merged, self.recipe = self._part(recipe, None)
        if recipe.fill_missing is not None:
            with located(recipe.lines.get("fill_missing", "")):
                merged = fill_missing(merged, self.open(recipe.fill_missing))
        if recipe.like is not None:
            merged = self._like(merged, recipe.like)
        architecture = merged.architecture
        if architecture is not None and self._tokens is not None:
            architecture = self._tokens.architecture(architecture)
        if architecture is not None and recipe.chat_template is not None:
            folders = {
                ref: model.architecture.folder
                for ref in refs
                if (model := self.open(ref)).architecture is not None
            }
            with located(recipe.lines.get("chat_template", "")):
                architecture = with_chat_template(architecture, recipe.chat_template, folders)
        if architecture is merged.architecture:
            return merged
        return Checkpoint(merged.form, architecture)

    def _like(self, merged: Checkpoint, ref: str) -> Checkpoint:
        """Return what is merged with the files of a model beside it."""
        with located(self.recipe.lines.get("like", "")):
            try:
                return like(merged, self.open(ref), by_token=self._tokens is not None)
            except RecipeError as error:
                if not self.recipe.forgiving:
                    raise
                log.warning("%s", error.fact)
        return merged

    def _part(self, recipe: Recipe, module: str | None) -> tuple[Checkpoint, Recipe]:
        """Merge by a recipe, and return the recipe without the patterns that match nothing."""
        if recipe.mixture:
            return self._mixture(recipe, recipe.mixture), recipe
        if recipe.modules:
            return self._modules(recipe)
        if recipe.slices:
            return self._stacked(recipe, module)
        opened = self._group(recipe)
        models = [opened[ref] for ref in recipe.models]
        base = opened[recipe.base] if recipe.base else None
        return self._merge_models(recipe, models, base)

    def _mixture(self, recipe: Recipe, mixture: Mixture) -> Checkpoint:
        """Make models the experts of one model."""
        opened = self._group(recipe)
        assert recipe.base is not None
        base, experts = opened[recipe.base], []
        with located(recipe.lines.get("mixture", "")):
            model_type = family_of(mixture, opened.values())
        for ref in recipe.models:
            with located(recipe.lines.get(ref, "")):
                expert = open_matched(layers_alone(opened[ref]), base)
                check_match(base.form, expert.form, strict=False)
            experts.append(expert)
        with located(recipe.lines.get("mixture", "")):
            return make_mixture(
                base,
                experts,
                mixture,
                model_type,
                seed=recipe.seed,
                dtype=recipe.dtype,
                device=self._device,
            )

    def _modules(self, recipe: Recipe) -> tuple[Checkpoint, Recipe]:
        """Merge the parts of a model each by a recipe of its own."""
        merged, modules = {}, {}
        for name, part in recipe.modules.items():
            merged[name], modules[name] = self._part(part, name)
        main = next((name for name in merged if belongs("model.layers.0.w", name)), None)
        main = main or ("decoder" if "decoder" in merged else next(iter(merged)))
        owner: dict[str, str] = {}
        for name, checkpoint in merged.items():
            owned = [tensor for tensor in checkpoint.specs if belongs(tensor, name)]
            if not owned:
                with located(recipe.lines.get(f"modules {name}", "")):
                    raise RecipeError(
                        f"{checkpoint.ref} has no part {name}",
                        hint=f"its tensors are {first_few(checkpoint.specs, 5)}",
                    )
            owner |= dict.fromkeys(owned, name)
        for tensor in merged[main].specs:
            if not any(belongs(tensor, name) for name in merged):
                owner[tensor] = main
        forms = [
            checkpoint.form.part([t for t in checkpoint.specs if owner.get(t) == name])
            for name, checkpoint in merged.items()
        ]
        architecture = merged[main].architecture
        for name, checkpoint in merged.items():
            if name != main and architecture is not None and checkpoint.architecture is not None:
                architecture = architecture.changed(
                    {
                        key: value
                        for key, value in checkpoint.architecture.changes.items()
                        if key not in architecture.changes
                    }
                )
        result = Checkpoint(LinearForm.of(Stack(forms)), architecture)
        return result, replace(recipe, modules=modules)

    def _stacked(self, recipe: Recipe, module: str | None) -> tuple[Checkpoint, Recipe]:
        """Put the layers of slices on top of each other."""
        parts, pieces, spans, starts, first = [], [], [], [], 0
        for i, piece in enumerate(recipe.slices):
            assert piece.layers is not None
            with located(piece.lines.get("slice", "")):
                opened = self._group(piece)
                take = partial(
                    take_layers,
                    first=first,
                    before=i == 0,
                    after=i == len(recipe.slices) - 1,
                    module=module,
                )
                models = []
                for ref, span in zip(piece.models, piece.layers, strict=True):
                    with located(piece.lines.get(ref, "")):
                        models.append(take(opened[ref], span))
                span = piece.base_layers or piece.layers[0]
                base = take(opened[piece.base], span) if piece.base else None
                whole = replace(piece, dtype=recipe.dtype)
                part, pruned = self._merge_models(whole, models, base)
            parts.append(part)
            pieces.append(replace(pruned, dtype=None))
            starts.append(opened[piece.models[0]])
            spans.append(piece.layers[0])
            first += piece.layers[0][1] - piece.layers[0][0]
        return stack_layers(parts, spans, starts, module), replace(recipe, slices=tuple(pieces))

    def _group(self, recipe: Recipe) -> dict[str, Checkpoint]:
        """Open the models that are merged with each other, with rows by token if they should be."""
        refs = list(dict.fromkeys([*([recipe.base] if recipe.base else []), *recipe.models]))
        opened = {}
        for ref in refs:
            with located(recipe.lines.get(ref, "")):
                opened[ref] = self._with_ends(self.open(ref))
        if self._tokens is None:
            return opened
        first = opened[refs[0]]
        matched = {
            ref: open_matched(model, first, strict=self._strict)
            for ref, model in self._tokens.with_equal_rows(opened).items()
        }
        base = self._tokens.base if self._tokens.base in matched else None
        return self._tokens.mapped(matched, base)

    @cached_property
    def _ends(self) -> set[str]:
        """The names outside of the layers that models of a stack have, or those merged by token."""
        if not self.recipe.slices and self._tokens is None:
            return set()  # `merge` compares the models
        names = (name for ref in refs_of(self.recipe) for name in self.open(ref).specs)
        return {name for name in names if layer_of(name) is None}

    def _with_ends(self, model: Checkpoint) -> Checkpoint:
        """Return a model with the head that others have, if its own is tied to its embeddings."""
        if model.form.space != "weights" or self._ends <= model.specs.keys():
            return model
        return with_tied_names(model, self._ends)

    def open(self, ref: str) -> Checkpoint:
        """Open a model once: a ref, the name of a recipe, or one of them with ``+`` an adapter."""
        if ref not in self._opened:
            opened = self._opened_now(ref)
            packed = with_packed_experts(opened) if self._packs else opened
            self._has_packed |= packed is not opened
            self._opened[ref] = packed
        return self._opened[ref]

    def _opened_now(self, ref: str) -> Checkpoint:
        if ref in self._running:
            chain = " -> ".join([*self._running[self._running.index(ref) :], ref])
            raise RecipeError(f"recipes that name each other in a circle: {chain}")
        if ref in self._named:
            inner = RecipeMerge(
                self._named[ref],
                self._named,
                (*self._running, ref),
                strict=self._strict,
                device=self._device,
                open_ref=self._open_ref,
            )
            return inner.run()
        start, plus, adapter = ref.rpartition("+")
        if not plus or Path(ref).exists():
            return self._open_ref(ref)
        base, delta = self.open(start), self._open_ref(adapter)
        if delta.form.space != "delta":
            raise SpaceError(
                f"{adapter} behind + holds weights, not an adapter",
                hint="an adapter is a folder with adapter_config.json",
            )
        return open_matched(delta, base)

    def _token_map(self, refs: Sequence[str]) -> TokenMap:
        """Return the vocabulary of the merge."""
        choice = self.recipe.tokenizer
        assert choice is not None
        base = choice.base or next(filter(None, [r.base for r in leaves_of(self.recipe)]), None)
        models = {}
        for ref in dict.fromkeys([*([base] if base else []), *refs]):
            with located(self._line_of(ref)):
                opened = self.open(ref)
            if opened.form.space == "weights":
                models[ref] = opened
        source = None if choice.source in ("union", "base") else self._tokenizers(choice.source)
        return TokenMap(choice, models, base, self.recipe.lines, source)

    def _tokenizers(self, source: str) -> Checkpoint:
        """Open the model that a recipe takes the tokenizer of."""
        try:
            return self.open(source)
        except CheckpointError as error:
            raise RecipeError(
                f"{source!r} is not a tokenizer's source: {error.fact}",
                hint="union, base, or one of the models",
            ) from error

    def _line_of(self, ref: str) -> str:
        """Return the line of a model, where it is known."""
        recipes = [self.recipe, *leaves_of(self.recipe)]
        return next(filter(None, (recipe.lines.get(ref) for recipe in recipes)), "")

    def _warn_of_vocabularies(self, refs: Sequence[str]) -> None:
        folders = {}
        for ref in refs:
            with located(self._line_of(ref)):
                architecture = self.open(ref).architecture
            if architecture is not None and architecture.library == "transformers":
                folders[ref] = architecture.folder
        warn_of_differing_tokens(folders)
